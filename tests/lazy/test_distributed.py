"""The same answers from a cluster of two processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster, get_worker, wait

from dask_semdedup import ClusterError, EmbeddingError, IdError, MissingColumnsError, read_clusters, read_table
from dask_semdedup.lazy.tasks import compute
from dask_semdedup.steps.duplicates import find_duplicates
from dask_semdedup.steps.groups import resolve_groups
from tests.data import arrow_lists, by_cluster, expected_scores, make_frame, write_layout
from tests.lazy.test_join import clustered, indexed


@pytest.fixture(scope="module")
def client(loaded_processes: object) -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            scheduler_kwargs={"dashboard": False},
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def computed(scores: dd.DataFrame) -> pd.DataFrame:
    return scores.compute().sort_values("centroid", kind="stable", ignore_index=True)


def test_results_do_not_wait_on_workers_for_others(client: Client) -> None:
    """A late task sees that the results before it have been fetched and let go."""

    def stored(dask_worker) -> int:
        return sum(getattr(value, "nbytes", 0) >= 8 << 20 for value in dask_worker.data.values())

    def late(seconds: float) -> int:
        time.sleep(seconds)
        return stored(get_worker())

    early = [dask.delayed(np.ones)((1 + number, 1 << 20)) for number in range(3)]
    *arrays, waiting = compute(*early, dask.delayed(late)(2.0))
    assert [len(array) for array in arrays] == [1, 2, 3]
    assert waiting == 0
    assert sum(client.run(stored).values()) == 0


def test_files_to_files(client: Client, tmp_path: Path) -> None:
    frame = make_frame(1)
    ddf = read_clusters(write_layout(tmp_path / "in", by_cluster(frame)), partition_size=2000)
    assert ddf.npartitions > 2
    ddf.semdedup.pairwise().to_parquet(tmp_path / "out")
    expected = expected_scores(frame)
    written = pd.read_parquet(tmp_path / "out").reset_index(drop=True)
    pd.testing.assert_frame_equal(written, expected, atol=2e-6)


def test_duplicates_alone_and_with_all_scores(client: Client) -> None:
    """What the search may leave out is decided where Dask optimises: in this process, or in the scheduler's."""
    ddf = dd.from_pandas(make_frame(1), npartitions=3)
    full = ddf.semdedup.pairwise().persist().compute()
    scores = ddf.semdedup.pairwise()
    found = scores.semdedup.duplicates(0.05)
    pd.testing.assert_frame_equal(found.compute(), find_duplicates(full, 0.05), check_exact=True)
    pd.testing.assert_frame_equal(found.persist().compute(), find_duplicates(full, 0.05), check_exact=True)
    for results in (dask.compute(found, scores), client.gather(client.compute([found, scores]))):
        pd.testing.assert_frame_equal(results[0], find_duplicates(full, 0.05), check_exact=True)
        pd.testing.assert_frame_equal(results[1], full, check_exact=True)


@pytest.mark.parametrize("layout", ["arrow", "object"])
def test_unaligned_frames_are_shuffled_by_a_method_that_carries_lists(client: Client, layout: str) -> None:
    frame = make_frame(2)
    expected = expected_scores(frame)
    if layout == "object":
        frame["embeddings"] = pd.Series([np.array(row, np.float32) for row in frame.embeddings], dtype=object)
    with dask.config.set({"dataframe.convert-string": False}):
        scores = dd.from_pandas(frame, npartitions=5, sort=False).semdedup.pairwise()
        pd.testing.assert_frame_equal(computed(scores), expected, atol=2e-6)


def test_both_processes_work_and_agree_with_one(client: Client, tmp_path: Path) -> None:
    frame = make_frame(3)
    ddf = read_clusters(write_layout(tmp_path, by_cluster(frame)), partition_size=1)
    scores = ddf.semdedup.pairwise().persist()
    wait(scores)
    assert all(client.has_what().values())
    pd.testing.assert_frame_equal(computed(scores), expected_scores(frame), atol=2e-6)
    assert len(scores.semdedup.duplicates()) == (expected_scores(frame).cosine_sim_score >= 0.99).sum()


@pytest.mark.parametrize("broadcast", [True, False])
def test_from_scores_to_rows_left(client: Client, tmp_path: Path, broadcast: bool) -> None:
    frame = make_frame(5)
    ddf = read_clusters(write_layout(tmp_path, by_cluster(frame)), partition_size=2000)
    scores = ddf.semdedup.pairwise().persist()
    expected = find_duplicates(expected_scores(frame), 0.05)
    pd.testing.assert_frame_equal(scores.semdedup.groups(0.05).compute(), resolve_groups(expected))
    curve = scores.semdedup.eps_curve([0.05, 0.01]).compute()
    assert curve.duplicates.tolist()[0] == len(expected)
    left = ddf.semdedup.remove(scores.semdedup.duplicates(0.05), broadcast=broadcast).compute()
    assert sorted(left.id) == sorted(set(frame.id) - set(expected.id))
    assert left.dtypes.to_dict() == ddf.dtypes.to_dict()
    twice = dd.concat([ddf, ddf]).semdedup.remove(scores, eps=0.05, broadcast=broadcast)
    with pytest.raises(IdError, match=r"Column 'id': \d+ ids of the duplicates occur in several rows"):
        twice.compute()


def test_errors_come_back_whole(client: Client) -> None:
    frame = make_frame(4)
    frame["embeddings"] = pd.Series([np.array(row, np.float32) for row in frame.embeddings], dtype=object)
    frame.at[7, "embeddings"] = np.full(8, np.nan, np.float32)
    with dask.config.set({"dataframe.convert-string": False}):
        scores = dd.from_pandas(frame, npartitions=3, sort=False).semdedup.pairwise()
        with pytest.raises(EmbeddingError, match=rf"'embeddings'.*1 row with NaN.*ids {frame.id[7]}"):
            scores.compute()
    with pytest.raises(MissingColumnsError, match="cosine_sim_score"):
        client.submit(no_scores).result()


def no_scores() -> None:
    dd.from_pandas(pd.DataFrame({"id": [1]}), npartitions=1).semdedup.duplicates()


def test_the_whole_way(client: Client) -> None:
    """Clusters, removal and a comparison with other data, all through a shuffle between processes."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((60, 8)).astype(np.float32)
    rows[40:] = rows[:20]
    frame = pd.DataFrame(
        {"id": range(60), "embeddings": arrow_lists(rows, pa.float32()), "text": [*map(str, range(60))]}
    )
    ddf = dd.from_pandas(frame, npartitions=4)
    kept = ddf.semdedup.deduplicate(eps=0.001, centroids=rows[:3]).compute()
    assert len(kept) == 40
    assert len(set(kept["id"] % 40)) == 40
    assert list(kept.columns) == list(frame.columns)
    copies = ddf.partitions[3].semdedup.against(ddf.partitions[:3], eps=0, centroids=rows[:3]).compute()
    assert copies.sort_values("id")[["id", "max_id"]].to_numpy().tolist() == [[i, i - 40] for i in range(45, 60)]


def test_raw_rows_to_cluster_files(client: Client, tmp_path: Path) -> None:
    """The fit, the assignment, the shuffle and the files are those of threads."""
    frame = make_frame(5).drop(columns=["centroid", "cosine_dist_to_cent"])
    ddf = dd.from_pandas(frame, npartitions=5, sort=False)
    files = ddf.semdedup.kmeans(3).semdedup.to_clusters(tmp_path / "clusters")
    assert [len(names) for names in files.values()] == [1, 1, 1]
    with dask.config.set(scheduler="threads"):
        keys = ["id", "centroid", "l2_dist_to_cent"]
        expected = ddf.semdedup.kmeans(3)[keys].compute().sort_values(keys, ignore_index=True)
    written = read_clusters(tmp_path / "clusters")[keys].compute().sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(written, expected, check_dtype=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters"]


def test_bad_rows_leave_no_cluster_files(client: Client, tmp_path: Path) -> None:
    frame = make_frame(6)
    clustered = dd.from_pandas(frame, npartitions=4, sort=False).semdedup.kmeans(centroids=np.eye(7))
    with pytest.raises(EmbeddingError, match=r"width 8.*centroids are of width 7"):
        clustered.semdedup.to_clusters(tmp_path / "clusters")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_waits_for_late_writers(client: Client, tmp_path: Path) -> None:
    """Those that still run when one has failed do not write into a folder that is being removed."""
    clusters = pd.array([None, *range(1, 6000)], dtype="Int64")
    ddf = dd.from_pandas(pd.DataFrame({"id": range(6000), "centroid": clusters}), npartitions=4)
    with pytest.raises(ClusterError, match=r"1 row has no cluster"):
        ddf.semdedup.to_clusters(tmp_path / "clusters")
    assert list(tmp_path.iterdir()) == []


def test_clusters_may_be_written_from_within_a_task(tmp_path: Path) -> None:
    """It does not keep the thread from those that write."""
    frame = pd.DataFrame({"id": range(20), "centroid": [number % 3 for number in range(20)]})

    def write() -> int:
        return len(dd.from_pandas(frame, npartitions=4).semdedup.to_clusters(tmp_path / "clusters"))

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as one,
    ):
        assert one.submit(write).result(timeout=60) == 3


def test_rows_compared_with_all_others_while_a_worker_is_killed(client: Client, tmp_path: Path) -> None:
    """Blocks and sketches that are lost with it are made again, and the answer is that of one process."""
    frame = clustered()
    for number, part in enumerate(np.array_split(np.arange(len(frame)), 6)):
        frame.iloc[part].to_parquet(tmp_path / f"{number}.parquet", index=False)
    with indexed(25, BLOCK_BYTES=100_000):
        scores = read_table(tmp_path, partition_size=1).semdedup.pairwise(
            eps=0.05, cluster_field=None, duplicate_of="kept"
        )
    with dask.config.set(scheduler="sync"):
        expected = dd.from_pandas(frame, npartitions=1).semdedup.pairwise(
            eps=0.05, cluster_field=None, duplicate_of="kept"
        )
        expected = expected.compute()
    pids = client.run(os.getpid)
    future = client.compute(scores)
    victim = next(iter(pids))
    while not any("sketch-" in str(key) for key in client.has_what()[victim]):
        assert not future.done()
        time.sleep(0.01)
    os.kill(pids[victim], signal.SIGKILL)
    pd.testing.assert_frame_equal(future.result(timeout=120), expected, check_exact=True)
    client.wait_for_workers(2, timeout=60)
