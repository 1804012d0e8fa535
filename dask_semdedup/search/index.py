"""The index of a search for near rows among many: axes and cells, fitted to a sample, and what they save."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from dask_semdedup.search import ieee_products
from dask_semdedup.search.cells import Cells, fit_cells, reach_of
from dask_semdedup.search.sketch import LEAST, SCALE, SIZES, Sketcher, fit_axes, sketcher, unit_rows
from dask_semdedup.search.torch_sketch import COSTS

__all__ = ["Index", "fit_index", "is_worth_a_look", "n_cells", "sample_rows"]

LEAST_ROWS = 16_384
"""Pairs of fewer rows are compared at once: to look at a sample would take as long."""

MIN_SAMPLE, ROWS_PER_CELL, MAX_CELLS = 16_384, 32, 4096
"""Rows of a sample, and cells."""

AXES_SAMPLE = 8192
"""Rows of the sample that the axes are fitted to."""

JUDGES = 4096
"""Rows of the sample that tell what an index leaves."""

LONGER = 128
"""Numbers in the longer sketches: 270 bytes a row."""

CHECK = 2.5e6
"""Picoseconds that it takes to look at the longer sketches of a pair."""

FIXED = 5e11
"""Picoseconds that an index takes beyond the products: rows are read twice."""


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
        About how long two cores will take, apart from reading.
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


def is_worth_a_look(n: int, others: int | None = None) -> bool:
    """Return whether so many rows are compared with each other, or with others, that an index may pay."""
    return _Work(n, others).pairs >= LEAST_ROWS**2 / 2


def n_cells(n: int) -> int:
    """Return the number of cells for n rows: to assign n rows takes as long as to multiply what the cells leave."""
    return max(1, min(MAX_CELLS, 3 * math.isqrt(n)))


def sample_rows(n: int) -> int:
    """Return the number of rows of a sample of n that an index is fitted to."""
    return min(n, max(MIN_SAMPLE, ROWS_PER_CELL * n_cells(n)))


def fit_index(sample: torch.Tensor, n: int, at_least: float, others: int | None = None) -> Index | None:
    """Fit the index with which n rows are compared in the least time, or return None if it takes less without any.

    Parameters
    ----------
    sample : torch.Tensor
        (s, d) float32 rows on the CPU, in random order.
    n : int
        Number of all rows.
    at_least : float
        The similarity that is asked for.
    others : int, optional
        Rows of another frame that all rows are compared with. By default they are compared with each other.
    """
    width = sample.shape[1]
    work = _Work(n, others)
    sizes = [size for size in SIZES if size <= width // 2]
    if not sizes or at_least < LEAST or not is_worth_a_look(n, others):
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
        trials = [_Trial(rows, judges, found, longer, work) for found in sketchers if found.size <= longer.size]
        # What cells leave hardly depends on the size, so that one size tells.
        one = trials[min(1, len(trials) - 1)]
        index = min((one.index(k) for k in (1, n_cells(n))), key=lambda index: index.seconds)
        best = min(trials, key=lambda trial: trial.seconds(index.pairs, len(index.cells)))
        index = index if best is one else best.index(len(index.cells))
    together = work.pairs * min(COSTS.exact_pair + width * COSTS.exact_value, COSTS.pair + SIZES[1] * COSTS.pair_value)
    return index if index.seconds * 1e12 + FIXED < together else None


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
        self, rows: torch.Tensor, judges: torch.Tensor, found: Sketcher, longer: Sketcher, work: _Work
    ) -> None:
        self.sketcher, self.longer, self.work, self.width = found, longer, work, rows.shape[1]
        self.sketches, self.judged = found.sketches(rows[len(judges) :]), found.sketches(judges)
        self.reached, self.left = (
            _left(sketches, by) * work.pairs
            for sketches, by in ((self.judged, found), (longer.sketches(judges), longer))
        )

    def index(self, k: int) -> Index:
        """Return the index with at most k cells."""
        cells = fit_cells(self.sketches, k, reach_of(self.sketcher))
        visits = cells.visits(self.judged)
        n = len(self.judged)
        shares = (np.bincount(where, minlength=len(cells)) / n for where in (visits.cell, visits.visited))
        loads = self.work.loads(*shares)
        seconds = self.seconds(float(loads.sum()), len(cells))
        return Index(self.sketcher, self.longer, cells, loads, len(visits.visited) / n, self.left, seconds)

    def seconds(self, pairs: float, k: int) -> float:
        """Return about how long two cores take to rotate rows, assign them to cells, multiply and verify pairs."""
        product = COSTS.pair + self.sketcher.size * COSTS.pair_value
        multiplied = pairs if k == 1 else pairs + self.work.rows * k
        rotated = self.work.rows * self.width * COSTS.value
        verified = self.reached * CHECK + self.left * (COSTS.hit + self.width * COSTS.hit_value)
        return 1e-12 * (multiplied * product + rotated + verified)


def _left(judged: torch.Tensor, found: Sketcher) -> float:
    """Return the share of all pairs that sketches leave; as if one more of the sample were, which it may not show."""
    reached = (judged @ judged.T >= found.floor - _rounding(found.size)).sum() - len(judged)
    return float(reached + 1) / (len(judged) * (len(judged) - 1))


def _rounding(size: int) -> float:
    """Return about what is lost of a product of sketches in float16 or bfloat16."""
    return 2.0**-8 * (size / 64) ** 0.5
