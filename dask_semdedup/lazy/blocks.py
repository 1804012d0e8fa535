"""Clusters that are too large for the memory of a worker: their scores, by tasks that each hold two blocks of rows.

One task ranks the rows of a partition by their metadata. One for each block compares it with others: it reads that
block, and then half of the others one after the other, so that no block waits in memory for another task.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import psutil
import pyarrow as pa
from dask.system import CPU_COUNT
from dask.typing import Key

from dask_semdedup._dask import DataNode, Expr, OwnExpr, Task, TaskList, TaskRef
from dask_semdedup.device.sharing import workers_of
from dask_semdedup.frames.backend import release_unused
from dask_semdedup.frames.columns import Columns, SearchOptions
from dask_semdedup.io.fragments import Fragment
from dask_semdedup.io.reader import Reader
from dask_semdedup.steps.blocks import BlockScores, Ranked, kept_in_blocks, rank_rows, score_block
from dask_semdedup.steps.ranking import RankingStrategy

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger("dask_semdedup")

__all__ = [
    "LEAST_FOR_ALL",
    "PROCESS_BYTES",
    "Blocks",
    "blocks_of_partitions",
    "bytes_at_once",
    "least_limit",
    "least_memory",
    "task_bytes",
    "threads_of_workers",
]

# Bytes of a process between tasks: Python with torch, pandas and Dask. Builds of torch for GPUs take more.
PROCESS_BYTES = (420 if "+cpu" in version("torch") else 720) << 20

# Bytes of the smallest worker that is known to compare all rows again and again. Dask pauses smaller ones, for good.
LEAST_FOR_ALL = (1000 if "+cpu" in version("torch") else 1800) * 10**6

# Shares of its memory that a worker may fill, and that it may have filled between tasks. At 95% Dask kills it, and from
# 80% on it starts no task.
FILLED, BETWEEN_TASKS = 0.9, 0.8

# Times that rows are in memory while they are compared: as read, in rank order, and for the search. 4.4 were measured.
COPIES = 5

# Times that a block is in memory: by itself, and parts of it beside those of another one, and for their search.
BLOCK_COPIES = 3

# Bytes of the smallest block, and of the rows that are converted at once.
LEAST_BLOCK = 1 << 23

BATCH_BYTES = 1 << 21


def task_bytes(client: Client | None = None) -> float:
    """Return the bytes that a task may take on the smallest worker, or in a thread of this process without workers.

    Parameters
    ----------
    client : distributed.Client, optional
        The client that will run the work; by default the default client, if there is one.
    """
    if workers_of(client) is None:
        return (FILLED * psutil.virtual_memory().total - PROCESS_BYTES) / CPU_COUNT
    return min(((FILLED * limit - PROCESS_BYTES) / threads for limit, threads in _limits(client)), default=math.inf)


def least_limit(client: Client | None = None) -> float:
    """Return the bytes of memory of the smallest worker; infinite without workers, or if they have no limit."""
    return min((limit for limit, _ in _limits(client)), default=math.inf)


def threads_of_workers(client: Client | None = None) -> int:
    """Return the threads of all workers together; 0 without workers."""
    return sum(threads for _, threads in _limits(client))


def _limits(client: Client | None) -> list[tuple[float, int]]:
    """Return the bytes of memory, and the threads, of each worker of a client, by default the default one."""
    # A worker without a limit has None or 0.
    workers = (workers_of(client) or {}).values()
    return [(worker["memory_limit"] or math.inf, worker["nthreads"]) for worker in workers]


def least_memory(threads: int) -> int:
    """Return the bytes that a worker of so many threads needs to search in blocks."""
    of_tasks = threads * BLOCK_COPIES * LEAST_BLOCK
    return math.ceil(max((PROCESS_BYTES + of_tasks) / FILLED, PROCESS_BYTES / BETWEEN_TASKS))


def bytes_at_once(reader: Reader, fragments: Sequence[Fragment], columns: Columns) -> float:
    """Return the bytes of the rows of a partition that must be in memory together: those of its largest cluster."""
    if columns.cluster not in reader.folders.names:
        return _nbytes(reader, fragments, columns)
    clusters = (list(pieces) for _, pieces in itertools.groupby(fragments, attrgetter("keys")))
    return max((_nbytes(reader, pieces, columns) for pieces in clusters), default=0)


def _nbytes(reader: Reader, fragments: Sequence[Fragment], columns: Columns) -> float:
    """Return the bytes of rows in memory, where their embeddings are float32 even if they are stored in fewer bits."""
    numbers = getattr(reader.schema.field(columns.embedding).type, "value_type", pa.float32())
    return max(1.0, 32 / numbers.bit_width) * sum(piece.nbytes for piece in fragments)


def blocks_of_partitions(
    reader: Reader, partitions: Mapping[int, Sequence[Fragment]], columns: Columns
) -> dict[int, int]:
    """Return the partitions, by number, that tasks cannot hold, and how many blocks each is to be searched in.

    Those of a GPU's frames are not searched in blocks.
    """
    if reader.backend != "pandas":
        return {}
    sizes = {number: _nbytes(reader, fragments, columns) for number, fragments in partitions.items()}
    large = [number for number, nbytes in sizes.items() if nbytes > LEAST_BLOCK]
    # Workers are not asked if all is small, and clusters are not looked at if all of a partition fits.
    memory = task_bytes() if large else math.inf
    held = [number for number in large if COPIES * sizes[number] > memory]
    oversized = [number for number in held if COPIES * bytes_at_once(reader, partitions[number], columns) > memory]
    size = max(LEAST_BLOCK, memory / BLOCK_COPIES)
    rows = {number: sum(piece.rows for piece in partitions[number]) for number in oversized}
    return {number: min(rows[number], math.ceil(sizes[number] / size)) for number in oversized}


class Files(NamedTuple):
    """A partition, as what reads it knows it, and the columns that its scores need."""

    reader: Reader
    fragments: Sequence[Fragment]
    reading: Sequence[str]


def rank_files(files: Files, columns: Columns, ranking: RankingStrategy) -> Ranked:
    """Read a partition without its embeddings, and rank its rows."""
    names = [name for name in files.reading if name != columns.embedding]
    ranked = rank_rows(files.reader.read(files.fragments, names), columns, ranking)
    release_unused()
    return ranked


def score_block_of_files(
    files: Files, ranked: Ranked, number: int, count: int, columns: Columns, options: SearchOptions, *, verbose: bool
) -> list[BlockScores]:
    """Compare one of the blocks of a partition with others, and log how long it took."""
    start = time.perf_counter()
    read, blocks = _in_blocks(files, ranked, count, columns)
    answers = score_block(read, ranked, blocks[number], blocks, columns, options)
    release_unused()
    if verbose:
        block, seconds = blocks[number], time.perf_counter() - start
        logger.info(
            "pairwise: block %d of %d, %d rows, took %.3f s", number + 1, count, block.stop - block.start, seconds
        )
    return answers


def find_kept(
    files: Files,
    ranked: Ranked,
    answers: Sequence[Sequence[BlockScores]],
    columns: Columns,
    options: SearchOptions,
) -> BlockScores:
    """Find the answers that depend on which rows are kept, given those of all blocks."""
    read, blocks = _in_blocks(files, ranked, len(answers), columns)
    return kept_in_blocks(read, ranked, blocks, answers, columns, options)


def _in_blocks(files: Files, ranked: Ranked, count: int, columns: Columns) -> tuple[Callable[..., Any], list[slice]]:
    """Return what reads embeddings of a partition, and its blocks."""
    n = len(ranked.ranks)
    step = max(1, BATCH_BYTES * n // sum(piece.nbytes for piece in files.fragments))
    read = functools.partial(files.reader.read_slices, files.fragments, [columns.embedding], step=step)
    return read, [slice(n * block // count, n * (block + 1) // count) for block in range(count)]


class Blocks(OwnExpr, Expr):
    """Answers of the rows of some partitions of files, block by block.

    It is no `Blockwise`, and has a partition for each block. What a partition's scores are made of, `parts` refers to.
    """

    _parameters = ["source", "reading", "fields", "ranking", "options", "verbose", "counts"]  # noqa: RUF012

    @functools.cached_property
    def _name(self) -> str:
        return f"pairwise-blocks-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return pd.DataFrame()

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (sum(self.counts.values()) + 1)

    def parts(self, partition: int) -> tuple[TaskRef | TaskList, ...]:
        """Return what refers to the arguments of `scores_of_blocks` for a partition."""
        kept = [self._key("kept", partition)] if self.options.duplicate_of == "kept" else []
        answers = TaskList(*map(TaskRef, self._keys[partition]))
        return TaskRef(self._key("ranks", partition)), answers, *map(TaskRef, kept)

    def _key(self, stage: str, partition: int) -> Key:
        return f"{stage}-{self._name}", partition

    @functools.cached_property
    def _keys(self) -> dict[int, list[Key]]:
        """The tasks of the blocks of each partition."""
        numbers = itertools.count()
        return {
            partition: [(self._name, next(numbers)) for _ in range(count)] for partition, count in self.counts.items()
        }

    def _layer(self) -> dict[Key, Any]:
        graph: dict[Key, Any] = {}

        def add(key: Key, function: Callable[..., Any], *args: Any, **kwargs: Any) -> TaskRef:
            graph[key] = Task(key, function, *args, **kwargs)
            return TaskRef(key)

        last = self.fields, self.options
        for partition, keys in self._keys.items():
            # Once for all blocks: there may be thousands of files.
            files = self._key("files", partition)
            graph[files] = DataNode(files, Files(self.source.reader, self.source.partitions[partition], self.reading))
            ranks = add(self._key("ranks", partition), rank_files, TaskRef(files), self.fields, self.ranking)
            both = TaskRef(files), ranks
            answers = [
                add(key, score_block_of_files, *both, number, len(keys), *last, verbose=self.verbose)
                for number, key in enumerate(keys)
            ]
            if self.options.duplicate_of == "kept":
                add(self._key("kept", partition), find_kept, *both, TaskList(*answers), *last)
        return graph
