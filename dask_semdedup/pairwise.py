"""One partition: rank all its clusters at once, search, assemble the frame of scores."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_semdedup.duplicates import SCORE_COLUMNS
from dask_semdedup.embeddings import (
    array_like,
    column_like,
    frame_like,
    home_of,
    is_cudf,
    published,
    take,
    tensor_like,
    to_list,
    to_numpy,
    to_tensor,
)
from dask_semdedup.errors import ClusterError, InvalidArgumentError, MissingColumnsError, have, some
from dask_semdedup.hashing import as_stored
from dask_semdedup.memory import share_memory_pool
from dask_semdedup.placement import check_device, choose_device, cores_for, pairs_of, turn_on_gpu
from dask_semdedup.ranking import RankingStrategy
from dask_semdedup.streams import behind, beside, outside, owned

if TYPE_CHECKING:
    import torch

__all__ = [
    "RANK_COLUMN",
    "best_of_visits",
    "check_clusters",
    "check_unique",
    "has_visits",
    "home_field",
    "pairwise_meta",
    "pairwise_partition",
    "restored",
    "score_frame",
    "search_segments",
    "segments_of",
]

# What is kept of a row's place while the answers of its visits are on their way to it.
RANK_COLUMN = "rank_in_partition"
NO_CANDIDATE = -np.inf


def home_field(cluster_field: str) -> str:
    """Name of the column that holds a row's own cluster, in frames where rows visit others.

    A row whose cluster is not its own is a visit: it is compared with the rows of that cluster, and none with it.

    Examples
    --------
    >>> home_field("centroid")
    'home_centroid'
    """
    return f"home_{cluster_field}"


def has_visits(frame: Any, cluster_field: str) -> bool:
    """Whether rows of a frame may visit other clusters, as the column of their own ones, of integers, tells.

    Parameters
    ----------
    frame : pandas.DataFrame or cudf.DataFrame
        It may be empty.
    cluster_field : str

    Examples
    --------
    >>> import pandas as pd
    >>> has_visits(pd.DataFrame({"page": [0, 0], "home_page": [0, 1]}), "page")
    True
    >>> has_visits(pd.DataFrame({"page": [0], "home_page": ["https://dask.org"]}), "page")
    False
    """
    home = home_field(cluster_field)
    return home in frame.columns and getattr(frame[home].dtype, "kind", "") in ("i", "u")


def pairwise_partition(
    frame: Any,
    *,
    id_field: str,
    embedding_field: str,
    cluster_field: str,
    ranking: RankingStrategy,
    compute_dtype: str = "auto",
    batch_size: int | None = None,
    embedding_dim: int | None = None,
    device: str = "auto",
    with_visits: bool = False,
) -> Any:
    """Find for every row its most similar row among those of its cluster that are preferred over it.

    Parameters
    ----------
    frame : pandas.DataFrame or cudf.DataFrame
        Whole clusters, in any order.
    id_field, embedding_field, cluster_field : str
        Its columns of ids, embeddings and clusters.
    ranking : RankingStrategy
        Which rows are preferred.
    compute_dtype, batch_size
        Of the search: see `dask_semdedup.search.nearest_earlier`.
    embedding_dim : int, optional
        The width that every embedding must have.
    device : {"auto", "cpu", "cuda"}
        Where to search. "auto" is where the frame is, or a GPU where there is one and enough work for it.
    with_visits : bool, default False
        Whether some rows are visits: see `home_field`.

    Returns
    -------
    DataFrame
        Of the same backend: ``id``, ``max_id`` (both of the ids' dtype), ``cosine_sim_score`` (float32) and the
        clusters, which ascend; the rows of each stand in rank order. The first of each has score 0 and its own id.
        With visits, it is what `best_of_visits` puts together.

    Raises
    ------
    MissingColumnsError
        If a column is not there.
    ClusterError
        If rows have no cluster.
    EmbeddingError
        If embeddings cannot be compared.
    InvalidArgumentError
        If `device` is none of these, or is "cuda" and torch sees none.

    Examples
    --------
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"id": [7, 8, 9], "centroid": 0, "score": [0.1, 0.2, 0.3]})
    >>> frame["embeddings"] = pd.Series([[1.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    >>> pairwise_partition(
    ...     frame, id_field="id", embedding_field="embeddings", cluster_field="centroid",
    ...     ranking=RankingStrategy(["score"]),
    ... )
       id  max_id  cosine_sim_score  centroid
    0   7       7               0.0         0
    1   8       7               0.6         0
    2   9       8               0.8         0
    """
    _check_columns(frame.columns, id_field, embedding_field, cluster_field, ranking)
    check_device(device)
    if is_cudf(frame):
        share_memory_pool()
    if len(frame) == 0:
        return pairwise_meta(frame, id_field=id_field, cluster_field=cluster_field, with_visits=with_visits)
    ids, clusters = frame[id_field], frame[cluster_field]
    home = home_of(frame)
    with beside(home):
        check_clusters(clusters, ids)
        order = ranking.order(frame, cluster_field=cluster_field, id_field=id_field)
        segments = segments_of(_codes(clusters, order))
        own, stops = clusters, None
        if with_visits:
            own = frame[home_field(cluster_field)]
            is_visit = _are_visits(clusters, own)[to_numpy(order)]
            position, stops = _visits_last(is_visit, segments)
            order = order[array_like(tensor_like(position), frame)]
        device = choose_device(device, home, segments)
        with cores_for(device, segments):
            rows = to_tensor(
                frame[embedding_field],
                name=embedding_field,
                ids=ids,
                clusters=clusters,
                embedding_dim=embedding_dim,
                order=order,
                device=device if home == "cuda" else "cpu",
            )
            scores, index = search_segments(rows, segments, stops, device, compute_dtype, batch_size)
        if with_visits:
            scores, rank = _of_visits(scores, index, is_visit[position])
        nearest = order[array_like(index, frame)]
        columns = take(ids, order), take(ids, nearest), array_like(scores, frame)
        own = take(own, order)
        with outside(home):
            result = score_frame(*columns, own.rename(cluster_field))
            if with_visits:
                result[RANK_COLUMN] = array_like(rank, frame)
            return published(result)


def _are_visits(clusters: Any, homes: Any) -> np.ndarray:
    """Which rows stand in a cluster that is not their own."""
    with outside(home_of(clusters)):
        return (clusters != homes).to_numpy().astype(bool)


def _of_visits(scores: torch.Tensor, index: torch.Tensor, is_visit: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
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

    Examples
    --------
    >>> import pandas as pd
    >>> found = pd.DataFrame({"id": [7, 8, 8], "max_id": [7, 7, 3], "cosine_sim_score": [-np.inf, 0.5, 0.9]})
    >>> found["centroid"], found["rank_in_partition"] = 0, [0, 1, -1]
    >>> best_of_visits(found, cluster_field="centroid")
       id  max_id  cosine_sim_score  centroid
    0   7       7               0.0         0
    1   8       3               0.9         0
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
    """Give ids that were compared `as_stored` their dtypes back.

    Examples
    --------
    >>> import pandas as pd
    >>> restored(pd.DataFrame({"id": [1], "max_id": [2]}), {"id": "int64", "max_id": "int64"}).dtypes.tolist()
    [dtype('int64'), dtype('int64')]
    """
    changed = {name: dtypes[name] for name in ("id", "max_id") if scores[name].dtype != dtypes[name]}
    return scores.astype(changed) if changed else scores


def check_unique(frame: Any, key: list[str], id_field: str) -> None:
    """Raise `ClusterError` for rows that cannot be told from another by their ids and clusters.

    Examples
    --------
    >>> import pandas as pd
    >>> check_unique(pd.DataFrame({"id": [7, 7], "centroid": [0, 1]}), ["centroid", "id"], "id")
    """
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


def _visits_last(is_visit: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def pairwise_meta(meta: Any, *, id_field: str, cluster_field: str, with_visits: bool = False) -> Any:
    """Build the empty frame that has exactly the dtypes of `pairwise_partition`'s.

    Parameters
    ----------
    meta : pandas.DataFrame or cudf.DataFrame
        A frame with the dtypes of the partitions.
    id_field, cluster_field : str
        Its columns of ids and clusters.
    with_visits : bool, default False
        Whether some rows are visits.

    Returns
    -------
    DataFrame
        Without rows.

    Examples
    --------
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"doc": [7], "cluster": [0]}, dtype="int32")
    >>> pairwise_meta(frame, id_field="doc", cluster_field="cluster").dtypes
    id                    int32
    max_id                int32
    cosine_sim_score    float32
    cluster               int32
    dtype: object
    """
    empty = meta.iloc[:0]
    own = empty[home_field(cluster_field) if with_visits else cluster_field].rename(cluster_field)
    result = score_frame(empty[id_field], empty[id_field], np.empty(0, np.float32), own)
    return result.assign(**{RANK_COLUMN: np.empty(0, np.int64)}) if with_visits else result


def score_frame(ids: Any, nearest: Any, scores: Any, clusters: Any) -> Any:
    """Put a frame of scores together.

    Parameters
    ----------
    ids, nearest, clusters : Series
        Of the rows, of the rows nearest to them, and the rows' clusters; their indexes do not matter.
    scores : array
        Of NumPy or CuPy.

    Examples
    --------
    >>> import pandas as pd
    >>> score_frame(pd.Series([8]), pd.Series([7]), np.array([0.5]), pd.Series([0], name="centroid"))
       id  max_id  cosine_sim_score  centroid
    0   8       7               0.5         0
    """
    ids, nearest, own = (column.reset_index(drop=True) for column in (ids, nearest, clusters))
    columns = {"id": ids, "max_id": nearest, "cosine_sim_score": column_like(scores, ids), clusters.name: own}
    return frame_like(columns, ids)


def _check_columns(
    present: Iterable[str], id_field: str, embedding_field: str, cluster_field: str, ranking: RankingStrategy
) -> None:
    present = list(present)
    if not {id_field, embedding_field, cluster_field} <= set(present):
        advice = "Name the columns of ids, embeddings and clusters as id_field, embedding_field and cluster_field."
        raise MissingColumnsError.build([id_field, embedding_field, cluster_field], present, advice)
    if cluster_field in SCORE_COLUMNS:
        raise InvalidArgumentError(f"cluster_field may not be {cluster_field!r}: scores have a column of that name.")
    ranking.check_columns(present)


def check_clusters(clusters: Any, ids: Any) -> None:
    """Raise `ClusterError` for rows that have no cluster.

    Examples
    --------
    >>> import pandas as pd
    >>> check_clusters(pd.Series([0, 0], name="centroid"), pd.Series([7, 8]))
    """
    null = _nulls(clusters)
    if null is not None and null.any():
        lost = ids[null]
        raise ClusterError(
            f"Column {clusters.name!r}: {have(len(lost), 'row')} no cluster (ids {some(to_list(lost))}). "
            "Drop them, or assign them to clusters."
        )


def _nulls(column: Any) -> Any:
    """Where values are missing; None where a column of cuDF knows that none is, without asking the device."""
    knows = is_cudf(column) and column.dtype.kind != "f" and not column.null_count
    return None if knows else column.isna()


def _codes(clusters: Any, order: Any) -> Any:
    """Numbers of rows in order, equal where their clusters are."""
    if clusters.dtype.kind in "iu":
        return (clusters.values if is_cudf(clusters) else clusters.to_numpy())[order]
    with outside(home_of(clusters)):
        return clusters.factorize()[0][order]


def segments_of(codes: Any) -> np.ndarray:
    """Offsets of the runs of equal codes, from 0 to their number.

    Examples
    --------
    >>> segments_of(np.array([3, 3, 1]))
    array([0, 2, 3])
    """
    starts = (codes[1:] != codes[:-1]).nonzero()[0] + 1
    return np.concatenate([[0], to_numpy(starts), [len(codes)]])


def search_segments(
    rows: torch.Tensor,
    segments: np.ndarray,
    stops: np.ndarray | None,
    device: str,
    compute_dtype: str,
    batch_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search where `rows` are, or send them to a GPU as its memory permits."""
    from dask_semdedup.search import nearest_earlier
    from dask_semdedup.search.streaming import nearest_earlier_from_host

    is_there = rows.device.type == device
    find = nearest_earlier if is_there else partial(nearest_earlier_from_host, device=device)
    ends = None if stops is None else tensor_like(stops)
    work = rows.shape[1] * pairs_of(segments) if is_there else None
    with turn_on_gpu(device, work), behind(rows.device.type):
        scores, index = find(
            rows, tensor_like(segments), stops=ends, compute_dtype=compute_dtype, batch_size=batch_size
        )
    return owned(scores), owned(index)
