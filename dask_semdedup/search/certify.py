"""Error bounds, and the exact scores that they leave to be computed.

A coarse score is a dot product of rounded rows. For rows ``x`` and ``y`` of unit length and their rounded
copies ``x'`` and ``y'``, Cauchy-Schwarz gives ::

    |x.y - x'.y'|  <=  |x - x'| |y|  +  |x'| |y - y'|  +  accumulation  +  rounding of the result

The residual norms ``|x - x'|`` are measured. A candidate whose coarse score is more than twice this bound below
the best coarse score of its query cannot be the nearest; the others are scored exactly. That is the certificate.

References
----------
Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., SIAM 2002, sections 3.1 and 4.2 (dot products
and pairwise summation).
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

UNIT_TOLERANCE = 2.0**-20
"""Rows whose norms are this near to 1 are searched as they are; the bounds allow for it."""

SAFE_NORMS = (2.0**-40, 2.0**40)
"""Norms whose squares and products stay well inside the range of float32."""

TIE = 2.0**-40
"""Exact scores closer than this are equal, so that no machine's order of summation decides between them."""

COPY = 2.0**-19
"""A row and its copy score 1 in float32 to within this."""

CHUNK_BYTES = 1 << 19
"""Rows are converted and rescored in chunks that stay in a core's cache."""


@dataclass(frozen=True)
class UnitRows:
    """Rows, with what makes them unit vectors.

    Attributes
    ----------
    rows : torch.Tensor
        (n, d) float32.
    inverse_norm : torch.Tensor
        (n,) float32; 0 for an all-zero row.
    is_unit : bool
        Whether every row that is not zero has length 1 to within `UNIT_TOLERANCE`.
    is_zero : torch.Tensor
        (n,) bool.
    """

    rows: torch.Tensor
    inverse_norm: torch.Tensor
    is_unit: bool
    is_zero: torch.Tensor

    @property
    def width(self) -> int:
        """Number of dimensions, d."""
        return self.rows.shape[1]


def scaled(rows: Any, peaks: Any) -> Any:
    """Divide those float64 rows by their largest element whose norms float32 may not hold.

    Parameters
    ----------
    rows : (n, d) array or torch.Tensor
        Of NumPy, CuPy or torch.
    peaks : (n,) array or torch.Tensor
        The largest absolute element of each row.
    """
    low, high = SAFE_NORMS
    is_extreme = (peaks > 0) & (peaks < math.inf) & ((peaks < low) | (peaks > high))
    if not is_extreme.any():
        return rows
    divisors = peaks + 0
    divisors[~is_extreme] = 1
    return rows / divisors[:, None]


def as_float32(rows: torch.Tensor) -> torch.Tensor:
    """Rows in float32, contiguous, in the directions that they have: `scaled` if need be."""
    if rows.dtype == torch.float64 and rows.numel():
        rows = scaled(rows, torch.linalg.vector_norm(rows, math.inf, dim=1))
    return rows.float().contiguous()


def chunks(n: int, row_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> list[slice]:
    """Slices of about `chunk_bytes` that cover ``range(n)``."""
    step = max(1, chunk_bytes // max(1, row_bytes))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def measure(rows: torch.Tensor) -> UnitRows:
    """Measure the norms of `rows`, bringing rows of extreme length to a safe scale first.

    Parameters
    ----------
    rows : torch.Tensor
        (n, d) float32, finite.
    """
    norm = _norms(rows)
    low, high = SAFE_NORMS
    unsafe = ~((norm > low) & (norm < high))
    if bool(unsafe.any()):
        rows = _rescale(rows, unsafe)
        norm = _norms(rows)
    is_zero = norm == 0
    inverse = torch.where(is_zero, 0.0, 1.0 / norm)
    is_unit = bool((((norm - 1).abs() <= UNIT_TOLERANCE) | is_zero).all())
    return UnitRows(rows, inverse, is_unit, is_zero)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean norms by pairwise summation, which keeps them within a few units in the last place."""
    squares = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for part in chunks(len(rows), 4 * rows.shape[1]):
        torch.sum(rows[part].square(), dim=1, out=squares[part])
    return squares.sqrt_()


def _rescale(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Copy `rows`, multiplying those in `which` by the power of two that brings their largest entry near 1."""
    rows = rows.clone()
    extreme = rows[which].double()
    largest = extreme.abs().amax(dim=1, keepdim=True)
    exponent = torch.where(largest > 0, largest.log2().floor(), 0.0)
    rows[which] = (extreme * torch.exp2(-exponent)).float()
    return rows


def half_copy(unit: UnitRows, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the unit rows to `dtype` and measure what the rounding lost.

    Returns
    -------
    half : torch.Tensor
        (n, d) of `dtype`.
    residual : torch.Tensor
        (n,) float32, the norms of the differences, rounded up.
    """
    rows = unit.rows
    half = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    residual = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for part in chunks(len(rows), 4 * unit.width):
        exact = rows[part] if unit.is_unit else rows[part] * unit.inverse_norm[part, None]
        half[part] = exact
        difference = half[part].float().sub_(exact)
        torch.sum(difference.square_(), dim=1, out=residual[part])
    return half, residual.sqrt_().mul_(1 + 2.0**-16)


def accumulation_bound(width: int) -> float:
    """Bound on the error of a float32 dot product of two unit rows, whatever the order of summation."""
    return (width + 16) * 2.0**-24


def half_bound(residual: torch.Tensor, largest: torch.Tensor | float, width: int) -> torch.Tensor:
    """Bound on the error of a query's coarse scores, before they are rounded for output.

    Parameters
    ----------
    residual : torch.Tensor
        (m,) residual norms of the queries.
    largest : torch.Tensor or float
        The largest residual norm among the candidates.
    width : int
        Number of dimensions.
    """
    return residual + (1 + residual) * largest + (accumulation_bound(width) + 2 * UNIT_TOLERANCE)


def window(best: torch.Tensor, bound: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """How far below its best coarse score a query's true nearest candidate can lie.

    Parameters
    ----------
    best : torch.Tensor
        (m,) best coarse scores.
    bound : torch.Tensor or float
        (m,) bounds on the errors of the scores before they were rounded to `dtype`.
    dtype : torch.dtype
        What the coarse scores were rounded to.

    Returns
    -------
    torch.Tensor
        (m,) float32.
    """
    unit_roundoff = torch.finfo(dtype).eps / 2
    # Half a unit in the last place of any score in the window: |score| <= |best| + 2 bound + this same rounding.
    magnitude = (best.float().abs() + 2 * bound) * (1 + 4 * unit_roundoff)
    _, exponent = torch.frexp(magnitude)
    rounding = torch.exp2(exponent.float()) * unit_roundoff
    return (2 * bound + 2 * rounding) * (1 + 2.0**-16)


def rescore(
    unit: UnitRows, query: torch.Tensor, candidate: torch.Tensor, scores: torch.Tensor, index: torch.Tensor
) -> None:
    """Find the best candidate of each query exactly.

    Float32 settles the queries whose candidates differ by more than its error; the candidates of the others are
    scored in float64. Among equals the first candidate is best.

    Parameters
    ----------
    unit : UnitRows
    query, candidate : torch.Tensor
        (p,) int64 rows of the pairs: all the candidates that can be the nearest of each query named.
    scores, index : torch.Tensor
        (n,) float32 and int64, where the answers of these queries are put.
    """
    if not len(query):
        return
    first, last = (int(end) for end in torch.aminmax(query))
    is_contested = torch.bincount(query - first, minlength=last + 1 - first) > 1
    contested = is_contested[query - first]
    settled = _settle(unit, query[contested], candidate[contested], scores, index)
    _put(unit, query[~contested], candidate[~contested], scores, index)
    _put(unit, *settled, scores, index)


def _put(
    unit: UnitRows, query: torch.Tensor, candidate: torch.Tensor, scores: torch.Tensor, index: torch.Tensor
) -> None:
    """Put the answers of queries that have one candidate left; those of copies are scored in float64, as exactly 1."""
    score = _dots(unit.rows, query, candidate) * unit.inverse_norm[query] * unit.inverse_norm[candidate]
    may_be_copy = score >= 1 - COPY
    score[may_be_copy] = snap(_cosines64(unit.rows, query[may_be_copy], candidate[may_be_copy])).float()
    index[query] = candidate
    scores[query] = score


def _settle(
    unit: UnitRows, query: torch.Tensor, candidate: torch.Tensor, scores: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (query, candidate) pairs that float32 finds to be best; put the answers of the other queries."""
    if not len(query):
        return query, candidate
    query, order = query.sort(stable=True)
    candidate = candidate[order]
    first, count = int(query[0]), int(query[-1] - query[0]) + 1
    score = _sampled_dots(unit.rows, query, candidate).mul_(unit.inverse_norm[candidate])
    group = query - first
    best = group_max(score, group, count)
    # Scores are not yet divided by the query's norm: nor is the bound.
    slack = 2 * sampled_bound(unit.width) / unit.inverse_norm[query]
    near = score >= best[group] - slack
    query, candidate, group = query[near], candidate[near], group[near]
    is_settled = (torch.bincount(group, minlength=count) == 1)[group]
    _decide(unit.rows, query[~is_settled], candidate[~is_settled], scores, index)
    return query[is_settled], candidate[is_settled]


def sampled_bound(width: int) -> float:
    """Bound on the error of `_sampled_dots` of unit rows, norms included: the narrowest vectors have 8 lanes."""
    return (width / 8 + 32) * 2.0**-24


def group_max(values: torch.Tensor, group: torch.Tensor, n_groups: int) -> torch.Tensor:
    """Largest of `values` in each group."""
    start = torch.full((n_groups,), -math.inf, dtype=values.dtype, device=values.device)
    return start.scatter_reduce_(0, group, values, "amax")


def snap(scores: torch.Tensor) -> torch.Tensor:
    """Round float64 `scores` to multiples of `TIE`, in place."""
    return scores.div_(TIE).round_().mul_(TIE)


def _decide(
    rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor, scores: torch.Tensor, index: torch.Tensor
) -> None:
    """Put the best float64 score of each query, and the first candidate that has it."""
    if not len(query):
        return
    score = snap(_cosines64(rows, query, candidate))
    query, group = torch.unique(query, return_inverse=True)
    best = group_max(score, group, len(query))
    ties = score == best[group]
    winner = torch.full_like(query, len(rows)).scatter_reduce_(0, group[ties], candidate[ties], "amin")
    scores[query] = best.float()
    index[query] = winner


def _dots(rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Dot products of pairs of rows in float32, by pairwise summation."""
    result = torch.empty(len(query), dtype=torch.float32, device=rows.device)
    for part in chunks(len(query), 4 * rows.shape[1]):
        product = rows.index_select(0, query[part]).mul_(rows.index_select(0, candidate[part]))
        torch.sum(product, dim=1, out=result[part])
    return result


def _sampled_dots(rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Dot products of pairs of rows, ordered by query, in float32.

    On a CPU the entries of a sparse product are computed straight from the rows: four times as fast as gathering.
    """
    if rows.device.type != "cpu":
        return _dots(rows, query, candidate)
    first, count = int(query[0]), int(query[-1] - query[0]) + 1
    ends = torch.bincount(query - first, minlength=count).cumsum(0)
    pattern = _csr(torch.cat([ends.new_zeros(1), ends]), candidate, (count, len(rows)))
    return torch.sparse.sampled_addmm(pattern, rows[first : first + count], rows.T, beta=0.0).values()


def _csr(offsets: torch.Tensor, columns: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A sparse matrix of zeros with entries at `columns`."""
    # Two threads that come first at once would each restore what the other found, warnings ignored.
    with _hearing:
        _hear_warnings_once()
    values = torch.zeros(len(columns), dtype=torch.float32)
    return torch.sparse_csr_tensor(offsets, columns, values, size=size, check_invariants=False)


_hearing = threading.Lock()


def _renew_lock() -> None:
    """A forked process has none of the threads that may hold it."""
    global _hearing
    _hearing = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


@cache
def _hear_warnings_once() -> None:
    """Torch warns at its first sparse matrix, and only then, that the layout is in beta and not checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1))
        torch.sparse_csr_tensor(
            torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1), check_invariants=False
        )


def _cosines64(rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of pairs of rows in float64; 0 where a row is zero."""
    result = torch.empty(len(query), dtype=torch.float64, device=rows.device)
    for part in chunks(len(query), 16 * rows.shape[1]):
        x = rows.index_select(0, query[part]).double()
        y = rows.index_select(0, candidate[part]).double()
        norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
        dots = x.mul_(y).sum(dim=1)
        result[part] = torch.where(norms > 0, dots / norms, 0.0)
    return result
