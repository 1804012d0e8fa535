"""Plans of the tiles, of queries by candidates, that the kernels multiply.

The tiles of all segments are numbered consecutively: in groups of up to `GROUP` query blocks of one segment, and within
a group candidate block by candidate block, so that tiles that run at the same time share operands in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

GROUP = 8
"""Query blocks in a group of tiles."""

FIELDS = 7
"""Fields of a group's record."""

FEW_SEGMENTS = 16
"""Up to this many offsets, tiles are planned in Python rather than in NumPy."""


@dataclass(frozen=True)
class Config:
    """Sizes of tiles, and how kernels compute them.

    Attributes
    ----------
    queries, candidates, depth : int
        A tile is `queries` by `candidates`, a multiple of `queries`, and is multiplied `depth` dimensions at a time.
    stages, warps : int
        Pipeline stages of the operands, and warps of a program.
    keep : int
        Best keys that leave the kernel for each query: all but the last name candidates, the last says whether there
        are more. Three pay if a segment has few tiles, as the two best candidates are then often in one tile.
    """

    queries: int = 128
    candidates: int = 256
    depth: int = 64
    stages: int = 3
    warps: int = 8
    keep: int = 2

    @property
    def quantum(self) -> float:
        """The precision that a score loses to the candidate's position: floats in [2, 4) are 2**-22 apart."""
        return self.candidates * 2.0**-22


@dataclass(frozen=True)
class Tiling:
    """Tiles of all segments, in the order of their computation.

    Attributes
    ----------
    groups : numpy.ndarray
        (g + 1, `FIELDS`) int32: first tile, first row of the segment, rows of the segment, first query block within the
        segment, query blocks in the group, first query block among those of all segments, the most candidates of a
        query. The last record holds the totals.
    """

    groups: np.ndarray

    @property
    def n_tiles(self) -> int:
        """Total number of tiles."""
        return int(self.groups[-1, 0])

    @property
    def n_blocks(self) -> int:
        """Total number of query blocks."""
        return int(self.groups[-1, 5])

    def launches(self, max_tiles: int) -> list[tuple[int, int, int, int]]:
        """Return the groups as runs of at most `max_tiles` tiles, or of one group.

        Returns
        -------
        list of (first tile, last tile + 1, first query block, last query block + 1)
        """
        if self.n_tiles <= max_tiles:
            return [(0, self.n_tiles, 0, self.n_blocks)] if self.n_tiles else []
        first_tiles = self.groups[:, 0]
        cuts = [0]
        while cuts[-1] < len(first_tiles) - 1:
            stop = int(np.searchsorted(first_tiles, first_tiles[cuts[-1]] + max_tiles, side="right")) - 1
            cuts.append(max(stop, cuts[-1] + 1))
        bounds = self.groups[cuts][:, [0, 5]].tolist()
        return [(first[0], stop[0], first[1], stop[1]) for first, stop in pairwise(bounds)]


def tiling(segments: np.ndarray, config: Config, stops: np.ndarray | None = None) -> Tiling:
    """Return the tiles on and below the diagonal of every segment.

    Parameters
    ----------
    segments : numpy.ndarray
        (k + 1,) int64 offsets.
    config : Config
    stops : numpy.ndarray, optional
        (n,) int64 ends of the candidates of each row: see `dask_semdedup.search.nearest_earlier`. Query blocks before a
        segment's first query, and candidate blocks after its last candidate, have no tiles.

    Raises
    ------
    ValueError
        If there are more tiles than an int32 can count.
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
    groups = -(-(blocks - first_block) // GROUP)
    if (groups != 1).any():
        segment = np.repeat(np.arange(len(groups)), groups)
        before = np.cumsum(groups) - groups
        first_block = first_block[segment] + (np.arange(len(segment)) - before[segment]) * GROUP
        starts, lengths, blocks, most = starts[segment], lengths[segment], blocks[segment], most[segment]
    end = np.minimum(first_block + GROUP, blocks)
    ratio, most_blocks = config.candidates // config.queries, -(-most // config.candidates)
    tiles = _tiles_below(end, ratio, most_blocks) - _tiles_below(first_block, ratio, most_blocks)
    record = np.zeros((len(blocks) + 1, FIELDS), dtype=np.int64)
    for field, values in enumerate((starts, lengths, first_block, end - first_block), start=1):
        record[:-1, field] = values
    record[:-1, 6] = most
    np.cumsum(tiles, out=record[1:, 0])
    np.cumsum(record[:-1, 4], out=record[1:, 5])
    return Tiling(_as_int32(record, segments))


def _as_int32(record: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Return the groups in the dtype that the kernels read."""
    if record[-1, 0] > np.iinfo(np.int32).max:
        raise ValueError(
            f"{record[-1, 0]:,} tiles are more than the {np.iinfo(np.int32).max:,} of one search. The largest segment "
            f"has {np.diff(segments).max():,} rows. Cluster more finely, or search fewer segments at once."
        )
    return record.astype(np.int32)


def _groups_of_few(segments: list[int], config: Config) -> np.ndarray:
    """Return the groups of a few segments, planned one by one: a single call of NumPy takes as long as one group."""
    records, tile, block = [], 0, 0
    ratio = config.candidates // config.queries
    for start, stop in pairwise(segments):
        length = stop - start
        blocks, most_blocks = -(-length // config.queries), -(-(length - 1) // config.candidates)
        for first in range(0, blocks if length > 1 else 0, GROUP):
            end = min(first + GROUP, blocks)
            records.append((tile, start, length, first, end - first, block, length - 1))
            tile += _tiles_below(end, ratio, most_blocks) - _tiles_below(first, ratio, most_blocks)
            block += end - first
    return np.array([*records, (tile, 0, 0, 0, 0, block, 0)], dtype=np.int64)


def _queries_and_candidates(starts: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each segment, the number of rows before its first query, and the most candidates of a query."""
    most = np.maximum.reduceat(candidates, starts)
    queries = np.flatnonzero(candidates > 0)
    where = np.searchsorted(queries, starts)
    first = np.append(queries, len(candidates))[where] - starts
    return first, most


def _tiles_below(block: Any, ratio: int, most_blocks: Any) -> Any:
    """Return the number of tiles of a segment's query blocks before `block`, for integers or arrays of them.

    A candidate block is as long as `ratio` query blocks. Query block b meets ``b // ratio + 1`` candidate blocks, but
    no more than `most_blocks`.
    """
    below = block - (block - ratio * most_blocks) * (block > ratio * most_blocks)
    whole = below // ratio
    return (whole + 1) * (2 * below - ratio * whole) // 2 + (block - below) * most_blocks
