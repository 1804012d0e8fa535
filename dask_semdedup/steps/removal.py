"""One partition of a removal: ids to remove, ids found, ids that repeat."""

from __future__ import annotations

from typing import Any

import numpy as np
from dask.dataframe.dispatch import concat

from dask_semdedup.errors import IdError, InvalidArgumentError, have, some
from dask_semdedup.frames.backend import frame_like, to_list
from dask_semdedup.frames.hashing import hash_ids
from dask_semdedup.frames.ids import are_equal, is_in, repeats
from dask_semdedup.steps.duplicates import without_first_rows

HASH_COLUMN = "_semdedup_id_hash"


def ids_to_remove(
    frame: Any, name: str, *, are_scores: bool, flag: str | None, is_chosen: bool, **compared: Any
) -> Any:
    """Return the ids of one partition's duplicates, without the first rows of clusters.

    What was `compared` is told to `without_first_rows`. If such rows are present and no eps is chosen, the frame also
    holds rows that are not duplicates.
    """
    if flag is not None:
        frame = frame[frame[flag].astype("bool")]
    if are_scores:
        duplicates = without_first_rows(frame, **compared)
        if not is_chosen and (count := len(frame) - len(duplicates)):
            first = some(to_list(frame[name][are_equal(frame["id"], frame["max_id"])]))
            raise InvalidArgumentError(
                f"These are scores of all rows, not of duplicates alone: {have(count, 'row')} no preferred row "
                f"(ids {first}). Pass the eps at which rows are duplicates, as remove(..., eps=...).",
                parameters=["eps"],
            )
        frame = duplicates
    return frame[[name]].dropna().reset_index(drop=True)


def hash_column(ids: Any) -> Any:
    """Return a column of int64, equal for equal ids."""
    hashes = frame_like({HASH_COLUMN: hash_ids(ids, 0).view(np.int64)}, ids)[HASH_COLUMN]
    hashes.index = ids.index
    return hashes


def find_ids(frame: Any, duplicates: Any, left_on: str, right_on: str, *, refuse_null: bool = False) -> Any:
    """Return the ids of one partition that are ids of duplicates: each once, or twice if it repeats."""
    if refuse_null and (count := int(frame[left_on].isna().sum())):
        raise null_ids(left_on, count)
    found = frame[is_in(frame[left_on], duplicates[right_on])]
    return concat([found[~repeats(found[left_on])], repeated_ids(found)])


def null_ids(name: Any, count: int) -> IdError:
    """Return the error for rows without an id, which cannot be dropped."""
    return IdError(
        f"Column {name!r}: {have(count, 'row')} a null id. Give every row an id, or drop it. Other "
        "partitions may have more.",
        parameters=["id_field"],
        columns=[name],
    )


def repeated_ids(frame: Any) -> Any:
    """Return the ids that occur in several rows, each once."""
    again = frame[repeats(frame[frame.columns[0]])]
    return again[~repeats(again[again.columns[0]])]


def checked_ids(duplicates: Any, repeated: Any) -> Any:
    """Return the ids to remove, or raise `IdError` if any of them repeats in the data."""
    if count := len(repeated):
        name = repeated.columns[0]
        ids, them = (
            ("1 id of the duplicates occurs", "it") if count == 1 else (f"{count} ids of the duplicates occur", "them")
        )
        raise IdError(
            f"Column {name!r}: {ids} in several rows of the data (ids {some(to_list(repeated[name]))}). "
            f"Dropping {them} would also drop rows that are not duplicates. Give every row an id of its own, or drop "
            "repeats first.",
            columns=[name],
        )
    return duplicates
