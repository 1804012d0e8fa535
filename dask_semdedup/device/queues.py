"""Queues for what threads of one process share: its cores, and its GPU."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache

import numpy as np
from dask.system import CPU_COUNT
from threadpoolctl import ThreadpoolController

from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.device.streams import reading_stream

__all__ = ["cores", "cores_for", "gpu_slot", "gpu_turn"]

# Rows of a cluster from which on torch's threads, all at one product, waste less time on waiting for each other than a
# search to each of Dask's threads saves.
ROWS_WORTH_ALL_THREADS = 8192


def cores_for(device: str, segments: np.ndarray) -> AbstractContextManager[None]:
    """Wait for the cores that a search is worth, and keep torch to them; on a GPU there is nothing to wait for.

    On a CPU that is one core beside other searches, or all of them where a cluster's products fill them. Dask's
    threaded tasks never run in the main thread: what does has nothing beside it.

    Parameters
    ----------
    device : {"cpu", "cuda"}
    segments : numpy.ndarray
        (k + 1,) offsets of the clusters.
    """
    return cores().take(_threads(segments)) if device == "cpu" else nullcontext()


def _threads(segments: np.ndarray) -> int:
    import torch

    # To ask comes first: a thread that has not asked sets its number anew at its first product.
    available = torch.get_num_threads()
    is_alone = threading.current_thread() is threading.main_thread()
    return available if is_alone or np.diff(segments).max() >= ROWS_WORTH_ALL_THREADS else 1


# Partitions that are read and scored on a GPU at once: more would only wait for each other, and need memory.
PARTITIONS_ON_GPU = 5

_room = threading.BoundedSemaphore(PARTITIONS_ON_GPU)


@contextmanager
def gpu_slot(device: str) -> Iterator[None]:
    """Wait for one of the `PARTITIONS_ON_GPU` places on this process's GPU, and work there in this thread's stream.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        Where a partition is read and scored; on a CPU there is nothing to wait for.
    """
    if device == "cpu":
        yield
        return
    # Torch can only share a pool that it finds when it first uses CUDA.
    share_memory_pool()
    with _room, reading_stream(device):
        yield


# Multiplications of a long search, a tenth of a second of an H200's time.
LONG_SEARCH = 2.5e13

# Who needs both takes that of long ones first, so that short ones do not wait meanwhile.
_turns = {is_long: threading.Lock() for is_long in (True, False)}


@contextmanager
def gpu_turn(device: str, work: float | None = None) -> Iterator[None]:
    """Wait for a turn to search on this process's GPU; on a CPU there is nothing to wait for.

    Two searches at once take as long as one after the other, but the first would be done, and its place be free for
    the next to be read, only when both are. So short ones take turns, and long ones, as of a giant cluster, for whose
    end the short ones need not wait. One of rows in host memory has the GPU for itself: it takes what memory is free
    when it begins.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        Where the search is.
    work : float, optional
        Its multiplications; None where its rows are in host memory.
    """
    with ExitStack() as turns:
        for is_long, turn in _turns.items() if device == "cuda" else ():
            if work is None or is_long == (work >= LONG_SEARCH):
                turns.enter_context(turn)
        yield


class Cores:
    """Shares the process's cores out to its threads, so that Dask's and torch's do not multiply.

    OpenMP's threads wait for each other by spinning: where there are more of them than cores, they wait for long.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._pools = ThreadpoolController()

    @contextmanager
    def take(self, threads: int) -> Iterator[None]:
        """Wait for so many cores, and let torch use no more in this thread.

        First come, first served: one that waits for all cores would else wait until nobody wants any.
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
            # OpenMP's limit is the calling thread's alone, which that of `torch.set_num_threads` is not.
            with self._pools.limit(limits=threads, user_api="openmp"):
                yield
        finally:
            with self._changed:
                self._free += threads
                self._changed.notify_all()


_making = threading.Lock()


def cores() -> Cores:
    """The cores of this process. Found at the first search, when torch and with it OpenMP are loaded."""
    # Two threads that come first at once must not get cores each.
    with _making:
        return _cores()


@cache
def _cores() -> Cores:
    import torch  # noqa: F401

    return Cores(CPU_COUNT)


def _forget_threads() -> None:
    """A forked process has none of the threads that hold cores, or the lock."""
    global _making
    _making = threading.Lock()
    _cores.cache_clear()


os.register_at_fork(after_in_child=_forget_threads)
