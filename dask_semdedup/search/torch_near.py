"""Pairs of rows that may be as similar as is asked for, found by products of their sketches in torch, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dask_semdedup.search import certify
from dask_semdedup.search.index import Index
from dask_semdedup.search.near import Part, listed_or_bundled
from dask_semdedup.search.torch_sketch import Sketches, rounded, sketch_dtype, with_least

__all__ = ["CHUNK", "Comparison"]

CHUNK = 1 << 16
"""Sketches that are gathered at once, unless one cell has more members and visitors."""

TILE = 512
"""Candidates, and queries, that are multiplied at once: their products stay in the cache."""

BATCH = 1 << 14
"""Pairs whose longer sketches are looked at together."""


class _Side:
    """Sketches in the order of their cells.

    Parameters
    ----------
    rows : sequence of Rows
    n_cells : int
    """

    def __init__(self, rows: Sequence[Rows], n_cells: int) -> None:
        self.parts = [r.part for r in rows]
        cell = np.concatenate([r.cell for r in rows])
        # Within a cell, rows stay in the order that they are given in.
        order = np.argsort(cell, kind="stable")
        self.offsets = np.searchsorted(cell[order], np.arange(n_cells + 1))
        self.of_part = np.repeat(np.arange(len(rows)), [len(r.which) for r in rows])[order]
        self.which = np.concatenate([r.which for r in rows])[order]

    def __len__(self) -> int:
        return len(self.which)

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Return some of the rows as `Links` names them."""
        keys = np.empty(len(rows), np.int64)
        for mine, part, which in self._by_part(rows):
            keys[mine] = (np.int64(part.number) << 32) | part.rows[which]
        return keys

    def sketches(self, rows: np.ndarray, size: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the shorter or longer sketches of some rows in float32, and what float16 lost of them."""
        found, residual = torch.empty(len(rows), size), torch.empty(len(rows))
        for mine, part, which in self._by_part(rows):
            place = torch.from_numpy(mine)
            # NumPy converts float16 one by one.
            sketches = torch.empty(len(which), size)
            sketches[:, :-1] = torch.from_numpy(part.coordinates[which, : size - 1])
            sketches[:, -1] = torch.from_numpy(part.left[which, kind])
            found.index_copy_(0, place, sketches)
            residual.index_copy_(0, place, torch.from_numpy(part.residual[which, kind]))
        return found, residual

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Part, np.ndarray]]:
        of_part, which = self.of_part[rows], self.which[rows]
        order = np.argsort(of_part, kind="stable")
        for number, (first, last) in enumerate(
            pairwise(np.searchsorted(of_part[order], np.arange(len(self.parts) + 1)))
        ):
            if first < last:
                mine = order[first:last]
                yield mine, self.parts[number], which[mine]


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
        self.parts, self.others, self.index = parts, others, index

    def pairs(self, cells: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the pairs of sketches that meet in some cells and reach the least product, and bundles of others."""
        for run in self._runs(cells):
            members, visitors = ([of(part, run) for part in self.parts] for of in (_members, _visitors))
            if self.others is None:
                yield _Meeting(members, [*members, *visitors], among_candidates=True).pairs(self.index)
            else:
                guests, visiting = ([of(part, run) for part in self.others] for of in (_members, _visitors))
                yield _Meeting(members, [*guests, *visiting]).pairs(self.index)
                yield _Meeting(guests, visitors).pairs(self.index)

    def _runs(self, cells: slice) -> Iterator[slice]:
        """Yield ranges of cells with about `CHUNK` members and visitors."""
        every = [*self.parts, *(self.others or [])]
        sizes = sum(
            np.diff(offsets[cells.start : cells.stop + 1])
            for part in every
            for offsets in (part.members, _visits(part)[1])
        )
        ends = np.cumsum(sizes)
        first = 0
        while first < len(ends):
            before = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + CHUNK, side="right")))
            yield slice(cells.start + first, cells.start + last)
            first = last


@dataclass(frozen=True)
class Rows:
    """Some sketches of a part, and the cells of a run that they are looked at in."""

    part: Part
    which: np.ndarray
    cell: np.ndarray


def _members(part: Part, cells: slice) -> Rows:
    offsets = part.members[cells.start : cells.stop + 1]
    return Rows(part, np.arange(offsets[0], offsets[-1]), np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)))


def _visitors(part: Part, cells: slice) -> Rows:
    visitors, offsets = _visits(part)
    offsets = offsets[cells.start : cells.stop + 1]
    which = visitors[offsets[0] : offsets[-1]]
    return Rows(part, which, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)))


def _visits(part: Part) -> tuple[np.ndarray, np.ndarray]:
    assert part.visits is not None, "sketches of a GPU are compared on one"
    return part.visits


class _Meeting:
    """Candidates and queries of a run of cells, and the tiles of their products.

    Parameters
    ----------
    candidates, queries : sequence of Rows
    among_candidates : bool
        Whether the first queries of each cell are its candidates, which meet only those before them.
    """

    def __init__(self, candidates: Sequence[Rows], queries: Sequence[Rows], *, among_candidates: bool = False) -> None:
        n_cells = 1 + max((int(r.cell.max()) for r in (*candidates, *queries) if len(r.cell)), default=-1)
        self.candidates, self.queries = (_Side(rows, n_cells) for rows in (candidates, queries))
        self.among_candidates = among_candidates

    def pairs(self, index: Index) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs that reach the least product, and rows that are bundled with a first one, as keys."""
        sides = self.candidates, self.queries
        both = [side.sketches(np.arange(len(side)), index.sketcher.size, 0) for side in sides]
        sketches, lost = rounded(torch.cat([each for each, _ in both]), sketch_dtype())
        residual = torch.cat([each for _, each in both]) + lost
        product = with_least(sketches, residual, torch.zeros(len(residual), dtype=torch.bool), index.sketcher)
        tiles = _Tiles(product, len(self.candidates))
        pairs, bundles = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
        held: list[np.ndarray] = []

        def check() -> None:
            """Keep of the pairs that are held what the longer sketches leave; if many, what connects the same rows."""
            found = self._of_longer(np.concatenate(held), index)
            keys = np.stack([side.keys(found[:, kind]) for kind, side in enumerate(sides)], axis=1)
            for some, into in zip(listed_or_bundled(keys), (pairs, bundles), strict=True):
                into.append(some)
            held.clear()

        for of_candidates, of_queries, diagonal in self._tiles():
            query, candidate, bundled = tiles.hits(of_candidates, of_queries)
            if diagonal is not None:
                is_earlier = candidate < query - diagonal
                query, candidate = query[is_earlier], candidate[is_earlier]
            held.append(np.stack([candidate, query], axis=1))
            if sum(map(len, held)) >= BATCH:
                check()
            if len(bundled[0]):
                members = np.concatenate([side.keys(rows) for rows, side in zip(bundled, sides, strict=True)])
                bundles.append(np.stack([members, np.full(len(members), members[0])], axis=1))
        if held:
            check()
        return np.concatenate(pairs), np.concatenate(bundles)

    def _of_longer(self, pairs: np.ndarray, index: Index) -> np.ndarray:
        """Return the pairs of candidates and queries that the longer sketches leave, too."""
        kept = [pairs[:0]]
        size = index.longer.size
        for chunk in certify.chunks(len(pairs), 4 * size):
            candidate, query = pairs[chunk].T
            others, other_lost = self.candidates.sketches(candidate, size, 1)
            own, lost = self.queries.sketches(query, size, 1)
            least = index.longer.floor - certify.half_bound(lost, other_lost, size) * (1 + 2 * index.longer.tail)
            kept.append(pairs[chunk][((own * others).sum(dim=1) >= least).numpy()])
        return np.concatenate(kept)

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

        Queries with hits in more than half of a tile are bundled with all that they hit; their pairs are left out.
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
        if len(words) > TILE // 16:
            is_crowded = mask.sum(axis=0) > TILE // 2
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
