"""Scores of rows compared with all others of a frame, in whatever partitions they stand: the plan and the graph."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, pairwise, product
from operator import getitem
from typing import TYPE_CHECKING, Any, NamedTuple

import dask.dataframe as dd
import numpy as np
from dask.dataframe.api import new_collection
from dask.tokenize import tokenize
from dask.typing import Key
from dask.utils import format_bytes

from dask_semdedup._dask import DataNode, Expr, Task, TaskList, TaskRef
from dask_semdedup._validate import stack_level
from dask_semdedup.device.devices import has_cuda
from dask_semdedup.device.memory import device_bytes, share_memory_pool
from dask_semdedup.device.sharing import gpus_at_work
from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.frames.backend import is_cudf, tensor_like
from dask_semdedup.frames.columns import DISTANCE_COLUMNS, Columns, SearchOptions
from dask_semdedup.io.results import Results
from dask_semdedup.lazy.blocks import LEAST_FOR_ALL, PROCESS_BYTES, least_limit, task_bytes, threads_of_workers
from dask_semdedup.lazy.expressions import ScoresAgainst
from dask_semdedup.lazy.planning import CUDF_ELEMENTS
from dask_semdedup.lazy.pushdown import Searched
from dask_semdedup.lazy.sampling import draw, partition_lengths, sample_embeddings
from dask_semdedup.lazy.sources import by_itself, bytes_in_footers, chains_of
from dask_semdedup.steps.against import OF_REFERENCE
from dask_semdedup.steps.duplicates import threshold
from dask_semdedup.steps.join import (
    Sketched,
    find_involved,
    find_near_pairs,
    join_meta,
    mean_of_all,
    pairs_of_bin,
    places_of,
    score_rows,
    score_rows_against,
    sketch_partition,
    summary_of,
    take_involved,
)
from dask_semdedup.steps.ranking import RankingStrategy

if TYPE_CHECKING:
    from dask_semdedup.search.index import Index
    from dask_semdedup.search.near import Links

__all__ = ["Plan", "compare_all", "compare_all_with", "is_by_mean", "make_plan", "saving_results"]

SEED = 42
"""Of the sample."""

TASKS, TASK_SECONDS = (16, 64), (1, 60)
"""Comparisons, from so many to so many, each of a second on a core; more if one would take more than a minute."""

BLOCK_BYTES, BLOCK_COPIES = 2 << 30, 5
"""Bytes of sketches that a block takes at most; a partition is not split. A task compares two, and others wait."""

READY = 2
"""Comparisons that are ready for each thread, where workers cannot hold all sketches: one runs, one is prepared."""

GPU_SHARE = 6
"""A block of sketches takes one in this many bytes of a GPU: two are compared, and a part of them is gathered."""

BLOCK_ROWS = 1 << 17
"""Rows that a task compares with as many, where there is one cell."""

SAVED_SECONDS = 10
"""Estimated seconds of a comparison whose results are saved."""

BIN_BYTES, INVOLVED = 8 << 30, 0.05
"""Bytes of all rows, and the share that is involved, as a rule, for each partition of the result."""

COPIES_OF_INVOLVED = 5
"""Times that involved rows are in memory: as taken, together, in rank order, and what searches take."""

LEAST_BLOCK = 1 << 24
"""Bytes of the smallest block of sketches, and of the rows of a partition of the result."""

COPIES = 2
"""Times that rows which one task searches are in memory: as read, and in rank order."""

COPIES_OF_SKETCHES, VISIT_BYTES = 2, 12
"""Times that the float32 sketches of a part are in memory while they are made, and bytes of a visit then."""

KEPT_BYTES = 80 << 20
"""Bytes of a process at work that its allocator keeps, beside those of `PROCESS_BYTES`. 64 to 71 MiB were measured."""

GPU_COPIES = 3
"""Times that rows on a GPU are in its memory: as read, in rank order, and what searches take."""


@dataclass(frozen=True)
class Plan:
    """How rows will be compared with all others.

    Attributes
    ----------
    rows, width : int
        Rows of the frame, or of both, and numbers in each; no width where no row had to be looked at.
    index : Index or None
        What is fitted to a sample: sketches and cells. None if all rows are searched in one task.
    blocks : tuple of tuple of int
        Partitions whose sketches are taken together.
    others, other_rows : int
        Number of the last blocks, which are of another frame, and of their rows: these are compared with the first
        ones, and none with those of its own frame. By default there are none.
    shares : tuple of slice
        Ranges of cells that are looked at together.
    block_rows : tuple of int
        Rows of each block.
    partition_rows : int
        Rows of the largest partition.
    bins : int
        Partitions of the result.
    device : {"cpu", "cuda"}
        Where sketches are compared.
    stays : bool
        Whether they stay there from when they are made.
    at_once : int
        Comparisons that may be ready at once; 0 for all. A worker fetches the sketches of all that are ready.
    eps : float, optional
        The cosine distance up to which duplicates are looked for, where somebody asked for the plan alone.
    """

    rows: int
    width: int
    index: Index | None
    blocks: tuple[tuple[int, ...], ...] = ()
    shares: tuple[slice, ...] = ()
    block_rows: tuple[int, ...] = ()
    partition_rows: int = 0
    bins: int = 1
    others: int = 0
    other_rows: int = 0
    device: str = "cpu"
    stays: bool = False
    at_once: int = 0
    eps: float | None = None

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        if self.index is None:
            return "plan", self.rows, self.width
        found, longer, cells = self.index.sketcher, self.index.longer, self.index.cells
        arrays = longer.axes.numpy(), cells.centroids.numpy()
        floors = found.tail, found.floor, longer.floor, cells.reach
        tasks = self.blocks, self.shares, self.bins, self.others, self.at_once
        return "plan", *map(tokenize, arrays), *floors, *tasks

    @property
    def sketch_bytes(self) -> int:
        """Bytes of the sketches of all rows."""
        return 0 if self.index is None else int(self.rows * row_bytes(self.index))

    @property
    def pairs(self) -> float:
        """Pairs of rows, or of their sketches, that will be multiplied."""
        return self.all_pairs if self.index is None else self.index.pairs

    @property
    def all_pairs(self) -> float:
        """Pairs of rows that there are: of one frame, or of two."""
        queries = self.rows - self.other_rows
        return queries * (self.other_rows or max(0, queries - 1) / 2)

    @property
    def skipped(self) -> float:
        """Share of all pairs that no task looks at."""
        return max(0.0, 1 - self.pairs / max(1.0, self.all_pairs))

    def comparisons(self) -> Iterator[tuple[int, int, slice]]:
        """Yield the blocks and cells of each comparison: every pair of blocks once."""
        own = range(len(self.blocks) - self.others)
        other = range(len(own), len(self.blocks))
        for first, second in product(own, other) if self.others else combinations_with_replacement(own, 2):
            for share in self.shares:
                yield first, second, share

    @property
    def tasks(self) -> int:
        """Number of comparisons, each of which is a task."""
        return 1 if self.index is None else sum(1 for _ in self.comparisons())

    @property
    def task_bytes(self) -> int:
        """Bytes that a task takes at most: one that sketches a partition, or compares two blocks; or searches all."""
        if self.index is None:
            return COPIES * 4 * self.rows * self.width
        compared = 2 * max(self.block_rows) * row_bytes(self.index)
        return int(max(sketching_bytes(self.index, self.width, self.partition_rows), min(self.sketch_bytes, compared)))

    @property
    def seconds(self) -> float | None:
        """About how long two cores, or a GPU, will take at most, apart from reading; None where that is not known."""
        if self.index is not None:
            return self.index.seconds
        from dask_semdedup.search.index import seconds_at_once

        if not self.width:
            return None
        at_least = 0.0 if self.eps is None else float(threshold(self.eps))
        return seconds_at_once(self.pairs, self.width, self.device, at_least)

    def __repr__(self) -> str:
        lines = [("rows", f"{self.rows:,} x {self.width}" if self.width else f"{self.rows:,}")]
        if self.eps is not None:
            lines.append(("eps", f"{self.eps:g}"))
        if self.index is None:
            lines += [("search", "all rows in one task"), ("pairs", f"{self.pairs:,.0f}")]
        else:
            size = self.index.longer.size
            lines += [
                ("sketches", f"{size} numbers for a row of {self.width}, {format_bytes(self.sketch_bytes)}"),
                ("cells", f"{len(self.index.cells):,}, and a row visits {self.index.visits:.1f} others on average"),
                ("pairs skipped", f"{self.skipped:.2%}"),
                ("pairs of sketches", f"{self.pairs:,.0f}, of their first {self.index.sketcher.size} numbers"),
                ("pairs to verify", f"{self.index.left:,.0f}"),
                ("comparisons", f"{self.tasks:,} tasks"),
            ]
        if self.seconds is not None:
            reading = "reading the rows" + ("" if self.index is None else " twice")
            where = "two cores" if self.device == "cpu" else "a GPU"
            lines.append((f"time on {where}", f"{self.seconds:,.1f} s, plus {reading}"))
        if self.width:
            process = f"plus {format_bytes(PROCESS_BYTES + KEPT_BYTES)} for each process"
            least = f"at least {LEAST_FOR_ALL / 1e9:g} GB"
            lines.append(("memory of a worker", f"{format_bytes(self.task_bytes)} for each thread, {process}, {least}"))
        return "\n".join(f"{name:<19} {value}" for name, value in lines)


def row_bytes(index: Index) -> float:
    """Return the bytes that the sketch of a row takes, with its visits to cells."""
    return 2 * index.longer.size + 22 + 2 * index.visits


def sketching_bytes(index: Index, width: int, rows: int) -> float:
    """Return the bytes that so many rows take while they are sketched on a CPU."""
    from dask_semdedup.search.near import PART_ROWS

    making = 4 * COPIES_OF_SKETCHES * (index.sketcher.size + index.longer.size) + VISIT_BYTES * index.visits
    return rows * (4 * width + row_bytes(index)) + min(rows, PART_ROWS["cpu"]) * making


def make_plan(
    ddf: dd.DataFrame, columns: Columns, options: SearchOptions, reference: dd.DataFrame | None = None
) -> Plan:
    """Look at a sample of a frame now, and plan how its rows are compared with all others, or with a reference's."""
    import torch

    from dask_semdedup.search import has_triton
    from dask_semdedup.search.index import fit_index, is_worth_a_look, sample_rows

    if options.at_least is None or options.compute_dtype != "auto":
        return Plan(0, 0, None)
    frames = [ddf] if reference is None else [ddf, reference]
    lengths = [partition_lengths(frame, columns) for frame in frames]
    rows = [sum(counts) for counts in lengths]
    others = None if reference is None else rows[0]
    device = _device(ddf, options)
    # Others are compared by Triton's kernels, or on the CPU.
    compared_on = device if device == "cpu" or has_triton(torch.device(device)) else "cpu"
    in_one_task = Plan(sum(rows), 0, None, other_rows=sum(rows[1:]), device=compared_on)

    def sample(size: int) -> np.ndarray:
        # A reference is the larger of the two, as a rule.
        return sample_embeddings(frames[-1], draw(lengths[-1], size, SEED), columns, options.embedding_dim)

    if not is_worth_a_look(rows[-1], others, device):
        if device == "cpu":
            return in_one_task
        # A number takes a byte at least.
        stored = [bytes_in_footers(frame) for frame in frames]
        if None not in stored and _fits_gpu(stored):
            return in_one_task
        width = sample(1).shape[1]
        if _fits_gpu([n * width for n in rows]):
            return replace(in_one_task, width=width)
    found = sample(sample_rows(rows[-1]))
    width = found.shape[1]
    order = np.random.default_rng(SEED).permutation(len(found))
    fits = device == "cpu" or _fits_gpu([n * width for n in rows])
    if device == "cuda" and is_cudf(ddf._meta):
        share_memory_pool()
    index = fit_index(tensor_like(found[order]).to(compared_on), rows[-1], options.at_least, others, at_once=fits)
    if index is None:
        return replace(in_one_task, width=width)
    partition_rows = max(map(max, lengths))
    if not is_cudf(ddf._meta):
        _check_memory(sketching_bytes(index, width, partition_rows), partition_rows)
    most = _most_rows(index, rows, partition_rows, compared_on)
    firsts = (0, len(lengths[0]))
    blocks = [_blocks(counts, most, first) for counts, first in zip(lengths, firsts, strict=False)]
    counts = [count for of_frame in lengths for count in of_frame]
    n_pairs = len(blocks[0]) * (len(blocks[-1]) if others else (len(blocks[0]) + 1) / 2)
    shortest, longest = (2 * index.seconds / seconds for seconds in TASK_SECONDS)
    n_tasks = max(np.clip(shortest, *TASKS), longest)
    # A GPU is filled by one task.
    n_shares = gpus_at_work() if compared_on == "cuda" else math.ceil(n_tasks / n_pairs)
    plan = Plan(
        sum(rows),
        width,
        index,
        sum(blocks, ()),
        _shares(index.loads, n_shares),
        tuple(sum(counts[number] for number in block) for block in sum(blocks, ())),
        partition_rows,
        math.ceil(4 * sum(rows) * width / _bin_bytes()),
        0 if reference is None else len(blocks[-1]),
        sum(rows[1:]),
        compared_on,
        compared_on == "cuda" and sum(rows) <= most,
    )
    return replace(plan, at_once=READY * threads_of_workers()) if plan.sketch_bytes > task_bytes() else plan


def _device(ddf: dd.DataFrame, options: SearchOptions) -> str:
    """Return the device that will search."""
    return "cuda" if options.device != "cpu" and (is_cudf(ddf._meta) or has_cuda()) else "cpu"


def _check_memory(nbytes: float, rows: int) -> None:
    """Raise if a worker surely cannot hold the largest partition: it would be killed again and again."""
    limit = least_limit()
    if PROCESS_BYTES + nbytes > limit:
        raise InvalidArgumentError(
            f"The largest partition has {rows:,} rows. It takes about {format_bytes(int(nbytes))} of memory while its "
            f"rows are sketched, and a worker has {format_bytes(int(limit))}, of which {format_bytes(PROCESS_BYTES)} "
            "hold the program. Make partitions smaller, or give workers more memory.",
            parameters=["partition_size"],
        )
    if limit < LEAST_FOR_ALL:
        warnings.warn(
            f"A worker has {format_bytes(int(limit))} of memory. Where all rows are compared, Dask may pause it for "
            f"good. Give each worker {LEAST_FOR_ALL / 1e9:g} GB or more.",
            stacklevel=stack_level(),
        )


def _most_rows(index: Index, rows: Sequence[int], partition_rows: int, device: str) -> float:
    """Return how many rows a block has at most."""
    nbytes = row_bytes(index)
    if device == "cpu":
        return _block_bytes() / nbytes if len(index.cells) > 1 else BLOCK_ROWS
    fitting = (device_bytes() or 0) / GPU_SHARE / nbytes
    return fitting if len(index.cells) > 1 else min(fitting, -(-sum(rows) // gpus_at_work()))


def _block_bytes() -> float:
    """Return the bytes of sketches that a block takes at most: workers must hold two, and what is gathered of them."""
    return min(BLOCK_BYTES, max(LEAST_BLOCK, task_bytes() / BLOCK_COPIES))


def _bin_bytes() -> float:
    """Return the bytes of all rows for each partition of the result, whose involved rows are in memory some times."""
    return min(BIN_BYTES, max(LEAST_BLOCK, task_bytes() / (INVOLVED * COPIES_OF_INVOLVED)))


def _fits_gpu(n_values: Sequence[Any]) -> bool:
    """Return whether a GPU holds so many numbers of each frame; two frames are columns of lists there."""
    limit = CUDF_ELEMENTS if len(n_values) > 1 else np.inf
    return max(n_values) <= limit and 4 * sum(n_values) * GPU_COPIES <= (device_bytes() or 0)


def _blocks(lengths: Sequence[int], most: float, first: int) -> tuple[tuple[int, ...], ...]:
    """Return runs of partitions, numbered from `first`, of at most so many rows, or of one partition."""
    blocks: list[list[int]] = []
    rows = 0
    for number, length in enumerate(lengths, first):
        if not blocks or rows + length > most:
            blocks.append([])
            rows = 0
        blocks[-1].append(number)
        rows += length
    return tuple(map(tuple, blocks))


def _shares(loads: np.ndarray, most: int) -> tuple[slice, ...]:
    """Return ranges of cells, at most so many, that take about as long as each other."""
    ends, shares = np.cumsum(loads), min(most, len(loads))
    wanted = np.arange(1, shares) / shares * ends[-1]
    cuts = np.unique([0, *np.searchsorted(ends, wanted), len(loads)])
    return tuple(slice(int(first), int(last)) for first, last in pairwise(cuts))


class _Compared(Searched, Expr):
    """Scores of rows that are compared with all others.

    With an index, rows that are in no pair are left out: what is above must ask for duplicates only.
    """

    _prefix = ""

    @functools.cached_property
    def _name(self) -> str:
        return f"{self._prefix}-{self.deterministic_token}"

    def __str__(self) -> str:
        """Return a line without the plan, which prints as a table."""
        frames = ", ".join(map(str, self.dependencies()))
        return f"{type(self).__name__}({frames}, at_least={self.options.at_least})"

    def _tree_repr_argument_construction(self, i: int, op: Any, header: str) -> str:
        return header if isinstance(op, Plan) else super()._tree_repr_argument_construction(i, op, header)

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (self.plan.bins + 1)

    def _add(
        self, graph: dict[Key, Any], stage: str, number: int, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> TaskRef:
        """Add a task to the graph, and return what refers to its result."""
        key = (f"{stage}-{self._name}" if stage else self._name, number)
        graph[key] = Task(key, function, *args, **kwargs)
        return TaskRef(key)

    def _involved(
        self, graph: dict[Key, Any], frames: Sequence[Expr], columns: Sequence[Columns], **options: Any
    ) -> _Rows:
        """Add the tasks that find the involved rows of one frame, or of two that are compared with each other."""
        add, plan = functools.partial(self._add, graph), self.plan
        index = TaskRef(f"index-{self._name}")
        graph[index.key] = DataNode(index.key, plan.index)
        sources = [
            (frame, p, names) for frame, names in zip(frames, columns, strict=True) for p in range(frame.npartitions)
        ]
        chains = [chain for frame in frames for chain in chains_of(frame)]

        def read(stage: str, number: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> TaskRef:
            """Add a task on a partition, which makes that itself if it can: so none waits for the tasks of others."""
            frame, p, _ = sources[number]
            ref = add(stage, number, function, TaskRef((frame._name, p)), *args, **kwargs)
            if chains[number]:
                graph[ref.key] = Task.fuse(*chains[number], graph[ref.key], key=ref.key)
            return ref

        results, options = self.results, {"stays": plan.stays, **options}
        saved = frozenset() if results is None else results.names()

        def saving(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            return function if results is None else functools.partial(_and_save, results, name, function)

        sketched: list[TaskRef] = []
        for p, (frame, _, names) in enumerate(sources):
            if (name := f"sketch-{p}") in saved:
                sketched.append(add("sketch", p, _load_sketched, results, name))
                continue
            # Those of a GPU are made again in less time than it takes to read them.
            sketch = sketch_partition if plan.device == "cuda" else saving(name, sketch_partition)
            # The sample, which gives the width, is of the last frame.
            width_of = "" if frame is frames[-1] else OF_REFERENCE
            given = p, names, self.options, index, plan.device
            sketched.append(read("sketch", p, sketch, *given, width_of=width_of, **options))
        # Before the first comparison: later, all sketches would have to come back from where they were moved to.
        summaries = [add("summary", p, summary_of, ref) for p, ref in enumerate(sketched)]
        new = {b: [summaries[number] for number in block] for b, block in enumerate(plan.blocks)}
        blocks = [TaskList(*(sketched[number] for number in block)) for block in plan.blocks]
        links: list[TaskRef] = []
        for t, (i, j, share) in enumerate(plan.comparisons()):
            if (name := f"compare-{t}") in saved:
                links.append(add("compare", t, _load_links, results, name))
                continue
            after = [*new.pop(i, ()), *new.pop(j, ()), *(links[t - plan.at_once :][:1] if plan.at_once <= t else ())]
            compared = blocks[i], None if i == j else blocks[j], share, index, plan.device
            links.append(add("compare", t, saving(name, find_near_pairs), *compared, TaskList(*after)))
        involved = add("involved", 0, find_involved, TaskList(*links), TaskList(*summaries), plan.bins)
        places = [add("places", p, places_of, involved, p) for p in range(len(sources))]
        taken = [
            read("take", p, take_involved, ref, names)
            for p, (ref, (_, _, names)) in enumerate(zip(places, sources, strict=True))
        ]
        rows = [[add(f"rows-{b}", p, getitem, ref, b) for p, ref in enumerate(taken)] for b in range(plan.bins)]
        pairs = [add("pairs", b, pairs_of_bin, involved, b) for b in range(plan.bins)]
        return _Rows(summaries, rows, pairs)


class _Rows(NamedTuple):
    """Results of tasks: what is known of partitions, involved rows by bin and partition, and their pairs by bin."""

    summaries: list[TaskRef]
    rows: list[list[TaskRef]]
    pairs: list[TaskRef]


def _and_save(results: Results, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a function returns, sketches or links, after saving it."""
    result = function(*args, **kwargs)
    results.save(name, result.arrays())
    return result


def _load_sketched(results: Results, name: str) -> Sketched:
    """Return the sketches of a partition that a stopped run has saved."""
    return Sketched.of_arrays(results.load(name))


def _load_links(results: Results, name: str) -> Links:
    """Return the pairs of a comparison that a stopped run has saved."""
    from dask_semdedup.search.near import Links

    return Links.of_arrays(results.load(name))


class CompleteScores(_Compared):
    """Scores of rows that are compared with all others of their frame."""

    _parameters = ["frame", "fields", "ranking", "options", "plan", "by_mean", "results"]  # noqa: RUF012
    _defaults = {"results": None}  # noqa: RUF012
    _prefix = "complete-scores"

    @functools.cached_property
    def _meta(self) -> Any:
        return join_meta(self.frame._meta, self.fields)

    def _layer(self) -> dict[Key, Any]:
        graph: dict[Key, Any] = {}
        add = functools.partial(self._add, graph)
        last = (self.fields, self.ranking, self.options)
        if self.plan.index is None:
            add("", 0, score_rows, _partitions(self.frame), None, *last, None, by_mean=self.by_mean)
            return graph
        found = self._involved(graph, [self.frame], [self.fields], with_total=self.by_mean)
        mean = None
        if self.by_mean:
            mean = add("mean", 0, mean_of_all, TaskList(*found.summaries))
        for b, (rows, pairs) in enumerate(zip(found.rows, found.pairs, strict=True)):
            add("", b, score_rows, TaskList(*rows), pairs, *last, mean, by_mean=self.by_mean)
        return graph


class CompleteAgainst(ScoresAgainst, _Compared):
    """Scores of rows that are compared with all of another frame."""

    _parameters = ["frame", "reference", "fields", "reference_id", "options", "plan", "results"]  # noqa: RUF012
    _defaults = {"results": None}  # noqa: RUF012
    _prefix = "complete-against"

    @functools.cached_property
    def _meta(self) -> Any:
        return join_meta(self.frame._meta, self.fields, self.reference._meta[self.reference_id])

    def _layer(self) -> dict[Key, Any]:
        graph: dict[Key, Any] = {}
        add = functools.partial(self._add, graph)
        last = (self.fields, self.reference_id, self.options)
        if self.plan.index is None:
            add("", 0, score_rows_against, _partitions(self.frame), _partitions(self.reference), None, *last)
            return graph
        of_both = [self.fields, replace(self.fields, id=self.reference_id)]
        found = self._involved(graph, [self.frame, self.reference], of_both, with_total=False)
        n = self.frame.npartitions
        for b, (rows, pairs) in enumerate(zip(found.rows, found.pairs, strict=True)):
            add("", b, score_rows_against, TaskList(*rows[:n]), TaskList(*rows[n:]), pairs, *last)
        return graph


def _partitions(frame: Expr) -> TaskList:
    return TaskList(*(TaskRef((frame._name, number)) for number in range(frame.npartitions)))


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
    plan = make_plan(ddf, columns, options)
    return new_collection(CompleteScores(by_itself(ddf), columns, ranking, _of_width(plan, options), plan, by_mean))


def compare_all_with(
    ddf: dd.DataFrame, reference: dd.DataFrame, columns: Columns, reference_id_field: str, options: SearchOptions
) -> dd.DataFrame:
    """Return scores of rows among all of another frame: see `compare_all`, and `steps.against.against_partition`."""
    plan = make_plan(ddf, columns, options, reference)
    options = _of_width(plan, options)
    frames = by_itself(ddf), by_itself(reference)
    return new_collection(CompleteAgainst(*frames, columns, reference_id_field, options, plan))


def saving_results(ddf: dd.DataFrame, results: Results) -> tuple[dd.DataFrame, int, int]:
    """Return a frame whose comparisons of all rows save what they find, and use what is saved.

    Short comparisons save nothing: to write their sketches would take longer than to make them.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
    results : Results
        Those of the same frame alone.

    Returns
    -------
    frame : dask.dataframe.DataFrame
    saved, tasks : int
        Number of comparisons that are saved, and of all.
    """
    expr: Any = ddf.expr
    saved = tasks = 0
    for compared in list(expr.find_operations(_Compared)):
        plan: Plan = compared.plan
        if plan.index is None or plan.index.seconds < SAVED_SECONDS:
            continue
        own = results.within(tokenize(plan))
        expr = expr.substitute(compared, compared.substitute_parameters({"results": own}))
        tasks += plan.tasks
        saved += sum(name.startswith("compare-") for name in own.names())
    return new_collection(expr), saved, tasks


def _of_width(plan: Plan, options: SearchOptions) -> SearchOptions:
    """Return options by which all rows must be as wide as those of the sample."""
    return replace(options, embedding_dim=plan.width) if plan.width else options
