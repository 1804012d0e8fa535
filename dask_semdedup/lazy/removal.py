"""Removal of duplicates from the data: an anti-join on ids that keeps everything else.

The ids to remove are sent to every partition of the data, or both frames are shuffled by id. One pass over the ids
alone checks that no id to remove occurs in two rows. No partition is returned before that pass is done.
"""

from __future__ import annotations

from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask.dataframe.api import new_collection

from dask_semdedup._dask import AnyExpr, BackendData, FromPandas, Projection
from dask_semdedup._validate import type_name
from dask_semdedup.errors import IdError, InvalidArgumentError, MissingColumnsError, some
from dask_semdedup.frames.backend import check_plain_dtype, is_cudf, to_list
from dask_semdedup.frames.columns import SCORE_COLUMN
from dask_semdedup.frames.ids import check_same_kind, repeats
from dask_semdedup.lazy.duplicates import select_duplicates
from dask_semdedup.lazy.expressions import CheckedIds, RowsKept, ShuffleByCluster, is_against
from dask_semdedup.lazy.sources import by_itself
from dask_semdedup.lazy.tasks import compute
from dask_semdedup.steps.duplicates import check_eps, eps_column
from dask_semdedup.steps.removal import HASH_COLUMN, find_ids, hash_column, ids_to_remove, null_ids, repeated_ids

__all__ = ["check_ids", "remove_duplicates"]


def remove_duplicates(
    ddf: dd.DataFrame,
    duplicates: Any,
    left_on: str,
    right_on: str = "id",
    *,
    eps: float | None = None,
    broadcast: bool = True,
    of_itself: bool = False,
) -> dd.DataFrame:
    """Remove the rows whose ids are those of duplicates, lazily: see `SemDedupAccessor.remove`.

    With `of_itself`, the duplicates are those of `deduplicate`: a null id in the data is an error. Without it, a row of
    a null id is kept, and the duplicates may be those of another frame.
    """
    _check_id_column(ddf, left_on, "id_field", "the data")
    _refuse_rows(duplicates, ddf)
    duplicates = _select(_to_dask(duplicates), right_on, eps, id_field=left_on, of_itself=of_itself)
    if is_cudf(duplicates._meta) != is_cudf(ddf._meta):
        duplicates = duplicates.to_backend("cudf" if is_cudf(ddf._meta) else "pandas")
    check_same_kind(ddf._meta[left_on], duplicates._meta[right_on])
    ids = by_itself(ddf[[left_on]])
    if broadcast:
        duplicates = duplicates.repartition(npartitions=1)
    else:
        duplicates = _shuffle_by_id(duplicates, right_on, ddf.npartitions)
        ids, ddf = (_shuffle_by_id(frame, left_on, ddf.npartitions) for frame in (ids, ddf))
    found = ids.map_partitions(
        find_ids, duplicates, left_on, right_on, refuse_null=of_itself, meta=ids._meta, align_dataframes=False
    )
    if broadcast:
        found = found.repartition(npartitions=1)
    repeated = found.map_partitions(repeated_ids, meta=ids._meta).repartition(npartitions=1)
    checked = CheckedIds(duplicates.expr, repeated.expr)
    return new_collection(RowsKept(ddf.expr, checked, left_on=left_on, right_on=right_on))


def check_ids(ids: dd.Series) -> None:
    """Check a column of ids now, and raise if an id is null or occurs twice.

    This process holds eight bytes per row.

    Raises
    ------
    IdError
        With a few of the ids.
    """
    check_plain_dtype(ids._meta, "id_field")
    meta = hash_column(ids._meta)
    missing, hashes = compute(ids.isna().sum(), ids.dropna().map_partitions(hash_column, meta=meta))
    if missing:
        raise null_ids(ids.name, int(missing))
    values, counts = np.unique(hashes.to_numpy(), return_counts=True)
    if (counts == 1).all():
        return
    (doubtful,) = compute(ids.map_partitions(_of_hashes, values[counts > 1], meta=ids._meta))
    if count := len(repeated := doubtful[repeats(doubtful)].drop_duplicates()):
        occur = "1 id occurs" if count == 1 else f"{count:,} ids occur"
        raise IdError(
            f"Column {ids.name!r}: {occur} in several rows ({some(to_list(repeated))}). Name a column of unique "
            "ids as id_field; or pass make_ids=True to have ids made, and name a new column as id_field.",
            parameters=["id_field", "make_ids"],
            columns=[ids.name],
        )


def _of_hashes(ids: Any, hashes: np.ndarray) -> Any:
    return ids[hash_column(ids).isin(hashes)]


def _check_id_column(frame: Any, name: str, parameter: str, what: str) -> None:
    if name not in frame.columns:
        raise MissingColumnsError.build(
            [name], frame.columns, f"Name the column of ids of {what} as {parameter}.", parameters=[parameter]
        )
    check_plain_dtype(frame._meta[name], parameter)


def _refuse_rows(duplicates: Any, ddf: dd.DataFrame) -> None:
    """Raise for rows of the data, which are more likely to be those to keep than those to remove."""
    columns = set(getattr(duplicates, "columns", ()))
    if len(ddf.columns) > 1 and columns >= set(ddf.columns) and "max_id" not in columns:
        raise InvalidArgumentError(
            "duplicates have all columns of this frame, as the rows that `deduplicate` or `remove` keeps. Pass scores "
            "of `pairwise` or `against`; or, to remove these rows, their ids alone: frame[[id_field]].",
            parameters=["duplicates"],
        )


def _to_dask(duplicates: Any) -> dd.DataFrame:
    if isinstance(duplicates, dd.DataFrame):
        expr: AnyExpr = duplicates.expr
        while isinstance(expr, Projection):
            expr = expr.frame
        if isinstance(expr, RowsKept):
            raise InvalidArgumentError(
                "duplicates are the rows that `deduplicate` or `remove` keeps. Pass the rows to drop, such as the "
                "scores of `pairwise` or `against`.",
                parameters=["duplicates"],
            )
        return duplicates
    if not isinstance(duplicates, pd.DataFrame) and not (is_cudf(duplicates) and hasattr(duplicates, "columns")):
        raise InvalidArgumentError(
            f"duplicates must be a DataFrame of Dask, pandas or cuDF, not {type_name(duplicates)}.",
            parameters=["duplicates"],
        )
    # `from_pandas` would make strings of objects, which may be integers or UUIDs.
    return new_collection(
        FromPandas(BackendData(duplicates.copy()), npartitions=1, sort=False, pyarrow_strings_enabled=False)
    )


def _select(duplicates: dd.DataFrame, ids: str, eps: float | None, **compared: Any) -> dd.DataFrame:
    """Return the ids to remove from a frame of scores, or of duplicates at one eps or several."""
    _check_id_column(duplicates, ids, "duplicates_id_field", "the duplicates")
    flags = [name for name in duplicates.columns if str(name).startswith("eps=")]
    if eps is None and flags:
        raise InvalidArgumentError(
            f"duplicates hold all rows and what is a duplicate at {', '.join(flags)}: choose one, as remove(..., "
            f"{flags[0]}).",
            parameters=["eps"],
        )
    flag = None
    if eps is not None:
        check_eps(eps)
        flag = eps_column(eps) if flags else None
        if flags and flag not in flags:
            raise InvalidArgumentError(
                f"duplicates were found at {', '.join(flags)}, not at {flag}.", parameters=["eps"]
            )
        duplicates = duplicates if flags else select_duplicates(duplicates, eps)
    are_scores = {"id", "max_id", SCORE_COLUMN} <= set(duplicates.columns) and ids == "id"
    # Ids of another frame may be the same.
    are_scores &= not is_against(duplicates.expr)
    needed = [ids, *(["max_id", SCORE_COLUMN] if are_scores else []), *([] if flag is None else [flag])]
    options: dict[str, Any] = {"are_scores": are_scores, "flag": flag, "is_chosen": eps is not None, **compared}
    return duplicates[needed].map_partitions(
        ids_to_remove,
        ids,
        **options,
        meta=ids_to_remove(duplicates._meta[needed], ids, **options),
        clear_divisions=True,
    )


def _shuffle_by_id(frame: dd.DataFrame, name: str, npartitions: int) -> dd.DataFrame:
    """Bring equal ids of any dtypes into partitions of the same number, which Dask's own hash may not do."""
    ids = frame[name]
    hashes = ids.map_partitions(hash_column, meta=hash_column(ids._meta))
    hashed = frame.assign(**{HASH_COLUMN: hashes})
    return new_collection(ShuffleByCluster(hashed.expr, [HASH_COLUMN], npartitions))[list(frame.columns)]
