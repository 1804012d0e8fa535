"""The searches that `search.py` and `search_eps.py` compare with, and the timing of calls that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Answer = tuple[torch.Tensor, torch.Tensor]

SAMPLE_SECONDS = 0.02


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


def matmul(rows: torch.Tensor, strip: int = 8192) -> None:
    """The ceiling: the square product in half precision by the vendor's library, its result thrown away."""
    for start in range(0, len(rows), strip):
        torch.mm(rows[start : start + strip], rows.T)


def finish(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, from as many in a row as fill `SAMPLE_SECONDS`."""
    finish(device)
    start = time.perf_counter()
    call()
    finish(device)
    once = time.perf_counter() - start
    count = int(SAMPLE_SECONDS / once)
    if count < 2:
        return once
    start = time.perf_counter()
    for _ in range(count):
        call()
    finish(device)
    return (time.perf_counter() - start) / count


def interleaved(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            seconds = seconds_of(call, device)
            if turn:  # The first turn warms up.
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
