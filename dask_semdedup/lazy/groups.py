"""Groups of duplicates: the document that is kept in the end for each of them.

The row that makes another one a duplicate (its ``max_id``) may be a duplicate itself, of a third. Such chains end at a
row that is kept. They are followed by *pointer jumping*: each row points to its preferred row, and in each pass every
pointer is replaced by the pointer of the row that it points to, which doubles how far it reaches.
"""

from __future__ import annotations

import dask.dataframe as dd
from dask.dataframe.api import new_collection

from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.frames.columns import SCORE_COLUMN
from dask_semdedup.lazy.expressions import is_against
from dask_semdedup.lazy.pushdown import OfDuplicates
from dask_semdedup.steps.duplicates import check_eps, check_score_columns, threshold
from dask_semdedup.steps.groups import linked, resolve

__all__ = ["find_groups"]


def find_groups(scores: dd.DataFrame, eps: float) -> dd.DataFrame:
    """Find the document that is kept for each duplicate, lazily: see `SemDedupAccessor.groups`."""
    check_eps(eps)
    check_score_columns(scores, ["id", "max_id", SCORE_COLUMN])
    if is_against(scores.expr):
        raise InvalidArgumentError(
            "These are scores of `against`: a max_id there is a row of the reference, which is kept, so that there are "
            "no chains to follow. Use `duplicates`."
        )
    scores = scores[["id", "max_id", SCORE_COLUMN]]
    pairs = new_collection(OfDuplicates(scores.expr, linked, eps, threshold(eps))).repartition(npartitions=1)
    return pairs.map_partitions(resolve, meta=resolve(pairs._meta), clear_divisions=True)
