"""Compare a partition of rows with one of reference rows: the most similar reference row of each row's cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from dask.dataframe.dispatch import concat

from dask_semdedup.device.devices import check_device, choose_device
from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.device.queues import cores_for
from dask_semdedup.frames.backend import array_like, device_of, is_cudf, positions_like, tensor_like, to_numpy
from dask_semdedup.frames.columns import Columns, SearchOptions
from dask_semdedup.frames.embeddings import gather_rows, to_tensor
from dask_semdedup.steps.pairwise import check_clusters, score_frame, search_segments, segments_of
from dask_semdedup.steps.ranking import RankingStrategy

__all__ = ["COMPONENT", "OF_REFERENCE", "against_meta", "against_partition"]

# The column of components of rows, where they are searched as clusters are. No user knows their numbers.
COMPONENT = "_semdedup_component"

# Whose width rows lack that are compared with a reference.
OF_REFERENCE = ", that of the reference, in the frame that is compared with it"


def against_partition(
    frame: Any, reference: Any, columns: Columns, reference_id_field: str, options: SearchOptions | None = None
) -> Any:
    """For every row, find the most similar reference row of its cluster.

    Parameters
    ----------
    frame, reference : pandas.DataFrame or cudf.DataFrame
        The rows, and all reference rows of their clusters.
    columns : Columns
        Columns of both frames, except for the ids of the reference.
    reference_id_field : str
        Column of ids of the reference.
    options : SearchOptions, optional
        How to search.

    Returns
    -------
    DataFrame
        A frame of the same backend: ``id``, ``max_id`` (the id of a reference row), ``cosine_sim_score`` (float32) and
        the cluster. Rows without a reference row are left out. Clusters ascend, and so do ids within each. Among
        equally similar reference rows, the one with the smallest id wins.

    Raises
    ------
    ClusterError
        If rows have no cluster.
    EmbeddingError
        If embeddings cannot be compared.
    """
    options = options or SearchOptions()
    check_device(options.device)
    if is_cudf(frame):
        share_memory_pool()
    sides = [(reference, reference_id_field), (frame, columns.id)]
    for side, ids in sides:
        check_clusters(side[columns.cluster], side[ids])
    if len(frame) == 0 or len(reference) == 0:
        # What cannot be compared is an error, also where there is nothing to compare it with.
        for side, ids in sides:
            _to_tensor(side, columns, ids, embedding_dim=options.embedding_dim)
        return against_meta(frame, reference, columns, reference_id_field)
    orders = [RankingStrategy([ids]).order(side, cluster_field=columns.cluster, id_field=ids) for side, ids in sides]
    clusters = [side[columns.cluster].iloc[order] for (side, _), order in zip(sides, orders, strict=True)]
    codes = to_numpy(concat(clusters).factorize()[0])
    is_query = np.arange(len(codes)) >= len(reference)
    position = np.lexsort([is_query, codes])
    segments = segments_of(codes[position])
    stops = _stops(is_query[position], segments)
    frame_device = device_of(frame)
    device = choose_device(options.device, frame_device, segments)
    with cores_for(device, segments):
        parts: list[Any] = []
        for (side, ids), order in zip(sides, orders, strict=True):
            # The two must be comparable.
            width = parts[0].shape[1] if parts else options.embedding_dim
            of = OF_REFERENCE if parts else ""
            rows_on = device if frame_device == "cuda" else "cpu"
            parts.append(_to_tensor(side, columns, ids, embedding_dim=width, width_of=of, order=order, device=rows_on))
        rows = gather_rows(parts, position)
        scores, index = search_segments(rows, segments, stops, replace(options, device=device))
    found = np.flatnonzero(is_query[position] & (stops > np.repeat(segments[:-1], np.diff(segments))))
    # Rows that do not reach `SearchOptions.at_least` have their own index, but only reference rows can be named.
    nearest = position[np.minimum(index.cpu().numpy(), stops - 1)[found]]
    query = orders[1][positions_like(position[found] - len(reference), frame)]
    return score_frame(
        frame[columns.id].iloc[query],
        reference[reference_id_field].iloc[orders[0][positions_like(nearest, frame)]],
        array_like(scores[tensor_like(found).to(scores.device)], frame),
        frame[columns.cluster].iloc[query],
    )


def _to_tensor(side: Any, columns: Columns, ids: str, **options: Any) -> Any:
    """Return the embeddings of one side."""
    clusters = None if columns.cluster == COMPONENT else side[columns.cluster]
    named = {"name": columns.embedding, "ids": side[ids], "clusters": clusters}
    return to_tensor(side[columns.embedding], **named, **options)


def against_meta(meta: Any, reference: Any, columns: Columns, reference_id_field: str) -> Any:
    """Return an empty frame with exactly the dtypes of `against_partition`."""
    empty, other = meta.iloc[:0], reference.iloc[:0]
    return score_frame(empty[columns.id], other[reference_id_field], np.empty(0, np.float32), empty[columns.cluster])


def _stops(is_query: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """The candidates of a query are the reference rows of its segment, which stand first; these have none."""
    lengths = np.diff(segments)
    n_candidates = np.add.reduceat(~is_query, segments[:-1], dtype=np.int64)
    starts = np.repeat(segments[:-1], lengths)
    return np.where(is_query, starts + np.repeat(n_candidates, lengths), starts)
