"""Time the nearest-earlier search against the searches it replaces, and count their wrong neighbours.

    python benchmarks/search.py --device cpu

All methods are timed in turns in one process, so that a noisy machine disturbs them alike; the table gives medians.
A neighbour is wrong if its similarity in float64 is below the best by more than 1e-9; a decision is wrong if it differs
from float64's at the threshold 1 - eps.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import click
import torch
from rich.console import Console
from rich.table import Table

from dask_semdedup.search import half_dtype, nearest_earlier

Answer = tuple[torch.Tensor, torch.Tensor]
Search = Callable[[torch.Tensor], Answer]

EPS = 0.01
TOLERANCE = 1e-9


def full_matrix(rows: torch.Tensor, batch: int = 1024) -> Answer:
    """The original SemDeDup search: every row by every batch in float32, the upper triangle of the product kept."""
    n = len(rows)
    scores, index = [], []
    for start in range(0, n, batch):
        queries = rows[start : start + batch]
        product = torch.mm(rows, queries.T)
        product = torch.triu(product, diagonal=1 - start)
        best, where = product.max(dim=0)
        scores.append(best)
        index.append(where)
    return torch.cat(scores), torch.cat(index)


def triangle(rows: torch.Tensor, batch: int = 1024, dtype: torch.dtype = torch.float32) -> Answer:
    """Each batch of queries by the rows up to its end, in `dtype`."""
    rows = rows.to(dtype)
    n = len(rows)
    scores, index = [], []
    for start in range(0, n, batch):
        stop = min(start + batch, n)
        product = torch.mm(rows[start:stop], rows[:stop].T)
        product[:, start:].masked_fill_(torch.ones_like(product[:, start:], dtype=torch.bool).triu_(), -torch.inf)
        best, where = product.max(dim=1)
        scores.append(best.float())
        index.append(where)
    scores[0][0], index[0][0] = 0.0, 0
    return torch.cat(scores), torch.cat(index)


def blocked_triangle(rows: torch.Tensor, dtype: torch.dtype, queries: int = 512, candidates: int = 2048) -> Answer:
    """The triangle in blocks of `queries` by `candidates`, a running maximum kept: no wide product is stored."""
    rows = rows.to(dtype)
    n = len(rows)
    scores = torch.full((n,), -torch.inf, device=rows.device)
    index = torch.arange(n, device=rows.device)
    for start in range(0, n, queries):
        stop = min(start + queries, n)
        for first in range(0, stop, candidates):
            last = min(first + candidates, stop)
            product = torch.mm(rows[start:stop], rows[first:last].T)
            if last > start:
                later = (
                    torch.arange(first, last, device=rows.device)
                    >= torch.arange(start, stop, device=rows.device)[:, None]
                )
                product.masked_fill_(later, -torch.inf)
            best, where = product.max(dim=1)
            better = best.float() > scores[start:stop]
            scores[start:stop] = torch.where(better, best.float(), scores[start:stop])
            index[start:stop] = torch.where(better, first + where, index[start:stop])
    scores[0] = 0.0
    return scores, index


def ours(rows: torch.Tensor, compute_dtype: str = "auto") -> Answer:
    """`nearest_earlier` on one segment."""
    return nearest_earlier(rows, torch.tensor([0, len(rows)]), compute_dtype=compute_dtype)


def float64_scores(rows: torch.Tensor, index: torch.Tensor | None = None, batch: int = 512) -> torch.Tensor:
    """Similarities in float64 of each row to the row at `index`, or to its nearest earlier row."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    if index is not None:
        return (unit * unit[index]).sum(dim=1)
    best = torch.zeros(len(unit), dtype=torch.float64, device=rows.device)
    for start in range(0, len(unit), batch):
        stop = min(start + batch, len(unit))
        product = unit[:stop] @ unit[start:stop].T
        later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=rows.device).tril_()
        product[start:].masked_fill_(later, -torch.inf)
        best[start:stop] = product.amax(dim=0)
    return best


def random_rows(n: int, d: int, device: str) -> torch.Tensor:
    """Unit rows without structure."""
    return torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=1)


def clustered_rows(n: int, d: int, device: str) -> torch.Tensor:
    """Unit rows around one centroid per 100 rows, one in five a near-duplicate of another."""
    centres = torch.randn(max(1, n // 100), d, device=device)
    rows = centres[torch.randint(len(centres), (n,), device=device)] + 0.5 * torch.randn(n, d, device=device)
    copies = torch.randperm(n, device=device)[: n // 5]
    rows[copies] = rows[torch.randint(n, (len(copies),), device=device)]
    rows[copies] += 0.05 * torch.randn(len(copies), d, device=device)
    return torch.nn.functional.normalize(rows, dim=1)


def adversarial_rows(n: int, d: int, device: str) -> torch.Tensor:
    """Unit rows in groups of 8 whose similarities differ by less than 1e-4: half precision cannot tell them apart."""
    rows = torch.nn.functional.normalize(torch.randn(max(1, n // 8), d, device=device), dim=1)
    rows = rows.repeat_interleave(8, dim=0)
    rows = torch.cat([rows, rows[: n - len(rows)]])[torch.randperm(n, device=device)]
    return torch.nn.functional.normalize(rows + 0.2 / d**0.5 * 0.03 * torch.randn(n, d, device=device), dim=1)


DATA = {"random": random_rows, "clustered": clustered_rows, "adversarial": adversarial_rows}


@dataclass
class Result:
    """One line of the table."""

    data: str
    n: int
    d: int
    method: str
    milliseconds: float
    speedup: float
    wrong_neighbours: int
    wrong_decisions: int


def methods(device: str) -> dict[str, Search]:
    """The searches to compare; the first is the baseline of the ratios."""
    half = half_dtype(torch.device(device)) or torch.bfloat16
    name = str(half).removeprefix("torch.")
    return {
        "full matrix, float32": full_matrix,
        "triangle, float32": triangle,
        "triangle in blocks, float32": partial(blocked_triangle, dtype=torch.float32),
        f"triangle, {name} (lossy)": partial(triangle, dtype=half),
        f"triangle in blocks, {name} (lossy)": partial(blocked_triangle, dtype=half),
        "ours, exact": ours,
        "ours, float32": partial(ours, compute_dtype="float32"),
        f"ours, {name} (lossy)": partial(ours, compute_dtype=name),
    }


def interleaved(searches: dict[str, Search], rows: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each search, the searches taking turns."""
    times: dict[str, list[float]] = {name: [] for name in searches}
    for turn in range(repeats + 1):
        for name, search in searches.items():
            start = time.perf_counter()
            search(rows)
            if turn:  # The first turn warms up.
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def compare(data: str, n: int, d: int, device: str, repeats: int) -> list[Result]:
    """Time all methods on one data set and count what they get wrong."""
    rows = DATA[data](n, d, device)
    searches = methods(device)
    seconds = interleaved(searches, rows, repeats)
    truth = float64_scores(rows)
    results = []
    for name, search in searches.items():
        score, index = search(rows)
        wrong = float64_scores(rows, index)[1:] < truth[1:] - TOLERANCE
        decisions = (score[1:] >= 1 - EPS) != (truth[1:] >= 1 - EPS)
        speedup = seconds["full matrix, float32"] / seconds[name]
        results.append(Result(data, n, d, name, 1e3 * seconds[name], speedup, int(wrong.sum()), int(decisions.sum())))
    return results


def small_segments(n_segments: int, length: int, d: int, device: str, repeats: int) -> float:
    """Median microseconds a segment of many small segments in one call."""
    rows = random_rows(n_segments * length, d, device)
    segments = torch.arange(0, n_segments * length + 1, length)
    seconds = interleaved({"ours": lambda rows: nearest_earlier(rows, segments)}, rows, repeats)["ours"]
    return 1e6 * seconds / n_segments


def as_table(results: list[Result]) -> Table:
    """The results of one data set as a table."""
    first = results[0]
    table = Table(title=f"{first.n:,} x {first.d}, {first.data}", title_justify="left")
    table.add_column("method")
    for column in ("ms", "times faster", "wrong neighbours", f"wrong decisions at eps={EPS}"):
        table.add_column(column, justify="right")
    for r in results:
        cells = f"{r.milliseconds:,.1f}", f"{r.speedup:.2f}", f"{r.wrong_neighbours:,}", f"{r.wrong_decisions:,}"
        table.add_row(r.method, *cells)
    return table


@click.command()
@click.option("--device", type=click.Choice(["cpu"]), default="cpu", show_default=True)
@click.option(
    "--shape", "shapes", multiple=True, default=("10000x384", "20000x768"), show_default=True, help="ROWSxDIMENSIONS."
)
@click.option(
    "--data", "data_sets", multiple=True, type=click.Choice(list(DATA)), default=tuple(DATA), show_default=True
)
@click.option("--repeats", default=5, show_default=True, help="Timed turns.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the results here too.")
def main(device: str, shapes: tuple[str, ...], data_sets: tuple[str, ...], repeats: int, json_path: str | None) -> None:
    """Compare the searches on one device."""
    torch.manual_seed(0)
    console = Console(width=120)
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    )
    console.print(f"half precision in hardware: {half_dtype(torch.device(device))}")
    results = []
    for shape in shapes:
        n, d = (int(number) for number in shape.split("x"))
        for data in data_sets:
            results.append(compare(data, n, d, device, repeats))
            console.print(as_table(results[-1]))
    microseconds = small_segments(2000, 50, 384, device, repeats)
    console.print(f"2,000 segments of 50 x 384 in one call: {microseconds:.1f} us a segment")
    if json_path:
        lines = [asdict(result) for group in results for result in group]
        with open(json_path, "w") as handle:
            json.dump({"results": lines, "small_segments_us": microseconds}, handle, indent=2)


if __name__ == "__main__":
    main()
