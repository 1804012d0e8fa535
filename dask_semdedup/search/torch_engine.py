"""The coarse pass by blocked matrix products in torch, on any device.

Large segments are searched strip by strip: a strip of queries is multiplied by panels of the candidates ranked before
its last query, and only the pairs that can still be nearest (see `certify`) leave the strip. Small segments are padded
to a common length and multiplied in batches, in float32, which needs no half-precision copy.

Scores are laid out candidate by query, so that maxima over blocks of candidates run along contiguous rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from dask_semdedup.search import certify
from dask_semdedup.search.certify import UnitRows

SMALL = 256
"""Segments of up to this many rows are searched in batches."""

BLOCK = 64
"""Candidates per maximum."""

STRIP = {"cpu": 512, "cuda": 4096}
"""Queries multiplied at once by default: fewer would not fill a GPU."""

MAX_QUERIES = 8192
"""Upper limit of queries multiplied at once: more gain nothing, and the mask of a strip grows with their square."""

BATCH_BYTES = 4 << 20
"""Bytes of padded rows at once: a batch of small segments stays in the cache."""

STEP = 256
"""Candidates multiplied at once along the diagonal of a strip, where each step leaves out the queries before it. Wide
strips take steps of an eighth of their width instead, so that there are few of them."""

MAX_HITS = 32
"""A query with more candidates than this, and more than one in `DENSE` rows, is multiplied again more precisely: one
dense product is then cheaper than rescoring its pairs."""

DENSE = 128


def half_dtype(device: torch.device) -> torch.dtype | None:
    """Return the half-precision dtype that `device` multiplies fast, or None."""
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return None


def cpu_has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 in hardware and torch uses that."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Coarse:
    """Representation of the unit rows for the products, with bounds on the errors of the scores.

    Attributes
    ----------
    rows : torch.Tensor
        (n, d) in the dtype of the products; zero rows may follow.
    scale : torch.Tensor or None
        (n,) factors that make the rows unit vectors; None if they are.
    bound : torch.Tensor
        (n,) bounds on the error of a query's scores before they are rounded to the dtype of `rows`.
    """

    rows: torch.Tensor
    scale: torch.Tensor | None
    bound: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scores."""
        return self.rows.dtype

    def multiply(self, candidates: slice, queries: slice | torch.Tensor, out: torch.Tensor) -> None:
        """Write the similarities of `candidates` to `queries`, candidate by query, to `out`."""
        torch.mm(self.rows[candidates], self.rows[queries].T, out=out)
        if self.scale is not None:
            out.mul_(self.scale[candidates, None]).mul_(self.scale[queries])


@dataclass(frozen=True)
class Double:
    """Unit rows in float64, converted panel by panel, whose scores need no certificate."""

    rows: torch.Tensor
    dtype: torch.dtype = torch.float64

    def multiply(self, candidates: slice, queries: slice | torch.Tensor, out: torch.Tensor) -> None:
        """Write the similarities of `candidates` to `queries`, candidate by query, to `out`."""
        torch.mm(self._unit(self.rows[candidates]), self._unit(self.rows[queries]).T, out=out)
        certify.snap(out)

    @staticmethod
    def _unit(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.double()
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows.div_(torch.where(norm > 0, norm, 1.0))


class Product(Protocol):
    """Rows, and the products of theirs that the search looks at."""

    @property
    def rows(self) -> torch.Tensor:
        """(n, m) rows."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""

    def multiply(self, candidates: slice, queries: slice | torch.Tensor, out: torch.Tensor) -> None:
        """Write the products of `candidates` with `queries`, candidate by query, to `out`."""


def in_float32(unit: UnitRows) -> Coarse:
    """Return the rows as they are, for scores in float32."""
    bound = certify.accumulation_bound(unit.width) + 2 * certify.UNIT_TOLERANCE
    scale = None if unit.is_unit else unit.inverse_norm
    return Coarse(unit.rows, scale, torch.full_like(unit.inverse_norm, bound))


def in_half(unit: UnitRows, dtype: torch.dtype) -> Coarse:
    """Return a half-precision copy of the unit rows."""
    half, residual = certify.half_copy(unit, dtype, padded(len(unit.rows)))
    bound = certify.half_bound(residual, residual.max(), unit.width)
    return Coarse(half, None, bound)


def workspace_bytes(rows: torch.Tensor) -> int:
    """Return the bytes for the scores of one panel: an eighth of free memory, at most 8 MiB (CPU) or 256 MiB (CUDA)."""
    if rows.is_cuda:
        return min(256 << 20, torch.cuda.mem_get_info(rows.device)[0] // 8)
    import psutil

    return max(1 << 20, min(8 << 20, psutil.virtual_memory().available // 8))


def strip_size(wanted: int | None, segments: torch.Tensor, rows: torch.Tensor) -> int:
    """Return the number of queries to multiply at once: as `wanted`, but no more than the longest segment has."""
    longest = int(segments.diff().max()) if len(segments) > 1 else 1
    return max(1, min(wanted or STRIP[rows.device.type], longest, MAX_QUERIES))


@dataclass(frozen=True)
class Strip:
    """Queries of one segment and their candidates.

    Attributes
    ----------
    start, stop : int
        The candidates of any query: rows from `start` to before `stop`.
    queries : torch.Tensor
        (m,) int64 rows, ascending.
    stops : torch.Tensor
        (m,) int64 ends of the candidates of each query; the same object as `queries` if these are the queries.
    """

    start: int
    stop: int
    queries: torch.Tensor
    stops: torch.Tensor

    def run(self) -> slice | None:
        """Return the queries as a slice if they are consecutive rows that have all earlier rows as candidates."""
        first = int(self.queries[0])
        is_run = self.stops is self.queries and self.stop + 1 - first == len(self.queries)
        return slice(first, self.stop + 1) if is_run else None

    def first_stop(self) -> int:
        """Return the first row that is not a candidate of every query."""
        return int(self.queries[0] if self.stops is self.queries else self.stops.min())


def strips(
    queries: torch.Tensor, segments: torch.Tensor, size: int, stops: torch.Tensor | None = None
) -> Iterator[Strip]:
    """Yield `queries` in strips of at most `size` queries of one segment.

    Parameters
    ----------
    queries : torch.Tensor
        (m,) int64 rows, ascending.
    segments : torch.Tensor
        (k + 1,) int64 offsets, on the CPU.
    size : int
    stops : torch.Tensor, optional
        (n,) int64 ends of the candidates of each row. By default the row itself.
    """
    cuts = torch.searchsorted(queries, segments.to(queries.device)).tolist()
    starts = segments.tolist()
    for start, first, last in zip(starts, cuts, cuts[1:], strict=False):
        for cut in range(first, last, size):
            split = queries[cut : min(cut + size, last)]
            ends = split if stops is None else stops[split]
            yield Strip(start, int(ends[-1] if stops is None else ends.max()), split, ends)


def most_hits(strip: Strip) -> int:
    """Return the candidates beyond which a query of `strip` is multiplied again."""
    return max(MAX_HITS, (strip.stop - strip.start) // DENSE)


_INTEGERS = {
    torch.int32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def padded(n: int) -> int:
    """Return the next multiple of `BLOCK`. For each shape of products in few bits, oneDNN compiles a program."""
    return -(-n // BLOCK) * BLOCK


def _of_few_lengths(start: int, stop: int, least: int) -> Iterator[slice]:
    """Cut rows into pieces of 2 or 3 times a power of two, from `BLOCK` on; the last may overlap others, from `least`.

    For each shape of products in few bits, oneDNN compiles a program that stays: half a millisecond, half a megabyte.
    """
    while stop - start >= BLOCK:
        half = 1 << ((stop - start).bit_length() - 2)
        n = (stop - start) // half * half
        yield slice(start, start + n)
        start += n
    if start < stop:
        yield slice(max(least, stop - BLOCK), stop)


@dataclass(frozen=True)
class Panel:
    """Scores of a strip of queries against a panel of candidates.

    Attributes
    ----------
    first : int
        The first candidate.
    scores : torch.Tensor
        (blocks, `BLOCK`, queries). Scores of rows that are no candidates of the query, and of the padding of the last
        block, are 0.
    last : torch.Tensor
        (m, queries) integers for the last m rows of scores: 0 where the score is one of these, else -1.
    """

    first: int
    scores: torch.Tensor
    last: torch.Tensor

    def positive_maxima(self) -> torch.Tensor:
        """Return (blocks, queries) maxima that are correct where they are positive.

        The bits of positive floating-point numbers are ordered like integers, and integers compare faster.
        """
        return self.scores.view(self.last.dtype).amax(dim=1).view(self.scores.dtype)

    def maxima(self, columns: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """Return (blocks, m) maxima of the queries in `columns`, after setting scores of non-candidates to -inf."""
        rows = self.scores.view(-1, self.scores.shape[-1])
        tail = rows[len(rows) - len(self.last) :]
        tail[:, columns] = tail[:, columns].masked_fill(self.last[:, columns] == 0, -math.inf)
        return self.scores[..., columns].amax(dim=1)


class Panels:
    """Products of strips with their candidates, panel by panel, in one buffer that all panels share."""

    def __init__(self, product: Product, strip_size: int) -> None:
        self.product = product
        self.strip_size = strip_size
        self.step = max(STEP, strip_size // 8)
        device, width = product.rows.device, product.rows.shape[1]
        # Float64 panels are converted copies of the rows, which take memory too.
        columns = max(strip_size, width) if isinstance(product, Double) else strip_size
        blocks = workspace_bytes(product.rows) // (product.dtype.itemsize * columns * BLOCK)
        self.size = BLOCK * max(1, blocks)
        self.buffer = torch.empty(self.size * strip_size, dtype=product.dtype, device=device)

    @cached_property
    def diagonal(self) -> torch.Tensor:
        """The mask of strips that are runs."""
        position = torch.arange(self.strip_size + BLOCK, device=self.buffer.device)
        return self._earlier(position, position[: self.strip_size])

    def of(self, strip: Strip) -> Iterator[Panel]:
        """Yield the panels of `strip`; each is overwritten by the next one."""
        n_rows, n_queries = len(self.product.rows), len(strip.queries)
        run = strip.run()
        # Queries are multiplied with more that are ignored: rows after them, or the last one again.
        width = min(padded(n_queries), self.strip_size)
        if run is None:
            more = width - n_queries
            queries, stops = (torch.cat([some, some[-1:].expand(more)]) for some in (strip.queries, strip.stops))
        else:
            run = slice(run.start, min(run.start + width, n_rows))
            width = run.stop - run.start
        for first in range(strip.start, strip.stop, self.size):
            end = first + padded(min(self.size, strip.stop - first))
            scores = self.buffer[: (end - first) * width].view(end - first, width)
            self._multiply(first, min(end, n_rows), queries if run is None else run, scores)
            # Before this row, all rows are candidates of all queries.
            begin = min(max(strip.first_stop(), first), end)
            if run is None:
                last = self._earlier(torch.arange(begin, end, device=scores.device), stops)
            else:
                last = self.diagonal[max(begin - run.start, 0) : max(end - run.start, 0), :width]
            scores.view(last.dtype)[begin - first :].bitwise_and_(last)
            yield Panel(first, scores.view(-1, BLOCK, width)[..., :n_queries], last[:, :n_queries])

    def _multiply(self, first: int, stop: int, queries: slice | torch.Tensor, scores: torch.Tensor) -> None:
        """Multiply the candidates from `first` to `stop`, without most pairs whose candidate is not ranked earlier."""
        if not isinstance(queries, slice):
            for some in _of_few_lengths(first, stop, first):
                self.product.multiply(some, queries, scores[some.start - first : some.stop - first])
            return
        cuts = [first, *range(max(first, queries.start) + self.step, min(stop, queries.stop), self.step), stop]
        for begin, end in pairwise(cuts):
            column = max(0, begin - queries.start)
            for some in _of_few_lengths(begin, end, first):
                out = scores[some.start - first : some.stop - first, column:]
                self.product.multiply(some, slice(queries.start + column, queries.stop), out)

    def _earlier(self, candidates: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
        """Return integers with all bits set where the candidate is before the query's stop, 0 elsewhere."""
        return (candidates[:, None] < stops).to(_INTEGERS[self.product.dtype]).neg_()


def nearest(
    product: Product,
    queries: torch.Tensor,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    scores: torch.Tensor,
    index: torch.Tensor,
    strip_size: int = STRIP["cpu"],
) -> None:
    """Write the best score of each query as computed, and the first candidate that has it."""
    panels = Panels(product, strip_size)
    for strip in strips(queries, segments, strip_size, stops):
        column = torch.arange(len(strip.queries), device=queries.device)
        best = torch.full(column.shape, -math.inf, dtype=product.dtype, device=queries.device)
        where = strip.queries.clone()
        for panel in panels.of(strip):
            maximum, block = panel.maxima().max(dim=0)
            inside = panel.scores[block, :, column].argmax(dim=1)
            better = maximum > best
            best = torch.where(better, maximum, best)
            where = torch.where(better, panel.first + block * BLOCK + inside, where)
        scores[strip.queries] = best.float()
        index[strip.queries] = where


class Pairs:
    """Candidate pairs, rescored as soon as there are `FLUSH` of them."""

    FLUSH = 1 << 14

    def __init__(self, unit: UnitRows, scores: torch.Tensor, index: torch.Tensor) -> None:
        self.unit, self.scores, self.index = unit, scores, index
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.count = 0

    def add(self, query: torch.Tensor, candidate: torch.Tensor) -> None:
        """Hold pairs: all of each query at once."""
        self.held.append((query, candidate))
        self.count += len(query)
        if self.count >= self.FLUSH:
            self.flush()

    def flush(self) -> None:
        """Rescore the pairs that are held."""
        if self.held:
            query, candidate = map(torch.cat, zip(*self.held, strict=True))
            certify.rescore(self.unit, query, candidate, self.scores, self.index)
        self.held, self.count = [], 0


def certified(
    coarse: Coarse,
    queries: torch.Tensor,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    pairs: Pairs,
    strip_size: int = STRIP["cpu"],
) -> torch.Tensor:
    """Return the queries with too many candidates that can be nearest; add those of the others to `pairs`."""
    panels = Panels(coarse, strip_size)
    crowded = [queries[:0]]
    for strip in strips(queries, segments, strip_size, stops):
        bound = coarse.bound[strip.queries]
        most = most_hits(strip)
        best = torch.full_like(bound, -math.inf)
        hits = torch.zeros(len(bound), dtype=torch.int64, device=bound.device)
        found = []
        for panel in panels.of(strip):
            maxima, so_far = panel.positive_maxima(), best
            best = torch.maximum(so_far, maxima.amax(dim=0).float())
            threshold = _threshold(best, bound, coarse.dtype)
            low = (threshold <= 0).nonzero().flatten()
            if len(low):
                maxima[:, low] = panel.maxima(low)
                best = torch.maximum(so_far, maxima.amax(dim=0).float())
                threshold = _threshold(best, bound, coarse.dtype)
            column, candidate, score = reaching(panel.scores, maxima, threshold, most, hits)
            found.append((column, candidate + panel.first, score))
        crowded.append(strip.queries[hits > most])
        column, candidate, score = map(torch.cat, zip(*found, strict=True))
        # Later panels may have raised the best score since.
        keep = score >= threshold[column]
        keep &= hits[column] <= most
        pairs.add(strip.queries[column[keep]], candidate[keep])
    return torch.cat(crowded)


def _threshold(best: torch.Tensor, bound: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the coarse score below which no candidate is a query's nearest; +inf for queries without candidates."""
    threshold = best - certify.window(best, bound, dtype)
    return threshold.masked_fill_(best == -math.inf, math.inf)


def reaching(
    scores: torch.Tensor, maxima: torch.Tensor, threshold: torch.Tensor, most: int, hits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the scores that reach their query's threshold, found block by block.

    The blocks and then the entries found are added to each query's `hits`; queries with more than `most` get none.

    Returns
    -------
    column, candidate, score : torch.Tensor
        Position of the query in the strip and of the candidate in the panel, and the coarse score in float32.
    """
    found = _flat_nonzero(maxima >= threshold)
    block, column = found // maxima.shape[1], found % maxima.shape[1]
    hits += torch.bincount(column, minlength=len(hits))
    few = hits[column] <= most
    block, column = block[few], column[few]
    entries = scores[block, :, column].float()
    found = _flat_nonzero(entries >= threshold[column, None])
    pair, inside = found // BLOCK, found % BLOCK
    column = column[pair]
    hits += torch.bincount(column, minlength=len(hits))
    return column, block[pair] * BLOCK + inside, entries.view(-1)[found]


def _flat_nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Return the positions where the flattened `mask` is true; on a CPU by NumPy, which is four times as fast."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().flatten()


@dataclass(frozen=True)
class Batch:
    """Small segments of similar length.

    Attributes
    ----------
    starts, lengths : torch.Tensor
        (g,) int64 first row and number of rows of each segment.
    longest : int
        Rows that every segment is padded to.
    is_contiguous : bool
        Whether the segments are adjacent and all of one length, so that no rows need to be copied.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    longest: int
    is_contiguous: bool

    def rows(self) -> torch.Tensor:
        """Return (g, longest) int64 row numbers; short segments repeat their last row."""
        position = torch.arange(self.longest, device=self.starts.device)
        return self.starts[:, None] + torch.minimum(position, self.lengths[:, None] - 1)


def batches(segments: torch.Tensor, which: torch.Tensor, rows: torch.Tensor) -> Iterator[Batch]:
    """Yield the segments in `which` in groups of similar length, of about `BATCH_BYTES` of padded rows each.

    Parameters
    ----------
    segments : torch.Tensor
        (k + 1,) int64 offsets, on the CPU.
    which : torch.Tensor
        (m,) int64 segments.
    rows : torch.Tensor
        (n, d) rows, whose device the batches are on.
    """
    row_bytes = rows[:1].nbytes
    lengths, order = segments.diff()[which].sort(descending=True, stable=True)
    starts = segments[which[order]]
    first = 0
    while first < len(lengths):
        longest = int(lengths[first])
        # No segment is padded by more than a third.
        alike = int(torch.searchsorted(-lengths, -0.75 * longest, right=True))
        last = min(first + max(1, BATCH_BYTES // (row_bytes * longest)), alike)
        is_contiguous = bool((starts[first:last].diff() == longest).all()) and int(lengths[last - 1]) == longest
        group = starts[first:last].to(rows.device), lengths[first:last].to(rows.device)
        yield Batch(*group, longest, is_contiguous)
        first = last


def _batch_scores(coarse: Coarse, batch: Batch, rows: torch.Tensor, stops: torch.Tensor | None) -> torch.Tensor:
    """Return the (g, candidates, queries) scores of a batch: -inf unless the candidate is before the query's stop."""
    if batch.is_contiguous:
        first = int(batch.starts[0])
        values = coarse.rows[first : first + rows.numel()]
    else:
        values = coarse.rows.index_select(0, rows.flatten())
    values = values.view(*rows.shape, -1)
    scores = torch.bmm(values, values.mT)
    if coarse.scale is not None:
        scale = coarse.scale[rows]
        scores.mul_(scale[:, :, None]).mul_(scale[:, None, :])
    position = torch.arange(batch.longest, device=scores.device)
    ends = position if stops is None else (stops[rows] - batch.starts[:, None])[:, None]
    return scores.masked_fill_(position[:, None] >= ends, -math.inf)


def nearest_in_batches(
    coarse: Coarse,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    which: torch.Tensor,
    scores: torch.Tensor,
    index: torch.Tensor,
) -> None:
    """Write the best score of each row of the segments in `which` as computed, and the first candidate that has it."""
    for batch in batches(segments, which, coarse.rows):
        rows = batch.rows()
        best, candidate = _batch_scores(coarse, batch, rows, stops).max(dim=1)
        found = (best > -math.inf) & (torch.arange(batch.longest, device=rows.device) < batch.lengths[:, None])
        scores[rows[found]] = best[found].float()
        index[rows[found]] = rows.gather(1, candidate)[found]


def certified_in_batches(
    coarse: Coarse,
    is_zero: torch.Tensor,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    which: torch.Tensor,
    pairs: Pairs,
) -> torch.Tensor:
    """Return the queries of the segments in `which` with too many candidates, as in `certified`.

    The candidates of the other queries are added to `pairs`. Zero rows are no queries.
    """
    crowded = [torch.empty(0, dtype=torch.int64, device=is_zero.device)]
    for batch in batches(segments, which, coarse.rows):
        rows = batch.rows()
        scores = _batch_scores(coarse, batch, rows, stops)
        best = scores.amax(dim=1)
        threshold = best - certify.window(best, coarse.bound[rows], coarse.dtype)
        is_padding = torch.arange(batch.longest, device=rows.device) >= batch.lengths[:, None]
        threshold[is_padding | is_zero[rows] | (best == -math.inf)] = math.inf
        hits = scores >= threshold[:, None]
        is_crowded = hits.sum(dim=1) > MAX_HITS
        crowded.append(rows[is_crowded])
        hits &= ~is_crowded[:, None]
        segment, candidate, query = hits.nonzero(as_tuple=True)
        pairs.add(rows[segment, query], rows[segment, candidate])
    return torch.cat(crowded)
