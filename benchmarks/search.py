"""Time the nearest-earlier search against the searches it replaces, and count their wrong neighbours.

    python benchmarks/search.py --device cpu
    python benchmarks/search.py --device cuda --sweep
    python benchmarks/search.py --memory
    python benchmarks/search.py --device cuda --eps 0.05

All methods are timed in turns in one process, so that a noisy machine disturbs them alike; the table gives medians.
A neighbour is wrong if its similarity in float64 is below the best by more than 1e-9; a decision is wrong if it differs
from float64's at the threshold 1 - eps. With --eps, only duplicates are asked for: see `search_eps`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import click
import search_eps
import torch
from rich.console import Console
from rich.table import Table
from search_baselines import Answer, blocked_triangle, finish, full_matrix, interleaved, matmul, triangle
from search_data import DATA, UnavailableError, random_rows

from dask_semdedup.search import half_dtype, nearest_earlier

Search = Callable[[torch.Tensor], Answer]

EPS = 0.01
TOLERANCE = 1e-9


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


DATA_SETS = ("random", "clustered", "adversarial")
SHAPES = {"cpu": ("10000x384", "20000x768"), "cuda": ("66000x1536", "20000x768", "8800x768")}
SEGMENTS = {"cpu": ((2000, 50, 384),), "cuda": ((1000, 2000, 384), (20000, 100, 384))}
BASELINE = "full matrix, float32"


@dataclass
class Result:
    """One line of the table."""

    data: str
    n: int
    d: int
    method: str
    milliseconds: float
    speedup: float
    teraflops: float
    share_of_matmul: float
    wrong_neighbours: int | None
    wrong_decisions: int | None


def methods(device: str) -> dict[str, Search]:
    """The searches to compare."""
    half = half_dtype(torch.device(device)) or torch.bfloat16
    name = str(half).removeprefix("torch.")
    return {
        BASELINE: full_matrix,
        "triangle, float32": triangle,
        "triangle in blocks, float32": partial(blocked_triangle, dtype=torch.float32),
        f"triangle, {name} (lossy)": partial(triangle, dtype=half),
        f"triangle in blocks, {name} (lossy)": partial(blocked_triangle, dtype=half, **BLOCKS[device]),
        "ours, exact": ours,
        "ours, float32": partial(ours, compute_dtype="float32"),
        f"ours, {name} (lossy)": partial(ours, compute_dtype=name),
    }


BLOCKS = {"cpu": {"queries": 512, "candidates": 2048}, "cuda": {"queries": 4096, "candidates": 4096}}


def compare(data: str, n: int, d: int, device: str, repeats: int) -> list[Result]:
    """Time all methods on one data set and count what they get wrong."""
    rows = DATA[data](n, d, device)
    half = rows.to(half_dtype(torch.device(device)) or torch.bfloat16)
    searches = methods(device)
    calls: dict[str, Callable[[], object]] = {name: partial(search, rows) for name, search in searches.items()}
    calls["matmul in half precision, the whole square"] = partial(matmul, half)
    seconds = interleaved(calls, device, repeats)
    *_, ceiling = seconds.values()
    truth = float64_scores(rows)
    results = []
    for name, taken in seconds.items():
        wrong = decisions = None
        if name in searches:
            score, index = searches[name](rows)
            wrong = int((float64_scores(rows, index)[1:] < truth[1:] - TOLERANCE).sum())
            decisions = int(((score[1:] >= 1 - EPS) != (truth[1:] >= 1 - EPS)).sum())
        work = n * n * d * (1 if name in searches else 2)  # The triangle, or the square.
        rate, most = work / taken, 2 * n * n * d / ceiling
        speedup = seconds[BASELINE] / taken
        results.append(Result(data, n, d, name, 1e3 * taken, speedup, rate / 1e12, rate / most, wrong, decisions))
    return results


def many_segments(n_segments: int, length: int, d: int, device: str, repeats: int) -> float:
    """Median microseconds a segment of many segments of one length in one call."""
    rows = random_rows(n_segments * length, d, device)
    segments = torch.arange(0, n_segments * length + 1, length)
    seconds = interleaved({"ours": partial(nearest_earlier, rows, segments)}, device, repeats)["ours"]
    return 1e6 * seconds / n_segments


def resident_bytes(field: str) -> int:
    """Resident memory of this process, on Linux: "VmRSS" that of now, "VmHWM" the most it ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def extra_memory(n: int, d: int) -> tuple[int, int]:
    """Bytes of the rows, and the most that one search on the CPU takes beyond them; for a process that did nothing."""
    rows = torch.randn(n, d)
    for part in rows.split(1024):
        part.div_(part.norm(dim=1, keepdim=True))
    ours(rows[:1024])  # What a first search loads is not the search's.
    before = resident_bytes("VmRSS")
    ours(rows)
    return rows.nbytes, resident_bytes("VmHWM") - before


def as_table(results: list[Result]) -> Table:
    """The results of one data set as a table."""
    first = results[0]
    table = Table(title=f"{first.n:,} x {first.d}, {first.data}", title_justify="left")
    table.add_column("method")
    columns = "ms", "times faster", "TFLOP/s", "of matmul", "wrong neighbours", f"wrong at eps={EPS}"
    for column in columns:
        table.add_column(column, justify="right")
    for r in results:
        counts = ("" if count is None else f"{count:,}" for count in (r.wrong_neighbours, r.wrong_decisions))
        cells = f"{r.milliseconds:,.2f}", f"{r.speedup:.2f}", f"{r.teraflops:.3g}", f"{r.share_of_matmul:.0%}"
        table.add_row(r.method, *cells, *counts)
    return table


def sweep(device: str, repeats: int) -> Table:
    """Time the exact search over widths and sizes, with the roofline: the product, and the rows read and written."""
    table = Table(title="exact search, random rows: no cliff", title_justify="left")
    for column in ("n", "d", "ms", "roofline, ms", "ratio", "extra memory, MB", "allowed, MB"):
        table.add_column(column, justify="right")
    copy = torch.empty(1 << 28, device=device)
    bandwidth = 2 * copy.nbytes / interleaved({"copy": copy.clone}, device, repeats)["copy"]
    del copy
    for d in (100, 384, 768, 1024, 1536, 4096):
        half = random_rows(16384, d, device).to(torch.float16)
        rate = 2 * len(half) ** 2 * d / interleaved({"matmul": partial(matmul, half)}, device, repeats)["matmul"]
        for n in (1, 1000, 10_000, 30_000, 100_000, 300_000):
            rows = random_rows(n, d, device)
            finish(device)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ours(rows)
            extra = torch.cuda.max_memory_allocated() - before
            seconds = interleaved({"ours": partial(ours, rows)}, device, 2 if n > 100_000 else repeats)["ours"]
            roofline = max(n * n * d / rate, 1.5 * rows.nbytes / bandwidth)
            cells = f"{1e3 * seconds:.3f}", f"{1e3 * roofline:.3f}", f"{seconds / roofline:.2f}"
            allowed = 0.6 * rows.nbytes + 256e6
            table.add_row(f"{n:,}", str(d), *cells, f"{extra / 1e6:,.0f}", f"{allowed / 1e6:,.0f}")
    return table


def machine(device: str) -> str:
    """The machine and the versions."""
    half = half_dtype(torch.device(device))
    if device == "cuda":
        import triton

        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, {half}"
    processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, half precision: {half}"


def compare_at_eps(
    shapes: tuple[str, ...], data_sets: tuple[str, ...], device: str, eps: float, repeats: int, console: Console
) -> list[search_eps.Result]:
    """Compare the searches at eps, and print a table for each data set."""
    results = []
    for shape in shapes or search_eps.SHAPES[device]:
        for data in data_sets or search_eps.data_sets_of(shape):
            try:
                found = search_eps.compare(data, shape, device, eps, repeats)
            except UnavailableError as error:
                console.print(f"{shape}, {data}: skipped, {error.message}")
                continue
            console.print(search_eps.as_table(found, eps))
            results += found
    return results


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    help="ROWSxDIMENSIONS; several may be given. With --eps also SEGMENTSxROWSxDIMENSIONS.",
)
@click.option("--data", "data_sets", multiple=True, type=click.Choice(list(DATA)), help="Several may be given.")
@click.option("--repeats", default=5, show_default=True, help="Timed turns.")
@click.option("--sweep", "with_sweep", is_flag=True, help="Also time many sizes and widths (CUDA).")
@click.option("--memory", is_flag=True, help="Only measure the memory of one search on the CPU (Linux).")
@click.option("--eps", type=click.FloatRange(0, 1, max_open=True), help="Compare searches for duplicates at eps alone.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the results to this file too.")
def main(
    device: str,
    shapes: tuple[str, ...],
    data_sets: tuple[str, ...],
    repeats: int,
    with_sweep: bool,
    memory: bool,
    eps: float | None,
    json_path: str | None,
) -> None:
    """Compare the searches on one device."""
    torch.manual_seed(0)
    console = Console(width=120)
    console.print(f"{date.today()}: {machine(device)}")
    if memory:
        size, extra = extra_memory(60_000, 768)
        bar = size / 2 + 64e6
        console.print(f"60,000 x 768: rows {size / 1e6:.0f} MB, search {extra / 1e6:.0f} MB more (bar {bar / 1e6:.0f})")
        return
    if eps is not None:
        results_at_eps = compare_at_eps(shapes, data_sets, device, eps, repeats, console)
        if json_path:
            with open(json_path, "w") as handle:
                json.dump({"eps": eps, "results": [asdict(r) for r in results_at_eps]}, handle, indent=2)
        return
    results, segments = [], {}
    for shape in shapes or SHAPES[device]:
        n, d = (int(number) for number in shape.split("x"))
        for data in data_sets or DATA_SETS:
            results += compare(data, n, d, device, repeats)
            console.print(as_table([result for result in results if (result.data, result.n, result.d) == (data, n, d)]))
    for count, length, d in SEGMENTS[device]:
        name = f"{count:,} segments of {length:,} x {d} in one call"
        segments[name] = many_segments(count, length, d, device, repeats)
        console.print(f"{name}: {segments[name]:.3g} us a segment")
    if with_sweep:
        console.print(sweep(device, repeats))
    if json_path:
        with open(json_path, "w") as handle:
            json.dump({"results": [asdict(r) for r in results], "segments_us": segments}, handle, indent=2)


if __name__ == "__main__":
    main()
