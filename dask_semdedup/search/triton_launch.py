"""Launching kernels with little work of the host: tables on the device, staged copies, workspaces."""

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
    """What the kernels leave for each other in device memory: one allocation, as each takes the host microseconds.

    Attributes
    ----------
    most_pairs : int
        p, the pairs that there is room for.
    pair_score : torch.Tensor
        (p,) float64.
    residual : torch.Tensor
        (n,) float32 residual norms.
    offset, count : torch.Tensor
        (n,) int32, the pairs of each query that the certificate leaves: `count` of them from `offset` on. `count` is
        -1 for a query that has too many, and `offset` then the first row of its segment.
    pair_query, pair_candidate : torch.Tensor
        (p,) int32 rows.
    keys : torch.Tensor
        Best keys of the tiles: see `coarse_kernel`.
    """

    most_pairs: int
    pair_score: torch.Tensor
    residual: torch.Tensor
    offset: torch.Tensor
    count: torch.Tensor
    pair_query: torch.Tensor
    pair_candidate: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def empty(cls, n: int, n_keys: int, device: torch.device) -> Workspace:
        """Room for `n` queries."""
        room = PAIRS_PER_QUERY * n + MIN_PAIRS
        per_row = -(-n // 4) * 4  # Each part begins at a multiple of 16 bytes, as memory of its own would.
        sizes = [2 * room, per_row, per_row, per_row, room, room, n_keys]
        score, residual, *others = torch.empty(sum(sizes), dtype=torch.int32, device=device).split_with_sizes(sizes)
        return cls(room, score.view(torch.float64), residual.view(torch.float32), *others)


PAIRS_PER_QUERY = 4

MIN_PAIRS = 1 << 18


class Launcher:
    """Launches kernels: from the second time on past Triton's look at each argument, which takes longer than most run.

    There is one for each way in which Triton would compile them: see `launcher_for`. Apart from the rows, all tensors
    are allocated here, and so aligned; apart from the width, all numbers are marked `do_not_specialize`.
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
        # Of a pointer as a number, Triton does not ask the driver whether it is one.
        plain = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
        compiled[(programs, 1, 1)](*plain, *constants.values())


@cache
def launcher_for(*traits: Any) -> Launcher:
    """The launcher for all that the compiled kernels depend on: device, width and alignment of the rows, constants."""
    return Launcher()


class _Staging(threading.local):
    """Pinned memory through which each thread sends its tables: pinning anew would cost more than the search."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.int32)
        self.host = self.buffer.numpy()
        self.sent: torch.cuda.Event | None = None
        self.device: torch.device | None = None

    def send(self, parts: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
        """Copy int32 arrays to the device behind one another; the host waits only for the copy before this one."""
        # Each part begins at a multiple of 16 bytes, as memory of its own would.
        sizes = [-(-part.size // 4) * 4 for part in parts]
        if self.sent is not None:
            self.sent.synchronize()
        if self.host.size < sum(sizes):
            self.buffer = torch.empty(2 * sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
            self.host = self.buffer.numpy()
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            self.host[start : start + part.size] = part
            start += size
        sent = self.buffer[:start].to(device, non_blocking=True, copy=True)
        if device.type == "cuda":
            if self.sent is None or self.device != device:  # An event is of one device.
                self.sent, self.device = torch.cuda.Event(), device
            self.sent.record()
        return list(sent.split_with_sizes(sizes))


@dataclass(frozen=True)
class Table:
    """What the kernels look up, in device memory.

    Attributes
    ----------
    largest, n_pairs : torch.Tensor
        (1,) int32 zeros, to be raised: the bits of the largest residual norm, and the pairs listed so far.
    groups : torch.Tensor
        (g + 1, `FIELDS`) int32, flat: see `Tiling`.
    group_of_tile, group_of_block : torch.Tensor
        (tiles,) and (query blocks,) int32.
    stops : torch.Tensor
        (n,) int32 where the candidates of each row end; empty where they end with the row itself.
    """

    largest: torch.Tensor
    n_pairs: torch.Tensor
    groups: torch.Tensor
    group_of_tile: torch.Tensor
    group_of_block: torch.Tensor
    stops: torch.Tensor

    @property
    def has_stops(self) -> bool:
        """Whether rows have ends of their own."""
        return self.stops.numel() > 0


ZERO = np.zeros(1, np.int32)

NO_STOPS = np.zeros(0, np.int32)


def upload(tiles: Tiling, stops: torch.Tensor | None, device: torch.device) -> Table:
    """Send all of it in one copy."""
    groups = tiles.groups
    of_group = np.arange(len(groups) - 1, dtype=np.int32)
    of_tile, of_block = (np.repeat(of_group, groups[1:, field] - groups[:-1, field]) for field in (0, 5))
    ends = NO_STOPS if stops is None else stops.numpy().astype(np.int32)
    return Table(*_staging.send([ZERO, ZERO, groups.ravel(), of_tile, of_block, ends], device))


_staging = _Staging()
