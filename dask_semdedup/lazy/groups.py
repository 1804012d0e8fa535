"""Groups of duplicates: the document that is kept in the end for each of them.

The row that makes another one a duplicate (its ``max_id``) may be a duplicate itself, of a third. Such chains end at a
row that is kept. They are followed by *pointer jumping*: each row points to its preferred row, and in each pass every
pointer is replaced by the pointer of the row that it points to, which doubles how far it reaches.
"""

from __future__ import annotations

import dask.dataframe as dd

from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.frames.columns import SCORE_COLUMN
from dask_semdedup.lazy.expressions import is_against
from dask_semdedup.steps.duplicates import check_eps, check_score_columns
from dask_semdedup.steps.groups import _linked, _resolve

__all__ = ["find_groups"]


def find_groups(scores: dd.DataFrame, eps: float) -> dd.DataFrame:
    """Find the document that is kept for each duplicate, lazily: see `SemDedupAccessor.groups`.

    Examples
    --------
    >>> import pandas as pd
    >>> scores = pd.DataFrame({"id": [1, 2, 3], "max_id": [1, 1, 2], "cosine_sim_score": [0.0, 0.995, 0.99]})
    >>> find_groups(dd.from_pandas(scores, npartitions=2), eps=0.01).compute()
       id  kept_id  n_duplicates
    0   2        1             2
    1   3        1             2
    """
    check_eps(eps)
    check_score_columns(scores, ["id", "max_id", SCORE_COLUMN])
    if is_against(scores.expr):
        raise InvalidArgumentError(
            "These are scores of `against`: a max_id there is a row of the reference, which is kept, so that there are "
            "no chains to follow. Use `duplicates`."
        )
    scores = scores[["id", "max_id", SCORE_COLUMN]]
    linked = scores.map_partitions(_linked, eps, meta=_linked(scores._meta, eps)).repartition(npartitions=1)
    return linked.map_partitions(_resolve, meta=_resolve(linked._meta), clear_divisions=True)
