"""The search on CUDA devices: plans of tiles, and the launches of the kernels. The host waits for none of them."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from dask_semdedup.search import certify
from dask_semdedup.search.crowded import Centred
from dask_semdedup.search.tiling import FEW_SEGMENTS, FIELDS, GROUP, Config, tiling
from dask_semdedup.search.triton_kernels import (
    coarse_kernel,
    dense_kernel,
    finish_kernel,
    halve_kernel,
    score_kernel,
    select_kernel,
)
from dask_semdedup.search.triton_launch import Launcher, Table, Workspace, launcher_for, upload

KEY_BYTES = 16 << 20
"""Bytes of device memory for the best keys of the tiles. Larger searches take several launches of about 2 ms each, so
that other streams get the GPU between them."""


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
    centred: Centred | None = None,
) -> None:
    """Write the answers of all rows to `scores` and `index`. The host does not wait for the device.

    Parameters
    ----------
    rows : torch.Tensor
        (n, d) float32, contiguous, on a CUDA device.
    segments : torch.Tensor
        (k + 1,) int64 offsets, on the CPU.
    scores, index : torch.Tensor
        (n,) float32 and int64, on the same device.
    stops : torch.Tensor, optional
        (n,) int64 ends of the candidates of each row, on the CPU. By default the row itself.
    dtype : torch.dtype
        The half precision of the coarse pass.
    exact : bool
        Whether to rescore in float64. If not, the answers are the best coarse scores.
    config : Config, optional
        Sizes of the tiles. By default chosen for the segments.
    key_bytes : int
        Bytes of device memory for the best keys of the tiles.
    centred : Centred, optional
        Rows to multiply instead of half-precision copies, if answers are exact.
    """
    offsets = segments.numpy()
    config = config or choose_config(offsets, device_properties(rows.get_device())["max_shared_mem"])
    tiles = tiling(offsets, config, None if stops is None else stops.numpy())
    launches = tiles.launches(max(1, key_bytes // (4 * config.keep * config.queries)))
    max_tiles = max((stop_tile - first_tile for first_tile, stop_tile, *_ in launches), default=0)
    table = upload(tiles, stops, rows)
    work = Workspace.empty(rows, config.keep * max_tiles * config.queries)
    part = min(config.queries, 8 if tiles.n_tiles > 16 * tiles.n_blocks else 32)
    is_aligned = rows.data_ptr() % 16 == 0
    is_centred = centred is not None
    launch = launcher_for(
        rows.device, rows.shape[1], is_aligned, dtype, config, part, exact, stops is not None, is_centred
    )
    accumulation = 2 * certify.accumulation_bound(rows.shape[1]) + 2 * certify.UNIT_TOLERANCE
    if centred is None:
        queries = candidates = halve(launch, rows, dtype, table, work, scores, index)
    else:
        queries, candidates, accumulation = centred.queries, centred.candidates, 0.0
        # The largest residual of a candidate is in the error already.
        work.residual[: len(rows)] = centred.error
        work.count.zero_()
        scores.zero_()
        torch.arange(len(rows), out=index)
    for first_tile, stop_tile, first_block, stop_block in launches:
        multiply(launch, queries, candidates, config, table, first_tile, stop_tile - first_tile, work, max_tiles)
        launch(
            select_kernel,
            (stop_block - first_block) * (config.queries // part),
            work.residual,
            table.largest,
            table.group_of_block,
            table.groups,
            table.stops,
            work.keys,
            max_tiles * config.queries,
            scores,
            index,
            work.offset,
            work.count,
            work.crowded,
            table.n_crowded,
            table.n_pairs,
            work.pair_query,
            work.pair_candidate,
            work.capacity,
            first_tile,
            first_block,
            accumulation,
            QUERIES=config.queries,
            CANDIDATES=config.candidates,
            GROUP=GROUP,
            FIELDS=FIELDS,
            KEEP=config.keep,
            PART=part,
            STEP=KEYS // part,
            EXACT=exact,
            RUN=RUN,
            MAX_PAIRS=MAX_PAIRS,
            HAS_STOPS=table.has_stops,
        )
    if exact and launches:
        rescore(launch, rows, work, table, scores, index)


def rescore(
    launch: Launcher, rows: torch.Tensor, work: Workspace, table: Table, scores: torch.Tensor, index: torch.Tensor
) -> None:
    """Score the pairs in float64 and write the best of each query; queries with too many pairs are multiplied."""
    n, width = rows.shape
    launch(
        score_kernel,
        32 * device_properties(rows.get_device())["multiprocessor_count"],
        rows,
        table.n_pairs,
        work.capacity,
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
        finish_kernel,
        triton.cdiv(n, 128),
        work.offset,
        work.count,
        work.pair_candidate,
        work.pair_score,
        scores,
        index,
        n,
        QUERIES=128,
    )
    launch(
        dense_kernel,
        triton.cdiv(n, 128),
        rows,
        work.offset,
        work.crowded,
        table.n_crowded,
        table.stops,
        scores,
        index,
        width,
        QUERIES=128,
        CANDIDATES=32,
        DEPTH=16,
        HAS_STOPS=table.has_stops,
    )


RUN = 8
"""Candidates of a run: if more candidates of a tile reach the threshold than its keys name, all are scored in runs."""

MAX_PAIRS = 128
"""A query with more pairs and runs than this is left to the dense product."""

KEYS = 512
"""Keys that one program of `select_kernel` reads at a time: few queries if each has many keys, more queries if not."""


def choose_config(segments: np.ndarray, shared_bytes: int) -> Config:
    """Return large tiles if segments fill them and `shared_bytes` of shared memory hold them, else smaller ones.

    Measured on an H200: tiles of 128 by 256 are faster for clusters of about 4,000 rows or more. A third key costs 7%
    of the coarse pass and saves most of the scoring after it, which is the greater part for clusters of up to about
    32,000 rows.
    """
    if shared_bytes < 160_000:
        return Config(queries=128, candidates=128, depth=32, stages=3, warps=4, keep=3)
    # The size of the typical row's cluster.
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
def device_properties(index: int) -> dict[str, int]:
    """Return the properties of a GPU from the driver; for Triton's interpreter, on the CPU at -1, small values."""
    if index < 0:
        return {"multiprocessor_count": 2, "max_shared_mem": 1 << 20}
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
    """Return half-precision unit rows; write their residuals to `work` and the largest residual to `table`.

    The answers are initialized to those of rows without candidates.
    """
    n, width = rows.shape
    stride = -(-width // 8) * 8  # The copy engine needs rows of whole 16 bytes.
    half = torch.empty(n, stride, dtype=dtype, device=rows.device)
    padded = triton.next_power_of_2(stride)
    in_program = max(1, 4096 // padded)
    launch(
        halve_kernel,
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
    queries: torch.Tensor,
    candidates: torch.Tensor,
    config: Config,
    table: Table,
    first_tile: int,
    n_tiles: int,
    work: Workspace,
    max_tiles: int,
) -> None:
    """Launch the coarse pass over `n_tiles` tiles; `work` has room for the keys of `max_tiles`."""
    # A multiprocessor runs two programs of four warps at a time, or one of eight. The number of programs is compiled in
    # and so must not depend on the number of tiles.
    programs = 8 // config.warps * device_properties(queries.get_device())["multiprocessor_count"]
    launch(
        coarse_kernel,
        programs,
        TensorDescriptor.from_tensor(queries, [config.queries, config.depth]),
        TensorDescriptor.from_tensor(candidates, [config.candidates, config.depth]),
        table.group_of_tile,
        table.groups,
        table.stops,
        work.keys,
        max_tiles * config.queries,
        first_tile,
        n_tiles,
        *queries.shape,
        QUERIES=config.queries,
        CANDIDATES=config.candidates,
        DEPTH=config.depth,
        GROUP=GROUP,
        FIELDS=FIELDS,
        KEEP=config.keep,
        HAS_STOPS=table.has_stops,
        PROGRAMS=programs,
        num_warps=config.warps,
        num_stages=config.stages,
    )
