"""The search by sketches with matrix products in torch, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import torch

from dask_semdedup.search import certify, torch_engine
from dask_semdedup.search.crowded import CandidatesOf
from dask_semdedup.search.sketch import SCALE, Costs, Sketcher
from dask_semdedup.search.torch_engine import Pairs, Panels, reaching, strips

COSTS = Costs(
    fit=4e10,
    value=60,
    pair=1700,
    pair_value=14,
    hit=3e5,
    hit_value=2e3,
    exact_row_value=100,
    exact_pair=2000,
    exact_value=36,
    rows=1024,
)
"""Measured on two cores with AVX2; only their ratios matter."""

ROWS = 4096
"""Rows that are sketched, or compared with crowded rows, at once."""


@cache
def sketch_dtype() -> torch.dtype:
    """Return the dtype in which this processor multiplies sketches fastest."""
    if not torch.backends.mkldnn.is_available():
        return torch.float32
    # Without tiles, products of bfloat16 take twice as long as those of float32.
    if torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.int8 if torch.cpu._is_vnni_supported() else torch.float32


@dataclass(frozen=True)
class Sketches:
    """Sketches of the rows, in the dtype of their products.

    Attributes
    ----------
    rows : torch.Tensor
        (n, h) int8, bfloat16 or float32; zero rows may follow.
    least : torch.Tensor
        (n,) int32, bfloat16 or float32: the product of a query's sketch with a candidate's is at least this if the rows
        are as similar as is asked for. Or (1,), for all rows.
    """

    rows: torch.Tensor
    least: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return self.least.dtype

    def multiply(self, some: slice, others: slice | torch.Tensor, out: torch.Tensor) -> None:
        """Write the products of some sketches with others to `out`, which has a row for each of the first."""
        multiply(self.rows[some], self.rows[others], out)


def multiply(some: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
    """Write the products of some sketches with others to `out`, which has a row for each of the first."""
    if some.dtype != torch.int8:
        torch.mm(some, others.T, out=out)
    elif out.is_contiguous():
        torch._int_mm(some, others.T, out=out)
    else:
        out.copy_(torch._int_mm(some, others.T))


def sketches(unit: certify.UnitRows, sketcher: Sketcher, dtype: torch.dtype) -> Sketches:
    """Return the sketches of the rows and the least products, which allow for what rounding the sketches lost."""
    rows, residual = rounded_sketches(unit, sketcher, dtype)
    return Sketches(rows, least_products(residual, unit.is_zero, sketcher, dtype))


def rounded_sketches(
    unit: certify.UnitRows, sketcher: Sketcher, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sketches of the rows in a dtype, and bounds on the length of what the rounding lost of each.

    Zero rows follow the sketches: see `torch_engine.padded`.
    """
    n = len(unit.rows)
    rows, residual = torch.zeros(torch_engine.padded(n), sketcher.size, dtype=dtype), torch.empty(n)
    for start in range(0, n, ROWS):
        chunk = slice(start, start + ROWS)
        exact = sketcher.sketches(unit.rows[chunk] * unit.inverse_norm[chunk, None])
        rows[start : start + len(exact)], residual[chunk] = rounded(exact, dtype)
    return rows, residual


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sketches in another dtype, and a bound on the length of what each has lost."""
    if dtype == exact.dtype:
        return exact, torch.zeros(len(exact))
    if dtype.is_floating_point:
        # Each number loses at most this share of itself, and a sketch is hardly longer than 1.
        return exact.to(dtype), torch.full((len(exact),), torch.finfo(dtype).eps / 2 * (1 + 2.0**-6))
    # The length of what is left may exceed 1 by what is added to it.
    values = (exact * SCALE).round_().clamp_(-SCALE, SCALE)
    lost = (values / SCALE).sub_(exact)
    return values.to(dtype), torch.linalg.vector_norm(lost, dim=1).mul_(1 + 2.0**-16)


def least_products(
    residual: torch.Tensor, is_zero: torch.Tensor, sketcher: Sketcher, dtype: torch.dtype
) -> torch.Tensor:
    """Return the least products of sketches that are rounded to a dtype.

    Parameters
    ----------
    residual : torch.Tensor
        (n,) float32 bounds on the length of what the rounding lost.
    is_zero : torch.Tensor
        (n,) bool: a zero row is similar to none.
    sketcher : Sketcher
        What is asked for.
    dtype : torch.dtype
        int8, bfloat16 or float32.
    """
    largest = residual.max() if len(residual) else 0.0
    bound = certify.half_bound(residual, largest, sketcher.size) * (1 + 2 * sketcher.tail)
    least = sketcher.floor - bound
    # Rounding products to bfloat16 keeps their order, so `least` is rounded alike.
    if dtype == torch.int8:
        return (least * SCALE**2).floor().int().masked_fill_(is_zero, torch.iinfo(torch.int32).max)
    return least.masked_fill_(is_zero, 2.0).to(dtype)


def nearest_reaching(
    rows: torch.Tensor,
    segments: torch.Tensor,
    scores: torch.Tensor,
    index: torch.Tensor,
    sketcher: Sketcher,
    *,
    stops: torch.Tensor | None = None,
) -> tuple[torch.Tensor, CandidatesOf]:
    """Write the answers of the rows that may reach what is asked for: see `triton_sketch.nearest_reaching`."""
    scores.zero_()
    torch.arange(len(rows), out=index)
    unit = certify.measure(rows)
    product = sketches(unit, sketcher, sketch_dtype())
    strip_size = torch_engine.strip_size(None, segments, rows)
    queries = (~unit.is_zero).nonzero().flatten()
    pairs = Pairs(unit, scores, index)
    panels = Panels(product, strip_size)
    crowded = [queries[:0]]
    for strip in strips(queries, segments, strip_size, stops):
        most = torch_engine.most_hits(strip)
        hits = torch.zeros(len(strip.queries), dtype=torch.int64)
        found = []
        for panel in panels.of(strip):
            maxima = panel.positive_maxima()
            column, candidate, _ = reaching(panel.scores, maxima, product.least[strip.queries], most, hits)
            found.append((column, candidate + panel.first))
        if found:
            column, candidate = map(torch.cat, zip(*found, strict=True))
            keep = hits[column] <= most
            pairs.add(strip.queries[column[keep]], candidate[keep])
        crowded.append(strip.queries[hits > most])
    pairs.flush()
    scores.clamp_(-1.0, 1.0)
    return torch.cat(crowded), partial(_candidates_of, product, segments)


def _candidates_of(product: Sketches, segments: torch.Tensor, crowded: torch.Tensor) -> torch.Tensor:
    """Return the rows that reach their least product with any crowded row of their segment."""
    cuts = torch.searchsorted(crowded, segments).tolist()
    found = [crowded[:0]]
    for (start, stop), (first, last) in zip(pairwise(segments.tolist()), pairwise(cuts), strict=True):
        for begin in range(start, stop if first < last else start, ROWS):
            panel = slice(begin, min(begin + ROWS, stop))
            best = torch.full((panel.stop - begin,), torch.iinfo(torch.int32).min).to(product.dtype)
            for split in crowded[first:last].split(torch_engine.STRIP["cpu"]):
                out = torch.empty(panel.stop - begin, len(split), dtype=product.dtype)
                product.multiply(panel, split, out)
                torch.maximum(best, out.amax(dim=1), out=best)
            found.append((best >= product.least[panel]).nonzero().flatten() + begin)
    return torch.cat(found)
