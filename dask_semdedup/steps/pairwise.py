"""One partition: rank all its clusters at once, search, assemble the frame of scores."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_semdedup.device.devices import check_device, choose_device, pairs_of
from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.device.queues import cores_for, gpu_turn
from dask_semdedup.device.streams import default_stream, owned, reading_stream, search_stream
from dask_semdedup.errors import ClusterError, have, some
from dask_semdedup.frames.backend import (
    array_like,
    column_like,
    device_of,
    frame_like,
    is_cudf,
    published,
    take,
    tensor_like,
    to_list,
    to_numpy,
)
from dask_semdedup.frames.columns import SCORE_COLUMN, Columns, SearchOptions
from dask_semdedup.frames.embeddings import to_tensor
from dask_semdedup.steps.ranking import RankingStrategy

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_clusters",
    "cluster_codes",
    "pairwise_meta",
    "pairwise_partition",
    "score_frame",
    "search_segments",
    "segments_of",
]


def pairwise_partition(
    frame: Any, columns: Columns, ranking: RankingStrategy, options: SearchOptions | None = None
) -> Any:
    """Find for every row its most similar row among those of its cluster that are preferred over it.

    Parameters
    ----------
    frame : pandas.DataFrame or cudf.DataFrame
        Whole clusters, in any order.
    columns : Columns
        Its columns of ids, embeddings and clusters.
    ranking : RankingStrategy
        Which rows are preferred.
    options : SearchOptions, optional
        How to search.

    Returns
    -------
    DataFrame
        Of the same backend: ``id``, ``max_id`` (both of the ids' dtype), ``cosine_sim_score`` (float32) and the
        clusters, which ascend; the rows of each stand in rank order. The first of each has score 0 and its own id.

    Raises
    ------
    MissingColumnsError
        If a column is not there.
    ClusterError
        If rows have no cluster.
    EmbeddingError
        If embeddings cannot be compared.
    InvalidArgumentError
        If the device is "cuda" and torch sees none.
    """
    options = options or SearchOptions()
    columns.require(frame.columns, "id", "embedding", "cluster")
    ranking.check_columns(frame.columns)
    check_device(options.device)
    if is_cudf(frame):
        share_memory_pool()
    if len(frame) == 0:
        return pairwise_meta(frame, columns)
    ids, clusters = frame[columns.id], frame[columns.cluster]
    frame_device = device_of(frame)
    with reading_stream(frame_device):
        check_clusters(clusters, ids)
        order = ranking.order(frame, cluster_field=columns.cluster, id_field=columns.id)
        segments = segments_of(cluster_codes(clusters, order))
        scores, index = _search_frame(frame, order, segments, columns, options, clusters)
        nearest = order[array_like(index, frame)]
        found = take(ids, order), take(ids, nearest), array_like(scores, frame), take(clusters, order)
        with default_stream(frame_device):
            return published(score_frame(*found))


def pairwise_meta(meta: Any, columns: Columns) -> Any:
    """Build the empty frame that has exactly the dtypes of `pairwise_partition`'s.

    Parameters
    ----------
    meta : pandas.DataFrame or cudf.DataFrame
        A frame with the dtypes of the partitions.
    columns : Columns
        Its columns of ids and clusters.

    Returns
    -------
    DataFrame
        Without rows.
    """
    empty = meta.iloc[:0]
    return score_frame(empty[columns.id], empty[columns.id], np.empty(0, np.float32), empty[columns.cluster])


def score_frame(ids: Any, nearest: Any, scores: Any, clusters: Any = None) -> Any:
    """Put a frame of scores together.

    Parameters
    ----------
    ids, nearest : Series
        Of the rows, and of the rows nearest to them; their indexes do not matter.
    scores : array
        Of NumPy or CuPy.
    clusters : Series, optional
        The rows' clusters.
    """
    ids, nearest = (column.reset_index(drop=True) for column in (ids, nearest))
    columns = {"id": ids, "max_id": nearest, SCORE_COLUMN: column_like(scores, ids)}
    if clusters is not None:
        columns[clusters.name] = clusters.reset_index(drop=True)
    return frame_like(columns, ids)


def check_clusters(clusters: Any, ids: Any) -> None:
    """Raise `ClusterError` for rows that have no cluster."""
    null = _nulls(clusters)
    if null is not None and null.any():
        lost = ids[null]
        raise ClusterError(
            f"Column {clusters.name!r}: {have(len(lost), 'row')} no cluster (ids {some(to_list(lost))}). "
            "Drop them, or assign them to clusters.",
            columns=[clusters.name],
        )


def _nulls(column: Any) -> Any:
    """Return where values are missing; None where a column of cuDF knows that none is, without asking the device."""
    knows = is_cudf(column) and column.dtype.kind != "f" and not column.null_count
    return None if knows else column.isna()


def cluster_codes(clusters: Any, order: Any) -> Any:
    """Numbers of rows in order, equal where their clusters are."""
    if clusters.dtype.kind in "iu":
        return (clusters.values if is_cudf(clusters) else clusters.to_numpy())[order]
    with default_stream(device_of(clusters)):
        return clusters.factorize()[0][order]


def segments_of(codes: Any) -> np.ndarray:
    """Offsets of the runs of equal codes, from 0 to their number."""
    starts = (codes[1:] != codes[:-1]).nonzero()[0] + 1
    return np.concatenate([[0], to_numpy(starts), [len(codes)]])


def _search_frame(
    frame: Any, order: Any, segments: np.ndarray, columns: Columns, options: SearchOptions, clusters: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search the rows of a frame in an order, on the device of `options`."""
    frame_device = device_of(frame)
    device = choose_device(options.device, frame_device, segments)
    with cores_for(device, segments):
        rows = to_tensor(
            frame[columns.embedding],
            name=columns.embedding,
            ids=frame[columns.id],
            clusters=clusters,
            embedding_dim=options.embedding_dim,
            order=order,
            device=device if frame_device == "cuda" else "cpu",
        )
        return search_segments(rows, segments, None, replace(options, device=device))


def search_segments(
    rows: torch.Tensor, segments: np.ndarray, stops: np.ndarray | None, options: SearchOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search where rows are, or send them to a GPU as its memory permits; the device is chosen by now."""
    from dask_semdedup.search import nearest_earlier
    from dask_semdedup.search.kept import nearest_kept
    from dask_semdedup.search.streaming import nearest_earlier_from_host

    is_there = rows.device.type == options.device
    find = partial(
        nearest_earlier if is_there else partial(nearest_earlier_from_host, device=options.device),
        compute_dtype=options.compute_dtype,
        batch_size=options.batch_size,
    )
    work = rows.shape[1] * pairs_of(segments) if is_there else None
    with gpu_turn(options.device, work), search_stream(rows.device.type):
        if options.duplicate_of == "kept":
            assert options.at_least is not None
            assert stops is None
            scores, index = nearest_kept(rows, tensor_like(segments), at_least=options.at_least, search=find)
        else:
            ends = None if stops is None else tensor_like(stops)
            scores, index = find(rows, tensor_like(segments), stops=ends, at_least=options.at_least)
    return owned(scores), owned(index)
