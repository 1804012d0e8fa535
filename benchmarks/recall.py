"""Recall and time of clustered runs on real embeddings: the share of true duplicates that they find.

    python benchmarks/recall.py
    python benchmarks/recall.py --n-clusters 20 --n-clusters 200 --json recall.json

A row is a true duplicate if, among all rows preferred over it, in whatever cluster, one is at least 1 - eps similar; it
is found if the clustered run says so of it, too. Rows are preferred by their ids, which no clustering changes. The time
is that from the Parquet file to scores, the fit included.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
from real_data import DEFAULT_DATA, Truth, ensure_data, read_rows
from rich.console import Console
from rich.table import Table

from dask_semdedup import RankingStrategy
from dask_semdedup.steps.fit import default_n_clusters

EPS = (0.05, 0.1, 0.2)
N_CLUSTERS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass
class Result:
    """One line of the table."""

    n_clusters: int
    seconds: float
    recall: dict[float, float]


def clustered_scores(path: Path, n_clusters: int) -> pd.DataFrame:
    """From the file to the scores of all rows."""
    embeddings = dd.read_parquet(path, columns=["id", "embeddings"], dtype_backend="pyarrow")
    clustered = embeddings.semdedup.kmeans(n_clusters)
    with dask.config.set(scheduler="threads"):
        return clustered.semdedup.pairwise(ranking_strategy=RankingStrategy(["id"])).compute()


def measure(path: Path, n_clusters: int, truth: Truth) -> Result:
    """Run once, and count what is found."""
    start = time.perf_counter()
    scores = clustered_scores(path, n_clusters)
    seconds = time.perf_counter() - start
    found = {eps: scores["id"][scores["cosine_sim_score"] >= 1 - eps].to_numpy() for eps in EPS}
    return Result(n_clusters, seconds, {eps: truth.recall(ids, eps) for eps, ids in found.items()})


def as_table(results: list[Result], truth: Truth, width: int) -> Table:
    """The results as a table."""
    n_rows = len(truth.ids)
    table = Table(title=f"{n_rows:,} x {width}, descriptions of Debian's packages", title_justify="left")
    for column in ("n_clusters", "seconds", *(f"found at eps={eps}" for eps in EPS)):
        table.add_column(column, justify="right")
    for result in results:
        default = " (default)" if result.n_clusters == default_n_clusters(n_rows) else ""
        cells = f"{result.n_clusters:,}{default}", f"{result.seconds:.2f}"
        table.add_row(*cells, *(f"{recall:.4f}" for recall in result.recall.values()))
    table.add_section()
    table.add_row("true duplicates", "", *(f"{len(truth.duplicates(eps)):,}" for eps in EPS))
    return table


@click.command()
@click.option("--data", type=click.Path(dir_okay=False, path_type=Path), default=DEFAULT_DATA, show_default=True)
@click.option("--n-clusters", "numbers", multiple=True, type=click.IntRange(min=1), help="Several may be given.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to this file too."
)
def main(data: Path, numbers: tuple[int, ...], json_path: Path | None) -> None:
    """Measure the recall of clustered runs."""
    ids, rows = read_rows(ensure_data(data))
    console = Console(width=120)
    start = time.perf_counter()
    truth = Truth.of(ids, rows)
    console.print(f"exact search without clusters: {time.perf_counter() - start:.2f} s")
    numbers = numbers or tuple(np.unique([*N_CLUSTERS, default_n_clusters(len(ids))]).tolist())
    clustered_scores(data, numbers[0])  # What a first run loads is not the clustering's.
    results = [measure(data, n_clusters, truth) for n_clusters in numbers]
    console.print(as_table(results, truth, rows.shape[1]))
    if json_path:
        json_path.write_text(json.dumps([asdict(result) for result in results], indent=2))


if __name__ == "__main__":
    main()
