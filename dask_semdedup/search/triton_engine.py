"""The coarse pass as one fused kernel over the tiles of all segments, and what follows it, for CUDA.

The kernels, in the order of their launch; the host waits for none:

`halve_kernel`
    rounds the unit rows to half precision, measures what that lost, and answers each row with itself to begin with.
`coarse_kernel`
    multiplies tiles of queries by tiles of the candidates ranked before them. Of each tile and query only the two or
    three best scores and their candidates leave the kernel; the rest never reach memory.
`select_kernel`
    holds those against the certificate and lists the candidates that remain.
`score_kernel`, `finish_kernel`
    score them in float64, and take the best of each query.

A tile's scores lie in (-1.01, 1.01). Adding 3 brings them into one binade, where the bits of a float grow in equal
steps and compare as integers; the lowest bits of that integer are then given to the candidate's place in its tile, so
that best and candidate are one maximum. `certify` calls the precision lost by this *quantum*.

The tiles of all segments are numbered through: groups of up to `GROUP` query blocks of one segment, within a group
candidate block by candidate block, so that tiles that run at the same time share operands in the L2 cache.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from dask_semdedup.search import certify
from dask_semdedup.search.tiling import FEW_SEGMENTS, FIELDS, GROUP, Config, tiling
from dask_semdedup.search.triton_kernels import coarse_kernel, finish_kernel, halve_kernel, score_kernel, select_kernel
from dask_semdedup.search.triton_launch import Launcher, Table, Workspace, launcher_for, upload

KEY_BYTES = 16 << 20
"""Device memory for the best and second best scores of the tiles. Larger searches take several launches, of about 2 ms:
between two of them others get the GPU."""


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
    table = upload(tiles, stops, rows.device)
    work = Workspace.empty(len(rows), config.keep * most_tiles * config.queries, rows.device)
    part = min(config.queries, 8 if tiles.n_tiles > 16 * tiles.n_blocks else 32)
    is_aligned = rows.data_ptr() % 16 == 0
    launch = launcher_for(rows.device, rows.shape[1], is_aligned, dtype, config, part, exact, stops is not None)
    half = halve(launch, rows, dtype, table, work, scores, index)
    for first_tile, stop_tile, first_block, stop_block in launches:
        multiply(launch, half, config, table, first_tile, stop_tile - first_tile, work, most_tiles)
        launch(
            select_kernel,
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
            MAX_PAIRS=MAX_PAIRS,
            HAS_STOPS=table.has_stops,
        )
    if exact and launches:
        rescore(launch, rows, work, table, scores, index)


def rescore(
    launch: Launcher, rows: torch.Tensor, work: Workspace, table: Table, scores: torch.Tensor, index: torch.Tensor
) -> None:
    """Score the pairs in float64 and put the best of each query; multiply the queries that have too many."""
    n, width = rows.shape
    launch(
        score_kernel,
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
        finish_kernel,
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


RUN = 8
"""Candidates that are scored one by one where more of a tile reach the threshold than its keys name."""

MAX_PAIRS = 128
"""Past this many pairs and runs a query is left to the dense product."""

KEYS = 512
"""Keys that one program of `select_kernel` looks at together: few queries where each has many, and more where not."""


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
        coarse_kernel,
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
