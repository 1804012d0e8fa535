"""The threads, processes or cluster on which a command runs, and its progress bars."""

from __future__ import annotations

import logging
import signal
import ssl
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar

import click
import dask
from dask import threaded
from dask.callbacks import Callback
from dask.system import CPU_COUNT
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dask_semdedup.cli.options import tls_files
from dask_semdedup.errors import ClusterUnavailableError, InvalidArgumentError, counted
from dask_semdedup.lazy.tasks import results_of, submit

if TYPE_CHECKING:
    import dask.dataframe as dd
    from distributed import Client, LocalCluster, Security

# Seconds that a client has to take leave of its scheduler.
CLOSING = 10
# Seconds between lines that tell how far a command is, where no bar does.
SECONDS_PER_LINE = 60.0

T = TypeVar("T")


@contextmanager
def connect(scheduler: str | None, workers: int | None, paths: Iterable[str | None] = ()) -> Iterator[Client | None]:
    """Yield a client of the requested cluster, or None for the threads of this process.

    All workers of a cluster must be able to reach the `paths` that are not None. Certificates and keys are those of
    the command's options.
    """
    if scheduler is None and workers is None:
        # It loads torch, which takes seconds, before the first task.
        import dask_semdedup.search

        # A pool of its own, since its exit waits for running tasks: none writes after a failed run was cleaned up.
        with (
            ThreadPoolExecutor(dask.config.get("num_workers", None) or CPU_COUNT) as pool,
            # What Dask would choose, too, but only after it has loaded distributed.
            dask.config.set(
                {
                    "scheduler": threaded.get,
                    "pool": pool,
                    "dataframe.shuffle.method": dask.config.get("dataframe.shuffle.method", None) or "disk",
                }
            ),
        ):
            yield None
        return
    _refuse_memory(paths, "--workers" if scheduler is None else "--scheduler")
    # Nobody at a shell can change the graph.
    warnings.filterwarnings("ignore", "Sending large graph")
    from distributed import Security

    import dask_semdedup
    from dask_semdedup.lazy.workers import check_workers

    if scheduler is not None:
        _check_address(scheduler)
        tls = tls_files(click.get_current_context())
        security = Security(require_encryption=True, **tls) if tls else None
        with _client(scheduler, security) as client:
            check_workers(client, dask_semdedup.__version__)
            yield client
        return
    with _local_cluster(workers) as cluster, _client(cluster.scheduler_address, None) as client:
        yield client


@contextmanager
def _local_cluster(workers: int | None) -> Iterator[LocalCluster]:
    """Yield a cluster of processes of this machine, which an interrupt from the terminal does not reach.

    Processes inherit the signals that are blocked in the thread that starts them. An interrupt during the start waits
    for its end, since a cluster cannot be closed before.
    """
    from distributed import LocalCluster, Status
    from distributed.gc import disable_gc_diagnosis

    # It unblocks signals when it starts.
    resource_tracker.ensure_running()
    with (
        ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, [signal.SIGINT])) as pool,
        # The profiles that a worker keeps of an hour take up to 200 MB.
        dask.config.set({"distributed.worker.profile.enabled": False}),
    ):
        # A worker's failure reaches the user through its future: its own log would only repeat it.
        start = partial(LocalCluster, n_workers=workers, dashboard_address=":0", silence_logs=logging.CRITICAL)
        starting = pool.submit(start)
        try:
            cluster = starting.result()
            # The scheduler's callbacks of the garbage collector would drop an interrupt that arrives in them.
            disable_gc_diagnosis(force=True)
            yield cluster
        finally:
            cluster = starting.result()
            # It would wait for a scheduler that is gone.
            cluster.shutdown_scheduler = getattr(cluster.scheduler, "status", None) == Status.running
            cluster.close()


def on_cluster(
    attempt: Callable[[Client | None], T],
    scheduler: str | None,
    workers: int | None,
    paths: Iterable[str | None],
    progress: Progress,
) -> T:
    """Return what a function returns for the client that `connect` yields.

    If the processes of ``--workers`` are lost, they are started again, and the function is called again, which must go
    on with what is finished. If nothing was finished since their start, that is an error.
    """
    while True:
        before = _finished(progress)
        try:
            with connect(scheduler, workers, paths) as client:
                return attempt(client)
        except ClusterUnavailableError:
            finished = _finished(progress) - before
            if workers is None or not finished:
                raise
            warnings.warn(
                f"The scheduler of --workers has stopped after {counted(finished, 'task')}: starting it again.",
                stacklevel=2,
            )


def _finished(progress: Progress) -> int:
    """Return the number of tasks that are done, of all bars."""
    return sum(int(task.completed) for task in progress.tasks)


@contextmanager
def _client(address: str, security: Security | None) -> Iterator[Client]:
    """Yield a client of a scheduler; one that has lost it is closed without waiting for it."""
    from distributed import Client

    from dask_semdedup.lazy.workers import is_connected, lost

    try:
        client = Client(address, security=security)
    except (OSError, ssl.SSLError) as error:
        raise ClusterUnavailableError(f"Cannot connect to the scheduler at {address}: {error}") from error
    try:
        yield client
    except (CancelledError, OSError) as error:
        if is_connected(client):
            raise
        raise lost(client) from error
    finally:
        # It would take leave of a scheduler that is gone.
        with suppress(TimeoutError):
            client.close(timeout=CLOSING if is_connected(client) else 0)


def _refuse_memory(paths: Iterable[str | None], flag: str) -> None:
    """Raise if a path is in the memory of this process."""
    for path in paths:
        # It may be wrapped by another file system, such as a cache.
        if path is not None and "memory://" in path:
            raise InvalidArgumentError(
                f"{path} is in the memory of this process, a file system that it does not share with the processes of "
                f"{flag}. Name a path that all of them reach, or leave {flag} out."
            )


def _check_address(scheduler: str) -> None:
    """Raise for an invalid address. A client would fail only after it has become Dask's default."""
    from distributed.comm.addressing import parse_address, parse_host_port

    protocol, location = parse_address(scheduler)
    try:
        if protocol in ("tcp", "tls"):
            parse_host_port(location)
    except ValueError as error:
        message = f"{scheduler!r} is not the address of a scheduler ({error}). Name one such as tcp://10.0.0.1:8786."
        raise InvalidArgumentError(message, parameters=["scheduler"]) from error


@contextmanager
def show_progress(*, enabled: bool) -> Iterator[Progress]:
    """Yield a progress bar on stderr. Where that is no terminal, it is a line every minute."""
    console = Console(stderr=True, quiet=not enabled)
    progress = Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
    )
    done = Event()
    lines = Thread(target=_print_lines, args=(progress, done), daemon=True)
    with progress:
        if progress.disable:
            lines.start()
        try:
            yield progress
        finally:
            done.set()


def _print_lines(progress: Progress, done: Event) -> None:
    """Print how far the last task is, from time to time until all are done."""
    while not done.wait(SECONDS_PER_LINE):
        for task in progress.tasks[-1:]:
            tasks = f"{task.completed:,.0f} of {counted(int(task.total), 'task')}, " if task.total else ""
            progress.console.print(f"{task.description}: {tasks}{task.elapsed or 0:,.0f} s", soft_wrap=True)


def log_to(console: Console) -> None:
    """Show the library's log above the progress bar. Workers in other processes keep their own logs."""
    logger = logging.getLogger("dask_semdedup")
    logger.setLevel(logging.INFO)
    logger.addHandler(RichHandler(console=console, show_path=False, show_level=False))


@contextmanager
def show_tasks(progress: Progress, title: str, *, client: Client | None) -> Iterator[None]:
    """Show a bar of the tasks that the block runs in this process. On a cluster it shows only the time."""
    task = progress.add_task(title, total=None)
    if client is None:
        with TaskProgress(progress, task):
            yield
    else:
        yield
    progress.update(task, total=progress.tasks[task].completed)


class TaskProgress(Callback):
    """Advances a progress bar with the tasks of Dask's schedulers in this process."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        super().__init__()
        self.progress, self.task = progress, task

    def _start_state(self, _graph: Any, state: dict[str, Any]) -> None:
        tasks = sum(len(state[name]) for name in ("ready", "waiting", "running"))
        known = self.progress.tasks[self.task].total
        self.progress.update(self.task, total=tasks + (known or 0))

    def _posttask(self, *_: Any) -> None:
        self.progress.advance(self.task)


def follow_futures(client: Client, frame: dd.DataFrame, progress: Progress, title: str) -> list[Any]:
    """Compute a frame's partitions, and advance a progress bar as they are done.

    The first error cancels the others and is raised.
    """
    futures = submit(client, frame)
    task = progress.add_task(title, total=len(futures))
    return results_of(client, futures, lambda: progress.advance(task))
