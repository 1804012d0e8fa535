"""Queues for the cores and the GPU that the threads of one process share."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache

import numpy as np
from dask.system import CPU_COUNT
from threadpoolctl import ThreadpoolController

from dask_semdedup.device.devices import only_on
from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.device.streams import reading_stream

__all__ = ["ONE_CORE", "cores", "cores_for", "gpu_slot", "gpu_turn"]

# Clusters of at least this many rows are searched one at a time on all of torch's threads: these then lose less time
# waiting for each other than is gained by one search per thread of Dask.
ROWS_WORTH_ALL_THREADS = 8192

# Offsets of a search that takes one core: other partitions take the others.
ONE_CORE = np.array([0, 1])


@only_on("cpu")
def cores_for(segments: np.ndarray) -> AbstractContextManager[None]:
    """Wait for the cores that a search on a CPU is worth, and limit torch to them.

    That is all cores if products of one cluster fill them, or if no other search can run: Dask's threaded tasks never
    run in the main thread. Otherwise it is one core.

    Parameters
    ----------
    segments : numpy.ndarray
        (k + 1,) offsets of the clusters.
    """
    return cores().take(_threads(segments))


def _threads(segments: np.ndarray) -> int:
    import torch

    # Always ask: torch resets the number of threads at the first product of a thread that has not asked.
    available = torch.get_num_threads()
    is_alone = threading.current_thread() is threading.main_thread()
    return available if is_alone or np.diff(segments).max() >= ROWS_WORTH_ALL_THREADS else 1


# Partitions that are read and scored on a GPU at once: more would take memory only to wait for each other.
PARTITIONS_ON_GPU = 5

_slots = threading.BoundedSemaphore(PARTITIONS_ON_GPU)


@only_on("cuda")
@contextmanager
def gpu_slot() -> Iterator[None]:
    """Wait for one of this process's `PARTITIONS_ON_GPU` slots to read and score a partition, in `reading_stream`."""
    # Torch can only share a pool that exists when it first uses CUDA.
    share_memory_pool()
    with _slots, reading_stream("cuda"):
        yield


# Multiplications of a long search: a tenth of a second on an H200.
LONG_SEARCH = 2.5e13

# A search that needs both takes the turn of long ones first, so that short ones do not wait meanwhile.
_turns = {is_long: threading.Lock() for is_long in (True, False)}


@only_on("cuda")
@contextmanager
def gpu_turn(work: float | None = None) -> Iterator[None]:
    """Wait for a turn to search on this process's GPU.

    Two searches at once take as long as one after the other, but then neither is done, and no slot is free for the next
    partition, before both are. Short searches therefore take turns. So do long ones, as of an oversized cluster, among
    themselves: short ones need not wait for them. A search of rows in host memory takes both turns, as it claims all
    memory that is free when it begins.

    Parameters
    ----------
    work : float, optional
        The multiplications of the search; None if its rows are in host memory.
    """
    with ExitStack() as turns:
        for is_long, turn in _turns.items():
            if work is None or is_long == (work >= LONG_SEARCH):
                turns.enter_context(turn)
        yield


class Cores:
    """Queue of threads for the cores of the process, so that Dask's and torch's threads do not multiply.

    OpenMP threads spin while they wait for each other, which takes long if there are more of them than cores.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._pools = ThreadpoolController()

    @contextmanager
    def take(self, threads: int) -> Iterator[None]:
        """Wait for a number of cores, and limit torch to it in this thread.

        First come, first served: a thread that wants all cores would otherwise wait until no other wants any.
        """
        threads = min(threads, self._count)
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._free >= threads)
                self._free -= threads
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
        try:
            # The limit of OpenMP holds for the calling thread alone, that of `torch.set_num_threads` does not.
            with self._pools.limit(limits=threads, user_api="openmp"):
                yield
        finally:
            with self._changed:
                self._free += threads
                self._changed.notify_all()


_making = threading.Lock()


def cores() -> Cores:
    """Return the queue for the cores of this process, made at the first search, once torch has loaded OpenMP."""
    # Threads whose first searches coincide must share one queue.
    with _making:
        return _cores()


@cache
def _cores() -> Cores:
    import torch  # noqa: F401

    return Cores(CPU_COUNT)


def _forget_threads() -> None:
    """Start anew in a forked process, which has none of the threads that hold cores or the lock."""
    global _making
    _making = threading.Lock()
    _cores.cache_clear()


os.register_at_fork(after_in_child=_forget_threads)
