"""Cells: regions of sketches, such that every pair of near rows meets in one of them.

A sketch is a member of the cell of its nearest centroid. The plane between two centroids ``c_a`` and ``c_b`` holds all
points that are equally far from both. Two sketches on different sides are at least as far apart as the sum of their
distances to the plane. So if they are at most `Cells.reach` apart, one of them is within half of that of the plane.
Every row *visits* the cells behind all planes to which it is that near. Each near pair then meets in a cell: as two
members, or as a member and a visitor.

References
----------
Connor, Cardillo, Vadicamo, Rabitti, "Hilbert exclusion: Improved metric search through finite isometric embeddings",
ACM Transactions on Information Systems 35(3), 2017.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dask_semdedup.search import certify
from dask_semdedup.search.sketch import Sketcher

__all__ = ["Cells", "Visits", "fit_cells", "reach_of"]

ITERATIONS = 3
"""Steps of Lloyd's algorithm: cells need not be the best."""

ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Distances between sketches and centroids at once."""


@dataclass(frozen=True)
class Visits:
    """The cells that sketches are members of and visit.

    Attributes
    ----------
    cell : numpy.ndarray
        (n,) int64.
    visited : numpy.ndarray
        (v,) int32 cells that sketches visit, in the order of these.
    offsets : numpy.ndarray
        (n + 1,) int64 offsets of the sketches in `visited`.
    """

    cell: np.ndarray
    visited: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class Cells:
    """Centroids of cells, and the distance within which sketches are near.

    Attributes
    ----------
    centroids : torch.Tensor
        (k, h) float32.
    reach : float
        Maximum distance of the sketches of two rows that reach the threshold.
    """

    centroids: torch.Tensor
    reach: float

    def __len__(self) -> int:
        return len(self.centroids)

    def __getstate__(self) -> dict[str, Any]:
        # Others are made again: of thousands of cells they would be tens of megabytes in a graph.
        return {"centroids": self.centroids, "reach": self.reach}

    @cached_property
    def limits(self) -> torch.Tensor:
        """(k, k) float32: by how much half the squared distance to another centroid may exceed that to the own one.

        That difference is the distance to the plane times the distance of the centroids, and rounding.
        """
        k, centroids = len(self), self.centroids.double()
        rounding = 8 * certify.accumulation_bound(centroids.shape[1])
        limits = torch.empty(k, k, device=centroids.device)
        # All at once would take several times the memory of the result.
        for chunk in certify.chunks(k, k, ELEMENTS[centroids.device.type]):
            limits[chunk] = torch.cdist(centroids[chunk], centroids).mul_(self.reach / 2).add_(rounding)
        return limits.fill_diagonal_(-torch.inf)

    @cached_property
    def half_norms(self) -> torch.Tensor:
        """(k,) float32: half the squared lengths of the centroids."""
        return self.centroids.square().sum(dim=1) / 2

    def to(self, device: torch.device) -> Cells:
        """Return the cells on a device."""
        return self if self.centroids.device == device else replace(self, centroids=self.centroids.to(device))

    def nearest(self, sketches: torch.Tensor) -> torch.Tensor:
        """Return the (n,) int64 cells that (n, h) float32 sketches belong to."""
        cell = torch.zeros(len(sketches), dtype=torch.int64, device=sketches.device)
        for chunk in certify.chunks(len(sketches), len(self), ELEMENTS[sketches.device.type]):
            half_squares = torch.addmm(self.half_norms, sketches[chunk], self.centroids.T, alpha=-1)
            if sketches.is_cuda:
                torch.argmin(half_squares, dim=1, out=cell[chunk])
            else:  # NumPy finds minima several times as fast as torch.
                cell[chunk] = torch.from_numpy(half_squares.numpy().argmin(axis=1))
        return cell

    def visits(self, sketches: torch.Tensor) -> Visits:
        """Return the cells that (n, h) float32 sketches on the CPU are members of and visit."""
        n, k = len(sketches), len(self)
        if k == 1:
            return Visits(np.zeros(n, np.int64), np.empty(0, np.int32), np.zeros(n + 1, np.int64))
        cell, counts = np.empty(n, np.int64), np.zeros(n + 1, np.int64)
        found = [np.empty(0, np.int32)]
        # Memory that is used again is faster, and NumPy compares several times as fast as torch.
        chunks = certify.chunks(n, k, ELEMENTS["cpu"])
        n_most = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        products, limits = torch.empty(2, n_most, k)
        is_near = np.empty((n_most, k), bool)
        for chunk in chunks:
            m = chunk.stop - chunk.start
            torch.addmm(self.half_norms, sketches[chunk], self.centroids.T, alpha=-1, out=products[:m])
            half_squares = products[:m].numpy()
            nearest = half_squares.argmin(axis=1)
            cell[chunk] = nearest
            half_squares -= np.take_along_axis(half_squares, nearest[:, None], axis=1)
            torch.index_select(self.limits, 0, torch.from_numpy(nearest), out=limits[:m])
            np.less_equal(half_squares, limits[:m].numpy(), out=is_near[:m])
            row, visited = is_near[:m].nonzero()
            counts[1:][chunk] = np.bincount(row, minlength=m)
            found.append(visited.astype(np.int32))
        return Visits(cell, np.concatenate(found), counts.cumsum())


def reach_of(sketcher: Sketcher) -> float:
    """Return the maximum distance of the sketches of two rows that reach the threshold.

    Their product is at least `Sketcher.floor`. Their squared lengths exceed 1 by `Sketcher.tail` and rounding.
    """
    return float(np.sqrt(2 * (1 + 2 * sketcher.tail - sketcher.floor)) * (1 + 2.0**-20))


def fit_cells(sketches: torch.Tensor, k: int, reach: float) -> Cells:
    """Return at most k cells, fitted to a sample.

    Parameters
    ----------
    sketches : torch.Tensor
        (s, h) float32: a sample in random order.
    k : int
        Number of cells.
    reach : float
        Result of `reach_of`. Of centroids that are nearer to each other than half of it, one is kept: members of one
        would visit the other.
    """
    centroids = sketches[:k].clone()
    for _ in range(ITERATIONS):
        nearest = Cells(centroids, reach).nearest(sketches)
        count = torch.bincount(nearest, minlength=len(centroids))
        total = torch.zeros_like(centroids).index_add_(0, nearest, sketches)
        centroids = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], centroids)
    is_close = (torch.cdist(centroids, centroids) < reach / 2).tril_(-1).cpu().numpy()
    kept = np.zeros(len(centroids), bool)
    for row, close in enumerate(is_close):
        kept[row] = not (close & kept).any()
    return Cells(centroids[torch.from_numpy(kept).to(centroids.device)], reach)
