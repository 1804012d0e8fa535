"""Error bounds of coarse scores, and exact scores of the candidates that remain within them.

A coarse score is a dot product of rounded rows. For rows ``x`` and ``y`` of unit length and their rounded copies ``x'``
and ``y'``, Cauchy-Schwarz gives ::

    |x.y - x'.y'|  <=  |x - x'| |y|  +  |x'| |y - y'|  +  accumulation  +  rounding of the result

The residual norms ``|x - x'|`` are measured. A candidate whose coarse score is more than twice this bound below the
best coarse score of its query cannot be the nearest; the others are scored exactly. That is the certificate.

References
----------
Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., SIAM 2002, sections 3.1 and 4.2 (dot products and
pairwise summation).
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
"""Rows whose norms are within this of 1 are searched as they are; the bounds allow for it."""

SAFE_NORMS = (2.0**-40, 2.0**40)
"""Range of norms whose squares and products stay well inside the range of float32."""

TIE = 2.0**-40
"""Exact scores are rounded to multiples of this, so that no machine's order of summation decides between them."""

CHUNK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Bytes of rows that are converted or rescored at a time: they stay in a core's cache, and keep a GPU busy."""


@dataclass(frozen=True)
class UnitRows:
    """Rows and the factors that make them unit vectors.

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
    """Return float64 rows. Rows whose norms may exceed the range of float32 are divided by their largest element.

    Parameters
    ----------
    rows : (n, d) array or torch.Tensor
        A NumPy, CuPy or torch array.
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
    """Return rows as contiguous float32 with the same directions, `scaled` if necessary."""
    if rows.dtype == torch.float64 and rows.numel():
        rows = scaled(rows, torch.linalg.vector_norm(rows, math.inf, dim=1))
    return rows.float().contiguous()


def chunks(n: int, row_bytes: int, chunk_bytes: int = CHUNK_BYTES["cpu"]) -> list[slice]:
    """Return slices that cover ``range(n)``, each of about `chunk_bytes`."""
    step = max(1, chunk_bytes // max(1, row_bytes))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def pieces(rows: torch.Tensor, row_bytes: int) -> list[slice]:
    """Return slices of rows, of a size that suits their device."""
    return chunks(len(rows), row_bytes, CHUNK_BYTES[rows.device.type])


def measure(rows: torch.Tensor) -> UnitRows:
    """Return `rows` with their norms. Rows of extreme length are rescaled first.

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
    """Return Euclidean norms, by pairwise summation, which is accurate to a few units in the last place."""
    squares = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for chunk in pieces(rows, 4 * rows.shape[1]):
        torch.sum(rows[chunk].square(), dim=1, out=squares[chunk])
    return squares.sqrt_()


def _rescale(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Return a copy of `rows`, with those in `which` scaled by powers of two to a largest entry near 1."""
    rows = rows.clone()
    extreme = rows[which].double()
    largest = extreme.abs().amax(dim=1, keepdim=True)
    exponent = torch.where(largest > 0, largest.log2().floor(), 0.0)
    rows[which] = (extreme * torch.exp2(-exponent)).float()
    return rows


def half_copy(unit: UnitRows, dtype: torch.dtype, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unit rows rounded to `dtype`, and the norms of their rounding errors.

    Parameters
    ----------
    unit : UnitRows
    dtype : torch.dtype
    length : int, optional
        Rows of the copy, by default n: zero rows follow.

    Returns
    -------
    half : torch.Tensor
        (n, d) of `dtype`, or more rows.
    residual : torch.Tensor
        (n,) float32, rounded up.
    """
    rows = unit.rows
    half = torch.empty(length or len(rows), unit.width, dtype=dtype, device=rows.device)
    half[len(rows) :] = 0
    residual = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for chunk in pieces(rows, 4 * unit.width):
        exact = rows[chunk] if unit.is_unit else rows[chunk] * unit.inverse_norm[chunk, None]
        half[chunk] = exact
        difference = half[chunk].float().sub_(exact)
        torch.sum(difference.square_(), dim=1, out=residual[chunk])
    return half, residual.sqrt_().mul_(1 + 2.0**-16)


def accumulation_bound(width: int) -> float:
    """Return a bound on the error of a float32 dot product of two unit rows, for any order of summation."""
    return (width + 16) * 2.0**-24


def half_bound(residual: torch.Tensor, largest: torch.Tensor | float, width: int) -> torch.Tensor:
    """Return bounds on the errors of coarse scores in half precision, before these are rounded for output.

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
    """Return how far the coarse score of a query's true nearest candidate can be below its best coarse score.

    Parameters
    ----------
    best : torch.Tensor
        (m,) best coarse scores.
    bound : torch.Tensor or float
        (m,) bounds on the errors of the scores before they were rounded to `dtype`.
    dtype : torch.dtype
        The dtype that the coarse scores were rounded to.

    Returns
    -------
    torch.Tensor
        (m,) float32.
    """
    unit_roundoff = torch.finfo(dtype).eps / 2
    # Half a unit in the last place of any score in the window: |score| <= |best| + 2 bound + this very rounding.
    magnitude = (best.float().abs() + 2 * bound) * (1 + 4 * unit_roundoff)
    _, exponent = torch.frexp(magnitude)
    rounding = torch.exp2(exponent.float()) * unit_roundoff
    return (2 * bound + 2 * rounding) * (1 + 2.0**-16)


def rescore(
    unit: UnitRows, query: torch.Tensor, candidate: torch.Tensor, scores: torch.Tensor, index: torch.Tensor
) -> None:
    """Write the exact best candidate of each query, the first among equals, and its score.

    Float32 decides queries whose candidates differ by more than its error. Candidates of the others are scored in
    float64.

    Parameters
    ----------
    unit : UnitRows
    query, candidate : torch.Tensor
        (p,) int64 rows of the pairs, with all candidates that can be nearest to each of these queries.
    scores, index : torch.Tensor
        (n,) float32 and int64, to which the answers of these queries are written.
    """
    if not len(query):
        return
    first, last = (int(end) for end in torch.aminmax(query))
    is_contested = torch.bincount(query - first, minlength=last + 1 - first) > 1
    contested = is_contested[query - first]
    settled = _settle(unit, query[contested], candidate[contested], scores, index)
    _put(unit.rows, query[~contested], candidate[~contested], scores, index)
    _put(unit.rows, *settled, scores, index)


def _put(
    rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor, scores: torch.Tensor, index: torch.Tensor
) -> None:
    """Write the answers of queries with one candidate left. Each score depends on its pair alone, to the last bit."""
    index[query] = candidate
    scores[query] = snap(cosines64(rows, query, candidate)).float()


def _settle(
    unit: UnitRows, query: torch.Tensor, candidate: torch.Tensor, scores: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (query, candidate) pairs that float32 decides, and write the answers of the other queries."""
    if not len(query):
        return query, candidate
    query, order = query.sort(stable=True)
    candidate = candidate[order]
    first, count = int(query[0]), int(query[-1] - query[0]) + 1
    score = _sampled_dots(unit.rows, query, candidate).mul_(unit.inverse_norm[candidate])
    group = query - first
    best = group_max(score, group, count)
    # The scores are not divided by the query's norm, and neither is the bound.
    slack = 2 * sampled_bound(unit.width) / unit.inverse_norm[query]
    near = score >= best[group] - slack
    query, candidate, group = query[near], candidate[near], group[near]
    is_settled = (torch.bincount(group, minlength=count) == 1)[group]
    _decide(unit.rows, query[~is_settled], candidate[~is_settled], scores, index)
    return query[is_settled], candidate[is_settled]


def sampled_bound(width: int) -> float:
    """Return a bound on the error of `_sampled_dots` of unit rows, norms included, for vectors of 8 lanes or more."""
    return (width / 8 + 32) * 2.0**-24


def group_max(values: torch.Tensor, group: torch.Tensor, n_groups: int) -> torch.Tensor:
    """Return the largest of `values` in each group."""
    start = torch.full((n_groups,), -math.inf, dtype=values.dtype, device=values.device)
    return start.scatter_reduce_(0, group, values, "amax")


def snap(scores: torch.Tensor) -> torch.Tensor:
    """Round float64 `scores` to multiples of `TIE`, in place, and return them."""
    return scores.div_(TIE).round_().mul_(TIE)


def _decide(
    rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor, scores: torch.Tensor, index: torch.Tensor
) -> None:
    """Write the best float64 score of each query, and the first candidate that has it."""
    if not len(query):
        return
    score = snap(cosines64(rows, query, candidate))
    query, group = torch.unique(query, return_inverse=True)
    best = group_max(score, group, len(query))
    ties = score == best[group]
    winner = torch.full_like(query, len(rows)).scatter_reduce_(0, group[ties], candidate[ties], "amin")
    scores[query] = best.float()
    index[query] = winner


def _dots(rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Return float32 dot products of pairs of rows, by pairwise summation."""
    result = torch.empty(len(query), dtype=torch.float32, device=rows.device)
    for chunk in pieces(query, 4 * rows.shape[1]):
        product = rows.index_select(0, query[chunk]).mul_(rows.index_select(0, candidate[chunk]))
        torch.sum(product, dim=1, out=result[chunk])
    return result


def _sampled_dots(rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Return float32 dot products of pairs of rows that are ordered by query.

    On a CPU they are entries of a sparse product, computed straight from the rows: four times as fast as gathering.
    """
    if rows.device.type != "cpu":
        return _dots(rows, query, candidate)
    first, count = int(query[0]), int(query[-1] - query[0]) + 1
    ends = torch.bincount(query - first, minlength=count).cumsum(0)
    pattern = _csr(torch.cat([ends.new_zeros(1), ends]), candidate, (count, len(rows)))
    return torch.sparse.sampled_addmm(pattern, rows[first : first + count], rows.T, beta=0.0).values()


def _csr(offsets: torch.Tensor, columns: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return a sparse matrix with entries, all zero, at `columns`."""
    # Without a lock, threads that come first at once could each restore the filters that the other has set.
    with _warning_lock:
        _silence_first_warning()
    values = torch.zeros(len(columns), dtype=torch.float32)
    return torch.sparse_csr_tensor(offsets, columns, values, size=size, check_invariants=False)


_warning_lock = threading.Lock()


def _renew_lock() -> None:
    """Replace the lock in a forked process, which has none of the threads that may hold it."""
    global _warning_lock
    _warning_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


@cache
def _silence_first_warning() -> None:
    """Silence torch's warning, given for its first sparse matrix only, that the layout is in beta and not checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1))
        torch.sparse_csr_tensor(
            torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1), check_invariants=False
        )


def cosines64(rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Return float64 cosine similarities of pairs of rows; 0 if a row is zero."""
    result = torch.empty(len(query), dtype=torch.float64, device=rows.device)
    for chunk in pieces(query, 16 * rows.shape[1]):
        x = rows.index_select(0, query[chunk]).double()
        y = rows.index_select(0, candidate[chunk]).double()
        norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
        dots = x.mul_(y).sum(dim=1)
        result[chunk] = torch.where(norms > 0, dots / norms, 0.0)
    return result
