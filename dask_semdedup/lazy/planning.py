"""Partitions of whole clusters, as few as fit and of about equal cost."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
from dask.system import CPU_COUNT

from dask_semdedup.device.devices import visible_gpus
from dask_semdedup.device.memory import device_bytes
from dask_semdedup.device.sharing import partitions_per_gpu
from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.lazy.blocks import COPIES, task_bytes

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["plan"]

BACKENDS = ("pandas", "cudf")

# A partition that costs more than so many times the median is begun before the others.
OVERSIZED = 2

# Reading a row costs about as much as comparing it with this many others, so that small clusters are not free.
READING_COST = 1024

# Bytes of a partition of pandas at most, and the least and the most of one of cuDF.
PARTITION = 2**27

GPU_PARTITIONS = (2**27, 2**31)

# What a partition takes on a GPU while it is read, in its own size: as in the file, decompressed, and as columns.
GPU_COPIES = 3

# Where there is little to read, partitions of pandas get as small as this, for so many a core.
SMALL_PARTITION = 2**24

PARTITIONS_A_CORE = 4

# Those of cuDF are no fewer than so many a GPU: the smaller they are, the longer they take to read.
PARTITIONS_A_GPU = 2

# The longest list column that cuDF can hold, in elements; the bytes are those of its narrowest elements.
CUDF_ELEMENTS = 2**31 - 1

CUDF_BYTES = 2 * CUDF_ELEMENTS


def check_backend(backend: str | None) -> str:
    """Return the backend of frames, by default that of Dask's configuration; raise if it is neither of the two."""
    if backend is None:
        backend = dask.config.get("dataframe.backend", "pandas")
    if backend not in BACKENDS:
        raise InvalidArgumentError(
            f"backend must be one of {list(BACKENDS)} or None, not {backend!r}.", parameters=["backend"]
        )
    return backend


def default_size(backend: str, client: Client | None = None) -> int:
    """Bytes of a partition: workers must hold what their threads read, or half of a GPU what is there at once.

    Of the client, or the default one, the workers' threads and limits of memory are asked for.
    """
    if backend == "pandas":
        return int(np.clip(task_bytes(client) / COPIES, SMALL_PARTITION, PARTITION))
    memory = device_bytes()
    if memory is None:
        return GPU_PARTITIONS[1]
    return int(np.clip(memory // (GPU_COPIES * partitions_per_gpu(client)), *GPU_PARTITIONS))


def fitting_size(size: int, backend: str, nbytes: int) -> int:
    """Bytes of a partition of all `nbytes`: no more than cuDF can hold, nor than keep all cores or GPUs busy."""
    if backend == "cudf":
        return min(size, CUDF_BYTES, max(GPU_PARTITIONS[0], nbytes // (PARTITIONS_A_GPU * visible_gpus())))
    return min(size, max(SMALL_PARTITION, nbytes // (PARTITIONS_A_CORE * CPU_COUNT)))


def plan(sizes: Iterable[tuple[Any, int, int]], partition_size: int) -> list[list[Any]]:
    """Share clusters out to partitions of whole clusters, as few as fit and of about equal cost.

    Searching a cluster of n rows of d numbers costs n²·d, and n·d are its bytes; reading it costs its bytes. So the
    cost of a cluster is taken as ``nbytes * (rows + 1024)``.

    Partitions that cost more than twice the median come first, the dearest at the head, so that no worker is left with
    one of them when the others are done [1]_. The rest follow in the order of their clusters.

    Parameters
    ----------
    sizes : iterable of (cluster, rows, nbytes)
        The clusters, in any order.
    partition_size : int
        The most bytes of a partition, unless it is of one cluster.

    Returns
    -------
    list of list
        The clusters of each partition, ascending within it.

    References
    ----------
    .. [1] Graham, "Bounds on multiprocessing timing anomalies", SIAM Journal on Applied Mathematics 17 (1969): longest
       processing time first.
    """
    runs, oversized = cut_into_runs(sizes, partition_size)
    return [*(runs[run] for run in oversized), *_without(runs, oversized)]


def cut_into_runs(sizes: Iterable[tuple[Any, int, int]], partition_size: int) -> tuple[list[list[Any]], list[int]]:
    """The clusters of each partition, ascending throughout, and the positions of the oversized, the costliest first."""
    ordered = sorted(sizes, key=itemgetter(0))
    if not ordered:
        return [[]], []
    clusters = [cluster for cluster, _, _ in ordered]
    total_bytes = list(accumulate((nbytes for _, _, nbytes in ordered), initial=0))
    total_cost = list(accumulate((nbytes * (rows + READING_COST) for _, rows, nbytes in ordered), initial=0))
    runs = list(pairwise(_cut_evenly(total_bytes, total_cost, partition_size)))
    costs = [total_cost[stop] - total_cost[start] for start, stop in runs]
    most = OVERSIZED * statistics.median(costs)
    oversized = sorted((run for run, cost in enumerate(costs) if cost > most), key=lambda run: -costs[run])
    return [clusters[start:stop] for start, stop in runs], oversized


def arrange(runs: Sequence[list[Any]], oversized: Sequence[int]) -> list[list[Any]]:
    """Partitions with the oversized where Dask begins, and the others in order.

    Where tasks do not depend on each other, it begins with the one whose number is the last in the order of text: of
    twelve with 9, then 8; not with 0. See `dask.order`.
    """
    begun = sorted(range(len(runs)), key=lambda place: f"{place})", reverse=True)
    places = {place: runs[run] for place, run in zip(begun, oversized, strict=False)}
    others = iter(_without(runs, oversized))
    return [places[place] if place in places else next(others) for place in range(len(runs))]


def _without(runs: Sequence[list[Any]], oversized: Iterable[int]) -> list[list[Any]]:
    oversized = set(oversized)
    return [clusters for run, clusters in enumerate(runs) if run not in oversized]


def _cut_evenly(total_bytes: Sequence[int], total_cost: Sequence[int], partition_size: int) -> list[int]:
    """Bounds of the fewest runs that fit, with the largest cost as small as bisection to 2 percent finds it.

    Given are the bytes and the cost of all that stands before each bound.
    """
    bounds = _cut(total_bytes, total_cost, partition_size, math.inf)
    costs = [after - before for before, after in pairwise(total_cost)]
    high: float = max(total_cost[stop] - total_cost[start] for start, stop in pairwise(bounds))
    low: float = max(max(costs), total_cost[-1] / (len(bounds) - 1))
    while high > 1.02 * low:
        middle = (low + high) / 2
        trial = _cut(total_bytes, total_cost, partition_size, middle)
        if len(trial) > len(bounds):
            low = middle
        else:
            bounds, high = trial, middle
    return bounds


def _cut(total_bytes: Sequence[int], total_cost: Sequence[int], most_bytes: int, most_cost: float) -> list[int]:
    """Bounds of runs, each as long as the limits allow, and at least of one."""
    bounds = [0]
    while (start := bounds[-1]) < len(total_bytes) - 1:
        stop = bisect_right(total_bytes, total_bytes[start] + most_bytes, start + 1)
        stop = bisect_right(total_cost, total_cost[start] + most_cost, start + 1, stop)
        bounds.append(max(stop - 1, start + 1))
    return bounds
