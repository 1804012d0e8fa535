"""From scores to duplicates."""

from __future__ import annotations

from numbers import Real
from typing import Any

from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError

__all__ = ["check_eps", "find_duplicates"]

SCORE_COLUMN = "cosine_sim_score"


def check_eps(eps: float) -> None:
    """Raise `InvalidArgumentError` unless `eps` is a cosine distance: a number from 0 to 2.

    Examples
    --------
    >>> check_eps(0.01)
    """
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= eps <= 2:
        raise InvalidArgumentError(f"eps must be a number from 0 to 2, a cosine distance, not {eps!r}.")


def find_duplicates(scores: Any, eps: float) -> Any:
    """Select the rows that are at least ``1 - eps`` similar to a row preferred over them.

    Parameters
    ----------
    scores : pandas, cuDF or Dask DataFrame
        With the column ``cosine_sim_score``.
    eps : float
        Cosine distance, from 0 to 2. From 1 on, the first rows of all clusters are selected as well, since their
        score is 0.

    Returns
    -------
    DataFrame
        The selected rows, with all columns; lazy where `scores` is.

    Raises
    ------
    InvalidArgumentError
        If `eps` is not a number from 0 to 2.
    MissingColumnsError
        If there is no column of scores.

    Examples
    --------
    >>> import pandas as pd
    >>> scores = pd.DataFrame({"id": [1, 2, 3], "max_id": [1, 1, 2], "cosine_sim_score": [0.0, 0.995, 0.9]})
    >>> find_duplicates(scores, eps=0.01)
       id  max_id  cosine_sim_score
    1   2       1             0.995
    """
    check_eps(eps)
    if SCORE_COLUMN not in scores.columns:
        raise MissingColumnsError.build([SCORE_COLUMN], scores.columns, "Scores come from ddf.semdedup.pairwise().")
    return scores[scores[SCORE_COLUMN] >= 1 - eps]
