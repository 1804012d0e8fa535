"""The lazy frames that are this package's own: each a task a partition, with what Dask's optimiser may know of it."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pandas as pd
from dask.typing import Key
from dask.utils import get_default_shuffle_method

from dask_semdedup._dask import (
    AnyExpr,
    Blockwise,
    BlockwiseIO,
    Expr,
    Index,
    Len,
    Lengths,
    Literal,
    Merge,
    OwnExpr,
    PartitionsFiltered,
    Projection,
    RearrangeByColumn,
    Task,
    TaskRef,
    claims_of,
    determine_column_projection,
)
from dask_semdedup.device.devices import DEVICE_OF_BACKEND, has_cuda
from dask_semdedup.device.queues import gpu_slot
from dask_semdedup.errors import EmbeddingError
from dask_semdedup.frames.columns import Columns, SearchOptions
from dask_semdedup.frames.embeddings import first_width
from dask_semdedup.frames.ids import is_in
from dask_semdedup.io.fragments import Fragment, in_runs
from dask_semdedup.io.reader import Reader
from dask_semdedup.lazy.blocks import Blocks, blocks_of_partitions, bytes_at_once
from dask_semdedup.lazy.pushdown import Searched
from dask_semdedup.steps.against import against_meta, against_partition
from dask_semdedup.steps.blocks import scores_of_blocks
from dask_semdedup.steps.kmeans import kmeans_meta, kmeans_partition
from dask_semdedup.steps.pairwise import pairwise_meta, pairwise_partition
from dask_semdedup.steps.ranking import RankingStrategy
from dask_semdedup.steps.removal import checked_ids

__all__ = [
    "AgainstScores",
    "CheckedIds",
    "KMeansClusters",
    "PairwiseScores",
    "ReadClusters",
    "RowsKept",
    "ScoresAgainst",
    "ScoresOfFiles",
    "ShuffleByCluster",
    "is_against",
]

logger = logging.getLogger("dask_semdedup")

# Bytes of the clusters of files that are scored at once on a CPU, unless one has more: their rows are gathered while
# they are still in the cache, and the memory is used again. A GPU is the faster the more it reads at once.
RUN = 2**25


def score_partition(
    frame: Any, columns: Columns, ranking: RankingStrategy, options: SearchOptions, *, verbose: bool
) -> Any:
    """Run `pairwise_partition`, and log how long it took."""
    start = time.perf_counter()
    return _logged(pairwise_partition(frame, columns, ranking, options), columns, start, verbose)


def score_files(
    reader: Reader,
    fragments: Sequence[Fragment],
    reading: Sequence[str],
    columns: Columns,
    ranking: RankingStrategy,
    options: SearchOptions,
    *,
    verbose: bool,
) -> Any:
    """Read a partition and score it, and log how long it took: the task that `ScoresOfFiles` puts into the graph."""
    start = time.perf_counter()
    return _logged(_score_files(reader, fragments, reading, columns, ranking, options), columns, start, verbose)


def _score_files(
    reader: Reader,
    fragments: Sequence[Fragment],
    reading: Sequence[str],
    columns: Columns,
    ranking: RankingStrategy,
    options: SearchOptions,
) -> Any:
    """Score some clusters after the others; if rows are bad, all at once, for an error that names all of them.

    All at once too where a GPU does the work, or may, which is to be told of as much of it as there is.
    """
    by_folder = columns.cluster in reader.folders.names
    on_cpu = reader.backend == "pandas" and (options.device == "cpu" or not has_cuda())
    if by_folder and on_cpu:
        with suppress(EmbeddingError):
            return _score_runs(reader, in_runs(fragments, RUN), reading, columns, ranking, options)
    with gpu_slot(DEVICE_OF_BACKEND[reader.backend]):
        return pairwise_partition(reader.read(fragments, reading), columns, ranking, options)


def _score_runs(
    reader: Reader,
    runs: Iterable[Sequence[Fragment]],
    reading: Sequence[str],
    columns: Columns,
    ranking: RankingStrategy,
    options: SearchOptions,
) -> pd.DataFrame:
    """Read and score runs of whole clusters one after the other, of which only one needs to be in memory."""
    scores = []
    for run in runs:
        frame = reader.read(run, reading)
        if options.embedding_dim is None and len(frame):
            # All must be of one width.
            options = replace(options, embedding_dim=first_width(frame[columns.embedding]))
        scores.append(pairwise_partition(frame, columns, ranking, options))
        del frame  # The next is read only now.
    return scores[0] if len(scores) == 1 else pd.concat(scores, ignore_index=True)


def _logged(scores: Any, columns: Columns, start: float, verbose: bool) -> Any:
    if verbose:
        clusters = scores[columns.cluster].nunique()
        seconds = time.perf_counter() - start
        logger.info("pairwise: %d rows in %d clusters took %.3f s", len(scores), clusters, seconds)
    return scores


class KMeansClusters(OwnExpr, Blockwise):
    """Rows assigned to centroids, which are in the graph once. Nothing is known of how they are partitioned."""

    _parameters = ["frame", "centroids", "fields", "options"]  # noqa: RUF012

    operation = staticmethod(kmeans_partition)

    @functools.cached_property
    def _name(self) -> str:
        return f"kmeans-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return kmeans_meta(self.frame._meta, self.fields)

    def _divisions(self) -> tuple[Any, ...]:
        return self.frame.divisions

    def _simplify_up(self, parent: Expr, dependents: dict[str, Any]) -> AnyExpr | None:
        """Read only the columns that are asked for, and those that the work needs."""
        if not isinstance(parent, Projection):
            return None
        needed = [self.fields.embedding, self.fields.id]
        asked: Any = determine_column_projection(self, parent, dependents, needed)
        columns = [name for name in self.frame.columns if name in asked]
        if columns == list(self.frame.columns):
            return None
        return type(parent)(type(self)(self.frame[columns], *self.operands[1:]), *parent.operands[1:])


class _ByCluster(OwnExpr, Blockwise):
    """Scores of whole clusters. They are partitioned as the frame is, and say so."""

    @functools.cached_property
    def _name(self) -> str:
        return f"{self._prefix}-{self.deterministic_token}"

    @functools.cached_property
    def unique_partition_mapping_columns_from_shuffle(self) -> set[Any]:
        return {(self.fields.cluster,)} & claims_of(self.frame)

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (self.frame.npartitions + 1)


class PairwiseScores(Searched, _ByCluster):
    """Scores of aligned partitions."""

    _parameters = ["frame", "fields", "ranking", "options", "verbose"]  # noqa: RUF012
    _keyword_only = ["verbose"]  # noqa: RUF012
    _prefix = "pairwise"

    operation = staticmethod(score_partition)

    @functools.cached_property
    def _meta(self) -> Any:
        return pairwise_meta(self.frame._meta, self.fields)

    def _lower(self) -> ScoresOfFiles | None:
        """Read and score in one task what is read from files: its columns and partitions are chosen by now."""
        files = self.frame
        if not isinstance(files, ReadClusters):
            return None
        claims = self.unique_partition_mapping_columns_from_shuffle
        scoring = files.source, files.columns, *self.operands[1:]
        partitions = {number: files.source.partitions[number] for number in files._partitions}
        counts = blocks_of_partitions(files.source.reader, partitions, self.fields)
        return ScoresOfFiles(
            *scoring, claims, Blocks(*scoring, counts) if counts else None, files.operand("_partitions")
        )


class ScoresOfFiles(Searched, PartitionsFiltered, BlockwiseIO):
    """Scores of files, read and scored in one task: `PairwiseScores` of `ReadClusters` is lowered to it.

    Where `blocks` searches a partition, the task puts together what that has found.
    """

    _parameters = [  # noqa: RUF012
        "source",
        "reading",
        "fields",
        "ranking",
        "options",
        "verbose",
        "claims",
        "blocks",
        "_partitions",
    ]
    _defaults = {"_partitions": None}  # noqa: RUF012

    @functools.cached_property
    def _name(self) -> str:
        return f"pairwise-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return pairwise_meta(self.source.reader.meta(self.reading), self.fields)

    @functools.cached_property
    def unique_partition_mapping_columns_from_shuffle(self) -> set[Any]:
        return self.claims

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (len(self.source.partitions) + 1)

    def _simplify_up(self, parent: Expr, dependents: dict[str, Any]) -> AnyExpr | None:
        # As of `ReadClusters`, and here of frames that were optimised before they are merged.
        if self.claims and is_merged(self, dependents):
            return parent.substitute(self, self.substitute_parameters({"claims": set()}))
        return super()._simplify_up(parent, dependents)

    def with_at_least(self, at_least: float | None) -> AnyExpr:
        scores = super().with_at_least(at_least)
        if self.blocks is None:
            return scores
        return scores.substitute(self.blocks, self.blocks.substitute_parameters({"options": scores.options}))

    def bytes_at_once(self) -> list[float]:
        """Return the bytes that each partition holds at once, without those that are searched in blocks."""
        counts = {} if self.blocks is None else self.blocks.counts
        reader, partitions = self.source.reader, self.source.partitions
        return [
            bytes_at_once(reader, partitions[number], self.fields)
            for number in self._partitions
            if number not in counts
        ]

    def _filtered_task(self, name: Key, index: int) -> Task:
        if self.blocks is not None and index in self.blocks.counts:
            return Task(name, scores_of_blocks, *self.blocks.parts(index))
        return Task(
            name,
            score_files,
            self.source.reader,
            self.source.partitions[index],
            self.reading,
            self.fields,
            self.ranking,
            self.options,
            verbose=self.verbose,
            _data_producer=True,
        )


class _AgainstPartitions(Searched, _ByCluster):
    """Scores of pairs of partitions: what `AgainstScores` is lowered to."""

    _parameters = ["frame", "reference", "fields", "reference_id", "options"]  # noqa: RUF012
    _prefix = "against"

    operation = staticmethod(against_partition)

    @functools.cached_property
    def _meta(self) -> Any:
        return against_meta(self.frame._meta, self.reference._meta, self.fields, self.reference_id)


class ScoresAgainst(OwnExpr):
    """Scores of the rows of one frame against those of another."""


class AgainstScores(Searched, ScoresAgainst, Expr):
    """Scores of the rows of one frame against those of another, partitioned alike by cluster.

    Blockwise only once it is lowered: what is blockwise in two frames, Dask takes for no longer aligned with itself,
    and ``scores[scores.x > 0]`` would shuffle by the index.
    """

    _parameters = _AgainstPartitions._parameters

    @functools.cached_property
    def _meta(self) -> Any:
        return self._lower()._meta

    @functools.cached_property
    def unique_partition_mapping_columns_from_shuffle(self) -> set[Any]:
        return self._lower().unique_partition_mapping_columns_from_shuffle

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (self.frame.npartitions + 1)

    def _lower(self) -> _AgainstPartitions:
        return _AgainstPartitions(*self.operands)


def is_against(expr: AnyExpr) -> bool:
    """Return whether a frame comes from scores against another one: its ``max_id`` are then rows of that one."""
    return any(True for _ in expr.find_operations(ScoresAgainst))


def read_partition(reader: Reader, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
    """Read one partition: the task that `ReadClusters` puts into the graph."""
    return reader.read(fragments, columns)


class ReadClusters(OwnExpr, PartitionsFiltered, BlockwiseIO):
    """Partitions of whole clusters, read from Parquet files.

    To Dask the property `unique_partition_mapping_columns_from_shuffle` means more than that no cluster spans two
    partitions: two frames that have it are taken to be partitioned alike, and merged partition by partition. That
    would be wrong here, so the claim is dropped wherever a merge is to come (`_simplify_up`).
    """

    _parameters = ["source", "columns", "claims_alignment", "_partitions"]  # noqa: RUF012
    _defaults = {"claims_alignment": True, "_partitions": None}  # noqa: RUF012
    _absorb_projections = True

    @functools.cached_property
    def _name(self) -> str:
        return f"read_clusters-{self.deterministic_token}"

    @property
    def columns(self) -> list[str]:
        return list(self.operand("columns"))

    @functools.cached_property
    def _meta(self) -> Any:
        return self.source.reader.meta(self.columns)

    @functools.cached_property
    def unique_partition_mapping_columns_from_shuffle(self) -> set[tuple[str, ...]]:
        claimed = self.source.aligned and self.claims_alignment and self.source.cluster_field in self.columns
        return {(self.source.cluster_field,)} if claimed else set()

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (len(self.source.partitions) + 1)

    def _filtered_task(self, name: Key, index: int) -> Task:
        return Task(
            name, read_partition, self.source.reader, self.source.partitions[index], self.columns, _data_producer=True
        )

    def _simplify_up(self, parent: Expr, dependents: Mapping[str, Any]) -> AnyExpr | None:
        if self.claims_alignment and is_merged(self, dependents):
            return parent.substitute(self, self.substitute_parameters({"claims_alignment": False}))
        if isinstance(parent, Lengths):
            return Literal(self._lengths())
        if isinstance(parent, Len):
            return Literal(sum(self._lengths()))
        return super()._simplify_up(parent, dependents)

    blocks = None

    def bytes_at_once(self) -> list[float]:
        """Return the bytes of each partition."""
        partitions = self.source.partitions
        return [float(sum(piece.nbytes for piece in partitions[number])) for number in self._partitions]

    def _lengths(self) -> tuple[int, ...]:
        partitions = self.source.partitions
        return tuple(sum(fragment.rows for fragment in partitions[index]) for index in self._partitions)


def is_merged(expr: Expr, dependents: Mapping[str, Any]) -> bool:
    """Return whether a merge depends on the expression."""
    names: set[str] = set()
    stack = [expr._name]
    while stack:
        parents = [parent for ref in dependents.get(stack.pop(), ()) if (parent := ref()) is not None]
        if any(isinstance(parent, Merge) for parent in parents):
            return True
        new = {parent._name for parent in parents} - names
        names |= new
        stack.extend(new)
    return False


class ShuffleByCluster(OwnExpr, RearrangeByColumn):
    """A shuffle that carries list columns: the peer-to-peer method fails on Arrow lists, so tasks replace it."""

    def _lower(self) -> AnyExpr:
        method = self.method or get_default_shuffle_method()
        operands = dict(zip(self._parameters, self.operands, strict=True))
        # In the same step as Dask lowers its own: later the frame below would be lowered, and have other partitions.
        return RearrangeByColumn(**{**operands, "method": "tasks" if method == "p2p" else method})._lower()


class CheckedIds(OwnExpr, Expr):
    """The ids to remove, partition by partition, once it is known that none of them repeats in the data.

    It is no `Blockwise`, which Dask would fuse into the tasks of all partitions, to be done again in each.
    """

    _parameters = ["duplicates", "repeated"]  # noqa: RUF012

    @functools.cached_property
    def _name(self) -> str:
        return f"checked-ids-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return self.duplicates._meta

    @property
    def ndim(self) -> int:
        """As of a scalar: like one, ids to remove do not keep Dask from seeing that rows come from one frame."""
        return 0

    def _divisions(self) -> tuple[Any, ...]:
        return self.duplicates.divisions

    def _layer(self) -> dict[Key, Task]:
        repeated = TaskRef((self.repeated._name, 0))
        keys = [(self._name, index) for index in range(self.npartitions)]
        return {key: Task(key, checked_ids, TaskRef((self.duplicates._name, key[1])), repeated) for key in keys}


class RowsKept(OwnExpr, Blockwise):
    """The rows of a frame whose ids are not those of duplicates."""

    _parameters = ["frame", "duplicates", "left_on", "right_on"]  # noqa: RUF012
    _keyword_only = ["left_on", "right_on"]  # noqa: RUF012
    _preserves_partitioning_information = True

    @staticmethod
    def operation(frame: Any, duplicates: Any, *, left_on: str, right_on: str) -> Any:
        return frame[~is_in(frame[left_on], duplicates[right_on])]

    @functools.cached_property
    def _name(self) -> str:
        return f"remove-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return self.frame._meta

    def _broadcast_dep(self, dep: Expr) -> bool:
        return dep.npartitions == 1

    def _simplify_up(self, parent: Expr, dependents: dict[str, Any]) -> AnyExpr | None:
        """Read no other columns than those asked for and the ids."""
        if not isinstance(parent, (Projection, Index)):
            return None
        names: Any = determine_column_projection(self, parent, dependents, additional_columns=[self.left_on])
        names = names if isinstance(names, list) else [names]
        columns = [name for name in self.frame.columns if name in names]
        if columns == self.frame.columns:
            return None
        return type(parent)(type(self)(self.frame[columns], *self.operands[1:]), *parent.operands[1:])
