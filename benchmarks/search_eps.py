"""Compare searches for duplicates at eps alone: `search.py --eps`.

*Ours, all rows* is the search for the nearest of all rows, whose answers below 1 - eps are dropped; the triangles do so
too. *Ours at eps* searches by sketches, where these pay. Its *first* call of a kind fits the basis of the sketches, a
*later* one uses that again; neither includes the compilation of kernels. *Matmul* is half of the time of the square
product at full width, by the vendor's library and without a search in it: sketches can take less.

A duplicate is missed if an earlier row reaches 1 - eps in float64 but the search answers none; extra if it is the other
way around. Rows within `TOLERANCE` of the threshold count as neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.table import Table
from search_baselines import Answer, interleaved, triangle
from search_data import DATA

from dask_semdedup.search import (
    certify,
    half_dtype,
    has_triton,
    ieee_products,
    nearest_earlier,
    sketch,
    torch_sketch,
    without_answers_below,
)

SHAPES = {
    "cpu": ("20000x384", "40000x384"),
    "cuda": ("66000x1536", "262144x384", "1000x2000x384", "1048576x384", "4194304x384"),
}
"""[SEGMENTSx]ROWSxDIMENSIONS."""

BIG = 1 << 18
"""Rows from which on triangles are not timed, and `CHECKED` queries are compared with the truth instead of all."""

HUGE = 1 << 20
"""Rows from which on real-like rows are the only data, unless others are asked for, and there are `FEW_TURNS`."""

FEW_TURNS = 3

LONGEST = 1e12
"""Pairs beyond which the search for all rows' nearest is not run."""

CHECKED = 8192

TOLERANCE = 1e-6

CROWDED = 128
"""A query with more pairs left is searched among others like it: its pairs are not verified one by one."""

TODAY = "ours, all rows"
FIRST, LATER = "ours at eps, first", "ours at eps, later"
CEILING = "matmul, a triangle"

QUERIES, CANDIDATES = 1024, 32768
"""Pairs that are looked at together."""


@dataclass(frozen=True)
class Case:
    """Rows to search, in segments of one length."""

    data: str
    rows: torch.Tensor
    length: int
    at_least: float

    @classmethod
    def of(cls, data: str, shape: str, device: str, eps: float) -> Case:
        """Make the rows, the same ones each time."""
        torch.manual_seed(0)
        *segments, length, d = (int(number) for number in shape.split("x"))
        n = math.prod(segments) * length
        if segments and data in ("real-like", "texts"):
            # Near-copies of rows of other segments would not be found.
            return cls(data, DATA[data](n, d, device, length=length), length, 1 - eps)
        return cls(data, DATA[data](n, d, device), length, 1 - eps)

    @property
    def segments(self) -> torch.Tensor:
        """Offsets of the segments."""
        return torch.arange(0, len(self.rows) + 1, self.length)

    @property
    def pairs(self) -> float:
        """Pairs of rows of one segment."""
        return len(self.rows) * (self.length - 1) / 2

    def today(self) -> Answer:
        """The nearest of all rows, of which those below the threshold are dropped."""
        answer = nearest_earlier(self.rows, self.segments)
        without_answers_below(self.at_least, *answer)
        return answer

    def later(self) -> Answer:
        """The search at eps."""
        return nearest_earlier(self.rows, self.segments, at_least=self.at_least)

    def first(self) -> Answer:
        """The search at eps as the first of its kind, so that a basis has to be fitted."""
        sketch._known.clear()
        return self.later()

    def triangle(self, dtype: torch.dtype) -> Answer:
        """Matrix products in `dtype` of batches of queries with all earlier rows."""
        answer = triangle(self.rows, dtype=dtype)
        without_answers_below(self.at_least, *answer)
        return answer


@dataclass
class Result:
    """One line of the table; None where a number is not known or does not apply."""

    data: str
    shape: str
    method: str
    milliseconds: float | None
    speedup: float | None = None
    picoseconds_a_pair: float | None = None
    pairs_left_a_row: float | None = None
    crowded_share: float | None = None
    sketch_size: int | None = None
    as_today: bool | None = None
    missed: int | None = None
    extra: int | None = None
    duplicates: int | None = None
    checked: int | None = None


def compare(data: str, shape: str, device: str, eps: float, repeats: int) -> list[Result]:
    """Time the searches of one data set, and count what they miss and what they add."""
    case = Case.of(data, shape, device, eps)
    searches = searches_of(case, device)
    product, share = ceiling(case, device)
    turns = repeats if len(case.rows) < HUGE else min(repeats, FEW_TURNS)
    seconds = interleaved({**searches, CEILING: product}, device, turns)
    seconds[CEILING] *= share
    queries = checked_queries(len(case.rows))
    best = truth(case, queries)
    case.first()
    left, size, crowded = pairs_left(case, queries)
    expected = None
    results = []
    for name, taken in seconds.items():
        result = Result(data, shape, name, 1e3 * taken, picoseconds_a_pair=1e12 * taken / case.pairs)
        if TODAY in seconds:
            result.speedup = seconds[TODAY] / taken
        if name in (FIRST, LATER):
            result.pairs_left_a_row, result.sketch_size, result.crowded_share = left, size, crowded
        if name in searches:
            answer = searches[name]()
            expected = answer if name == TODAY else expected
            if expected is not None and name in (FIRST, LATER):
                result.as_today = all(map(torch.equal, answer, expected))
            count(result, answer, best, queries, case.at_least)
        results.append(result)
    if TODAY not in seconds:
        results.insert(0, Result(data, shape, TODAY, None))
    return results


def searches_of(case: Case, device: str) -> dict[str, Callable[[], Answer]]:
    """The searches that are timed on these rows."""
    searches: dict[str, Callable[[], Answer]] = {}
    if case.pairs <= LONGEST:
        searches[TODAY] = case.today
    # The second uses the basis that the first has fitted.
    searches |= {FIRST: case.first, LATER: case.later}
    if case.length == len(case.rows) < BIG:
        searches["triangle, float32"] = partial(case.triangle, torch.float32)
        half = half_dtype(torch.device(device))
        if half is not None:
            searches[f"triangle, {str(half).removeprefix('torch.')}, lossy"] = partial(case.triangle, half)
    return searches


def ceiling(case: Case, device: str) -> tuple[Callable[[], None], float]:
    """Products at full width by the vendor's library, in half precision if there is any, and what to multiply them by.

    They are the whole square of each segment, or a part of it where that is large. The triangle is half of the square.
    """
    half = case.rows.to(half_dtype(torch.device(device)) or torch.float32).view(-1, case.length, case.rows.shape[1])
    strip = max(1, min(8192, (1 << 30) // case.length))
    queries = min(case.length, max(strip, (1 << 35) // case.length))
    together = max(1, (1 << 28) // case.length**2)

    def product() -> None:
        for some in half.split(together):
            for part in some[:, :queries].split(strip, dim=1):
                torch.bmm(part, some.mT)

    return product, case.length / queries / 2


def checked_queries(n: int) -> torch.Tensor:
    """The rows whose answers are compared with the truth: all, or a random sample, in ascending order."""
    if n < BIG:
        return torch.arange(n)
    return torch.randperm(n)[:CHECKED].sort().values


def blocks(queries: torch.Tensor, length: int) -> Iterator[tuple[slice, torch.Tensor, slice]]:
    """Blocks of pairs with all earlier rows of the segments: which queries, the queries, and candidates."""
    cuts = np.flatnonzero(np.diff(queries.numpy() // length, prepend=-1, append=-1))
    for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        for begin in range(start, stop, QUERIES):
            which = slice(begin, min(begin + QUERIES, stop))
            batch = queries[which]
            last = int(batch[-1])
            for first in range(last // length * length, last, CANDIDATES):
                yield which, batch, slice(first, min(first + CANDIDATES, last))


def is_earlier(candidates: slice, queries: torch.Tensor) -> torch.Tensor:
    """Which candidates come before which queries, query by candidate."""
    return torch.arange(candidates.start, candidates.stop, device=queries.device) < queries[:, None]


def truth(case: Case, queries: torch.Tensor) -> torch.Tensor:
    """The greatest similarity of each query to an earlier row, in float64; -inf for the first of a segment."""
    device = case.rows.device
    best = torch.full((len(queries),), -math.inf, dtype=torch.float64, device=device)
    for which, batch, candidates in blocks(queries, case.length):
        batch = batch.to(device)
        product = unit64(case.rows[batch]) @ unit64(case.rows[candidates]).T
        product.masked_fill_(~is_earlier(candidates, batch), -math.inf)
        best[which] = torch.maximum(best[which], product.amax(dim=1))
    return best


def unit64(rows: torch.Tensor) -> torch.Tensor:
    """Rows of unit length in float64."""
    return torch.nn.functional.normalize(rows.double(), dim=1)


def count(result: Result, answer: Answer, best: torch.Tensor, queries: torch.Tensor, at_least: float) -> None:
    """Compare the answers of some queries with the truth."""
    threshold = float(np.float32(at_least))
    found = (answer[0] >= threshold)[queries.to(best.device)]
    result.missed = int(((best > threshold + TOLERANCE) & ~found).sum())
    result.extra = int(((best < threshold - TOLERANCE) & found).sum())
    result.duplicates = int((best >= threshold).sum())
    result.checked = len(queries)


def pairs_left(case: Case, queries: torch.Tensor) -> tuple[float | None, int | None, float | None]:
    """What the sketches leave of some queries' pairs, the size of the sketches, and the share of crowded queries.

    The search is one without sketches if all are None. Crowded queries' pairs are not counted.
    """
    device = case.rows.device
    costs = costs_on(device)
    with ieee_products:
        sketcher = costs and sketch.choose(case.rows, case.segments, None, case.at_least, costs)
        if not sketcher:
            return None, None, None
        dtype = torch.int8 if device.type == "cuda" else torch_sketch.sketch_dtype()
        # The sketches are computed on the device, as the engines do.
        with device:
            made = torch_sketch.sketches(certify.measure(case.rows), sketcher, dtype)
        left = torch.zeros(len(queries), dtype=torch.int64, device=device)
        for which, batch, candidates in blocks(queries, case.length):
            batch = batch.to(device)
            # Sums of products of int8 are exact in float32.
            product = (made.rows[batch].float() @ made.rows[candidates].float().T).to(made.dtype)
            reached = (product >= made.least[batch][:, None]) & is_earlier(candidates, batch)
            left[which] += reached.sum(dim=1)
    is_crowded = left > CROWDED
    return float(left[~is_crowded].double().mean()), sketcher.size, float(is_crowded.double().mean())


def costs_on(device: torch.device) -> sketch.Costs | None:
    """The costs by which the search on a device chooses its sketches, or None if it has none."""
    if has_triton(device):
        from dask_semdedup.search import triton_sketch

        return triton_sketch.COSTS
    return None if device.type == "cuda" else torch_sketch.COSTS


def as_table(results: list[Result], eps: float) -> Table:
    """The results of one data set as a table."""
    first, checked = results[0], results[-2]
    title = f"{first.shape.replace('x', ' x ')}, {first.data}, eps={eps}: {checked.checked:,} queries checked, "
    table = Table(title=f"{title}{checked.duplicates:,} of them duplicates", title_justify="left")
    if first.milliseconds is None:
        table.caption = f"{TODAY}: not run, as there are more than {LONGEST:,.0f} pairs"
    table.add_column("method", no_wrap=True)
    for column in ("ms", "times faster", "ps a pair", "left a row", "crowded", "h", "as today", "missed", "extra"):
        table.add_column(column, justify="right")
    for r in results:
        if r.milliseconds is None:
            table.add_row(r.method, "not run")
            continue
        same = None if r.as_today is None else "yes" if r.as_today else "no"
        # Where sketches would not pay, the search at eps is that of today.
        size = r.sketch_size or ("none" if r.method in (FIRST, LATER) else None)
        table.add_row(
            r.method,
            f"{r.milliseconds:,.2f}",
            cell(r.speedup, ".2f"),
            cell(r.picoseconds_a_pair, ",.3f" if r.picoseconds_a_pair < 100 else ",.0f"),
            cell(r.pairs_left_a_row, ".2f"),
            cell(r.crowded_share, ".0%"),
            cell(size, ""),
            cell(same, ""),
            cell(r.missed, ","),
            cell(r.extra, ","),
        )
    return table


def cell(value: object, form: str) -> str:
    """A cell of the table, empty for None."""
    return "" if value is None else format(value, form)


def data_sets_of(shape: str) -> tuple[str, ...]:
    """The data sets to search at one shape unless others are asked for."""
    *_, d = (int(number) for number in shape.split("x"))
    return ("real-like",) if math.prod(int(number) for number in shape.split("x")) // d >= HUGE else tuple(DATA)
