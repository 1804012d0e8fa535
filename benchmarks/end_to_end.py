"""Time the way from files to scores against only reading the same files with pyarrow.

    python benchmarks/end_to_end.py

200,000 rows of 384 numbers in 200 clusters of two files each, in the k-means layout, are made once. All methods are
timed in turns in one process, from a warm page cache, so that a noisy machine disturbs them alike; the table gives
medians. The peak memory is that of a process of its own, which does nothing but one run of ours.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import dask
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

import dask_semdedup

CLUSTERS, FILES, ROWS, WIDTH = 200, 2, 500, 384
COLUMNS = ["id", "embeddings", "cosine_dist_to_cent"]
DEFAULT_DATA = Path(tempfile.gettempdir()) / "dask-semdedup-end-to-end"
OURS = "ours, files to scores in files"
BAR_RATIO, BAR_GB = 2.5, 1.4


def make_data(root: Path) -> Path:
    """Write the files, unless an earlier run has; the folder of the k-means layout."""
    layout = root / f"{CLUSTERS}x{FILES}x{ROWS}x{WIDTH}"
    if layout.exists():
        return layout
    unfinished = root / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    rng = np.random.default_rng(0)
    for cluster in range(CLUSTERS):
        folder = unfinished / f"centroid={cluster}"
        folder.mkdir(parents=True)
        rows = cluster_rows(rng, FILES * ROWS)
        for file in range(FILES):
            first = file * ROWS
            table = as_table(rows[first : first + ROWS], rows.mean(axis=0), cluster * FILES * ROWS + first)
            pq.write_table(table, folder / f"part.{file}.parquet")
    unfinished.rename(layout)
    return layout


def cluster_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    """Unit rows around a random unit centroid."""
    rows = rng.standard_normal(WIDTH, dtype=np.float32) + rng.standard_normal((n, WIDTH), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def as_table(rows: np.ndarray, mean: np.ndarray, first_id: int) -> pa.Table:
    """What k-means writes: ids, embeddings and the distances to the centroid."""
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


METHODS: dict[str, Callable[[Path], object]] = {
    "pyarrow, dataset.to_table": read_dataset,
    "pyarrow, file by file": read_files,
    OURS: files_to_scores,
}


def interleaved(layout: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each method's runs, the methods taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(repeats + 1):
        for name, method in METHODS.items():
            start = time.perf_counter()
            method(layout)
            if turn:  # The first turn warms up.
                seconds[name].append(time.perf_counter() - start)
    return seconds


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


def measure_peak(data: Path) -> float:
    """Gigabytes that one run of ours takes in a fresh process."""
    command = [sys.executable, __file__, "--data", str(data), "--only-peak"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def as_rich_table(medians: Mapping[str, float], reading: float) -> Table:
    """The medians, and their ratios to the faster way of only reading."""
    table = Table(
        title=f"{CLUSTERS * FILES * ROWS:,} x {WIDTH} float32 in {CLUSTERS} clusters of {FILES} files",
        title_justify="left",
    )
    table.add_column("method")
    for column in ("ms", "times reading alone"):
        table.add_column(column, justify="right")
    for name, seconds in medians.items():
        table.add_row(name, f"{1e3 * seconds:,.0f}", f"{seconds / reading:.2f}")
    return table


@click.command()
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DATA,
    show_default=True,
    help="Folder for the files, which are made once.",
)
@click.option("--repeats", default=5, show_default=True, help="Timed turns.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here too."
)
@click.option("--only-peak", is_flag=True, hidden=True, help="Run ours once and print its peak memory.")
def main(data: Path, repeats: int, json_path: Path | None, only_peak: bool) -> None:
    """Compare files to scores with only reading the files."""
    layout = make_data(data)
    if only_peak:
        files_to_scores(layout)
        print(peak_gigabytes())
        return
    peak = measure_peak(data)
    seconds = interleaved(layout, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    reading = min(median for name, median in medians.items() if name != OURS)
    ratio = medians[OURS] / reading
    console = Console(width=120)
    console.print(as_rich_table(medians, reading))
    console.print(f"ours: {ratio:.2f} times reading alone (bar {BAR_RATIO}), peak {peak:.2f} GB (bar {BAR_GB})")
    if json_path:
        results = {"seconds": seconds, "medians": medians, "ratio": ratio, "peak_gb": peak}
        json_path.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
