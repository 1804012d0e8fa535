"""``ddf.semdedup.to_clusters``: a folder a cluster, few files, all of it or nothing, and read back as it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import dask
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_semdedup import ClusterError, InvalidArgumentError, read_clusters
from dask_semdedup.errors import OutputError, OutputExistsError
from dask_semdedup.io import layout, write
from dask_semdedup.lazy import writing
from tests.data import arrow_lists, blobs, in_partitions


@pytest.fixture
def frame() -> pd.DataFrame:
    rows, labels = blobs(400)
    return pd.DataFrame(
        {
            "id": np.random.default_rng(0).permutation(400),
            "text": [f"text {number}" for number in range(400)],
            "embeddings": arrow_lists(rows),
            "centroid": labels.astype(np.int32) * 10,
            "cosine_dist_to_cent": np.linspace(0, 1, 400, dtype=np.float32),
        }
    )


def sorted_rows(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(embeddings=frame["embeddings"].map(list)).sort_values("id", ignore_index=True)


def test_clusters_come_back(frame: pd.DataFrame, tmp_path: Path) -> None:
    ddf = in_partitions(frame, 7)
    files = ddf.semdedup.to_clusters(tmp_path / "clusters")
    assert files == {k: [str(tmp_path / f"clusters/centroid={k}/part.0.parquet")] for k in (0, 10, 20, 30)}
    again = read_clusters(tmp_path / "clusters")
    assert again.dtypes["centroid"] == np.int64
    names = [name for name in frame if name != "centroid"]
    kept = ["id", "text", "cosine_dist_to_cent"]
    assert again.dtypes[kept].to_dict() == ddf.dtypes[kept].to_dict()
    assert again.dtypes["embeddings"].pyarrow_dtype.value_type == pa.float32()
    result, expected = (sorted_rows(part.compute()) for part in (again, ddf))
    pd.testing.assert_frame_equal(result[names], expected[names])
    assert result["centroid"].tolist() == expected["centroid"].tolist()


def test_others_read_the_files(frame: pd.DataFrame, tmp_path: Path) -> None:
    in_partitions(frame).semdedup.to_clusters(tmp_path / "clusters")
    file = tmp_path / "clusters/centroid=0/part.0.parquet"
    assert pq.read_schema(file).names == ["id", "text", "embeddings", "cosine_dist_to_cent"]
    assert len(pd.read_parquet(tmp_path / "clusters")) == 400
    assert len(dd.read_parquet(tmp_path / "clusters")) == 400


def test_clustered_rows_are_scored_alike_from_files(frame: pd.DataFrame, tmp_path: Path) -> None:
    clustered = in_partitions(frame).semdedup.kmeans(4)
    clustered.semdedup.to_clusters(tmp_path / "clusters")
    again = read_clusters(tmp_path / "clusters")
    assert list(again) == [name for name in clustered if name != "centroid"] + ["centroid"]
    keys = ["id", "centroid", "l2_dist_to_cent"]
    both = [part[keys].compute().sort_values(keys, ignore_index=True) for part in (again, clustered)]
    pd.testing.assert_frame_equal(*both, check_dtype=False)


def test_a_large_cluster_has_more_files(frame: pd.DataFrame, tmp_path: Path) -> None:
    files = in_partitions(frame.assign(centroid=5)).semdedup.to_clusters(tmp_path / "clusters", max_file_size="4 kB")
    assert len(files[5]) > 3
    rows = [pq.read_metadata(file).num_rows for file in files[5]]
    assert sum(rows) == 400
    assert len(set(rows[:-1])) == 1


def test_row_groups_are_bounded(frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "ROW_GROUP_BYTES", 2000)
    files = in_partitions(frame).semdedup.to_clusters(tmp_path / "clusters")
    assert all(pq.read_metadata(file).num_row_groups > 2 for names in files.values() for file in names)


def test_aligned_frames_are_not_shuffled(frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_partitions(frame).semdedup.to_clusters(tmp_path / "first")
    aligned = read_clusters(tmp_path / "first", partition_size=1)
    assert aligned.npartitions == 4
    with dask.config.set({"dataframe.shuffle.method": "no such"}):
        files = aligned.semdedup.to_clusters(tmp_path / "second")
    assert sorted(files) == [0, 10, 20, 30]


@pytest.mark.parametrize("dtype", [None, "category", object])
def test_clusters_of_strings(frame: pd.DataFrame, tmp_path: Path, dtype: object) -> None:
    names = {0: "a/b", 10: "c=d", 20: "e f", 30: "ü%"}
    label = frame.pop("centroid").map(names)
    frame["label"] = label if dtype is None else label.astype(dtype)  # type: ignore[arg-type]
    with dask.config.set({"dataframe.convert-string": dtype is None}):
        in_partitions(frame).semdedup.to_clusters(tmp_path / "clusters", cluster_field="label")
    again = read_clusters(tmp_path / "clusters", cluster_field="label").compute()
    assert dict(zip(again["id"], again["label"], strict=True)) == dict(zip(frame["id"], label, strict=True))


def test_other_file_systems(frame: pd.DataFrame) -> None:
    in_partitions(frame).semdedup.to_clusters("memory://layout-test/clusters")
    assert len(read_clusters("memory://layout-test/clusters")) == 400
    assert fsspec.filesystem("memory").ls("/layout-test", detail=False) == ["/layout-test/clusters"]


def test_a_task_may_run_twice(frame: pd.DataFrame, tmp_path: Path) -> None:
    for _ in range(2):
        layout.write_partition(frame, str(tmp_path), "centroid", 1 << 20, {})
    assert len(read_clusters(tmp_path)) == 400


@pytest.mark.parametrize("clusters", [[0, 1, 2**62], [-(2**63), 2**63 - 1, 7]])
def test_clusters_of_64_bits_come_back(frame: pd.DataFrame, tmp_path: Path, clusters: list[int]) -> None:
    numbers = np.array(clusters)[np.arange(len(frame)) % 3]
    files = in_partitions(frame.assign(centroid=numbers)).semdedup.to_clusters(tmp_path / "clusters")
    assert list(files) == sorted(clusters)
    assert read_clusters(tmp_path / "clusters").compute()["centroid"].value_counts().to_dict() == (
        pd.Series(numbers).value_counts().to_dict()
    )


def test_clusters_beyond_64_bits_are_refused(frame: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"400 rows have a cluster .* not as an integer \(9223372036854775808"):
        in_partitions(frame.assign(centroid=np.uint64(2**63))).semdedup.to_clusters(tmp_path / "clusters")
    assert not (tmp_path / "clusters").exists()


@pytest.mark.parametrize("name", ["run[1]", "a*b", "what?"])
def test_names_that_look_like_patterns_are_names(frame: pd.DataFrame, tmp_path: Path, name: str) -> None:
    (tmp_path / "run1").mkdir()
    (tmp_path / "a b").mkdir()
    files = in_partitions(frame).semdedup.to_clusters(tmp_path / name)
    assert len(files) == frame["centroid"].nunique()
    assert len(read_clusters(tmp_path / name)) == len(frame)


def test_a_late_writer_does_not_make_the_folder_anew(frame: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"Cannot write .*/gone/centroid=0: .*No such file"):
        layout.write_partition(frame, str(tmp_path / "gone"), "centroid", 1 << 20, {})
    assert not (tmp_path / "gone").exists()


# --- Folders that are there, and failures ----------------------------------------------------------------------------


def test_an_occupied_folder_is_refused_or_replaced(frame: pd.DataFrame, tmp_path: Path) -> None:
    first, second = in_partitions(frame), in_partitions(frame[frame["centroid"] == 10])
    first.semdedup.to_clusters(tmp_path / "clusters")
    with pytest.raises(OutputExistsError, match=r"not empty: 4 files.*overwrite=True"):
        second.semdedup.to_clusters(tmp_path / "clusters")
    assert len(read_clusters(tmp_path / "clusters")) == 400
    assert list(second.semdedup.to_clusters(tmp_path / "clusters", overwrite=True)) == [10]
    (tmp_path / "clusters" / "thesis.tex").write_text("the only copy")
    with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
        first.semdedup.to_clusters(tmp_path / "clusters", overwrite=True)


@pytest.mark.parametrize("folder", ["", "lang=en/centroid=3/"])
def test_parquet_that_is_no_cluster_is_not_replaced(frame: pd.DataFrame, tmp_path: Path, folder: str) -> None:
    (tmp_path / "home" / folder).mkdir(parents=True)
    frame.to_parquet(tmp_path / "home" / folder / "part.0.parquet")
    with pytest.raises(OutputExistsError, match=rf"not clusters and would be lost: {folder}part\.0\.parquet"):
        in_partitions(frame).semdedup.to_clusters(tmp_path / "home", overwrite=True)
    assert pq.read_metadata(tmp_path / "home" / folder / "part.0.parquet").num_rows == len(frame)


def test_a_folder_may_be_written_over_what_is_read(frame: pd.DataFrame, tmp_path: Path) -> None:
    in_partitions(frame).semdedup.to_clusters(tmp_path / "clusters")
    half = read_clusters(tmp_path / "clusters")
    half[half["id"] < 200].semdedup.to_clusters(tmp_path / "clusters", overwrite=True)
    assert len(read_clusters(tmp_path / "clusters")) == 200


def fail_late(part: pd.DataFrame, partition_info: dict[str, int] | None = None) -> pd.DataFrame:
    if partition_info and partition_info["number"] == 3:
        raise RuntimeError("lost")
    return part


@pytest.mark.parametrize("output", ["{}/clusters/again", "file://{}/clusters/again", "{}/other/../clusters/again/"])
def test_a_folder_within_what_is_read_is_refused(frame: pd.DataFrame, tmp_path: Path, output: str) -> None:
    in_partitions(frame).semdedup.to_clusters(tmp_path / "clusters")
    read = read_clusters(tmp_path / "clusters")
    with pytest.raises(InvalidArgumentError, match=r"clusters/again' is within '.*clusters', which is read"):
        read[read["id"] > 3].semdedup.to_clusters(output.format(tmp_path))
    assert len(read_clusters(tmp_path / "clusters")) == len(frame)


@pytest.mark.parametrize("output", ["{}/clusters2", "{}/clusters/../beside", "memory://{}/clusters/again"])
def test_a_folder_beside_what_is_read_is_not(frame: pd.DataFrame, tmp_path: Path, output: str) -> None:
    source = tmp_path / "centroid=kmeans" / "clusters"
    source.parent.mkdir()
    in_partitions(frame).semdedup.to_clusters(source)
    path = output.format(source.parent)
    assert read_clusters(source).semdedup.to_clusters(path).keys() == set(frame["centroid"])


def test_a_failure_leaves_nothing(frame: pd.DataFrame, tmp_path: Path) -> None:
    in_partitions(frame).semdedup.to_clusters(tmp_path / "first")
    broken = read_clusters(tmp_path / "first", partition_size=1).map_partitions(fail_late)
    with pytest.raises(RuntimeError, match="lost"):
        broken.semdedup.to_clusters(tmp_path / "second")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_two_threads_may_write_at_once(frame: pd.DataFrame, tmp_path: Path) -> None:
    """Neither leaves its pool in Dask's configuration."""
    ddf = in_partitions(frame)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: ddf.semdedup.to_clusters(tmp_path / str(name)), range(8)))
    assert dask.config.get("pool", None) is None
    assert len(ddf.compute()) == len(frame)


def test_what_cannot_be_removed_does_not_hide_the_error(
    frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_partitions(frame).semdedup.to_clusters(tmp_path / "first")
    broken = read_clusters(tmp_path / "first", partition_size=1).map_partitions(fail_late)
    monkeypatch.setattr(LocalFileSystem, "rm", Mock(side_effect=PermissionError("not yours")))
    with pytest.raises(RuntimeError, match="lost"), pytest.warns(UserWarning, match=r"second\.partial.*not yours"):
        broken.semdedup.to_clusters(tmp_path / "second")


def no_rows(frame: pd.DataFrame) -> dd.DataFrame:
    ddf = in_partitions(frame)
    return ddf[ddf["id"] < 0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (no_rows, ClusterError, "no rows"),
        (lambda frame: in_partitions(frame.drop(columns="centroid")), ClusterError, "No cluster column 'centroid'"),
        (lambda frame: in_partitions(frame[["centroid"]]), InvalidArgumentError, "no columns to write"),
        (
            lambda frame: in_partitions(frame.assign(centroid=frame["centroid"].astype("float64"))),
            InvalidArgumentError,
            "'centroid' has dtype float64.*integers or strings",
        ),
        (
            lambda frame: in_partitions(frame.assign(centroid=frame["centroid"].astype("Int32").replace(10, pd.NA))),
            ClusterError,
            "rows have no cluster",
        ),
        (
            lambda frame: in_partitions(frame.assign(centroid=frame["centroid"].astype(str).replace("10", ""))),
            ClusterError,
            "'centroid': [0-9]+ rows have a cluster whose folder would be read back as null, or not as an integer .''.",
        ),
    ],
    ids=["no rows", "no clusters", "nothing else", "floats", "nulls", "no name"],
)
def test_bad_frames(frame: pd.DataFrame, tmp_path: Path, make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(frame).semdedup.to_clusters(tmp_path / "clusters")
    assert list(tmp_path.iterdir()) == []


def test_partitions_of_two_schemas(tmp_path: Path) -> None:
    with dask.config.set({"dataframe.convert-string": False}):
        odd = pd.DataFrame({"centroid": [0, 1], "mixed": pd.Series([1, "one"], dtype=object)})
        with pytest.raises(ClusterError, match=r"mixed: int64 and string.*one dtype"):
            writing.write_layout(in_partitions(odd, 2), str(tmp_path / "clusters"), "centroid", 1 << 20)


@pytest.mark.parametrize("size", ["much", 0])
def test_bad_file_sizes(frame: pd.DataFrame, tmp_path: Path, size: object) -> None:
    with pytest.raises(InvalidArgumentError, match="max_file_size must be"):
        in_partitions(frame).semdedup.to_clusters(tmp_path / "clusters", max_file_size=size)


def test_clusters_of_one_name_do_not_share_a_folder(frame: pd.DataFrame, tmp_path: Path) -> None:
    clusters = pd.Series([1, "1"] * 200, dtype=object)
    with dask.config.set({"dataframe.convert-string": False}):
        ddf = dd.from_pandas(frame.assign(centroid=clusters), npartitions=1)
    with pytest.raises(ClusterError, match=r"'centroid': clusters of different types have one name \(1, '1'\)"):
        ddf.semdedup.to_clusters(tmp_path / "clusters")


def test_a_field_that_cannot_be_in_a_folders_name(frame: pd.DataFrame, tmp_path: Path) -> None:
    ddf = in_partitions(frame.rename(columns={"centroid": "a/b"}))
    with pytest.raises(InvalidArgumentError, match=r"cluster_field 'a/b' cannot be part of a folder's name"):
        ddf.semdedup.to_clusters(tmp_path / "clusters", cluster_field="a/b")


def test_a_scheduler_of_ones_own(frame: pd.DataFrame, tmp_path: Path) -> None:
    def get(graph: Any, keys: Any) -> Any:
        return dask.get(graph, keys)

    with dask.config.set(scheduler=get):
        assert len(in_partitions(frame).semdedup.to_clusters(tmp_path / "clusters")) == 4


@pytest.mark.parametrize("inside", [True, False])
def test_one_cluster_is_what_its_folder_says(frame: pd.DataFrame, tmp_path: Path, inside: bool) -> None:
    folder = tmp_path / "centroid=7"
    folder.mkdir()
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata()
    pq.write_table(table, folder / "a.parquet")
    assert set(read_clusters(folder if inside else folder / "a.parquet")["centroid"].compute()) == {7}
