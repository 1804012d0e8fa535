from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup.errors import ClusterError, EmbeddingError, InvalidArgumentError, MissingColumnsError
from dask_semdedup.frames.columns import Columns
from dask_semdedup.steps.pairwise import pairwise_meta
from dask_semdedup.steps.ranking import RankingStrategy, make_strategy
from tests.data import GOLDEN, LAYOUTS, NORMED, objects, run
from tests.oracle import assert_nearest_earlier
from tests.strategies import rows_and_segments


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [5, 2, 0, 3, 1, 4]], ids=str)
@pytest.mark.parametrize(
    ("ranking", "ids", "max_ids", "scores"),
    [
        (make_strategy("hard"), [3, 2, 1, 5, 4, 0], [3, 3, 2, 1, 5, 5], [0, 0.99961, 0.99819, 0.974631, 1, 1]),
        (make_strategy("hard", "l2"), [3, 2, 1, 5, 4, 0], [3, 3, 2, 1, 5, 5], [0, 0.99961, 0.99819, 0.974631, 1, 1]),
        (make_strategy("easy"), [0, 4, 5, 1, 2, 3], [0, 0, 0, 0, 1, 2], [0, 1, 1, 0.97464, 0.99819, 0.999618]),
        (RankingStrategy(["custom_score"], False), [3, 1, 2, 4, 5, 0], [3, 3, 3, 1, 4, 4], None),
        (RankingStrategy(["priority", "custom_score"], [True, False]), [3, 1, 2, 5, 4, 0], [3, 3, 3, 1, 5, 5], None),
    ],
    ids=["hard", "hard l2", "easy", "custom_score", "priority, custom_score"],
)
def test_golden_values(ranking, ids, max_ids, scores, rows):
    exact = [0.0, *(NORMED[ids[1:]] * NORMED[max_ids[1:]]).sum(axis=1)]
    for batch_size in (None, 1, 2, 5, 6, 100):
        result = run(GOLDEN.iloc[rows], ranking, batch_size=batch_size)
        assert result["id"].tolist() == ids, batch_size
        assert result["max_id"].tolist() == max_ids, batch_size
        if scores is not None:
            np.testing.assert_allclose(result["cosine_sim_score"], scores, atol=2e-5)
        np.testing.assert_allclose(result["cosine_sim_score"], exact, atol=2e-6)


@given(rows_and_segments(max_segments=4, max_rows=20), st.randoms())
def test_scores_are_exact_whatever_the_order_of_rows(case, random):
    rows, segments = case
    clusters = np.repeat(np.arange(len(segments) - 1), np.diff(segments))
    frame = pd.DataFrame({"id": np.arange(len(rows)), "embeddings": objects(list(rows)), "centroid": clusters})
    frame["rank"] = frame["id"]
    random.shuffle(shuffled := list(range(len(rows))))
    result = run(frame.iloc[shuffled], RankingStrategy(["rank"]))
    assert result["id"].tolist() == list(range(len(rows)))
    assert_nearest_earlier(rows, segments, result["cosine_sim_score"].to_numpy(), result["max_id"].to_numpy())


@pytest.mark.parametrize("column", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_embeddings_gives_the_same_scores(column):
    frame = pd.DataFrame({"id": range(4), "embeddings": column.reset_index(drop=True), "centroid": [1, 0, 1, 1]})
    result = run(frame, RankingStrategy(["id"]))
    assert result["id"].tolist() == [1, 0, 2, 3]
    assert result["max_id"].tolist() == [1, 0, 0, 0]
    # (1, -2, 0.5) . (3, 1, 1) over the product of their lengths
    np.testing.assert_allclose(result["cosine_sim_score"], [0, 0, 0, 1.5 / np.sqrt(5.25 * 11)], atol=1e-7)


ID_DTYPES = [
    "int64",
    "int16",
    "uint64",
    "Int64",
    "str",
    object,
    "string[pyarrow]",
    "string[python]",
    "category",
    pd.ArrowDtype(pa.string()),
    pd.ArrowDtype(pa.large_string()),
    pd.ArrowDtype(pa.int32()),
]


@pytest.mark.parametrize("strategy", [make_strategy("hard"), make_strategy("random")], ids=["hard", "random"])
@pytest.mark.parametrize("cluster_dtype", ["int32", "str", "category", "Int64"], ids=str)
@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=str)
def test_dtypes_are_kept_and_meta_foretells_them(id_dtype, cluster_dtype, strategy):
    def cast(column, dtype):
        is_number = any(word in str(dtype).lower() for word in ("int", "category"))
        return column.astype("int64" if is_number else str).astype(dtype)

    frame = GOLDEN.assign(id=cast(GOLDEN["id"], id_dtype), centroid=cast(GOLDEN["id"] % 2, cluster_dtype))
    frame.index = [3] * len(frame)
    result = run(frame, strategy)
    expected = {"id": frame["id"], "max_id": frame["id"], "cosine_sim_score": "f4", "centroid": frame["centroid"]}
    for empty in (
        pairwise_meta(frame.iloc[:0], Columns()),
        run(frame.iloc[:0], strategy),
    ):
        assert len(empty) == 0
        pd.testing.assert_frame_equal(empty, result.iloc[:0])
    for name, like in expected.items():
        assert result[name].dtype == getattr(like, "dtype", like)
    assert list(result.columns) == list(expected)
    assert isinstance(result.index, pd.RangeIndex)
    assert set(result["id"]) == set(frame["id"])
    firsts = result.groupby("centroid", observed=True).head(1)
    assert (firsts["id"] == firsts["max_id"]).all()
    assert (firsts["cosine_sim_score"] == 0).all()


def test_fields_may_have_other_names():
    frame = GOLDEN.rename(columns={"id": "doc", "embeddings": "vector", "centroid": "topic"}).drop(
        columns="custom_score"
    )
    result = run(frame, make_strategy("hard", id_field="doc"), id="doc", embedding="vector", cluster="topic")
    assert list(result.columns) == ["id", "max_id", "cosine_sim_score", "topic"]
    assert result["max_id"].tolist() == [3, 3, 2, 1, 5, 5]


def test_duplicate_ids_within_a_cluster_are_allowed():
    result = run(GOLDEN.assign(id=[7, 7, 7, 7, 8, 8]), make_strategy("hard"))
    assert result["id"].tolist() == [7, 7, 7, 8, 8, 7]
    np.testing.assert_allclose(result["cosine_sim_score"], [0, 0.99961, 0.99819, 0.974631, 1, 1], atol=2e-5)


def test_a_cluster_of_one_scores_nothing():
    result = run(GOLDEN.assign(centroid=range(6)))
    assert result["centroid"].tolist() == result["id"].tolist() == result["max_id"].tolist() == list(range(6))
    assert (result["cosine_sim_score"] == 0).all()


@pytest.mark.parametrize("field", ["id", "embedding", "cluster"])
def test_missing_columns_are_named(field):
    with pytest.raises(MissingColumnsError, match=rf"\['gone'\] not found .* \['id', 'embeddings'.*{field}_field"):
        run(GOLDEN, **{field: "gone"})


def test_missing_distances_are_named():
    with pytest.raises(MissingColumnsError, match=r"\['cosine_dist_to_cent'\] not found .*k-means"):
        run(GOLDEN.drop(columns="cosine_dist_to_cent"))


@pytest.mark.parametrize(
    "clusters",
    [
        [0, 0, np.nan, 0, np.nan, 1],
        pd.Series([0, 0, None, 0, None, 1], dtype="Int64"),
        pd.Series(["a", "a", None, "a", None, "b"], dtype="str"),
        pd.Series(["a", "a", None, "a", None, "b"], dtype="category"),
    ],
    ids=["float", "Int64", "str", "category"],
)
def test_rows_without_a_cluster_are_named(clusters):
    with pytest.raises(ClusterError, match=r"Column 'centroid': 2 rows have no cluster \(ids 2, 4\)\. Drop"):
        run(GOLDEN.assign(centroid=clusters))


def test_bad_embeddings_are_named_with_their_clusters():
    rows = [[1.0, 2.0], [np.nan, 1.0], [3.0, 4.0], None]
    frame = pd.DataFrame({"id": list("abcd"), "embeddings": objects(rows), "centroid": [5, 6, 6, 7]})
    with pytest.raises(EmbeddingError, match=r"'embeddings', cluster 7: 1 row with a null embedding \(ids d\)"):
        run(frame, RankingStrategy(["id"]))
    with pytest.raises(EmbeddingError, match=r"'embeddings', cluster 6: 1 row with NaN or infinite values \(ids b\)"):
        run(frame[:3], RankingStrategy(["id"], False))
    with pytest.raises(EmbeddingError, match=r"width 2, where 3 is expected"):
        run(frame[:1], RankingStrategy(["id"]), embedding_dim=3)


def test_bad_arguments_are_refused():
    with pytest.raises(InvalidArgumentError, match="device must be one of 'auto', 'cpu', 'cuda', not 'tpu'"):
        run(GOLDEN, device="tpu")
    with pytest.raises(InvalidArgumentError, match="cluster_field may not be 'id'"):
        run(GOLDEN, cluster="id")
    with pytest.raises(ValueError, match="compute_dtype"):
        run(GOLDEN, compute_dtype="int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"device is 'cuda', but torch sees no CUDA device.*'cpu'"):
        run(GOLDEN, device="cuda")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_scores_for_pandas_frames():
    pd.testing.assert_frame_equal(run(GOLDEN, device="cuda"), run(GOLDEN, device="cpu"), atol=2e-6)
