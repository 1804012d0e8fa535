"""Pairs of rows that may be as similar as is asked for, found by their sketches alone.

Rows come in *parts*, such as the partitions of a frame, of which only the sketches are at hand. The pairs that are left
hold all pairs of rows that are similar enough, and some more: whoever has the rows can tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dask_semdedup.search import certify, ieee_products
from dask_semdedup.search.crowded import first_copies
from dask_semdedup.search.index import Index
from dask_semdedup.search.sketch import Sketcher
from dask_semdedup.search.torch_sketch import ROWS, Sketches, rounded, sketch_dtype, with_least

__all__ = ["Links", "Part", "near_pairs", "sketch_part"]

TILE = 512
"""Candidates, and queries, that are multiplied at once: their products stay in the cache."""

FEW = 64
"""Pairs of a row in a tile that are listed; rows with more of them are bundled with all that they are near to."""

CHUNK = 1 << 16
"""Sketches that are gathered at once, unless one cell has more members and visitors."""


@dataclass(frozen=True)
class Part:
    """Sketches of some rows, in the order of their cells. Zero rows, and copies of other rows, are not among them.

    Attributes
    ----------
    number : int
        The number of the part.
    sketches : numpy.ndarray
        (m, h) float16.
    residual : numpy.ndarray
        (m,) float32 bounds on the length of what float16 lost.
    rows : numpy.ndarray
        (m,) int64 places in the part.
    members : numpy.ndarray
        (k + 1,) int64 offsets of the cells.
    visitors : numpy.ndarray
        (v,) int32 sketches that visit cells, in the order of these.
    visits : numpy.ndarray
        (k + 1,) int64 offsets of the cells among the visitors.
    copies : numpy.ndarray
        (c, 2) int64 places of rows that are equal bit by bit to an earlier one, and of that.
    """

    number: int
    sketches: np.ndarray
    residual: np.ndarray
    rows: np.ndarray
    members: np.ndarray
    visitors: np.ndarray
    visits: np.ndarray
    copies: np.ndarray


@dataclass(frozen=True)
class Links:
    """Pairs of rows, each row as the number of its part times 2**32, and its place there.

    Attributes
    ----------
    pairs : numpy.ndarray
        (p, 2) int64 rows that may be as similar as is asked for.
    bundles : numpy.ndarray
        (b, 2) int64 rows of crowded regions, and one row of each: the pairs there are too many to be listed.
    """

    pairs: np.ndarray
    bundles: np.ndarray


def sketch_part(number: int, rows: torch.Tensor, index: Index) -> Part:
    """Return the sketches of a part.

    Parameters
    ----------
    number : int
        The number of the part.
    rows : torch.Tensor
        (n, d) float32 on the CPU, finite.
    index : Index
    """
    first = first_copies(rows, torch.tensor([0, len(rows)])).numpy()
    unit = certify.measure(rows)
    is_copy = first != np.arange(len(rows))
    places = np.flatnonzero(~is_copy & ~unit.is_zero.numpy())
    copies = np.flatnonzero(is_copy & ~unit.is_zero.numpy())
    exact = torch.empty(len(places), index.sketcher.size)
    with ieee_products:
        for chunk in certify.chunks(len(places), 1, ROWS):
            which = torch.from_numpy(places[chunk])
            exact[chunk] = index.sketcher.sketches(unit.rows[which] * unit.inverse_norm[which, None])
        visits = index.cells.visits(exact)
    order = np.argsort(visits.cell, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    by_visited = np.argsort(visits.visited, kind="stable")
    cells = np.arange(len(index.cells) + 1)
    sketches, residual = rounded(exact[torch.from_numpy(order)], torch.float16)
    return Part(
        number,
        sketches.numpy(),
        residual.numpy(),
        places[order],
        np.searchsorted(visits.cell[order], cells),
        place[visits.visitor[by_visited]].astype(np.int32),
        np.searchsorted(visits.visited[by_visited], cells),
        np.stack([copies, first[copies]], axis=1),
    )


def near_pairs(parts: Sequence[Part], others: Sequence[Part] | None, cells: slice, sketcher: Sketcher) -> Links:
    """Return the pairs of rows of some parts that meet in some cells, and may be similar enough.

    Parameters
    ----------
    parts : sequence of Part
    others : sequence of Part, optional
        Parts whose rows are paired with those of `parts`. By default the rows of `parts` are paired with each other.
    cells : slice
        A range of cells: each pair is found in the cell that both are members of, or that one of them visits.
    sketcher : Sketcher
        That of the sketches.

    Returns
    -------
    Links
        A pair may be there twice.
    """
    pairs, bundles = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
    with ieee_products:
        for meeting in _meetings(parts, others, cells):
            for found, into in zip(meeting.pairs(sketcher), (pairs, bundles), strict=True):
                into.append(found)
    return Links(np.concatenate(pairs), np.concatenate(bundles))


def _meetings(parts: Sequence[Part], others: Sequence[Part] | None, cells: slice) -> Iterator[_Meeting]:
    """Yield what is compared in runs of cells: each pair is a candidate and a query once."""
    for run in _runs([*parts, *(others or [])], cells):
        members, visitors = ([of(part, run) for part in parts] for of in (_members, _visitors))
        if others is None:
            yield _Meeting(members, [*members, *visitors], among_candidates=True)
        else:
            guests, visiting = ([of(part, run) for part in others] for of in (_members, _visitors))
            yield _Meeting(members, [*guests, *visiting])
            yield _Meeting(guests, visitors)


def _runs(parts: Sequence[Part], cells: slice) -> Iterator[slice]:
    """Yield ranges of cells with about `CHUNK` members and visitors."""
    sizes = sum(
        np.diff(offsets[cells.start : cells.stop + 1]) for part in parts for offsets in (part.members, part.visits)
    )
    ends = np.cumsum(sizes)
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + CHUNK, side="right")))
        yield slice(cells.start + first, cells.start + last)
        first = last


@dataclass(frozen=True)
class _Rows:
    """Some sketches of a part, and the cells that they are looked at in."""

    part: Part
    which: np.ndarray
    cell: np.ndarray


def _members(part: Part, cells: slice) -> _Rows:
    offsets = part.members[cells.start : cells.stop + 1]
    return _Rows(part, np.arange(offsets[0], offsets[-1]), np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)))


def _visitors(part: Part, cells: slice) -> _Rows:
    offsets = part.visits[cells.start : cells.stop + 1]
    which = part.visitors[offsets[0] : offsets[-1]]
    return _Rows(part, which, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)))


@dataclass(frozen=True)
class _Side:
    """Sketches in the order of their cells.

    Attributes
    ----------
    sketches, residual : torch.Tensor
        (m, h) float16 and (m,) float32.
    keys : numpy.ndarray
        (m,) int64 rows.
    offsets : numpy.ndarray
        Of the cells.
    """

    sketches: torch.Tensor
    residual: torch.Tensor
    keys: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[_Rows], n_cells: int) -> _Side:
        cell = np.concatenate([r.cell for r in rows])
        # Within a cell, rows stay in the order that they are given in.
        order = np.argsort(cell, kind="stable")
        gathered = torch.from_numpy(order)
        return cls(
            torch.cat([torch.from_numpy(r.part.sketches[r.which]) for r in rows])[gathered],
            torch.cat([torch.from_numpy(r.part.residual[r.which]) for r in rows])[gathered],
            np.concatenate([(np.int64(r.part.number) << 32) | r.part.rows[r.which] for r in rows])[order],
            np.searchsorted(cell[order], np.arange(n_cells + 1)),
        )


class _Meeting:
    """Candidates and queries of a run of cells, and the tiles of their products.

    Parameters
    ----------
    candidates, queries : sequence of _Rows
    among_candidates : bool
        Whether the first queries of each cell are its candidates, which meet only those before them.
    """

    def __init__(
        self, candidates: Sequence[_Rows], queries: Sequence[_Rows], *, among_candidates: bool = False
    ) -> None:
        n_cells = 1 + max((int(r.cell.max()) for r in (*candidates, *queries) if len(r.cell)), default=-1)
        self.candidates, self.queries = (_Side.of(rows, n_cells) for rows in (candidates, queries))
        self.among_candidates = among_candidates

    def pairs(self, sketcher: Sketcher) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs that reach the least product, and rows that are bundled with a first one, as keys."""
        sides = self.candidates, self.queries
        sketches, lost = rounded(torch.cat([side.sketches for side in sides]).float(), sketch_dtype())
        residual = torch.cat([side.residual for side in sides]) + lost
        product = with_least(sketches, residual, torch.zeros(len(residual), dtype=torch.bool), sketcher)
        tiles = _Tiles(product, len(self.candidates.keys))
        pairs, bundles = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
        for candidates, queries, diagonal in self._tiles():
            query, candidate, bundled = tiles.hits(candidates, queries)
            if diagonal is not None:
                is_earlier = candidate < query - diagonal
                query, candidate = query[is_earlier], candidate[is_earlier]
            pairs.append(np.stack([self.queries.keys[query], self.candidates.keys[candidate]], axis=1))
            for rows, side in zip(bundled, sides, strict=True):
                leader = np.full(len(rows), bundled[0][0] if len(bundled[0]) else 0)
                bundles.append(np.stack([side.keys[rows], self.candidates.keys[leader]], axis=1))
        return np.concatenate(pairs), np.concatenate(bundles)

    def _tiles(self) -> Iterator[tuple[slice, slice, int | None]]:
        """Yield candidates and queries; where they may be the same rows, also how much later they are as queries."""
        cuts = zip(pairwise(self.candidates.offsets.tolist()), pairwise(self.queries.offsets.tolist()), strict=True)
        for (first, last), (start, stop) in cuts:
            for candidate in range(first, last, TILE):
                candidates = slice(candidate, min(candidate + TILE, last))
                # Rows of the tile meet each other, and all later ones.
                own = start + candidate - first if self.among_candidates else start
                n_candidates = candidates.stop - candidates.start
                if self.among_candidates:
                    yield candidates, slice(own, own + n_candidates), start - first
                    own += n_candidates
                for query in range(own, stop, TILE):
                    yield candidates, slice(query, min(query + TILE, stop)), None


class _Tiles:
    """Products of candidates and queries in one buffer.

    Least products are positive. The bits of floating-point numbers compare like integers wherever one of the two is.
    """

    def __init__(self, product: Sketches, n_candidates: int) -> None:
        self.product, self.n_candidates = product, n_candidates
        self.buffer = torch.empty(TILE * TILE, dtype=product.dtype)
        self.integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[product.dtype.itemsize]
        self.least = product.least.view(self.integers).numpy()
        self.mask = np.zeros(TILE * TILE + 8, bool)

    def hits(self, candidates: slice, queries: slice) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Return the queries and candidates of pairs that reach the least product, and bundled candidates and queries.

        Queries with more than `FEW` hits in the tile are bundled with all that they hit; their pairs are left out.
        """
        later = slice(queries.start + self.n_candidates, queries.stop + self.n_candidates)
        shape = candidates.stop - candidates.start, queries.stop - queries.start
        size = shape[0] * shape[1]
        out = self.buffer[:size].view(shape)
        self.product.multiply(candidates, later, out)
        mask = self.mask[:size].reshape(shape)
        np.greater_equal(out.view(self.integers).numpy(), self.least[later], out=mask)
        self.mask[size : size + 8] = False
        # Hits are rare: eight at a time are looked at.
        words = np.flatnonzero(self.mask[: -(-size // 8) * 8].view(np.uint64))
        none = np.empty(0, np.int64)
        bundled = none, none
        if len(words) > FEW:
            is_crowded = mask.sum(axis=0) > FEW
            if is_crowded.any():
                bundled = (
                    candidates.start + np.flatnonzero(mask[:, is_crowded].any(axis=1)),
                    queries.start + np.flatnonzero(is_crowded),
                )
                mask[:, is_crowded] = False
                words = np.flatnonzero(self.mask[: -(-size // 8) * 8].view(np.uint64))
        word, byte = self.mask[: -(-size // 8) * 8].reshape(-1, 8)[words].nonzero()
        candidate, query = np.divmod(words[word] * 8 + byte, shape[1])
        return queries.start + query, candidates.start + candidate, bundled
