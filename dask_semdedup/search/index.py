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

MIN_SAMPLE, ROWS_PER_CELL, MAX_CELLS = 16_384, 48, 4096
"""Rows of a sample, and cells."""

AXES_SAMPLE = 8192
"""Rows of the sample that the axes are fitted to."""

JUDGES = 4096
"""Rows of the sample that tell what an index leaves."""

FIXED = 5e11
"""Picoseconds that an index takes beyond the products: rows are read twice."""

ENOUGH = 0.1
"""Longer sketches are not looked at once verification takes at most this share of the time."""


@dataclass(frozen=True)
class Index:
    """What is fitted to a sample of all rows, and what the sample says of the work.

    Attributes
    ----------
    sketcher : Sketcher
        What is asked for, and the axes of the sketches.
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
    return max(1, min(MAX_CELLS, 2 * math.isqrt(n)))


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
        without = _Choice(math.inf, None)
        best = without
        for size in sizes:
            found = sketcher(axes[:, : size - 1].contiguous(), float(defect), at_least, tf32=False)
            # Least products must be positive, whatever dtype the sketches are rounded to.
            if not found.floor > 1.5 * size**0.5 / SCALE:
                break
            choice, is_enough = _with_size(rows, judges, found, work)
            best = min(best, choice, key=lambda choice: choice.time)
            if is_enough:
                break
    together = work.pairs * min(COSTS.exact_pair + width * COSTS.exact_value, COSTS.pair + SIZES[1] * COSTS.pair_value)
    return best.index if best.time + FIXED < together else None


@dataclass(frozen=True)
class _Choice:
    time: float
    index: Index | None


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


def _with_size(rows: torch.Tensor, judges: torch.Tensor, found: Sketcher, work: _Work) -> tuple[_Choice, bool]:
    """Return what takes least with sketches of one size, and whether longer ones would not take less."""
    sketches, judged = found.sketches(rows), found.sketches(judges)
    product = COSTS.pair + found.size * COSTS.pair_value
    reached = (judged @ judged.T >= found.floor - _rounding(found.size)).sum() - len(judged)
    left = float(reached + 1) / (len(judged) * (len(judged) - 1)) * work.pairs
    verify = left * (COSTS.hit + rows.shape[1] * COSTS.hit_value)
    reach = reach_of(found)
    choices = []
    for k in (1, n_cells(work.n)):
        cells = fit_cells(sketches[len(judges) :], k, reach)
        visits = cells.visits(judged)
        shares = (np.bincount(where, minlength=len(cells)) / len(judged) for where in (visits.cell, visits.visited))
        loads = work.loads(*shares)
        rotated = work.rows * rows.shape[1] * COSTS.value
        time = (loads.sum() + work.rows * (len(cells) if k > 1 else 0)) * product + rotated + verify
        choices.append(_Choice(time, Index(found, cells, loads, len(visits.visited) / len(judged), left, time / 1e12)))
    best = min(choices, key=lambda choice: choice.time)
    return best, verify <= ENOUGH * best.time


def _rounding(size: int) -> float:
    """Return about what is lost of a product of sketches in float16 or bfloat16."""
    return 2.0**-8 * (size / 64) ** 0.5
