"""Workers of a distributed cluster: whether they can do the work, and why they do not go on."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from dask.utils import format_bytes

from dask_semdedup.errors import ClusterUnavailableError, InvalidArgumentError, counted, some
from dask_semdedup.lazy.blocks import COPIES, least_limit, least_memory
from dask_semdedup.lazy.expressions import ReadClusters, ScoresOfFiles

if TYPE_CHECKING:
    import dask.dataframe as dd
    from distributed import Client

__all__ = ["check_memory", "check_workers", "is_connected", "lost", "watched"]

# Seconds that a cluster has to get its first worker.
FIRST_WORKER = 60

# Seconds without a finished task after which the workers are looked at.
PATIENCE = 60


def check_workers(client: Client, version: str, timeout: float = FIRST_WORKER) -> None:
    """Raise unless a cluster has workers, all with the given version of the package.

    Parameters
    ----------
    client : distributed.Client
    version : str
        Version of this process.
    timeout : float
        Seconds to wait for the first worker.

    Raises
    ------
    ClusterUnavailableError
        With the workers that cannot do the work.
    """
    address = _address(client)
    try:
        client.wait_for_workers(1, timeout=timeout)
    except TimeoutError as error:
        raise ClusterUnavailableError(
            f"The scheduler at {address} has had no workers for {timeout:g} s. Start workers that connect to it: "
            f"dask worker {address}."
        ) from error
    answers: Any = client.get_versions(packages=["dask_semdedup"])
    versions = {worker: known["packages"].get("dask_semdedup") for worker, known in answers["workers"].items()}
    if lacking := [worker for worker, found in versions.items() if found is None]:
        raise ClusterUnavailableError(
            f"{_count(lacking, versions)} cannot import dask_semdedup: {some(lacking)}. Install version {version} "
            "where they run, and start them again."
        )
    if others := {worker: found for worker, found in versions.items() if found != version}:
        raise ClusterUnavailableError(
            f"{_count(others, versions)} have another version of dask_semdedup than this process, {version}: "
            f"{some(others.items())}. Install the same version, and start them again."
        )


def check_memory(client: Client, ddf: dd.DataFrame) -> None:
    """Raise if workers cannot hold what a frame of whole clusters is read in: partitions, or blocks of large ones.

    Otherwise worker after worker would be killed, until Dask gives up.

    Parameters
    ----------
    client : distributed.Client
    ddf : dask.dataframe.DataFrame

    Raises
    ------
    InvalidArgumentError
        With the bytes that are needed and available.
    """
    if not any(True for _ in ddf.expr.find_operations(ReadClusters)):
        return
    read = list(ddf.optimize(fuse=False).expr.find_operations((ReadClusters, ScoresOfFiles)))
    limit = least_limit(client)
    # What surely does not fit is refused.
    in_host = [files.bytes_at_once() for files in read if files.source.reader.backend == "pandas"]
    needed = (COPIES - 1) * max((nbytes for partitions in in_host for nbytes in partitions), default=0)
    if needed > limit:
        raise InvalidArgumentError(
            f"The largest partition takes about {format_bytes(needed)} of memory while its rows are compared, and a "
            f"worker has {format_bytes(int(limit))}. Choose a smaller partition size; if one cluster is that large, "
            "make more clusters, or give workers more memory.",
            parameters=["partition_size"],
        )
    if not any(files.blocks is not None for files in read):
        return
    workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    for address, worker in workers.items():
        least = least_memory(worker["nthreads"])
        if (worker["memory_limit"] or math.inf) < least:
            raise InvalidArgumentError(
                f"The worker at {address} has {format_bytes(worker['memory_limit'])} of memory for "
                f"{counted(worker['nthreads'], 'thread')}, and needs {format_bytes(least)} to compare the rows of a "
                "large cluster. Give workers more memory, or fewer threads."
            )


def is_connected(client: Client) -> bool:
    """Return whether a client has a connection to its scheduler."""
    return str(client.status) == "running"


def lost(client: Client) -> ClusterUnavailableError:
    """Return the error for a client whose scheduler is gone."""
    return ClusterUnavailableError(
        f"The connection to the scheduler at {_address(client)} is lost: it has stopped, or cannot be reached. "
        "Start it again, and run the same command again."
    )


@contextmanager
def watched(client: Client) -> Iterator[Callable[[], None]]:
    """Warn if nothing has finished for a while and the workers cannot go on. Yield a function that reports progress.

    Warns
    -----
    UserWarning
        If there are no workers, or all have paused. It is repeated only after progress.
    """
    last, told, over = time.monotonic(), False, threading.Event()

    def moved() -> None:
        nonlocal last, told
        last, told = time.monotonic(), False

    def watch() -> None:
        nonlocal told
        while not over.wait(min(1.0, PATIENCE / 4)):
            if told or time.monotonic() - last < PATIENCE:
                continue
            # The cluster may be gone by now: whoever waits for it says so.
            with suppress(OSError):
                if reason := _why_nothing_moves(client):
                    told = True
                    warnings.warn(f"Nothing has finished for {PATIENCE:g} s: {reason}", stacklevel=2)

    thread = threading.Thread(target=watch, name="watch-workers", daemon=True)
    thread.start()
    try:
        yield moved
    finally:
        over.set()
        thread.join()


def _why_nothing_moves(client: Client) -> str | None:
    """Return why no worker goes on, or None if some worker does."""
    if not is_connected(client):
        return None
    workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    if not workers:
        return f"the scheduler at {_address(client)} has no workers. Start some."
    if any(worker["status"] != "paused" for worker in workers.values()):
        return None
    sizes = [
        f"{format_bytes(worker['metrics']['memory'])} of {format_bytes(worker['memory_limit'])}"
        for worker in workers.values()
    ]
    return (
        f"all {len(workers)} workers have paused, since their memory is full ({some(sizes, 2)}). Stop, and run again "
        "with more memory a worker, fewer threads a worker, or smaller partitions."
    )


def _address(client: Client) -> str:
    return str(client.scheduler.address) if client.scheduler else "an unknown address"


def _count(some_of: Any, workers: Any) -> str:
    return f"{len(some_of)} of {len(workers)} workers"
