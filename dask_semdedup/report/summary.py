"""Scores summed up partition by partition: what pictures and pages show of them, without holding them.

A summary is small however many scores there are, and summaries of parts merge into that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any, TypeVar

import dask
import numpy as np
import pandas as pd

from dask_semdedup.frames.columns import SCORE_COLUMN, SCORE_COLUMNS
from dask_semdedup.steps.duplicates import check_eps, check_score_columns, is_duplicate, threshold

__all__ = ["ScoreSummary", "delayed_parts", "merge_tree", "summarize"]

# Fine bins from which a histogram's bars are put together: of equal width below the threshold, and so many above it,
# a number with many divisors.
FINE_WIDTH, FINE_ABOVE = 2**-15, 5040

FANOUT = 16

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreSummary:
    """What a frame of scores holds, in counts.

    Only rows that were compared with another are counted, all but the first of each cluster; `rows` counts all.

    Parameters
    ----------
    rows, compared : int
        All rows, and those that were compared.
    lowest : float
        The lowest score of those that were compared, or 1 where there are none.
    eps : float or None
        The choice of eps: the duplicates of `clusters` are of it.
    largest_eps : float
        The end of the grid.
    at_least : ndarray of int64
        How many scores there are from each of the `thresholds` on.
    clusters : DataFrame or None
        ``rows`` and ``duplicates`` of each cluster, where the scores have a column of them.
    """

    rows: int
    compared: int
    lowest: float
    eps: float | None
    largest_eps: float
    at_least: np.ndarray
    clusters: pd.DataFrame | None

    @property
    def grid(self) -> np.ndarray:
        """Values of eps whose duplicates are counted, ascending."""
        return _grid(self.eps, self.largest_eps)

    @property
    def thresholds(self) -> np.ndarray:
        """Scores whose number is counted, ascending."""
        return _thresholds(self.eps, self.largest_eps)

    def duplicates(self, eps: Any) -> Any:
        """Number of duplicates at one or several values of eps, of the `grid`.

        Raises
        ------
        ValueError
            If one of them is not of the grid.
        """
        wanted = threshold(eps)
        index = np.searchsorted(self.thresholds, wanted)
        if not np.array_equal(self.thresholds.take(index, mode="clip"), wanted):
            raise ValueError(f"The summary does not count the duplicates at eps={eps!r}, only those of its grid.")
        return self.at_least[index]

    def histogram(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges and counts of about so many bars between the lowest score and 1.

        One edge is exactly at the threshold, so that no bar has two colours.
        """
        border = 1.0 if self.eps is None else float(threshold(self.eps))
        lowest = min(self.lowest, border)
        step = max(1, round((1 - lowest) / bins / FINE_WIDTH))
        width = step * FINE_WIDTH
        above = min(_DIVISORS, key=lambda count: abs(count - (1 - border) / width)) if border < 1 else 0
        below = max(0 if above else 1, int(np.ceil((border - lowest) / width)))
        fine = _edges_below(border)
        # Rounding may have lost what is a little lower.
        below += below > 0 and bool(fine[max(-step * below, -len(fine))] > lowest)
        edges_below = fine[np.maximum(-step * np.arange(below, 0, -1), -len(fine))]
        edges = np.concatenate([edges_below, _edges_above(border)[:: FINE_ABOVE // above] if above else [1.0]])
        at_least = self.at_least[np.searchsorted(self.thresholds, edges.astype(np.float32))]
        at_least[0], at_least[-1] = self.compared, 0
        return edges, -np.diff(at_least)

    def merge(self, other: ScoreSummary) -> ScoreSummary:
        """The summary of both frames, which were counted at the same thresholds."""
        clusters = self.clusters
        if clusters is not None:
            clusters = pd.concat([clusters, other.clusters]).groupby(level=0).sum()
        return ScoreSummary(
            self.rows + other.rows,
            self.compared + other.compared,
            min(self.lowest, other.lowest),
            self.eps,
            self.largest_eps,
            self.at_least + other.at_least,
            clusters,
        )


_DIVISORS = [count for count in range(1, FINE_ABOVE + 1) if FINE_ABOVE % count == 0]


def summarize(
    scores: Any, eps: float | None = 0.01, *, largest_eps: float = 0.2, cluster_field: str = "centroid"
) -> ScoreSummary:
    """Sum scores up.

    Parameters
    ----------
    scores : pandas, cuDF or Dask DataFrame, or ScoreSummary
        What ``pairwise`` returns, with or without the column of clusters. A Dask DataFrame is read partition by
        partition; a summary is returned as it is.
    eps : float, optional
        The choice of eps.
    largest_eps : float
        Where the grid of eps ends; it begins at 0.
    cluster_field : str
        Column of clusters.

    Returns
    -------
    ScoreSummary

    Raises
    ------
    MissingColumnsError
        If the scores lack a column.
    InvalidArgumentError
        If `eps` is not a number from 0 to 2.
    """
    if isinstance(scores, ScoreSummary):
        return scores
    count = summary_maker(scores, eps, largest_eps=largest_eps, cluster_field=cluster_field)
    parts = delayed_parts(scores, count.columns)
    if parts is None:
        return count(scores)
    return merge_tree([dask.delayed(count)(part) for part in parts], ScoreSummary.merge).compute()


@dataclass(frozen=True)
class SummaryMaker:
    """Makes the summary of a frame in memory: the task of each partition."""

    eps: float | None
    largest_eps: float
    cluster_field: str | None

    @property
    def columns(self) -> list[str]:
        """The columns that are needed."""
        return [*SCORE_COLUMNS, *([self.cluster_field] if self.cluster_field else [])]

    def __call__(self, scores: Any) -> ScoreSummary:
        frame = to_pandas(scores[self.columns])
        compared = compared_rows(frame)
        values = np.sort(compared[SCORE_COLUMN].to_numpy(dtype=np.float32))
        thresholds = _thresholds(self.eps, self.largest_eps)
        at_least = len(values) - np.searchsorted(values, thresholds, side="left")
        lowest = float(values[0]) if len(values) else 1.0
        clusters = self._clusters(frame)
        return ScoreSummary(len(frame), len(values), lowest, self.eps, self.largest_eps, at_least, clusters)

    def _clusters(self, frame: pd.DataFrame) -> pd.DataFrame | None:
        if self.cluster_field is None:
            return None
        dropped = frame["id"] != frame["max_id"]
        if self.eps is not None:
            dropped &= is_duplicate(frame[SCORE_COLUMN], self.eps)
        counted = pd.DataFrame({"rows": 1, "duplicates": dropped.to_numpy(dtype=np.int64)})
        return counted.groupby(frame[self.cluster_field].to_numpy()).sum()


def summary_maker(scores: Any, eps: float | None, *, largest_eps: float, cluster_field: str) -> SummaryMaker:
    """Check the columns of a frame of scores, and say how to make the summary of each of its partitions."""
    if eps is not None:
        check_eps(eps)
    check_score_columns(scores, SCORE_COLUMNS)
    known = cluster_field if cluster_field in scores.columns else None
    return SummaryMaker(eps, largest_eps, known)


def compared_rows(frame: Any) -> Any:
    """The rows that were compared with another: all but the first of each cluster."""
    return frame[frame["id"] != frame["max_id"]]


def to_pandas(frame: Any) -> pd.DataFrame:
    """The frame in this process's memory, whichever backend holds it."""
    if hasattr(frame, "compute"):
        frame = frame.compute()
    return frame.to_pandas() if hasattr(frame, "to_pandas") else frame


def delayed_parts(frame: Any, columns: Sequence[str]) -> list[Any] | None:
    """The partitions of a Dask frame, with those columns only; None where the frame is in memory already."""
    if not hasattr(frame, "to_delayed"):
        return None
    parts: list[Any] = frame[list(columns)].to_delayed()
    return parts


def merge_tree(parts: Sequence[Any], merge: Callable[[T, T], T]) -> Any:
    """Merge delayed results a few at a time, so that never all of them are held at once."""
    while len(parts) > 1:
        groups = [parts[start : start + FANOUT] for start in range(0, len(parts), FANOUT)]
        parts = [dask.delayed(partial(reduce, merge))(group) for group in groups]
    return parts[0]


@lru_cache(maxsize=8)
def _grid(eps: float | None, largest_eps: float) -> np.ndarray:
    """Values such as a person would choose, the closer the smaller they are."""
    unit = 10.0 ** np.floor(np.log10(largest_eps))
    steps = [unit * np.arange(50) / 500, unit * np.arange(10, 100) / 100, unit * np.arange(20, 201) / 20]
    values = np.array([float(f"{value:.6g}") for value in np.concatenate(steps)])
    chosen = [] if eps is None else [eps]
    return np.unique([*values[values < largest_eps], largest_eps, *chosen])


@lru_cache(maxsize=8)
def _thresholds(eps: float | None, largest_eps: float) -> np.ndarray:
    border = 1.0 if eps is None else float(threshold(eps))
    edges = np.concatenate([_edges_below(border), _edges_above(border)])
    return np.unique(np.concatenate([threshold(_grid(eps, largest_eps)), edges]).astype(np.float32))


def _edges_below(border: float) -> np.ndarray:
    """Fine edges from below -1 up to the threshold, which is not among them."""
    count = int(np.ceil((border + 1) / FINE_WIDTH)) + 1
    return border - FINE_WIDTH * np.arange(count, 0, -1)


def _edges_above(border: float) -> np.ndarray:
    """Fine edges from the threshold to 1."""
    return np.linspace(border, 1, FINE_ABOVE + 1) if border < 1 else np.array([1.0])
