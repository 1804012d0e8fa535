"""Groups of duplicates in memory: follow chains of preferred rows to the kept row."""

from __future__ import annotations

from typing import Any

import numpy as np
from dask.dataframe.dispatch import concat

from dask_semdedup.errors import IdError, have, some
from dask_semdedup.frames.backend import to_list
from dask_semdedup.frames.columns import SCORE_COLUMN
from dask_semdedup.frames.ids import factorize, is_in
from dask_semdedup.steps.duplicates import is_duplicate, without_first_rows

__all__ = ["resolve_groups"]


def linked(scores: Any, eps: float) -> Any:
    """The duplicates, and the rows that are kept of which they are duplicates."""
    is_other = is_duplicate(scores[SCORE_COLUMN], eps)
    duplicates = without_first_rows(scores[is_other])[["id", "max_id"]]
    kept = scores[~is_other][["id", "max_id"]]
    kept = kept[is_in(kept["id"], duplicates["max_id"])]
    return concat([duplicates.assign(is_kept=False), kept.assign(is_kept=True)], ignore_index=True)


def resolve(linked: Any) -> Any:
    """Follow the chains, unless an id is that of a duplicate in one cluster and of a row that is kept in another."""
    duplicates, kept = linked[~linked["is_kept"]], linked[linked["is_kept"]]
    both = kept["id"][is_in(kept["id"], duplicates["id"])]
    if len(both):
        raise IdError(
            f"{have(len(both), 'row')} duplicates and the id of another row, which is a duplicate itself (ids "
            f"{some(to_list(both))}). The row that a max_id means is ambiguous: give every row an id of its own."
        )
    return resolve_groups(duplicates[["id", "max_id"]])


def resolve_groups(duplicates: Any) -> Any:
    """Follow each duplicate's chain of preferred rows to its end.

    Parameters
    ----------
    duplicates : pandas.DataFrame or cudf.DataFrame
        All duplicates, with the columns ``id`` and ``max_id``. Rows that are their own ``max_id`` are the first of
        their clusters: they are kept and are not duplicates.

    Returns
    -------
    DataFrame
        A frame of the same backend with a row for each duplicate, in the same order: ``id`` and ``kept_id``, both of
        the dtype of the ids, and ``n_duplicates`` (int64), the number of duplicates that the kept document replaces.

    Raises
    ------
    IdError
        If ids are null or repeat, or a chain is a cycle.

    Notes
    -----
    Chains of n duplicates take ``ceil(log2(n))`` passes. A chain is a cycle if it has not ended after the passes that a
    chain of all duplicates would take.

    References
    ----------
    J. JáJá, "An Introduction to Parallel Algorithms", 1992, section 2.2: pointer jumping.
    """
    codes = factorize(duplicates["id"], duplicates["max_id"])
    own, preferred = codes[: len(duplicates)], codes[len(duplicates) :]
    _check_null(own, preferred)
    is_other = own != preferred
    own, preferred = own[is_other], preferred[is_other]
    duplicates = duplicates.iloc[is_other.nonzero()[0]].reset_index(drop=True)
    size = int(codes.max()) + 1 if len(codes) else 0
    _check_repeated(duplicates["id"], own, size)

    kept = _ends(own, preferred, size, duplicates["id"])
    # The last link of a chain is a row whose max_id is the document kept: there its id is found.
    last_links = np.zeros(size, np.int64, like=codes)
    last_links[preferred] = np.arange(len(own), like=codes)
    groups = duplicates["id"].to_frame("id")
    groups["kept_id"] = duplicates["max_id"].iloc[last_links[kept]].reset_index(drop=True)
    groups["n_duplicates"] = np.bincount(kept, minlength=size)[kept].astype(np.int64)
    return groups


def _ends(own: Any, preferred: Any, size: int, ids: Any) -> Any:
    """The numbers of the documents at which the chains of duplicates end."""
    is_duplicate = np.zeros(size, bool, like=own)
    is_duplicate[own] = True
    pointers = np.arange(size, like=own)
    pointers[own] = preferred
    for _ in range(len(own).bit_length()):
        if not is_duplicate[pointers].any():
            break
        pointers = pointers[pointers]
    if (lost := is_duplicate[pointers[own]]).any():
        lost_ids = to_list(ids.iloc[lost.nonzero()[0]])
        raise IdError(
            f"{have(len(lost_ids), 'duplicate')} no document kept for them: their max_ids form a cycle "
            f"(ids {some(lost_ids)}). Scores of one run never do: compute them again, from ids that do not repeat."
        )
    return pointers[own]


def _check_null(own: Any, preferred: Any) -> None:
    for name, codes in (("id", own), ("max_id", preferred)):
        if count := int((codes < 0).sum()):
            raise IdError(
                f"Column {name!r}: {have(count, 'duplicate')} a null id. Give every row an id.", columns=[name]
            )


def _check_repeated(ids: Any, own: Any, size: int) -> None:
    counts = np.bincount(own, minlength=size)
    if count := int((counts > 1).sum()):
        repeated = ids.iloc[(counts[own] > 1).nonzero()[0]].drop_duplicates()
        raise IdError(
            f"{count} of {int((counts > 0).sum())} ids repeat among the duplicates (ids {some(to_list(repeated))}). "
            "The row that a max_id means is ambiguous: give every row an id of its own."
        )
