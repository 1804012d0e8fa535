"""Pairs of rows that may be as similar as is asked for, found by products of their sketches in torch, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dask_semdedup.search import certify
from dask_semdedup.search.index import Index
from dask_semdedup.search.near import Part, listed_or_bundled
from dask_semdedup.search.torch_sketch import Sketches, least_products, rounded, sketch_dtype

__all__ = ["CHUNK", "Comparison"]

CHUNK = 1 << 16
"""Sketches that are converted at once, and gathered, unless one cell has more members and visitors."""

TILE = 512
"""Candidates that are multiplied at once, with as many queries or more: TILE**2 products stay in the cache."""

BATCH = 1 << 14
"""Pairs whose longer sketches are looked at together."""


class Comparison:
    """Products of sketches of some parts, with each other or with those of others.

    Parameters
    ----------
    parts : sequence of Part
    others : sequence of Part, optional
    index : Index
        That of the sketches.
    """

    def __init__(self, parts: Sequence[Part], others: Sequence[Part] | None, index: Index) -> None:
        self.own, self.index = range(len(parts)), index
        self.guests = None if others is None else range(len(parts), len(parts) + len(others))
        self.rows = _Rows([*parts, *(others or [])], index)
        self.tiles = _Tiles(self.rows)

    def pairs(self, cells: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the pairs of sketches that meet in some cells and reach the least product, and bundles of others."""
        for run in self._runs(cells):
            members = self.rows.by_cell(self.own, run, _members)
            if self.guests is None:
                every = self.rows.by_cell(self.own, run, _members, _visitors)
                yield self._meet(members, every, among_candidates=True)
            else:
                yield self._meet(members, self.rows.by_cell(self.guests, run, _members, _visitors))
                guests = self.rows.by_cell(self.guests, run, _members)
                yield self._meet(guests, self.rows.by_cell(self.own, run, _visitors))

    def _runs(self, cells: slice) -> Iterator[slice]:
        """Yield ranges of cells with about `CHUNK` members and visitors."""
        sizes = sum(
            np.diff(offsets[cells.start : cells.stop + 1])
            for part in self.rows.parts
            for _, offsets in (_members(part), _visitors(part))
        )
        ends = np.cumsum(sizes)
        first = 0
        while first < len(ends):
            before = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + CHUNK, side="right")))
            yield slice(cells.start + first, cells.start + last)
            first = last

    def _meet(
        self, candidates: _Side, queries: _Side, *, among_candidates: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs of a run of cells that reach the least product, and rows that are bundled, as keys.

        With `among_candidates`, the first queries of each cell are its candidates, which meet only those before them.
        """
        self.tiles.gather(candidates.rows, queries.rows)
        pairs, bundles = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
        held: list[np.ndarray] = []

        def check() -> None:
            """Keep of the pairs that are held what the longer sketches leave; if many, what connects the same rows."""
            keys = self.rows.keys[self._of_longer(np.concatenate(held))]
            for some, into in zip(listed_or_bundled(keys), (pairs, bundles), strict=True):
                into.append(some)
            held.clear()

        for of_candidates, of_queries, diagonal in _tiles(candidates, queries, among_candidates=among_candidates):
            query, candidate, bundled = self.tiles.hits(of_candidates, of_queries)
            if diagonal is not None:
                is_earlier = candidate < query - diagonal
                query, candidate = query[is_earlier], candidate[is_earlier]
            held.append(np.stack([candidates.rows[candidate], queries.rows[query]], axis=1))
            if sum(map(len, held)) >= BATCH:
                check()
            if len(bundled[0]):
                keys = self.rows.keys[np.concatenate([candidates.rows[bundled[0]], queries.rows[bundled[1]]])]
                bundles.append(np.stack([keys, np.full(len(keys), keys[0])], axis=1))
        if held:
            check()
        return np.concatenate(pairs), np.concatenate(bundles)

    def _of_longer(self, pairs: np.ndarray) -> np.ndarray:
        """Return the pairs of rows that the longer sketches leave, too."""
        kept = [pairs[:0]]
        longer = self.index.longer
        for chunk in certify.chunks(len(pairs), 4 * longer.size):
            (others, other_lost), (own, lost) = map(self.rows.longer, pairs[chunk].T)
            least = longer.floor - certify.half_bound(lost, other_lost, longer.size) * (1 + 2 * longer.tail)
            kept.append(pairs[chunk][((own * others).sum(dim=1) >= least).numpy()])
        return np.concatenate(kept)


_Places = tuple[np.ndarray | None, np.ndarray]
"""Places of sketches, by default of all, in the order of cells, and the cells' offsets among them."""


def _members(part: Part) -> _Places:
    """Return the offsets of cells among the sketches, which are in the order of their cells."""
    return None, part.members


def _visitors(part: Part) -> _Places:
    """Return the places of the sketches that visit cells, and the cells' offsets among them."""
    assert part.visits is not None, "sketches of a GPU are compared on one"
    return part.visits


@dataclass(frozen=True)
class _Side:
    """Rows in the order of the cells of a run, and offsets of these cells."""

    rows: np.ndarray
    offsets: np.ndarray


class _Rows:
    """All sketches of some parts, one part after the other.

    Attributes
    ----------
    sketches : torch.Tensor
        (n, h) shorter sketches, in the dtype of their products, or in float16 for float32: these are gathered faster.
    least : torch.Tensor
        (1,) the least product of any of them, in the dtype of products.
    keys : numpy.ndarray
        (n,) int64 rows as `Links` names them.
    """

    def __init__(self, parts: Sequence[Part], index: Index) -> None:
        self.parts, self.index, self.dtype = parts, index, sketch_dtype()
        self.starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        self.keys = np.concatenate([part.first + part.rows for part in parts])
        n, size = len(self.keys), index.sketcher.size
        self.sketches = torch.empty(n, size, dtype=torch.float16 if self.dtype == torch.float32 else self.dtype)
        residual, exact = torch.empty(n), torch.empty(min(n, CHUNK), size)
        for part, start in zip(parts, self.starts.tolist(), strict=False):
            for chunk in certify.chunks(len(part.rows), 1, CHUNK):
                some, into = exact[: chunk.stop - chunk.start], slice(start + chunk.start, start + chunk.stop)
                some[:, :-1] = torch.from_numpy(part.coordinates[chunk, : size - 1])
                some[:, -1] = torch.from_numpy(part.left[chunk, 0])
                self.sketches[into], lost = rounded(some, self.sketches.dtype)
                residual[into] = lost.add_(torch.from_numpy(part.residual[chunk, 0]))
        # What rounding loses hardly differs between rows: one bound for all is compared with in half of the time.
        largest = residual.amax()[None] if n else residual.new_zeros(1)
        self.least = least_products(largest, torch.zeros(1, dtype=torch.bool), index.sketcher, self.dtype)

    def by_cell(self, numbers: range, cells: slice, *kinds: Callable[[Part], _Places]) -> _Side:
        """Return the members or visitors of some cells, or the members of each followed by its visitors."""
        rows, counts = [], []
        for kind in kinds:
            for number in numbers:
                which, offsets = kind(self.parts[number])
                offsets = offsets[cells.start : cells.stop + 1]
                first, last = offsets[0], offsets[-1]
                rows.append(self.starts[number] + (np.arange(first, last) if which is None else which[first:last]))
                counts.append(np.diff(offsets))
        n_cells = cells.stop - cells.start
        numbered = np.arange(n_cells, dtype=np.min_scalar_type(n_cells))
        cell = np.concatenate([np.repeat(numbered, count) for count in counts])
        offsets = np.concatenate([[0], np.sum(counts, axis=0).cumsum()])
        # Within a cell, rows stay in the order that they are given in.
        return _Side(np.concatenate(rows)[np.argsort(cell, kind="stable")], offsets)

    def longer(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the longer sketches of some rows in float32, and what float16 lost of them."""
        size = self.index.longer.size
        found, residual = torch.empty(len(rows), size), torch.empty(len(rows))
        of_part = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(of_part).tolist():
            mine = np.flatnonzero(of_part == number)
            part, place, which = self.parts[number], torch.from_numpy(mine), rows[mine] - self.starts[number]
            # NumPy converts float16 one by one.
            found[place, :-1] = torch.from_numpy(part.coordinates[which, : size - 1]).float()
            found[place, -1] = torch.from_numpy(part.left[which, 1])
            residual[place] = torch.from_numpy(part.residual[which, 1])
        return found, residual


def _tiles(candidates: _Side, queries: _Side, *, among_candidates: bool) -> Iterator[tuple[slice, slice, int | None]]:
    """Yield candidates and queries; where they may be the same rows, also how much later they are as queries."""
    cuts = zip(pairwise(candidates.offsets.tolist()), pairwise(queries.offsets.tolist()), strict=True)
    for (first, last), (start, stop) in cuts:
        for candidate in range(first, last, TILE):
            some = slice(candidate, min(candidate + TILE, last))
            n_some = some.stop - some.start
            # Rows of the tile meet each other, and all later ones.
            own = start + candidate - first if among_candidates else start
            if among_candidates:
                yield some, slice(own, own + n_some), start - first
                own += n_some
            # Few candidates meet as many more queries.
            step = TILE * TILE // _rounded_up(n_some)
            for query in range(own, stop, step):
                yield some, slice(query, min(query + step, stop)), None


def _rounded_up(n: int) -> int:
    """Return the next of 2 or 3 times a power of two, from 16 on."""
    grain = max(16, (1 << n.bit_length()) >> 2)
    return -(-n // grain) * grain


class _Tiles:
    """Products of candidates and queries, in memory that is used again: new memory takes as long as the products.

    Least products are positive. The bits of floating-point numbers compare like integers wherever one of the two is.
    """

    def __init__(self, rows: _Rows) -> None:
        self.rows, self.dtype, self.n_candidates = rows, rows.dtype, 0
        self.gathered = rows.sketches[:0].clone()
        self.converted = self.gathered.to(self.dtype)
        self.product = Sketches(self.converted, rows.least)
        self.integers = {2: torch.int16, 4: torch.int32}[self.product.dtype.itemsize]
        self.least = rows.least.view(self.integers).numpy()[0]
        self.mask = np.zeros(TILE * TILE + 8, bool)
        self.buffer = torch.empty(2 * _rounded_up(TILE) ** 2, dtype=self.product.dtype)

    def gather(self, candidates: np.ndarray, queries: np.ndarray) -> None:
        """Take the sketches of some rows, and convert them."""
        which = torch.from_numpy(np.concatenate([candidates, queries]))
        self.n_candidates, n = len(candidates), len(which)
        if n > len(self.gathered):
            self.gathered = self.gathered.new_empty(n, self.gathered.shape[1])
            self.converted = self.gathered.to(self.dtype)
        gathered = torch.index_select(self.rows.sketches, 0, which, out=self.gathered[:n])
        # Nothing is copied where they are alike.
        sketches = gathered if gathered.dtype == self.dtype else self.converted[:n].copy_(gathered)
        self.product = Sketches(sketches, self.rows.least)

    def _multiplied(self, rows: slice) -> slice:
        """Return some rows and others beside them, which are multiplied as well.

        For each shape of products in few bits, oneDNN compiles a program: half a millisecond, and half a megabyte.
        """
        if self.dtype == torch.float32:
            return rows
        n, n_all = _rounded_up(rows.stop - rows.start), len(self.product.rows)
        start = max(0, min(rows.start, n_all - n))
        return slice(start, min(start + n, n_all))

    def hits(self, candidates: slice, queries: slice) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Return the queries and candidates of pairs that reach the least product, and bundled candidates and queries.

        Queries with hits in more than half of a tile are bundled with all that they hit; their pairs are left out.
        """
        later = slice(queries.start + self.n_candidates, queries.stop + self.n_candidates)
        shape = queries.stop - queries.start, candidates.stop - candidates.start
        size = shape[0] * shape[1]
        # The fewer are the second factor, which oneDNN copies.
        rows, columns = self._multiplied(later), self._multiplied(candidates)
        out = self.buffer[: (rows.stop - rows.start) * (columns.stop - columns.start)].view(rows.stop - rows.start, -1)
        self.product.multiply(rows, columns, out)
        own = slice(candidates.start - columns.start, candidates.stop - columns.start)
        products = out[later.start - rows.start : later.stop - rows.start, own].view(self.integers).numpy()
        mask = self.mask[:size].reshape(shape)
        np.greater_equal(products, self.least, out=mask)
        self.mask[size : size + 8] = False
        # Hits are rare: eight at a time are looked at.
        words = np.flatnonzero(self.mask[: -(-size // 8) * 8].view(np.uint64))
        none = np.empty(0, np.int64)
        bundled = none, none
        if len(words) > TILE // 16:
            is_crowded = mask.sum(axis=1) > TILE // 2
            if is_crowded.any():
                bundled = (
                    candidates.start + np.flatnonzero(mask[is_crowded].any(axis=0)),
                    queries.start + np.flatnonzero(is_crowded),
                )
                mask[is_crowded] = False
                words = np.flatnonzero(self.mask[: -(-size // 8) * 8].view(np.uint64))
        word, byte = self.mask[: -(-size // 8) * 8].reshape(-1, 8)[words].nonzero()
        query, candidate = np.divmod(words[word] * 8 + byte, shape[1])
        return queries.start + query, candidates.start + candidate, bundled
