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
        self,
        rows: torch.Tensor,
        scores: torch.Tensor,
        where: torch.Tensor,
        exactly: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        """Take over the answers that are better, or equal and of an earlier candidate.

        Parameters
        ----------
        rows : torch.Tensor
            (m,) int64 positions of the rows that these are the answers of, each once.
        scores, where : torch.Tensor
            (m,) float32 and int64. A row that is its own answer has none.
        exactly : callable, optional
            Returns the float64 similarities of some of these answers, given their positions. Without it the scores
            decide.
        """
        # Others are surely worse, and to multiply them again would take long.
        has_none = self.exact[rows] == -math.inf
        may_be_better = (where != self.own[rows]) & (has_none | (scores >= self.scores[rows] - MARGIN))
        answer = may_be_better.nonzero().flatten()
        exact = scores[answer].double() if exactly is None else exactly(answer)
        held, before = self.exact[rows[answer]], self.where[rows[answer]]
        is_better = (exact > held) | ((exact == held) & (where[answer] < before))
        answer, exact = answer[is_better], exact[is_better]
        row = rows[answer]
        self.scores[row], self.where[row], self.exact[row] = scores[answer], where[answer], exact
