"""Sketches of all rows compared on GPUs, with cells and without: time, pairs, and whether a near pair is missed.

    python examples/debian.py descriptions.parquet --limit 20000
    python benchmarks/cells.py --rows 16000000 --texts descriptions.parquet
    python benchmarks/cells.py --rows 16000000 --texts descriptions.parquet --gpus 2

Rows are made, sketched and dropped, a part at a time; the sketches of all parts are then compared, in turns, by cells
and each with each. A pair that only the latter finds must be of rows that are not near: all these are made again, and
scored in float64. Bundles of rows are not looked into. With several GPUs each has all sketches, and a share of the
cells; without cells, of the blocks of rows. On a machine with fewer GPUs the shares run one after another, and the time
is that of the longest: what several would take, if they did not disturb each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from unittest.mock import patch

import click
import numpy as np
import torch
from real_data import read_rows
from rich.console import Console
from rich.table import Table
from search_data import real_like_rows, text_rows

from dask_semdedup.search import index as indexes
from dask_semdedup.search.cells import Cells
from dask_semdedup.search.index import Index, fit_index, sample_rows
from dask_semdedup.search.near import Links, Part, components, near_pairs, sketch_parts

WIDTH = 384
PART = 1 << 20


Parts = Callable[[int], torch.Tensor]


def parts_of(n: int, texts: Path | None) -> Parts:
    """What makes the rows of a part, given its number: always the same."""
    make: Callable[..., torch.Tensor] = real_like_rows
    if texts is not None:
        rows = torch.from_numpy(read_rows(texts)[1].copy()).float().cuda()
        make = partial(text_rows, texts=torch.nn.functional.normalize(rows, dim=1))

    def part(number: int) -> torch.Tensor:
        torch.manual_seed(number)
        return make(min(PART, n - number * PART), WIDTH, "cuda")

    return part


def without_cells(index: Index) -> Index:
    """The index with a single cell."""
    cells = Cells(torch.zeros(1, index.sketcher.size), index.cells.reach)
    return replace(index, cells=cells, loads=index.loads.sum(keepdims=True))


def in_one_cell(part: Part) -> Part:
    """A part whose sketches are all in one cell, and visit none."""
    return replace(part, members=np.array([0, len(part.rows)]))


def compare(parts: Sequence[Part], index: Index, gpus: int) -> tuple[float, list[Links]]:
    """Seconds that a comparison takes on so many GPUs, or the longest of as many shares, and what each found."""
    k = len(index.cells)
    if k > 1:
        ends = np.cumsum(index.loads)
        cuts = [0, *(int(np.searchsorted(ends, ends[-1] * g / gpus)) for g in range(1, gpus)), k]
        tasks = [[(parts, None, slice(cuts[g], cuts[g + 1]))] for g in range(gpus)]
    else:
        blocks = [parts[len(parts) * g // (2 * gpus) : len(parts) * (g + 1) // (2 * gpus)] for g in range(2 * gpus)]
        every = [
            (blocks[i], None if i == j else blocks[j]) for i, j in combinations_with_replacement(range(2 * gpus), 2)
        ]
        every.sort(key=lambda pair: pair[1] is None)
        tasks = [[(*pair, slice(0, 1)) for pair in every[g::gpus]] for g in range(gpus)]
        if gpus == 1:
            tasks = [[(parts, None, slice(0, 1))]]

    there = torch.cuda.device_count() >= gpus

    def work(share: int) -> tuple[float, list[Links]]:
        gpu = share if there else 0
        start = time.perf_counter()
        with torch.cuda.device(gpu):
            found = [near_pairs(*task, index, f"cuda:{gpu}") for task in tasks[share]]
        return time.perf_counter() - start, found

    with ThreadPoolExecutor(gpus if there else 1) as pool:
        seconds, found = zip(*pool.map(work, range(gpus)), strict=True)
    return max(seconds), [links for some in found for links in some]


def only_in(complete: Sequence[Links], ours: Sequence[Links]) -> np.ndarray:
    """The (p, 2) different pairs of one comparison whose rows another does not connect."""
    pairs = np.unique(np.sort(np.concatenate([one.pairs for one in complete]), axis=1), axis=0)
    links = np.concatenate([side for one in ours for side in (one.pairs, one.bundles)])
    keys, position = np.unique(np.concatenate([pairs, links]), return_inverse=True)
    position = position.reshape(-1, 2)
    label = components(len(keys), position[len(pairs) :])[position[: len(pairs)]]
    return pairs[label[:, 0] != label[:, 1]]


def most_similar(pairs: np.ndarray, part_of: Parts) -> float:
    """The largest similarity of pairs of rows, in float64; -1 if there are none."""
    sides = [torch.empty(len(pairs), WIDTH, dtype=torch.float64) for _ in range(2)]
    for number in np.unique(pairs >> 32):
        rows = part_of(int(number))
        for side, keys in zip(sides, pairs.T, strict=True):
            mine = np.flatnonzero(keys >> 32 == number)
            side[torch.from_numpy(mine)] = rows[torch.from_numpy(keys[mine] & 0xFFFFFFFF).cuda()].double().cpu()
    left, right = (torch.nn.functional.normalize(side, dim=1) for side in sides)
    return float((left * right).sum(dim=1).max()) if len(pairs) else -1.0


@click.command()
@click.option("--rows", "n", type=click.IntRange(1), default=16_000_000, show_default=True)
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of embeddings, of which rows are mixtures.  [default: rows with the spectrum of such]",
)
@click.option("--eps", type=click.FloatRange(0, 1), default=0.05, show_default=True)
@click.option("--cells", multiple=True, type=int, help="Numbers of cells to try.  [default: as the plan chooses]")
@click.option("--gpus", type=int, default=1, show_default=True)
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option("--without/--no-without", default=True, show_default=True, help="Compare each with each, too.")
def main(
    n: int, texts: Path | None, eps: float, cells: tuple[int, ...], gpus: int, repeats: int, without: bool
) -> None:
    """Compare the sketches of all rows on GPUs."""
    numbers, part_of = range(-(-n // PART)), parts_of(n, texts)
    rng = np.random.default_rng(0)
    table = Table(
        "cells", "visits", "sketch", "GPUs", "fit s", "sketch s", "compare s", "pairs", "multiplied", "missed"
    )
    for k in cells or (indexes.n_cells(n),):
        with patch.object(indexes, "n_cells", lambda n, k=k: k):
            per_part = -(-sample_rows(n) // len(numbers))
            sample = torch.cat(
                [
                    rows[torch.from_numpy(rng.choice(len(rows), min(per_part, len(rows)), replace=False)).cuda()]
                    for rows in map(part_of, numbers)
                ]
            )
            start = time.perf_counter()
            index = fit_index(sample[torch.randperm(len(sample))], n, 1 - eps, at_once=False)
            torch.cuda.synchronize()
            fitted = time.perf_counter() - start
        assert index is not None
        table = Table(
            "cells", "visits", "sketch", "GPUs", "fit s", "sketch s", "compare s", "pairs", "multiplied", "missed"
        )
        sketched, parts = 0.0, []
        for number in numbers:
            rows = part_of(number)
            torch.cuda.synchronize()
            start = time.perf_counter()
            parts += sketch_parts(number, rows, index, stays=True)
            torch.cuda.synchronize()
            sketched += time.perf_counter() - start
        del rows
        single, apart = without_cells(index), [in_one_cell(part) for part in parts]
        ways = [(parts, index), *([(apart, single)] if without else [])]
        times: dict[int, list[float]] = {}
        found = {}
        for turn in range(repeats):
            for way, (some, by) in enumerate(ways):
                # Each with each takes long.
                if way and turn:
                    continue
                for count in sorted({1, gpus}):
                    seconds, links = compare(some, by, count)
                    times.setdefault((way, count), []).append(seconds)
                    found[way] = links
        for (way, count), seconds in times.items():
            missed = ""
            if way == 0 and without:
                only = only_in(found[1], found[0])
                missed = f"{len(only)} only without, at most {most_similar(only, part_of):.4f}"
                assert most_similar(only, part_of) < 1 - eps, "a near pair is missed"
            by = ways[way][1]
            table.add_row(
                str(len(by.cells)),
                f"{index.visits:.1f}" if way == 0 else "",
                f"{by.sketcher.size}, {by.longer.size}",
                str(count),
                f"{fitted:.2f}",
                f"{sketched:.2f}",
                f"{statistics.median(seconds):.3f} ({min(seconds):.3f}, {max(seconds):.3f})",
                f"{sum(len(one.pairs) for one in found[way]):,} + {sum(len(one.bundles) for one in found[way]):,}",
                f"{by.pairs:.3g}" if way == 0 else f"{n * (n - 1) / 2:.3g}",
                missed,
            )
        Console(width=200).print(table)


if __name__ == "__main__":
    main()
