"""Triton kernels that list pairs of near sketches, beside those of `triton_sketch_kernels`, in the order of launch.

`visit_kernel`
    finds the cells that sketches visit.
`count_kernel`, `pair_kernel`
    multiply the sketches of each hit again, and count and list the candidates that reach the threshold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dask_semdedup.search.triton_sketch_kernels import _left


@triton.jit(do_not_specialize=["n_cells", "n_rows"])
def visit_kernel(
    sketches,
    homes,
    least,
    centroids,
    half_norms,
    limits,
    visits,
    n_cells,
    n_rows,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    CELLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write whether each of `n_cells` cells is visited by each sketch: see `cells.Cells.limits`.

    `homes` are the cells that sketches belong to, and `least` the halves of the squared distances to their centroids,
    less those of the squared lengths of the sketches.
    """
    blocks = tl.cdiv(n_cells, CELLS)
    cell = (tl.program_id(0) % blocks) * CELLS + tl.arange(0, CELLS)
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    is_cell, is_row = cell < n_cells, row < n_rows
    product = tl.zeros([ROWS, CELLS], dtype=tl.float32)
    for start in tl.static_range(0, SIZE, DEPTH):
        x = tl.load(
            sketches + row[:, None].to(tl.int64) * SIZE + (start + depth)[None, :], mask=is_row[:, None], other=0.0
        )
        y = tl.load(centroids + cell[:, None] * SIZE + (start + depth)[None, :], mask=is_cell[:, None], other=0.0)
        product = tl.dot(x, y.T, product, input_precision="tf32x3")
    farther = tl.load(half_norms + cell, mask=is_cell, other=0.0)[None, :] - product
    farther -= tl.load(least + row, mask=is_row, other=0.0)[:, None]
    home = tl.load(homes + row, mask=is_row, other=0)
    both = is_row[:, None] & is_cell[None, :]
    limit = tl.load(limits + home[:, None].to(tl.int64) * n_cells + cell[None, :], mask=both, other=0.0)
    to = visits + cell[:, None].to(tl.int64) * n_rows + row[None, :]
    tl.store(to, (farther <= limit).to(tl.int8).T, mask=is_cell[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["floor", "n_hits", "n", "n_candidates"])
def count_kernel(
    queries,
    which,
    candidates,
    residual,
    largest,
    stops,
    hit_query,
    hit_run,
    count,
    floor,
    n_hits,
    n,
    n_candidates,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    RUN: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Write how many candidates of each hit reach the threshold."""
    farthest = tl.load(largest.to(tl.pointer_type(tl.int32))).to(tl.float32, bitcast=True)
    for hit in range(tl.program_id(0), n_hits, tl.num_programs(0)):
        query, first = tl.load(hit_query + hit), tl.load(hit_run + hit)
        _, left = _left(
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
            SIZE,
            PADDED,
            RUN,
            SCALE,
            True,
            False,
        )
        tl.store(count + hit, tl.sum(left.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["floor", "n_hits", "n", "n_candidates"])
def pair_kernel(
    queries,
    which,
    candidates,
    residual,
    largest,
    stops,
    hit_query,
    hit_run,
    offset,
    pair_candidate,
    pair_query,
    floor,
    n_hits,
    n,
    n_candidates,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    RUN: tl.constexpr,
    SCALE: tl.constexpr,
):
    """List these candidates, and the query beside each, from the hit's offset on."""
    farthest = tl.load(largest.to(tl.pointer_type(tl.int32))).to(tl.float32, bitcast=True)
    for hit in range(tl.program_id(0), n_hits, tl.num_programs(0)):
        query, first = tl.load(hit_query + hit), tl.load(hit_run + hit)
        candidate, left = _left(
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
            SIZE,
            PADDED,
            RUN,
            SCALE,
            True,
            False,
        )
        number = left.to(tl.int32)
        slot = tl.load(offset + hit) + tl.cumsum(number, axis=0) - number
        tl.store(pair_candidate + slot, candidate.to(tl.int64), mask=left)
        tl.store(pair_query + slot, (query + candidate * 0).to(tl.int64), mask=left)
