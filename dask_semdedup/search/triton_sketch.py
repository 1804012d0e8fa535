"""The search by sketches on CUDA devices: tables of blocks, and the launches of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import triton

from dask_semdedup.search.crowded import CandidatesOf
from dask_semdedup.search.sketch import SCALE, Costs, Sketcher
from dask_semdedup.search.triton_engine import device_properties
from dask_semdedup.search.triton_kernels import finish_kernel
from dask_semdedup.search.triton_launch import Launcher, aligned, launcher_for, send
from dask_semdedup.search.triton_sketch_kernels import filter_kernel, list_kernel, sketch_kernel, verify_kernel

COSTS = Costs(
    fit=3e8,
    value=0.9,
    pair=0.1,
    pair_value=0.001,
    hit=2500,
    hit_value=2,
    exact_row_value=5,
    exact_pair=1.0,
    exact_value=0.0023,
)
"""Measured on an H200; only their ratios matter."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the filter's tiles, and how it computes them.

    Attributes
    ----------
    queries, candidates : int
        A tile is `queries` by `candidates`.
    run : int
        Candidates that share a bit, which says whether one of them reaches the threshold.
    chunk : int
        Tiles of a program, whose bits fill whole words.
    warps, stages : int
        Warps of a program, and pipeline stages of the candidates.
    """

    queries: int = 128
    candidates: int = 128
    run: int = 64
    chunk: int = 64
    warps: int = 4
    stages: int = 3


def choose_shape(segments: np.ndarray) -> Shape:
    """Return large tiles and runs for large segments, where hits are rare; smaller ones for others."""
    lengths = np.diff(segments).astype(np.float64)
    typical = lengths @ lengths / max(1, segments[-1])
    return Shape(candidates=256, run=128) if typical > 16_384 else Shape()


WORD_BYTES = 64 << 20
"""Bytes of device memory for the bits. Larger searches take several launches, so that other streams get the GPU."""

MAX_HITS = 128
"""A query with more hits than this is crowded: it is searched again among the rows that such queries hit."""

MAX_IN_RUN = 8
"""A query with more candidates to score than this in one run is crowded, too."""

HITS_PER_QUERY = 4
"""Hits that there is room for, a query on average; more queries are crowded if there are more."""

MIN_HITS = 1 << 20
"""Room for so many more hits."""

FIELDS = 6
"""Fields of a block's record."""


def nearest_reaching(
    rows: torch.Tensor,
    segments: torch.Tensor,
    scores: torch.Tensor,
    index: torch.Tensor,
    sketcher: Sketcher,
    *,
    stops: torch.Tensor | None = None,
    shape: Shape | None = None,
    word_bytes: int = WORD_BYTES,
) -> tuple[torch.Tensor, CandidatesOf]:
    """Write the answers of the rows that may reach what is asked for, but for those of crowded rows.

    Parameters
    ----------
    rows, segments, scores, index, stops
        As in `dask_semdedup.search.triton_engine.nearest`.
    sketcher : Sketcher
        What is asked for, and the axes.
    shape : Shape, optional
        Of the filter's tiles.
    word_bytes : int
        Bytes of device memory for the bits.

    Returns
    -------
    crowded : torch.Tensor
        (c,) int64 rows with too many hits, which have no answers yet. The host has waited for them.
    candidates_of : callable
        Of some of these, returns (m,) int64: all rows that may be as similar to them as is asked for, and others.
    """
    filter_ = _RowFilter(rows, sketcher, stops, shape or choose_shape(segments.numpy()), word_bytes)
    filter_.sketch(scores, index)
    table = block_table(segments.numpy(), None if stops is None else stops.numpy(), filter_.shape)
    filter_.hits(planned(table, filter_.shape, word_bytes, rows.device))
    filter_.verify(scores, index)
    crowded = (filter_.count < 0).nonzero().flatten()
    return crowded, partial(filter_.candidates_of, segments)


class Filter:
    """Sketches in device memory, and the launches of the kernels that list their hits.

    Parameters
    ----------
    sketches : torch.Tensor
        (n + the candidates of a tile, h) int8, as tiles reach beyond the last row.
    n : int
        Number of queries.
    sketcher : Sketcher
        What is asked for.
    stops : torch.Tensor, optional
        (n,) int32 on the device: each query meets those before its stop. By default all before itself.
    shape : Shape
    word_bytes : int
        Bytes of device memory for the bits.
    launch : Launcher
    which : torch.Tensor, optional
        (n,) int32 sketches that are queries. By default all are, in order.
    """

    def __init__(
        self,
        sketches: torch.Tensor,
        n: int,
        sketcher: Sketcher,
        stops: torch.Tensor | None,
        shape: Shape,
        word_bytes: int,
        launch: Launcher,
        which: torch.Tensor | None = None,
    ) -> None:
        self.sketches, self.which, self.sketcher, self.shape = sketches, which, sketcher, shape
        self.word_bytes, self.launch, self.device = word_bytes, launch, sketches.device
        self.has_stops = stops is not None
        self.stops = sketches.new_empty(0, dtype=torch.int32) if stops is None else stops
        self.capacity = HITS_PER_QUERY * n + MIN_HITS
        per_row = aligned(n)
        sizes = [self.capacity, self.capacity, per_row, per_row, per_row]
        whole = torch.empty(sum(sizes), dtype=torch.int32, device=self.device)
        self.hit_query, self.hit_run, residual, count, self.offset = whole.split_with_sizes(sizes)
        self.count = count[:n]
        self.residual = residual.view(torch.float32)
        # The number of hits, and the bits of the largest residual.
        self.totals = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.constants = {"SIZE": sketcher.size, "SCALE": SCALE}

    def hits(self, blocks: Blocks, candidates: torch.Tensor | None = None, *, capacity: int | None = None) -> None:
        """List the hits of the queries in `blocks`, among these sketches or others; count them if there is no room."""
        shape = self.shape
        in_words = {"QUERIES": shape.queries, "CANDIDATES": shape.candidates, "RUN": shape.run, "FIELDS": FIELDS}
        n_words = max((launch.words for launch in blocks.launches), default=0)
        words = torch.empty(n_words * shape.queries, dtype=torch.int32, device=self.device)
        part = min(shape.queries, 32)
        for first, last, first_word, _, tiles in blocks.launches:
            self.launch(
                filter_kernel,
                (last - first) * triton.cdiv(tiles, shape.chunk),
                self.sketches,
                self.sketches if self.which is None else self.which,
                self.sketches if candidates is None else candidates,
                self.residual,
                self.totals[1:],
                self.stops,
                blocks.table,
                words,
                self.sketcher.floor,
                first,
                last - first,
                first_word,
                CHUNK=shape.chunk,
                HAS_STOPS=self.has_stops,
                ALL=self.which is None,
                num_warps=shape.warps,
                num_stages=shape.stages,
                **in_words,
                **self.constants,
            )
            self.launch(
                list_kernel,
                (last - first) * (shape.queries // part),
                blocks.table,
                words,
                self.count,
                self.offset,
                self.totals,
                self.hit_query,
                self.hit_run,
                self.capacity if capacity is None else capacity,
                first,
                first_word,
                PART=part,
                STEP=16,
                MAX_HITS=MAX_HITS,
                **in_words,
            )


class _RowFilter(Filter):
    """The filter of a search among rows, and the launches of the kernels before and after it."""

    def __init__(
        self, rows: torch.Tensor, sketcher: Sketcher, stops: torch.Tensor | None, shape: Shape, word_bytes: int
    ) -> None:
        ends = None if stops is None else sent(stops.numpy(), rows.device)
        is_aligned = rows.data_ptr() % 16 == 0
        traits = rows.device, rows.shape[1], is_aligned, sketcher.size, shape, stops is not None
        n, launch = len(rows), launcher_for(*traits)
        sketches = torch.empty(n + shape.candidates, sketcher.size, dtype=torch.int8, device=rows.device)
        super().__init__(sketches, n, sketcher, ends, shape, word_bytes, launch)
        self.rows = rows
        self.hit_score = torch.empty(self.capacity, dtype=torch.float64, device=rows.device)

    def sketch(self, scores: torch.Tensor, index: torch.Tensor) -> None:
        """Write the sketches of the rows, and answers as of rows without candidates."""
        n, width = self.rows.shape
        padded = triton.next_power_of_2(self.sketcher.size)
        axes = torch.nn.functional.pad(self.sketcher.axes, (0, padded - self.sketcher.size + 1))
        in_program = 8192 // max(64, padded)
        self.launch(
            sketch_kernel,
            triton.cdiv(n, in_program),
            self.rows,
            axes,
            self.sketches,
            self.residual,
            self.totals[1:],
            scores,
            index,
            self.count,
            n,
            width,
            self.sketcher.tail,
            ROWS=in_program,
            DEPTH=32,
            num_warps=8,
            PADDED=padded,
            **self.constants,
        )

    def verify(self, scores: torch.Tensor, index: torch.Tensor) -> None:
        """Write the best candidate of each query that has hits, scored in float64."""
        n, width = self.rows.shape
        self.launch(
            verify_kernel,
            32 * device_properties(self.rows.get_device())["multiprocessor_count"],
            self.rows,
            self.sketches,
            self.residual,
            self.totals[1:],
            self.stops,
            self.count,
            self.totals,
            self.hit_query,
            self.hit_run,
            self.hit_score,
            self.capacity,
            self.sketcher.floor,
            n,
            width,
            PADDED=triton.next_power_of_2(self.sketcher.size),
            RUN=self.shape.run,
            WIDTH=min(512, triton.next_power_of_2(width)),
            MAX_IN_RUN=MAX_IN_RUN,
            HAS_STOPS=self.has_stops,
            num_warps=1,
            **self.constants,
        )
        self.launch(
            finish_kernel,
            triton.cdiv(n, 128),
            self.offset,
            self.count,
            self.hit_run,
            self.hit_score,
            scores,
            index,
            n,
            QUERIES=128,
        )

    def candidates_of(self, segments: torch.Tensor, crowded: torch.Tensor) -> torch.Tensor:
        """Return the rows that have hits among crowded rows, whichever is first."""
        if not len(crowded):
            return crowded
        cuts = torch.searchsorted(crowded.cpu(), segments).numpy()
        padding = self.sketches[-self.shape.candidates :]
        sketches = torch.cat([self.sketches[crowded], padding])
        self.count.zero_()
        table = _whole_blocks(segments.numpy(), cuts, self.shape)
        self.hits(planned(table, self.shape, self.word_bytes, self.device), sketches, capacity=0)
        return self.count.nonzero().flatten()


def block_table(segments: np.ndarray, stops: np.ndarray | None, shape: Shape) -> np.ndarray:
    """Return the blocks of queries of all segments, which meet the candidates of their own segment.

    Returns
    -------
    (b + 1, `FIELDS`) int32
        First query, end of the segment, first candidate, tiles whose candidates are before all queries' stops, tiles,
        words of the blocks before. The last record holds the total of the words.
    """
    segment, query, end = _blocks(segments, np.diff(segments) > 1, shape)
    if stops is None:
        first_stop, last_stop = query, np.minimum(query + shape.queries, end) - 1
    else:
        # Rows of other segments may lie between two blocks: every other slice is theirs.
        bounds = np.column_stack([query, np.minimum(query + shape.queries, end)]).ravel()
        padded = np.append(stops, 0)
        first_stop, last_stop = (
            ufunc.reduceat(padded, bounds)[::2] if len(bounds) else bounds for ufunc in (np.minimum, np.maximum)
        )
    start = segments[segment]
    full, tiles = (first_stop - start) // shape.candidates, -(-(last_stop - start) // shape.candidates)
    return _records(query, end, start, full, tiles, shape)


def _whole_blocks(segments: np.ndarray, cuts: np.ndarray, shape: Shape) -> np.ndarray:
    """Return the blocks of segments with candidates among other sketches: from ``cuts[s]`` to ``cuts[s + 1]``."""
    segment, query, end = _blocks(segments, np.diff(cuts) > 0, shape)
    tiles = -(-np.diff(cuts)[segment] // shape.candidates)
    return _records(query, end, cuts[segment], tiles, tiles, shape)


def _blocks(segments: np.ndarray, which: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the segment of each block, its first query, and the end of the segment."""
    counts = np.where(which, -(-np.diff(segments) // shape.queries), 0)
    segment = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(segment)) - (np.cumsum(counts) - counts)[segment]
    return segment, segments[segment] + number * shape.queries, segments[segment + 1]


def _records(
    query: np.ndarray, end: np.ndarray, start: np.ndarray, full: np.ndarray, tiles: np.ndarray, shape: Shape
) -> np.ndarray:
    record = np.zeros((len(query) + 1, FIELDS), np.int64)
    record[:-1, :5] = np.column_stack([query, end, start, full, tiles])
    np.cumsum(-(-tiles * (shape.candidates // shape.run) // 32), out=record[1:, 5])
    return checked(record)


def checked(records: np.ndarray) -> np.ndarray:
    """Return the records of `block_table` in int32, or raise if their words are too many."""
    if records[-1, 5] > np.iinfo(np.int32).max:
        largest = (records[:-1, 1] - records[:-1, 2]).max()
        raise ValueError(
            f"{records[-1, 5]:,} words of bits are more than the {np.iinfo(np.int32).max:,} of one search. The largest "
            f"segment has {largest:,} rows. Cluster more finely, or search fewer segments at once."
        )
    return records.astype(np.int32)


class Launch(NamedTuple):
    """Blocks from `first` to before `last`, their words, and the most tiles that one has."""

    first: int
    last: int
    first_word: int
    words: int
    tiles: int


@dataclass(frozen=True)
class Blocks:
    """Blocks of queries, and the launches in which they meet their candidates.

    Attributes
    ----------
    table : torch.Tensor
        The records of `block_table` on the device.
    launches : list of Launch
    """

    table: torch.Tensor
    launches: list[Launch]


def planned(table: np.ndarray, shape: Shape, word_bytes: int, device: torch.device) -> Blocks:
    """Return blocks with launches of at most so many bytes of words, or of one block."""
    words, tiles, most = table[:, 5], table[:, 4], word_bytes // (4 * shape.queries)
    launches = []
    first = 0
    while first < len(words) - 1:
        last = max(int(np.searchsorted(words, words[first] + most, side="right")) - 1, first + 1)
        here = int(words[first])
        launches.append(Launch(first, last, here, int(words[last]) - here, int(tiles[first:last].max())))
        first = last
    return Blocks(sent(table.ravel(), device), launches)


def sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return integers as int32 on a device."""
    return send([array.astype(np.int32, copy=False)], device)[0]
