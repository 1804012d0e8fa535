"""Secondary assignments: rows that are compared with the members of other clusters too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dask_semdedup.device.streams import default_stream
from dask_semdedup.errors import ClusterError, have, some
from dask_semdedup.frames.backend import device_of, tensor_like, to_list
from dask_semdedup.frames.columns import SCORE_COLUMNS, Columns
from dask_semdedup.frames.ids import as_stored

if TYPE_CHECKING:
    import torch

__all__ = ["RANK_COLUMN", "best_of_assignments", "check_unique", "restored"]

# A row's rank in its own cluster, until the scores of its secondary assignments reach it.
RANK_COLUMN = "rank_in_partition"

NO_CANDIDATE = -np.inf


def are_secondary(clusters: Any, own: Any) -> np.ndarray:
    """Return whether rows stand in a cluster that is not their own."""
    with default_stream(device_of(clusters)):
        return (clusters != own).to_numpy().astype(bool)


def mark_secondary(
    scores: torch.Tensor, index: torch.Tensor, is_secondary: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores, -inf where a row has no candidate, and ranks, -1 for secondary assignments."""
    import torch

    ranks = torch.arange(len(index), device=index.device)
    marked = ranks.masked_fill(tensor_like(is_secondary).to(ranks.device), -1)
    return scores.masked_fill(index == ranks, NO_CANDIDATE), marked


def best_of_assignments(frame: Any, columns: Columns) -> Any:
    """Keep each row's best score of those in its own cluster and in the clusters of its secondary assignments.

    Parameters
    ----------
    frame : pandas.DataFrame or cudf.DataFrame
        Results of `pairwise_partition`: all those of the same own clusters.
    columns : Columns
        The column of clusters holds the rows' own by now.

    Returns
    -------
    DataFrame
        One row for each id of a cluster, in rank order: its best score, and where that was found. Among equals, what
        was found in the row's own cluster comes first, then the smallest ``max_id``.

    Raises
    ------
    ClusterError
        If ids repeat within a cluster: the secondary assignments of a row are known by its id.
    """
    key = [columns.cluster, "id"]
    dtypes = frame.dtypes
    frame = frame.assign(**{name: as_stored(frame[name]) for name in ("id", "max_id")})
    own = frame[frame[RANK_COLUMN] >= 0][[*key, RANK_COLUMN]]
    check_unique(own, key, "id")
    by = ["cosine_sim_score", RANK_COLUMN, "max_id"]
    best = frame.sort_values(by, ascending=[False, False, True]).drop_duplicates(key)
    best = best.drop(columns=RANK_COLUMN)
    if len(best) > len(own):
        raise _without_own(best.merge(own, on=key, how="left"), columns)
    best = best.merge(own, on=key).sort_values([columns.cluster, RANK_COLUMN])
    scores = best["cosine_sim_score"]
    best["cosine_sim_score"] = scores.where(scores > NO_CANDIDATE, np.float32(0))
    return restored(best[[*SCORE_COLUMNS, columns.cluster]].reset_index(drop=True), dtypes)


def restored(scores: Any, dtypes: Any) -> Any:
    """Return scores whose ids, compared `as_stored`, have their dtypes back."""
    changed = {name: dtypes[name] for name in ("id", "max_id") if scores[name].dtype != dtypes[name]}
    return scores.astype(changed) if changed else scores


def check_unique(frame: Any, key: list[str], name: str) -> None:
    """Raise `ClusterError` for rows that cannot be told from another by their ids and clusters."""
    key_columns = frame[key].assign(**{name: as_stored(frame[name])})
    repeated = frame[name][key_columns.duplicated()]
    if len(repeated):
        raise ClusterError(
            f"{have(len(repeated), 'row')} an id that another row of the same cluster has (ids "
            f"{some(to_list(repeated.drop_duplicates()))}). With n_probe, rows must have ids of their own.",
            parameters=["id_field"],
            columns=[name],
        )


def _without_own(best: Any, columns: Columns) -> ClusterError:
    """Return the error for secondary assignments of rows that do not stand in their own clusters."""
    lost, own = best["id"][best[RANK_COLUMN].isna()], columns.own_cluster
    return ClusterError(
        f"{have(len(lost), 'row')} secondary assignments only: none where {columns.cluster!r} is the row's own "
        f"cluster, {own!r} (ids {some(to_list(lost))}). Select rows by {own!r}, or rename it if it means something "
        "else.",
        columns=[columns.cluster, own],
    )


def secondary_last(is_secondary: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions that put the secondary assignments of each segment last, and where candidates of each row end.

    The candidates of a secondary assignment are the members that were ranked before it.
    """
    n = len(is_secondary)
    starts = np.repeat(segments[:-1], np.diff(segments))
    members = np.concatenate([[0], np.cumsum(~is_secondary)])
    earlier_members = members[:n] - members[starts]
    position = np.lexsort([is_secondary, starts])
    stops = np.where(is_secondary[position], (starts + earlier_members)[position], np.arange(n))
    return position, stops
