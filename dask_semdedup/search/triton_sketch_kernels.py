"""Triton kernels of the search by sketches, in the order of their launch.

`sketch_kernel`
    rotates rows to the basis and rounds their sketches to int8.
`filter_kernel`
    multiplies sketches. A bit for each query and *run* of candidates says whether one of them reaches the threshold:
    nothing else leaves the kernel.
`list_kernel`
    turns the bits into a list of hits, a query and a run each, those of a query side by side.
`verify_kernel`
    multiplies the sketches of each hit again, and scores in float64 the candidates that reach the threshold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dask_semdedup.search.triton_kernels import _cosine64, _stop


@triton.jit(do_not_specialize=["n", "tail"])
def sketch_kernel(
    rows,
    axes,
    sketch,
    residual,
    largest,
    scores,
    index,
    count,
    n,
    width,
    tail,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Write sketches, what rounding lost (-1 for an all-zero row), and answers as of rows without candidates."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    is_row = row < n
    scale = tl.full([ROWS], 1.0, dtype=tl.float32)
    square, size, product = _rotated(rows, axes, row, is_row, scale, width, ROWS, DEPTH, PADDED)
    # Powers of two scale rows of extreme length so that their squares neither overflow nor vanish.
    if (tl.max(size, axis=0) > 2.0**40) | (tl.min(tl.where(size > 0, size, 1.0), axis=0) < 2.0**-40):
        scale = tl.where(size < 2.0**-40, 2.0**90, tl.where(size > 2.0**40, 2.0**-80, 1.0))
        square, size, product = _rotated(rows, axes, row, is_row, scale, width, ROWS, DEPTH, PADDED)
    norm = tl.sqrt(square)
    product *= tl.where(size > 0, 1.0 / tl.where(size > 0, norm, 1.0), 0.0)[:, None]
    rest = tl.sqrt(tl.maximum(1.0 - tl.sum(product * product, axis=1), 0.0) + tail)
    value = tl.where((column == SIZE - 1)[None, :], rest[:, None], product)
    value = tl.where((size > 0)[:, None] & (column < SIZE)[None, :], value, 0.0)
    rounded = tl.minimum(tl.maximum(tl.floor(value * SCALE + 0.5), -SCALE), SCALE)
    lost = value - rounded * (1.0 / SCALE)
    # A sketch is no longer than 1 + tail: what rounding loses of one is multiplied by the length of the other.
    lost = tl.sqrt(tl.sum(lost * lost, axis=1)) * (1 + 2 * tail)
    to = sketch + row[:, None].to(tl.int64) * SIZE + column[None, :]
    tl.store(to, rounded.to(tl.int8), mask=is_row[:, None] & (column < SIZE)[None, :])
    tl.store(residual + row, tl.where(size > 0, lost, -1.0), mask=is_row)
    tl.store(scores + row, tl.zeros([ROWS], dtype=tl.float32), mask=is_row)
    tl.store(index + row, row.to(tl.int64), mask=is_row)
    tl.store(count + row, tl.zeros([ROWS], dtype=tl.int32), mask=is_row)
    # The bits of positive floats are ordered like integers.
    tl.atomic_max(largest.to(tl.pointer_type(tl.int32)), tl.max(lost, axis=0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _rotated(rows, axes, row, is_row, scale, width, ROWS: tl.constexpr, DEPTH: tl.constexpr, PADDED: tl.constexpr):
    """Return the squared lengths of rows times `scale`, their largest elements before that, and their coordinates."""
    depth, column = tl.arange(0, DEPTH), tl.arange(0, PADDED)
    square = tl.zeros([ROWS], dtype=tl.float32)
    size = tl.zeros([ROWS], dtype=tl.float32)
    product = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    from_row = rows + row[:, None].to(tl.int64) * width
    for k in range(0, width, DEPTH):
        inside = k + depth < width
        x = tl.load(from_row + (k + depth)[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
        axis = tl.load(axes + (k + depth)[:, None] * PADDED + column[None, :], mask=inside[:, None], other=0.0)
        size = tl.maximum(size, tl.max(tl.abs(x), axis=1))
        x *= scale[:, None]
        square += tl.sum(x * x, axis=1)
        product = tl.dot(x, axis, product, input_precision="tf32")
    return square, size, product


@triton.jit
def _least(residual, largest, floor, SCALE: tl.constexpr):
    """Return the smallest product of int8 sketches at which a query can reach what is asked for: see `sketch.floor`."""
    bound = residual + (1 + residual) * largest
    least = tl.floor((floor - bound * (1 + 2.0**-10)) * (SCALE * SCALE)).to(tl.int32)
    return tl.where(residual >= 0, least, 2147483647)


@triton.jit
def _sketch(which, row, mask, ALL: tl.constexpr):
    """Return the sketch of a query: its own number if queries are all sketches."""
    sketch = row
    if not ALL:
        sketch = tl.load(which + row, mask=mask, other=0)
    return sketch


@triton.jit
def _reached(
    queries,
    x,
    candidates,
    first,
    stop,
    least,
    bits,
    tile,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    CANDIDATES: tl.constexpr,
    RUN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return `bits` with those of a tile's runs in which a candidate reaches the query's threshold.

    `x` are the first `DEPTH` numbers of the sketches at `queries`, which are all that there are if that is `SIZE`.
    """
    candidate = first + tile * CANDIDATES + tl.arange(0, CANDIDATES)
    from_candidate = candidates + candidate[:, None].to(tl.int64) * SIZE + tl.arange(0, DEPTH)[None, :]
    product = tl.dot(x, tl.load(from_candidate).T, out_dtype=tl.int32)
    for k in tl.static_range(DEPTH, SIZE, DEPTH):
        product = tl.dot(tl.load(queries + k), tl.load(from_candidate + k).T, product, out_dtype=tl.int32)
    if MASKED:
        product = tl.where(candidate[None, :] < stop[:, None], product, 0)
    RUNS: tl.constexpr = CANDIDATES // RUN
    best = tl.max(tl.reshape(product, [x.shape[0], RUNS, RUN]), axis=2)
    bit = (tile % (32 // RUNS)) * RUNS + tl.arange(0, RUNS)
    return bits | tl.sum((best >= least[:, None]).to(tl.int32) << bit[None, :], axis=1)


@triton.jit(do_not_specialize=["floor", "first_block", "n_blocks", "first_word"])
def filter_kernel(
    queries,
    which,
    candidates,
    residual,
    largest,
    stops,
    blocks,
    words,
    floor,
    first_block,
    n_blocks,
    first_word,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    RUN: tl.constexpr,
    CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_STOPS: tl.constexpr,
    ALL: tl.constexpr,
):
    """Write the bits of a block of queries and a chunk of `CHUNK` tiles of candidates.

    Queries are `ALL` the sketches in order, or those that `which` names.
    """
    # Programs that run at the same time share the chunk's sketches in the L2 cache.
    block = first_block + tl.program_id(0) % n_blocks
    begin = (tl.program_id(0) // n_blocks) * CHUNK
    record = blocks + block * FIELDS
    query, end, first = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    full, tiles, word = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
    if begin >= tiles:
        return
    lane = tl.arange(0, QUERIES)
    row = query + lane
    # A whole sketch, or as much as a power of two divides.
    DEPTH: tl.constexpr = SIZE & -SIZE
    sketch = _sketch(which, row, row < end, ALL)
    from_query = queries + sketch[:, None].to(tl.int64) * SIZE + tl.arange(0, DEPTH)[None, :]
    x = tl.load(from_query)
    farthest = tl.load(largest.to(tl.pointer_type(tl.int32))).to(tl.float32, bitcast=True)
    least = _least(tl.load(residual + sketch, mask=row < end, other=-1.0), farthest, floor, SCALE)
    stop = _stop(stops, row, row < end, HAS_STOPS)
    IN_WORD: tl.constexpr = 32 * RUN // CANDIDATES
    to = words + (word - first_word).to(tl.int64) * QUERIES + lane
    bits = tl.zeros([QUERIES], dtype=tl.int32)
    last = tl.minimum(begin + CHUNK, tiles)
    middle = tl.minimum(last, tl.maximum(begin, full))
    for tile in range(begin, middle):
        bits = _reached(from_query, x, candidates, first, stop, least, bits, tile, SIZE, DEPTH, CANDIDATES, RUN, False)
        is_last = tile % IN_WORD == IN_WORD - 1
        tl.store(to + (tile // IN_WORD) * QUERIES, bits, mask=(lane >= 0) & is_last)
        bits = tl.where(is_last, 0, bits)
    for tile in range(middle, last):
        bits = _reached(from_query, x, candidates, first, stop, least, bits, tile, SIZE, DEPTH, CANDIDATES, RUN, True)
        is_last = tile % IN_WORD == IN_WORD - 1
        tl.store(to + (tile // IN_WORD) * QUERIES, bits, mask=(lane >= 0) & is_last)
        bits = tl.where(is_last, 0, bits)
    tl.store(to + ((last - 1) // IN_WORD) * QUERIES, bits, mask=(lane >= 0) & (last % IN_WORD != 0))


@triton.jit
def _bit_count(word):
    """Return the number of bits that are set in int32 words."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word += word >> 8
    return (word + (word >> 16)) & 0x3F


@triton.jit(do_not_specialize=["first_block", "first_word", "capacity"])
def list_kernel(
    blocks,
    words,
    count,
    offset,
    n_hits,
    hit_query,
    hit_run,
    capacity,
    first_block,
    first_word,
    QUERIES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    RUN: tl.constexpr,
    FIELDS: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    MAX_HITS: tl.constexpr,
):
    """List the hits of `PART` queries; a query with more than `MAX_HITS`, or for which there is no room, counts -1."""
    block = first_block + tl.program_id(0) // (QUERIES // PART)
    part = (tl.program_id(0) % (QUERIES // PART)) * PART
    record = blocks + block * FIELDS
    query, end, start = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    tiles, word = tl.load(record + 4), tl.load(record + 5)
    n_words = tl.cdiv(tiles * (CANDIDATES // RUN), 32)
    if query + part >= end:
        return
    lane = tl.arange(0, PART)
    step = tl.arange(0, STEP)
    row = query + part + lane
    here = words + (word - first_word).to(tl.int64) * QUERIES + part
    n = tl.zeros([PART], dtype=tl.int32)
    for i in range(0, n_words, STEP):
        bits = tl.load(
            here + (i + step)[:, None].to(tl.int64) * QUERIES + lane[None, :],
            mask=(i + step < n_words)[:, None],
            other=0,
        )
        n += tl.sum(_bit_count(bits), axis=0)
    wanted = tl.where((n <= MAX_HITS) & (row < end), n, 0)
    before = tl.atomic_add(n_hits, tl.sum(wanted, axis=0).to(tl.int64), sem="relaxed")
    slot = before + tl.cumsum(wanted, axis=0) - wanted
    listed = tl.where(slot + wanted <= capacity, wanted, 0)
    tl.store(count + row, tl.where(listed < n, -1, n), mask=row < end)
    tl.store(offset + row, tl.where(listed > 0, slot, 0).to(tl.int32), mask=row < end)
    if tl.max(listed, axis=0) > 0:
        for i in range(0, n_words, STEP):
            bits = tl.load(
                here + (i + step)[:, None].to(tl.int64) * QUERIES + lane[None, :],
                mask=(i + step < n_words)[:, None] & (listed > 0)[None, :],
                other=0,
            )
            hits = _bit_count(bits)
            to = slot[None, :] + tl.cumsum(hits, axis=0) - hits
            while tl.max(tl.max((bits != 0).to(tl.int32), axis=0), axis=0) > 0:
                run = (i + step)[:, None] * 32 + _bit_count((bits & -bits) - 1)
                tl.store(hit_query + to, row[None, :] + step[:, None] * 0, mask=bits != 0)
                tl.store(hit_run + to, start + run * RUN, mask=bits != 0)
                to += 1
                bits = bits & (bits - 1)
            slot += tl.sum(hits, axis=0)


@triton.jit
def _left(
    queries,
    which,
    candidates,
    residual,
    farthest,
    stops,
    query,
    first,
    floor,
    n,
    n_candidates,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    RUN: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_STOPS: tl.constexpr,
    ALL: tl.constexpr,
):
    """Return the candidates of a hit, and which of them reach the threshold."""
    depth = tl.arange(0, PADDED)
    # The last hits are uninitialized if some found no room.
    is_hit = (query >= 0) & (query < n) & (first >= 0) & (first < n_candidates)
    stop = _stop(stops, query, is_hit, HAS_STOPS)
    own = _sketch(which, query, is_hit, ALL)
    least = _least(tl.load(residual + own, mask=is_hit, other=-1.0), farthest, floor, SCALE)
    candidate = first + tl.arange(0, RUN)
    is_earlier = is_hit & (candidate < stop)
    x = tl.load(queries + own.to(tl.int64) * SIZE + depth, mask=is_hit & (depth < SIZE), other=0).to(tl.int32)
    y = tl.load(
        candidates + candidate[:, None].to(tl.int64) * SIZE + depth[None, :],
        mask=is_earlier[:, None] & (depth < SIZE)[None, :],
        other=0,
    ).to(tl.int32)
    return candidate, is_earlier & (tl.sum(x[None, :] * y, axis=1) >= least)


@triton.jit(do_not_specialize=["capacity", "floor", "n"])
def verify_kernel(
    rows,
    sketch,
    residual,
    largest,
    stops,
    count,
    n_hits,
    hit_query,
    hit_run,
    hit_score,
    capacity,
    floor,
    n,
    width,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    MAX_IN_RUN: tl.constexpr,
    HAS_STOPS: tl.constexpr,
):
    """Replace the run of each hit by its best candidate, the first among equals, and write its score; -4 for none.

    A query that has a run with more than `MAX_IN_RUN` candidates to score counts -1.
    """
    farthest = tl.load(largest.to(tl.pointer_type(tl.int32))).to(tl.float32, bitcast=True)
    total = tl.minimum(tl.load(n_hits), capacity)
    for hit in range(tl.program_id(0), total, tl.num_programs(0)):
        query = tl.load(hit_query + hit)
        first = tl.load(hit_run + hit)
        candidate, left = _left(
            sketch,
            sketch,
            sketch,
            residual,
            farthest,
            stops,
            query,
            first,
            floor,
            n,
            n,
            SIZE,
            PADDED,
            RUN,
            SCALE,
            HAS_STOPS,
            True,
        )
        top = tl.full([], -4.0, dtype=tl.float64)
        winner = tl.full([], 2147483647, dtype=tl.int32)
        n_left = tl.sum(left.to(tl.int32), axis=0)
        if n_left > MAX_IN_RUN:
            tl.store(count + query, -1)
            n_left = 0
        for _ in range(0, n_left):
            next_one = tl.min(tl.where(left, candidate, 2147483647), axis=0)
            cosine = _cosine64(rows, query, next_one, width, WIDTH)
            winner = tl.where(cosine > top, next_one, winner)
            top = tl.maximum(cosine, top)
            left &= candidate != next_one
        tl.store(hit_score + hit, top)
        tl.store(hit_run + hit, winner)
