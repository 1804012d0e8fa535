"""Tiles of queries and candidates: which a kernel's programs multiply."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import triton.language as tl

GROUP = tl.constexpr(8)
"""Query blocks in a group of tiles."""

FEW_SEGMENTS = 16
"""Up to this many offsets, tiles are planned in Python rather than in NumPy."""

FIELDS = tl.constexpr(7)
"""Fields of a group's record."""


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
