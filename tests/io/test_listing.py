"""Folders, patterns and lists of paths: which files and clusters they stand for."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pandas as pd
import pyarrow as pa
import pytest
from dask.tokenize import tokenize
from fsspec.implementations.memory import MemoryFileSystem

from dask_semdedup import ClusterError, InvalidArgumentError, read_clusters
from dask_semdedup.errors import DataNotFoundError
from dask_semdedup.io import listing, reader
from dask_semdedup.io.layout import cluster_files
from tests.data import write_random_layout


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
