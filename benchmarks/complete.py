"""Every duplicate of a frame, by sketches and cells, against one exact search of all rows: time, memory, recall.

    python benchmarks/complete.py --rows 40000 --data debian
    python benchmarks/complete.py --rows 200000 --repeats 1
    python benchmarks/complete.py --rows 1000000 --no-exact
    python benchmarks/complete.py --rows 10000000 --data spectrum --no-exact --backend cudf
    python benchmarks/complete.py --rows 400000 --data spectrum --no-exact --workers 1 --workers 4

Both go from Parquet files to the ids of the rows that are dropped, each in a process of its own, in turns. The exact
search multiplies whole rows, all with all, as one cluster is searched that holds them; its duplicates are what recall
is measured by. Rows with smaller ids are preferred. With cuDF, an untimed run comes first: CUDA, RAPIDS and the kernels
take seconds to start. Dask's workers first compare few rows. They have one thread each, and no GPU.

Data are the descriptions of Debian's packages (at most 40,000); or, with near-copies, mixtures of the sentence
embeddings of `examples/data`, or rows with the spectrum of such, which need no model: `search_data`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from real_data import DEFAULT_DATA, ensure_data
from rich.console import Console
from rich.table import Table
from search_data import real_like_rows, text_rows

WIDTH = 384
ROWS_A_FILE = 16_384


def make_files(folder: Path, n: int, data: str) -> None:
    """Write the rows to Parquet files unless they are there."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    if data == "debian":
        table = pq.read_table(ensure_data(DEFAULT_DATA), columns=["embeddings"])[:n]
        table = table.add_column(0, "id", pa.array(np.arange(len(table))))
    else:
        torch.manual_seed(0)
        make = text_rows if data == "mixtures" else real_like_rows
        values = make(n, WIDTH, "cpu").numpy().ravel()
        offsets = pa.array(np.arange(0, len(values) + 1, WIDTH, dtype=np.int64))
        table = pa.table({"id": np.arange(n), "embeddings": pa.LargeListArray.from_arrays(offsets, pa.array(values))})
    for number, start in enumerate(range(0, len(table), ROWS_A_FILE)):
        pq.write_table(table.slice(start, ROWS_A_FILE), folder / f"{number:05}.parquet")


def run_once(folder: Path, way: str, eps: float, duplicate_of: str, scheduler: str, backend: str) -> dict[str, float]:
    """Find the rows to drop, in this process or from it."""
    import dask

    import dask_semdedup

    start = time.perf_counter()
    ddf = dask_semdedup.read_table(folder, backend=backend)
    options: dict[str, Any] = {"ranking_strategy": dask_semdedup.RankingStrategy(["id"])}
    if "workers" in way:
        options["device"] = "cpu"
    with dask.config.set(scheduler=scheduler):
        if way == "exact":
            whole = ddf.assign(centroid=0).repartition(npartitions=1)
            scores = whole.semdedup.pairwise(**options).compute()
            found = scores[scores["cosine_sim_score"] >= np.float32(1 - eps)]
        else:
            found = ddf.semdedup.pairwise(eps=eps, cluster_field=None, duplicate_of=duplicate_of, **options).compute()
    seconds = time.perf_counter() - start
    found.to_parquet(folder.with_suffix(f".{way}.result"))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "gigabytes": kilobytes / 1e6, "dropped": len(found)}


def run_on_workers(folder: Path, way: str, eps: float, duplicate_of: str) -> dict[str, float]:
    """Find the rows to drop on as many workers as `way` begins with, without GPUs."""
    from distributed import Client, LocalCluster

    with (
        TemporaryDirectory() as few,
        LocalCluster(n_workers=int(way.split()[0]), threads_per_worker=1, memory_limit=0) as cluster,
    ):
        make_files(Path(few) / "rows", 40_000, "spectrum")
        with Client(cluster):
            arguments = way, eps, duplicate_of, "distributed", "pandas"
            run_once(Path(few) / "rows", *arguments)
            return run_once(folder, *arguments)


@click.command()
@click.option("--rows", type=click.IntRange(1), default=40_000, show_default=True)
@click.option("--data", type=click.Choice(["mixtures", "debian", "spectrum"]), default="mixtures", show_default=True)
@click.option("--eps", type=click.FloatRange(0, 1), default=0.05, show_default=True)
@click.option("--duplicate-of", type=click.Choice(["any", "kept"]), default="any", show_default=True)
@click.option("--exact/--no-exact", default=True, help="Run the exact search as well.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--scheduler", default="threads", show_default=True)
@click.option("--backend", type=click.Choice(["pandas", "cudf"]), default="pandas", show_default=True)
@click.option("--workers", type=click.IntRange(1), multiple=True, help="Dask workers on the CPU, each number in turn.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("~/.cache/dask-semdedup"), show_default=True)
@click.option("--way", hidden=True)
def main(
    rows: int,
    data: str,
    eps: float,
    duplicate_of: str,
    exact: bool,
    repeats: int,
    scheduler: str,
    backend: str,
    workers: tuple[int, ...],
    folder: Path,
    way: str | None,
) -> None:
    """Measure the complete comparison."""
    folder = folder.expanduser() / f"{data}-{rows}"
    if way and "workers" in way:
        print(json.dumps(run_on_workers(folder, way, eps, duplicate_of)))
        return
    if way:
        arguments = folder, way, eps, duplicate_of, scheduler, backend
        if backend == "cudf":
            run_once(*arguments)
        print(json.dumps(run_once(*arguments)))
        return
    make_files(folder, rows, data)
    ways = [f"{number} workers" for number in workers] or ["complete"]
    ways += ["exact"] if exact else []
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name in ways:
            out = subprocess.run([sys.executable, *sys.argv, "--way", name], check=True, capture_output=True, text=True)
            results[name].append(json.loads(out.stdout.splitlines()[-1]))
    table = Table(title=f"{rows:,} x {WIDTH} {data}, eps = {eps}, duplicate of {duplicate_of}", title_justify="left")
    for column in ("", "seconds", "of the exact search", "GB", "dropped", "missed", "extra"):
        table.add_column(column, justify="right")
    medians = {name: float(np.median([one["seconds"] for one in runs])) for name, runs in results.items()}
    found = {name: set(pd.read_parquet(folder.with_suffix(f".{name}.result"))["id"]) for name in ways}
    for name, runs in results.items():
        ratio, missed, extra = "", "", ""
        if exact and duplicate_of == "any":
            missed, extra = (str(len(ids)) for ids in (found["exact"] - found[name], found[name] - found["exact"]))
        if exact:
            ratio = f"1/{medians['exact'] / medians[name]:.1f}"
        most = max(one["gigabytes"] for one in runs)
        table.add_row(name, f"{medians[name]:.2f}", ratio, f"{most:.2f}", f"{len(found[name]):,}", missed, extra)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
