"""From scores to duplicates: the decision by eps, for one eps or several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from dask_semdedup._validate import type_name
from dask_semdedup.errors import IdError, InvalidArgumentError, MissingColumnsError, counted, some
from dask_semdedup.frames.backend import to_list
from dask_semdedup.frames.columns import SCORE_COLUMN
from dask_semdedup.frames.ids import are_equal, is_in

__all__ = [
    "DEFAULT_EPS",
    "check_eps",
    "check_score_columns",
    "eps_column",
    "find_duplicates",
    "has_chain",
    "is_duplicate",
    "threshold",
    "without_first_rows",
]

DEFAULT_EPS = 0.01
"""The eps of whoever names none: it finds little more than copies."""


def check_eps(eps: float) -> None:
    """Raise `InvalidArgumentError` unless `eps` is a cosine distance: a number from 0 to 2."""
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= eps <= 2:
        raise InvalidArgumentError(
            f"eps must be a number from 0 to 2, a cosine distance, not {eps!r}.", parameters=["eps"]
        )


def threshold(eps: Any) -> Any:
    """Return the score from which rows are duplicates, rounded like the scores.

    Parameters
    ----------
    eps : float or array
        Cosine distances.

    Returns
    -------
    numpy.float32 or float32 array
        ``1 - eps``, subtracted in float64 and rounded once.

    Notes
    -----
    With a threshold that is a Python float, a float32 score could be on one side of it in pandas, and on the other side
    in a Parquet reader that filters, which compares in float64. A float32 threshold means the same to both.
    """
    return np.subtract(1, np.asarray(eps, np.float64)).astype(np.float32)


def is_duplicate(scores: Any, eps: float) -> Any:
    """Decide for each score whether its row is a duplicate. No other code decides this.

    Parameters
    ----------
    scores : pandas, cuDF or Dask Series
        Cosine similarities. Other dtypes are rounded to float32.
    eps : float
        Cosine distance.

    Returns
    -------
    Series of bool
    """
    # Without a conversion where none is needed, Dask can push the comparison into a Parquet reader.
    scores = scores if scores.dtype == np.float32 else scores.astype("float32")
    return scores >= threshold(eps)


def find_duplicates(scores: Any, eps: float | Sequence[float]) -> Any:
    """Select the rows that are at least ``1 - eps`` similar to a row preferred over them.

    Parameters
    ----------
    scores : pandas, cuDF or Dask DataFrame
        With the column ``cosine_sim_score``.
    eps : float or sequence of float
        Cosine distance, from 0 to 2. From 1 on, the first rows of all clusters are selected as well, since their
        score is 0.

    Returns
    -------
    DataFrame
        For one eps, the selected rows with all columns. For several, all rows, with a Boolean column for each eps,
        named like ``eps=0.01``. The result is lazy if `scores` is.

    Raises
    ------
    InvalidArgumentError
        If `eps` is not a number from 0 to 2, or is a sequence that is empty or has repeats.
    MissingColumnsError
        If there is no column of scores.
    """
    if is_one_eps(eps):
        check_eps(eps)  # type: ignore[arg-type]
        check_score_columns(scores, [SCORE_COLUMN])
        return scores[is_duplicate(scores[SCORE_COLUMN], eps)]  # type: ignore[arg-type]
    grid = check_several_eps(eps)  # type: ignore[arg-type]
    check_score_columns(scores, [SCORE_COLUMN])
    return scores.assign(**{eps_column(value): is_duplicate(scores[SCORE_COLUMN], value) for value in grid})


def has_chain(duplicates: Any) -> pd.Series:
    """Return whether the preferred row of any duplicate is a duplicate, too.

    Parameters
    ----------
    duplicates : pandas.DataFrame or cudf.DataFrame
        All duplicates, with the columns ``id`` and ``max_id``.

    Returns
    -------
    pandas.Series
        One Boolean.
    """
    return pd.Series([bool(is_in(duplicates["max_id"], duplicates["id"]).any())])


def without_first_rows(duplicates: Any, id_field: str = "id", *, of_itself: bool = False) -> Any:
    """Drop the first rows of clusters, which are their own ``max_id`` with score 0, and are kept at any eps.

    Parameters
    ----------
    duplicates : pandas.DataFrame or cudf.DataFrame
        With the columns ``id``, ``max_id`` and ``cosine_sim_score``.
    id_field : str
        Column of ids of the rows that were compared, for the message.
    of_itself : bool
        Whether the rows are known to be compared with those of their own frame, not by `against`.

    Raises
    ------
    IdError
        If another row is its own ``max_id``: two rows have the same id.
    """
    is_own = are_equal(duplicates["id"], duplicates["max_id"])
    repeated = duplicates["id"][is_own & (duplicates[SCORE_COLUMN] != 0)]
    if len(repeated):
        of_another = "" if of_itself else " If these are scores of `against`, pass their ids alone: scores[['id']]."
        raise IdError(
            f"Column {id_field!r}: ids repeat, so that {counted(len(repeated), 'row')} would be dropped for another "
            f"row of the same id (ids {some(to_list(repeated))}). Drop repeats first, as with "
            f"ddf.drop_duplicates({id_field!r}), or give every row an id of its own.{of_another}",
            columns=[id_field],
        )
    return duplicates[~is_own]


def eps_column(eps: float) -> str:
    """Return the name of the column of duplicates at one of several eps, as in the original SemDeDup."""
    return f"eps={float(eps):g}"


def check_score_columns(scores: Any, required: Iterable[str]) -> None:
    """Raise `MissingColumnsError` unless a frame has these columns of scores."""
    if not hasattr(scores, "columns"):
        raise InvalidArgumentError(
            f"scores must be a DataFrame, not {type_name(scores)}. They come from ddf.semdedup.pairwise().",
            parameters=["scores"],
        )
    required = list(required)
    if not set(required) <= set(scores.columns):
        raise MissingColumnsError.build(required, scores.columns, "Scores come from ddf.semdedup.pairwise().")


def is_one_eps(eps: Any) -> bool:
    """Return whether this is one eps, valid or not, rather than several."""
    return isinstance(eps, (str, bytes)) or not isinstance(eps, Iterable) or getattr(eps, "ndim", 1) == 0


def check_several_eps(eps: Iterable[float]) -> tuple[float, ...]:
    values = list(eps)
    for value in values:
        check_eps(value)
    names = [eps_column(value) for value in values]
    if not names:
        raise InvalidArgumentError(
            "eps must be a number from 0 to 2 or several of them, not an empty sequence.", parameters=["eps"]
        )
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InvalidArgumentError(
            f"eps may not repeat a value, to six digits, as {', '.join(repeated)} does.", parameters=["eps"]
        )
    return tuple(map(float, values))
