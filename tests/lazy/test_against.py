"""Rows against reference rows: each keeps its most similar one of the same cluster."""

from __future__ import annotations

import uuid
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dask_semdedup
from dask_semdedup import ClusterError, EmbeddingError, InvalidArgumentError, MissingColumnsError
from dask_semdedup.frames.columns import Columns
from dask_semdedup.steps.against import against_meta, against_partition
from tests.data import arrow_lists
from tests.strategies import seeds


def side(rng: np.random.Generator, n: int, n_clusters: int, prefix: str = "") -> pd.DataFrame:
    """Rows of few distinct embeddings, so that scores tie."""
    rows = rng.standard_normal((5, 6)).astype(np.float32)[rng.integers(5, size=n)]
    rows += (rng.random((n, 1)) < 0.5) * rng.standard_normal((n, 6)).astype(np.float32)
    ids = rng.permutation(n) if not prefix else np.array([f"{prefix}{i}" for i in rng.permutation(n)], dtype=object)
    return pd.DataFrame(
        {
            "id": ids,
            "embeddings": arrow_lists(rows, pa.float32()),
            "centroid": rng.integers(n_clusters, size=n).astype(np.int32),
        }
    )


def unit(frame: pd.DataFrame) -> np.ndarray:
    rows = np.stack(frame["embeddings"].to_list()).astype(np.float64) if len(frame) else np.empty((0, 6))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def expected(frame: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    reference = reference.sort_values("id")
    similarity = unit(frame) @ unit(reference).T
    same = frame["centroid"].to_numpy()[:, None] == reference["centroid"].to_numpy()
    similarity = np.where(same, similarity, -np.inf)
    found = frame[["id", "centroid"]][same.any(axis=1)].copy()
    similarity = similarity[same.any(axis=1)]
    best = similarity.max(axis=1, initial=-np.inf)
    found["score"] = best
    found["max_id"] = (
        reference["id"].to_numpy()[(similarity >= best[:, None] - 1e-12).argmax(axis=1)] if len(best) else []
    )
    return found.sort_values(["centroid", "id"]).reset_index(drop=True)


@settings(max_examples=40)
@given(
    rng=seeds(),
    n=st.integers(0, 30),
    m=st.integers(0, 30),
    n_clusters=st.integers(1, 4),
    prefix=st.sampled_from(["", "doc-"]),
)
def test_the_most_similar_reference_row_of_the_same_cluster(rng, n: int, m: int, n_clusters: int, prefix: str) -> None:
    frame, reference = side(rng, n, n_clusters, prefix), side(rng, m, n_clusters)
    scores = against_partition(frame, reference, Columns(), "id")
    truth = expected(frame, reference)
    assert scores["id"].tolist() == truth["id"].tolist()
    assert scores["max_id"].tolist() == truth["max_id"].tolist()
    np.testing.assert_allclose(scores["cosine_sim_score"], truth["score"].astype(float).clip(-1, 1), atol=2e-6)
    meta = against_meta(frame.iloc[:0], reference.iloc[:0], Columns(), "id")
    assert scores.dtypes.equals(meta.dtypes)


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (3, 1), (1, 4), (3, 2)])
def test_frames_of_any_partitions(ours: int, theirs: int) -> None:
    rng = np.random.default_rng(0)
    frame, reference = side(rng, 80, 6, "new-"), side(rng, 200, 6)
    reference["centroid"] = reference["centroid"].astype("int64")
    lazy = dd.from_pandas(frame, npartitions=ours).semdedup.against(
        dd.from_pandas(reference, npartitions=theirs), eps=None, cluster_field="centroid"
    )
    scores = lazy.compute()
    assert lazy._meta.dtypes.equals(scores.dtypes)
    truth = expected(frame, reference)
    found = scores.sort_values(["centroid", "id"]).reset_index(drop=True)
    assert found["id"].tolist() == truth["id"].tolist()
    assert found["max_id"].tolist() == truth["max_id"].tolist()
    few = dd.from_pandas(frame, npartitions=ours).semdedup.against(
        dd.from_pandas(reference, npartitions=theirs), eps=0.3, cluster_field="centroid"
    )
    assert sorted(few.compute()["id"]) == sorted(found["id"][found["cosine_sim_score"] >= 0.7])


def test_both_are_assigned_to_the_same_centroids() -> None:
    rng = np.random.default_rng(1)
    frame, reference = (side(rng, n, 1).drop(columns="centroid") for n in (50, 120))
    centroids = rng.standard_normal((3, 6)).astype(np.float32)
    lazy = [dd.from_pandas(part, npartitions=2) for part in (frame, reference)]
    scores = lazy[0].semdedup.against(lazy[1], eps=None, centroids=centroids).compute()
    own, theirs = (((unit(part)[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1) for part in (frame, reference))
    is_met = own[:, None] == theirs
    similarity = np.where(is_met, unit(frame) @ unit(reference).T, -np.inf).max(axis=1)
    truth = pd.Series(similarity, frame["id"])[is_met.any(axis=1)].sort_index()
    assert scores["id"].is_unique
    np.testing.assert_allclose(scores.set_index("id")["cosine_sim_score"].sort_index(), truth, atol=2e-6)
    np.testing.assert_array_equal(scores["centroid"], pd.Series(own, frame["id"])[scores["id"]])


def test_fitted_to_the_reference() -> None:
    rng = np.random.default_rng(2)
    reference = side(rng, 300, 1).drop(columns="centroid")
    frame = reference.iloc[::10].assign(id=[f"copy-{i}" for i in range(30)])
    lazy = [dd.from_pandas(part, npartitions=2) for part in (frame, reference)]
    found = lazy[0].semdedup.against(lazy[1], eps=0, n_clusters=4).compute()
    assert sorted(found["id"]) == sorted(frame["id"])
    assert (found["cosine_sim_score"] == 1).all()


@pytest.mark.parametrize("npartitions", [1, 3])
def test_rows_without_a_cluster_are_named_whatever_the_other_frame_has(npartitions: int) -> None:
    frame = side(np.random.default_rng(8), 10, 2)
    lost = frame.assign(centroid=pd.array([None, *frame["centroid"][1:]], "Int64"))
    lazy = [dd.from_pandas(part, npartitions=npartitions) for part in (lost, frame)]
    with pytest.raises(ClusterError, match="1 row has no cluster"):
        lazy[0].semdedup.against(lazy[1], cluster_field="centroid").compute()


@pytest.mark.filterwarnings("error")
def test_columns_of_the_scores_stay_aligned_with_each_other() -> None:
    rng = np.random.default_rng(6)
    lazy = [dd.from_pandas(side(rng, 100, 7), npartitions=3) for _ in range(2)]
    scores = lazy[0].semdedup.against(lazy[1], eps=None, cluster_field="centroid")
    whole = scores.compute()
    some = scores[scores["cosine_sim_score"] > 0.5].compute()
    pd.testing.assert_frame_equal(some, whole[whole["cosine_sim_score"] > 0.5])


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    frame = dd.from_pandas(side(np.random.default_rng(3), 10, 2), npartitions=2)
    lazy = frame.map_partitions(fail, meta=frame._meta)
    assert isinstance(lazy.semdedup.against(lazy, cluster_field="centroid"), dd.DataFrame)
    assert isinstance(lazy.semdedup.against(lazy, eps=None), dd.DataFrame)


def fail(_: pd.DataFrame) -> pd.DataFrame:
    raise AssertionError("computed")


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"eps": 3}, InvalidArgumentError, "eps must be a number from 0 to 2"),
        ({}, {"device": "tpu"}, InvalidArgumentError, "device must be one of"),
        ({}, {"max_iter": 2}, InvalidArgumentError, "max_iter would have no effect"),
        ({}, {"centroids": np.eye(6), "n_clusters": 2}, InvalidArgumentError, "n_clusters is 2, but there are 6"),
        ({}, {"centroids": np.eye(6), "n_inits": 2}, TypeError, "n_inits"),
        (
            {"drop": "centroid"},
            {"cluster_field": "centroid"},
            ClusterError,
            "Only one of the two frames has a cluster column 'centroid'",
        ),
        ({"drop": "embeddings"}, {}, MissingColumnsError, "embeddings"),
        ({"drop": "id"}, {}, MissingColumnsError, "'id'"),
        ({"clusters": str}, {"cluster_field": "centroid"}, InvalidArgumentError, "clusters must be of one clustering"),
    ],
)
def test_bad_arguments(change: dict, options: dict, error: type[Exception], message: str) -> None:
    frame = side(np.random.default_rng(4), 10, 2)
    reference = frame.drop(columns=change["drop"]) if "drop" in change else frame.copy()
    if "clusters" in change:
        reference["centroid"] = reference["centroid"].astype(change["clusters"])
    lazy = [dd.from_pandas(part, npartitions=1) for part in (frame, reference)]
    with pytest.raises(error, match=message):
        lazy[0].semdedup.against(lazy[1], **options)


def test_bad_rows() -> None:
    rng = np.random.default_rng(5)
    frame, reference = side(rng, 6, 2), side(rng, 6, 2)
    with pytest.raises(ClusterError, match=r"1 row has no cluster \(ids"):
        against_partition(frame, reference.assign(centroid=[None, 0, 0, 1, 1, 1]), Columns(), "id")
    narrow = reference.assign(embeddings=arrow_lists(np.ones((6, 4)), pa.float32()))
    with pytest.raises(EmbeddingError, match=r"6 rows with width 6, where 4 is expected, that of the reference"):
        against_partition(frame, narrow, Columns(), "id")


def test_the_reference_is_a_frame_of_dask() -> None:
    frame = pd.DataFrame({"id": [1], "embeddings": [[1.0, 0.0]]})
    with pytest.raises(
        InvalidArgumentError, match=r"must be a Dask DataFrame, not pandas.DataFrame.*dask_semdedup\.from_pandas"
    ):
        dd.from_pandas(frame[["id"]], npartitions=1).semdedup.against(frame)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_among_equals_the_smallest_id_is_found(order: list[int]) -> None:
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    reference = pd.DataFrame({"id": [8, 7, 6], "embeddings": arrow_lists(rows, pa.float32()), "centroid": 0})
    frame = reference.iloc[:1].assign(id=1)
    assert against_partition(frame, reference.iloc[order], Columns(), "id")["max_id"].tolist() == [7]


def test_ids_may_be_uuids(tmp_path: Path) -> None:
    ids = pa.array([uuid.UUID(int=number).bytes for number in (3, 2, 1, 0)], pa.uuid())
    lists = pa.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": ids, "embeddings": lists}), tmp_path / "a.parquet")
    table = dask_semdedup.read_table(tmp_path / "a.parquet")
    kept = table.semdedup.deduplicate(centroids=np.eye(2), eps=0.01).compute()
    assert {id_.int for id_ in kept["id"]} in ({3, 2, 0}, {2, 1, 0})
    found = table.semdedup.against(table, centroids=np.eye(2), eps=None)
    result = found.compute()
    assert result.dtypes.to_dict() == found.dtypes.to_dict()
    assert {row.id.int: row.max_id.int for row in result.itertuples()} == {3: 1, 2: 2, 1: 1, 0: 0}


def test_keywords_of_no_method_are_named() -> None:
    frame = dd.from_pandas(pd.DataFrame({"id": [1], "embeddings": [[1.0, 0.0]]}), npartitions=1)
    with pytest.raises(TypeError, match=r"against\(\) got .* 'n_cluster'\. Did you mean 'n_clusters'"):
        frame.semdedup.against(frame, n_cluster=3)


@pytest.mark.parametrize("npartitions", [1, 3])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [({"embeddings": [np.nan, 1.0]}, EmbeddingError, "NaN.*ids 3"), ({"centroid": None}, ClusterError, "1 row.*ids 3")],
)
def test_no_row_is_skipped_because_nothing_is_there_to_compare_it_with(npartitions, bad, error, message):
    rows = [{"id": id_, "embeddings": [1.0, id_], "centroid": id_ // 3} for id_ in (1, 2, 3)]
    rows[2] |= bad
    new, old = (pd.DataFrame(part).astype({"centroid": "Int64"}) for part in (rows, rows[:2]))
    ours, theirs = (
        dd.from_pandas(
            part.assign(embeddings=arrow_lists(np.stack(part["embeddings"]), pa.float32())), npartitions=npartitions
        )
        for part in (new, old)
    )
    with pytest.raises(error, match=message):
        ours.semdedup.against(theirs, eps=None, cluster_field="centroid").compute()
    with pytest.raises(error, match=message):
        theirs.semdedup.against(ours, eps=None, cluster_field="centroid").compute()
