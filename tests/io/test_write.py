"""Files of scores, a cluster each, as the stages write them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dask_semdedup.io.write import write_cluster, write_clusters
from tests.strategies import STR


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
