"""Deduplication in one call: scores and removal."""

from __future__ import annotations

from typing import Any

import dask.dataframe as dd

from dask_semdedup.frames.columns import DISTANCE_COLUMNS, Columns, SearchOptions
from dask_semdedup.lazy.embed import warn_of_passes
from dask_semdedup.lazy.kmeans import cluster
from dask_semdedup.lazy.removal import remove_duplicates
from dask_semdedup.lazy.scores import check_clustered, check_rows, score_completely, score_pairwise
from dask_semdedup.lazy.sources import check_sources
from dask_semdedup.lazy.writing import writable
from dask_semdedup.steps.duplicates import check_eps
from dask_semdedup.steps.fit import KMeansOptions
from dask_semdedup.steps.ranking import RankingStrategy

__all__ = ["keep_one_of_each", "keep_one_of_each_in_clusters"]


def keep_one_of_each(
    ddf: dd.DataFrame,
    columns: Columns,
    eps: float,
    ranking: RankingStrategy,
    options: SearchOptions,
    *,
    by_mean: bool,
) -> dd.DataFrame:
    """Keep the preferred row of each group of near-duplicates of a frame: see `SemDedupAccessor.deduplicate`."""
    check_eps(eps)
    # Before a sample is read, which takes longer than to see what is wrong.
    check_rows(ddf, columns, options)
    ddf = writable(ddf, columns)
    scores = score_completely(ddf, columns, ranking, options, by_mean=by_mean, eps=eps)
    return remove_duplicates(ddf, scores, columns.id, eps=eps, of_itself=True)


def keep_one_of_each_in_clusters(
    ddf: dd.DataFrame,
    columns: Columns,
    eps: float,
    ranking: RankingStrategy,
    n_clusters: int | None,
    centroids: Any,
    fit: KMeansOptions,
    options: SearchOptions,
) -> dd.DataFrame:
    """Keep the preferred row of each group of near-duplicates of a cluster: see `SemDedupAccessor.deduplicate`."""
    check_eps(eps)
    are_made = n_clusters is not None or centroids is not None
    (check_rows if are_made else check_clustered)(ddf, columns, options)
    made = [columns.cluster, *DISTANCE_COLUMNS.values()] if are_made else []
    ranking.check_columns([*ddf.columns, *made], columns.embedding)
    check_sources(ddf, [columns.id, columns.embedding, *ranking.required_columns], ranking)
    warn_of_passes(ddf)
    ddf = writable(ddf, columns)
    clustered = cluster(ddf, columns, n_clusters, centroids, fit, options) if are_made else ddf
    # The optimiser may lower an eps; that by which rows are kept, it may not.
    scores = score_pairwise(clustered, columns, ranking, options, eps=eps)
    return remove_duplicates(ddf, scores, columns.id, eps=eps, of_itself=True)
