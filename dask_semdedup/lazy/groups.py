"""Groups of duplicates: for each duplicate, the document that is kept in the end.

The ``max_id`` of a duplicate may itself be a duplicate of a third row. Such chains end at a kept row. They are followed
by *pointer jumping*: each row points to its preferred row, and each pass replaces every pointer by the pointer of the
row that it points to. So each pass doubles the distance that a pointer covers.
"""

from __future__ import annotations

import dask.dataframe as dd
from dask.dataframe.api import new_collection

from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.frames.columns import SCORE_COLUMN
from dask_semdedup.lazy.expressions import is_against
from dask_semdedup.lazy.held import check_held, eps_of
from dask_semdedup.lazy.pushdown import OfDuplicates
from dask_semdedup.steps.duplicates import check_eps, check_score_columns, threshold
from dask_semdedup.steps.groups import linked, resolve

__all__ = ["find_groups"]


def find_groups(scores: dd.DataFrame, eps: float | None) -> dd.DataFrame:
    """Find the document that is kept for each duplicate, lazily: see `SemDedupAccessor.groups`."""
    eps = eps_of(scores) if eps is None else eps
    check_eps(eps)
    check_score_columns(scores, ["id", "max_id", SCORE_COLUMN])
    check_held(scores, [eps])
    if is_against(scores.expr):
        raise InvalidArgumentError(
            "These are scores of `against`: a max_id there is a row of the reference, which is kept, so that there are "
            "no chains to follow. Use `duplicates`."
        )
    scores = scores[["id", "max_id", SCORE_COLUMN]]
    pairs = new_collection(OfDuplicates(scores.expr, linked, eps, threshold(eps))).repartition(npartitions=1)
    return pairs.map_partitions(resolve, meta=resolve(pairs._meta), clear_divisions=True)
