"""Duplicates of lazy scores at one eps or several: their rows, and their counts in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.dataframe as dd
import numpy as np
from dask.dataframe.api import new_collection

from dask_semdedup.frames.backend import frame_like
from dask_semdedup.frames.columns import SCORE_COLUMN
from dask_semdedup.lazy.held import check_held, eps_of, held, noted
from dask_semdedup.lazy.pushdown import OfDuplicates
from dask_semdedup.steps.duplicates import (
    check_score_columns,
    check_several_eps,
    find_duplicates,
    is_duplicate,
    is_one_eps,
    threshold,
)

__all__ = ["EPS_GRID", "eps_curve", "select_duplicates"]

EPS_GRID = (0, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
"""Where `eps_curve` counts by default: from exact copies to what few would call duplicates, in about equal ratios."""


def select_duplicates(scores: dd.DataFrame, eps: float | Sequence[float] | None) -> dd.DataFrame:
    """Select the duplicates at one eps or several, if the scores hold them: see `SemDedupAccessor.duplicates`."""
    eps = eps_of(scores) if eps is None else eps
    duplicates = find_duplicates(scores, eps)
    is_one = is_one_eps(eps)
    check_held(scores, [eps] if is_one else eps)  # type: ignore[arg-type, list-item]
    return noted(duplicates) if is_one else duplicates


def eps_curve(scores: dd.DataFrame, eps: Sequence[float] | None) -> dd.DataFrame:
    """Count the duplicates at several eps, in one pass over the scores.

    Parameters
    ----------
    scores : dask.dataframe.DataFrame
        Frame with the column ``cosine_sim_score``. No other column is read.
    eps : sequence of float, optional
        Cosine distances, from 0 to 2. By default those of `EPS_GRID` at which the scores hold all duplicates.

    Returns
    -------
    dask.dataframe.DataFrame
        Lazy frame of one partition: ``eps`` (float64), ``duplicates`` (int64) and ``share`` of all rows that were
        compared (float64, NaN if their number is not known), in the order of `eps`.

    Raises
    ------
    InvalidArgumentError
        If `eps` is not a sequence of different numbers from 0 to 2, or the scores are known not to hold one of them.
    MissingColumnsError
        If there is no column of scores.
    """
    check_score_columns(scores, [SCORE_COLUMN])
    known = held(scores)
    is_all = known is not None and known.is_all
    if eps is None:
        eps = EPS_GRID if known is None or is_all else sorted({known.eps, *filter(known.holds, EPS_GRID)})
    grid = check_several_eps([eps] if is_one_eps(eps) else eps)  # type: ignore[list-item]
    check_held(scores, grid)
    rows = None if known is None or is_all else np.nan if known.rows is None else max(known.rows, 1)
    counts = new_collection(OfDuplicates(scores[SCORE_COLUMN].expr, _count, (grid, is_all), min(map(threshold, grid))))
    return counts.reduction(
        _add,
        combine=_add,
        aggregate=_to_curve,
        meta=_to_curve(counts._meta, grid, rows).iloc[:0],
        aggregate_kwargs={"grid": grid, "rows": rows},
        token="eps-curve",
    )


def _count(scores: Any, options: tuple[Sequence[float], bool]) -> Any:
    """Count the duplicates at each eps, the rows, and the rows that show that these are all, of one partition."""
    grid, is_all = options
    duplicates = [int(is_duplicate(scores, value).sum()) for value in grid]
    shown = len(scores) if is_all else int((scores <= 0).sum())
    columns = {"rows": [len(scores)] * len(grid), "shown": [shown] * len(grid)}
    return frame_like({"duplicates": duplicates, **columns}, scores)


def _add(counts: Any) -> Any:
    """Sum the counts of several partitions, which are concatenated and have the same labels."""
    return counts.groupby(level=0, sort=True).sum()


def _to_curve(counts: Any, grid: Sequence[float], rows: Any) -> Any:
    total = _add(counts)
    total.insert(0, "eps", np.asarray(grid, np.float64))
    if rows is None:
        # No rows have a share of 0, not of NaN.
        rows = total["rows"].clip(lower=1).where((total["shown"] > 0) | (total["rows"] == 0))
    total["share"] = total["duplicates"] / rows
    return total[["eps", "duplicates", "share"]]
