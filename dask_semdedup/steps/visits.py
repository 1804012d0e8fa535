"""Secondary assignments: rows that are compared with the members of other clusters too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dask_semdedup.device.streams import default_stream
from dask_semdedup.errors import ClusterError, have, some
from dask_semdedup.frames.backend import device_of, tensor_like, to_list
from dask_semdedup.frames.columns import SCORE_COLUMNS, home_field
from dask_semdedup.frames.ids import as_stored

if TYPE_CHECKING:
    import torch

__all__ = ["RANK_COLUMN", "best_of_visits", "check_unique", "restored"]

# What is kept of a row's place while the answers of its visits are on their way to it.
RANK_COLUMN = "rank_in_partition"

NO_CANDIDATE = -np.inf


def are_visits(clusters: Any, homes: Any) -> np.ndarray:
    """Which rows stand in a cluster that is not their own."""
    with default_stream(device_of(clusters)):
        return (clusters != homes).to_numpy().astype(bool)


def of_visits(scores: torch.Tensor, index: torch.Tensor, is_visit: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, of rows without a candidate below all others, and places in the order, of visits -1."""
    import torch

    place = torch.arange(len(index), device=index.device)
    rank = place.masked_fill(tensor_like(is_visit).to(place.device), -1)
    return scores.masked_fill(index == place, NO_CANDIDATE), rank


def best_of_visits(frame: Any, *, cluster_field: str) -> Any:
    """Put together what `pairwise_partition` found for rows in their own clusters and on their visits.

    Parameters
    ----------
    frame : pandas.DataFrame or cudf.DataFrame
        Its results, all that belong to the same own cluster.
    cluster_field : str
        The column of clusters, by now the rows' own.

    Returns
    -------
    DataFrame
        One row for each id of a cluster, in rank order: its best score, and where that was found. Among equals, what
        was found in the row's own cluster comes first, and of visits the smallest ``max_id``.

    Raises
    ------
    ClusterError
        If ids repeat within a cluster: the visits of a row are known by its id.
    """
    key = [cluster_field, "id"]
    dtypes = frame.dtypes
    frame = frame.assign(**{name: as_stored(frame[name]) for name in ("id", "max_id")})
    own = frame[frame[RANK_COLUMN] >= 0][[*key, RANK_COLUMN]]
    check_unique(own, key, "id")
    by = ["cosine_sim_score", RANK_COLUMN, "max_id"]
    best = frame.sort_values(by, ascending=[False, False, True]).drop_duplicates(key)
    best = best.drop(columns=RANK_COLUMN)
    if len(best) > len(own):
        raise _strays(best.merge(own, on=key, how="left"), cluster_field)
    best = best.merge(own, on=key).sort_values([cluster_field, RANK_COLUMN])
    scores = best["cosine_sim_score"]
    best["cosine_sim_score"] = scores.where(scores > NO_CANDIDATE, np.float32(0))
    return restored(best[[*SCORE_COLUMNS, cluster_field]].reset_index(drop=True), dtypes)


def restored(scores: Any, dtypes: Any) -> Any:
    """Give ids that were compared `as_stored` their dtypes back."""
    changed = {name: dtypes[name] for name in ("id", "max_id") if scores[name].dtype != dtypes[name]}
    return scores.astype(changed) if changed else scores


def check_unique(frame: Any, key: list[str], id_field: str) -> None:
    """Raise `ClusterError` for rows that cannot be told from another by their ids and clusters."""
    key_columns = frame[key].assign(**{id_field: as_stored(frame[id_field])})
    repeated = frame[id_field][key_columns.duplicated()]
    if len(repeated):
        raise ClusterError(
            f"{have(len(repeated), 'row')} an id that another row of the same cluster has (ids "
            f"{some(to_list(repeated.drop_duplicates()))}). With n_probe, rows must have ids of their own."
        )


def _strays(best: Any, cluster_field: str) -> ClusterError:
    """The error for visits of rows that do not stand in their own clusters."""
    strays = best["id"][best[RANK_COLUMN].isna()]
    home = home_field(cluster_field)
    return ClusterError(
        f"{have(len(strays), 'row')} visits only: none where {cluster_field!r} is the row's own cluster, {home!r} (ids "
        f"{some(to_list(strays))}). Select rows by {home!r}, or rename it if it means something else."
    )


def visits_last(is_visit: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions that bring the visits of each segment behind its members, and where the candidates of each row end.

    Those of a visit are the members that were ranked before it.
    """
    n = len(is_visit)
    starts = np.repeat(segments[:-1], np.diff(segments))
    members = np.concatenate([[0], np.cumsum(~is_visit)])
    earlier_members = members[:n] - members[starts]
    position = np.lexsort([is_visit, starts])
    stops = np.where(is_visit[position], (starts + earlier_members)[position], np.arange(n))
    return position, stops
