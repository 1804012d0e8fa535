"""The cases of `end_to_end_cuda.py` and `end_to_end_gpus.py`, the files they are made of, and a log of the stages.

A few distinct files stand in for all clusters, under hard links, so that they are made quickly and stay in the page
cache. They are written as pyarrow writes by default (snappy, pages of 1 MB), without dictionaries.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BACKENDS = {"cpu": "pandas", "cuda": "cudf"}
SKEW, ALL = "skew", "all"
SOURCES = "sources"
# Rows that a thread fills at once.
STEP = 8192
# Seconds after which a stage is taken to be stuck: the stacks of all threads are printed, and again after as many.
STUCK = 60
# Seconds that a process has to end once it has been told to.
ENDING = 20


@dataclass(frozen=True)
class Case:
    """Clusters of one size, a file each.

    `bar` is of ours in milliseconds a cluster, and `settings` are the ways of only reading that are tried: files a
    call, calls at once.
    """

    name: str
    clusters: int
    rows: int
    width: int
    distinct: int
    bar: float | None
    settings: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"{self.clusters:,} clusters of {self.rows:,} x {self.width}"

    def limited(self, clusters: int | None, rows: int | None) -> Case:
        """A smaller case: at most so many clusters, and rows in each. The bar is for clusters of the full size."""
        return replace(
            self,
            clusters=min(self.clusters, clusters or self.clusters),
            rows=min(self.rows, rows or self.rows),
            bar=self.bar if rows is None or rows >= self.rows else None,
        )


CASES = {
    case.name: case
    for case in (
        Case("large", 24, 66_000, 1536, 1, 28, ((4, 1), (4, 2), (2, 4), (1, 4))),
        Case("medium", 3000, 2000, 384, 8, 0.45, ((400, 4), (400, 2), (200, 4), (100, 8))),
        Case("small", 20_000, 200, 384, 8, 0.15, ((400, 4), (400, 2), (1000, 4), (200, 8))),
    )
}


@dataclass(frozen=True)
class Skew:
    """One oversized cluster among many small ones of the same width."""

    clusters: int = 500
    rows: int = 4_000
    oversized: int = 400_000
    width: int = 768

    def __str__(self) -> str:
        return f"one cluster of {self.oversized:,} x {self.width} among {self.clusters:,} of {self.rows:,}"

    def limited(self, clusters: int | None, rows: int | None) -> Skew:
        """A smaller case: the ratio of the oversized cluster to the small ones stays the same."""
        fewer = min(self.rows, rows or self.rows)
        return replace(
            self,
            clusters=min(self.clusters, clusters or self.clusters),
            rows=fewer,
            oversized=self.oversized * fewer // self.rows,
        )


@dataclass(frozen=True)
class Options:
    """Options of a run."""

    device: str
    data: Path
    repeats: int
    breakdown: bool
    json_path: Path | None
    cases: Sequence[str]
    limit_clusters: int | None
    limit_rows: int | None
    partition_size: str | None
    gpus: int
    threads_per_gpu: int
    scheduler: str
    trace: Path | None
    time_limit: float

    def names(self, known: Iterable[str]) -> list[str]:
        """The chosen ones of the known cases."""
        return [name for name in known if not self.cases or name in self.cases or ALL in self.cases]


def case_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `Options` beyond those of `end_to_end.py` itself."""
    options = [
        click.option(
            "--case",
            "cases",
            multiple=True,
            type=click.Choice([*CASES, SKEW, ALL]),
            help="A case of end_to_end_cuda.py; several may be given.",
        ),
        click.option("--limit-clusters", type=int, help="Maximum number of clusters in a case."),
        click.option("--limit-rows", type=int, help="Maximum number of rows in a cluster."),
        click.option("--partition-size", help="Partition size of ours: see read_clusters."),
        click.option("--gpus", default=0, help="Compare this many workers, a GPU each, with one: end_to_end_gpus.py."),
        click.option("--threads-per-gpu", default=4, show_default=True, help="Threads of each worker."),
        click.option(
            "--scheduler",
            type=click.Choice(["local", "separate"]),
            default="local",
            show_default=True,
            help="Workers of a cluster object, or of `dask scheduler` and `dask cuda worker` processes.",
        ),
        click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), help="Write the timelines here."),
        click.option("--time-limit", default=540, show_default=True, help="Seconds after which the run gives up."),
    ]
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


class Log:
    """Prints each stage before it begins, and how long it took."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._began:6.1f} s] {text}", flush=True)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Announce the body and time it; if it takes too long, print the stacks of all threads."""
        print(f"[{time.perf_counter() - self._began:6.1f} s] {text} ...", end="", flush=True)
        faulthandler.dump_traceback_later(STUCK, repeat=True)
        start, how = time.perf_counter(), "failed after"
        try:
            yield
            how = "took"
        finally:
            faulthandler.cancel_dump_traceback_later()
            print(f" {how} {time.perf_counter() - start:.3f} s", flush=True)


@contextmanager
def limited_to(seconds: float) -> Iterator[None]:
    """End the process if the body takes longer, and print the stacks of all threads."""

    def end() -> None:
        print(f"\nover the limit of {seconds:g} s: giving up", flush=True)
        faulthandler.dump_traceback(all_threads=True)
        # The main thread may still have processes to end, but not for long.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ENDING)
        os._exit(3)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def make_case(case: Case, root: Path, log: Log) -> Path:
    """The files of a case in the layout of k-means, made unless an earlier run has."""
    with log.stage(f"{case.name}: making {case}, {case.distinct} distinct files"):
        files = [make_file(root, case.rows, case.width, seed) for seed in range(case.distinct)]
        links = [files[cluster % case.distinct] for cluster in range(case.clusters)]
        layout = link(root / f"{case.clusters}x{case.rows}x{case.width}", links)
    with log.stage(f"{case.name}: filling the page cache"):
        fill_cache(files)
    return layout


def make_skew(case: Skew, root: Path, log: Log) -> tuple[Path, Path]:
    """The layout of all clusters, and the folder of the oversized one in the middle."""
    with log.stage(f"skew: making {case}"):
        oversized = make_file(root, case.oversized, case.width, seed=0, row_group=max(1, case.oversized // 8))
        small = [make_file(root, case.rows, case.width, seed) for seed in range(1, 5)]
        links = [small[cluster % len(small)] for cluster in range(case.clusters)]
        middle = len(links) // 2
        links.insert(middle, oversized)
        layout = link(root / f"skew-{case.clusters}x{case.rows}-{case.oversized}x{case.width}", links)
    with log.stage("skew: filling the page cache"):
        fill_cache([oversized, *small])
    return layout, layout / f"centroid={middle}"


def make_file(root: Path, rows: int, width: int, seed: int, row_group: int | None = None) -> Path:
    """A file of random unit rows, written unless it is there."""
    path = root / SOURCES / f"{rows}x{width}-{seed}.parquet"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    offsets = np.arange(rows + 1, dtype=np.int32) * width
    table = pa.table(
        {
            "id": np.arange(rows),
            "embeddings": pa.ListArray.from_arrays(offsets, random_rows(rows, width, seed).ravel()),
            "cosine_dist_to_cent": np.random.default_rng(seed).random(rows),
        }
    )
    unfinished = path.with_suffix(".unfinished")
    pq.write_table(table, unfinished, use_dictionary=False, row_group_size=row_group)
    return unfinished.rename(path)


def random_rows(rows: int, width: int, seed: int) -> np.ndarray:
    """Unit rows without structure, made by all cores."""
    filled = np.empty((rows, width), dtype=np.float32)

    def fill(start: int) -> None:
        part = filled[start : start + STEP]
        np.random.default_rng([seed, start]).standard_normal(out=part, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, rows, STEP)))
    return filled


def link(layout: Path, files: Sequence[Path]) -> Path:
    """The layout of k-means with a file for each cluster, made of hard links unless it is there."""
    if layout.exists():
        return layout
    unfinished = layout.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for cluster, file in enumerate(files):
        folder = unfinished / f"centroid={cluster}"
        folder.mkdir(parents=True)
        os.link(file, folder / "part.0.parquet")
    return unfinished.rename(layout)


def fill_cache(files: Sequence[Path]) -> None:
    """Read all bytes of the files once."""
    for file in files:
        with file.open("rb") as handle:
            while handle.read(1 << 24):
                pass
