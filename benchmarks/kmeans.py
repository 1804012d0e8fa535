"""Time and memory of the assignment of rows to centroids, ours and scikit-learn's, and rows in the wrong cluster.

    python benchmarks/kmeans.py
    python benchmarks/kmeans.py --shape 100000x384 --clusters 1000 --clusters 50000 --json kmeans.json

Each method runs in a process of its own, one after the other on the same rows, so that its peak of memory is its own.
Ours is what a partition of ``ddf.semdedup.kmeans`` does: rows from a column, normalised, assigned, and their distances
measured in float64, and put into a column again. ``KMeans.predict`` is given unit rows and only assigns. A row is
wrong if in float64 the square of its distance to another centroid is less by more than 1e-6.
"""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

TOLERANCE = 1e-6
CHECKED = 1000


@dataclass
class Result:
    """One line of the table."""

    n: int
    d: int
    clusters: int
    method: str
    seconds: float
    gigaflops: float
    extra_megabytes: float
    wrong: int
    checked: int


def make_data(n: int, d: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of any length around directions, and centroids."""
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((clusters, d), dtype=np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    rows = centroids[rng.integers(clusters, size=n)]
    rows += rng.standard_normal((n, d), dtype=np.float32) / np.float32(d**0.5)
    return rows, centroids * np.float32(0.8)


class Watch(threading.Thread):
    """Records the peak memory of this process, sampled every few milliseconds (Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = self.resident()
        self.ended = threading.Event()

    @staticmethod
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def run(self) -> None:
        while not self.ended.wait(0.003):
            self.most = max(self.most, self.resident())

    def extra(self) -> int:
        self.ended.set()
        self.join()
        return self.most - self.first


def measured(call: Callable[[], np.ndarray], repeats: int) -> tuple[np.ndarray, float, int]:
    """The result of a call, its best time, and its peak of additional memory."""
    watch = Watch()
    watch.start()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        labels = call()
        seconds.append(time.perf_counter() - start)
    return labels, min(seconds), watch.extra()


def run_ours(n: int, d: int, clusters: int, repeats: int) -> Result:
    """A partition of the accessor's frame."""
    from dask_semdedup.frames.columns import Columns
    from dask_semdedup.frames.embeddings import to_embeddings
    from dask_semdedup.steps.kmeans import Centroids, kmeans_partition

    rows, values = make_data(n, d, clusters)
    frame = pd.DataFrame(index=range(n))
    frame["embeddings"] = to_embeddings(rows, frame)
    centroids = Centroids(values)
    assert len(centroids.distinct) == clusters
    kmeans_partition(frame[:100], Centroids(values[:10]), Columns())  # What a first call loads is not the work's.

    def call() -> np.ndarray:
        return kmeans_partition(frame, centroids, Columns())["centroid"].to_numpy()

    return as_result("ours", rows, values, *measured(call, repeats))


def run_sklearn(n: int, d: int, clusters: int, repeats: int) -> Result:
    """``KMeans.predict`` with these centroids."""
    from sklearn.cluster import KMeans

    rows, values = make_data(n, d, clusters)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    model = KMeans(clusters, init=values, n_init=1, max_iter=1).fit(values)
    model.cluster_centers_ = values
    model.predict(rows[:100])
    return as_result("scikit-learn, predict", rows, values, *measured(lambda: model.predict(rows), repeats))


def as_result(
    method: str, rows: np.ndarray, centroids: np.ndarray, labels: np.ndarray, seconds: float, extra: int
) -> Result:
    """A line of the table, some rows checked in float64."""
    checked = np.linspace(0, len(rows) - 1, min(CHECKED, len(rows)), dtype=np.int64)
    unit, own = rows[checked].astype(np.float64), labels[checked]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    wide = centroids.astype(np.float64)
    squares = np.square(wide).sum(axis=1) - 2 * unit @ wide.T
    wrong = int((squares[np.arange(len(own)), own] > squares.min(axis=1) + TOLERANCE).sum())
    (n, d), clusters = rows.shape, len(centroids)
    return Result(n, d, clusters, method, seconds, 2e-9 * n * d * clusters / seconds, extra / 1e6, wrong, len(checked))


def apart(function: Callable[..., Result], *arguments: int) -> Result:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def as_table(results: list[Result]) -> Table:
    """The results for one number of clusters as a table."""
    first = results[0]
    title = f"{first.n:,} x {first.d} rows ({4e-6 * first.n * first.d:,.0f} MB), {first.clusters:,} centroids"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in ("s", "times faster", "GFLOP/s", "extra memory, MB", f"wrong of {first.checked:,}"):
        table.add_column(column, justify="right")
    for r in results:
        cells = (
            f"{r.seconds:.2f}",
            f"{first.seconds / r.seconds:.2f}",
            f"{r.gigaflops:,.0f}",
            f"{r.extra_megabytes:,.0f}",
        )
        table.add_row(r.method, *cells, f"{r.wrong:,}")
    return table


@click.command()
@click.option("--shape", default="100000x384", show_default=True, help="ROWSxDIMENSIONS.")
@click.option("--clusters", "counts", multiple=True, type=int, default=(1000, 50_000), show_default=True)
@click.option("--repeats", default=1, show_default=True, help="Timed calls; the best counts.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the results to this file too.")
def main(shape: str, counts: tuple[int, ...], repeats: int, json_path: str | None) -> None:
    """Compare assignments on this CPU (Linux)."""
    n, d = (int(number) for number in shape.split("x"))
    console = Console(width=120)
    console.print(f"{date.today()}: partitions may take their own size and 128 MB")
    results = []
    for clusters in counts:
        lines = [apart(run, n, d, clusters, repeats) for run in (run_sklearn, run_ours)]
        console.print(as_table(lines))
        results += lines
    if json_path:
        with open(json_path, "w") as handle:
            json.dump({"results": [asdict(result) for result in results]}, handle, indent=2)


if __name__ == "__main__":
    main()
