"""Which rows are kept, if each dropped row must be similar to a kept one.

In rank order, a row is dropped if and only if a kept, earlier row is at least `at_least` similar to it. The kept rows
are then the lexicographically first maximal independent set of the graph of similar pairs. A few rounds find it without
a list of the pairs: rows without an earlier neighbour are kept, rows near one of these are dropped, and the rest takes
another round.
"""

from __future__ import annotations

from functools import partial

import torch

from dask_semdedup.search import nearest_earlier
from dask_semdedup.search.crowded import Search

__all__ = ["nearest_kept"]


def nearest_kept(
    rows: torch.Tensor, segments: torch.Tensor, *, at_least: float, search: Search = nearest_earlier
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every dropped row, return the most similar kept, earlier row of its segment.

    Parameters
    ----------
    rows, segments : torch.Tensor
        As of `dask_semdedup.search.nearest_earlier`.
    at_least : float
        A cosine similarity in (0, 1]. Rows that are at least this similar to a kept, earlier row are dropped.
    search : callable
        The search to use: `nearest_earlier` with options.

    Returns
    -------
    scores : torch.Tensor
        (n,) float32, at least `at_least` for dropped rows, and 0.0 for kept ones.
    index : torch.Tensor
        (n,) int64 positions in `rows`: the nearest kept row, the first among equals, or the kept row itself.

    Examples
    --------
    The second row is similar to the first and is dropped. The third is similar only to the second, and is kept:

    >>> angle = torch.tensor([0.0, 20.0, 40.0]).deg2rad()
    >>> rows = torch.stack([angle.cos(), angle.sin()], dim=1)
    >>> nearest_kept(rows, torch.tensor([0, 3]), at_least=0.9)
    (tensor([0.0000, 0.9397, 0.0000]), tensor([0, 0, 2]))
    """
    find = partial(search, at_least=at_least)
    segments = segments.to("cpu", torch.int64)
    scores, index = find(rows, segments)
    every = torch.arange(len(rows), device=rows.device)
    is_kept = index == every
    # The nearest of all rows is the nearest kept one, if it is kept.
    unanswered = undecided = (~is_kept & ~is_kept[index]).nonzero().flatten()
    kept = is_kept.nonzero().flatten()
    while len(undecided):
        _, where = _among(rows, segments, undecided, kept, find)
        undecided = undecided[where == undecided]
        if len(undecided):
            part = torch.searchsorted(undecided, segments.to(rows.device))
            _, where = find(rows[undecided], part)
            kept = undecided[where == torch.arange(len(undecided), device=rows.device)]
            is_kept[kept] = True
            undecided = undecided[~is_kept[undecided]]
    scores[is_kept], index[is_kept] = 0.0, every[is_kept]
    queries = unanswered[~is_kept[unanswered]]
    if len(queries):
        scores[queries], index[queries] = _among(rows, segments, queries, is_kept.nonzero().flatten(), find)
    return scores, index


def _among(
    rows: torch.Tensor, segments: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor, find: Search
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores and the positions of the nearest earlier candidates of queries; the query itself for none."""
    offsets = segments.to(rows.device)
    of_queries, of_candidates = (torch.searchsorted(which, offsets) for which in (queries, candidates))
    # Within each segment, all candidates come before the queries.
    both = torch.cat([candidates, queries])
    is_query = torch.arange(len(both), device=rows.device) >= len(candidates)
    segment = torch.searchsorted(offsets, both, right=True) - 1
    order = (2 * segment + is_query).argsort(stable=True)
    starts = of_queries + of_candidates
    stops = starts[segment]
    before = torch.searchsorted(candidates, queries)
    stops[len(candidates) :] += before - of_candidates[segment[len(candidates) :]]
    scores, where = find(rows[both[order]], starts, stops=stops[order])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=rows.device)
    found = place[len(candidates) :]
    return scores[found], both[order][where[found]]
