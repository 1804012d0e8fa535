"""Scores: rows compared with all others or within their clusters, and with those of another frame."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import dask.dataframe as dd
import pandas as pd
from dask.dataframe.api import new_collection

from dask_semdedup._validate import stack_level, type_name
from dask_semdedup.errors import ClusterError, InvalidArgumentError, MissingColumnsError
from dask_semdedup.frames.columns import DISTANCE_COLUMNS, Columns, SearchOptions, unique_columns
from dask_semdedup.lazy.alignment import align, align_both, no_cluster_column
from dask_semdedup.lazy.embed import warn_of_passes
from dask_semdedup.lazy.expressions import AgainstScores, PairwiseScores
from dask_semdedup.lazy.held import noted
from dask_semdedup.lazy.join import Plan, compare_all, compare_all_with, make_plan
from dask_semdedup.lazy.kmeans import cluster, fit_to_sample
from dask_semdedup.lazy.sampling import partition_lengths
from dask_semdedup.lazy.sources import check_sources, refuse_lacking, refuse_range_index
from dask_semdedup.lazy.tasks import compute
from dask_semdedup.steps.duplicates import check_eps, find_duplicates, threshold
from dask_semdedup.steps.fit import KMeansOptions
from dask_semdedup.steps.ranking import RankingStrategy

__all__ = [
    "check_clustered",
    "check_rows",
    "count_rows",
    "is_complete",
    "plan_completely",
    "score_against",
    "score_completely",
    "score_pairwise",
]

# From here on, an eps is likely to be meant as a similarity.
LIKE_A_SIMILARITY = 0.8


def score_pairwise(
    ddf: dd.DataFrame,
    columns: Columns,
    ranking: RankingStrategy,
    options: SearchOptions,
    *,
    eps: float | None = None,
    verbose: bool = False,
) -> dd.DataFrame:
    """Score every row within its cluster: see `SemDedupAccessor.pairwise`."""
    bounded = up_to(eps, options)
    # The optimiser sees to the other rule: what several eps need is searched for once.
    options = bounded if options.duplicate_of == "kept" else options
    check_clustered(ddf, columns, options)
    ranking.check_columns(ddf.columns, columns.embedding)
    needed = {columns.id, columns.embedding, columns.cluster, *ranking.required_columns}
    check_sources(ddf, sorted(needed, key=str), ranking)
    frame = align(ddf[[name for name in ddf.columns if name in needed]], columns.cluster)
    scores = new_collection(PairwiseScores(frame, columns, ranking, options, verbose=bool(verbose)))
    return scores if eps is None else noted(find_duplicates(scores, eps))


def score_completely(
    ddf: dd.DataFrame,
    columns: Columns,
    ranking: RankingStrategy,
    options: SearchOptions,
    *,
    by_mean: bool,
    eps: float | None = None,
) -> dd.DataFrame:
    """Score every row among all rows of the frame: see `SemDedupAccessor.pairwise`."""
    options = up_to(eps, options)
    check_rows(ddf, columns, options)
    made = set(DISTANCE_COLUMNS.values()) if by_mean else set()
    ranking.check_columns([*ddf.columns, *made], columns.embedding)
    needed = {columns.id, columns.embedding, *ranking.required_columns} - made
    check_sources(ddf, sorted(needed, key=str), ranking)
    warn_of_passes(ddf)
    scores = compare_all(
        ddf[[name for name in ddf.columns if name in needed]], columns, ranking, options, by_mean=by_mean
    )
    return scores if eps is None else _duplicates_alone(scores, eps)


def plan_completely(ddf: dd.DataFrame, columns: Columns, options: SearchOptions, eps: float) -> Plan:
    """Plan how rows are compared with all others of a frame: see `SemDedupAccessor.plan`."""
    options = up_to(eps, options)
    columns.require(unique_columns(ddf), "embedding")
    columns.check_dtypes(ddf._meta, "embedding", embedding_dim=options.embedding_dim)
    plan = make_plan(ddf, columns, options)
    # Where rows are searched in one task whatever they are, they have not been counted.
    return replace(plan, eps=eps, rows=plan.rows or sum(partition_lengths(ddf, columns)))


def _duplicates_alone(scores: dd.DataFrame, eps: float) -> dd.DataFrame:
    """Return the duplicates with a new index, since the rows between them depend on how they were found."""
    return noted(find_duplicates(scores, eps).reset_index(drop=True))


def up_to(eps: float | None, options: SearchOptions) -> SearchOptions:
    """Return options of a search for duplicates at eps, or for all scores if all rows reach eps or it is None.

    Raises
    ------
    InvalidArgumentError
        If eps is not a cosine distance, or ``duplicate_of="kept"`` lacks an eps below 1.
    """
    if eps is not None:
        check_eps(eps)
        if LIKE_A_SIMILARITY <= eps < 1:
            warnings.warn(
                f"eps is a cosine distance: at eps={eps:g}, rows that are only {1 - eps:.6g} similar are duplicates. "
                f"For a similarity of {eps:g}, pass eps={1 - eps:.6g}.",
                stacklevel=stack_level(),
            )
    if options.duplicate_of == "kept" and not (eps is not None and eps < 1):
        raise InvalidArgumentError(
            f"duplicate_of='kept' needs an eps below 1, not {eps}: which rows are kept depends on eps, and from 1 on "
            "even rows that are not similar at all would be duplicates. Pass an eps below 1, or duplicate_of='any'.",
            parameters=["duplicate_of", "eps"],
        )
    return options if eps is None or eps >= 1 else replace(options, at_least=float(threshold(eps)))


def score_against(
    ddf: dd.DataFrame,
    reference: Any,
    columns: Columns,
    reference_id_field: str,
    eps: float | None,
    n_clusters: int | None,
    centroids: Any,
    fit: dict[str, Any],
    options: SearchOptions,
    *,
    completely: bool,
) -> dd.DataFrame:
    """Score every row against all reference rows or those of its cluster: see `SemDedupAccessor.against`."""
    bounded = up_to(eps, options)
    if not isinstance(reference, dd.DataFrame):
        raise InvalidArgumentError(
            f"reference must be a Dask DataFrame, not {type_name(reference)}. Read files with "
            "dask_semdedup.read_table(path), or convert a pandas DataFrame with dask_semdedup.from_pandas(frame).",
            parameters=["reference"],
        )
    of_reference = replace(columns, id=reference_id_field)
    # Before a fit, which takes longer than to see that a column is not there.
    check_rows(ddf, columns, options)
    of_reference.require(unique_columns(reference), "id", where=" of the reference", parameter="reference_id_field")
    check_rows(reference, of_reference, options)
    queries, candidates = ddf, reference
    if completely:
        for frame in (ddf, reference):
            warn_of_passes(frame)
        narrow = ddf[[columns.id, columns.embedding]], reference[[reference_id_field, columns.embedding]]
        scores = compare_all_with(*narrow, columns, reference_id_field, bounded)
        return scores if eps is None else _duplicates_alone(scores, eps)
    if n_clusters is None and centroids is None:
        _check_clusters_of_both(ddf, reference, columns)
        check_clustered(queries, columns, options)
        check_clustered(candidates, of_reference, options)
    else:
        kmeans = KMeansOptions(**fit)
        if centroids is None:
            centroids = fit_to_sample(reference, of_reference, n_clusters, kmeans, options)
        queries = cluster(ddf, columns, n_clusters, centroids, kmeans, options)
        candidates = cluster(reference, of_reference, n_clusters, centroids, kmeans, options)
    aligned = align_both(
        queries[[columns.id, columns.embedding, columns.cluster]],
        candidates[[reference_id_field, columns.embedding, columns.cluster]],
        columns.cluster,
    )
    scores = new_collection(AgainstScores(*aligned, columns, reference_id_field, options))
    return scores if eps is None else noted(find_duplicates(scores, eps))


def is_complete(clusters: str | None, n_clusters: int | None, centroids: Any, fit: Iterable[str]) -> bool:
    """Return whether rows are compared with all others, because no clusters and no way to make them are given.

    Raises
    ------
    InvalidArgumentError
        If there are options of a fit, and no fit.
    """
    if n_clusters is not None or centroids is not None:
        return False
    if unused := list(fit):
        raise InvalidArgumentError(
            f"No clusters are fitted, so {', '.join(unused)} would have no effect. To compare rows within k-means "
            "clusters, which misses duplicates, pass n_clusters too.",
            parameters=unused,
        )
    return clusters is None


def count_rows(ddf: dd.DataFrame, columns: Columns) -> pd.Series:
    """Count the rows of each cluster, now."""
    rows = compute(ddf[columns.cluster].value_counts())[0].astype("int64").sort_index()
    return rows.to_pandas() if hasattr(rows, "to_pandas") else rows


def check_rows(ddf: dd.DataFrame, columns: Columns, options: SearchOptions) -> None:
    """Raise unless a frame has ids and embeddings, with suitable dtypes."""
    if columns.id not in ddf.columns and columns.id == ddf.index.name:
        raise MissingColumnsError(
            f"{columns.id!r} is the index of the frame, not a column. Make it one with ddf.reset_index().",
            parameters=["id_field"],
            columns=[columns.id],
        )
    if columns.id not in ddf.columns:
        refuse_range_index(ddf, columns.id)
    columns.require(unique_columns(ddf), "id", "embedding")
    columns.check_dtypes(ddf._meta, "id", "embedding", embedding_dim=options.embedding_dim)
    refuse_lacking(ddf, [columns.id, columns.embedding])


def check_clustered(ddf: dd.DataFrame, columns: Columns, options: SearchOptions) -> None:
    """Raise unless a frame has ids, embeddings and clusters, with suitable dtypes."""
    check_rows(ddf, columns, options)
    if columns.cluster not in ddf.columns:
        raise no_cluster_column(columns.cluster, "the frame", ddf.columns)
    columns.require(ddf.columns, "cluster")
    columns.check_dtypes(ddf._meta, "cluster")


def _check_clusters_of_both(ddf: dd.DataFrame, reference: dd.DataFrame, columns: Columns) -> None:
    """Raise if only one of two frames has clusters."""
    have_clusters = [columns.cluster in frame.columns for frame in (ddf, reference)]
    if any(have_clusters) and not all(have_clusters):
        raise ClusterError(
            f"Only one of the two frames has a cluster column {columns.cluster!r}. Pass the centroids of its clusters "
            "as `centroids`, or leave cluster_field out to compare all rows.",
            parameters=["cluster_field", "centroids"],
            columns=[columns.cluster],
        )
