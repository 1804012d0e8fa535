"""Clusters larger than a worker's memory: searched in blocks, and written byte by byte as those that are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster

from dask_semdedup import EmbeddingError, cli, read_clusters
from dask_semdedup.frames.columns import Columns
from dask_semdedup.lazy import blocks
from dask_semdedup.lazy.blocks import PROCESS_BYTES, Blocks, blocks_of_partitions, bytes_at_once, task_bytes
from dask_semdedup.lazy.expressions import ScoresOfFiles
from tests.data import arrow_lists, by_cluster, make_frame, write_layout

MEMORY = 4_500
"""Bytes of a task: a quarter of the largest cluster is a block."""

COUNT = 4


@pytest.fixture
def path(tmp_path: Path) -> Any:
    """Small clusters, and one of 100 rows of 8 numbers in two files."""
    frame = make_frame(0, clusters=6, max_rows=12)
    large = pd.concat([make_frame(seed, clusters=1, max_rows=60) for seed in range(2, 7)]).head(100)
    large = large.assign(centroid=7, id=np.random.default_rng(0).permutation(100) + 10_000)
    return write_layout(tmp_path / "in", by_cluster(pd.concat([frame, large], ignore_index=True)))


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LEAST_BLOCK", 500)
    monkeypatch.setattr(blocks, "task_bytes", lambda: MEMORY)


def scores_of(path: Any, **options: Any) -> Any:
    return read_clusters(path, partition_size="2kB").semdedup.pairwise(**options)


def counts(scores: Any) -> list[int]:
    """Blocks of each partition that has any."""
    lowered = scores.optimize(fuse=False).expr
    return [count for found in lowered.find_operations(Blocks) for count in found.counts.values()]


@pytest.fixture
def whole(path: Any) -> pd.DataFrame:
    return scores_of(path).compute()


class TestSameScores:
    @pytest.mark.parametrize("which", ["hard", "easy", "random"])
    def test_in_threads(self, path: Any, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = scores_of(path, which_to_keep=which).compute()
        assert counts(scores_of(path)) == []
        little = scores_of(path, which_to_keep=which)
        monkeypatch.setattr(blocks, "LEAST_BLOCK", 500)
        monkeypatch.setattr(blocks, "task_bytes", lambda: MEMORY)
        assert counts(little) == [COUNT]
        pd.testing.assert_frame_equal(little.compute(), whole, rtol=0, atol=0)

    def test_of_duplicates(self, path: Any, whole: pd.DataFrame, little_memory: None) -> None:
        scores = scores_of(path)
        expected = whole[whole.cosine_sim_score >= 0.95].reset_index(drop=True)
        assert len(expected)
        for found in (
            scores_of(path, eps=0.05),
            scores.semdedup.duplicates(eps=0.05),
            scores.optimize(fuse=False).semdedup.duplicates(eps=0.05),
        ):
            lowered = found.optimize(fuse=False).expr
            (search,) = lowered.find_operations(Blocks)
            assert search.options.at_least is not None
            pd.testing.assert_frame_equal(found.compute().reset_index(drop=True), expected, rtol=0, atol=0)

    def test_of_kept_rows(self, path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def kept() -> Any:
            return scores_of(path, eps=0.3, duplicate_of="kept")

        whole = kept().compute()
        assert len(whole) < len(scores_of(path, eps=0.3).compute())
        monkeypatch.setattr(blocks, "LEAST_BLOCK", 500)
        monkeypatch.setattr(blocks, "task_bytes", lambda: MEMORY)
        assert counts(kept()) == [COUNT]
        pd.testing.assert_frame_equal(kept().compute(), whole, rtol=0, atol=0)

    def test_of_some_partitions(self, path: Any, whole: pd.DataFrame, little_memory: None) -> None:
        scores = scores_of(path)
        parts = [scores.partitions[number].compute() for number in range(scores.npartitions)]
        pd.testing.assert_frame_equal(pd.concat(parts).reset_index(drop=True), whole.reset_index(drop=True))
        searched = [counts(scores.partitions[number]) for number in range(scores.npartitions)]
        assert sorted(searched)[-2:] == [[], [COUNT]]

    def test_on_workers(self, path: Any, whole: pd.DataFrame, little_memory: None, client: Client) -> None:
        found = scores_of(path).compute()
        pd.testing.assert_frame_equal(found, whole, rtol=0, atol=0)

    def test_files_are_the_same(self, path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = ["pairwise", str(path), "--partition-size", "2kB", "--verbose"]
        results = [CliRunner().invoke(cli.main, [*arguments, str(tmp_path / "whole")])]
        monkeypatch.setattr(blocks, "LEAST_BLOCK", 500)
        monkeypatch.setattr(blocks, "task_bytes", lambda: MEMORY)
        results.append(CliRunner().invoke(cli.main, [*arguments, str(tmp_path / "blocks")]))
        assert [result.exit_code for result in results] == [0, 0]
        assert "block 4 of 4" in results[1].stderr
        files = [sorted((tmp_path / name).iterdir()) for name in ("whole", "blocks")]
        assert len(files[0]) > 2
        assert [file.name for file in files[0]] == [file.name for file in files[1]]
        assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


@pytest.fixture
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_bad_rows_are_named(path: Any, little_memory: None) -> None:
    table = pa.table({"id": [-1], "embeddings": [[np.nan] * 8], "cosine_dist_to_cent": [0.0]})
    table = table.set_column(1, "embeddings", table["embeddings"].cast(pa.list_(pa.float32())))
    table = table.set_column(2, "cosine_dist_to_cent", table["cosine_dist_to_cent"].cast(pa.float32()))
    write_layout(path, {7: [table]})
    scores = scores_of(path)
    with pytest.raises(EmbeddingError, match=r"'embeddings', cluster 7: 1 row with NaN .*\(ids -1\)"):
        scores.compute(scheduler="synchronous")


class TestPlan:
    def test_only_what_does_not_fit_is_cut(self, path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blocks, "LEAST_BLOCK", 500)
        for memory, expected in [(10**9, []), (MEMORY, [COUNT]), (1, [10])]:
            monkeypatch.setattr(blocks, "task_bytes", lambda memory=memory: memory)
            assert counts(scores_of(path))[-1:] == expected

    def test_not_for_a_gpu(self, path: Any, little_memory: None) -> None:
        source = read_clusters(path).expr.source
        partitions = dict(enumerate(source.partitions))
        assert blocks_of_partitions(source.reader, partitions, Columns()) != {}
        on_gpu: Any = SimpleNamespace(backend="cudf")
        assert blocks_of_partitions(on_gpu, partitions, Columns()) == {}

    def test_the_largest_cluster_counts_if_folders_tell(self, tmp_path: Path) -> None:
        rows = arrow_lists(np.eye(8, dtype=np.float32))
        frame = pd.DataFrame({"id": range(8), "embeddings": rows, "centroid": np.arange(8) // 6, "label": 0})
        source = read_clusters(write_layout(tmp_path, by_cluster(frame, files=1))).expr.source
        sizes = [piece.nbytes for piece in source.partitions[0]]
        assert bytes_at_once(source.reader, source.partitions[0], Columns()) == sizes[0] > sizes[1]
        assert bytes_at_once(source.reader, source.partitions[0], Columns(cluster="label")) == sum(sizes)

    def test_halves_take_twice_as_much(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for element, factor in [(pa.float16(), 2), (pa.float32(), 1), (pa.float64(), 1), (pa.uint16(), 2)]:
            frame = pd.DataFrame({"id": range(8), "embeddings": arrow_lists(np.eye(8), element)})
            source = read_clusters(write_layout(tmp_path / str(element), {0: [frame]})).expr.source
            (partition,) = source.partitions
            nbytes = factor * partition[0].nbytes
            assert bytes_at_once(source.reader, partition, Columns()) == nbytes
            with monkeypatch.context() as patch:
                patch.setattr(blocks, "LEAST_BLOCK", 1)
                patch.setattr(blocks, "task_bytes", lambda nbytes=nbytes: 2 * nbytes)
                assert blocks_of_partitions(source.reader, {5: partition}, Columns()) == {5: 2}


class TestMemory:
    @pytest.mark.parametrize(
        ("workers", "expected"),
        [
            ([(4 << 30, 1), (2 << 30, 1)], 0.9 * (2 << 30) - PROCESS_BYTES),
            ([(4 << 30, 1), (4 << 30, 4)], (0.9 * (4 << 30) - PROCESS_BYTES) / 4),
            ([(0, 1), (None, 1)], np.inf),
            ([], np.inf),
        ],
    )
    def test_the_least_of_the_workers(self, workers: list[tuple[int | None, int]], expected: float) -> None:
        info = {
            "workers": {number: {"memory_limit": limit, "nthreads": n} for number, (limit, n) in enumerate(workers)}
        }
        client: Any = SimpleNamespace(asynchronous=False, status="running", scheduler_info=lambda n_workers: info)
        assert task_bytes(client) == pytest.approx(expected)

    def test_threads_share_the_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = SimpleNamespace(total=16 << 30)
        monkeypatch.setattr(blocks.psutil, "virtual_memory", lambda: machine)
        monkeypatch.setattr(blocks, "CPU_COUNT", 4)
        assert task_bytes() == pytest.approx((0.9 * (16 << 30) - PROCESS_BYTES) / 4)


def test_lowered_scores_are_one_task_a_partition_elsewhere(path: Any, little_memory: None) -> None:
    lowered = scores_of(path).optimize().expr
    (scores,) = lowered.find_operations(ScoresOfFiles)
    graph = dict(lowered.__dask_graph__())
    assert len(graph) == scores.npartitions + COUNT + 2
    assert dask.compute(lowered.npartitions) == (scores.npartitions,)
