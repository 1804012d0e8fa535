"""Time files to scores against only reading the same files with pyarrow.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --clusters 1000 --breakdown
    python benchmarks/end_to_end.py --device cuda

200,000 rows of 384 numbers in 200 clusters of two files each, in the k-means layout, are made once; other numbers are
options. All methods are timed in turns in one process, from a warm page cache, so that a noisy machine disturbs them
alike; the tables give medians. The peak memory is that of a process of its own, which does nothing but one run of ours.

`--breakdown` says where the time of all threads goes in one run. `--stages` compares instead the stage layout, a file
of scores for each cluster: clusters batched and concurrently, against a loop of one at a time. `--overhead` measures
what is left where there is nothing to compute: tiny clusters, a file each.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from dask.system import CPU_COUNT
from end_to_end_cases import Options, case_options
from rich.console import Console
from rich.table import Table

import dask_semdedup
import dask_semdedup.io.reader
import dask_semdedup.steps.pairwise
from dask_semdedup.stages import PairwiseStage
from dask_semdedup.steps.ranking import RankingStrategy

WIDTH = 384
COLUMNS = ["id", "embeddings", "cosine_dist_to_cent"]
DEFAULT_DATA = Path(tempfile.gettempdir()) / "dask-semdedup-end-to-end"
OURS = "ours, files to scores in files"
BATCHED, LOOP = "PairwiseStage.run", "a loop of one cluster at a time"
BAR_RATIO, BAR_GB = 2.0, 1.5
# The functions that do the steps of one partition.
STEPS: dict[str, tuple[Any, str]] = {
    "read": (dask_semdedup.io.reader, "read_fragment"),
    "rank": (RankingStrategy, "order"),
    "convert and gather": (dask_semdedup.steps.pairwise, "to_tensor"),
    "search": (dask_semdedup.steps.pairwise, "search_segments"),
    "write": (pq, "write_table"),
}


class Shape(NamedTuple):
    """How many clusters, files in each, and rows in each file."""

    clusters: int
    files: int
    rows: int

    def __str__(self) -> str:
        total = self.clusters * self.files * self.rows
        return f"{total:,} x {WIDTH} float32 in {self.clusters:,} clusters of {self.files} files"


def make_data(root: Path, shape: Shape) -> Path:
    """Write the files, unless an earlier run has; the folder of the k-means layout."""
    clusters, files, n = shape
    layout = root / f"{clusters}x{files}x{n}x{WIDTH}"
    if layout.exists():
        return layout
    unfinished = root / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    rng = np.random.default_rng(0)
    for cluster in range(clusters):
        folder = unfinished / f"centroid={cluster}"
        folder.mkdir(parents=True)
        rows = cluster_rows(rng, files * n)
        for file in range(files):
            first = file * n
            table = as_table(rows[first : first + n], rows.mean(axis=0), cluster * files * n + first)
            pq.write_table(table, folder / f"part.{file}.parquet")
    unfinished.rename(layout)
    return layout


def cluster_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    """Unit rows around a random unit centroid."""
    rows = rng.standard_normal(WIDTH, dtype=np.float32) + rng.standard_normal((n, WIDTH), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def as_table(rows: np.ndarray, mean: np.ndarray, first_id: int) -> pa.Table:
    """A table as k-means writes it: ids, embeddings and distances to the centroid."""
    centroid = mean / np.linalg.norm(mean)
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * WIDTH
    return pa.table(
        {
            "id": np.arange(first_id, first_id + len(rows)),
            "embeddings": pa.ListArray.from_arrays(offsets, pa.array(rows.ravel())),
            "cosine_dist_to_cent": 1 - rows @ centroid,
            "l2_dist_to_cent": np.linalg.norm(rows - centroid, axis=1),
        }
    )


def read_dataset(layout: Path) -> pa.Table:
    """All files at once, with all of Arrow's threads."""
    return ds.dataset(sorted(map(str, layout.glob("*/*.parquet"))), format="parquet").to_table(columns=COLUMNS)


def read_files(layout: Path) -> pa.Table:
    """File by file, each with all of Arrow's threads."""
    return pa.concat_tables([pq.ParquetFile(path).read(columns=COLUMNS) for path in sorted(layout.glob("*/*.parquet"))])


def files_to_scores(layout: Path) -> None:
    """Ours: read, rank, search and write, by Dask's threads."""
    with tempfile.TemporaryDirectory() as output, dask.config.set(scheduler="threads"):
        dask_semdedup.read_clusters(layout).semdedup.pairwise().to_parquet(output)


def stage(layout: Path) -> None:
    """Ours in the stage layout: a file of scores for each cluster, clusters batched."""
    with tempfile.TemporaryDirectory() as output, dask.config.set(scheduler="threads"):
        PairwiseStage("id", "embeddings", str(layout), output).run()


def stage_loop(layout: Path) -> None:
    """The same files, one cluster after the other."""
    with tempfile.TemporaryDirectory() as output:
        partitioning, similarity = PairwiseStage("id", "embeddings", str(layout), output).decompose()
        for task in partitioning.process():
            similarity.process(task)


READING: dict[str, Callable[[Path], object]] = {
    "pyarrow, dataset.to_table": read_dataset,
    "pyarrow, file by file": read_files,
}
METHODS = {**READING, OURS: files_to_scores}
STAGES = {**READING, BATCHED: stage, LOOP: stage_loop}


def interleaved(methods: Mapping[str, Callable[[Path], object]], layout: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each method's runs, the methods taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeats + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            method(layout)
            if turn:  # The first turn warms up.
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def cpu_times() -> Iterator[dict[str, float]]:
    """Seconds of processor time of each of `STEPS`, over all threads."""
    seconds = dict.fromkeys(STEPS, 0.0)
    lock = threading.Lock()

    def timed(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                with lock:
                    seconds[step] += time.thread_time() - start

        return call

    with ExitStack() as stack:
        for step, (owner, name) in STEPS.items():
            stack.enter_context(mock.patch.object(owner, name, timed(step, getattr(owner, name))))
        yield seconds


def breakdown(layout: Path) -> dict[str, float]:
    """Processor seconds of one run of ours by step, and those in which a core did nothing of it."""
    start, used = time.perf_counter(), time.process_time()
    with cpu_times() as seconds:
        files_to_scores(layout)
    wall, used = time.perf_counter() - start, time.process_time() - used
    return {**seconds, "other": used - sum(seconds.values()), "idle, or others'": CPU_COUNT * wall - used}


def as_breakdown_table(steps: Mapping[str, float]) -> Table:
    """The steps of one run, and their shares of what it used."""
    used = sum(list(steps.values())[:-1])
    table = Table(title=f"One run of ours: seconds of {CPU_COUNT} cores", title_justify="left")
    table.add_column("step")
    for column in ("s", "share of used"):
        table.add_column(column, justify="right")
    for step, seconds in steps.items():
        table.add_row(step, f"{seconds:.2f}", f"{seconds / used:.0%}")
    return table


def tiny_clusters(layout: Path, clusters: int) -> Path:
    """A folder of clusters that are all the same file of four rows."""
    rows = cluster_rows(np.random.default_rng(0), 4)
    pq.write_table(as_table(rows, rows.mean(axis=0), 0), layout / "template")
    for cluster in range(clusters):
        folder = layout / f"centroid={cluster}"
        folder.mkdir()
        os.link(layout / "template", folder / "part.0.parquet")
    return layout


def overhead(console: Console, clusters: int, partitions: int, repeats: int) -> None:
    """Print how long many clusters take to plan, and a partition of next to nothing to run."""
    with tempfile.TemporaryDirectory() as folder:
        layout = tiny_clusters(Path(folder), clusters)
        planned = []
        for _ in range(repeats):
            start = time.perf_counter()
            scores = dask_semdedup.read_clusters(layout).semdedup.pairwise()
            middle = time.perf_counter()
            scores.optimize().__dask_graph__()
            planned.append((middle - start, time.perf_counter() - middle))
    reading, building = map(statistics.median, zip(*planned, strict=True))
    console.print(f"{clusters:,} clusters: listed, footers read and planned in {reading:.2f} s, graph {building:.3f} s")
    with tempfile.TemporaryDirectory() as folder:
        # A partition for each cluster.
        scores = dask_semdedup.read_clusters(tiny_clusters(Path(folder), partitions), partition_size=1)
        scores = scores.semdedup.pairwise()
        nothing = mock.patch("dask_semdedup.lazy.expressions.score_files", partial(no_scores, scores._meta))
        seconds: dict[str, list[float]] = {"dask": [], "ours": []}
        for _ in range(repeats):
            seconds["ours"].append(seconds_of_all_tasks(scores))
            with nothing:
                seconds["dask"].append(seconds_of_all_tasks(scores))
    alone, each = (1e3 * statistics.median(seconds[name]) / partitions for name in ("dask", "ours"))
    console.print(f"{partitions:,} partitions that do nothing: {alone:.2f} ms a partition (bar 2)")
    console.print(f"{partitions:,} partitions of 4 rows, read and scored: {each:.2f} ms a partition")


def no_scores(meta: pd.DataFrame, *args: object, **kwargs: object) -> pd.DataFrame:
    """No scores at all: the rest of a partition's task is Dask's."""
    return meta


def seconds_of_all_tasks(frame: dd.DataFrame) -> float:
    """Seconds that Dask's threads take for a frame's tasks, whose results stay where they are."""
    start = time.perf_counter()
    dask.persist(frame, scheduler="threads")
    return time.perf_counter() - start


def peak_gigabytes() -> float:
    """Peak resident memory of this process.

    On Linux the kernel's own record is preferred, as ``ru_maxrss`` includes the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def measure_peak(data: Path, shape: Shape) -> float:
    """Gigabytes that one run of ours takes in a fresh process."""
    numbers = [f"--{name}={number}" for name, number in shape._asdict().items()]
    command = [sys.executable, __file__, "--data", str(data), *numbers, "--only-peak"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def as_rich_table(shape: Shape, medians: Mapping[str, float], reading: float) -> Table:
    """The medians, and their ratios to the faster way of only reading."""
    table = Table(title=str(shape), title_justify="left")
    table.add_column("method")
    for column in ("ms", "times reading alone"):
        table.add_column(column, justify="right")
    for name, seconds in medians.items():
        table.add_row(name, f"{1e3 * seconds:,.0f}", f"{seconds / reading:.2f}")
    return table


def run_cases(options: Options, show: Callable[[Any], None]) -> int:
    """Run cases of GPUs in one process, or on workers; the number of those that failed."""
    if options.gpus:
        import end_to_end_gpus

        return end_to_end_gpus.run(options, show)
    import end_to_end_cuda

    return end_to_end_cuda.run(options, show)


@click.command()
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DATA,
    show_default=True,
    help="Folder for the files, which are created once.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="On cuda, and with --case or --gpus, the cases are those of end_to_end_cuda.py.",
)
@click.option("--clusters", default=200, show_default=True)
@click.option("--files", default=2, show_default=True, help="Files in each cluster.")
@click.option("--rows", default=500, show_default=True, help="Rows in each file.")
@click.option("--repeats", default=5, show_default=True, help="Timed turns.")
@click.option("--breakdown", "with_breakdown", is_flag=True, help="Print the time of each step of one run.")
@click.option("--stages", is_flag=True, help="Compare the stage layout with a loop of one cluster at a time.")
@click.option("--overhead", "only_overhead", is_flag=True, help="Measure planning and Dask alone, on tiny clusters.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to this file too."
)
@click.option("--only-peak", is_flag=True, hidden=True, help="Run ours once and print its peak memory.")
@case_options
def main(
    data: Path,
    device: str,
    clusters: int,
    files: int,
    rows: int,
    repeats: int,
    with_breakdown: bool,
    stages: bool,
    only_overhead: bool,
    json_path: Path | None,
    only_peak: bool,
    **of_cases: Any,
) -> None:
    """Compare files to scores with only reading the files."""
    console = Console(width=120)
    if device == "cuda" or of_cases["cases"] or of_cases["gpus"]:
        sys.exit(run_cases(Options(device, data, repeats, with_breakdown, json_path, **of_cases), console.print))
    if only_overhead:
        overhead(console, clusters=50_000, partitions=1_000, repeats=repeats)
        return
    shape = Shape(clusters, files, rows)
    layout = make_data(data, shape)
    if only_peak:
        files_to_scores(layout)
        print(peak_gigabytes())
        return
    peak = measure_peak(data, shape)
    seconds = interleaved(STAGES if stages else METHODS, layout, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    reading = min(medians[name] for name in READING)
    ratio = medians[BATCHED if stages else OURS] / reading
    console.print(as_rich_table(shape, medians, reading))
    console.print(f"ours: {ratio:.2f} times reading alone (bar {BAR_RATIO}), peak {peak:.2f} GB (bar {BAR_GB})")
    results: dict[str, Any] = {"seconds": seconds, "medians": medians, "ratio": ratio, "peak_gb": peak}
    if with_breakdown:
        results["breakdown"] = breakdown(layout)
        console.print(as_breakdown_table(results["breakdown"]))
    if json_path:
        json_path.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
