"""The coarse pass as one fused kernel over the tiles of all segments, and what follows it, for CUDA.

The kernels, in the order of their launch; the host waits for none:

`_halve`
    rounds the unit rows to half precision, measures what that lost, and answers each row with itself to begin with.
`_coarse`
    multiplies tiles of queries by tiles of the candidates ranked before them. Of each tile and query only the two or
    three best scores and their candidates leave the kernel; the rest never reach memory.
`_select`
    holds those against the certificate and lists the candidates that remain.
`_score`, `_finish`
    score them in float64, and take the best of each query.

A tile's scores lie in (-1.01, 1.01). Adding 3 brings them into one binade, where the bits of a float grow in equal
steps and compare as integers; the lowest bits of that integer are then given to the candidate's place in its tile, so
that best and candidate are one maximum. `certify` calls the precision lost by this *quantum*.

The tiles of all segments are numbered through: groups of up to `GROUP` query blocks of one segment, within a group
candidate block by candidate block, so that tiles that run at the same time share operands in the L2 cache.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dask_semdedup.search import certify

GROUP = tl.constexpr(8)
"""Query blocks in a group of tiles."""

FEW_SEGMENTS = 16
"""Up to this many offsets, tiles are planned in Python rather than in NumPy."""

FIELDS = tl.constexpr(7)
"""Fields of a group's record."""

KEY_BYTES = 16 << 20
"""Device memory for the best and second best scores of the tiles. Larger searches take several launches, of about 2 ms:
between two of them others get the GPU."""


@dataclass(frozen=True)
class Config:
    """How a tile is computed.

    Attributes
    ----------
    queries, candidates, depth : int
        A tile is `queries` by `candidates`, a multiple of `queries`, and is multiplied `depth` dimensions at a time.
    stages, warps : int
        Tiles of operands under way, and warps of a program.
    keep : int
        Best keys that leave the kernel for each query: all but the last are candidates by name, the last says whether
        there are more. Three pay where a segment has few tiles, so that its second best is often in the best one's.
    """

    queries: int = 128
    candidates: int = 256
    depth: int = 64
    stages: int = 3
    warps: int = 8
    keep: int = 2

    @property
    def quantum(self) -> float:
        """What a score loses to the candidate's place: the steps of floats in [2, 4) are 2**-22."""
        return self.candidates * 2.0**-22


@dataclass(frozen=True)
class Tiling:
    """The tiles of all segments, in the order in which they are computed.

    Attributes
    ----------
    groups : numpy.ndarray
        (g + 1, `FIELDS`) int32: first tile, first row of the segment, rows of the segment, first query block within the
        segment, query blocks in the group, first query block of all, the most candidates of a query. The last record
        closes the list.
    """

    groups: np.ndarray

    @property
    def n_tiles(self) -> int:
        """Tiles in all."""
        return int(self.groups[-1, 0])

    @property
    def n_blocks(self) -> int:
        """Query blocks in all."""
        return int(self.groups[-1, 5])

    def launches(self, most_tiles: int) -> list[tuple[int, int, int, int]]:
        """Cut the groups into runs of at most `most_tiles` tiles, or of one group.

        Returns
        -------
        list of (first tile, last tile + 1, first query block, last query block + 1)
        """
        if self.n_tiles <= most_tiles:
            return [(0, self.n_tiles, 0, self.n_blocks)] if self.n_tiles else []
        first_tiles = self.groups[:, 0]
        cuts = [0]
        while cuts[-1] < len(first_tiles) - 1:
            stop = int(np.searchsorted(first_tiles, first_tiles[cuts[-1]] + most_tiles, side="right")) - 1
            cuts.append(max(stop, cuts[-1] + 1))
        bounds = self.groups[cuts][:, [0, 5]].tolist()
        return [(first[0], stop[0], first[1], stop[1]) for first, stop in pairwise(bounds)]


def tiling(segments: np.ndarray, config: Config, stops: np.ndarray | None = None) -> Tiling:
    """Enumerate the tiles on and below the diagonal of every segment.

    Parameters
    ----------
    segments : numpy.ndarray
        (k + 1,) int64 offsets.
    config : Config
    stops : numpy.ndarray, optional
        (n,) int64, where the candidates of each row end: see `dask_semdedup.search.nearest_earlier`. Query blocks
        before a segment's first query, and candidate blocks behind its last candidate, have no tiles.

    Raises
    ------
    ValueError
        If there are more tiles than an int32 can count.

    Examples
    --------
    Three query blocks of 128 meet 1, 1 and 2 blocks of 256 candidates:

    >>> tiling(np.array([0, 300]), Config(queries=128, candidates=256)).n_tiles
    4
    """
    if len(segments) <= FEW_SEGMENTS and stops is None:
        return Tiling(_as_int32(_groups_of_few(segments.tolist(), config), segments))
    starts, lengths = segments[:-1], segments[1:] - segments[:-1]
    if lengths.min(initial=2) < 2:
        starts, lengths = starts[lengths > 1], lengths[lengths > 1]
    blocks = -(-lengths // config.queries)
    first_block, most = np.zeros_like(blocks), lengths - 1
    if stops is not None and len(starts):
        first_query, most = _queries_and_candidates(starts, stops - np.repeat(segments[:-1], np.diff(segments)))
        first_block = np.where(most > 0, first_query // config.queries, blocks)
    groups = -(-(blocks - first_block) // GROUP.value)
    if (groups != 1).any():
        segment = np.repeat(np.arange(len(groups)), groups)
        before = np.cumsum(groups) - groups
        first_block = first_block[segment] + (np.arange(len(segment)) - before[segment]) * GROUP.value
        starts, lengths, blocks, most = starts[segment], lengths[segment], blocks[segment], most[segment]
    end = np.minimum(first_block + GROUP.value, blocks)
    ratio, most_blocks = config.candidates // config.queries, -(-most // config.candidates)
    tiles = _tiles_below(end, ratio, most_blocks) - _tiles_below(first_block, ratio, most_blocks)
    record = np.zeros((len(blocks) + 1, FIELDS.value), dtype=np.int64)
    for field, values in enumerate((starts, lengths, first_block, end - first_block), start=1):
        record[:-1, field] = values
    record[:-1, 6] = most
    np.cumsum(tiles, out=record[1:, 0])
    np.cumsum(record[:-1, 4], out=record[1:, 5])
    return Tiling(_as_int32(record, segments))


def _as_int32(record: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Groups as the kernels read them."""
    if record[-1, 0] > np.iinfo(np.int32).max:
        raise ValueError(
            f"{record[-1, 0]:,} tiles, of which a search can count {np.iinfo(np.int32).max:,}: its largest segment has "
            f"{np.diff(segments).max():,} rows. Cluster more finely, or search fewer segments at once."
        )
    return record.astype(np.int32)


def _groups_of_few(segments: list[int], config: Config) -> np.ndarray:
    """The groups of a few segments, one after another: a call of NumPy takes as long as one of these groups."""
    records, tile, block = [], 0, 0
    ratio = config.candidates // config.queries
    for start, stop in pairwise(segments):
        length = stop - start
        blocks, most_blocks = -(-length // config.queries), -(-(length - 1) // config.candidates)
        for first in range(0, blocks if length > 1 else 0, GROUP.value):
            end = min(first + GROUP.value, blocks)
            records.append((tile, start, length, first, end - first, block, length - 1))
            tile += _tiles_below(end, ratio, most_blocks) - _tiles_below(first, ratio, most_blocks)
            block += end - first
    return np.array([*records, (tile, 0, 0, 0, 0, block, 0)], dtype=np.int64)


def _queries_and_candidates(starts: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each segment, how many rows stand before the first that has candidates, and the most that one has."""
    most = np.maximum.reduceat(candidates, starts)
    queries = np.flatnonzero(candidates > 0)
    where = np.searchsorted(queries, starts)
    first = np.append(queries, len(candidates))[where] - starts
    return first, most


def _tiles_below(block: Any, ratio: int, most_blocks: Any) -> Any:
    """Tiles of the query blocks before `block` of a segment, where `ratio` of them make a candidate block.

    Block b meets ``b // ratio + 1`` candidate blocks, but none more than `most_blocks`. Of integers, or arrays of them.
    """
    below = block - (block - ratio * most_blocks) * (block > ratio * most_blocks)
    whole = below // ratio
    return (whole + 1) * (2 * below - ratio * whole) // 2 + (block - below) * most_blocks


@triton.jit
def _candidate_blocks(block, length, most, QUERIES: tl.constexpr, CANDIDATES: tl.constexpr):
    """Number of candidate blocks that hold one of the first `most` rows, ranked before the last query of `block`."""
    return tl.cdiv(tl.minimum(tl.minimum((block + 1) * QUERIES, length) - 1, most), CANDIDATES)


@triton.jit
def _place_of_tile(
    tile, length, most, first_block, n_blocks, QUERIES: tl.constexpr, CANDIDATES: tl.constexpr, GROUP: tl.constexpr
):
    """Query block within the group, and candidate block, of a group's tile number `tile`.

    First come the candidate blocks that all members of the group meet, then those of the later members only.
    """
    common = _candidate_blocks(first_block, length, most, QUERIES, CANDIDATES)
    rest = tile - common * n_blocks
    is_common = rest < 0
    member = tl.where(is_common, tile % n_blocks, 0)
    candidate = tl.where(is_common, tile // n_blocks, 0)
    passed = common * 0
    for other in tl.static_range(1, GROUP):
        blocks = _candidate_blocks(first_block + other, length, most, QUERIES, CANDIDATES) - common
        blocks = tl.where(other < n_blocks, blocks, 0)
        is_here = (rest >= passed) & (rest < passed + blocks)
        member = tl.where(is_here, other, member)
        candidate = tl.where(is_here, common + rest - passed, candidate)
        passed += blocks
    return member, candidate


@triton.jit
def _tiles_before(
    member, length, most, first_block, QUERIES: tl.constexpr, CANDIDATES: tl.constexpr, GROUP: tl.constexpr
):
    """Tiles of earlier members of the group beyond the candidate blocks that all of them meet."""
    common = _candidate_blocks(first_block, length, most, QUERIES, CANDIDATES)
    passed = common * 0
    for other in tl.static_range(1, GROUP):
        blocks = _candidate_blocks(first_block + other, length, most, QUERIES, CANDIDATES) - common
        passed += tl.where(other < member, blocks, 0)
    return passed


@triton.jit(do_not_specialize=["n"])
def _halve(
    rows,
    half,
    residual,
    largest,
    scores,
    index,
    count,
    n,
    width,
    stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ANSWERS: tl.constexpr,
):
    """Round unit rows to half precision; the residual of an all-zero row is -1.

    The first programs also answer `ANSWERS` rows each with themselves: more at a time than they round.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_row = (row < n)[:, None]
    x = tl.load(
        rows + row[:, None].to(tl.int64) * width + column[None, :], mask=is_row & (column < width)[None, :], other=0.0
    )
    # Powers of two bring rows of extreme length to where their squares neither overflow nor vanish.
    size = tl.max(tl.abs(x), axis=1)
    x *= tl.where(size < 2.0**-60, 2.0**100, tl.where(size > 2.0**60, 2.0**-100, 1.0))[:, None]
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    x *= tl.where(size > 0, 1.0 / tl.where(size > 0, norm, 1.0), 0.0)[:, None]
    rounded = x.to(half.dtype.element_ty)
    lost = x - rounded.to(tl.float32)
    lost = tl.sqrt(tl.sum(lost * lost, axis=1)) * (1 + 2.0**-16)
    to = half + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(to, rounded, mask=is_row & (column < stride)[None, :])
    tl.store(residual + row, tl.where(size > 0, lost, -1.0), mask=row < n)
    if tl.program_id(0) * ANSWERS < n:
        answer = tl.program_id(0) * ANSWERS + tl.arange(0, ANSWERS)
        tl.store(scores + answer, tl.zeros([ANSWERS], dtype=tl.float32), mask=answer < n)
        tl.store(index + answer, answer.to(tl.int64), mask=answer < n)
        tl.store(count + answer, tl.zeros([ANSWERS], dtype=tl.int32), mask=answer < n)
    # Bits of positive floats are ordered as integers are.
    tl.atomic_max(largest, tl.max(lost, axis=0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _stop(stops, row, mask, HAS_STOPS: tl.constexpr):
    """Where the candidates of a row end: with the row itself, unless it is told otherwise."""
    stop = row
    if HAS_STOPS:
        stop = tl.load(stops + row, mask=mask, other=0)
    return stop


@triton.jit(do_not_specialize=["stride", "first_tile", "n_tiles", "n"])
def _coarse(
    query_rows,
    candidate_rows,
    group_of_tile,
    groups,
    stops,
    keys,
    stride,
    first_tile,
    n_tiles,
    n,
    width,
    QUERIES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_STOPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Best keys of each tile and query, the k-th of them `stride` behind the first; tile `first_tile` comes first."""
    column = tl.arange(0, CANDIDATES)
    # Flattened, the loads of a tile begin while the one before is reduced: for that its body may not branch.
    for number in tl.range(tl.program_id(0), n_tiles, PROGRAMS, flatten=True):
        record = groups + tl.load(group_of_tile + first_tile + number) * FIELDS
        start, length = tl.load(record + 1), tl.load(record + 2)
        first_block, n_blocks = tl.load(record + 3), tl.load(record + 4)
        most = tl.load(record + 6) if HAS_STOPS else length
        tile = first_tile + number - tl.load(record)
        member, candidate_block = _place_of_tile(tile, length, most, first_block, n_blocks, QUERIES, CANDIDATES, GROUP)
        query = (first_block + member) * QUERIES
        candidate = candidate_block * CANDIDATES

        scores = tl.zeros((QUERIES, CANDIDATES), dtype=tl.float32)
        for k in tl.range(0, width, DEPTH):
            x = query_rows.load([start + query, k])
            y = candidate_rows.load([start + candidate, k])
            scores = tl.dot(x, y.T, scores)

        key = (scores + 3.0).to(tl.int32, bitcast=True)
        key = (key & -CANDIDATES) | (CANDIDATES - 1 - column)[None, :]
        row = start + query + tl.arange(0, QUERIES)
        is_earlier = (start + candidate + column)[None, :] < _stop(stops, row, row < n, HAS_STOPS)[:, None]
        key = tl.where(is_earlier, key, 0)
        place = number * QUERIES + tl.arange(0, QUERIES)
        for k in tl.static_range(KEEP):
            top = tl.max(key, axis=1)
            tl.store(keys + k * stride + place, top)
            if k + 1 < KEEP:
                key = tl.where(key == top[:, None], 0, key)


@triton.jit
def _tile_rows(block, common, n_blocks, member, passed):
    """Tile, counted from the group's first, in which a query block of the group meets candidate block `block`."""
    return tl.where(block < common, block * n_blocks + member, common * n_blocks + passed + block - common)


@triton.jit
def _load_keys(keys, tile, lane, here, QUERIES: tl.constexpr):
    """Keys of the tiles in `tile` for the queries in `lane`, 0 where not `here`."""
    return tl.load(keys + tile[:, None] * QUERIES + lane[None, :], mask=here, other=0)


@triton.jit(do_not_specialize=["stride", "most_pairs", "first_tile", "first_block_of_all"])
def _select(
    residual,
    largest,
    group_of_block,
    groups,
    stops,
    keys,
    stride,
    scores,
    index,
    offset,
    count,
    n_pairs,
    pair_query,
    pair_candidate,
    most_pairs,
    first_tile,
    first_block_of_all,
    accumulation,
    QUERIES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
    KEEP: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    EXACT: tl.constexpr,
    RUN: tl.constexpr,
    MOST_PAIRS: tl.constexpr,
    HAS_STOPS: tl.constexpr,
):
    """List the candidates of `PART` queries that the certificate leaves.

    A query's pairs are ``count`` ones from ``offset`` on. The candidate ``-1 - row`` stands for the run of `RUN` rows
    from ``row`` on. Where pairs would be too many, ``count`` is -1 and ``offset`` the first row of the segment.
    """
    block = first_block_of_all + tl.program_id(0) // (QUERIES // PART)
    part = (tl.program_id(0) % (QUERIES // PART)) * PART
    record = groups + tl.load(group_of_block + block) * FIELDS
    start, length = tl.load(record + 1), tl.load(record + 2)
    first_block, n_blocks = tl.load(record + 3), tl.load(record + 4)
    most = tl.load(record + 6) if HAS_STOPS else length
    member = block - tl.load(record + 5)
    query_block = first_block + member
    if query_block * QUERIES + part >= length:
        return
    lane = tl.arange(0, PART)
    step = tl.arange(0, STEP)
    query = query_block * QUERIES + part + lane
    n_candidate_blocks = _candidate_blocks(query_block, length, most, QUERIES, CANDIDATES)
    common = _candidate_blocks(first_block, length, most, QUERIES, CANDIDATES)
    passed = _tiles_before(member, length, most, first_block, QUERIES, CANDIDATES, GROUP)
    keys += (tl.load(record) - first_tile) * QUERIES + part

    top = tl.zeros([PART], dtype=tl.int32)
    for i in range(0, n_candidate_blocks, STEP):
        tile = _tile_rows(i + step, common, n_blocks, member, passed)
        here = (i + step < n_candidate_blocks)[:, None] & (lane >= 0)[None, :]
        top = tl.maximum(top, tl.max(_load_keys(keys, tile, lane, here, QUERIES), axis=0))

    is_row = query < length
    is_row &= _stop(stops, start + query, is_row, HAS_STOPS) > start
    lost = tl.load(residual + start + query, mask=is_row, other=0.0)
    # A zero row is equally similar to every row: the first of its segment is its answer.
    is_zero = lost < 0
    tl.store(index + start + query, tl.zeros([PART], dtype=tl.int64) + start, mask=is_row & is_zero)
    is_query = is_row & (lost >= 0)
    best_score = (top & -CANDIDATES).to(tl.float32, bitcast=True)
    if EXACT:
        # The certificate: see `certify.half_bound`; here scores lose a quantum instead of being rounded for output.
        farthest = tl.load(largest).to(tl.float32, bitcast=True)
        window = 2 * (lost + (1 + lost) * farthest + accumulation) + CANDIDATES * 2.0**-22 + 2.0**-20
        threshold = (best_score - window).to(tl.int32, bitcast=True) & -CANDIDATES
        threshold = tl.where(is_query, threshold, 2147483647)[None, :]
        n = tl.zeros([PART], dtype=tl.int32)
        for i in range(0, n_candidate_blocks, STEP):
            tile = _tile_rows(i + step, common, n_blocks, member, passed)
            here = (i + step < n_candidate_blocks)[:, None] & is_query[None, :]
            is_hit = _load_keys(keys, tile, lane, here, QUERIES) >= threshold
            is_full = is_hit & (_load_keys(keys + (KEEP - 1) * stride, tile, lane, is_hit, QUERIES) >= threshold)
            pairs = tl.where(is_full, CANDIDATES // RUN, is_hit.to(tl.int32))
            if KEEP == 3:
                is_second = _load_keys(keys + stride, tile, lane, is_hit, QUERIES) >= threshold
                pairs += (is_second & (is_full == 0)).to(tl.int32)
            n += tl.sum(pairs, axis=0)

        wanted = tl.where(n <= MOST_PAIRS, n, 0)
        first = tl.atomic_add(n_pairs, tl.sum(wanted, axis=0), sem="relaxed") + tl.cumsum(wanted, axis=0) - wanted
        # Pairs that find no room leave their query to the dense products.
        n = tl.where((first + wanted <= most_pairs) & is_query, wanted, 0)
        tl.store(count + start + query, tl.where(is_query & (n == 0), -1, n), mask=is_row)
        tl.store(offset + start + query, tl.where(n > 0, first, start), mask=is_row)

        for i in range(0, n_candidate_blocks, STEP):
            tile = _tile_rows(i + step, common, n_blocks, member, passed)
            here = (i + step < n_candidate_blocks)[:, None] & (n > 0)[None, :]
            key = _load_keys(keys, tile, lane, here, QUERIES)
            is_hit = here & (key >= threshold)
            is_full = is_hit & (_load_keys(keys + (KEEP - 1) * stride, tile, lane, is_hit, QUERIES) >= threshold)
            pairs = tl.where(is_full, CANDIDATES // RUN, is_hit.to(tl.int32))
            block_start = (start + (i + step) * CANDIDATES)[:, None]
            last = block_start + CANDIDATES - 1
            this_query = (start + query)[None, :] + step[:, None] * 0
            if KEEP == 3:
                next_key = _load_keys(keys + stride, tile, lane, is_hit, QUERIES)
                is_second = (next_key >= threshold) & (is_full == 0)
                pairs += is_second.to(tl.int32)
            slot = first[None, :] + tl.cumsum(pairs, axis=0) - pairs
            row = tl.where(is_full, -1 - block_start, last - (key & (CANDIDATES - 1)))
            tl.store(pair_query + slot, this_query, mask=is_hit)
            tl.store(pair_candidate + slot, row, mask=is_hit)
            if KEEP == 3:
                tl.store(pair_query + slot + 1, this_query, mask=is_second)
                tl.store(pair_candidate + slot + 1, last - (next_key & (CANDIDATES - 1)), mask=is_second)
            if tl.max(tl.max(is_full.to(tl.int32), axis=0), axis=0) > 0:
                for run in range(1, CANDIDATES // RUN):
                    tl.store(pair_query + slot + run, this_query, mask=is_full)
                    tl.store(pair_candidate + slot + run, row - run * RUN, mask=is_full)
            first += tl.sum(pairs, axis=0)
    else:
        candidate = tl.full([PART], 2147483647, dtype=tl.int32)
        for i in range(0, n_candidate_blocks, STEP):
            tile = _tile_rows(i + step, common, n_blocks, member, passed)
            here = (i + step < n_candidate_blocks)[:, None] & is_query[None, :]
            key = _load_keys(keys, tile, lane, here, QUERIES)
            row = (start + (i + step) * CANDIDATES)[:, None] + CANDIDATES - 1 - (key & (CANDIDATES - 1))
            candidate = tl.minimum(candidate, tl.min(tl.where(here & (key == top[None, :]), row, 2147483647), axis=0))
        tl.store(scores + start + query, tl.clamp(best_score - 3.0, -1.0, 1.0), mask=is_query)
        tl.store(index + start + query, candidate.to(tl.int64), mask=is_query)


@triton.jit
def _cosine64(rows, query, candidate, width, WIDTH: tl.constexpr):
    """Float64 cosine similarity of two rows, rounded to a multiple of `certify.TIE`; 0 where a row is zero."""
    column = tl.arange(0, WIDTH)
    xy = tl.full([], 0.0, dtype=tl.float64)
    xx = tl.full([], 0.0, dtype=tl.float64)
    yy = tl.full([], 0.0, dtype=tl.float64)
    for k in range(0, width, WIDTH):
        x = tl.load(rows + query.to(tl.int64) * width + k + column, mask=k + column < width, other=0.0)
        y = tl.load(rows + candidate.to(tl.int64) * width + k + column, mask=k + column < width, other=0.0)
        x, y = x.to(tl.float64), y.to(tl.float64)
        xy += tl.sum(x * y, axis=0)
        xx += tl.sum(x * x, axis=0)
        yy += tl.sum(y * y, axis=0)
    norms = tl.sqrt(xx) * tl.sqrt(yy)
    cosine = tl.where(norms > 0, xy / tl.where(norms > 0, norms, 1.0), 0.0)
    return tl.floor(cosine * 2.0**40 + 0.5) * 2.0**-40


@triton.jit(do_not_specialize=["most_pairs", "n"])
def _score(
    rows,
    n_pairs,
    most_pairs,
    pair_query,
    pair_candidate,
    pair_score,
    stops,
    n,
    width,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_STOPS: tl.constexpr,
):
    """Score the pairs, one warp each; of a run of candidates, find the best."""
    total = tl.minimum(tl.load(n_pairs), most_pairs)
    for pair in range(tl.program_id(0), total, tl.num_programs(0)):
        query = tl.load(pair_query + pair)
        candidate = tl.load(pair_candidate + pair)
        # A run may begin behind the last row, and the last pairs, which found no room, may hold anything.
        is_pair = (query >= 0) & (query < n) & (candidate >= -n) & (candidate < n)
        top = tl.full([], -4.0, dtype=tl.float64)
        if is_pair & (candidate >= 0):
            top = _cosine64(rows, query, candidate, width, WIDTH)
        if is_pair & (candidate < 0):
            first = -1 - candidate
            winner = first
            for i in range(0, tl.minimum(RUN, _stop(stops, query, True, HAS_STOPS) - first)):
                cosine = _cosine64(rows, query, first + i, width, WIDTH)
                winner = tl.where(cosine > top, first + i, winner)
                top = tl.maximum(cosine, top)
            tl.store(pair_candidate + pair, winner)
        tl.store(pair_score + pair, top)


@triton.jit(do_not_specialize=["n"])
def _finish(
    rows,
    offset,
    count,
    pair_candidate,
    pair_score,
    stops,
    scores,
    index,
    n,
    width,
    QUERIES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_STOPS: tl.constexpr,
):
    """Put the best pair of each query; among equals the first candidate.

    Queries whose ``count`` is -1 are multiplied by all rows ranked before them, in float64.
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    n_pairs = tl.load(count + query, mask=query < n, other=0)
    start = tl.load(offset + query, mask=n_pairs != 0, other=2147483647)
    top = tl.full([QUERIES], -4.0, dtype=tl.float64)
    winner = tl.full([QUERIES], 2147483647, dtype=tl.int32)
    for j in range(0, tl.max(n_pairs, axis=0)):
        score = tl.load(pair_score + start + j, mask=j < n_pairs, other=-4.0)
        candidate = tl.load(pair_candidate + start + j, mask=j < n_pairs, other=2147483647)
        is_better = (score > top) | ((score == top) & (candidate < winner))
        winner = tl.where(is_better, candidate, winner)
        top = tl.where(is_better, score, top)

    is_query = n_pairs < 0
    if tl.max(is_query.to(tl.int32), axis=0) > 0:
        start = tl.where(is_query, start, 2147483647)
        stop_of_query = _stop(stops, query, is_query, HAS_STOPS)
        stop = tl.max(tl.where(is_query, stop_of_query, 0), axis=0)
        for first in range(tl.min(start, axis=0), stop, CANDIDATES):
            row = first + tl.arange(0, CANDIDATES)
            xy = tl.zeros([QUERIES, CANDIDATES], dtype=tl.float64)
            xx = tl.zeros([QUERIES], dtype=tl.float64)
            yy = tl.zeros([CANDIDATES], dtype=tl.float64)
            for k in range(0, width, DEPTH):
                column = k + tl.arange(0, DEPTH)
                x = tl.load(
                    rows + query[:, None].to(tl.int64) * width + column[None, :],
                    mask=is_query[:, None] & (column < width)[None, :],
                    other=0.0,
                ).to(tl.float64)
                y = tl.load(
                    rows + row[:, None].to(tl.int64) * width + column[None, :],
                    mask=(row < stop)[:, None] & (column < width)[None, :],
                    other=0.0,
                ).to(tl.float64)
                xx += tl.sum(x * x, axis=1)
                yy += tl.sum(y * y, axis=1)
                xy = tl.dot(x, y.T, xy, out_dtype=tl.float64)
            norms = tl.sqrt(xx)[:, None] * tl.sqrt(yy)[None, :]
            cosine = tl.where(norms > 0, xy / tl.where(norms > 0, norms, 1.0), 0.0)
            cosine = tl.floor(cosine * 2.0**40 + 0.5) * 2.0**-40
            is_earlier = is_query[:, None] & (row[None, :] < stop_of_query[:, None]) & (row[None, :] >= start[:, None])
            cosine = tl.where(is_earlier, cosine, -4.0)
            most = tl.max(cosine, axis=1)
            nearest = tl.min(tl.where(cosine == most[:, None], row[None, :], 2147483647), axis=1)
            winner = tl.where(most > top, nearest, winner)
            top = tl.maximum(most, top)
    tl.store(scores + query, tl.clamp(top.to(tl.float32), -1.0, 1.0), mask=n_pairs != 0)
    tl.store(index + query, winner.to(tl.int64), mask=n_pairs != 0)


def nearest(
    rows: torch.Tensor,
    segments: torch.Tensor,
    scores: torch.Tensor,
    index: torch.Tensor,
    *,
    stops: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    exact: bool = True,
    config: Config | None = None,
    key_bytes: int = KEY_BYTES,
) -> None:
    """Put the answers of all rows. The host does not wait for the device.

    Parameters
    ----------
    rows : torch.Tensor
        (n, d) float32, contiguous, on a CUDA device.
    segments : torch.Tensor
        (k + 1,) int64 offsets, on the CPU.
    scores, index : torch.Tensor
        (n,) float32 and int64, where the answers are put.
    stops : torch.Tensor, optional
        (n,) int64, on the CPU: where the candidates of each row end, if not with the row itself.
    dtype : torch.dtype
        The half precision of the coarse pass.
    exact : bool
        Whether to rescore; if not, the best coarse scores are the answer.
    config : Config, optional
        Sizes of the tiles; chosen from the segments if not given.
    key_bytes : int
        Device memory for the best and second best scores of the tiles.
    """
    offsets = segments.numpy()
    config = config or choose_config(offsets, rows.device)
    tiles = tiling(offsets, config, None if stops is None else stops.numpy())
    launches = tiles.launches(max(1, key_bytes // (4 * config.keep * config.queries)))
    most_tiles = max((stop_tile - first_tile for first_tile, stop_tile, *_ in launches), default=0)
    table = _upload(tiles, stops, rows.device)
    work = Workspace.empty(len(rows), config.keep * most_tiles * config.queries, rows.device)
    part = min(config.queries, 8 if tiles.n_tiles > 16 * tiles.n_blocks else 32)
    is_aligned = rows.data_ptr() % 16 == 0
    launch = _launcher(rows.device, rows.shape[1], is_aligned, dtype, config, part, exact, stops is not None)
    half = halve(launch, rows, dtype, table, work, scores, index)
    for first_tile, stop_tile, first_block, stop_block in launches:
        multiply(launch, half, config, table, first_tile, stop_tile - first_tile, work, most_tiles)
        launch(
            _select,
            (stop_block - first_block) * (config.queries // part),
            work.residual,
            table.largest,
            table.group_of_block,
            table.groups,
            table.stops,
            work.keys,
            most_tiles * config.queries,
            scores,
            index,
            work.offset,
            work.count,
            table.n_pairs,
            work.pair_query,
            work.pair_candidate,
            work.most_pairs,
            first_tile,
            first_block,
            2 * certify.accumulation_bound(rows.shape[1]) + 2 * certify.UNIT_TOLERANCE,
            QUERIES=config.queries,
            CANDIDATES=config.candidates,
            GROUP=GROUP.value,
            FIELDS=FIELDS.value,
            KEEP=config.keep,
            PART=part,
            STEP=KEYS // part,
            EXACT=exact,
            RUN=RUN,
            MOST_PAIRS=MOST_PAIRS,
            HAS_STOPS=table.has_stops,
        )
    if exact and launches:
        rescore(launch, rows, work, table, scores, index)


@dataclass(frozen=True)
class Workspace:
    """What the kernels leave for each other in device memory: one allocation, as each takes the host microseconds.

    Attributes
    ----------
    most_pairs : int
        p, the pairs that there is room for.
    pair_score : torch.Tensor
        (p,) float64.
    residual : torch.Tensor
        (n,) float32 residual norms.
    offset, count : torch.Tensor
        (n,) int32, the pairs of each query that the certificate leaves: `count` of them from `offset` on. `count` is
        -1 for a query that has too many, and `offset` then the first row of its segment.
    pair_query, pair_candidate : torch.Tensor
        (p,) int32 rows.
    keys : torch.Tensor
        Best keys of the tiles: see `_coarse`.
    """

    most_pairs: int
    pair_score: torch.Tensor
    residual: torch.Tensor
    offset: torch.Tensor
    count: torch.Tensor
    pair_query: torch.Tensor
    pair_candidate: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def empty(cls, n: int, n_keys: int, device: torch.device) -> Workspace:
        """Room for `n` queries."""
        room = PAIRS_PER_QUERY * n + PAIRS_AT_LEAST
        per_row = -(-n // 4) * 4  # Each part begins at a multiple of 16 bytes, as memory of its own would.
        sizes = [2 * room, per_row, per_row, per_row, room, room, n_keys]
        score, residual, *others = torch.empty(sum(sizes), dtype=torch.int32, device=device).split_with_sizes(sizes)
        return cls(room, score.view(torch.float64), residual.view(torch.float32), *others)


PAIRS_PER_QUERY = 4
PAIRS_AT_LEAST = 1 << 18

RUN = 8
"""Candidates that are scored one by one where more of a tile reach the threshold than its keys name."""

MOST_PAIRS = 128
"""Past this many pairs and runs a query is left to the dense product."""


def rescore(
    launch: Launcher, rows: torch.Tensor, work: Workspace, table: Table, scores: torch.Tensor, index: torch.Tensor
) -> None:
    """Score the pairs in float64 and put the best of each query; multiply the queries that have too many."""
    n, width = rows.shape
    launch(
        _score,
        32 * _properties(rows.device)["multiprocessor_count"],
        rows,
        table.n_pairs,
        work.most_pairs,
        work.pair_query,
        work.pair_candidate,
        work.pair_score,
        table.stops,
        n,
        width,
        RUN=RUN,
        WIDTH=min(512, triton.next_power_of_2(width)),
        HAS_STOPS=table.has_stops,
        num_warps=1,
    )
    launch(
        _finish,
        triton.cdiv(n, 128),
        rows,
        work.offset,
        work.count,
        work.pair_candidate,
        work.pair_score,
        table.stops,
        scores,
        index,
        n,
        width,
        QUERIES=128,
        CANDIDATES=32,
        DEPTH=16,
        HAS_STOPS=table.has_stops,
    )


KEYS = 512
"""Keys that one program of `_select` looks at together: few queries where each has many, and more where not."""


def choose_config(segments: np.ndarray, device: torch.device) -> Config:
    """Large tiles where segments fill them and the device has shared memory for them, else smaller ones.

    Measured on an H200: 128 by 256 is the faster from clusters of about 4,000 rows on. A third key costs 7% of the
    coarse pass and saves most of what is scored after it, which is the more up to clusters of about 32,000 rows.
    """
    if _properties(device)["max_shared_mem"] < 160_000:
        return Config(queries=128, candidates=128, depth=32, stages=3, warps=4, keep=3)
    # Of the cluster that a row is in.
    if len(segments) <= FEW_SEGMENTS:
        squares: float = sum((stop - start) ** 2 for start, stop in pairwise(segments.tolist()))
    else:
        lengths = (segments[1:] - segments[:-1]).astype(np.float64)
        squares = lengths @ lengths
    typical = squares / max(1, segments[-1])
    if typical < 4096:
        return Config(queries=128, candidates=128, depth=64, stages=3, warps=4, keep=3)
    return Config(keep=3 if typical < 32_768 else 2)


@cache
def _properties(device: torch.device) -> dict[str, int]:
    """What the driver says of a device; of a CPU, for Triton's interpreter, something small."""
    if device.type != "cuda":
        return {"multiprocessor_count": 2, "max_shared_mem": 1 << 20}
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)


def halve(
    launch: Launcher,
    rows: torch.Tensor,
    dtype: torch.dtype,
    table: Table,
    work: Workspace,
    scores: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """Half-precision unit rows; their residuals and the largest of these are put into `work` and `table`.

    The answers become those of rows without candidates.
    """
    n, width = rows.shape
    stride = -(-width // 8) * 8  # The copy engine wants rows of whole 16 bytes.
    half = torch.empty(n, stride, dtype=dtype, device=rows.device)
    padded = triton.next_power_of_2(stride)
    in_program = max(1, 4096 // padded)
    launch(
        _halve,
        triton.cdiv(n, in_program),
        rows,
        half,
        work.residual,
        table.largest,
        scores,
        index,
        work.count,
        n,
        width,
        stride,
        ROWS=in_program,
        WIDTH=padded,
        ANSWERS=1024,
    )
    return half


def multiply(
    launch: Launcher,
    half: torch.Tensor,
    config: Config,
    table: Table,
    first_tile: int,
    n_tiles: int,
    work: Workspace,
    most_tiles: int,
) -> None:
    """Launch the coarse pass over `n_tiles` tiles; `work` has room for the keys of `most_tiles`."""
    # Programs of four warps run two at a time on a multiprocessor, those of eight alone. Their number is compiled in:
    # so it does not depend on that of the tiles.
    programs = 8 // config.warps * _properties(half.device)["multiprocessor_count"]
    launch(
        _coarse,
        programs,
        TensorDescriptor.from_tensor(half, [config.queries, config.depth]),
        TensorDescriptor.from_tensor(half, [config.candidates, config.depth]),
        table.group_of_tile,
        table.groups,
        table.stops,
        work.keys,
        most_tiles * config.queries,
        first_tile,
        n_tiles,
        *half.shape,
        QUERIES=config.queries,
        CANDIDATES=config.candidates,
        DEPTH=config.depth,
        GROUP=GROUP.value,
        FIELDS=FIELDS.value,
        KEEP=config.keep,
        HAS_STOPS=table.has_stops,
        PROGRAMS=programs,
        num_warps=config.warps,
        num_stages=config.stages,
    )


class Launcher:
    """Launches kernels: from the second time on past Triton's look at each argument, which takes longer than most run.

    There is one for each way in which Triton would compile them: see `_launcher`. Apart from the rows, all tensors are
    allocated here, and so aligned; apart from the width, all numbers are marked `do_not_specialize`.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
    ) -> None:
        """Launch `kernel` on the current stream."""
        compiled = self._compiled.get(kernel)
        if compiled is None:
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled = kernel[(programs,)](*arguments, **constants, **options)
            if isinstance(kernel, triton.runtime.JITFunction):
                self._compiled[kernel] = compiled
            return
        # Of a pointer as a number, Triton does not ask the driver whether it is one.
        plain = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
        compiled[(programs, 1, 1)](*plain, *constants.values())


@cache
def _launcher(*traits: Any) -> Launcher:
    """The launcher for all that the compiled kernels depend on: device, width and alignment of the rows, constants."""
    return Launcher()


class _Staging(threading.local):
    """Pinned memory through which each thread sends its tables: pinning anew would cost more than the search."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.int32)
        self.host = self.buffer.numpy()
        self.sent: torch.cuda.Event | None = None
        self.device: torch.device | None = None

    def send(self, parts: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
        """Copy int32 arrays to the device behind one another; the host waits only for the copy before this one."""
        # Each part begins at a multiple of 16 bytes, as memory of its own would.
        sizes = [-(-part.size // 4) * 4 for part in parts]
        if self.sent is not None:
            self.sent.synchronize()
        if self.host.size < sum(sizes):
            self.buffer = torch.empty(2 * sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
            self.host = self.buffer.numpy()
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            self.host[start : start + part.size] = part
            start += size
        sent = self.buffer[:start].to(device, non_blocking=True, copy=True)
        if device.type == "cuda":
            if self.sent is None or self.device != device:  # An event is of one device.
                self.sent, self.device = torch.cuda.Event(), device
            self.sent.record()
        return list(sent.split_with_sizes(sizes))


@dataclass(frozen=True)
class Table:
    """What the kernels look up, in device memory.

    Attributes
    ----------
    largest, n_pairs : torch.Tensor
        (1,) int32 zeros, to be raised: the bits of the largest residual norm, and the pairs listed so far.
    groups : torch.Tensor
        (g + 1, `FIELDS`) int32, flat: see `Tiling`.
    group_of_tile, group_of_block : torch.Tensor
        (tiles,) and (query blocks,) int32.
    stops : torch.Tensor
        (n,) int32 where the candidates of each row end; empty where they end with the row itself.
    """

    largest: torch.Tensor
    n_pairs: torch.Tensor
    groups: torch.Tensor
    group_of_tile: torch.Tensor
    group_of_block: torch.Tensor
    stops: torch.Tensor

    @property
    def has_stops(self) -> bool:
        """Whether rows have ends of their own."""
        return self.stops.numel() > 0


ZERO = np.zeros(1, np.int32)
NO_STOPS = np.zeros(0, np.int32)


def _upload(tiles: Tiling, stops: torch.Tensor | None, device: torch.device) -> Table:
    """Send all of it in one copy."""
    groups = tiles.groups
    of_group = np.arange(len(groups) - 1, dtype=np.int32)
    of_tile, of_block = (np.repeat(of_group, groups[1:, field] - groups[:-1, field]) for field in (0, 5))
    ends = NO_STOPS if stops is None else stops.numpy().astype(np.int32)
    return Table(*_staging.send([ZERO, ZERO, groups.ravel(), of_tile, of_block, ends], device))


_staging = _Staging()
