"""Clusters are read from folders and plain files, lazily, and what is wrong with them is named."""

from __future__ import annotations

import os
from pathlib import Path

import dask
import dask.dataframe as dd
import dask.order
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dask.dataframe.utils import assert_eq

from dask_semdedup import ClusterError, InvalidArgumentError, MissingColumnsError, read_clusters
from dask_semdedup.errors import DataNotFoundError, DataReadError
from dask_semdedup.io import cudf_reader, footers, fragments, listing, reader, scan
from dask_semdedup.lazy.alignment import is_aligned
from dask_semdedup.lazy.expressions import ReadClusters
from tests.data import clusters_are_whole, partition_frames, shuffles, write_random_layout


def assert_same(ddf: dd.DataFrame, expected: pd.DataFrame) -> None:
    """The same rows, in any order, and dtypes as promised in every partition."""
    frames = partition_frames(ddf)
    for frame in frames:
        assert list(frame.dtypes) == list(ddf.dtypes)
        assert isinstance(frame.index, pd.RangeIndex)
    computed = pd.concat(frames).sort_values("id", ignore_index=True)
    expected = expected.sort_values("id", ignore_index=True)[list(computed.columns)]
    for name in computed.columns:
        assert [as_plain(value) for value in computed[name]] == [as_plain(value) for value in expected[name]], name


def as_plain(value: object) -> object:
    return list(value) if isinstance(value, (list, np.ndarray)) else value


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(reader, "read_fragment", fail)


class TestFooters:
    def test_count_what_the_columns_take(self, tmp_path: Path) -> None:
        table = pa.table(
            {
                "id": pa.array([1, None, 3]),
                "flag": [True, False, True],
                "embeddings": pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32())),
                "text": ["a" * 100] * 3,
            }
        )
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        fs, files = listing.list_files(tmp_path)
        (file,) = scan.scan_files(fs, files, ["id", "flag", "embeddings"]).files
        assert [(group.rows, group.nbytes, group.elements) for group in file.row_groups] == [(2, 34, 4), (1, 17, 2)]
        assert file.nullable == {"id"}
        (file,) = scan.scan_files(fs, files, ["id", "text"], nulls=False).files
        assert file.nullable == frozenset()
        assert file.row_groups[0].nbytes > 16


class TestLayout:
    @pytest.mark.parametrize("partition_size", [1, 200, 1000, "128MiB"])
    def test_reads_all_rows_whatever_the_partition_size(
        self, layout: tuple[Path, pd.DataFrame], partition_size: int | str
    ) -> None:
        path, expected = layout
        ddf = read_clusters(path, partition_size=partition_size)
        assert list(ddf.columns) == ["id", "embeddings", "cosine_dist_to_cent", "text", "centroid"]
        assert_same(ddf, expected)
        assert clusters_are_whole(ddf)
        assert ddf.centroid.compute().is_monotonic_increasing

    def test_partition_sizes(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, _ = layout
        assert read_clusters(path, partition_size=1).npartitions == 5
        assert read_clusters(path).npartitions == 1
        # 28 bytes a row: an id, four floats and a distance
        ddf = read_clusters(path, columns=["id", "embeddings", "cosine_dist_to_cent"], partition_size=9 * 28)
        assert [len(frame) for frame in partition_frames(ddf)] == [9, 9, 9, 3]

    def test_dtypes(self, layout: tuple[Path, pd.DataFrame]) -> None:
        ddf = read_clusters(layout[0])
        assert ddf.dtypes.to_dict() == {
            "id": np.dtype("int64"),
            "embeddings": pd.ArrowDtype(pa.list_(pa.float32())),
            "cosine_dist_to_cent": np.dtype("float32"),
            "text": pd.StringDtype("pyarrow"),
            "centroid": np.dtype("int64"),
        }

    def test_strings_follow_the_configuration(self, layout: tuple[Path, pd.DataFrame]) -> None:
        with dask.config.set({"dataframe.convert-string": False}):
            ddf = read_clusters(layout[0])
        assert ddf.dtypes["text"] == pq.read_table(layout[0] / "centroid=0/part.0.parquet").to_pandas().dtypes["text"]
        assert_same(ddf, layout[1])

    def test_clusters_that_are_not_integers_are_strings(self, tmp_path: Path) -> None:
        expected = write_random_layout(tmp_path, {"b%20c": [2], "01": [1], "a": [1]})
        ddf = read_clusters(tmp_path, partition_size=1)
        assert ddf.dtypes["centroid"] == pd.StringDtype("pyarrow")
        assert_same(ddf, expected.replace({"centroid": {"b%20c": "b c"}}))
        assert clusters_are_whole(ddf)

    def test_the_folder_overrules_a_column_of_the_same_name(self, tmp_path: Path) -> None:
        expected = write_random_layout(tmp_path, {3: [2]})
        path = tmp_path / "centroid=3/part.0.parquet"
        pq.write_table(pq.read_table(path, partitioning=None).append_column("centroid", [[8, 9]]), path)
        assert_same(read_clusters(tmp_path), expected)

    def test_types_that_numpy_cannot_hold(self, tmp_path: Path) -> None:
        folder = tmp_path / "centroid=0"
        folder.mkdir()
        tables = [
            pa.table(
                {
                    "id": pa.array([0, 1]),
                    "n": pa.array([2**60 + 1, None]),
                    "ok": pa.array([True, None]),
                    "kind": pa.array(["x", "y"]).dictionary_encode(),
                    "when": pa.array([0, None], pa.timestamp("us")),
                    "fixed": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
                    "halves": pa.array([[1.0], [2.0]], pa.large_list(pa.float16())),
                }
            ),
            pa.table(
                {
                    "id": pa.array([2]),
                    "n": pa.array([5]),
                    "ok": pa.array([False]),
                    "kind": pa.array(["z"]),
                    "when": pa.array([1], pa.timestamp("us")),
                    "fixed": pa.array([[5.0, 6.0]], pa.list_(pa.float32(), 2)),
                    "halves": pa.array([[3.0]], pa.list_(pa.float16())),
                }
            ),
        ]
        for part, table in enumerate(tables):
            pq.write_table(table, folder / f"{part}.parquet")
        ddf = read_clusters(tmp_path)
        frame = ddf.compute()
        assert frame.dtypes.to_dict() == ddf.dtypes.to_dict()
        assert frame.dtypes["n"] == pd.ArrowDtype(pa.int64())
        assert frame.dtypes["when"] == np.dtype("datetime64[us]")
        assert frame["n"].to_list()[::2] == [2**60 + 1, 5]
        assert frame["kind"].to_list() == ["x", "y", "z"]
        assert frame["halves"].to_list() == [[1.0], [2.0], [3.0]]

    def test_index_columns_of_pandas_are_left_out(self, tmp_path: Path) -> None:
        (tmp_path / "centroid=0").mkdir()
        pd.DataFrame({"id": [1, 2]}, index=[5, 7]).to_parquet(tmp_path / "centroid=0/a.parquet")
        assert list(read_clusters(tmp_path).columns) == ["id", "centroid"]

    def test_the_innermost_folder_names_the_cluster(self, tmp_path: Path) -> None:
        expected = write_random_layout(tmp_path / "centroid=9", {3: [2], 4: [1]})
        assert_same(read_clusters(tmp_path), expected)
        odd = tmp_path / "centroid=9/centroid=4/centroid=5.parquet"
        (tmp_path / "centroid=9/centroid=4/part.0.parquet").rename(odd)
        assert_same(read_clusters(tmp_path), expected)
        folder = tmp_path / "centroid=9/centroid=3"
        folder.rename(folder.with_name("of centroid=3"))
        assert set(read_clusters(tmp_path).centroid.compute()) == {9, 4}

    def test_hidden_and_foreign_files_are_left_out(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, expected = layout
        for name in ("_metadata", ".hidden.parquet", "cluster_1.parquet.0a.tmp", "README"):
            (path / "centroid=1" / name).write_bytes(b"no Parquet")
        assert_same(read_clusters(path), expected)

    def test_files_without_rows(self, tmp_path: Path) -> None:
        expected = write_random_layout(tmp_path, {0: [0], 1: [2, 0]})
        ddf = read_clusters(tmp_path, partition_size=1)
        assert_same(ddf, expected)
        assert len(ddf) == 2

    def test_column_selection_and_order(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, expected = layout
        ddf = read_clusters(path, columns=["centroid", "id"])
        assert list(ddf.compute().columns) == ["centroid", "id"]
        assert_same(ddf, expected)
        without = read_clusters(path, columns=["id"])
        assert list(without.columns) == ["id"]
        assert without.expr.unique_partition_mapping_columns_from_shuffle == set()
        assert read_clusters(path, columns=["centroid"]).compute().centroid.to_list() == expected.centroid.to_list()

    def test_paths(self, layout: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch) -> None:
        path, expected = layout
        assert_same(read_clusters(f"file://{path}"), expected)
        assert_same(read_clusters(f"{path}/centroid=*"), expected)
        assert_same(read_clusters(sorted(map(str, path.glob("*/*.parquet")))), expected)
        assert_same(read_clusters(path / "centroid=2"), expected[expected.centroid == 2])
        monkeypatch.chdir(path.parent)
        assert_same(read_clusters("in"), expected)

    def test_memory_filesystem(self) -> None:
        expected = write_random_layout("memory://clusters/in", {4: [70_000, 2], 11: [3]})
        ddf = read_clusters("memory://clusters/in", partition_size=1)
        assert ddf.npartitions == 2
        assert_same(ddf[["id", "embeddings", "centroid"]], expected)
        fsspec.filesystem("memory").rm("/clusters", recursive=True)

    def test_a_footer_longer_than_the_first_guess(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(footers, "FOOTER_GUESS", 16)
        expected = write_random_layout("memory://guess/in", {4: [3]})
        assert_same(read_clusters("memory://guess/in"), expected)
        fsspec.filesystem("memory").rm("/guess", recursive=True)

    def test_file_names_do_not_order_results_by_time_of_listing(self, tmp_path: Path) -> None:
        write_random_layout(tmp_path / "a", {0: [2, 3], 1: [1]})
        write_random_layout(tmp_path / "b", {0: [2, 3], 1: [1]})
        (tmp_path / "b/centroid=0/part.0.parquet").rename(tmp_path / "b/centroid=0/x.parquet")
        (tmp_path / "b/centroid=0/part.1.parquet").rename(tmp_path / "b/centroid=0/a.parquet")
        first, second = read_clusters(tmp_path / "a").compute(), read_clusters(tmp_path / "b").compute()
        assert first.id.to_list() == [0, 1, 2, 3, 4, 5]
        assert second.id.to_list() == [2, 3, 4, 0, 1, 5]


class TestExpression:
    def test_nothing_is_read_before_compute(self, layout: tuple[Path, pd.DataFrame], no_reading: None) -> None:
        ddf = read_clusters(layout[0])
        assert len(ddf) == 30
        assert len(ddf[ddf.columns[:1]]) == 30
        assert ddf.optimize().npartitions == 1
        with pytest.raises(AssertionError, match="data was read"):
            ddf.compute()

    def test_columns_from_folders_need_no_file(self, layout: tuple[Path, pd.DataFrame], no_reading: None) -> None:
        assert read_clusters(layout[0]).centroid.value_counts().compute().to_dict() == {7: 9, 2: 9, 1: 8, 10: 3, 0: 1}

    def test_files_are_listed_once_and_footers_read_once(
        self, layout: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetch, calls = footers.fetch_footer, []

        def counted(fs, path, size):
            calls.append(path)
            return fetch(fs, path, size)

        monkeypatch.setattr(footers, "fetch_footer", counted)
        ddf = read_clusters(layout[0], partition_size=1)
        assert len(set(calls)) == len(calls) == 8
        ddf[ddf.id > 3][["id"]].optimize().__dask_graph__()
        assert len(calls) == 8

    def test_projection_reaches_the_reader(self, layout: tuple[Path, pd.DataFrame]) -> None:
        ddf = read_clusters(layout[0])
        query = ddf[ddf.cosine_dist_to_cent > 0.5]["id"]
        (reader,) = query.optimize(fuse=False).expr.find_operations(ReadClusters)
        assert reader.columns == ["id", "cosine_dist_to_cent"]
        expected = layout[1]
        assert_eq(query, expected[expected.cosine_dist_to_cent > 0.5]["id"], check_index=False)

    def test_partitions_are_selected_in_the_reader(self, layout: tuple[Path, pd.DataFrame]) -> None:
        ddf = read_clusters(layout[0], partition_size=1)
        query = ddf.partitions[1:4].partitions[[0, 2]][["centroid"]]
        (reader,) = query.optimize(fuse=False).expr.find_operations(ReadClusters)
        assert list(reader._partitions) == [1, 3]
        assert query.compute().centroid.unique().tolist() == [1, 7]
        assert len(query) == 17

    def test_token_is_deterministic_and_follows_the_files(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, _ = layout
        first = read_clusters(path)
        assert read_clusters(path)._name == first._name
        assert read_clusters(path, partition_size=1)._name != first._name
        assert read_clusters(path, columns=["id"])._name != first._name
        os.utime(path / "centroid=7/part.1.parquet", ns=(1, 1))
        assert read_clusters(path)._name != first._name

    def test_graph_of_many_clusters_has_a_task_for_each(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_random_layout(tmp_path, {0: [2]})
        one = read_clusters(tmp_path).expr
        fragment = one.source.partitions[0][0]
        source = one.source.__class__(
            one.source.reader, tuple((fragment,) for _ in range(50_000)), "centroid", True, "fifty thousand"
        )
        graph = ReadClusters(source, ["id", "embeddings", "centroid"]).optimize().__dask_graph__()
        assert len(graph) == 50_000

    def test_survives_pickling(self, layout: tuple[Path, pd.DataFrame]) -> None:
        from distributed.protocol import deserialize, serialize

        ddf = read_clusters(layout[0])
        copy = deserialize(*serialize(ddf, serializers=["pickle"]))
        assert copy._name == ddf._name
        assert_same(copy, layout[1])


class TestPlainParquet:
    frame = pd.DataFrame({"id": range(24), "label": np.repeat([0, 1, 2, 3, 4, 5, 6, 7], 3), "x": 1.0})

    def write(self, folder: Path, *slices: slice, **kwargs: object) -> Path:
        folder.mkdir()
        for part, rows in enumerate(slices):
            self.frame[rows].to_parquet(folder / f"{part}.parquet", index=False, **kwargs)
        return folder

    @pytest.mark.parametrize("partition_size", [1, 200, "1MiB"])
    def test_bounds_prove_alignment(self, tmp_path: Path, partition_size: int | str) -> None:
        path = self.write(tmp_path / "in", slice(12, 24), slice(0, 9), slice(9, 12))
        ddf = read_clusters(path, cluster_field="label", partition_size=partition_size)
        assert ddf.npartitions == {1: 3, 200: 2 + 1, "1MiB": 1}[partition_size]
        assert ddf.expr.unique_partition_mapping_columns_from_shuffle == {("label",)}
        assert not shuffles(ddf)
        assert ddf.label.compute().is_monotonic_increasing
        assert_same(ddf, self.frame)

    def test_row_groups_of_whole_clusters_are_partitions(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "in", slice(0, 24), row_group_size=6)
        ddf = read_clusters(path / "0.parquet", cluster_field="label", partition_size=1)
        assert not shuffles(ddf)
        assert ddf.npartitions == 4
        assert clusters_are_whole(ddf, "label")
        assert_same(ddf, self.frame)

    def test_a_large_cluster_is_not_shuffled_by_itself(self, tmp_path: Path) -> None:
        frame = self.frame.assign(label=[0] * 20 + [1] * 4)
        frame.to_parquet(tmp_path / "a.parquet", row_group_size=5)
        assert not shuffles(read_clusters(tmp_path / "a.parquet", cluster_field="label", partition_size=1))

    def test_a_cluster_in_two_files_means_a_shuffle(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "in", slice(0, 10), slice(10, 24))
        ddf = read_clusters(path, cluster_field="label", partition_size=1)
        assert shuffles(ddf)
        assert is_aligned(ddf, "label")
        assert clusters_are_whole(ddf, "label")
        assert ddf.compute().sort_values("id").id.to_list() == list(range(24))

    def test_one_large_unsorted_file_is_shuffled(self, tmp_path: Path) -> None:
        self.frame.sample(frac=1, random_state=0).to_parquet(tmp_path / "a.parquet", row_group_size=4)
        assert shuffles(read_clusters(tmp_path / "a.parquet", cluster_field="label", partition_size=100))
        assert not shuffles(read_clusters(tmp_path / "a.parquet", cluster_field="label"))

    def test_no_statistics_mean_a_shuffle(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "in", slice(0, 12), slice(12, 24), write_statistics=False)
        ddf = read_clusters(path, cluster_field="label", partition_size=1)
        assert shuffles(ddf)
        assert ddf.dtypes["id"] == pd.ArrowDtype(pa.int64())
        assert_eq(ddf.id.sum(), self.frame.id.sum())

    def test_projection_reaches_the_reader_through_the_shuffle(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "in", slice(0, 10), slice(10, 24))
        ddf = read_clusters(path, cluster_field="label", partition_size=1, columns=["x", "id"])
        assert list(ddf.columns) == ["x", "id"]
        (reader,) = ddf[["id"]].optimize(fuse=False).expr.find_operations(ReadClusters)
        assert reader.columns == ["id", "label"]
        assert sorted(ddf.compute().id) == list(range(24))

    def test_columns_after_one_of_an_extension_type(self, tmp_path: Path) -> None:
        """An interval is two columns of a file, which are to be counted as such."""
        (tmp_path / "in").mkdir()
        for part in range(4):
            rows = self.frame.iloc[part::4]
            spans = pd.arrays.IntervalArray.from_breaks(range(len(rows) + 1))
            rows.assign(span=spans)[["id", "span", "label", "x"]].to_parquet(tmp_path / "in" / f"{part}.parquet")
        ddf = read_clusters(tmp_path / "in", cluster_field="label", columns=["id", "label"], partition_size=1)
        assert clusters_are_whole(ddf, "label")
        assert sorted(ddf.compute().id) == sorted(self.frame.id)

    def test_clusters_of_half_precision(self, tmp_path: Path) -> None:
        """Their bounds are bytes, whose order is not that of the numbers."""
        (tmp_path / "in").mkdir()
        for part in range(2):
            table = pa.table({"id": [2 * part, 2 * part + 1], "label": pa.array(np.array([-1, 2], np.float16))})
            pq.write_table(table, tmp_path / "in" / f"{part}.parquet")
        ddf = read_clusters(tmp_path / "in", cluster_field="label", partition_size=1)
        assert sorted(ddf.compute().id) == [0, 1, 2, 3]
        assert clusters_are_whole(ddf, "label")

    def test_string_clusters(self, tmp_path: Path) -> None:
        frame = self.frame.assign(label=self.frame.label.map(str))
        frame.to_parquet(tmp_path / "a.parquet", row_group_size=3)
        ddf = read_clusters(tmp_path / "a.parquet", cluster_field="label", partition_size=1)
        assert ddf.npartitions == 8
        assert_same(ddf, frame)


class TestBadInput:
    def test_no_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataNotFoundError, match=f"No Parquet files found at {tmp_path}"):
            read_clusters(tmp_path)
        with pytest.raises(DataNotFoundError, match=r"No Parquet files found at .*nowhere"):
            read_clusters(tmp_path / "nowhere")
        with pytest.raises(DataNotFoundError, match="list of paths is empty"):
            read_clusters([])

    def test_a_truncated_file_is_named(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path = layout[0] / "centroid=7/part.1.parquet"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(DataReadError, match=r"Cannot read .*centroid=7/part.1.parquet as Parquet \(truncated"):
            read_clusters(layout[0])

    def test_damage_behind_the_footer_is_found_when_read(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path = layout[0] / "centroid=7/part.1.parquet"
        content = bytearray(path.read_bytes())
        content[4:60] = bytes(56)
        path.write_bytes(content)
        ddf = read_clusters(layout[0])
        with pytest.raises(DataReadError, match=r"Cannot read .*centroid=7/part.1.parquet as Parquet"):
            ddf.compute()

    def test_files_that_changed_since_are_named_on_a_gpu(self) -> None:
        planned = [fragments.Fragment("a", 3), fragments.Fragment("b", 2), fragments.Fragment("c", 1)]
        cudf_reader._check_rows(planned, [3, 2, 1])
        with pytest.raises(DataReadError, match=r"^b, c changed since the footers were read"):
            cudf_reader._check_rows(planned, [3, 1, 2])

    def test_a_file_gone_since_is_named(self, layout: tuple[Path, pd.DataFrame]) -> None:
        ddf = read_clusters(layout[0])
        (layout[0] / "centroid=0/part.0.parquet").unlink()
        with pytest.raises(DataReadError, match=r"Cannot read .*centroid=0/part.0.parquet"):
            ddf.compute()

    def test_types_that_disagree(self, tmp_path: Path) -> None:
        (tmp_path / "centroid=0").mkdir()
        pq.write_table(pa.table({"id": [1], "x": [1.0]}), tmp_path / "centroid=0/a.parquet")
        pq.write_table(pa.table({"id": ["a"], "x": [1.0]}), tmp_path / "centroid=0/b.parquet")
        message = r"Column 'id' is string in .*b.parquet but int64 in .*a.parquet"
        with pytest.raises(DataReadError, match=message):
            read_clusters(tmp_path, columns=["id"])
        ddf = read_clusters(tmp_path)
        assert ddf.x.compute().to_list() == [1.0, 1.0]
        with pytest.raises(DataReadError, match=message):
            ddf.id.compute()

    def test_only_the_wanted_columns_need_agree(self, tmp_path: Path) -> None:
        (tmp_path / "centroid=0").mkdir()
        pq.write_table(pa.table({"id": [1], "x": [1.0]}), tmp_path / "centroid=0/a.parquet")
        pq.write_table(pa.table({"y": [1], "id": [2]}), tmp_path / "centroid=0/b.parquet")
        assert read_clusters(tmp_path, columns=["id"]).compute().id.to_list() == [1, 2]

    def test_missing_columns(self, layout: tuple[Path, pd.DataFrame]) -> None:
        with pytest.raises(MissingColumnsError, match=r"\['url'\] not found.*'text', 'centroid'\]"):
            read_clusters(layout[0], columns=["id", "url"])

    def test_null_cluster_in_the_layout(self, layout: tuple[Path, pd.DataFrame]) -> None:
        (layout[0] / "centroid=7").rename(layout[0] / "centroid=__HIVE_DEFAULT_PARTITION__")
        with pytest.raises(ClusterError, match=r"3 files have a null cluster in 'centroid': .*part.0.parquet"):
            read_clusters(layout[0])

    def test_null_cluster_in_a_column(self, tmp_path: Path) -> None:
        pd.DataFrame({"id": [1, 2, 3], "centroid": [0, None, None]}).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(ClusterError, match=r"2 rows have a null cluster in 'centroid', in .*a.parquet"):
            read_clusters(tmp_path / "a.parquet")
        pd.DataFrame({"id": [1, 2], "centroid": [0, None]}).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(ClusterError, match=r"^1 row has a null cluster"):
            read_clusters(tmp_path / "a.parquet")

    def test_files_outside_of_the_layout(self, layout: tuple[Path, pd.DataFrame]) -> None:
        (layout[0] / "centroid=0/part.0.parquet").rename(layout[0] / "extra.parquet")
        with pytest.raises(ClusterError, match=r"1 file has no folder centroid=<k>, others have: .*extra.parquet"):
            read_clusters(layout[0])

    def test_no_cluster_column(self, tmp_path: Path) -> None:
        pd.DataFrame({"id": [1]}).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(ClusterError, match=r"No cluster column 'centroid' in .*a.parquet.*\['id'\].*kmeans"):
            read_clusters(tmp_path)

    def test_arguments(self, layout: tuple[Path, pd.DataFrame]) -> None:
        with pytest.raises(InvalidArgumentError, match=r"backend must be one of \['pandas', 'cudf'\].*'polars'"):
            read_clusters(layout[0], backend="polars")
        for size in ("large", 0, "-1MB"):
            with pytest.raises(InvalidArgumentError, match="partition_size"):
                read_clusters(layout[0], partition_size=size)

    def test_more_elements_than_cudf_can_hold(
        self, layout: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dask_semdedup.lazy.clusters.CUDF_ELEMENTS", 35)
        with pytest.raises(ClusterError, match=r"centroid 2 has 9 rows with 36 elements.*35.*backend='pandas'"):
            read_clusters(layout[0], backend="cudf")


@pytest.mark.gpu
class TestCudf:
    def test_reads_the_same_as_pandas(self, layout: tuple[Path, pd.DataFrame]) -> None:
        cudf = pytest.importorskip("cudf")
        path, expected = layout
        ddf = read_clusters(path, backend="cudf", partition_size=1)
        assert isinstance(ddf._meta, cudf.DataFrame)
        frames = partition_frames(ddf)
        assert all(list(frame.dtypes) == list(ddf.dtypes) for frame in frames)
        computed = cudf.concat(frames).sort_values(["centroid", "id"]).to_arrow(preserve_index=False).to_pylist()
        assert computed == pa.Table.from_pandas(expected, preserve_index=False).select(ddf.columns).to_pylist()

    def test_row_groups(self, tmp_path: Path) -> None:
        pytest.importorskip("cudf")
        TestPlainParquet.frame.to_parquet(tmp_path / "a.parquet", row_group_size=3)
        ddf = read_clusters(tmp_path / "a.parquet", cluster_field="label", backend="cudf", partition_size=1)
        assert ddf.npartitions == 8
        assert ddf.compute().id.to_arrow().to_pylist() == list(range(24))
