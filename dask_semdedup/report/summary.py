"""Summaries of scores, made partition by partition: all that figures and pages need, whatever the number of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from typing import Any, Generic, NamedTuple, TypeVar

import dask
import numpy as np
import pandas as pd

from dask_semdedup.frames.columns import SCORE_COLUMN, SCORE_COLUMNS
from dask_semdedup.io.scores import Compared
from dask_semdedup.lazy.held import Held, check_held, held
from dask_semdedup.steps.duplicates import check_eps, check_score_columns, is_duplicate, threshold

__all__ = ["Reduction", "ScoreSummary", "reduce_partitions", "score_summary", "summarize"]

# The bars of a histogram are made of fine bins: of this width below the threshold, and this many above it, a number
# with many divisors.
FINE_WIDTH, FINE_ABOVE = 2**-15, 5040

# Results of partitions that one task merges.
FANOUT = 16

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreSummary:
    """Counts of the scores in a frame.

    All but `rows` leave out the rows that were compared with none: the first of each cluster.

    Parameters
    ----------
    rows : int or None
        Number of rows, if it is known.
    compared : int
        Number of rows that were compared with another.
    lowest : float
        Lowest score, or 1 if there is none.
    eps : float or None
        The eps at which the duplicates of `clusters` are counted.
    largest_eps : float
        End of the grid.
    at_least : ndarray of int64
        Number of scores that are at least as high as each of the `thresholds`.
    clusters : DataFrame or None
        ``rows`` and ``duplicates`` of each cluster, if the scores have a cluster column.
    kept_eps : float or None
        The eps up to which scores were kept, if that is known and they are not those of all rows; then `compared`
        counts those kept.
    dropped : int or None
        Number of rows that are dropped at `eps`, each for a row that is kept, if these are not all duplicates.
    """

    rows: int | None
    compared: int
    lowest: float
    eps: float | None
    largest_eps: float
    at_least: np.ndarray
    clusters: pd.DataFrame | None
    kept_eps: float | None = None
    dropped: int | None = None

    @property
    def grid(self) -> np.ndarray:
        """Values of eps at which duplicates are counted, ascending."""
        return _grid(self.eps, self.largest_eps)

    @property
    def thresholds(self) -> np.ndarray:
        """Scores at which `at_least` counts, ascending."""
        return _thresholds(self.eps, self.largest_eps)

    def duplicates(self, eps: Any) -> Any:
        """Number of duplicates at one or several values of eps from the `grid`.

        Raises
        ------
        ValueError
            If one of them is not in the grid.
        """
        wanted = threshold(eps)
        index = np.searchsorted(self.thresholds, wanted)
        if not np.array_equal(self.thresholds.take(index, mode="clip"), wanted):
            raise ValueError(f"The summary does not count the duplicates at eps={eps!r}, only those of its grid.")
        return self.at_least[index]

    def histogram(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges and counts of about `bins` bars from the lowest score to 1, with one edge exactly at the threshold."""
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

    @property
    def noun(self) -> str:
        """What the rows are called that reach a threshold: "near-duplicate" where not all of them are dropped."""
        return "duplicate" if self.dropped is None else "near-duplicate"

    def of(self, known: Held | None) -> ScoreSummary:
        """Summary of the same scores, once it is known what they hold; among scores of all rows some row is the first.

        Scores of some rows do not tell how many rows their clusters have.
        """
        if known is None:
            is_all = self.rows != self.compared or not self.rows
            return self if is_all else replace(self, rows=None, clusters=None)
        return self if known.is_all else replace(self, rows=known.rows, kept_eps=known.eps, clusters=None)

    def among(self, compared: Compared) -> ScoreSummary:
        """Summary of the same scores, once it is known of how many rows they were kept."""
        clusters, rows = self.clusters, compared.clusters
        if clusters is not None and rows is not None:
            duplicates = clusters["duplicates"].reindex(rows.index, fill_value=0)
            clusters = pd.DataFrame({"rows": rows, "duplicates": duplicates})
        else:
            clusters = None
        return replace(self, rows=compared.total, clusters=clusters, kept_eps=compared.eps)

    def merge(self, other: ScoreSummary) -> ScoreSummary:
        """Summary of both frames; both were counted at the same thresholds."""
        clusters = self.clusters
        if clusters is not None:
            clusters = pd.concat([clusters, other.clusters]).groupby(level=0).sum()
        return ScoreSummary(
            None if self.rows is None or other.rows is None else self.rows + other.rows,
            self.compared + other.compared,
            min(self.lowest, other.lowest),
            self.eps,
            self.largest_eps,
            self.at_least + other.at_least,
            clusters,
        )


_DIVISORS = [count for count in range(1, FINE_ABOVE + 1) if FINE_ABOVE % count == 0]


class Reduction(NamedTuple, Generic[T]):
    """A function of one partition of a frame, the columns it needs, and the function that merges two of its results."""

    columns: list[str]
    apply: Callable[[Any], T]
    merge: Callable[[T, T], T]


def summarize(
    scores: Any, eps: float | None = 0.01, *, largest_eps: float = 0.2, cluster_field: str = "centroid"
) -> ScoreSummary:
    """Summarize scores.

    Parameters
    ----------
    scores : pandas, cuDF or Dask DataFrame, or ScoreSummary
        What ``pairwise`` returns, with or without the cluster column. A Dask DataFrame is read partition by partition;
        a summary is returned as it is.
    eps : float, optional
        The chosen eps.
    largest_eps : float
        End of the grid of eps, which begins at 0. It ends earlier if the scores are known not to reach that far.
    cluster_field : str
        Cluster column.

    Returns
    -------
    ScoreSummary

    Raises
    ------
    MissingColumnsError
        If the scores lack a column.
    InvalidArgumentError
        If `eps` is not a number from 0 to 2, or the scores are known not to hold all duplicates at it.
    """
    if isinstance(scores, ScoreSummary):
        return scores
    known = held(scores)
    if known is not None:
        largest_eps = min(largest_eps, known.eps)
    [summary] = reduce_partitions(scores, score_summary(scores, eps, largest_eps, cluster_field))
    return summary.of(known)


def score_summary(scores: Any, eps: float | None, largest_eps: float, cluster_field: str) -> Reduction[ScoreSummary]:
    """The reduction of scores to their summary, once their columns are checked."""
    check_score_columns(scores, SCORE_COLUMNS)
    if eps is not None:
        check_eps(eps)
        check_held(scores, [eps])
    keys = [cluster_field] if cluster_field in scores.columns else []
    summarize_partition = partial(_summarize_partition, keys=keys, eps=eps, largest_eps=largest_eps)
    return Reduction([*SCORE_COLUMNS, *keys], summarize_partition, ScoreSummary.merge)


def _summarize_partition(scores: Any, keys: list[str], eps: float | None, largest_eps: float) -> ScoreSummary:
    frame = to_pandas(scores[[*SCORE_COLUMNS, *keys]])
    values = np.sort(compared_rows(frame)[SCORE_COLUMN].to_numpy(dtype=np.float32))
    at_least = len(values) - np.searchsorted(values, _thresholds(eps, largest_eps), side="left")
    lowest = float(values[0]) if len(values) else 1.0
    clusters = None
    if keys:
        dropped = frame["id"] != frame["max_id"]
        if eps is not None:
            dropped &= is_duplicate(frame[SCORE_COLUMN], eps)
        counted = pd.DataFrame({"rows": 1, "duplicates": dropped.to_numpy(dtype=np.int64)})
        clusters = counted.groupby(frame[keys[0]].to_numpy()).sum()
    return ScoreSummary(len(frame), len(values), lowest, eps, largest_eps, at_least, clusters)


def compared_rows(frame: Any) -> Any:
    """The rows that were compared with another: all but the first of each cluster."""
    return frame[frame["id"] != frame["max_id"]]


def to_pandas(frame: Any) -> pd.DataFrame:
    """A pandas or cuDF frame as pandas."""
    return frame.to_pandas() if hasattr(frame, "to_pandas") else frame


def reduce_partitions(frame: Any, *reductions: Reduction[Any]) -> Sequence[Any]:
    """Results of reductions of a frame; a Dask frame is read once, partition by partition, for all of them."""
    if not hasattr(frame, "to_delayed"):
        return [reduction.apply(frame) for reduction in reductions]
    columns = dict.fromkeys(name for reduction in reductions for name in reduction.columns)
    parts = frame[list(columns)].to_delayed()
    results: Sequence[Any] = dask.compute(*(_merged(parts, reduction) for reduction in reductions))
    return results


def _merged(parts: Sequence[Any], reduction: Reduction[Any]) -> Any:
    """The delayed result of a reduction, merged a few partitions at a time: never are all of their results held."""
    results = [dask.delayed(reduction.apply)(part) for part in parts]
    while len(results) > 1:
        groups = [results[start : start + FANOUT] for start in range(0, len(results), FANOUT)]
        results = [dask.delayed(partial(reduce, reduction.merge))(group) for group in groups]
    return results[0]


@lru_cache(maxsize=8)
def _grid(eps: float | None, largest_eps: float) -> np.ndarray:
    """Round values of eps, closer together the smaller they are."""
    if not largest_eps:
        return np.unique([0.0, *([] if eps is None else [eps])])
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
    """Edges of the fine bins below the threshold, from below -1 on, without the threshold itself."""
    count = int(np.ceil((border + 1) / FINE_WIDTH)) + 1
    return border - FINE_WIDTH * np.arange(count, 0, -1)


def _edges_above(border: float) -> np.ndarray:
    """Edges of the fine bins from the threshold to 1."""
    return np.linspace(border, 1, FINE_ABOVE + 1) if border < 1 else np.array([1.0])
