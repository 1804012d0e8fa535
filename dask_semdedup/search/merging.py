"""The best of several answers: of rows whose candidates are searched in turns, because memory does not hold them all.

The answer is that of one search of all candidates, bit for bit: the largest float64 similarity decides, rounded as in
the search, and among equals the candidate that comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dask_semdedup.search import certify

__all__ = ["MARGIN", "Answers", "cosines"]

MARGIN = 4e-6
"""Two scores, each within 2e-6 of float64, are in the right order if they differ by more than this."""


def cosines(rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Return float64 cosine similarities of pairs of rows, rounded as in the search."""
    return certify.snap(certify.cosines64(rows, query, candidate))


class Answers:
    """The best answers so far of some rows.

    Attributes
    ----------
    scores : torch.Tensor
        (n,) float32, 0.0 for a row without candidates.
    where : torch.Tensor
        (n,) int64 candidates, in whatever numbers they are known by; at first the rows themselves.
    exact : torch.Tensor
        (n,) float64 similarities; -inf for a row without candidates.
    """

    def __init__(self, own: torch.Tensor) -> None:
        self.own, self.where = own, own.clone()
        self.scores = torch.zeros(len(own))
        self.exact = torch.full((len(own),), -math.inf, dtype=torch.float64)

    def add(
        self, scores: torch.Tensor, where: torch.Tensor, exactly: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> None:
        """Take over the answers that are better, or equal and of an earlier candidate.

        Parameters
        ----------
        scores, where : torch.Tensor
            (n,) float32 and int64. A row that is its own answer has none.
        exactly : callable, optional
            Returns the float64 similarities of some of these answers, given the rows' positions. Without it the scores
            decide.
        """
        # Others are surely worse, and to multiply them again would take long.
        may_be_better = (where != self.own) & ((self.exact == -math.inf) | (scores >= self.scores - MARGIN))
        row = may_be_better.nonzero().flatten()
        exact = scores[row].double() if exactly is None else exactly(row)
        held = self.exact[row]
        is_better = (exact > held) | ((exact == held) & (where[row] < self.where[row]))
        row, exact = row[is_better], exact[is_better]
        self.scores[row], self.where[row], self.exact[row] = scores[row], where[row], exact
