"""Launches of kernels at little cost to the host: the launcher, staged copies of tables, and the workspace."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import triton

from dask_semdedup.search.tiling import Tiling


@dataclass(frozen=True)
class Workspace:
    """Intermediate results of the kernels, in one allocation: each allocation takes the host microseconds.

    Attributes
    ----------
    capacity : int
        p, the number of pairs that there is room for.
    pair_score : torch.Tensor
        (p,) float64.
    residual : torch.Tensor
        (n,) float32 residual norms.
    offset, count : torch.Tensor
        (n,) int32: each query has `count` pairs left by the certificate, starting at `offset`. `count` is 0 for a
        query with too many pairs, and `offset` is then the first row of its segment.
    crowded : torch.Tensor
        (n,) int32 queries with too many pairs.
    pair_query, pair_candidate : torch.Tensor
        (p,) int32 rows.
    keys : torch.Tensor
        Best keys of the tiles: see `coarse_kernel`.
    """

    capacity: int
    pair_score: torch.Tensor
    residual: torch.Tensor
    offset: torch.Tensor
    count: torch.Tensor
    crowded: torch.Tensor
    pair_query: torch.Tensor
    pair_candidate: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def empty(cls, rows: torch.Tensor, n_keys: int) -> Workspace:
        """Return uninitialized memory for the queries in `rows`, on their device."""
        capacity = PAIRS_PER_QUERY * len(rows) + MIN_PAIRS
        per_row = aligned(len(rows))
        sizes = [2 * capacity, per_row, per_row, per_row, per_row, capacity, capacity, n_keys]
        score, residual, *others = torch.empty(sum(sizes), dtype=torch.int32, device=rows.device).split_with_sizes(
            sizes
        )
        return cls(capacity, score.view(torch.float64), residual.view(torch.float32), *others)


PAIRS_PER_QUERY = 4

MIN_PAIRS = 1 << 18


def aligned(size: int) -> int:
    """Return the next multiple of 4 int32: each split begins at 16 bytes, as an allocation of its own would."""
    return -(-size // 4) * 4


class Launcher:
    """Launcher of kernels that skips Triton's inspection of each argument, which takes longer than most kernels run.

    Only the first launch of a kernel inspects them. A launcher is therefore made for each variant that Triton would
    compile: see `launcher_for`. Apart from the rows, all tensors are allocated in this package, and so aligned; apart
    from the width, all numbers are marked `do_not_specialize`.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
    ) -> None:
        """Launch `kernel` on the current stream."""
        compiled = self._compiled.get(kernel)
        if compiled is None:
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled = kernel[(programs,)](*arguments, **constants, **options)
            if isinstance(kernel, triton.runtime.JITFunction):
                self._compiled[kernel] = compiled
            return
        # Given pointers as numbers, Triton does not ask the driver to verify them.
        plain = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
        compiled[(programs, 1, 1)](*plain, *constants.values())


@cache
def launcher_for(*traits: Any) -> Launcher:
    """Return the launcher for all on which compiled kernels depend: device, width and alignment of rows, constants."""
    return Launcher()


class _Staging(threading.local):
    """Pinned memory of each thread for its tables: to pin memory anew would cost more than the search."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.int32)
        self.host = self.buffer.numpy()
        self.sent: torch.cuda.Event | None = None
        self.device: torch.device | None = None

    def send(self, arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
        """Return int32 arrays on a device, sent in one copy; the host waits only for the copy before it."""
        sizes = [aligned(array.size) for array in arrays]
        if self.sent is not None:
            self.sent.synchronize()
        if self.host.size < sum(sizes):
            self.buffer = torch.empty(2 * sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
            self.host = self.buffer.numpy()
        start = 0
        for array, size in zip(arrays, sizes, strict=True):
            self.host[start : start + array.size] = array
            start += size
        sent = self.buffer[:start].to(device, non_blocking=True, copy=True)
        if device.type == "cuda":
            if self.sent is None or self.device != device:  # An event belongs to one device.
                self.sent, self.device = torch.cuda.Event(), device
            self.sent.record()
        return list(sent.split_with_sizes(sizes))


@dataclass(frozen=True)
class Table:
    """Tables and counters of the kernels in device memory.

    Attributes
    ----------
    largest, n_pairs, n_crowded : torch.Tensor
        (1,) int32, initially 0: the bits of the largest residual norm, and the numbers of pairs and of crowded queries
        listed so far.
    groups : torch.Tensor
        (g + 1, `FIELDS`) int32, flat: see `Tiling`.
    group_of_tile, group_of_block : torch.Tensor
        (tiles,) and (query blocks,) int32.
    stops : torch.Tensor
        (n,) int32 ends of the candidates of each row; empty if they are the rows themselves.
    """

    largest: torch.Tensor
    n_pairs: torch.Tensor
    n_crowded: torch.Tensor
    groups: torch.Tensor
    group_of_tile: torch.Tensor
    group_of_block: torch.Tensor
    stops: torch.Tensor

    @property
    def has_stops(self) -> bool:
        """Return whether the candidates of some rows end before the row itself."""
        return self.stops.numel() > 0


ZERO = np.zeros(1, np.int32)

NO_STOPS = np.zeros(0, np.int32)


def upload(tiles: Tiling, stops: torch.Tensor | None, rows: torch.Tensor) -> Table:
    """Return the table of a search on the device of `rows`, sent in one copy."""
    groups = tiles.groups
    of_group = np.arange(len(groups) - 1, dtype=np.int32)
    of_tile, of_block = (np.repeat(of_group, groups[1:, field] - groups[:-1, field]) for field in (0, 5))
    ends = NO_STOPS if stops is None else stops.numpy().astype(np.int32)
    return Table(*send([ZERO, ZERO, ZERO, groups.ravel(), of_tile, of_block, ends], rows.device))


_staging = _Staging()


def send(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Return int32 arrays on a device, sent in one copy; the host waits only for the copy before it."""
    return _staging.send(arrays, device)
