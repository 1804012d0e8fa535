"""From files to scores on one GPU: what `end_to_end.py --device cuda` runs.

A few distinct files stand in for all clusters, under hard links, so that they are made quickly and stay in the page
cache. All methods take turns in one process; the table gives medians in milliseconds a cluster:

- only reading the same files, with pylibcudf, many files in a call and several calls at once;
- ours: `read_clusters(backend="cudf")`, `pairwise`, `to_parquet`, by Dask's threads, with the defaults;
- one cluster at a time, as the reference system's stage does it, in the same library's functions: read, score, write.

The breakdown is that of a run in one thread, which waits for the GPU after each part.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dask
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

import dask_semdedup
from dask_semdedup import _parquet, pairwise
from dask_semdedup.ranking import make_strategy
from dask_semdedup.stages import FileGroupTask, PairwiseCosineSimilarityStage

FILES_A_CALL, READERS = 400, 4
ONE_BY_ONE = 20
PARTS = {
    "read": (_parquet, "read_fragments_cudf"),
    "gather": (pairwise, "to_tensor"),
    "search": (pairwise, "search_segments"),
    "assemble": (pairwise, "score_frame"),
}


@dataclass(frozen=True)
class Case:
    """Clusters of one size, a file each, and the bar for ours in milliseconds a cluster."""

    clusters: int
    rows: int
    width: int
    distinct: int
    bar: float

    def __str__(self) -> str:
        return f"{self.clusters:,} clusters of {self.rows:,} x {self.width}"


CASES = [Case(24, 66_000, 1536, 1, 28), Case(3000, 2000, 384, 8, 0.45), Case(20_000, 200, 384, 8, 0.15)]


@dataclass
class Result:
    """One line of the table: milliseconds a cluster."""

    case: str
    method: str
    milliseconds: float
    bar: float | None = None


def make_files(case: Case, root: Path) -> Path:
    """Write the distinct files and link them into the layout of k-means, unless an earlier run has."""
    layout = root / f"{case.clusters}x{case.rows}x{case.width}"
    if layout.exists():
        return layout
    unfinished = root / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    source = root / f"{layout.name}-source"
    source.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(case.distinct):
        rows = rng.standard_normal((case.rows, case.width), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        offsets = np.arange(case.rows + 1, dtype=np.int32) * case.width
        table = pa.table(
            {
                "id": np.arange(case.rows),
                "embeddings": pa.ListArray.from_arrays(offsets, rows.ravel()),
                "cosine_dist_to_cent": rng.random(case.rows),
            }
        )
        pq.write_table(table, source / f"{number}.parquet", use_dictionary=False)
    for cluster in range(case.clusters):
        folder = unfinished / f"centroid={cluster}"
        folder.mkdir(parents=True)
        os.link(source / f"{cluster % case.distinct}.parquet", folder / "part.0.parquet")
    unfinished.rename(layout)
    return layout


def read_only(layout: Path) -> None:
    """Read all files, many in a call and several calls at once."""
    import pylibcudf as plc

    files = sorted(map(str, layout.glob("*/*.parquet")))
    step = max(1, min(FILES_A_CALL, len(files) // (2 * READERS)))

    def read(names: list[str]) -> None:
        source = plc.io.SourceInfo(names)
        plc.io.parquet.read_parquet(plc.io.parquet.ParquetReaderOptions.builder(source).build())

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, [files[start : start + step] for start in range(0, len(files), step)]))


def ours(layout: Path, workers: int | None = None) -> None:
    """Files to scores in files, with the defaults."""
    settings: dict[str, Any] = {"scheduler": "threads", **({} if workers is None else {"num_workers": workers})}
    with tempfile.TemporaryDirectory() as output, dask.config.set(settings):
        dask_semdedup.read_clusters(layout, backend="cudf").semdedup.pairwise().to_parquet(output)


def one_by_one(layout: Path) -> None:
    """Some of the clusters, one at a time."""
    files = sorted(layout.glob("*/*.parquet"))[:ONE_BY_ONE]
    with tempfile.TemporaryDirectory() as output, dask.config.set({"dataframe.backend": "cudf"}):
        stage = PairwiseCosineSimilarityStage("id", "embeddings", output, make_strategy("hard"))
        for number, file in enumerate(files):
            metadata = {"centroid_id": number, "filetype": "parquet"}
            stage.process(FileGroupTask("benchmark", [str(file)], _metadata=metadata))


@contextmanager
def timed_parts() -> Iterator[Counter[str]]:
    """Seconds of each part of the way, the GPU's work included."""
    import torch

    seconds: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = function(*arguments, **options)
            torch.cuda.synchronize()
            seconds[name] += time.perf_counter() - start
            return result

        return wrapper

    with ExitStack() as stack:
        for name, (module, attribute) in PARTS.items():
            stack.enter_context(patch.object(module, attribute, timed(name, getattr(module, attribute))))
        yield seconds


def breakdown(layout: Path) -> dict[str, float]:
    """Seconds of the parts of one run in one thread; what is left is listing, planning, ranking, writing and Dask."""
    start = time.perf_counter()
    dask_semdedup.read_clusters(layout, backend="cudf")
    listed = time.perf_counter() - start
    with timed_parts() as seconds:
        start = time.perf_counter()
        ours(layout, workers=1)
        total = time.perf_counter() - start
    parts = {"list and plan": listed, **{name: seconds[name] for name in PARTS}}
    return {**parts, "rank, write and the rest": total - sum(parts.values()), "all": total}


def compare(case: Case, root: Path, repeats: int) -> tuple[list[Result], dict[str, float]]:
    """Time all methods on one case, in turns, and one run's parts."""
    layout = make_files(case, root)
    counts = {"only reading, pylibcudf": case.clusters, "ours, files to scores": case.clusters}
    methods = dict(zip(counts, (read_only, ours), strict=True))
    slow = f"one cluster at a time ({min(ONE_BY_ONE, case.clusters)} of them)"
    counts[slow], methods[slow] = min(ONE_BY_ONE, case.clusters), one_by_one
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeats + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            method(layout)
            if turn:  # The first turn warms up.
                seconds[name].append(time.perf_counter() - start)
    results = [
        Result(str(case), name, 1e3 * statistics.median(times) / counts[name], case.bar if method is ours else None)
        for (name, times), method in zip(seconds.items(), methods.values(), strict=True)
    ]
    return results, {name: 1e3 * value / case.clusters for name, value in breakdown(layout).items()}


def as_table(results: list[Result], parts: dict[str, float]) -> Table:
    """The results of one case."""
    table = Table(title=f"{results[0].case}, milliseconds a cluster", title_justify="left")
    table.add_column("")
    for column in ("ms", "bar"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(result.method, f"{result.milliseconds:.3f}", "" if result.bar is None else f"{result.bar:g}")
    table.add_section()
    for name, value in parts.items():
        table.add_row(f"in one thread: {name}", f"{value:.3f}", "")
    return table


def run(root: Path, repeats: int, show: Callable[[Any], None]) -> list[dict[str, Any]]:
    """All cases; what is to be written as JSON."""
    import torch

    show(f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}")
    everything = []
    for results, parts in map(partial(compare, root=root, repeats=repeats), CASES):
        show(as_table(results, parts))
        everything.append({"results": [asdict(result) for result in results], "parts": parts})
    return everything
