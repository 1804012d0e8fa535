"""The index of a search for near rows among many: axes and cells, fitted to a sample, and what they save."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from dask_semdedup.search import ieee_products
from dask_semdedup.search.cells import Cells, fit_cells, reach_of
from dask_semdedup.search.sketch import LEAST, SCALE, SIZES, Costs, Sketcher, fit_axes, sketcher, unit_rows

__all__ = ["Index", "fit_index", "is_worth_a_look", "n_cells", "sample_rows", "seconds_at_once"]

LEAST_ROWS, LEAST_ROWS_ON_GPU = 16_384, 1 << 21
"""Pairs of fewer rows are compared at once: to look at a sample would take as long."""

MIN_SAMPLE, ROWS_PER_CELL, MAX_CELLS = 16_384, 32, 4096
"""Rows of a sample, and cells."""

AXES_SAMPLE = 8192
"""Rows of the sample that the axes are fitted to."""

JUDGES = 4096
"""Rows of the sample that tell what an index leaves."""

LONGER = 128
"""Numbers in the longer sketches: 270 bytes a row."""


class Pace(NamedTuple):
    """Picoseconds that an index takes on a kind of device, beyond `Costs`.

    Attributes
    ----------
    cell, visit, check : float
        To look at a row and one cell, to gather a row that visits a cell, and to look at the longer sketches of a pair.
    again, again_value : float
        To read rows a second time, and for each of their numbers.
    """

    cell: float
    visit: float
    check: float
    again: float
    again_value: float


PACES = {
    "cpu": Pace(cell=2600, visit=0, check=2.5e6, again=5e11, again_value=0),
    "cuda": Pace(cell=9, visit=150, check=1e4, again=2e11, again_value=100),
}
"""Measured on two cores with AVX2, and on an H200; what a GPU reads again, or checks, is estimated."""


@dataclass(frozen=True)
class Index:
    """What is fitted to a sample of all rows, and what the sample says of the work.

    Attributes
    ----------
    sketcher, longer : Sketcher
        What is asked for, and the axes of the sketches: of those that are multiplied, and of longer ones, which pairs
        that these leave must pass as well.
    cells : Cells
        Cells of the sketches; a single one skips nothing.
    loads : numpy.ndarray
        (k,) float64 pairs of sketches that will be multiplied in each cell.
    visits : float
        Cells that a row visits, on average.
    left : float
        Pairs that will be left to verify.
    seconds : float
        About how long two cores, or a GPU, will take, apart from reading.
    """

    sketcher: Sketcher
    longer: Sketcher
    cells: Cells
    loads: np.ndarray
    visits: float
    left: float
    seconds: float

    @property
    def pairs(self) -> float:
        """Pairs of sketches that will be multiplied."""
        return float(self.loads.sum())

    def to(self, device: torch.device) -> Index:
        """Return the index with its axes and cells on a device."""
        if self.cells.centroids.device == device:
            return self
        short, longer = (replace(each, axes=each.axes.to(device)) for each in (self.sketcher, self.longer))
        return replace(self, sketcher=short, longer=longer, cells=self.cells.to(device))


def is_worth_a_look(n: int, others: int | None = None, device: str = "cpu") -> bool:
    """Return whether so many rows are compared with each other, or with others, that an index may pay on a device."""
    least = LEAST_ROWS if device == "cpu" else LEAST_ROWS_ON_GPU
    return _Work(n, others).pairs >= least**2 / 2


def n_cells(n: int) -> int:
    """Return the number of cells for n rows: to assign n rows takes as long as to multiply what the cells leave."""
    return max(1, min(MAX_CELLS, 3 * math.isqrt(n)))


def sample_rows(n: int) -> int:
    """Return the number of rows of a sample of n that an index is fitted to."""
    return min(n, max(MIN_SAMPLE, ROWS_PER_CELL * n_cells(n)))


def fit_index(
    sample: torch.Tensor, n: int, at_least: float, others: int | None = None, *, at_once: bool = True
) -> Index | None:
    """Fit the index with which n rows are compared in the least time, or return None if it takes less without any.

    Parameters
    ----------
    sample : torch.Tensor
        (s, d) float32 rows in random order, on the device that will search.
    n : int
        Number of all rows.
    at_least : float
        The similarity that is asked for.
    others : int, optional
        Rows of another frame that all rows are compared with. By default they are compared with each other.
    at_once : bool, default True
        Whether all rows can be compared without an index, at once. Otherwise any index is better than none.

    Returns
    -------
    Index or None
        On the CPU.
    """
    width = sample.shape[1]
    costs, pace = _costs_of(sample.device.type), PACES[sample.device.type]
    work = _Work(n, others)
    sizes = [size for size in SIZES if size <= width // 2]
    if not sizes or at_least < LEAST or (at_once and not is_worth_a_look(n, others, sample.device.type)):
        return None
    with ieee_products:
        rows = unit_rows(sample)
        rows = rows[rows.any(dim=1)]
        if len(rows) < 2 * SIZES[0]:
            return None
        judges = rows[: min(JUDGES, len(rows) // 2)]
        axes, defect = fit_axes(rows[len(judges) :][:AXES_SAMPLE], sizes[-1] - 1, tf32=False)
        sketchers = [sketcher(axes[:, : size - 1].contiguous(), float(defect), at_least, tf32=False) for size in sizes]
        # Least products must be positive, whatever dtype the sketches are rounded to.
        sketchers = [found for found in sketchers if found.floor > 1.5 * found.size**0.5 / SCALE]
        if not sketchers:
            return None
        longer = next((found for found in sketchers if found.size >= LONGER), sketchers[-1])
        # Longer ones are rounded to float16, the others to the dtype that suits the device.
        left = _left(longer.sketches(judges), longer, 2.0**-10) * work.pairs
        trials = [
            _Trial(rows, judges, found, longer, left, work, costs, pace)
            for found in sketchers
            if found.size <= longer.size
        ]
        # What cells leave hardly depends on the size, so that one size tells.
        one = trials[min(1, len(trials) - 1)]
        # On a GPU it takes no time to try.
        numbers = {1, n_cells(n), *((n_cells(n) // 16, n_cells(n) // 4) if sample.is_cuda else ())}
        index = min((one.index(k) for k in sorted(numbers - {0})), key=lambda index: index.seconds)
        best = min(trials, key=lambda trial: trial.seconds(index.pairs, len(index.cells), index.visits))
        index = index if best is one else best.index(len(index.cells))
    together = seconds_at_once(work.pairs, width, sample.device.type, at_least)
    read_again = 1e-12 * (pace.again + work.rows * width * pace.again_value)
    pays = not at_once or index.seconds + read_again < together
    return index.to(torch.device("cpu")) if pays else None


def seconds_at_once(pairs: float, width: int, device: str, at_least: float) -> float:
    """Return about how long two cores, or a GPU, take to compare so many pairs of rows of a width without an index."""
    costs = _costs_of(device)
    exact = 1e-12 * pairs * (costs.exact_pair + width * costs.exact_value)
    sketched = 1e-12 * pairs * (costs.pair + SIZES[1] * costs.pair_value)
    return exact if at_least < LEAST else min(exact, sketched)


def _costs_of(device: str) -> Costs:
    """Return what a kind of device takes."""
    if device == "cpu":
        from dask_semdedup.search.torch_sketch import COSTS
    else:
        from dask_semdedup.search.triton_sketch import COSTS
    return COSTS


@dataclass(frozen=True)
class _Work:
    """Numbers of rows that are compared with each other, or with others."""

    n: int
    others: int | None

    @property
    def rows(self) -> int:
        return self.n + (self.others or 0)

    @property
    def pairs(self) -> float:
        return self.n * (self.n - 1) / 2 if self.others is None else self.n * self.others

    def loads(self, members: np.ndarray, visitors: np.ndarray) -> np.ndarray:
        """Return the pairs that are multiplied in each cell, given the shares of rows that are there and visit it."""
        if self.others is None:
            return self.n**2 * members * (members / 2 + visitors)
        return self.n * self.others * members * (members + 2 * visitors)


class _Trial:
    """Sketches of one size, tried on a sample."""

    def __init__(
        self,
        rows: torch.Tensor,
        judges: torch.Tensor,
        found: Sketcher,
        longer: Sketcher,
        left: float,
        work: _Work,
        costs: Costs,
        pace: Pace,
    ) -> None:
        self.sketcher, self.longer, self.work, self.width = found, longer, work, rows.shape[1]
        self.costs, self.pace = costs, pace
        self.sketches, self.judged = found.sketches(rows[len(judges) :]), found.sketches(judges)
        lost = _rounding(found.size, rows.device)
        self.reached, self.left = _left(self.judged, found, lost) * work.pairs, left

    def index(self, k: int) -> Index:
        """Return the index with at most k cells."""
        cells = fit_cells(self.sketches, k, reach_of(self.sketcher))
        visits = cells.to(torch.device("cpu")).visits(self.judged.cpu())
        n = len(self.judged)
        shares = (np.bincount(where, minlength=len(cells)) / n for where in (visits.cell, visits.visited))
        loads = self.work.loads(*shares)
        seconds = self.seconds(float(loads.sum()), len(cells), len(visits.visited) / n)
        return Index(self.sketcher, self.longer, cells, loads, len(visits.visited) / n, self.left, seconds)

    def seconds(self, pairs: float, k: int, visits: float) -> float:
        """Return about how long it takes to rotate rows, assign them to cells, multiply and verify pairs."""
        costs = self.costs
        multiplied = pairs * (costs.pair + self.sketcher.size * costs.pair_value)
        assigned = self.work.rows * (k * self.pace.cell if k > 1 else 0.0)
        gathered = self.work.rows * visits * self.pace.visit
        rotated = self.work.rows * self.width * costs.value
        verified = self.reached * self.pace.check + self.left * (costs.hit + self.width * costs.hit_value)
        return 1e-12 * (multiplied + assigned + gathered + rotated + verified)


def _rounding(size: int, device: torch.device) -> float:
    """Return about what the bound on the rounding of two sketches takes from the similarity that is asked for."""
    from dask_semdedup.search.torch_sketch import sketch_dtype

    if device.type == "cuda" or sketch_dtype() == torch.int8:
        # Each number is off by an evenly distributed part of a half.
        return 2.2 * (size / 12) ** 0.5 / SCALE
    return 2.0**-7 if sketch_dtype() == torch.bfloat16 else 2.0**-10


def _left(judged: torch.Tensor, found: Sketcher, rounding: float) -> float:
    """Return the share of all pairs that sketches leave; as if one more of the sample were, which it may not show."""
    least = found.floor - rounding
    # Products that stay in the cache are counted in a sixth of the time.
    counts = [torch.count_nonzero(some @ judged.T >= least) for some in judged.split(256)]
    reached = int(torch.stack(counts).sum()) - len(judged)
    return (reached + 1) / (len(judged) * (len(judged) - 1))
