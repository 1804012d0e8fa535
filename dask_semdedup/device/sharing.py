"""The number of processes and threads that share a GPU, which bounds the memory of each partition."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dask.system import CPU_COUNT

from dask_semdedup.device.devices import visible_gpus
from dask_semdedup.device.queues import PARTITIONS_ON_GPU

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["gpus_at_work", "partitions_per_gpu", "workers_of"]


def partitions_per_gpu(client: Client | None = None) -> int:
    """Return the number of partitions that must fit on a GPU at once.

    Per process, this is twice its slots, or its number of threads if that is greater. A partition that is read and
    scored in one task takes a slot (`gpu_slot`), and all slots together may take half of the GPU. Frames that are tasks
    of their own may be as many as there are threads.

    Parameters
    ----------
    client : distributed.Client, optional
        The client that will run the work; by default the default client, if there is one. If a machine has as many
        workers as this one has GPUs, each is taken to have its own. If it has more, all are taken to share one, as
        those of a plain `LocalCluster` do.
    """
    return max(processes * max(2 * PARTITIONS_ON_GPU, threads) for processes, threads in _sharing_a_gpu(client))


def gpus_at_work(client: Client | None = None) -> int:
    """Return the number of GPUs that will share the work: as many as processes, up to those of each machine.

    Parameters
    ----------
    client : distributed.Client, optional
        As of `partitions_per_gpu`.
    """
    gpus = visible_gpus()
    return max(1, sum(min(len(processes), gpus) for processes in _machines(client)))


def _sharing_a_gpu(client: Client | None) -> list[tuple[int, int]]:
    """Return, for each machine, the processes per GPU and the threads of one of them."""
    gpus = visible_gpus()
    return [_share(processes, gpus) for processes in _machines(client)] or [(1, CPU_COUNT)]


def _machines(client: Client | None) -> list[list[int]]:
    """Return the threads of each process of each machine of a cluster; none without a cluster that can be asked."""
    workers = workers_of(client) or {}
    machines: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for address, worker in workers.items():
        process = "this" if address.startswith("inproc://") else address
        machines[worker["host"]][process] += worker["nthreads"]
    return [list(processes.values()) for processes in machines.values()]


def _share(threads: Sequence[int], gpus: int) -> tuple[int, int]:
    """Return the processes per GPU and the threads of one, given the threads of each process of a machine."""
    if len(threads) > gpus:
        return len(threads), max(threads)
    # Fewer processes than GPUs may have a GPU each, or all the same one.
    return 1, max(threads) if len(threads) == gpus else sum(threads)


def workers_of(client: Client | None = None) -> dict[str, Any] | None:
    """Return what the scheduler knows of each worker, by its address; None where no scheduler can be asked.

    Parameters
    ----------
    client : distributed.Client, optional
        By default the default client, if there is one.
    """
    client = client or _default_client()
    # An asynchronous client cannot be asked here.
    if client is None or client.asynchronous or client.status != "running":
        return None
    return client.scheduler_info(n_workers=-1)["workers"]


def _default_client() -> Client | None:
    distributed = sys.modules.get("distributed.client")
    if distributed is None:
        return None
    try:
        return distributed.default_client()
    except ValueError:
        return None
