"""Scores of rows compared with all others of a frame, in whatever partitions they stand: the plan and the graph."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from operator import getitem
from typing import TYPE_CHECKING, Any

import dask.dataframe as dd
import numpy as np
from dask.dataframe.api import new_collection
from dask.tokenize import tokenize
from dask.typing import Key
from dask.utils import format_bytes

from dask_semdedup._dask import DataNode, Expr, Task, TaskList, TaskRef
from dask_semdedup.device.devices import has_cuda
from dask_semdedup.device.memory import device_bytes
from dask_semdedup.frames.backend import is_cudf
from dask_semdedup.frames.columns import DISTANCE_COLUMNS, Columns, SearchOptions
from dask_semdedup.lazy.pushdown import Searched
from dask_semdedup.lazy.sampling import draw, partition_lengths, sample_embeddings
from dask_semdedup.steps.join import (
    copies_of,
    find_near_pairs,
    join_meta,
    mean_of,
    pairs_of_bin,
    places_of,
    relevant_rows,
    score_rows,
    sketch_partition,
    take_involved,
    total_of,
)
from dask_semdedup.steps.ranking import RankingStrategy

if TYPE_CHECKING:
    from dask_semdedup.search.index import Index

__all__ = ["CompleteScores", "Plan", "compare_all", "is_by_mean", "make_plan"]

SEED = 42
"""Of the sample."""

SHARES = 16
"""Tasks that cells are shared out over: each takes about as long as any other."""

BLOCK_BYTES = 2 << 30
"""Bytes of sketches that a task takes at most; a partition is not split."""

BLOCK_ROWS = 1 << 17
"""Rows that a task compares with as many, where there is one cell."""

BIN_BYTES = 8 << 30
"""Bytes of all rows, of which few are involved, for each partition of the result."""

GPU_COPIES = 3
"""Times that rows on a GPU are in its memory: as read, in rank order, and what searches take."""


@dataclass(frozen=True)
class Plan:
    """How rows will be compared with all others.

    Attributes
    ----------
    rows, width : int
        Rows of the frame, and numbers in each.
    index : Index or None
        What is fitted to a sample: sketches and cells. None if all rows are searched in one task.
    blocks : tuple of tuple of int
        Partitions whose sketches are taken together.
    shares : tuple of slice
        Ranges of cells that are looked at together.
    bins : int
        Partitions of the result.
    """

    rows: int
    width: int
    index: Index | None
    blocks: tuple[tuple[int, ...], ...] = ()
    shares: tuple[slice, ...] = ()
    bins: int = 1

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        if self.index is None:
            return "plan", self.rows, self.width
        found, cells = self.index.sketcher, self.index.cells
        arrays = found.axes.numpy(), cells.centroids.numpy()
        return "plan", *map(tokenize, arrays), found.tail, found.floor, cells.reach, self.blocks, self.shares, self.bins

    @property
    def sketch_bytes(self) -> int:
        """Bytes of the sketches of all rows."""
        return 0 if self.index is None else int(self.rows * row_bytes(self.index))

    @property
    def pairs(self) -> float:
        """Pairs of rows, or of their sketches, that will be multiplied."""
        return self.rows * (self.rows - 1) / 2 if self.index is None else self.index.pairs

    @property
    def skipped(self) -> float:
        """Share of all pairs that no task looks at."""
        return max(0.0, 1 - self.pairs / max(1.0, self.rows * (self.rows - 1) / 2))

    def comparisons(self) -> Iterator[tuple[int, int, slice]]:
        """Yield the blocks and cells of each comparison: every pair of blocks once."""
        for first, second in combinations_with_replacement(range(len(self.blocks)), 2):
            for share in self.shares:
                yield first, second, share

    def __str__(self) -> str:
        lines = [("rows", f"{self.rows:,} x {self.width}")]
        if self.index is None:
            lines += [("search", "all rows in one task, without an index")]
        else:
            lines += [
                ("sketches", f"{self.index.sketcher.size} numbers a row, {format_bytes(self.sketch_bytes)} in all"),
                ("cells", f"{len(self.index.cells):,}"),
                ("pairs skipped", f"{self.skipped:.2%}"),
                ("pairs of sketches", f"{self.pairs:,.0f}"),
                ("pairs to verify", f"{self.index.left:,.0f}"),
                ("comparisons", f"{sum(1 for _ in self.comparisons()):,} tasks"),
            ]
        return "\n".join(f"{name:<18} {value}" for name, value in lines)


def row_bytes(index: Index) -> float:
    """Return the bytes that the sketch of a row takes, with its visits to cells."""
    return 2 * index.sketcher.size + 12 + 4 * index.visits


def make_plan(ddf: dd.DataFrame, columns: Columns, options: SearchOptions) -> Plan:
    """Look at a sample of a frame now, and plan how its rows are compared with all others."""
    from dask_semdedup.search.index import fit_index, sample_rows

    lengths = partition_lengths(ddf, columns)
    rows = sum(lengths)
    sample = sample_embeddings(ddf, draw(lengths, sample_rows(rows), SEED), columns, options.embedding_dim)
    width = sample.shape[1]
    index = None
    if options.at_least is not None and options.compute_dtype == "auto" and not _fits_gpu(ddf, rows * width, options):
        import torch

        order = np.random.default_rng(SEED).permutation(len(sample))
        index = fit_index(torch.from_numpy(sample[order]), rows, options.at_least)
    if index is None:
        return Plan(rows, width, None)
    most = BLOCK_BYTES / row_bytes(index) if len(index.cells) > 1 else BLOCK_ROWS
    return Plan(rows, width, index, _blocks(lengths, most), _shares(index.loads), -(-4 * rows * width // BIN_BYTES))


def _fits_gpu(ddf: dd.DataFrame, n_values: int, options: SearchOptions) -> bool:
    """Return whether a GPU will search, whose memory holds all rows: it compares a million before they are read twice."""
    if options.device == "cpu" or not (is_cudf(ddf._meta) or has_cuda()):
        return False
    return 4 * n_values * GPU_COPIES <= (device_bytes() or 0)


def _blocks(lengths: Sequence[int], most: float) -> tuple[tuple[int, ...], ...]:
    """Return runs of partitions of at most so many rows, or of one partition."""
    blocks: list[list[int]] = []
    rows = 0
    for number, length in enumerate(lengths):
        if not blocks or rows + length > most:
            blocks.append([])
            rows = 0
        blocks[-1].append(number)
        rows += length
    return tuple(map(tuple, blocks))


def _shares(loads: np.ndarray) -> tuple[slice, ...]:
    """Return ranges of cells that take about as long as each other."""
    ends = np.cumsum(loads)
    wanted = np.arange(1, min(SHARES, len(loads))) / SHARES * ends[-1]
    cuts = np.unique([0, *np.searchsorted(ends, wanted), len(loads)])
    return tuple(slice(int(first), int(last)) for first, last in zip(cuts, cuts[1:], strict=False))


class CompleteScores(Searched, Expr):
    """Scores of rows that are compared with all others of their frame.

    With an index, rows that are in no pair are left out: what is above must ask for duplicates only.
    """

    _parameters = ["frame", "fields", "ranking", "options", "plan", "by_mean"]  # noqa: RUF012

    @functools.cached_property
    def _name(self) -> str:
        return f"complete-scores-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return join_meta(self.frame._meta, self.fields)

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (self.plan.bins + 1)

    def _layer(self) -> dict[Key, Any]:
        partitions = [TaskRef((self.frame._name, number)) for number in range(self.frame.npartitions)]
        last = (self.fields, self.ranking, self.options)
        if self.plan.index is None:
            key = (self._name, 0)
            return {key: Task(key, score_rows, TaskList(*partitions), None, *last, None, by_mean=self.by_mean)}
        graph: dict[Key, Any] = {}

        def add(stage: str, number: int, function: Any, *args: Any, **kwargs: Any) -> TaskRef:
            key = (f"{stage}-{self._name}" if stage else self._name, number)
            graph[key] = Task(key, function, *args, **kwargs)
            return TaskRef(key)

        index_key = f"index-{self._name}"
        graph[index_key] = DataNode(index_key, self.plan.index)
        index = TaskRef(index_key)
        sketched = [
            add("sketch", p, sketch_partition, ref, p, self.fields, self.options, index, with_total=self.by_mean)
            for p, ref in enumerate(partitions)
        ]
        blocks = [TaskList(*(sketched[number] for number in block)) for block in self.plan.blocks]
        links = [
            add("compare", t, find_near_pairs, blocks[i], None if i == j else blocks[j], share, index)
            for t, (i, j, share) in enumerate(self.plan.comparisons())
        ]
        copies = [add("copies", p, copies_of, ref) for p, ref in enumerate(sketched)]
        involved = add("involved", 0, relevant_rows, TaskList(*links), TaskList(*copies), self.plan.bins)
        totals = [add("total", p, total_of, ref) for p, ref in enumerate(sketched)] if self.by_mean else []
        mean = add("mean", 0, mean_of, TaskList(*totals)) if self.by_mean else None
        taken = []
        for p, ref in enumerate(self._read_again(partitions, graph)):
            places = add("places", p, places_of, involved, p)
            taken.append(add("take", p, take_involved, ref, places))
        for b in range(self.plan.bins):
            rows = [add(f"rows-{b}", p, getitem, ref, b) for p, ref in enumerate(taken)]
            of_bin = add("pairs", b, pairs_of_bin, involved, b)
            add("", b, score_rows, TaskList(*rows), of_bin, *last, mean, by_mean=self.by_mean)
        return graph

    def _read_again(self, partitions: Sequence[TaskRef], graph: dict[Key, Any]) -> Iterator[TaskRef]:
        """Yield the partitions anew, where one task makes them: so no partition waits in memory for all others."""
        made = self.frame.__dask_graph__()
        for number, ref in enumerate(partitions):
            node = made[ref.key]
            if node.dependencies or isinstance(node, DataNode):
                yield ref
            else:
                key = (f"again-{self._name}", number)
                graph[key] = node.substitute({}, key=key)
                yield TaskRef(key)


def is_by_mean(ranking: RankingStrategy, strategy: RankingStrategy | None) -> bool:
    """Return whether rows without clusters are ranked by their distance to the mean of all rows."""
    return strategy is None and not set(DISTANCE_COLUMNS.values()).isdisjoint(ranking.required_columns)


def compare_all(
    ddf: dd.DataFrame, columns: Columns, ranking: RankingStrategy, options: SearchOptions, *, by_mean: bool
) -> dd.DataFrame:
    """Return scores of rows among all of a frame: with `at_least`, of those that reach it, and of some others.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        With no more columns than are needed.
    columns, ranking, options
        As of `steps.pairwise.pairwise_partition`.
    by_mean : bool
        Whether rows are ranked by their distance to the mean of all, in columns that are made.
    """
    plan = Plan(0, 0, None)
    if options.at_least is not None:
        plan = make_plan(ddf, columns, options)
        options = replace(options, embedding_dim=plan.width)
    return new_collection(CompleteScores(ddf, columns, ranking, options, plan, by_mean))
