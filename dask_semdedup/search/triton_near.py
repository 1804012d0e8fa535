"""Pairs of rows that may be as similar as is asked for, found by their sketches on CUDA devices.

The members of a cell, and its visitors, are queries of the search by sketches among the members: see `triton_sketch`.
What is left of their hits are pairs, which pass the longer sketches before the host sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton

from dask_semdedup.search import certify
from dask_semdedup.search.index import Index
from dask_semdedup.search.near import Part, listed_or_bundled
from dask_semdedup.search.sketch import SCALE
from dask_semdedup.search.torch_sketch import rounded
from dask_semdedup.search.triton_launch import launcher_for
from dask_semdedup.search.triton_near_kernels import count_kernel, pair_kernel, visit_kernel
from dask_semdedup.search.triton_sketch import FIELDS, Blocks, Filter, Launch, Shape, checked, choose_shape, planned

__all__ = ["Comparison"]

ELEMENTS = 1 << 28
"""Distances between sketches and planes at once."""

HITS = 1 << 20
"""Hits whose pairs are listed at once."""

WORD_BYTES = 1 << 28
"""Bytes of device memory for the bits of one launch."""

PROGRAMS = 4096
"""Programs that look at hits."""

VISITS = 128, 64
"""Sketches and cells of which a program finds the visits."""

TILE = 1024, 1 << 16
"""Crowded queries, and candidates, that are multiplied at once."""


class Comparison:
    """Products of sketches of some parts, with each other or with those of others, in device memory.

    Parameters
    ----------
    parts : sequence of Part
    others : sequence of Part, optional
    index : Index
        That of the sketches.
    device : torch.device
    """

    def __init__(
        self, parts: Sequence[Part], others: Sequence[Part] | None, index: Index, device: torch.device
    ) -> None:
        self.index, self.device = index, device
        self.own = _Side(parts, index, device)
        self.guests = None if others is None else _Side(others, index, device)
        # Sketches in float16 may be farther from the planes by what they have lost.
        sides = [side for side in (self.own, self.guests) if side and len(side.key)]
        lost = max((float(side.residual[:, 0].max()) for side in sides), default=0.0)
        cells = index.cells.to(device)
        self.cells = replace(cells, reach=(cells.reach + 2 * lost) * (1 + 2.0**-20))

    def pairs(self, cells: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield pairs that meet in some cells, and bundles of others: see `near.Links`."""
        if self.guests is None:
            meetings = [(self.own, self.own.members(cells), self.own)]
            visiting = [(self.own, self.own)]
        else:
            meetings = [(self.guests, self.guests.members(cells), self.own)]
            visiting = [(self.guests, self.own), (self.own, self.guests)]
        for queries, batch, candidates in meetings:
            yield from self._meet(queries, batch, candidates, cells)
        for queries, candidates in visiting:
            for batch in self._visits(queries, cells):
                yield from self._meet(queries, batch, candidates, cells)

    def _visits(self, side: _Side, cells: slice) -> Iterator[_Batch]:
        """Yield the rows of a side that visit some cells: see `cells.Cells.visits`."""
        if len(self.cells) == 1:
            return
        # Slices of tensors may begin where kernels do not expect it: see `Launcher`.
        here, half_norms, limits = (
            part.clone(memory_format=torch.contiguous_format)
            for part in (self.cells.centroids[cells], self.cells.half_norms[cells], self.cells.limits[:, cells])
        )
        k, size = here.shape
        launch = launcher_for(self.device, "visits", size)
        chunks = certify.chunks(len(side.key), k, ELEMENTS)
        for chunk in chunks:
            sketches, own = side.short(chunk, size), side.cell[chunk].clone()
            least = self.cells.half_norms[own] - (sketches * self.cells.centroids[own]).sum(dim=1)
            n = len(own)
            visits = torch.empty(k, n, dtype=torch.int8, device=self.device)
            launch(
                visit_kernel,
                triton.cdiv(n, VISITS[0]) * triton.cdiv(k, VISITS[1]),
                sketches,
                own,
                least,
                here,
                half_norms,
                limits,
                visits,
                k,
                n,
                SIZE=size,
                DEPTH=min(32, size & -size),
                CELLS=VISITS[1],
                ROWS=VISITS[0],
            )
            cell, row = visits.nonzero().T
            ends = torch.searchsorted(cell.contiguous(), torch.arange(k, device=self.device), right=True)
            yield _Batch((row + chunk.start).int(), ends.diff(prepend=ends.new_zeros(1)))

    def _meet(
        self, queries: _Side, batch: _Batch, candidates: _Side, cells: slice
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the pairs of queries with the candidates of their cells; of rows of one batch, each pair once."""
        first, last = candidates.offsets[cells], candidates.offsets[1:][cells]
        shape = choose_shape(np.concatenate([[0], (last - first).cumsum()]))
        start, limit = (_uploaded(ends, self.device) for ends in (first, last))
        among = batch.are_members and queries is candidates
        blocks = _blocks(batch.counts, start, limit, shape, among=among, word_bytes=WORD_BYTES)
        if not blocks.launches:
            return
        ends = batch.rows if among else limit.repeat_interleave(batch.counts).int()
        filter_ = self._filter(queries, batch.rows, ends, candidates, shape)
        filter_.hits(blocks, candidates.sketches)
        n_hits = min(int(filter_.totals[0]), filter_.capacity)
        for hit in range(0, n_hits, HITS):
            candidate, query = self._listed(filter_, candidates, hit, min(HITS, n_hits - hit))
            yield listed_or_bundled(_host(self._of_longer(candidates, candidate, queries, batch.rows[query].long())))
        crowded = (filter_.count < 0).nonzero().flatten()
        if len(crowded):
            edges = self._edges(filter_, candidates, _host(batch.counts), first, last, crowded)
            keys = torch.cat([candidates.key, queries.key[batch.rows]])
            yield np.empty((0, 2), np.int64), _host(keys[edges])

    def _filter(
        self, queries: _Side, rows: torch.Tensor, stops: torch.Tensor, candidates: _Side, shape: Shape
    ) -> Filter:
        launch = launcher_for(self.device, "near", self.index.sketcher.size, shape)
        filter_ = Filter(queries.sketches, len(rows), self.index.sketcher, stops, shape, WORD_BYTES, launch, rows)
        filter_.residual = queries.lost
        # The bits of positive floats are ordered like integers.
        filter_.totals[1] = candidates.lost.max().view(torch.int32)
        filter_.count.zero_()
        return filter_

    def _listed(self, filter_: Filter, candidates: _Side, first: int, n_hits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the candidates and queries of some hits that reach the least product."""
        arguments = (
            filter_.sketches,
            filter_.which,
            candidates.sketches,
            filter_.residual,
            filter_.totals[1:],
            filter_.stops,
        )
        hits = filter_.hit_query[first : first + n_hits], filter_.hit_run[first : first + n_hits]
        numbers = filter_.sketcher.floor, n_hits, len(filter_.count), len(candidates.key)
        constants = {"PADDED": triton.next_power_of_2(filter_.sketcher.size), "RUN": filter_.shape.run}
        constants |= {"num_warps": 1, **filter_.constants}
        count = torch.empty(n_hits, dtype=torch.int32, device=self.device)
        filter_.launch(count_kernel, PROGRAMS, *arguments, *hits, count, *numbers, **constants)
        ends = count.cumsum(0)
        candidate, query = (torch.empty(int(ends[-1]), dtype=torch.int64, device=self.device) for _ in range(2))
        listed = *arguments, *hits, ends - count, candidate, query
        filter_.launch(pair_kernel, PROGRAMS, *listed, *numbers, **constants)
        return candidate, query

    def _of_longer(
        self, candidates: _Side, candidate: torch.Tensor, queries: _Side, query: torch.Tensor
    ) -> torch.Tensor:
        """Return the (p, 2) keys of the pairs of rows that the longer sketches leave, too."""
        longer = self.index.longer
        kept = [torch.empty(0, 2, dtype=torch.int64, device=self.device)]
        for chunk in certify.pieces(query, 8 * longer.size):
            one, other = candidate[chunk], query[chunk]
            product = (candidates.coordinates[one].float() * queries.coordinates[other].float()).sum(dim=1)
            product += candidates.left[one, 1] * queries.left[other, 1]
            lost, other_lost = queries.residual[other, 1], candidates.residual[one, 1]
            least = longer.floor - certify.half_bound(lost, other_lost, longer.size) * (1 + 2 * longer.tail)
            is_left = product >= least
            kept.append(torch.stack([candidates.key[one[is_left]], queries.key[other[is_left]]], dim=1))
        return torch.cat(kept)

    def _edges(
        self,
        filter_: Filter,
        candidates: _Side,
        counts: np.ndarray,
        start: np.ndarray,
        limit: np.ndarray,
        crowded: torch.Tensor,
    ) -> torch.Tensor:
        """Return (e, 2) rows that connect crowded queries with all that they hit: candidates first, then queries."""
        n = len(candidates.key)
        label = torch.arange(n + len(filter_.count), dtype=torch.int32, device=self.device)
        assert filter_.which is not None
        which = filter_.which[crowded]
        bound = filter_.residual[which]
        bound = bound + (1 + bound) * candidates.lost.max()
        least = ((self.index.sketcher.floor - bound * (1 + 2.0**-10)) * SCALE**2).floor_()
        edges = []
        cuts = np.searchsorted(_host(crowded), np.concatenate([[0], counts.cumsum()]))
        for cell in np.flatnonzero(np.diff(cuts)).tolist():
            for begin in range(cuts[cell], cuts[cell + 1], TILE[0]):
                some = slice(begin, min(begin + TILE[0], cuts[cell + 1]))
                query = crowded[some]
                for first in range(start[cell], limit[cell], TILE[1]):
                    tile = slice(first, min(first + TILE[1], limit[cell]))
                    # Sums of products of int8 are exact in float32.
                    products = filter_.sketches[which[some]].float() @ candidates.sketches[tile].float().T
                    place = torch.arange(tile.start, tile.stop, device=self.device)
                    reached = (products >= least[some, None]) & (place < filter_.stops[query, None])
                    edges += _united(label, query + n, tile, reached)
        return torch.cat(edges).unique(dim=0).long()


class _Side:
    """Sketches of some parts in the order of their cells.

    Attributes
    ----------
    key : torch.Tensor
        (n,) int64 rows as `near.Links` names them.
    coordinates, left, residual : torch.Tensor
        As of `near.Part`.
    cell : torch.Tensor
        (n,) int32.
    offsets : numpy.ndarray
        (k + 1,) int64 offsets of the cells.
    sketches : torch.Tensor
        (n + the candidates of a tile, h) int8 sketches.
    lost : torch.Tensor
        (n,) float32: what float16 and int8 have lost, times the length of a sketch: see `sketch_kernel`.
    """

    def __init__(self, parts: Sequence[Part], index: Index, device: torch.device) -> None:
        k, size = len(index.cells), index.sketcher.size
        counts = [np.diff(part.members) for part in parts]
        self.offsets = np.concatenate([[0], np.sum(counts, axis=0).cumsum()])
        numbers = torch.arange(k, dtype=torch.int32, device=device)
        cell = torch.cat([numbers.repeat_interleave(_uploaded(count, device)) for count in counts])
        self.cell, order = cell.sort(stable=True)
        self.key = torch.cat([_uploaded(part.rows, device) + part.first for part in parts])[order]
        self.coordinates, self.left, self.residual = (
            torch.cat([_uploaded(getattr(part, name), device) for part in parts])[order]
            for name in ("coordinates", "left", "residual")
        )
        n = len(order)
        # Tiles reach beyond the last row.
        self.sketches = torch.empty(n + PADDING, size, dtype=torch.int8, device=device)
        self.lost = torch.empty(n, device=device)
        for chunk in certify.pieces(self.key, 8 * size):
            self.sketches[chunk], lost = rounded(self.short(chunk, size), torch.int8)
            self.lost[chunk] = (lost + self.residual[chunk, 0]) * (1 + 2 * index.sketcher.tail)

    def short(self, rows: slice, size: int) -> torch.Tensor:
        """Return the shorter sketches of some rows in float32."""
        return torch.cat([self.coordinates[rows, : size - 1].float(), self.left[rows, :1]], dim=1)

    def members(self, cells: slice) -> _Batch:
        """Return the members of some cells."""
        first, last = self.offsets[cells.start], self.offsets[cells.stop]
        rows = torch.arange(first, last, dtype=torch.int32, device=self.key.device)
        return _Batch(rows, _uploaded(np.diff(self.offsets)[cells], rows.device), are_members=True)


PADDING = max(Shape().candidates, choose_shape(np.array([0, 1 << 20])).candidates)


@dataclass(frozen=True)
class _Batch:
    """Queries in the order of the cells whose members they meet.

    Attributes
    ----------
    rows : torch.Tensor
        (q,) int32 rows of a side.
    counts : torch.Tensor
        (c,) int64 queries of each cell.
    are_members : bool
        Whether these are the members of the cells.
    """

    rows: torch.Tensor
    counts: torch.Tensor
    are_members: bool = False


def _blocks(
    counts: torch.Tensor, start: torch.Tensor, limit: torch.Tensor, shape: Shape, *, among: bool, word_bytes: int
) -> Blocks:
    """Return the blocks of queries of cells, which meet candidates: see `triton_sketch.block_table`.

    They are made on the device: the host would take longer to make them than the device to multiply.

    Parameters
    ----------
    counts, start, limit : torch.Tensor
        (c,) int64 queries of each cell, and candidates from `start` to `limit`.
    shape : Shape
    among : bool
        Whether the queries are the candidates, which meet those before them.
    word_bytes : int
        Bytes of device memory for the bits.
    """
    n_blocks = torch.where(limit > start, (counts + shape.queries - 1) // shape.queries, 0)
    cell = torch.arange(len(counts), device=counts.device).repeat_interleave(n_blocks)
    first = (torch.arange(len(cell), device=counts.device) - (n_blocks.cumsum(0) - n_blocks)[cell]) * shape.queries
    begin, members = (counts.cumsum(0) - counts)[cell], (limit - start)[cell]
    last = torch.minimum(first + shape.queries, counts[cell]) - 1
    full = (first if among else members) // shape.candidates
    tiles = ((last if among else members) + shape.candidates - 1) // shape.candidates
    # The last record holds the total of the words.
    table = torch.zeros(len(cell) + 1, FIELDS, dtype=torch.int64, device=counts.device)
    table[:-1, :5] = torch.stack([begin + first, begin + counts[cell], start[cell], full, tiles], dim=1)
    bits = tiles * (shape.candidates // shape.run)
    torch.cumsum((bits + 31) // 32, 0, out=table[1:, 5])
    words, most = torch.stack([table[-1, 5], table[:, 4].max()]).tolist()
    if words * 4 * shape.queries > word_bytes:
        return planned(checked(_host(table)), shape, word_bytes, counts.device)
    return Blocks(table.int().flatten(), [Launch(0, len(cell), 0, words, most)] if words else [])


def _united(label: torch.Tensor, query: torch.Tensor, candidates: slice, reached: torch.Tensor) -> list[torch.Tensor]:
    """Give queries and the candidates that they reach the least label among them, and return what that connects.

    Parameters
    ----------
    label : torch.Tensor
        (n,) int32, changed in place. Rows with one label are connected by what was returned before.
    query : torch.Tensor
        (q,) int64.
    candidates : slice
    reached : torch.Tensor
        (q, c) bool.
    """
    most = torch.iinfo(label.dtype).max
    old = label[query], label[candidates].clone()
    of_query, of_candidate = old
    while True:
        before = of_query
        seen = torch.where(reached, of_query[:, None], most).amin(dim=0)
        of_candidate = torch.minimum(of_candidate, seen)
        seen = torch.where(reached, of_candidate, most).amin(dim=1)
        of_query = torch.minimum(of_query, seen)
        if torch.equal(before, of_query):
            break
    label[candidates], label[query] = of_candidate, of_query
    pairs = (torch.stack(both, dim=1) for both in zip(old, (of_query, of_candidate), strict=True))
    return [some[some[:, 0] != some[:, 1]].unique(dim=0) for some in pairs]


def _uploaded(array: Any, device: torch.device) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.to(device)
    # Torch takes arrays that can be written to; those of other workers cannot.
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def _host(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy()
