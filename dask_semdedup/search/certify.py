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
from dataclasses import dataclass

import torch

UNIT_TOLERANCE = 2.0**-20
"""Rows whose norms are this near to 1 are searched as they are; the bounds allow for it."""

SAFE_NORMS = (2.0**-40, 2.0**40)
"""Norms whose squares and products stay well inside the range of float32."""

TIE = 2.0**-40
"""Exact scores closer than this are equal, so that no machine's order of summation decides between them."""

CHUNK_BYTES = 1 << 21
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


def chunks(n: int, row_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> list[slice]:
    """Slices of about `chunk_bytes` that cover ``range(n)``.

    Examples
    --------
    >>> chunks(5, row_bytes=4, chunk_bytes=8)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
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

    Pairs are scored in float32 with pairwise summation. Where that cannot tell a query's candidates apart, they
    are scored again in float64. Among equals the first candidate is best.

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
    group = query - first
    score = _dots(unit.rows, query, candidate).mul_(unit.inverse_norm[query]).mul_(unit.inverse_norm[candidate])
    best = group_max(score, group, last + 1 - first)
    near = score >= best[group] - 2 * pairwise_bound(unit.width)
    query, candidate, score, group = query[near], candidate[near], score[near], group[near]
    scores[query] = score
    index[query] = candidate
    contested = torch.bincount(group, minlength=len(best))[group] > 1
    if bool(contested.any()):
        _decide(unit.rows, query[contested], candidate[contested], scores, index)


def pairwise_bound(width: int) -> float:
    """Bound on the error of a float32 dot product summed in a tree of depth log2(width), norms included."""
    # A tree whose leaves are sums of up to 64 terms: torch sums runs of vectors, then the partial sums.
    return (min(width, 64) + 4 * math.log2(width + 1) + 16) * 2.0**-24


def group_max(values: torch.Tensor, group: torch.Tensor, n_groups: int) -> torch.Tensor:
    """Largest of `values` in each group.

    Examples
    --------
    >>> group_max(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 1]), 2)
    tensor([3., 2.])
    """
    start = torch.full((n_groups,), -math.inf, dtype=values.dtype, device=values.device)
    return start.scatter_reduce_(0, group, values, "amax")


def snap(scores: torch.Tensor) -> torch.Tensor:
    """Round float64 `scores` to multiples of `TIE`, in place."""
    return scores.div_(TIE).round_().mul_(TIE)


def _decide(
    rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor, scores: torch.Tensor, index: torch.Tensor
) -> None:
    """Put the best float64 score of each query, and the first candidate that has it."""
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
