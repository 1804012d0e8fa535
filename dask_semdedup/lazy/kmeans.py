"""K-means: fit to a sample now, and assign rows to centroids lazily."""

from __future__ import annotations

from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
from dask.dataframe.api import new_collection

from dask_semdedup._dask import DelayedOperand
from dask_semdedup._validate import check_positive
from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.frames.backend import is_cudf
from dask_semdedup.frames.columns import DISTANCE_COLUMNS, Columns, SearchOptions, unique_columns
from dask_semdedup.lazy.expressions import KMeansClusters
from dask_semdedup.lazy.sampling import draw, partition_lengths, sample_embeddings
from dask_semdedup.lazy.sources import check_sources
from dask_semdedup.steps.fit import KMeansOptions, fit_centroids, sample_size
from dask_semdedup.steps.kmeans import check_centroids

__all__ = ["cluster", "fit_to_sample"]


def cluster(
    ddf: dd.DataFrame,
    columns: Columns,
    n_clusters: int | None,
    centroids: Any,
    fit: KMeansOptions,
    options: SearchOptions,
) -> dd.DataFrame:
    """Assign every row to its nearest centroid: see `SemDedupAccessor.kmeans`."""
    _check_embeddings(ddf, columns, options)
    _check_new_columns(columns)
    check_positive("n_clusters", n_clusters)
    if centroids is None:
        centroids = fit_to_sample(ddf, columns, n_clusters, fit, options)
    known = check_centroids(centroids)
    if n_clusters not in (None, len(known)):
        raise InvalidArgumentError(
            f"n_clusters is {n_clusters}, but there are {len(known)} centroids. Give either.",
            parameters=["n_clusters", "centroids"],
        )
    if options.embedding_dim is None:
        columns.check_dtypes(ddf._meta, "embedding", embedding_dim=known.width)
    values = DelayedOperand(dask.delayed(known, name=f"centroids-{known.token}", traverse=False))
    return new_collection(KMeansClusters(ddf, values, columns, options))


def fit_to_sample(
    ddf: dd.DataFrame, columns: Columns, n_clusters: int | None, fit: KMeansOptions, options: SearchOptions
) -> np.ndarray:
    """Fit k-means to a sample of the rows, now: see `SemDedupAccessor.fit_centroids`."""
    _check_embeddings(ddf, columns, options)
    check_sources(ddf, [columns.embedding])
    check_positive("n_clusters", n_clusters)
    lengths = partition_lengths(ddf, columns)
    n_clusters, size = sample_size(n_clusters, sum(lengths), fit.fit_data_fraction)
    rows = sample_embeddings(ddf, draw(lengths, size, fit.random_state), columns, options.embedding_dim)
    frame_device = "cuda" if is_cudf(ddf._meta) else "cpu"
    return fit_centroids(rows, n_clusters, fit, device=frame_device if options.device == "auto" else options.device)


def _check_embeddings(ddf: dd.DataFrame, columns: Columns, options: SearchOptions) -> None:
    columns.require(unique_columns(ddf), "embedding")
    columns.check_dtypes(ddf._meta, "embedding", embedding_dim=options.embedding_dim)


def _check_new_columns(columns: Columns) -> None:
    """Raise if a new column would replace the embeddings, the ids or another new one."""
    distances = list(DISTANCE_COLUMNS.values())
    if columns.cluster in (columns.embedding, columns.id, *distances):
        raise InvalidArgumentError(
            f"cluster_field may not be {columns.cluster!r}, the name of another column that the result has.",
            parameters=["cluster_field"],
            columns=[columns.cluster],
        )
    for parameter, name in (("embedding_field", columns.embedding), ("id_field", columns.id)):
        if name in (columns.cluster, *distances):
            raise InvalidArgumentError(
                f"{parameter} may not be {name!r}: kmeans makes a column of that name. Rename it.",
                parameters=[parameter],
                columns=[name],
            )
