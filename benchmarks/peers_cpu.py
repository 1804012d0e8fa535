"""From one raw Parquet file of real embeddings to duplicates on a CPU, ours and other libraries.

    python benchmarks/peers_cpu.py
    python benchmarks/peers_cpu.py --repeats 3 --json peers.json

All methods take turns in one process, so that a noisy machine disturbs them alike; the table gives medians. Each reads
the file itself: ours compares all rows with all others, without clusters; faiss searches all rows with
`IndexFlatIP.range_search`, exactly; SemHash, where it is installed, takes the embeddings with `from_embeddings` and
selects with `self_deduplicate`, with its default backend. All prefer rows with smaller ids.

A true duplicate is a row that is at least 1 - eps similar to any row preferred over it, whether or not that one is a
duplicate itself. SemHash compares with the rows that it keeps alone, so that it keeps some of these by design.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click
import dask
import faiss
import numpy as np
from real_data import DEFAULT_DATA, Truth, ensure_data, read_rows
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_info

import dask_semdedup
from dask_semdedup import RankingStrategy

OURS = f"ours {version('dask-semdedup')}"
FAISS = f"faiss-cpu {version('faiss-cpu')}, IndexFlatIP.range_search"
BAR_SPEED = 3
BAR_RECALL = 0.985

Method = Callable[[Path, float], np.ndarray]


def ours(path: Path, eps: float) -> np.ndarray:
    """Compare all rows, by Dask's threads."""
    with dask.config.set(scheduler="threads"):
        embeddings = dask_semdedup.read_table(path, ["id", "embeddings"])
        duplicates = embeddings.semdedup.pairwise(eps=eps, cluster_field=None, ranking_strategy=RankingStrategy(["id"]))
        return duplicates["id"].compute().to_numpy()


def range_search(path: Path, eps: float) -> np.ndarray:
    """Find all pairs, and select the later row of each."""
    ids, rows = read_rows(path)
    rows = rows.copy()
    faiss.normalize_L2(rows)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    limits, _, neighbours = index.range_search(rows, 1 - eps)
    queries = np.repeat(np.arange(len(rows)), np.diff(limits.astype(np.int64)))
    return ids[np.unique(queries[ids[neighbours] < ids[queries]])]


def self_deduplicate(path: Path, eps: float) -> np.ndarray:
    """The ids stand for the records: they are strings, all different."""
    from semhash import SemHash

    ids, rows = read_rows(path)
    result = SemHash.from_embeddings(rows, ids.tolist(), model=None).self_deduplicate(threshold=1 - eps)
    return np.array([duplicate.record for duplicate in result.filtered])


METHODS: dict[str, Method] = {
    OURS: ours,
    FAISS: range_search,
}
if find_spec("semhash"):
    METHODS[f"SemHash {version('semhash')}, self_deduplicate"] = self_deduplicate


@dataclass
class Result:
    """One line of the table."""

    method: str
    seconds: list[float]
    median: float
    recall: float
    wrong: int


def interleaved(path: Path, eps: float, repeats: int) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Seconds of each method's runs, the methods taking turns, and what each found."""
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    found: dict[str, np.ndarray] = {}
    for turn in range(repeats + 1):
        for name, method in METHODS.items():
            start = time.perf_counter()
            found[name] = method(path, eps)
            if turn:  # The first turn warms up.
                seconds[name].append(time.perf_counter() - start)
    return seconds, found


def compare(path: Path, eps: float, repeats: int, truth: Truth) -> list[Result]:
    """Time all methods, and count what they find."""
    seconds, found = interleaved(path, eps, repeats)
    true = truth.duplicates(eps)
    return [
        Result(
            name,
            times,
            statistics.median(times),
            truth.recall(found[name], eps),
            int(np.isin(found[name], true, invert=True).sum()),
        )
        for name, times in seconds.items()
    ]


def as_table(results: list[Result], shape: tuple[int, ...], true: int, eps: float) -> Table:
    """The results as a table."""
    title = f"{shape[0]:,} x {shape[1]}, eps = {eps}: {true:,} true duplicates"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in ("seconds", "times ours", "recall", "wrong"):
        table.add_column(column, justify="right")
    for r in results:
        ratio = r.median / results[0].median
        table.add_row(r.method, f"{r.median:.2f}", f"{ratio:.2f}", f"{r.recall:.4f}", f"{r.wrong:,}")
    return table


@click.command()
@click.option("--data", type=click.Path(dir_okay=False, path_type=Path), default=DEFAULT_DATA, show_default=True)
@click.option("--eps", default=0.05, show_default=True)
@click.option("--repeats", default=5, show_default=True, help="Timed turns.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to this file too."
)
def main(data: Path, eps: float, repeats: int, json_path: Path | None) -> None:
    """Compare ours with its peers."""
    ids, rows = read_rows(ensure_data(data))
    truth = Truth.of(ids, rows)
    results = compare(data, eps, repeats, truth)
    console = Console(width=120)
    console.print(as_table(results, rows.shape, len(truth.duplicates(eps)), eps))
    own, *peers = results
    speed = min(peer.median for peer in peers) / own.median
    console.print(
        f"{speed:.2f} times faster than the faster peer (bar {BAR_SPEED}); recall {own.recall:.4f} "
        f"(bar {BAR_RECALL}); {faiss.omp_get_max_threads()} threads"
    )
    # The OpenBLAS that comes with faiss may not know the processor: then OPENBLAS_CORETYPE should name a kernel for it.
    kernels = {info["architecture"] for info in threadpool_info() if info["internal_api"] == "openblas"}
    console.print(f"kernels of OpenBLAS: {', '.join(sorted(kernels))}")
    if json_path:
        json_path.write_text(json.dumps([asdict(result) for result in results], indent=2))


if __name__ == "__main__":
    main()
