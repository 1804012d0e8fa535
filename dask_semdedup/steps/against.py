"""One partition of rows and one of reference rows: for every row its most similar reference row of the same cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
from dask.dataframe.dispatch import concat

from dask_semdedup.device.devices import check_device, choose_device
from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.device.queues import cores_for
from dask_semdedup.frames.backend import array_like, device_of, is_cudf, tensor_like, to_numpy
from dask_semdedup.frames.columns import has_visits, home_field
from dask_semdedup.frames.embeddings import to_tensor
from dask_semdedup.frames.ids import as_stored
from dask_semdedup.steps.pairwise import check_clusters, score_frame, search_segments, segments_of
from dask_semdedup.steps.ranking import RankingStrategy
from dask_semdedup.steps.visits import check_unique, restored

__all__ = ["against_meta", "against_partition", "best_of_probes"]


def against_partition(
    frame: Any,
    reference: Any,
    *,
    id_field: str,
    reference_id_field: str,
    embedding_field: str,
    cluster_field: str,
    compute_dtype: str = "auto",
    embedding_dim: int | None = None,
    device: str = "auto",
) -> Any:
    """Find for every row its most similar reference row of the same cluster.

    Parameters
    ----------
    frame, reference : pandas.DataFrame or cudf.DataFrame
        The rows, and all reference rows of their clusters.
    id_field, reference_id_field : str
        Their columns of ids.
    embedding_field, cluster_field : str
        Columns of both.
    compute_dtype
        Of the search: see `dask_semdedup.search.nearest_earlier`.
    embedding_dim : int, optional
        The width that every embedding must have.
    device : {"auto", "cpu", "cuda"}
        Where to search. "auto" is where the frame is, or a GPU where there is one and enough work for it.

    Returns
    -------
    DataFrame
        Of the same backend: ``id``, ``max_id`` (of the reference's ids), ``cosine_sim_score`` (float32) and the
        clusters, which are the rows' own where they visit others. Rows without a reference row are left out. Clusters
        ascend, and ids within each. Among equally similar reference rows the one of the smallest id is named.

    Raises
    ------
    ClusterError
        If rows have no cluster or, where they visit others, ids repeat.
    EmbeddingError
        If embeddings cannot be compared.
    """
    check_device(device)
    if is_cudf(frame):
        share_memory_pool()
    sides = [(reference, reference_id_field), (frame, id_field)]
    for side, ids in sides:
        check_clusters(side[cluster_field], side[ids])
    if len(frame) == 0 or len(reference) == 0:
        # What cannot be compared is told of, also where nothing is there to compare it with.
        for side, ids in sides:
            named = {"name": embedding_field, "ids": side[ids], "clusters": side[cluster_field]}
            to_tensor(side[embedding_field], **named, embedding_dim=embedding_dim)
        return against_meta(
            frame, reference, id_field=id_field, reference_id_field=reference_id_field, cluster_field=cluster_field
        )
    if has_visits(frame, cluster_field):
        check_unique(frame, [cluster_field, home_field(cluster_field), id_field], id_field)
    orders = [_by_cluster_and_id(side, cluster_field, ids) for side, ids in sides]
    clusters = [side[cluster_field].iloc[order] for (side, _), order in zip(sides, orders, strict=True)]
    codes = to_numpy(concat(clusters).factorize()[0])
    is_query = np.arange(len(codes)) >= len(reference)
    position = np.lexsort([is_query, codes])
    segments = segments_of(codes[position])
    stops = _stops(is_query[position], segments)
    frame_device = device_of(frame)
    device = choose_device(device, frame_device, segments)
    with cores_for(device, segments):
        parts: list[Any] = []
        for (side, ids), order in zip(sides, orders, strict=True):
            rows = to_tensor(
                side[embedding_field],
                name=embedding_field,
                ids=side[ids],
                clusters=side[cluster_field],
                # The two must be comparable.
                embedding_dim=parts[0].shape[1] if parts else embedding_dim,
                order=order,
                device=device if frame_device == "cuda" else "cpu",
            )
            parts.append(rows)
        rows = _joined(parts, position)
        scores, index = search_segments(rows, segments, stops, device, compute_dtype, None)
    found = np.flatnonzero(is_query[position] & (stops > np.repeat(segments[:-1], np.diff(segments))))
    nearest = position[index.cpu().numpy()[found]]
    query = _like(position[found] - len(reference), frame)
    own = home_field(cluster_field) if has_visits(frame, cluster_field) else cluster_field
    return score_frame(
        frame[id_field].iloc[orders[1][query]],
        reference[reference_id_field].iloc[orders[0][_like(nearest, frame)]],
        array_like(scores[tensor_like(found).to(scores.device)], frame),
        frame[own].iloc[orders[1][query]].rename(cluster_field),
    )


def against_meta(meta: Any, reference: Any, *, id_field: str, reference_id_field: str, cluster_field: str) -> Any:
    """Build the empty frame that has exactly the dtypes of `against_partition`'s."""
    own = home_field(cluster_field) if has_visits(meta, cluster_field) else cluster_field
    empty, other = meta.iloc[:0], reference.iloc[:0]
    clusters = empty[own].rename(cluster_field)
    return score_frame(empty[id_field], other[reference_id_field], np.empty(0, np.float32), clusters)


def best_of_probes(frame: Any, *, cluster_field: str) -> Any:
    """Keep of each row the best of its scores against the reference rows of several clusters."""
    best = frame.assign(**{name: as_stored(frame[name]) for name in ("id", "max_id")})
    best = best.sort_values(["cosine_sim_score", "max_id"], ascending=[False, True])
    best = best.drop_duplicates([cluster_field, "id"]).sort_values([cluster_field, "id"])
    return restored(best.reset_index(drop=True), frame.dtypes)


def _by_cluster_and_id(frame: Any, cluster_field: str, id_field: str) -> Any:
    return RankingStrategy([id_field]).order(frame, cluster_field=cluster_field, id_field=id_field)


def _stops(is_query: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """The candidates of a query are the reference rows of its segment, which stand first; these have none."""
    lengths = np.diff(segments)
    n_candidates = np.add.reduceat(~is_query, segments[:-1], dtype=np.int64)
    starts = np.repeat(segments[:-1], lengths)
    return np.where(is_query, starts + np.repeat(n_candidates, lengths), starts)


def _joined(parts: list[Any], position: np.ndarray) -> Any:
    """The rows of all parts in the order of their positions; the list is emptied, so that none stays beside a copy."""
    places = np.empty_like(position)
    places[position] = np.arange(len(position))
    joined = parts[0].new_empty((len(position), parts[0].shape[1]))
    start = 0
    while parts:
        part = parts.pop(0)
        joined[tensor_like(places[start : start + len(part)]).to(part.device)] = part
        start += len(part)
    return joined


def _like(array: np.ndarray, frame: Any) -> Any:
    return array_like(tensor_like(array), frame)
