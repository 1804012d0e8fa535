"""Where work runs, and on how many cores: what searches, assignments and models on one machine agree on."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from dask.system import CPU_COUNT
from threadpoolctl import ThreadpoolController

from dask_semdedup._validate import check_choice
from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.memory import share_memory_pool
from dask_semdedup.streams import beside

if TYPE_CHECKING:
    from distributed import Client

__all__ = [
    "DEVICES",
    "HOMES",
    "check_device",
    "choose_device",
    "cores",
    "cores_for",
    "cores_per_gpu",
    "has_cuda",
    "pairs_of",
    "partitions_per_gpu",
    "place_for",
    "turn_on_gpu",
    "visible_gpus",
]

DEVICES = ("auto", "cpu", "cuda")
# Where the frames of each backend are.
HOMES = {"pandas": "cpu", "cudf": "cuda"}
# Pairs of rows from which on a GPU repays the way to it: 2,000 rows of 384 took an H200 half as long as 16 cores.
PAIRS_WORTH_A_GPU = 2_000_000
# Rows of a cluster from which on torch's threads, all at one product, waste less time on waiting for each other than a
# search to each of Dask's threads saves.
ROWS_WORTH_ALL_THREADS = 8192


def check_device(device: str) -> None:
    """Raise `InvalidArgumentError` unless a device is one of `DEVICES`, and there.

    Examples
    --------
    >>> check_device("cpu")
    """
    check_choice("device", device, DEVICES)
    if device == "cuda" and not has_cuda():
        raise InvalidArgumentError(
            "device is 'cuda', but torch sees no CUDA device. Use device='cpu' or 'auto', or install a torch with CUDA."
        )


def choose_device(device: str, home: str, segments: np.ndarray) -> str:
    """Where to search: as told, else where the frame is, or on a GPU that is there if the work repays the way to it.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
    home : {"cpu", "cuda"}
        Where the frame is.
    segments : numpy.ndarray
        (k + 1,) offsets of the clusters: every pair of rows of one is work.

    Examples
    --------
    >>> choose_device("auto", "cpu", np.array([0, 100]))
    'cpu'
    """
    if device != "auto":
        return device
    return "cuda" if pairs_of(segments) >= PAIRS_WORTH_A_GPU and has_cuda() else home


def pairs_of(segments: np.ndarray) -> float:
    """About how many pairs of rows clusters have: half the squares of their rows.

    Parameters
    ----------
    segments : numpy.ndarray
        (k + 1,) offsets of the clusters.

    Examples
    --------
    >>> pairs_of(np.array([0, 100, 102]))
    5002.0
    """
    return float(np.square(np.diff(segments), dtype=np.float64).sum() / 2)


def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def visible_gpus() -> int:
    """How many GPUs this process sees, as which it takes one that it does not.

    Examples
    --------
    >>> visible_gpus() >= 1
    True
    """
    import torch

    # Asks the driver, and does not make torch use CUDA.
    return max(1, torch.cuda.device_count())


def cores_per_gpu() -> int:
    """The share that a GPU has of the machine's cores, where each has a process of its own.

    Dask-CUDA shows all GPUs to each of its workers.

    Examples
    --------
    >>> cores_per_gpu() >= 1
    True
    """
    return max(1, CPU_COUNT // visible_gpus())


def partitions_per_gpu(client: Client | None = None) -> int:
    """How many partitions to leave room for on a GPU: twice the places of each process, or as many as it has threads.

    What is read and scored in one task takes a place (`place_for`), and all places take half of the GPU. Frames that
    are tasks of their own may be as many as there are threads.

    Parameters
    ----------
    client : distributed.Client, optional
        Where the work will go; the default client, if there is one. Where a machine has as many workers as this one has
        GPUs, each is taken to have its own. Where it has more, all share one, as those of a plain `LocalCluster` do.

    Examples
    --------
    >>> partitions_per_gpu() == max(10, CPU_COUNT)
    True
    """
    return max(processes * max(2 * PARTITIONS_ON_GPU, threads) for processes, threads in _sharing_a_gpu(client))


def _sharing_a_gpu(client: Client | None) -> list[tuple[int, int]]:
    """The processes on one GPU of each machine, and the threads of one of them."""
    client = client or _default_client()
    # An asynchronous one cannot be asked.
    if client is None or client.asynchronous or client.status != "running":
        return [(1, CPU_COUNT)]
    machines: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for address, worker in client.scheduler_info(n_workers=-1)["workers"].items():
        process = "this" if address.startswith("inproc://") else address
        machines[worker["host"]][process] += worker["nthreads"]
    gpus = visible_gpus()
    return [_share(list(processes.values()), gpus) for processes in machines.values()] or [(1, CPU_COUNT)]


def _share(threads: Sequence[int], gpus: int) -> tuple[int, int]:
    """Of the processes of a machine with so many threads each, those on one GPU, and the threads of one."""
    if len(threads) > gpus:
        return len(threads), max(threads)
    # Fewer than GPUs may be one for each of some of them, or not.
    return 1, max(threads) if len(threads) == gpus else sum(threads)


def _default_client() -> Client | None:
    distributed = sys.modules.get("distributed.client")
    if distributed is None:
        return None
    try:
        return distributed.default_client()
    except ValueError:
        return None


def cores_for(device: str, segments: np.ndarray) -> AbstractContextManager[None]:
    """Wait for the cores that a search is worth, and keep torch to them; on a GPU there is nothing to wait for.

    On a CPU that is one core beside other searches, or all of them where a cluster's products fill them. Dask's
    threaded tasks never run in the main thread: what does has nothing beside it.

    Parameters
    ----------
    device : {"cpu", "cuda"}
    segments : numpy.ndarray
        (k + 1,) offsets of the clusters.

    Examples
    --------
    >>> with cores_for("cpu", np.array([0, 100])):
    ...     pass
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
def place_for(home: str) -> Iterator[None]:
    """Wait for one of the `PARTITIONS_ON_GPU` places on this process's GPU, and work there in this thread's stream.

    Parameters
    ----------
    home : {"cpu", "cuda"}
        Where a partition is read and scored; on a CPU there is nothing to wait for.

    Examples
    --------
    >>> with place_for("cpu"):
    ...     pass
    """
    if home == "cpu":
        yield
        return
    # Torch can only share a pool that it finds when it first uses CUDA.
    share_memory_pool()
    with _room, beside(home):
        yield


# Multiplications of a long search, a tenth of a second of an H200's time.
LONG_SEARCH = 2.5e13
# Who needs both takes that of long ones first, so that short ones do not wait meanwhile.
_turns = {is_long: threading.Lock() for is_long in (True, False)}


@contextmanager
def turn_on_gpu(device: str, work: float | None = None) -> Iterator[None]:
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

    Examples
    --------
    >>> with turn_on_gpu("cuda"):
    ...     pass
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
