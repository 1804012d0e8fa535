"""The coarse pass by blocked matrix products in torch, on any device.

Large segments are searched strip by strip: a strip of queries is multiplied by panels of the candidates ranked
before its last query, and only the pairs that can still be nearest (see `certify`) leave the strip. Small segments
are padded to a common length and multiplied in batches, in float32, which needs no half-precision copy.

Scores are laid out candidate by query, so that maxima over blocks of candidates run along contiguous rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dask_semdedup.search import certify
from dask_semdedup.search.certify import UnitRows

SMALL = 256
"""Segments up to this many rows are searched in batches."""

BLOCK = 64
"""Candidates whose maximum is taken at once."""

STRIP = {"cpu": 512, "cuda": 4096}
"""Queries multiplied at once, unless the caller says otherwise: a GPU is not filled by fewer."""

MAX_QUERIES = 8192
"""Queries multiplied at once whatever the caller says: more gain nothing, and the mask of a strip grows as a square."""

BATCH_BYTES = 4 << 20
"""Bytes of padded rows at once: a batch of small segments stays in the cache."""

STEP = 256
"""Candidates multiplied at once where the triangle's edge crosses a strip: each step leaves out earlier queries. In
wide strips an eighth of these, so that there are few steps."""

MAX_HITS = 32
"""A query with more candidates than this, and than one in `DENSE` rows, is multiplied again more precisely:
past it, one dense product is cheaper than rescoring the pairs."""

DENSE = 128


@dataclass(frozen=True)
class Coarse:
    """A representation of the unit rows in which scores are computed, and how far to trust it.

    Attributes
    ----------
    rows : torch.Tensor
        (n, d) in the dtype of the products.
    scale : torch.Tensor or None
        (n,) factors that make the rows unit vectors; None where they are.
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
        """Put the similarities of `candidates` to `queries`, candidate by query, into `out`."""
        torch.mm(self.rows[candidates], self.rows[queries].T, out=out)
        if self.scale is not None:
            out.mul_(self.scale[candidates, None]).mul_(self.scale[queries])


@dataclass(frozen=True)
class Double:
    """The unit rows in float64, converted panel by panel: scores that need no certificate."""

    rows: torch.Tensor
    dtype: torch.dtype = torch.float64

    def multiply(self, candidates: slice, queries: slice | torch.Tensor, out: torch.Tensor) -> None:
        """Put the similarities of `candidates` to `queries`, candidate by query, into `out`."""
        torch.mm(self._unit(self.rows[candidates]), self._unit(self.rows[queries]).T, out=out)
        certify.snap(out)

    @staticmethod
    def _unit(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.double()
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows.div_(torch.where(norm > 0, norm, 1.0))


def in_float32(unit: UnitRows) -> Coarse:
    """The rows as they are, scores computed in float32."""
    bound = certify.accumulation_bound(unit.width) + 2 * certify.UNIT_TOLERANCE
    scale = None if unit.is_unit else unit.inverse_norm
    return Coarse(unit.rows, scale, torch.full_like(unit.inverse_norm, bound))


def in_half(unit: UnitRows, dtype: torch.dtype) -> Coarse:
    """A half-precision copy of the unit rows."""
    half, residual = certify.half_copy(unit, dtype)
    bound = certify.half_bound(residual, residual.max(), unit.width)
    return Coarse(half, None, bound)


def workspace_bytes(device: torch.device) -> int:
    """Bytes that the scores of one panel may take: an eighth of what is free, at most 8 MiB (CPU) or 256 MiB (CUDA)."""
    if device.type == "cuda":
        return min(256 << 20, torch.cuda.mem_get_info(device)[0] // 8)
    import psutil

    return max(1 << 20, min(8 << 20, psutil.virtual_memory().available // 8))


def strip_size(wanted: int | None, segments: torch.Tensor, device: torch.device) -> int:
    """Queries to multiply at once: as `wanted`, but not more than the longest segment has."""
    longest = int(segments.diff().max()) if len(segments) > 1 else 1
    return max(1, min(wanted or STRIP[device.type], longest, MAX_QUERIES))


@dataclass(frozen=True)
class Strip:
    """Queries of one segment, and their candidates.

    Attributes
    ----------
    start, stop : int
        The candidates of any of them: rows from `start` to before `stop`.
    queries : torch.Tensor
        (m,) int64 rows, ascending.
    stops : torch.Tensor
        (m,) int64 where the candidates of each end. The very same tensor as `queries` where they end with the query.
    """

    start: int
    stop: int
    queries: torch.Tensor
    stops: torch.Tensor

    def run(self) -> slice | None:
        """The queries as a slice, if they are consecutive rows, each with all earlier ones as candidates."""
        first = int(self.queries[0])
        is_run = self.stops is self.queries and self.stop + 1 - first == len(self.queries)
        return slice(first, self.stop + 1) if is_run else None

    def first_stop(self) -> int:
        """Where the first candidate stands that is none of some query's."""
        return int(self.queries[0] if self.stops is self.queries else self.stops.min())


def strips(
    queries: torch.Tensor, segments: torch.Tensor, size: int, stops: torch.Tensor | None = None
) -> Iterator[Strip]:
    """Cut `queries` into strips of at most `size` queries of one segment.

    Parameters
    ----------
    queries : torch.Tensor
        (m,) int64 rows, ascending.
    segments : torch.Tensor
        (k + 1,) int64 offsets, on the CPU.
    size : int
        Queries in a strip.
    stops : torch.Tensor, optional
        (n,) int64 where the candidates of each row end, if not with the row itself.
    """
    cuts = torch.searchsorted(queries, segments.to(queries.device)).tolist()
    starts = segments.tolist()
    for start, first, last in zip(starts, cuts, cuts[1:], strict=False):
        for cut in range(first, last, size):
            part = queries[cut : min(cut + size, last)]
            ends = part if stops is None else stops[part]
            yield Strip(start, int(ends[-1] if stops is None else ends.max()), part, ends)


_INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def _padded(n: int) -> int:
    """The next multiple of `BLOCK`."""
    return -(-n // BLOCK) * BLOCK


@dataclass(frozen=True)
class Panel:
    """Scores of a strip of queries against a panel of candidates.

    Attributes
    ----------
    first : int
        The first candidate.
    scores : torch.Tensor
        (blocks, `BLOCK`, queries). Those of rows that are no candidates of the query, and of the padding of the last
        block, are 0.
    last : torch.Tensor
        (m, queries) integers: 0 where one of the last m rows of scores is such a score, else -1.
    """

    first: int
    scores: torch.Tensor
    last: torch.Tensor

    def positive_maxima(self) -> torch.Tensor:
        """(blocks, queries) maxima that are right where they are positive.

        The bits of positive floating-point numbers are ordered as integers are, and integers compare faster.
        """
        return self.scores.view(self.last.dtype).amax(dim=1).view(self.scores.dtype)

    def maxima(self, columns: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """(blocks, m) maxima of the queries in `columns`; without a candidate they, and those scores, are -inf."""
        rows = self.scores.view(-1, self.scores.shape[-1])
        tail = rows[len(rows) - len(self.last) :]
        tail[:, columns] = tail[:, columns].masked_fill(self.last[:, columns] == 0, -math.inf)
        return self.scores[..., columns].amax(dim=1)


class Panels:
    """Multiplies strips by their candidates, panel by panel, in one buffer that is used again and again."""

    def __init__(self, product: Coarse | Double, strip_size: int) -> None:
        self.product = product
        self.strip_size = strip_size
        self.step = max(STEP, strip_size // 8)
        device, width = product.rows.device, product.rows.shape[1]
        # Float64 panels are converted copies of the rows: those take room too.
        columns = max(strip_size, width) if isinstance(product, Double) else strip_size
        blocks = workspace_bytes(device) // (product.dtype.itemsize * columns * BLOCK)
        self.size = BLOCK * max(1, blocks)
        self.buffer = torch.empty(self.size * strip_size, dtype=product.dtype, device=device)
        place = torch.arange(strip_size + BLOCK, device=device)
        self.diagonal = self._earlier(place, place[:strip_size])  # of strips that are runs

    def of(self, strip: Strip) -> Iterator[Panel]:
        """Yield the panels of `strip`; each is gone when the next one is asked for."""
        n_rows, n_queries = len(self.product.rows), len(strip.queries)
        run = strip.run()
        if run is not None:
            # Lengths are rounded up, as oneDNN compiles a product for each shape; the rows that follow do no harm.
            run = slice(run.start, min(run.start + min(_padded(n_queries), self.strip_size), n_rows))
        width = n_queries if run is None else run.stop - run.start
        for first in range(strip.start, strip.stop, self.size):
            end = first + _padded(min(self.size, strip.stop - first))
            scores = self.buffer[: (end - first) * width].view(end - first, width)
            self._multiply(first, min(end, n_rows), strip.queries if run is None else run, scores)
            # From this candidate on, some are none of some query's.
            begin = min(max(strip.first_stop(), first), end)
            if run is None:
                last = self._earlier(torch.arange(begin, end, device=scores.device), strip.stops)
            else:
                last = self.diagonal[max(begin - run.start, 0) : max(end - run.start, 0), :width]
            scores.view(last.dtype)[begin - first :].bitwise_and_(last)
            yield Panel(first, scores.view(-1, BLOCK, width)[..., :n_queries], last[:, :n_queries])

    def _multiply(self, first: int, stop: int, queries: slice | torch.Tensor, scores: torch.Tensor) -> None:
        """Multiply the candidates from `first` to `stop`, leaving out most of those not ranked before the query."""
        if not isinstance(queries, slice):
            self.product.multiply(slice(first, stop), queries, scores[: stop - first])
            return
        cuts = [first, *range(max(first, queries.start) + self.step, min(stop, queries.stop), self.step), stop]
        for begin, end in pairwise(cuts):
            column = max(0, begin - queries.start)
            out = scores[begin - first : end - first, column:]
            self.product.multiply(slice(begin, end), slice(queries.start + column, queries.stop), out)

    def _earlier(self, candidates: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
        """All bits set where the candidate stands before the query's stop, none elsewhere."""
        return (candidates[:, None] < stops).to(_INTEGERS[self.product.dtype]).neg_()


def nearest(
    product: Coarse | Double,
    queries: torch.Tensor,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    scores: torch.Tensor,
    index: torch.Tensor,
    strip_size: int = STRIP["cpu"],
) -> None:
    """Put the best score of each query as computed, and the first candidate that has it."""
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
    """Candidate pairs, rescored whenever enough of them have gathered."""

    FLUSH = 1 << 14

    def __init__(self, unit: UnitRows, scores: torch.Tensor, index: torch.Tensor) -> None:
        self.unit, self.scores, self.index = unit, scores, index
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.count = 0

    def add(self, query: torch.Tensor, candidate: torch.Tensor) -> None:
        """Hold the pairs, all of each query's."""
        self.held.append((query, candidate))
        self.count += len(query)
        if self.count >= self.FLUSH:
            self.flush()

    def flush(self) -> None:
        """Rescore what is held."""
        if self.held:
            query, candidate = (torch.cat(part) for part in zip(*self.held, strict=True))
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
    """Add the pairs that can be nearest to `pairs`, and return the queries that have too many of them."""
    panels = Panels(coarse, strip_size)
    crowded = [queries[:0]]
    for strip in strips(queries, segments, strip_size, stops):
        bound = coarse.bound[strip.queries]
        most = max(MAX_HITS, (strip.stop - strip.start) // DENSE)
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
            column, candidate, score = _reaching(panel.scores, maxima, threshold, most, hits)
            found.append((column, candidate + panel.first, score))
        crowded.append(strip.queries[hits > most])
        column, candidate, score = (torch.cat(part) for part in zip(*found, strict=True))
        # Earlier panels were held against a best score that later ones may have raised.
        keep = score >= threshold[column]
        keep &= hits[column] <= most
        pairs.add(strip.queries[column[keep]], candidate[keep])
    return torch.cat(crowded)


def _threshold(best: torch.Tensor, bound: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Coarse scores below this cannot be a query's nearest; +inf for a query that has no candidate yet."""
    threshold = best - certify.window(best, bound, dtype)
    return threshold.masked_fill_(best == -math.inf, math.inf)


def _reaching(
    scores: torch.Tensor, maxima: torch.Tensor, threshold: torch.Tensor, most: int, hits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the scores that reach their query's threshold, block by block.

    Adds to `hits`, per query, the blocks and then the entries found; queries with more than `most` yield none.

    Returns
    -------
    column, candidate, score : torch.Tensor
        Position of the query in the strip, of the candidate in the panel, and the coarse score in float32.
    """
    reached = maxima >= threshold
    hits += reached.sum(dim=0)
    reached &= hits <= most
    block, column = reached.nonzero(as_tuple=True)
    entries = scores[block, :, column].float()
    found = _flat_nonzero(entries >= threshold[column, None])
    pair, inside = found // BLOCK, found % BLOCK
    column = column[pair]
    hits += torch.bincount(column, minlength=len(hits))
    return column, block[pair] * BLOCK + inside, entries.view(-1)[found]


def _flat_nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Positions of what is true in `mask`, flattened: on a CPU by NumPy, four times as fast."""
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
        Whether the segments lie one behind the other, all of one length: then no row is copied.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    longest: int
    is_contiguous: bool

    def rows(self) -> torch.Tensor:
        """(g, longest) int64 row numbers; short segments repeat their last row."""
        place = torch.arange(self.longest, device=self.starts.device)
        return self.starts[:, None] + torch.minimum(place, self.lengths[:, None] - 1)


def batches(segments: torch.Tensor, which: torch.Tensor, row_bytes: int, device: torch.device) -> Iterator[Batch]:
    """Group the segments in `which` by length, each group about `BATCH_BYTES` of padded rows.

    Parameters
    ----------
    segments : torch.Tensor
        (k + 1,) int64 offsets, on the CPU.
    which : torch.Tensor
        (m,) int64 segments.
    row_bytes : int
        Bytes of one row.
    device : torch.device
        Where the batches are wanted.
    """
    lengths, order = segments.diff()[which].sort(descending=True, stable=True)
    starts = segments[which[order]]
    first = 0
    while first < len(lengths):
        longest = int(lengths[first])
        # No segment is padded by more than a third.
        alike = int(torch.searchsorted(-lengths, -0.75 * longest, right=True))
        last = min(first + max(1, BATCH_BYTES // (row_bytes * longest)), alike)
        is_contiguous = bool((starts[first:last].diff() == longest).all()) and int(lengths[last - 1]) == longest
        yield Batch(starts[first:last].to(device), lengths[first:last].to(device), longest, is_contiguous)
        first = last


def _batch_scores(coarse: Coarse, batch: Batch, rows: torch.Tensor, stops: torch.Tensor | None) -> torch.Tensor:
    """Scores of a batch, (g, candidates, queries): -inf unless the candidate stands before the query's stop."""
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
    place = torch.arange(batch.longest, device=scores.device)
    ends = place if stops is None else (stops[rows] - batch.starts[:, None])[:, None]
    return scores.masked_fill_(place[:, None] >= ends, -math.inf)


def nearest_in_batches(
    coarse: Coarse,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    which: torch.Tensor,
    scores: torch.Tensor,
    index: torch.Tensor,
) -> None:
    """Put the best score of each row of the small segments in `which` as computed, and the first that has it."""
    for batch in batches(segments, which, coarse.rows[:1].nbytes, coarse.rows.device):
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
    """Add the pairs of the small segments in `which` that can be nearest to `pairs`; zero rows are no queries.

    Returns the queries that have too many of them.
    """
    crowded = [torch.empty(0, dtype=torch.int64, device=is_zero.device)]
    for batch in batches(segments, which, coarse.rows[:1].nbytes, coarse.rows.device):
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
