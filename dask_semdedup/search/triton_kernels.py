"""Triton kernels of the exact search, in the order of their launch.

`halve_kernel`
    rounds the unit rows to half precision, measures what the rounding lost, and makes each row its own answer at first.
`coarse_kernel`
    multiplies tiles of queries by tiles of the candidates ranked before them. Only the two or three best scores of each
    tile and query, with their candidates, leave the kernel; the rest never reach memory.
`select_kernel`
    holds those against the certificate and lists the candidates that remain.
`score_kernel`, `finish_kernel`
    score these in float64, and take the best of each query.
`dense_kernel`
    multiplies the queries that have too many candidates left, in float64.

A tile's scores lie in (-1.01, 1.01). Adding 3 brings them into one binade, where the bits of floats grow in equal steps
and compare as integers. The lowest bits of that integer, the *key*, are then replaced by the candidate's position in
its tile, so that a single maximum finds both the best score and its candidate. The precision that this costs is the
*quantum* (`Config.quantum`); the certificate in `select_kernel` allows for it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _candidate_blocks(block, length, most, QUERIES: tl.constexpr, CANDIDATES: tl.constexpr):
    """Return the number of candidate blocks with any of the first `most` rows before the last query of `block`."""
    return tl.cdiv(tl.minimum(tl.minimum((block + 1) * QUERIES, length) - 1, most), CANDIDATES)


@triton.jit
def _position_of_tile(
    tile, length, most, first_block, n_blocks, QUERIES: tl.constexpr, CANDIDATES: tl.constexpr, GROUP: tl.constexpr
):
    """Return the query block within the group, and the candidate block, of tile number `tile` of a group.

    Candidate blocks that all members of the group meet come first, then those that only later members meet.
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
    """Return the number of tiles of the group's earlier members beyond the candidate blocks that all members meet."""
    common = _candidate_blocks(first_block, length, most, QUERIES, CANDIDATES)
    passed = common * 0
    for other in tl.static_range(1, GROUP):
        blocks = _candidate_blocks(first_block + other, length, most, QUERIES, CANDIDATES) - common
        passed += tl.where(other < member, blocks, 0)
    return passed


@triton.jit(do_not_specialize=["n"])
def halve_kernel(
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
    """Round unit rows to half precision and measure the residuals; that of an all-zero row is -1.

    The first programs also initialize the answers of `ANSWERS` rows each, which are more than they round, to the rows
    themselves.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_row = (row < n)[:, None]
    x = tl.load(
        rows + row[:, None].to(tl.int64) * width + column[None, :], mask=is_row & (column < width)[None, :], other=0.0
    )
    # Powers of two scale rows of extreme length so that their squares neither overflow nor vanish.
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
    # The bits of positive floats are ordered like integers.
    tl.atomic_max(largest, tl.max(lost, axis=0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _stop(stops, row, mask, HAS_STOPS: tl.constexpr):
    """Return the end of a row's candidates: the row itself unless there are `stops`."""
    stop = row
    if HAS_STOPS:
        stop = tl.load(stops + row, mask=mask, other=0)
    return stop


@triton.jit(do_not_specialize=["stride", "first_tile", "n_tiles", "n"])
def coarse_kernel(
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
    """Write the best keys of each tile and query, from tile `first_tile` on; each next best is `stride` further on."""
    column = tl.arange(0, CANDIDATES)
    # Flattening lets the loads of a tile begin while the one before is reduced; the body must not branch for that.
    for number in tl.range(tl.program_id(0), n_tiles, PROGRAMS, flatten=True):
        record = groups + tl.load(group_of_tile + first_tile + number) * FIELDS
        start, length = tl.load(record + 1), tl.load(record + 2)
        first_block, n_blocks = tl.load(record + 3), tl.load(record + 4)
        most = tl.load(record + 6) if HAS_STOPS else length
        tile = first_tile + number - tl.load(record)
        member, candidate_block = _position_of_tile(
            tile, length, most, first_block, n_blocks, QUERIES, CANDIDATES, GROUP
        )
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
        slot = number * QUERIES + tl.arange(0, QUERIES)
        for k in tl.static_range(KEEP):
            top = tl.max(key, axis=1)
            tl.store(keys + k * stride + slot, top)
            if k + 1 < KEEP:
                key = tl.where(key == top[:, None], 0, key)


@triton.jit
def _tile_rows(block, common, n_blocks, member, passed):
    """Return the tile, counted from the group's first, where its query block `member` meets candidate block `block`."""
    return tl.where(block < common, block * n_blocks + member, common * n_blocks + passed + block - common)


@triton.jit
def _load_keys(keys, tile, lane, here, QUERIES: tl.constexpr):
    """Return the keys of the tiles in `tile` for the queries in `lane`, 0 outside of the mask `here`."""
    return tl.load(keys + tile[:, None] * QUERIES + lane[None, :], mask=here, other=0)


@triton.jit(do_not_specialize=["stride", "capacity", "first_tile", "first_block_of_all"])
def select_kernel(
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
    crowded,
    n_crowded,
    n_pairs,
    pair_query,
    pair_candidate,
    capacity,
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
    MAX_PAIRS: tl.constexpr,
    HAS_STOPS: tl.constexpr,
):
    """List the candidates of `PART` queries that the certificate leaves.

    Each query has ``count`` pairs, starting at ``offset``. The candidate ``-1 - row`` denotes the run of `RUN` rows
    that starts at ``row``. A query with too many pairs is listed in ``crowded``; its ``count`` is 0, and its ``offset``
    the first row of the segment.
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
    # A zero row is equally similar to every row: its answer is the first of its segment.
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

        wanted = tl.where(n <= MAX_PAIRS, n, 0)
        first = tl.atomic_add(n_pairs, tl.sum(wanted, axis=0), sem="relaxed") + tl.cumsum(wanted, axis=0) - wanted
        # A query whose pairs find no room is left to the dense products.
        n = tl.where((first + wanted <= capacity) & is_query, wanted, 0)
        is_crowded = is_query & (n == 0)
        n_here = tl.sum(is_crowded.to(tl.int32), axis=0)
        place = tl.atomic_add(n_crowded, n_here, sem="relaxed") + tl.cumsum(is_crowded.to(tl.int32), axis=0) - 1
        tl.store(crowded + place, start + query, mask=is_crowded)
        tl.store(count + start + query, n, mask=is_row)
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
    """Return the float64 cosine similarity of two rows, rounded to a multiple of `certify.TIE`; 0 if a row is zero."""
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


@triton.jit(do_not_specialize=["capacity", "n"])
def score_kernel(
    rows,
    n_pairs,
    capacity,
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
    """Score the pairs, one warp each; replace a run by its best candidate."""
    total = tl.minimum(tl.load(n_pairs), capacity)
    for pair in range(tl.program_id(0), total, tl.num_programs(0)):
        query = tl.load(pair_query + pair)
        candidate = tl.load(pair_candidate + pair)
        # A run may begin after the last row, and the last pairs are uninitialized if some found no room.
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
def finish_kernel(offset, count, pair_candidate, pair_score, scores, index, n, QUERIES: tl.constexpr):
    """Write the best candidate of each query that has pairs, the first among equals."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    n_pairs = tl.load(count + query, mask=query < n, other=0)
    start = tl.load(offset + query, mask=n_pairs > 0, other=0)
    top = tl.full([QUERIES], -4.0, dtype=tl.float64)
    winner = tl.full([QUERIES], 2147483647, dtype=tl.int32)
    for j in range(0, tl.max(n_pairs, axis=0)):
        score = tl.load(pair_score + start + j, mask=j < n_pairs, other=-4.0)
        candidate = tl.load(pair_candidate + start + j, mask=j < n_pairs, other=2147483647)
        is_better = (score > top) | ((score == top) & (candidate < winner))
        winner = tl.where(is_better, candidate, winner)
        top = tl.where(is_better, score, top)
    tl.store(scores + query, tl.clamp(top.to(tl.float32), -1.0, 1.0), mask=n_pairs > 0)
    tl.store(index + query, winner.to(tl.int64), mask=n_pairs > 0)


@triton.jit
def dense_kernel(
    rows,
    offset,
    crowded,
    n_crowded,
    stops,
    scores,
    index,
    width,
    QUERIES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_STOPS: tl.constexpr,
):
    """Write the answers of crowded queries, which are multiplied by all rows ranked before them, in float64."""
    lane = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    n = tl.load(n_crowded)
    if tl.program_id(0) * QUERIES >= n:
        return
    is_query = lane < n
    query = tl.load(crowded + lane, mask=is_query, other=0)
    start = tl.load(offset + query, mask=is_query, other=2147483647)
    top = tl.full([QUERIES], -4.0, dtype=tl.float64)
    winner = tl.full([QUERIES], 2147483647, dtype=tl.int32)
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
    tl.store(scores + query, tl.clamp(top.to(tl.float32), -1.0, 1.0), mask=is_query)
    tl.store(index + query, winner.to(tl.int64), mask=is_query)
