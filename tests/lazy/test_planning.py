"""Clusters are cut into partitions that cost alike and fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup import read_clusters
from dask_semdedup.io import fragments, reader
from dask_semdedup.lazy import planning
from dask_semdedup.lazy.blocks import PROCESS_BYTES
from dask_semdedup.lazy.planning import plan
from tests.data import write_random_layout


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
    def test_dask_begins_with_oversized_clusters(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int
    ) -> None:
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

    @pytest.mark.parametrize(
        ("megabytes", "threads", "expected"),
        [
            (0, 4, 2**27),
            (16_000, 4, 2**27),
            (1000, 1, (0.9 * 1000e6 - PROCESS_BYTES) / 5),
            (1500, 2, (0.9 * 1500e6 - PROCESS_BYTES) / 10),
            (1000, 8, 2**24),
            (300, 1, 2**24),
        ],
        ids=["no limit", "much", "one thread", "two threads", "many threads", "less than a process takes"],
    )
    def test_partitions_fit_into_workers(self, megabytes, threads, expected) -> None:
        workers = {"tcp://a:1": {"memory_limit": megabytes * 10**6, "nthreads": threads}}
        info = SimpleNamespace(
            asynchronous=False, status="running", scheduler_info=lambda n_workers: {"workers": workers}
        )
        assert planning.default_size("pandas", info) == int(expected)
