"""Rows that may be near to some rows that stay in memory, told by sketches: the others need not be searched.

Clusters that memory does not hold are read piece by piece. Of each piece, few rows are near to the rows that are held,
and only these are searched exactly. On the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dask_semdedup.search import certify, sketch
from dask_semdedup.search.sketch import Sketcher
from dask_semdedup.search.torch_sketch import COSTS, least_products, multiply, rounded_sketches, sketch_dtype

__all__ = ["NearFilter"]

TILE = 1024, 512
"""Sketches of the rows that are held, and of others, that are multiplied at once."""


class NearFilter:
    """Sketches of some rows, with which others are compared.

    Parameters
    ----------
    rows : torch.Tensor
        (n, d) float32.
    sketcher : Sketcher
    """

    def __init__(self, rows: torch.Tensor, sketcher: Sketcher) -> None:
        self.sketcher, self.dtype = sketcher, sketch_dtype()
        self.sketches, self.lost = self._sketched(rows)
        self.integers = torch.int16 if self.dtype == torch.bfloat16 else torch.int32
        product = torch.int32 if self.dtype == torch.int8 else self.dtype
        self.buffer = torch.empty(TILE[0] * TILE[1], dtype=product)
        self.n, self.largest = len(rows), torch.zeros(len(self.sketches), dtype=self.integers)

    @classmethod
    def of(cls, rows: torch.Tensor, segments: torch.Tensor, stops: torch.Tensor, at_least: float) -> NearFilter | None:
        """Return the filter for a similarity, or None if it leaves so many rows that it does not pay.

        Parameters
        ----------
        rows, segments, at_least
            As of `dask_semdedup.search.nearest_earlier`.
        stops : torch.Tensor
            (n,) int64: as many rows after the first of its segment as each row is compared with.
        """
        sketcher = sketch.choose(rows, segments, stops, at_least, COSTS)
        return None if sketcher is None else cls(rows, sketcher)

    def _sketched(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sketches, and what rounding loses of any of them at most."""
        sketches, lost = rounded_sketches(certify.measure(rows), self.sketcher, self.dtype)
        return sketches, lost.amax()[None]

    def near(self, others: torch.Tensor, first: np.ndarray, last: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of other rows may reach the similarity with some of the rows, and which of the rows.

        Parameters
        ----------
        others : torch.Tensor
            (m, d) float32.
        first, last : numpy.ndarray
            (m,) int64, both ascending: each is compared with the rows from `first` to before `last`, and maybe more.

        Returns
        -------
        others, rows : torch.Tensor
            (m,) and (n,) bool: no row is left out that is as similar as is asked for.
        """
        sketches, lost = self._sketched(others)
        # One least product serves all. The bits of positive numbers compare like integers.
        lost, is_zero = torch.maximum(lost, self.lost), torch.zeros(1, dtype=torch.bool)
        least = least_products(lost, is_zero, self.sketcher, self.dtype).view(self.integers)
        # Sketches may be followed by zero rows, which reach nothing.
        largest_of, largest_with = torch.zeros(len(sketches), dtype=self.integers), self.largest.zero_()
        for some in _windows(0, len(others), TILE[1], len(sketches)):
            end = min(some.stop, len(others)) - 1
            for own in _windows(int(first[some.start]), int(last[end]), TILE[0], len(self.sketches)):
                out = self.buffer[: (own.stop - own.start) * (some.stop - some.start)].view(-1, some.stop - some.start)
                multiply(self.sketches[own], sketches[some], out)
                bits = out.view(self.integers)
                torch.maximum(largest_of[some], bits.amax(dim=0), out=largest_of[some])
                torch.maximum(largest_with[own], bits.amax(dim=1), out=largest_with[own])
        return largest_of[: len(others)] >= least, largest_with[: self.n] >= least


def _windows(start: int, stop: int, size: int, n: int) -> Iterator[slice]:
    """Yield slices of `size` of `n` places, or of all, that cover a range: products of one shape need one program."""
    for first in range(start, stop, size):
        begin = max(0, min(first, n - size))
        yield slice(begin, min(begin + size, n))
