"""Pairs of rows that may be as similar as is asked for, found by their sketches alone.

Rows come in *parts*, such as the partitions of a frame, of which only the sketches are at hand. The pairs that are left
hold all pairs of rows that are similar enough, and some more: whoever has the rows can tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dask_semdedup.search import certify, ieee_products
from dask_semdedup.search.crowded import first_copies
from dask_semdedup.search.index import Index
from dask_semdedup.search.sketch import Sketcher
from dask_semdedup.search.torch_engine import STRIP, strip_size
from dask_semdedup.search.torch_sketch import ROWS, candidates_of, hits, rounded, sketch_dtype, with_least

__all__ = ["Links", "Part", "near_pairs", "sketch_part"]

PRODUCTS = 1 << 20
"""Products that are computed at once where there are few candidates."""

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
    """Yield the members and visitors of runs of cells: each pair is a candidate and a query once."""
    for run in _runs([*parts, *(others or [])], cells):
        members = [_members(part, run) for part in parts]
        visitors = [_visitors(part, run) for part in parts]
        if others is None:
            yield _Meeting.of(members)
            yield _Meeting.of(members, visitors)
        else:
            guests = [found for part in others for found in (_members(part, run), _visitors(part, run))]
            yield _Meeting.of(members, guests)
            yield _Meeting.of([_members(part, run) for part in others], visitors)


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

    def keys(self) -> np.ndarray:
        return (np.int64(self.part.number) << 32) | self.part.rows[self.which]


def _members(part: Part, cells: slice) -> _Rows:
    offsets = part.members[cells.start : cells.stop + 1]
    return _Rows(part, np.arange(offsets[0], offsets[-1]), np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)))


def _visitors(part: Part, cells: slice) -> _Rows:
    offsets = part.visits[cells.start : cells.stop + 1]
    which = part.visitors[offsets[0] : offsets[-1]]
    return _Rows(part, which, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)))


@dataclass(frozen=True)
class _Meeting:
    """Sketches by cell, in each the candidates before the queries.

    Attributes
    ----------
    sketches, residual : torch.Tensor
        (m, h) float16 and (m,) float32.
    keys : numpy.ndarray
        (m,) int64.
    segments, stops : torch.Tensor
        As of `dask_semdedup.search.nearest_earlier`; there are no stops where candidates meet each other.
    """

    sketches: torch.Tensor
    residual: torch.Tensor
    keys: np.ndarray
    segments: torch.Tensor
    stops: torch.Tensor | None

    @classmethod
    def of(cls, candidates: Sequence[_Rows], queries: Sequence[_Rows] = ()) -> _Meeting:
        """Return a meeting of candidates and queries; of the candidates among themselves if there are no queries."""
        rows = [*candidates, *queries]
        is_query = np.repeat([False, True], [sum(len(r.which) for r in side) for side in (candidates, queries)])
        cell = np.concatenate([r.cell for r in rows])
        order = np.lexsort([is_query, cell])
        cell, is_query = cell[order], is_query[order]
        starts = np.flatnonzero(np.diff(cell, prepend=-1))
        segments, stops = np.append(starts, len(cell)), None
        if queries:
            lengths = np.diff(segments)
            n_candidates = np.add.reduceat(~is_query, starts, dtype=np.int64) if len(starts) else lengths
            first, end = np.repeat(starts, lengths), np.repeat(starts + n_candidates, lengths)
            stops = torch.from_numpy(np.where(is_query, end, first))
        gathered = torch.from_numpy(order)
        return cls(
            torch.cat([torch.from_numpy(r.part.sketches[r.which]) for r in rows])[gathered],
            torch.cat([torch.from_numpy(r.part.residual[r.which]) for r in rows])[gathered],
            np.concatenate([r.keys() for r in rows])[order],
            torch.from_numpy(segments),
            stops,
        )

    def pairs(self, sketcher: Sketcher) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys of pairs that reach the least product, and of rows that are bundled with a first one."""
        sketches, lost = rounded(self.sketches.float(), sketch_dtype())
        is_zero = torch.zeros(len(sketches), dtype=torch.bool)
        product = with_least(sketches, self.residual + lost, is_zero, sketcher)
        starts = self.segments[:-1].repeat_interleave(self.segments.diff())
        ends = torch.arange(len(sketches)) if self.stops is None else self.stops
        queries = (ends > starts).nonzero().flatten()
        found, crowded = [np.empty((0, 2), np.int64)], [queries[:0]]
        # Few members meet many visitors: a strip of these has about `PRODUCTS` all the same.
        n_candidates = int((ends - starts).max()) if len(queries) else 1
        wanted = STRIP["cpu"] if self.stops is None else max(STRIP["cpu"], PRODUCTS // n_candidates)
        size = strip_size(wanted, self.segments, sketches)
        for query, candidate, many in hits(product, queries, self.segments, self.stops, size):
            found.append(self.keys[torch.stack([query, candidate], dim=1).numpy()])
            crowded.append(many)
        pairs, queries = np.concatenate(found), torch.cat(crowded)
        bundled = torch.cat([queries, candidates_of(product, self.segments, queries)]).unique().numpy()
        segment = np.searchsorted(self.segments.numpy(), bundled, side="right")
        leader = bundled[np.searchsorted(segment, segment)]
        # A row that visits its own copy's cell may meet itself.
        return pairs[pairs[:, 0] != pairs[:, 1]], np.stack([self.keys[bundled], self.keys[leader]], axis=1)
