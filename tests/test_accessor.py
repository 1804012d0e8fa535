"""``ddf.semdedup``: answers, laziness, what reaches the reader, and arguments checked against the schema."""

from __future__ import annotations

import logging
import re
from html import unescape
from pathlib import Path

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_semdedup import (
    ClusterError,
    EmbeddingError,
    InvalidArgumentError,
    MissingColumnsError,
    RankingStrategy,
    accessor,
    read_clusters,
    search,
)
from dask_semdedup.frames.columns import COMPUTE_DTYPES
from dask_semdedup.io import fragments, reader
from dask_semdedup.lazy.alignment import is_aligned
from dask_semdedup.lazy.expressions import ScoresOfFiles
from tests.data import GOLDEN, by_cluster, expected_scores, make_frame, shuffles, write_layout

WIDTH = 8


def assert_scores(scores: dd.DataFrame, expected: pd.DataFrame) -> None:
    """The same rows; in rank order within each cluster, which is in one partition; dtypes as promised."""
    frames = dask.compute(*scores.to_delayed(), scheduler="synchronous")
    assert all(frame.dtypes.to_dict() == scores.dtypes.to_dict() for frame in frames)
    computed = pd.concat(frames).sort_values("centroid", kind="stable", ignore_index=True)
    pd.testing.assert_frame_equal(computed, expected, rtol=0, atol=2e-6)
    held = [set(frame.centroid) for frame in frames]
    assert sum(map(len, held)) == len(set().union(*held))


class TestOverview:
    @pytest.mark.parametrize("show", ["__repr__", "_repr_html_"])
    def test_every_method_is_listed_with_a_line(self, show: str) -> None:
        frame = make_frame().drop(columns="centroid").rename(columns={"id": "doc"})
        ddf = dd.from_pandas(frame, npartitions=2)
        text = getattr(ddf.semdedup, show)()
        public = [name for name in vars(type(ddf.semdedup)) if not name.startswith("_")]
        assert sorted(accessor.METHODS) == sorted(public)
        assert all(re.search(rf"\b{name}\b", text) for name in public)
        assert "Drop each row that has a near-duplicate among the kept rows." in text
        assert "pandas partition" in text
        text = unescape(text)
        assert "no column 'id'; pass id_field" in text
        assert "none; pass cluster_field=None to pairwise to compare all rows" in text
        assert "doc, cosine_dist_to_cent, text" in text
        assert "lazy" in text

    def test_scores_are_told_from_rows(self) -> None:
        scores = pd.DataFrame({"id": [1], "max_id": [1], "cosine_sim_score": [0.0]})
        assert "id, max_id, cosine_sim_score" in repr(dd.from_pandas(scores, npartitions=1).semdedup)


class TestGolden:
    @pytest.mark.parametrize("npartitions", [1, 3])
    @pytest.mark.parametrize("sim_metric", ["cosine", "l2"])
    @pytest.mark.parametrize(
        ("which_to_keep", "ids", "max_ids", "scores"),
        [
            ("hard", [3, 2, 1, 5, 4, 0], [3, 3, 2, 1, 5, 5], [0, 0.99961, 0.99819, 0.974631, 1, 1]),
            ("easy", [0, 4, 5, 1, 2, 3], [0, 0, 0, 0, 1, 2], [0, 1, 1, 0.97464, 0.99819, 0.999618]),
        ],
    )
    def test_which_to_keep(
        self,
        npartitions: int,
        sim_metric: str,
        which_to_keep: str,
        ids: list[int],
        max_ids: list[int],
        scores: list[float],
    ) -> None:
        ddf = dd.from_pandas(GOLDEN, npartitions=npartitions)
        computed = ddf.semdedup.pairwise(which_to_keep=which_to_keep, sim_metric=sim_metric).compute()
        assert computed.columns.to_list() == ["id", "max_id", "cosine_sim_score", "centroid"]
        assert computed.id.to_list() == ids
        assert computed.max_id.to_list() == max_ids
        np.testing.assert_allclose(computed.cosine_sim_score, scores, atol=2e-5)

    @pytest.mark.parametrize(
        ("columns", "ascending", "ids"),
        [
            (["custom_score"], False, [3, 1, 2, 4, 5, 0]),
            (["priority", "custom_score"], [True, False], [3, 1, 2, 5, 4, 0]),
        ],
    )
    def test_ranking_strategy(self, columns: list[str], ascending: bool | list[bool], ids: list[int]) -> None:
        strategy = RankingStrategy.metadata_based(columns, ascending)
        scores = dd.from_pandas(GOLDEN, npartitions=2).semdedup.pairwise(ranking_strategy=strategy)
        assert scores.compute().id.to_list() == ids

    def test_duplicates(self) -> None:
        scores = dd.from_pandas(GOLDEN, npartitions=2).semdedup.pairwise(which_to_keep="easy")
        assert sorted(scores.semdedup.duplicates(eps=1e-4).id.compute()) == [4, 5]
        assert sorted(scores.semdedup.duplicates(eps=1e-3).id.compute()) == [3, 4, 5]


class TestAnswers:
    @settings(max_examples=15)
    @given(seed=st.integers(0, 2**32 - 1), npartitions=st.integers(1, 7))
    def test_any_partitioning_and_row_order(self, seed: int, npartitions: int) -> None:
        frame = make_frame(seed)
        ddf = dd.from_pandas(frame, npartitions=npartitions, sort=False)
        assert_scores(ddf.semdedup.pairwise(), expected_scores(frame))

    @pytest.mark.parametrize("partition_size", [1, 2000, "128MiB"])
    @pytest.mark.parametrize("files", [1, 3])
    def test_read_clusters(self, tmp_path: Path, partition_size: int | str, files: int) -> None:
        frame = make_frame(1)
        ddf = read_clusters(write_layout(tmp_path, by_cluster(frame, files)), partition_size=partition_size)
        assert_scores(ddf.semdedup.pairwise(), expected_scores(frame))

    def test_plain_parquet_in_any_order(self, tmp_path: Path) -> None:
        frame = make_frame(2)
        for part in range(4):
            frame[part::4].to_parquet(tmp_path / f"{part}.parquet", index=False)
        ddf = read_clusters(tmp_path, partition_size=1)
        assert shuffles(ddf.semdedup.pairwise())
        assert_scores(ddf.semdedup.pairwise(), expected_scores(frame))

    @pytest.mark.parametrize("method", ["tasks", "disk"])
    @pytest.mark.parametrize("layout", ["arrow", "object"])
    def test_shuffle_methods_and_layouts(self, method: str, layout: str) -> None:
        frame = make_frame(3)
        expected = expected_scores(frame)
        if layout == "object":
            frame["embeddings"] = pd.Series([np.array(row, np.float32) for row in frame.embeddings], dtype=object)
        with dask.config.set({"dataframe.shuffle.method": method, "dataframe.convert-string": False}):
            ddf = dd.from_pandas(frame, npartitions=4, sort=False)
            assert_scores(ddf.semdedup.pairwise(), expected)

    def test_random_depends_on_seed_and_ids_alone(self, tmp_path: Path) -> None:
        frame = make_frame(4)
        from_files = read_clusters(write_layout(tmp_path, by_cluster(frame)), partition_size=1)
        from_memory = dd.from_pandas(frame[::-1].reset_index(drop=True), npartitions=3, sort=False)
        arguments = {"which_to_keep": "random", "random_seed": 7}
        first, second = (ddf.semdedup.pairwise(**arguments).compute() for ddf in (from_files, from_memory))
        pd.testing.assert_frame_equal(
            first.sort_values("id", ignore_index=True), second.sort_values("id", ignore_index=True)
        )
        other = from_files.semdedup.pairwise(which_to_keep="random", random_seed=8).compute()
        assert other.id.to_list() != first.id.to_list()

    def test_other_names_and_string_ids(self) -> None:
        frame = make_frame(5).drop(columns="text")
        frame["id"] = frame["id"].map("document-{:06d}".format)
        expected = expected_scores(frame)
        names = {"embeddings": "vector", "centroid": "label"}
        ddf = dd.from_pandas(frame.rename(columns=names), npartitions=3, sort=False)
        scores = ddf.semdedup.pairwise(embedding_field="vector", cluster_field="label")
        assert scores.dtypes["id"] == scores.dtypes["max_id"] == ddf.dtypes["id"]
        computed = scores.compute().sort_values("label", kind="stable")
        assert computed.id.to_list() == expected.id.to_list()
        assert computed.max_id.to_list() == expected.max_id.to_list()


class TestLaziness:
    @pytest.fixture
    def reads(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
        read, calls = reader.read_fragment, []

        def count(fs: object, fragment: fragments.Fragment, schema: pa.Schema, *orders: object) -> pa.Table:
            calls.append((fragment.path, schema.names))
            return read(fs, fragment, schema, *orders)

        monkeypatch.setattr(reader, "read_fragment", count)
        return calls

    def test_each_file_is_read_once_and_only_the_needed_columns(
        self, tmp_path: Path, reads: list[tuple[str, list[str]]]
    ) -> None:
        frame = make_frame(6)
        scores = read_clusters(write_layout(tmp_path, by_cluster(frame))).semdedup.pairwise()
        duplicates = scores.semdedup.duplicates()
        duplicates.optimize().__dask_graph__()
        assert reads == []
        dask.compute(scores, duplicates)
        assert len(reads) == len({path for path, _ in reads}) == 2 * 9
        assert all(names == ["id", "embeddings", "cosine_dist_to_cent"] for _, names in reads)

    def test_projection_reaches_the_reader(self, tmp_path: Path) -> None:
        ddf = read_clusters(write_layout(tmp_path, by_cluster(make_frame(6))), partition_size=1)
        needed = ["id", "embeddings", "cosine_dist_to_cent", "centroid"]
        for query, columns in [
            (ddf.semdedup.pairwise(), needed),
            (ddf.semdedup.pairwise(which_to_keep="random"), ["id", "embeddings", "centroid"]),
            (
                ddf.semdedup.pairwise(ranking_strategy=RankingStrategy(["text"])),
                ["id", "embeddings", "text", "centroid"],
            ),
            (ddf.semdedup.pairwise().semdedup.duplicates()[["id"]], needed),
        ]:
            (scores,) = query.optimize(fuse=False).expr.find_operations(ScoresOfFiles)
            assert scores.reading == columns

    def test_aligned_frames_are_not_shuffled_and_others_are(self, tmp_path: Path) -> None:
        frame = make_frame(7)
        aligned = read_clusters(write_layout(tmp_path, by_cluster(frame)), partition_size=1)
        unaligned = dd.from_pandas(frame, npartitions=3)
        assert not shuffles(aligned.semdedup.pairwise())
        assert not shuffles(aligned[aligned.id > 3].semdedup.pairwise())
        assert len(shuffles(unaligned.shuffle("centroid").semdedup.pairwise())) == 1
        (shuffle,) = shuffles(unaligned.semdedup.pairwise())
        assert set(shuffle.frame.columns) == {"id", "embeddings", "centroid", "cosine_dist_to_cent", "_partitions"}

    def test_scores_say_that_they_are_aligned(self, tmp_path: Path) -> None:
        frame = make_frame(7)
        for ddf in (
            read_clusters(write_layout(tmp_path, by_cluster(frame)), partition_size=1),
            dd.from_pandas(frame, npartitions=3),
        ):
            scores = ddf.semdedup.pairwise()
            assert is_aligned(scores, "centroid")
            assert scores.expr.unique_partition_mapping_columns_from_shuffle == {("centroid",)}
            counts = scores.groupby("centroid").id.apply(len, meta=("id", int))
            assert len(shuffles(counts)) == len(shuffles(scores))
            assert counts.compute().to_dict() == frame.centroid.value_counts().to_dict()

    def test_scores_merge_by_cluster(self, tmp_path: Path) -> None:
        frame = make_frame(7)
        scores = read_clusters(write_layout(tmp_path, by_cluster(frame)), partition_size=1).semdedup.pairwise()
        names = pd.DataFrame({"centroid": frame.centroid.unique()}).assign(
            name=lambda table: "c" + table.centroid.map(str)
        )
        merged = scores.merge(dd.from_pandas(names, npartitions=9), on="centroid", broadcast=False).compute()
        assert len(merged) == len(frame)
        assert (merged.name == "c" + merged.centroid.map(str)).all()

    def test_read_and_search_are_one_task(self, tmp_path: Path) -> None:
        ddf = read_clusters(write_layout(tmp_path, by_cluster(make_frame(8))), partition_size=1)
        assert len(ddf.semdedup.pairwise().optimize().__dask_graph__()) == ddf.npartitions == 9

    def test_partitions_and_pickling(self, tmp_path: Path) -> None:
        from distributed.protocol import deserialize, serialize

        frame = make_frame(8)
        scores = read_clusters(write_layout(tmp_path, by_cluster(frame)), partition_size=1).semdedup.pairwise()
        assert set(scores.partitions[2:4].centroid.compute()) == {6, 9}
        copy = deserialize(*serialize(scores, serializers=["pickle"]))
        assert copy._name == scores._name
        assert_scores(copy, expected_scores(frame))

    def test_names_depend_on_the_arguments(self) -> None:
        ddf = dd.from_pandas(make_frame(8), npartitions=2)
        assert ddf.semdedup.pairwise()._name == ddf.semdedup.pairwise()._name
        assert ddf.semdedup.pairwise()._name != ddf.semdedup.pairwise(which_to_keep="easy")._name

    def test_verbose_logs_each_partition(self, caplog: pytest.LogCaptureFixture) -> None:
        frame = make_frame(8)
        ddf = dd.from_pandas(frame, npartitions=1)
        with caplog.at_level(logging.INFO, logger="dask_semdedup"):
            ddf.semdedup.pairwise().compute()
            assert not caplog.records
            ddf.semdedup.pairwise(verbose=True).compute()
        assert f"{len(frame)} rows in 9 clusters took" in caplog.text


class TestBadInput:
    """All of these are errors when the graph is built, but for those that only the data tell."""

    @pytest.fixture
    def ddf(self) -> dd.DataFrame:
        return dd.from_pandas(make_frame(9), npartitions=2)

    def test_missing_columns(self, ddf: dd.DataFrame) -> None:
        with pytest.raises(
            MissingColumnsError, match=r"\['document'\] not found.*'text'\].*as id_field.*make_ids=True"
        ):
            ddf.semdedup.pairwise(id_field="document")
        with pytest.raises(MissingColumnsError, match=r"\['vector'\] not found"):
            ddf.semdedup.pairwise(embedding_field="vector")

    def test_no_cluster_column(self, ddf: dd.DataFrame) -> None:
        with pytest.raises(ClusterError, match=r"No cluster column 'label'.*cluster_field=None.*kmeans"):
            ddf.semdedup.pairwise(cluster_field="label")

    @pytest.mark.parametrize(("metric", "column"), [("cosine", "cosine_dist_to_cent"), ("l2", "l2_dist_to_cent")])
    def test_no_distances(self, ddf: dd.DataFrame, metric: str, column: str) -> None:
        ddf = ddf.drop(columns="cosine_dist_to_cent")
        for which_to_keep in ("hard", "easy"):
            with pytest.raises(MissingColumnsError, match=rf"\['{column}'\] not found.*k-means.*random"):
                ddf.semdedup.pairwise(which_to_keep=which_to_keep, sim_metric=metric)
        assert len(ddf.semdedup.pairwise(which_to_keep="random").compute()) == len(ddf)

    def test_missing_ranking_columns(self, ddf: dd.DataFrame) -> None:
        with pytest.raises(MissingColumnsError, match=r"Required columns \['quality'\] not found.*ranking strategy"):
            ddf.semdedup.pairwise(ranking_strategy=RankingStrategy(["quality", "text"]))

    def test_embeddings_that_dask_made_strings(self) -> None:
        frame = make_frame(9)
        frame["embeddings"] = pd.Series([np.array(row) for row in frame.embeddings], dtype=object)
        ddf = dd.from_pandas(frame, npartitions=2)
        with pytest.raises(EmbeddingError, match=r"'embeddings'.*strings.*dask_semdedup.from_pandas"):
            ddf.semdedup.pairwise()

    def test_embeddings_that_are_numbers(self, ddf: dd.DataFrame) -> None:
        with pytest.raises(EmbeddingError, match=r"'cosine_dist_to_cent' has dtype float64"):
            ddf.semdedup.pairwise(embedding_field="cosine_dist_to_cent")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"which_to_keep": "soft"}, r"which_to_keep must be one of 'hard', 'easy', 'random', not 'soft'"),
            ({"sim_metric": "dot"}, r"sim_metric must be one of 'cosine', 'l2', not 'dot'"),
            ({"compute_dtype": "float8"}, r"compute_dtype must be one of 'auto', 'float32'.* not 'float8'"),
            ({"device": "tpu"}, r"device must be one of 'auto', 'cpu', 'cuda', not 'tpu'"),
            ({"pairwise_batch_size": 0}, r"pairwise_batch_size must be a positive integer or None, not 0"),
            ({"embedding_dim": 2.5}, r"embedding_dim must be a positive integer or None, not 2.5"),
            ({"random_seed": "x"}, r"random_seed must be an integer, not 'x'"),
            ({"cluster_field": "id"}, r"cluster_field may not be 'id'"),
            ({"ranking_strategy": "hard"}, r"ranking_strategy must be a RankingStrategy, such as .* not 'hard'"),
        ],
    )
    def test_arguments(self, ddf: dd.DataFrame, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(InvalidArgumentError, match=message):
            ddf.semdedup.pairwise(**arguments)

    def test_compute_dtypes_are_those_of_the_search(self) -> None:
        assert COMPUTE_DTYPES == search.COMPUTE_DTYPES

    def test_null_clusters_when_computed(self) -> None:
        frame = make_frame(9)
        frame["centroid"] = frame.centroid.astype("float64").where(frame.index != 5)
        scores = dd.from_pandas(frame, npartitions=2, sort=False).semdedup.pairwise()
        with pytest.raises(ClusterError, match=rf"'centroid': 1 row has no cluster \(ids {frame.id[5]}\)"):
            scores.compute()

    def test_bad_embeddings_name_column_rows_and_ids(self, tmp_path: Path) -> None:
        frame = make_frame(9)
        rows = [list(row) for row in frame.embeddings]
        rows[3] = rows[3][:-1]
        table = pa.Table.from_pandas(frame.drop(columns="embeddings"), preserve_index=False)
        table = table.append_column("embeddings", pa.array(rows, pa.list_(pa.float32())))
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(EmbeddingError, match=rf"'embeddings'.*1 row.*width 7.*{frame.id[3]}"):
            read_clusters(tmp_path / "a.parquet").semdedup.pairwise().compute()

    def test_columns_of_one_name(self, ddf: dd.DataFrame) -> None:
        twice = dd.concat([ddf, ddf[["id"]]], axis=1)
        for call in (twice.semdedup.pairwise, twice.semdedup.kmeans, twice.semdedup.deduplicate):
            with pytest.raises(InvalidArgumentError, match="Several columns have one name: 'id'"):
                call()

    def test_embedding_dim(self, ddf: dd.DataFrame) -> None:
        with pytest.raises(EmbeddingError, match=r"where 9 is expected"):
            ddf.semdedup.pairwise(embedding_dim=9).compute()

    def test_a_fixed_width_is_checked_before_anything_is_computed(self) -> None:
        frame = make_frame(9)
        fixed = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(list(frame.embeddings)), pa.float32()), 8)
        frame["embeddings"] = pd.Series(fixed, dtype=pd.ArrowDtype(fixed.type))
        ddf = dd.from_pandas(frame, npartitions=2)
        with pytest.raises(EmbeddingError, match=r"'embeddings' .*of width 8, where 9 is expected"):
            ddf.semdedup.pairwise(embedding_dim=9)
        assert len(ddf.semdedup.pairwise(embedding_dim=8)) == len(frame)

    @pytest.mark.parametrize("name", ["id_field", "cluster_field"])
    @pytest.mark.parametrize(
        "type_",
        [pa.list_(pa.int64()), pa.list_(pa.int64(), 1), pa.large_list(pa.int64()), pa.struct([("x", pa.int64())])],
    )
    def test_ids_and_clusters_that_are_lists(self, name: str, type_: pa.DataType) -> None:
        value = {"x": 1} if pa.types.is_struct(type_) else [1]
        frame = make_frame(9)
        frame["odd"] = pd.Series([value] * len(frame), dtype=pd.ArrowDtype(type_))
        ddf = dd.from_pandas(frame, npartitions=2)
        with pytest.raises(
            InvalidArgumentError, match=rf"Column 'odd' has dtype .*Name a column of integers or strings as {name}\.$"
        ):
            ddf.semdedup.pairwise(**{name: "odd"})

    def test_accessor_leaves_the_frame_alone(self, ddf: dd.DataFrame) -> None:
        before = ddf.compute()
        ddf.semdedup.pairwise().compute()
        pd.testing.assert_frame_equal(ddf.compute(), before)


@pytest.mark.gpu
class TestCudf:
    """The same answers from partitions of cuDF."""

    @pytest.mark.parametrize("partition_size", [1, "128MiB"])
    def test_read_clusters(self, tmp_path: Path, partition_size: int | str) -> None:
        cudf = pytest.importorskip("cudf")
        frame = make_frame(10)
        path = write_layout(tmp_path, by_cluster(frame))
        scores = read_clusters(path, backend="cudf", partition_size=partition_size).semdedup.pairwise()
        assert isinstance(scores._meta, cudf.DataFrame)
        assert not shuffles(scores)
        assert_scores(scores.to_backend("pandas"), expected_scores(frame))

    def test_unaligned_frames(self) -> None:
        cudf, dask_cudf = pytest.importorskip("cudf"), pytest.importorskip("dask_cudf")
        frame = make_frame(11)
        ddf = dask_cudf.from_cudf(cudf.from_pandas(frame), npartitions=3, sort=False)
        assert_scores(ddf.semdedup.pairwise().to_backend("pandas"), expected_scores(frame))


def test_a_ranking_that_changes_later_changes_nothing() -> None:
    strategy = RankingStrategy(["id"])
    scores = dd.from_pandas(make_frame(3), npartitions=1).semdedup.pairwise(ranking_strategy=strategy)
    expected = scores.compute()
    strategy.ascending = [False]
    pd.testing.assert_frame_equal(scores.compute(), expected)
