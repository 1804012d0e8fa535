"""Clusters that cannot do the work, or do not go on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster

from dask_semdedup import __version__, read_clusters
from dask_semdedup.errors import ClusterUnavailableError, InvalidArgumentError
from dask_semdedup.lazy import blocks, workers
from dask_semdedup.lazy.workers import check_memory, check_workers, watched
from tests.data import arrow_lists, write_layout


@pytest.fixture
def idle() -> Iterator[Client]:
    """A cluster without workers."""
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_a_cluster_needs_workers(idle: Client) -> None:
    with pytest.raises(ClusterUnavailableError, match=r"has had no workers for 0\.1 s"):
        check_workers(idle, __version__, timeout=0.1)


def test_workers_need_this_version_of_the_package(idle: Client) -> None:
    idle.cluster.scale(1)
    check_workers(idle, __version__)
    for version, words in [(None, "1 of 2 workers cannot import"), ("0.0.1", "1 of 2 workers have another version")]:
        found = {"tcp://a": {"packages": {"dask_semdedup": __version__}}}
        found["tcp://b"] = {"packages": {"dask_semdedup": version}}
        with (
            patch.object(idle, "get_versions", return_value={"workers": found}),
            pytest.raises(ClusterUnavailableError, match=words) as error,
        ):
            check_workers(idle, __version__)
        assert "tcp://b" in str(error.value)
        assert "tcp://a" not in str(error.value)


def paused(n: int) -> dict[str, Any]:
    full = {"status": "paused", "metrics": {"memory": 500 << 20}, "memory_limit": 600 << 20}
    return {"workers": {f"tcp://{number}": full for number in range(n)}}


@pytest.mark.parametrize(
    ("info", "words"), [({"workers": {}}, "has no workers"), (paused(2), "all 2 workers have paused")]
)
def test_a_cluster_that_does_not_go_on_is_warned_of_once(idle: Client, info: dict[str, Any], words: str) -> None:
    with (
        patch.object(workers, "PATIENCE", 0.1),
        patch.object(idle, "scheduler_info", return_value=info),
        warnings.catch_warnings(record=True) as caught,
        watched(idle) as moved,
    ):
        warnings.simplefilter("always")
        time.sleep(0.5)
        assert [words in str(warning.message) for warning in caught] == [True]
        moved()
        time.sleep(0.5)
        assert len(caught) == 2


def test_long_tasks_are_no_fault(idle: Client) -> None:
    info = paused(2)
    info["workers"]["tcp://2"] = {**info["workers"]["tcp://1"], "status": "running"}
    with (
        patch.object(workers, "PATIENCE", 0.1),
        patch.object(idle, "scheduler_info", return_value=info),
        warnings.catch_warnings(),
        watched(idle),
    ):
        warnings.simplefilter("error")
        time.sleep(0.3)


@pytest.mark.parametrize(("limit", "is_enough"), [(3 << 20, False), (6 << 20, True), (0, True)])
def test_a_partition_that_no_worker_holds_is_refused(idle: Client, tmp_path: Path, limit: int, is_enough: bool) -> None:
    rows = np.zeros((1000, 256), np.float32)
    frame = pd.DataFrame({"id": range(1000), "embeddings": arrow_lists(rows)})
    scores = read_clusters(write_layout(tmp_path, {0: [frame]})).semdedup.pairwise(which_to_keep="random")
    limits = {"tcp://0": limit, "tcp://1": 1 << 40}
    info = {"workers": {address: {"memory_limit": least, "nthreads": 1} for address, least in limits.items()}}
    with patch.object(idle, "scheduler_info", return_value=info):
        if is_enough:
            check_memory(idle, scores)
            return
        with pytest.raises(InvalidArgumentError, match=r"takes about 3\.9.* MiB .* a worker has 3\.00 MiB"):
            check_memory(idle, scores)


@pytest.mark.parametrize(("limit", "threads", "is_enough"), [(600 << 20, 1, True), (600 << 20, 9, False)])
def test_workers_need_memory_for_blocks(
    idle: Client, tmp_path: Path, limit: int, threads: int, is_enough: bool
) -> None:
    """A cluster too large for a worker is searched in blocks, unless not even these fit."""
    rows = pa.FixedSizeListArray.from_arrays(np.zeros(20_000 * 512, np.float32), 512)
    table = pa.table({"id": range(20_000), "embeddings": rows})
    scores = read_clusters(write_layout(tmp_path, {0: [table]})).semdedup.pairwise(which_to_keep="random")
    info = {"workers": {"tcp://0": {"memory_limit": limit, "nthreads": threads}}}
    with patch.object(idle, "scheduler_info", return_value=info), patch.object(blocks, "PROCESS_BYTES", 420 << 20):
        if is_enough:
            check_memory(idle, scores)
            return
        with pytest.raises(
            InvalidArgumentError, match=r"at tcp://0 has 600.00 MiB of memory for 9 threads, and needs 706.67 MiB"
        ):
            check_memory(idle, scores)
