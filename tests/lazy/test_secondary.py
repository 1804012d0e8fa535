"""Secondary assignments: each row is compared with the members of other clusters that are preferred over it."""

from __future__ import annotations

import uuid

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dask_semdedup
from dask_semdedup import ClusterError, InvalidArgumentError
from dask_semdedup.frames.columns import Columns
from dask_semdedup.steps.pairwise import pairwise_meta, pairwise_partition
from dask_semdedup.steps.ranking import RankingStrategy, make_strategy
from dask_semdedup.steps.secondary import best_of_assignments
from tests.data import arrow_lists, assert_best, with_secondary
from tests.strategies import KINDS, seeds


@settings(max_examples=30)
@given(
    rng=seeds(),
    kind=st.sampled_from([kind for kind in KINDS if kind.__name__ not in ("_denormals", "_extremes")]),
    n=st.integers(1, 40),
    n_clusters=st.integers(2, 5),
    n_probe=st.integers(2, 3),
)
def test_scores_are_those_of_all_clusters_that_a_row_stands_in(rng, kind, n, n_clusters, n_probe) -> None:
    frame = with_secondary(rng, kind(rng, n, 6).astype(np.float32), n_clusters, min(n_probe, n_clusters))
    found = pairwise_partition(frame, Columns(), make_strategy("hard"))
    assert_best(best_of_assignments(found, Columns()), frame)


@pytest.mark.parametrize("npartitions", [1, 4])
@pytest.mark.parametrize("ids", ["int", "str"])
def test_through_the_accessor_in_any_partitions(npartitions: int, ids: str) -> None:
    rng = np.random.default_rng(0)
    names = np.arange(60) if ids == "int" else np.array([f"doc-{i:03d}" for i in range(60)])
    frame = with_secondary(rng, rng.standard_normal((60, 8)).astype(np.float32), 5, 2, names)
    lazy = dd.from_pandas(frame, npartitions=npartitions).semdedup.pairwise()
    scores = lazy.compute()
    assert lazy._meta.dtypes.equals(scores.dtypes)
    assert_best(scores.sort_values("centroid", kind="stable").reset_index(drop=True), frame)


def test_kmeans_with_probes_finds_what_one_cluster_misses() -> None:
    """Two copies on either side of a border: they are of different clusters, and each is assigned to both."""
    angles = np.array([0.0, 0.1, 0.78, 0.79, 1.5, 1.57])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    frame = pd.DataFrame({"id": range(6), "embeddings": arrow_lists(rows, pa.float32())})
    ddf, centroids = dd.from_pandas(frame, npartitions=2), np.eye(2, dtype=np.float32)
    one = ddf.semdedup.kmeans(centroids=centroids).semdedup.pairwise().semdedup.duplicates(eps=0.001)
    two = ddf.semdedup.kmeans(centroids=centroids, n_probe=2).semdedup.pairwise().semdedup.duplicates(eps=0.001)
    assert one.compute()["id"].tolist() == []
    assert len(two.compute()) == 1
    assert set(two.compute()[["id", "max_id"]].iloc[0]) == {2, 3}


def test_ids_that_repeat_in_a_cluster_are_an_error_with_probes() -> None:
    rng = np.random.default_rng(1)
    frame = with_secondary(
        rng, rng.standard_normal((10, 4)).astype(np.float32), 2, 2, np.array([0, 0, 0, *range(3, 10)])
    )
    frame["home_centroid"] = frame["centroid"]
    with pytest.raises(ClusterError, match=r"have an id that another row of the same cluster has .*\(ids .*0.*n_probe"):
        dd.from_pandas(frame, npartitions=1).semdedup.pairwise(ranking_strategy=RankingStrategy.random()).compute()


def test_a_partition_without_rows() -> None:
    frame = with_secondary(np.random.default_rng(2), np.ones((3, 2), np.float32), 2, 2)
    found = pairwise_partition(frame.iloc[:0], Columns(), RankingStrategy.random())
    assert found.dtypes.equals(pairwise_meta(frame, Columns()).dtypes)
    assert len(best_of_assignments(found, Columns())) == 0


@pytest.mark.parametrize("page", ["int", "str"])
def test_a_column_of_such_a_name_but_not_of_integers_means_nothing(page: str) -> None:
    frame = with_secondary(np.random.default_rng(3), np.ones((6, 2), np.float32), 2, 1).drop(columns="home_centroid")
    frame = frame.rename(columns={"centroid": "page"}).astype({"page": page}).assign(home_page="https://dask.org")
    ddf = dd.from_pandas(frame, npartitions=2)
    scores, plain = (
        part.semdedup.pairwise(cluster_field="page").compute() for part in (ddf, ddf.drop(columns="home_page"))
    )
    assert len(scores) == 6
    pd.testing.assert_frame_equal(scores, plain)


def test_rows_without_their_own_cluster_are_an_error() -> None:
    frame = with_secondary(np.random.default_rng(4), np.ones((8, 2), np.float32), 4, 2)
    homeless = dd.from_pandas(frame[frame["centroid"] < 2], npartitions=2)
    with pytest.raises(ClusterError, match=r"secondary assignments only: none where 'centroid' is the row's own"):
        homeless.semdedup.pairwise().compute()


def test_frames_with_them_are_not_clustered_again() -> None:
    rng = np.random.default_rng(0)
    frame = with_secondary(rng, rng.standard_normal((60, 4)).astype(np.float32), 3, 2)
    ddf = dd.from_pandas(frame, npartitions=2)
    with pytest.raises(InvalidArgumentError, match=r"assignments: 'home_centroid'.*drop\(columns='home_centroid'\)"):
        ddf.semdedup.kmeans(2)
    once = ddf[ddf.centroid == ddf.home_centroid].drop(columns="home_centroid")
    assert len(once.semdedup.kmeans(centroids=np.eye(4)[:2])) == 60


def test_ids_may_be_uuids(tmp_path):
    ids = pa.array([uuid.UUID(int=number).bytes for number in (3, 2, 1, 0)], pa.uuid())
    lists = pa.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": ids, "embeddings": lists}), tmp_path / "a.parquet")
    table = dask_semdedup.read_table(tmp_path / "a.parquet")
    kept = table.semdedup.deduplicate(centroids=np.eye(2), n_probe=2, eps=0.01).compute()
    assert {id_.int for id_ in kept["id"]} in ({3, 2, 0}, {2, 1, 0})
    found = table.semdedup.against(table, centroids=np.eye(2), n_probe=2, eps=None)
    result = found.compute()
    assert result.dtypes.to_dict() == found.dtypes.to_dict()
    assert {row.id.int: row.max_id.int for row in result.itertuples()} == {3: 1, 2: 2, 1: 1, 0: 0}
