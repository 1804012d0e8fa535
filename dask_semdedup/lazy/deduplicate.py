"""Deduplication in one call: k-means, scores and removal."""

from __future__ import annotations

from typing import Any

import dask.dataframe as dd

from dask_semdedup.frames.columns import DISTANCE_COLUMNS, Columns, SearchOptions
from dask_semdedup.lazy.kmeans import cluster
from dask_semdedup.lazy.removal import remove_duplicates
from dask_semdedup.lazy.scores import check_rows, score_pairwise
from dask_semdedup.lazy.sources import check_sources
from dask_semdedup.lazy.writing import writable
from dask_semdedup.steps.duplicates import check_eps
from dask_semdedup.steps.fit import KMeansOptions
from dask_semdedup.steps.ranking import RankingStrategy

__all__ = ["keep_one_of_each"]


def keep_one_of_each(
    ddf: dd.DataFrame,
    columns: Columns,
    eps: float,
    ranking: RankingStrategy,
    n_clusters: int | None,
    centroids: Any,
    fit: KMeansOptions,
    options: SearchOptions,
) -> dd.DataFrame:
    """Keep the preferred row of each group of near-duplicates: see `SemDedupAccessor.deduplicate`."""
    check_eps(eps)
    # Before a fit, which takes longer than to see what is wrong.
    check_rows(ddf, columns, options)
    ranking.check_columns([*ddf.columns, columns.cluster, *DISTANCE_COLUMNS.values()])
    check_sources(ddf, [columns.id, columns.embedding, *ranking.required_columns], ranking)
    ddf = writable(ddf, columns)
    clustered = cluster(ddf, columns, n_clusters, centroids, fit, options)
    scores = score_pairwise(clustered, columns, ranking, options)
    return remove_duplicates(ddf, scores, columns.id, eps=eps)
