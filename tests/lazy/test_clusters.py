"""Planning, reading, aligning and writing clusters."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
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
from dask.dataframe.dask_expr._shuffle import ShuffleBase
from dask.dataframe.utils import assert_eq
from dask.tokenize import tokenize
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup import ClusterError, InvalidArgumentError, MissingColumnsError, MissingDependencyError, read_clusters
from dask_semdedup.errors import DataNotFoundError, DataReadError
from dask_semdedup.io import cudf_reader, footers, fragments, listing, reader, scan
from dask_semdedup.io.layout import cluster_files
from dask_semdedup.io.write import write_cluster, write_clusters
from dask_semdedup.lazy import planning
from dask_semdedup.lazy.alignment import align, is_aligned
from dask_semdedup.lazy.expressions import ReadClusters
from dask_semdedup.lazy.planning import plan
from tests.data import write_random_layout
from tests.strategies import STR


def partition_frames(ddf: dd.DataFrame) -> list[pd.DataFrame]:
    return list(dask.compute(*ddf.to_delayed(), scheduler="synchronous"))


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


def shuffles(ddf: dd.DataFrame) -> list[object]:
    return list(ddf.optimize(fuse=False).expr.find_operations(ShuffleBase))


def with_columns(ddf: dd.DataFrame, names: list[str]) -> dd.DataFrame:
    ddf = ddf.copy()
    ddf.columns = names
    return ddf


def clusters_are_whole(ddf: dd.DataFrame, cluster_field: str = "centroid") -> bool:
    seen: set[object] = set()
    for frame in partition_frames(ddf[[cluster_field]]):
        clusters = set(frame[cluster_field].unique())
        if seen & clusters:
            return False
        seen |= clusters
    return True


@pytest.fixture
def layout(tmp_path: Path) -> tuple[Path, pd.DataFrame]:
    frame = write_random_layout(tmp_path / "in", {10: [3], 2: [4, 5], 0: [1], 7: [2, 1, 6], 1: [8]})
    return tmp_path / "in", frame


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(reader, "read_fragment", fail)


class TestPlan:
    sizes = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 200)), max_size=60)

    @given(sizes, st.integers(1, 200_000))
    def test_every_cluster_once_within_the_limit(self, rows_widths: list[tuple[int, int]], limit: int) -> None:
        clusters = [(key, rows, rows * width) for key, (rows, width) in enumerate(rows_widths)]
        nbytes = {key: size for key, _, size in clusters}
        partitions = plan(clusters[::-1], limit)
        assert [key for keys in sorted(partitions) for key in keys] == list(range(len(clusters)))
        assert all(keys == sorted(keys) for keys in partitions)
        assert all(len(keys) == 1 or sum(nbytes[key] for key in keys) <= limit for keys in partitions)

    @given(sizes.filter(bool), st.integers(1, 200_000))
    def test_the_dearest_come_first_and_the_others_in_order(
        self, rows_widths: list[tuple[int, int]], limit: int
    ) -> None:
        clusters = [(key, rows, rows * width) for key, (rows, width) in enumerate(rows_widths)]
        cost = {key: nbytes * (rows + 1024) for key, rows, nbytes in clusters}
        partitions = plan(clusters, limit)
        costs = [sum(cost[key] for key in keys) for keys in partitions]
        n_dear = sum(value > 2 * np.median(costs) for value in costs)
        assert costs[:n_dear] == sorted(costs, reverse=True)[:n_dear]
        assert partitions[n_dear:] == sorted(partitions[n_dear:])

    @given(sizes.filter(bool), st.integers(1, 200_000))
    def test_no_more_partitions_than_filling_them_one_by_one(
        self, rows_widths: list[tuple[int, int]], limit: int
    ) -> None:
        clusters = [(key, rows, rows * width) for key, (rows, width) in enumerate(rows_widths)]
        filled, room = 0, -1
        for _, _, nbytes in clusters:
            if nbytes > room:
                filled, room = filled + 1, limit
            room -= nbytes
        assert len(plan(clusters, limit)) <= filled

    def test_costs_are_about_equal(self) -> None:
        rows = np.random.default_rng(0).integers(100, 4000, 2000)
        clusters = [(key, int(n), int(n) * 1536) for key, n in enumerate(rows)]
        partitions = plan(clusters, 2**27)
        costs = [sum(int(rows[key]) ** 2 for key in keys) for keys in partitions]
        assert len(partitions) == np.ceil(rows.sum() * 1536 / 2**27)
        assert max(costs) < 1.2 * np.mean(costs)

    def test_one_large_cluster_is_alone_and_small_ones_share(self) -> None:
        clusters = [(key, 10, 1000) for key in range(10)]
        clusters[4] = (4, 5000, 500_000)
        assert plan(clusters, 6000) == [[4], [0, 1, 2, 3], [5, 6, 7, 8, 9]]

    @pytest.mark.parametrize("many", [5, 12, 23])
    def test_dask_begins_with_giants(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int) -> None:
        write_random_layout(tmp_path, {cluster: [2] for cluster in range(many)} | {1: [3000], 2: [2000]})
        ddf = read_clusters(tmp_path, columns=["id", "embeddings", "cosine_dist_to_cent", "centroid"], partition_size=1)
        read, begun = reader.read_fragment, []

        def noted(fs: object, fragment: fragments.Fragment, schema: pa.Schema, *orders: object) -> pa.Table:
            begun.append(fragment.keys[0])
            return read(fs, fragment, schema, *orders)

        monkeypatch.setattr(reader, "read_fragment", noted)
        scores = ddf.semdedup.pairwise()
        for query in (ddf, scores, scores.semdedup.duplicates(eps=0.1), scores.cosine_sim_score.max()):
            begun.clear()
            query.compute(scheduler="synchronous")
            assert begun[:2] == [1, 2]
            assert sorted(begun) == list(range(many))

    def test_clusters_of_one_size_stand_in_their_order(self) -> None:
        assert plan([(key, 10, 1000) for key in range(100)], 1000) == [[key] for key in range(100)]

    def test_of_nothing_is_one_empty_partition(self) -> None:
        assert plan([], 1) == [[]]

    def test_fifty_thousand_clusters_take_a_moment(self) -> None:
        rows = np.random.default_rng(0).integers(1, 4000, 50_000).tolist()
        start = time.perf_counter()
        partitions = plan([(key, n, n * 1536) for key, n in enumerate(rows)], 2**27)
        assert time.perf_counter() - start < 2
        assert sum(map(len, partitions)) == 50_000


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "nbytes", "gpus", "expected"),
        [
            (2**31, 2**40, 8, 2**31),
            (2**31, 2**33, 1, 2**31),
            (2**31, 2**33, 4, 2**30),
            (2**31, 2**20, 1, 2**27),
            (2**20, 2**20, 1, 2**20),
            (2**40, 2**50, 1, 2**32 - 2),
        ],
        ids=["much", "one GPU", "four GPUs", "little", "as told", "more than cuDF holds"],
    )
    def test_there_are_two_partitions_a_gpu(self, monkeypatch, size, nbytes, gpus, expected) -> None:
        monkeypatch.setattr(planning, "visible_gpus", lambda: gpus)
        assert planning.fitting_size(size, "cudf", nbytes) == expected

    @pytest.mark.parametrize(
        ("gigabytes", "partitions", "expected"),
        [
            (141, 16, 2**31),
            (80, 16, 80 * 2**30 // 48),
            (80, 10, 2**31),
            (80, 64, 80 * 2**30 // 192),
            (24, 10, 24 * 2**30 // 30),
            (1, 10, 2**27),
        ],
    )
    def test_partitions_fit_into_a_gpu(self, monkeypatch, gigabytes, partitions, expected) -> None:
        client = object()
        monkeypatch.setattr(planning, "device_bytes", lambda: gigabytes * 2**30)
        monkeypatch.setattr(planning, "partitions_per_gpu", lambda asked: partitions if asked is client else None)
        assert planning.default_size("cudf", client) == expected


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


class TestAlignment:
    def test_layout_is_aligned_as_long_as_the_cluster_column_is_there(self, layout: tuple[Path, pd.DataFrame]) -> None:
        ddf = read_clusters(layout[0], partition_size=1)
        assert ddf.expr.unique_partition_mapping_columns_from_shuffle == {("centroid",)}
        assert is_aligned(ddf, "centroid")
        assert align(ddf, "centroid") is ddf
        assert is_aligned(ddf[["id", "centroid"]][ddf.id > 2], "centroid")
        assert not is_aligned(ddf[["id"]], "centroid")
        assert not is_aligned(ddf.assign(centroid=ddf.id), "centroid")

    def test_groupby_by_cluster_needs_no_shuffle(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, expected = layout
        query = read_clusters(path, partition_size=1).groupby("centroid").id.apply(list, meta=("id", object))
        assert not shuffles(query)
        assert query.compute().sort_index().to_dict() == expected.groupby("centroid").id.apply(list).to_dict()

    @pytest.mark.parametrize("how", ["inner", "left", "outer"])
    @pytest.mark.parametrize("npartitions", [2, 4, 5])
    def test_merge_by_cluster_is_right(self, layout: tuple[Path, pd.DataFrame], how: str, npartitions: int) -> None:
        """A merge takes frames with the same claim to be partitioned alike, which clusters in order are not."""
        path, expected = layout
        names = pd.DataFrame({"centroid": [0, 1, 2, 7, 10], "name": list("abcde")})
        left = read_clusters(path, columns=["id", "centroid"], partition_size=1)
        left = left[left.id >= 0].rename(columns={"id": "document"})
        right = dd.from_pandas(names, npartitions=npartitions).shuffle("centroid")
        merged = left.merge(right, on="centroid", how=how, broadcast=False)
        again = merged.compute().sort_values("document", ignore_index=True)
        wanted = expected[["id", "centroid"]].rename(columns={"id": "document"}).merge(names, on="centroid", how=how)
        assert again.name.to_list() == wanted.sort_values("document").name.to_list()

    @pytest.mark.skipif(find_spec("cudf") is not None, reason="cuDF is there")
    def test_cudf_is_asked_for_where_it_is_not(self, layout: tuple[Path, pd.DataFrame]) -> None:
        with pytest.raises(MissingDependencyError, match=r"No module named 'cudf'.*dask-semdedup\[cu13\]"):
            read_clusters(layout[0], backend="cudf")

    def test_unaligned_frames_are_shuffled(self, layout: tuple[Path, pd.DataFrame]) -> None:
        _, expected = layout
        ddf = dd.from_pandas(expected.sort_values("id", ignore_index=True), npartitions=4)
        assert not is_aligned(ddf, "centroid")
        aligned = align(ddf, "centroid")
        assert is_aligned(aligned, "centroid")
        assert align(aligned, "centroid") is aligned
        assert shuffles(aligned)
        assert clusters_are_whole(aligned)

    def test_one_partition_is_aligned(self) -> None:
        ddf = dd.from_pandas(pd.DataFrame({"centroid": [1, 2]}), npartitions=1)
        assert align(ddf, "centroid") is ddf

    def test_a_shuffle_by_more_columns_is_not_enough(self) -> None:
        ddf = dd.from_pandas(pd.DataFrame({"centroid": range(8), "lang": 1}), npartitions=2)
        assert not is_aligned(ddf.shuffle(["centroid", "lang"]), "centroid")
        assert is_aligned(ddf.shuffle("centroid"), "centroid")

    def test_what_had_empty_divisions_is_shuffled(self) -> None:
        """Dask merges partitions of a sorted frame as it lowers it, of which a shuffle above must not know yet."""
        frame = pd.DataFrame({"id": range(400), "lang": ["a", "b", "c", "d"] * 100, "centroid": np.arange(400) % 20})
        ddf = dd.from_pandas(frame, npartitions=7).set_index("lang").reset_index()
        aligned = align(ddf, "centroid")
        assert sorted(aligned.compute()["id"]) == list(range(400))
        assert clusters_are_whole(aligned)

    def test_broadcast_merges_are_not_believed(self) -> None:
        left = dd.from_pandas(pd.DataFrame({"centroid": np.arange(80) % 5, "id": range(80)}), npartitions=40)
        right = dd.from_pandas(pd.DataFrame({"centroid": range(5), "name": list("abcde")}), npartitions=2)
        merged = left.merge(right, on="centroid", broadcast=True)
        assert ("centroid",) in merged.expr.unique_partition_mapping_columns_from_shuffle or (
            "centroid" in merged.expr.unique_partition_mapping_columns_from_shuffle
        )
        assert not is_aligned(merged, "centroid")
        single = left.merge(right.shuffle("centroid").repartition(npartitions=1), on="centroid")
        assert not is_aligned(single, "centroid")

    @pytest.mark.parametrize(
        "change",
        [
            lambda ddf: ddf.assign(centroid=ddf.coarse),
            lambda ddf: ddf.rename(columns={"centroid": "fine", "coarse": "centroid"}),
            lambda ddf: ddf.drop(columns="centroid").rename(columns={"coarse": "centroid"}),
            lambda ddf: with_columns(ddf, ["fine", "id", "centroid"]),
        ],
        ids=["assigned", "renamed", "dropped and renamed", "columns set"],
    )
    @pytest.mark.parametrize("on", ["centroid", ["centroid"], None], ids=["merged", "merged on a list", "shuffled"])
    def test_another_column_under_the_name_is_aligned_anew(
        self, change: Callable[[dd.DataFrame], dd.DataFrame], on: str | list[str] | None
    ) -> None:
        ddf = dd.from_pandas(pd.DataFrame({"centroid": np.arange(80) % 12, "id": range(80)}), npartitions=4)
        coarse = dd.from_pandas(pd.DataFrame({"centroid": range(12), "coarse": np.arange(12) % 3}), npartitions=3)
        ddf = ddf.shuffle("centroid").assign(coarse=ddf.centroid % 3) if on is None else ddf.merge(coarse, on=on)
        assert clusters_are_whole(align(change(ddf), "centroid"))

    def test_the_column_of_the_other_side_is_not_what_was_merged_on(self) -> None:
        left = dd.from_pandas(pd.DataFrame({"centroid": np.arange(80) % 12, "id": range(80)}), npartitions=4)
        right = dd.from_pandas(pd.DataFrame({"fine": range(12), "centroid": np.arange(12) % 3}), npartitions=3)
        merged = left.merge(right, left_on=["centroid"], right_on=["fine"], suffixes=("_old", ""))
        assert not is_aligned(merged, "centroid")
        assert clusters_are_whole(align(merged, "centroid"))

    @pytest.mark.parametrize("on", ["centroid", ["centroid"]], ids=str)
    def test_what_was_merged_on_clusters_is_not_shuffled_again(self, on: str | list[str]) -> None:
        left = dd.from_pandas(pd.DataFrame({"centroid": np.arange(80) % 12, "id": range(80)}), npartitions=4)
        right = dd.from_pandas(pd.DataFrame({"centroid": range(12), "name": list("abcdefghijkl")}), npartitions=3)
        merged = left.merge(right, on=on, broadcast=False)
        few = merged[merged["id"] > 3][["id", "centroid"]]
        assert align(few, "centroid") is few
        assert clusters_are_whole(few)
        # Nor is what was shuffled after a merge on something else.
        shuffled = align(left.merge(right.rename(columns={"centroid": "id"}), on="id", broadcast=False), "centroid")
        assert align(shuffled, "centroid") is shuffled

    def test_no_cluster_column(self) -> None:
        ddf = dd.from_pandas(pd.DataFrame({"id": [1]}), npartitions=1)
        with pytest.raises(ClusterError, match=r"No cluster column 'centroid' in the frame.*\['id'\].*k-means"):
            align(ddf, "centroid")


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


class TestNames:
    def test_folders_that_are_hidden_hold_no_data(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, frame = layout
        for folder in ("_temporary/0", ".snap", ".ipynb_checkpoints"):
            shutil.copytree(path / "centroid=10", path / folder / "centroid=10")
        assert len(read_clusters(path)) == len(frame)

    @pytest.mark.parametrize("pattern", ["**/*.parquet", "*", "*/*", "centroid=*"])
    def test_patterns_do_not_match_what_is_hidden(self, layout: tuple[Path, pd.DataFrame], pattern: str) -> None:
        path, frame = layout
        shutil.copytree(path / "centroid=10", path / "_temporary" / "0" / "centroid=10")
        (path / "_SUCCESS").touch()
        (path / "centroid=10" / ".part.0.parquet.crc").touch()
        assert len(read_clusters(path / pattern)) == len(frame)

    def test_patterns_match_links(self, layout: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
        path, frame = layout
        (tmp_path / "links").mkdir()
        for folder in path.iterdir():
            (tmp_path / "links" / folder.name).symlink_to(folder)
        (tmp_path / "links" / "centroid=99").symlink_to(tmp_path / "nowhere")
        assert len(read_clusters(tmp_path / "links" / "centroid=*")) == len(frame)

    def test_a_pattern_finds_the_files_that_a_folder_holds(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, _ = layout
        assert listing.list_files(path / "*" / "*.parquet")[1] == listing.list_files(path)[1]

    def test_each_path_of_a_list_must_be_there(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, _ = layout
        with pytest.raises(DataNotFoundError, match=r"No Parquet files found at .*centroid=l: there is no such file"):
            read_clusters([path / "centroid=0", path / "centroid=l"])

    def test_paths_of_one_file_system_may_come_from_several_objects(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, frame = layout
        options = {"skip_instance_cache": True}
        assert len(read_clusters([path / "centroid=*", path / "centroid=0"], storage_options=options)) == len(frame)

    def test_paths_are_of_one_file_system(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, _ = layout
        write_random_layout("memory://in", {3: [2]})
        with pytest.raises(InvalidArgumentError, match="memory://in is on another file system"):
            read_clusters([path, "memory://in"])
        fsspec.filesystem("memory").rm("/in", recursive=True)

    def test_digits_of_other_scripts_are_no_numbers(self, tmp_path: Path) -> None:
        write_random_layout(tmp_path / "in", {"13": [2], "1\u0663": [2]})
        assert sorted(read_clusters(tmp_path / "in").compute()["centroid"].unique()) == ["13", "1\u0663"]

    def test_names_depend_on_the_options_of_the_file_system(self) -> None:
        readers = [reader.Reader(MemoryFileSystem(skip_instance_cache=True, x=x), pa.schema([])) for x in (1, 1, 2)]
        one, same, other = map(tokenize, readers)
        assert one == same != other

    def test_a_hidden_folder_may_be_named(self, layout: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
        path, frame = layout
        path.rename(tmp_path / ".hidden")
        assert len(read_clusters(tmp_path / ".hidden")) == len(frame)

    def test_names_are_those_of_any_thread(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, _ = layout
        here = read_clusters(path)._name
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: read_clusters(path)._name).result() == here
        assert read_clusters(path, columns=["id"])._name != here


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
        with pytest.raises(ClusterError, match=r"No cluster column 'centroid' in .*a.parquet.*\['id'\].*k-means"):
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


class TestClusterFiles:
    def test_local(self, layout: tuple[Path, pd.DataFrame]) -> None:
        path, _ = layout
        files = cluster_files(path)
        assert list(files) == [0, 1, 2, 7, 10]
        assert files[7] == [f"{path}/centroid=7/part.{part}.parquet" for part in range(3)]

    def test_remote_files_are_urls(self) -> None:
        write_random_layout("memory://files/in", {4: [1]})
        assert cluster_files("memory://files/in") == {4: ["memory:///files/in/centroid=4/part.0.parquet"]}
        fsspec.filesystem("memory").rm("/files", recursive=True)

    def test_not_the_layout(self, tmp_path: Path) -> None:
        pd.DataFrame({"id": [1]}).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(ClusterError, match=r"No folders centroid=<k> in .*a.parquet"):
            cluster_files(tmp_path)


class TestWriteCluster:
    frame = pd.DataFrame({"id": [1, 2], "max_id": [1, 1]}, index=[7, 9])

    def test_local(self, tmp_path: Path) -> None:
        path = write_cluster(self.frame, tmp_path / "out", 3, compression="gzip")
        assert path == f"{tmp_path}/out/cluster_3.parquet"
        assert pq.read_table(path).to_pydict() == {"id": [1, 2], "max_id": [1, 1]}
        assert pq.read_metadata(path).row_group(0).column(0).compression == "GZIP"
        assert os.listdir(tmp_path / "out") == ["cluster_3.parquet"]

    @pytest.mark.parametrize(
        ("cluster", "name"),
        [("a/b", "cluster_a%2Fb"), ("../c", "cluster_..%2Fc"), ("x y", "cluster_x%20y"), (-1, "cluster_-1")],
    )
    def test_no_name_leaves_the_folder(self, tmp_path: Path, cluster: int | str, name: str) -> None:
        path = write_cluster(pd.DataFrame({"id": [1]}), tmp_path / "out", cluster)
        assert [str(file) for file in tmp_path.rglob("*.parquet")] == [path] == [f"{tmp_path}/out/{name}.parquet"]
        assert pd.read_parquet(path).id.to_list() == [1]

    def test_replaces_an_older_file(self, tmp_path: Path) -> None:
        write_cluster(self.frame, tmp_path, 3)
        path = write_cluster(self.frame[:1], tmp_path, 3)
        assert pq.read_table(path).num_rows == 1

    def test_remote(self) -> None:
        path = write_cluster(self.frame, "memory://written/out", "a", storage_options={"skip_instance_cache": True})
        assert path == "memory://written/out/cluster_a.parquet"
        assert pd.read_parquet(path).id.to_list() == [1, 2]
        fs = fsspec.filesystem("memory")
        assert fs.find("/written") == ["/written/out/cluster_a.parquet"]
        fs.rm("/written", recursive=True)

    @pytest.mark.parametrize("target", ["local", "memory://failing/out"])
    def test_a_failed_write_leaves_nothing_and_never_shows_a_half_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
    ) -> None:
        folder = str(tmp_path) if target == "local" else target
        fs, root = fsspec.core.url_to_fs(folder)

        def fill_disk(path: str, data: object) -> None:
            with fs.open(path, "wb") as file:
                file.write(bytes(data)[:20])
            assert [name.endswith(".tmp") for name in fs.find(root)] == [True]
            raise OSError("disk full")

        class Disk:
            def __init__(self, path: str, mode: str) -> None:
                self.path = path

            def __enter__(self) -> Disk:
                return self

            def __exit__(self, *error: object) -> None:
                pass

            def write(self, data: object) -> None:
                fill_disk(self.path, data)

        monkeypatch.setattr(pa, "OSFile", Disk)
        monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda _, path, data: fill_disk(path, data))
        with pytest.raises(OSError, match="disk full"):
            write_cluster(self.frame, folder, 3)
        assert fs.find(root) == []

    @pytest.mark.parametrize(("owner", "name"), [(os, "replace"), (MemoryFileSystem, "cp_file")])
    def test_a_failed_rename_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
    ) -> None:
        folder = str(tmp_path) if owner is os else "memory://failing/out"
        fs, root = fsspec.core.url_to_fs(folder)

        def fail(*args: object, **kwargs: object) -> None:
            raise OSError("no rename")

        monkeypatch.setattr(owner, name, fail)
        with pytest.raises(OSError, match="no rename"):
            write_cluster(self.frame, folder, 3)
        assert fs.find(root) == []


class TestWriteClusters:
    frame = pd.DataFrame({"id": ["a", "b", "c"], "max_id": ["a", "a", "a"], "score": np.float32([0, 0.5, 1])})
    rows = {3: range(2), "x/y": range(2, 3), 5: range(0)}  # noqa: RUF012

    def test_each_cluster_gets_its_rows(self, tmp_path: Path) -> None:
        paths = write_clusters(self.frame, self.rows, tmp_path / "out")
        assert list(paths) == list(self.rows)
        for cluster, path in paths.items():
            expected = self.frame.iloc[list(self.rows[cluster])].reset_index(drop=True)
            pd.testing.assert_frame_equal(pd.read_parquet(path), expected)
        assert sorted(os.listdir(tmp_path / "out")) == [
            "cluster_3.parquet",
            "cluster_5.parquet",
            "cluster_x%2Fy.parquet",
        ]

    @pytest.mark.parametrize("ids", [[1, 2], [1, None], ["a", "b"], [pd.Timestamp("2026-01-01")] * 2])
    @pytest.mark.parametrize("backed", ["by Arrow", "by pandas"])
    @pytest.mark.parametrize("options", [{}, {"compression": None}, {"row_group_size": 1}], ids=str)
    def test_files_are_those_of_pandas(self, tmp_path: Path, ids: list, backed: str, options: dict) -> None:
        table = pa.table({"id": pa.array(ids), "score": pa.array([0.5, 1], pa.float32())})
        frame = table.to_pandas(types_mapper=pd.ArrowDtype if backed == "by Arrow" else {pa.string(): STR}.get)
        paths = write_clusters(frame, {0: range(1), 1: range(1, 2), 2: range(2, 2)}, tmp_path, **options)
        for cluster, path in paths.items():
            frame.iloc[cluster : cluster + 1].to_parquet(tmp_path / "expected", index=False, **options)
            assert Path(path).read_bytes() == (tmp_path / "expected").read_bytes()

    def test_arguments_that_only_pandas_knows_reach_it(self, tmp_path: Path) -> None:
        frame = self.frame.astype({"id": STR, "max_id": STR})
        fast, slow = (
            write_clusters(frame, self.rows, tmp_path / name, compression="gzip", **options)
            for name, options in (("fast", {}), ("slow", {"engine": "pyarrow"}))
        )
        for cluster in self.rows:
            assert Path(fast[cluster]).read_bytes() == Path(slow[cluster]).read_bytes()
        with pytest.raises(ValueError, match="engine must be one of"):
            write_clusters(self.frame, self.rows, tmp_path / "none", engine="none")
        assert not list(tmp_path.glob("none/*"))

    def test_files_are_written_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        together = threading.Barrier(3, timeout=60)
        original = MemoryFileSystem.pipe_file

        def wait(self: MemoryFileSystem, *args: object) -> None:
            together.wait()
            original(self, *args)

        monkeypatch.setattr(MemoryFileSystem, "pipe_file", wait)
        paths = write_clusters(self.frame, self.rows, "memory://together/out")
        assert len(pd.read_parquet(paths[3])) == 2
        fsspec.filesystem("memory").rm("/together", recursive=True)

    def test_what_one_folder_needs_is_not_asked_for_each_file(self, calls: list[tuple[str, str]]) -> None:
        write_clusters(self.frame, self.rows, "memory://asked/out")
        fsspec.filesystem("memory").rm("/asked", recursive=True)
        before = calls[: calls.index(("rm", "/asked"))]
        assert [name for name, _ in before if name not in ("pipe_file", "cp_file", "rm_file")] == ["makedirs"]
        assert len(before) == 1 + 3 * len(self.rows)

    def test_the_first_error_is_raised_and_the_others_are_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = os.replace

        def fail(temporary: str, final: str) -> None:
            if final.endswith("cluster_x%2Fy.parquet"):
                raise OSError("quota")
            original(temporary, final)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="quota"):
            write_clusters(self.frame, self.rows, tmp_path)
        for path in tmp_path.iterdir():
            assert path.name in ("cluster_3.parquet", "cluster_5.parquet")
            pq.read_table(path)


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
