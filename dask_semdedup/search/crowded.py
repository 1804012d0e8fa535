"""Crowded rows: rows with many near-copies, searched only among those.

Templates and copies are similar to thousands of rows. A list of all of these pairs would take unbounded memory. So such
rows are gathered, with all rows that they may be similar to, and searched separately. Of rows that are equal bit by
bit, only the first is a candidate: the others have the same similarities and come later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dask_semdedup.search import certify

Search = Callable[..., tuple[torch.Tensor, torch.Tensor]]
CandidatesOf = Callable[[torch.Tensor], torch.Tensor]

LEAST_GROUP = 2048
"""Rows of a group for which it pays to search it by itself."""

LEADERS = 64
"""Rows of which the one with the most rows alike is taken."""

ALIKE = 0.99
"""Similarity to that row of the rows of a group."""

PIECE_BYTES = 1 << 26
"""Bytes of float64 rows at a time."""

TIGHT = 0.25
"""Products of centred rows that are this small compared with those of the rows pay."""


def answer_crowded(
    rows: torch.Tensor,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    crowded: torch.Tensor,
    candidates_of: CandidatesOf,
    search: Search,
    scores: torch.Tensor,
    index: torch.Tensor,
) -> None:
    """Write the answers of crowded rows. Those of all other rows are already written.

    Parameters
    ----------
    rows, segments, stops
        As of `dask_semdedup.search.nearest_earlier`.
    crowded : torch.Tensor
        (c,) int64 rows, ascending.
    candidates_of : callable
        Function of some of these rows that returns all rows that can be their answers.
    search : callable
        The exact search of rows, segments, stops, and `Centred` rows if there are any.
    scores, index : torch.Tensor
        (n,) float32 and int64.
    """
    if not len(crowded):
        return
    every = torch.arange(len(rows), device=rows.device)
    first, queries = every, crowded
    if len(crowded) >= LEAST_GROUP:
        first = first_copies(rows, segments)
        if stops is None:
            # A copy has its answer from the original.
            queries = crowded[first[crowded] == crowded]
        if rows.is_cuda:
            ends = every if stops is None else stops.to(rows.device)
            whole = Subset(rows, every, segments.to(rows.device), ends)
            queries = _answer_groups(whole, first == every, queries, search, scores, index)
    is_involved = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    is_involved[candidates_of(queries)] = True
    is_involved &= first == every
    is_involved[queries] = True
    involved = is_involved.nonzero().flatten()
    Subset.of(rows, segments, stops, involved).answer(torch.searchsorted(involved, queries), search, scores, index)
    if stops is None:
        copies = crowded[first[crowded] != crowded]
        originals = first[copies]
        # The original's own answer is earlier, if it cannot be told from a copy either: in float64, not in float32.
        tied = originals[scores[originals] == 1].unique()
        is_tied = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        is_tied[tied] = certify.snap(certify.cosines64(rows, tied, index[tied])) == 1
        index[copies] = torch.where(is_tied[originals], index[originals], originals)
        scores[copies] = 1.0


def first_copies(rows: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """For each row, return the first row of its segment that is equal to it bit by bit.

    Parameters
    ----------
    rows : torch.Tensor
        (n, d) float32.
    segments : torch.Tensor
        (k + 1,) int64 offsets.
    """
    # Two numbers at a time, where rows begin at whole words.
    bits = rows.view(torch.int32) if rows.shape[1] % 2 else rows.view(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (bits.shape[1],), generator=generator).to(rows.device) * 2 + 1
    every = torch.arange(len(rows), device=rows.device)
    hashes = torch.searchsorted(segments.to(rows.device), every, right=True) * 0x9E3779B97F4A7C1
    for chunk in certify.pieces(rows, 8 * bits.shape[1]):
        # Products and sums of int64 wrap around.
        hashes[chunk] += (bits[chunk] * factors).sum(dim=1)
    _, group = hashes.unique(return_inverse=True)
    first = torch.full_like(every, len(rows)).scatter_reduce_(0, group, every, "amin")[group]
    later = (first != every).nonzero().flatten()
    for chunk in certify.chunks(len(later), 8 * rows.shape[1], PIECE_BYTES):
        # Hashes of different rows may be equal.
        copy = later[chunk]
        is_copy = (bits[copy] == bits[first[copy]]).all(dim=1)
        first[copy] = torch.where(is_copy, first[copy], copy)
    return first


@dataclass(frozen=True)
class Subset:
    """A subset of the rows, in their order, with segments and stops among themselves.

    Attributes
    ----------
    rows : torch.Tensor
        (m, d) float32.
    where : torch.Tensor
        (m,) int64 positions among all rows.
    segments, stops : torch.Tensor
        (k + 1,) and (m,) int64.
    """

    rows: torch.Tensor
    where: torch.Tensor
    segments: torch.Tensor
    stops: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, segments: torch.Tensor, stops: torch.Tensor | None, where: torch.Tensor) -> Subset:
        """Return the rows at `where`, ascending."""
        ends = where if stops is None else stops.to(rows.device)[where]
        return cls(
            rows[where],
            where,
            torch.searchsorted(where, segments.to(rows.device)),
            torch.searchsorted(where, ends),
        )

    def part(self, which: torch.Tensor) -> Subset:
        """Return a subset of the subset."""
        part = Subset.of(self.rows, self.segments, self.stops, which)
        return replace(part, where=self.where[which])

    def answer(
        self,
        queries: torch.Tensor,
        search: Search,
        scores: torch.Tensor,
        index: torch.Tensor,
        centred: Centred | None = None,
    ) -> None:
        """Search for some rows among all, and write their answers."""
        if not len(queries):
            return
        starts = self.segments[:-1].repeat_interleave(self.segments.diff())
        starts[queries] = self.stops[queries]
        found, where = search(self.rows, self.segments.cpu(), starts.cpu(), centred=centred)
        scores[self.where[queries]] = found[queries]
        index[self.where[queries]] = self.where[where[queries]]


def _answer_groups(
    rows: Subset,
    is_original: torch.Tensor,
    queries: torch.Tensor,
    search: Search,
    scores: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """Answer large groups of near-copies, one after the other, and return the remaining queries.

    Two rows within an angle ``t`` of the mean of a group are within ``2 t`` of each other. So a row of the group that
    has such a row among its candidates is nearest to a row within ``3 t`` of the mean.
    """
    while len(queries) >= LEAST_GROUP:
        alike = _most_alike(rows.rows, queries)
        if len(alike) < LEAST_GROUP:
            break
        mean = _mean(rows.rows, alike)
        # Cosines in float32, with what they may lose.
        cosine = _cosines(rows.rows, mean / torch.linalg.vector_norm(mean))
        error = 2 * certify.accumulation_bound(rows.rows.shape[1]) + 2 * certify.UNIT_TOLERANCE
        least = cosine[alike].min()
        farthest = torch.acos((least.double() - error).clamp(-1, 1))
        is_near = (cosine >= torch.cos((3 * farthest).clamp_(max=math.pi)) - error) & is_original
        is_near[alike] = True
        near = is_near.nonzero().flatten()
        part = rows.part(near)
        alike = torch.searchsorted(near, alike)
        # Those with a candidate that is as near to the mean as the group is.
        before = torch.zeros(len(near) + 1, dtype=torch.int64, device=near.device)
        torch.cumsum(cosine[near] >= least, dim=0, out=before[1:])
        starts = part.segments[:-1].repeat_interleave(part.segments.diff())
        alike = alike[before[part.stops[alike]] > before[starts[alike]]]
        close = centred(part.rows, mean) if len(alike) >= LEAST_GROUP // 2 else None
        if close is None:
            break
        part.answer(alike, search, scores, index, close)
        is_left = torch.ones(len(scores), dtype=torch.bool, device=near.device)
        is_left[near[alike]] = False
        queries = queries[is_left[queries]]
    return queries


def _most_alike(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Return those that are at least `ALIKE` similar to one of them, which has many such."""
    unit = torch.nn.functional.normalize(rows[which], dim=1)
    some = unit[torch.arange(LEADERS, device=rows.device) * len(which) // LEADERS]
    leader = (some @ unit[:: max(1, len(unit) // 16_384)].T >= ALIKE).sum(dim=1).argmax()
    return which[unit @ some[leader] >= ALIKE]


class Centred(NamedTuple):
    """Float16 rows whose products order candidates more finely than the products of the rows themselves.

    Let ``m`` be the mean of some rows that are nearly alike, ``u = m + a`` and ``v = m + b``. For a given ``u`` ::

        u.v  =  u.m + m.b + a.b

    orders candidates ``v`` as ``m.b + a.b`` does. The more alike the rows are, the smaller are these products, and what
    rounding adds to them.

    Attributes
    ----------
    queries, candidates : torch.Tensor
        (n, d + 3) float16, scaled so that no product exceeds 1.
    error : torch.Tensor
        (n,) float32 bounds on the errors of a query's products.
    """

    queries: torch.Tensor
    candidates: torch.Tensor
    error: torch.Tensor


def centred(rows: torch.Tensor, mean: torch.Tensor) -> Centred | None:
    """Return rows relative to a mean, or None if that makes products hardly smaller.

    Parameters
    ----------
    rows : torch.Tensor
        (n, d) float32, none of them zero.
    mean : torch.Tensor
        (d,) float64.
    """
    n, width = rows.shape
    pieces = _pieces(rows)
    norm, linear = torch.empty(2, n, dtype=torch.float64, device=rows.device)
    for chunk in pieces:
        off = _unit64(rows[chunk]) - mean
        norm[chunk] = torch.linalg.vector_norm(off, dim=1)
        linear[chunk] = off @ mean
    largest, largest_linear = norm.max(), linear.abs().max()
    size = largest.square() + largest_linear
    if not bool(size < TIGHT):
        return None
    scale = size.rsqrt()
    # The linear term is the sum of three halves, each multiplied by the same factor.
    queries, candidates = torch.zeros(2, n, -(-(width + 3) // 8) * 8, dtype=torch.float16, device=rows.device)
    lost = torch.empty(n, dtype=torch.float64, device=rows.device)
    for chunk in pieces:
        off = (_unit64(rows[chunk]) - mean) * scale
        half = off.half()
        queries[chunk, :width] = candidates[chunk, :width] = half
        lost[chunk] = torch.linalg.vector_norm(half.double() - off, dim=1)
    queries[:, width : width + 3] = FACTOR
    rest = linear * scale.square() / FACTOR
    for column in range(width, width + 3):
        candidates[:, column] = rest.half()
        rest -= candidates[:, column].double()
    norm *= scale
    farthest = lost.max()
    error = lost * norm.max() + (norm + lost) * farthest + FACTOR * rest.abs().max()
    # As in `triton_engine.nearest`: tensor cores may lose more than rounding does.
    error += 2 * certify.accumulation_bound(width + 3) * (norm * norm.max() + largest_linear * scale.square())
    return Centred(queries, candidates, (error * (1 + 2.0**-10)).float())


FACTOR = 1 / 16
"""What the linear term is divided by, so that its halves are large enough to be exact."""


def _mean(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Return the float64 mean of unit rows."""
    mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for chunk in certify.chunks(len(which), 8 * rows.shape[1], PIECE_BYTES):
        mean += _unit64(rows[which[chunk]]).sum(dim=0)
    return mean / len(which)


def _cosines(rows: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return the float32 cosines of rows with a unit vector of float64; NaN for zero rows."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    cosine = rows @ unit.float() / norm
    low, high = certify.SAFE_NORMS
    extreme = (~((norm > low) & (norm < high))).nonzero().flatten()
    for chunk in certify.chunks(len(extreme), 8 * rows.shape[1], PIECE_BYTES):
        cosine[extreme[chunk]] = (_unit64(rows[extreme[chunk]]) @ unit).float()
    return cosine


def _unit64(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    rows /= rows.abs().amax(dim=1, keepdim=True)
    return torch.nn.functional.normalize(rows, dim=1)


def _pieces(rows: torch.Tensor) -> list[slice]:
    return certify.chunks(len(rows), 8 * rows.shape[1], PIECE_BYTES)
