"""From raw embeddings to the kept rows in one call."""

from __future__ import annotations

import re
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from dask_semdedup import IdError, InvalidArgumentError, MissingColumnsError, RankingStrategy, from_pandas, read_table
from dask_semdedup.errors import ClusterError, DataReadError, EmbeddingError
from tests.data import arrow_lists


@pytest.fixture
def raw() -> pd.DataFrame:
    """Thirty random rows, and a near copy of each."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 8))
    rows = np.concatenate([rows, rows + 1e-3 * rng.standard_normal((30, 8))])
    return pd.DataFrame({"id": range(60), "embeddings": arrow_lists(rows, pa.float32()), "quality": range(60)})


@pytest.mark.parametrize("npartitions", [1, 4])
@pytest.mark.parametrize("n_clusters", [None, 2])
@pytest.mark.filterwarnings("ignore:k-means is fitted to")
def test_of_each_pair_the_preferred_row_is_kept(raw: pd.DataFrame, npartitions: int, n_clusters: int | None) -> None:
    best = RankingStrategy(["quality"], ascending=False)
    ddf = dd.from_pandas(raw, npartitions=npartitions)
    kept = ddf.semdedup.deduplicate(0.01, n_clusters, ranking_strategy=best)
    pd.testing.assert_frame_equal(kept.compute(), raw.iloc[30:])


def test_clusters_may_have_another_name(raw: pd.DataFrame) -> None:
    """A column of the default name is the frame's own: it is not compared by, and stays as it is."""
    ddf = dd.from_pandas(raw.assign(centroid=range(60)), npartitions=2)
    for options in ({}, {"n_clusters": 1, "cluster_field": "cluster"}):
        kept = ddf.semdedup.deduplicate(0.01, **options).compute()
        assert len(kept) == 30
        assert (kept["centroid"] == kept["id"]).all()


def test_rows_are_compared_within_the_clusters_of_a_column(raw: pd.DataFrame) -> None:
    """Every row of the second half is like one of the first: a third of these stand in another cluster."""
    raw["language"] = ["en"] * 30 + ["de"] * 10 + ["en"] * 20
    ddf = dd.from_pandas(raw, npartitions=2)
    kept = ddf.semdedup.deduplicate(0.01, cluster_field="language", ranking_strategy=RankingStrategy(["quality"]))
    assert kept.compute()["id"].tolist() == list(range(40))


@pytest.mark.parametrize("options", [{}, {"cluster_field": "language"}, {"duplicate_of": "any"}])
def test_null_ids_are_an_error_as_in_the_command(raw: pd.DataFrame, options: dict[str, str]) -> None:
    raw = raw.assign(id=raw["id"].astype("Int64").mask(raw["id"].isin([3, 40])), language="en")
    ddf = dd.from_pandas(raw, npartitions=1)
    kept = ddf.semdedup.deduplicate(0.01, ranking_strategy=RankingStrategy(["quality"]), **options)
    with pytest.raises(IdError, match="Column 'id': 2 rows have a null id"):
        kept.compute()


@pytest.mark.parametrize("options", [{}, {"cluster_field": "language", "which_to_keep": "random"}])
def test_rows_of_one_id_are_an_error_that_says_how_to_drop_them(raw: pd.DataFrame, options: dict[str, str]) -> None:
    ddf = dd.from_pandas(raw.assign(doc=raw["id"] % 30, language="en"), npartitions=2)
    with pytest.raises(IdError, match=r"Column 'doc': ids repeat, so that 30 rows would be dropped") as error:
        ddf.semdedup.deduplicate(0.01, id_field="doc", **options).compute()
    assert "against" not in str(error.value)
    assert error.value.columns == ("doc",)
    (advice,) = re.findall(r"ddf\.drop_duplicates\(.*?\)", str(error.value))
    assert len(eval(advice, {"ddf": ddf}).semdedup.deduplicate(0.01, id_field="doc", **options)) == 30


def test_stored_scores_with_repeated_ids_may_be_those_of_another_frame(raw: pd.DataFrame) -> None:
    ddf = dd.from_pandas(raw, npartitions=1)
    scores = ddf.semdedup.against(ddf).compute()
    with pytest.raises(IdError, match=r"ddf\.drop_duplicates\('id'\).*scores of `against`") as error:
        ddf.semdedup.remove(scores).compute()
    (advice,) = re.findall(r"scores\[\['id'\]\]", str(error.value))
    assert len(ddf.semdedup.remove(eval(advice, {"scores": scores}))) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"id_field": "doc"}, MissingColumnsError, "'doc'"),
        ({"ranking_strategy": RankingStrategy(["date"])}, MissingColumnsError, "'date'"),
        ({"which_to_keep": "best"}, InvalidArgumentError, "which_to_keep must be one of"),
        ({"compute_dtype": "int8"}, InvalidArgumentError, "compute_dtype must be one of"),
        ({"pairwise_batch_size": 0}, InvalidArgumentError, "pairwise_batch_size must be a positive"),
        ({"max_iters": 3}, TypeError, r"deduplicate\(\) got .* 'max_iters'. Did you mean 'max_iter'"),
    ],
)
def test_what_is_wrong_is_said_before_a_fit(raw: pd.DataFrame, options: dict, error: type, message: str) -> None:
    ddf = dd.from_pandas(raw, npartitions=2).map_partitions(fail, meta=raw)
    with pytest.raises(error, match=message):
        ddf.semdedup.deduplicate(0.01, **options)


def fail(_: pd.DataFrame) -> pd.DataFrame:
    raise AssertionError("computed")


def test_files_without_the_column_of_embeddings_are_named(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [1, 2], "embeddings": [[1.0, 0.0], [0.0, 1.0]]})
    frame.to_parquet(tmp_path / "0.parquet")
    frame[:0][["id"]].to_parquet(tmp_path / "1.parquet")
    assert len(read_table(tmp_path).semdedup.deduplicate()) == 2, "a file without rows lacks nothing"
    frame.rename(columns={"embeddings": "vectors"}).assign(id=[3, 4]).to_parquet(tmp_path / "2.parquet")
    with pytest.raises(DataReadError, match=r"2.parquet has no values in column 'embeddings', which other files have"):
        read_table(tmp_path).semdedup.deduplicate()


def test_rows_without_an_id_are_refused_as_soon_as_they_are_read() -> None:
    frame = pd.DataFrame({"id": ["a", None], "embeddings": [[1.0, 0.0], [0.0, 1.0]]})
    scores = from_pandas(frame).semdedup.pairwise(cluster_field=None)
    with pytest.raises(IdError, match="Column 'id': 1 row has a null id"):
        scores.compute()


def test_columns_may_have_names_of_several_types() -> None:
    rows = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    frame = pd.DataFrame({"id": range(20), 0: list(np.concatenate([rows[:18], rows[:2]])), 7: range(20)})
    ddf = from_pandas(frame, embedding_field=0)
    kept = ddf.semdedup.deduplicate(eps=0.01, embedding_field=0, ranking_strategy=RankingStrategy([7]))
    assert kept["id"].compute().tolist() == list(range(18))


def test_a_missing_cluster_column_is_named_first() -> None:
    frame = pd.DataFrame({"id": range(3), "embeddings": list(np.eye(3, dtype=np.float32))})
    with pytest.raises(ClusterError, match=r"No cluster column 'nope'"):
        from_pandas(frame).semdedup.deduplicate(cluster_field="nope")


def test_clusters_are_either_given_or_made(raw: pd.DataFrame) -> None:
    ddf = from_pandas(raw.assign(source=raw["id"] % 2))
    for made in ({"n_clusters": 3}, {"centroids": np.eye(8)[:3]}):
        with pytest.raises(InvalidArgumentError, match="a column 'source', and n_clusters or centroids would make"):
            ddf.semdedup.deduplicate(eps=0.1, cluster_field="source", **made)
    assert len(ddf.semdedup.deduplicate(eps=0.1, cluster_field="source", which_to_keep="random")) == 30


@pytest.mark.parametrize("method", ["deduplicate", "pairwise", "plan"])
def test_a_similarity_is_no_eps(raw: pd.DataFrame, method: str) -> None:
    options = {} if method == "plan" else {"cluster_field": None}
    with pytest.warns(
        UserWarning, match=r"at eps=0\.95, .* only 0\.05 similar .*a similarity of 0\.95, pass eps=0\.05"
    ):
        getattr(from_pandas(raw).semdedup, method)(eps=0.95, **options)


def test_tensors_are_told_how_to_become_arrays(raw: pd.DataFrame) -> None:
    rows = torch.from_numpy(np.array(raw["embeddings"].tolist(), np.float32))
    with pytest.raises(EmbeddingError, match=r"of type Tensor .*list\(tensor\.numpy\(\)\)"):
        from_pandas(raw.assign(embeddings=list(rows)))


@pytest.mark.parametrize("method", ["deduplicate", "pairwise", "plan", "kmeans"])
def test_scores_are_told_from_documents(raw: pd.DataFrame, method: str) -> None:
    scores = from_pandas(raw).semdedup.pairwise(eps=0.1, cluster_field=None)
    with pytest.raises(MissingColumnsError, match="These are scores: call the method on the frame of the embeddings"):
        getattr(scores.semdedup, method)(**({"cluster_field": None} if method == "pairwise" else {}))
