"""Scores straight from files: those of the frame that is read whole, at less memory."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_semdedup import EmbeddingError, RankingStrategy, read_clusters
from dask_semdedup.frames.columns import Columns, SearchOptions
from dask_semdedup.lazy import expressions
from dask_semdedup.lazy.expressions import PairwiseScores, ScoresOfFiles
from dask_semdedup.steps.pairwise import pairwise_partition
from dask_semdedup.steps.ranking import make_strategy
from tests.data import LAYOUTS, arrow_lists, by_cluster, write_layout
from tests.strategies import STR, rows_and_segments

RANKINGS = [
    make_strategy("hard"),
    make_strategy("easy"),
    make_strategy("random"),
    RankingStrategy(["text", "cosine_dist_to_cent"], ascending=[False, True]),
]
TYPES = [
    (pa.float32(), pa.list_),
    (pa.float64(), pa.list_),
    (pa.float16(), pa.large_list),
    (pa.float32(), lambda element: pa.list_(element, 6)),
]


def make_frame(embeddings: Any, centroid: Any) -> pd.DataFrame:
    rng = np.random.default_rng(len(centroid))
    return pd.DataFrame(
        {
            "id": rng.permutation(10 * len(centroid))[: len(centroid)],
            "embeddings": embeddings,
            "centroid": centroid,
            "cosine_dist_to_cent": rng.integers(5, size=len(centroid)).astype(np.float32),
            "text": pd.Series([f"text {number % 3}" for number in range(len(centroid))], dtype=STR),
        }
    )


@pytest.fixture(params=[1, 2000, 2**25])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the clusters that are scored at once."""
    monkeypatch.setattr(expressions, "RUN", request.param)
    return request.param


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters are scored one by one."""
    monkeypatch.setattr(expressions, "RUN", 1)


class TestSameScores:
    @given(
        case=rows_and_segments(max_segments=8, max_rows=20, max_width=6),
        ranking=st.sampled_from(RANKINGS),
        type_=st.sampled_from(TYPES),
        run=st.sampled_from([1, 500, 2000, 2**25]),
        partition_size=st.sampled_from([1, 3000, "128MiB"]),
    )
    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_whatever_is_scored_at_once(
        self, tmp_path_factory, monkeypatch, case, ranking, type_, run, partition_size
    ) -> None:
        rows, segments = case
        if len(rows) == 0:
            return
        rows = np.pad(rows, ((0, 0), (0, 6 - rows.shape[1]))).clip(-6e4, 6e4)
        centroid = np.repeat(np.arange(len(segments) - 1) * 5, np.diff(segments))
        path = write_layout(tmp_path_factory.mktemp("in"), by_cluster(make_frame(arrow_lists(rows, *type_), centroid)))
        monkeypatch.setattr(expressions, "RUN", run)
        ddf = read_clusters(path, partition_size=partition_size)
        scores = ddf.semdedup.pairwise(ranking_strategy=ranking)
        whole = pairwise_partition(read_clusters(path).compute(), ranking=ranking, columns=Columns())
        found = scores.compute().sort_values("centroid", kind="stable", ignore_index=True)
        pd.testing.assert_frame_equal(found, whole, rtol=0, atol=2e-6)
        assert found.dtypes.equals(scores._meta.dtypes)

    @pytest.mark.parametrize("fuse", [False, True])
    @pytest.mark.parametrize("how", ["inner", "left"])
    def test_merges_of_optimised_scores(self, tmp_path: Path, fuse: bool, how: str) -> None:
        centroid = np.repeat(np.arange(20), 20)
        frame = make_frame(arrow_lists(np.random.default_rng(0).random((400, 6)), pa.float32()), centroid)
        path = write_layout(tmp_path / "in", by_cluster(frame))
        scores = read_clusters(path, partition_size="2kB").semdedup.pairwise().optimize(fuse=fuse)
        assert scores.npartitions > 4
        labels = dd.from_pandas(pd.DataFrame({"centroid": range(20), "name": range(20)}), npartitions=2)
        for right in (
            labels,
            labels.shuffle("centroid"),
            read_clusters(path, columns=["id", "centroid"]).drop_duplicates("centroid"),
        ):
            merged = scores.merge(right, on="centroid", how=how, broadcast=False)
            assert len(merged) == len(found := merged.compute()) == 400
            assert found.notna().all(axis=None)

    @pytest.mark.parametrize("name", [name for name, column in LAYOUTS.items() if column.dtype != object])
    def test_every_layout_of_embeddings(self, tmp_path: Path, run: int, name: str) -> None:
        column = LAYOUTS[name].reset_index(drop=True)
        frame = make_frame(column, [1, 0, 1, 1])
        scores = read_clusters(write_layout(tmp_path, by_cluster(frame))).semdedup.pairwise().compute()
        whole = pairwise_partition(frame, Columns(), make_strategy("hard"))
        pd.testing.assert_frame_equal(scores, whole, rtol=0, atol=1e-7)

    def test_files_without_rows(self, tmp_path: Path, small_runs: None) -> None:
        frame = make_frame(arrow_lists(np.eye(4), pa.float32()), [0, 0, 0, 1])
        path = write_layout(tmp_path, by_cluster(frame))
        for empty in ("centroid=0/z.parquet", "centroid=3/a.parquet", "centroid=4/a.parquet"):
            (path / empty).parent.mkdir(exist_ok=True)
            pq.write_table(pq.read_table(path / "centroid=0/part.0.parquet", partitioning=None)[:0], path / empty)
        ddf = read_clusters(path)
        assert ddf.npartitions == 1
        scores = ddf.semdedup.pairwise().compute()
        pd.testing.assert_frame_equal(scores, pairwise_partition(frame, Columns(), make_strategy("hard")))

    def test_clusters_that_are_not_the_folders(self, tmp_path: Path, small_runs: None) -> None:
        """One partition holds whole clusters of any column: those of another must not be parted by the folders."""
        rng = np.random.default_rng(0)
        frame = make_frame(arrow_lists(rng.standard_normal((30, 6)), pa.float32()), rng.integers(3, size=30))
        frame["label"] = rng.integers(4, size=30)
        ddf = read_clusters(write_layout(tmp_path, by_cluster(frame)))
        scores = ddf.semdedup.pairwise(cluster_field="label").compute()
        columns = Columns(cluster="label")
        pd.testing.assert_frame_equal(scores, pairwise_partition(frame, columns=columns, ranking=make_strategy("hard")))

    def test_files_that_are_not_in_folders(self, tmp_path: Path, small_runs: None) -> None:
        rng = np.random.default_rng(0)
        frame = make_frame(arrow_lists(rng.standard_normal((30, 6)), pa.float32()), np.repeat([0, 1, 2], 10))
        table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
        scores = read_clusters(tmp_path).semdedup.pairwise().compute()
        pd.testing.assert_frame_equal(scores, pairwise_partition(frame, Columns(), make_strategy("hard")))


class TestExpression:
    @pytest.fixture
    def ddf(self, tmp_path: Path) -> dd.DataFrame:
        rows = np.random.default_rng(1).standard_normal((40, 6))
        frame = make_frame(arrow_lists(rows, pa.float32()), np.arange(40) % 5)
        return read_clusters(write_layout(tmp_path, by_cluster(frame)), partition_size=1)

    def test_it_replaces_reading_only_where_nothing_comes_between(self, ddf: dd.DataFrame) -> None:
        for frame, is_read in ((ddf, True), (ddf[ddf.id > 5], False), (ddf.persist(), False)):
            expr = frame.semdedup.pairwise().optimize(fuse=False).expr
            assert bool(list(expr.find_operations(ScoresOfFiles))) == is_read
            assert bool(list(expr.find_operations(PairwiseScores))) != is_read

    def test_partitions_can_be_chosen(self, ddf: dd.DataFrame) -> None:
        scores = ddf.semdedup.pairwise()
        expected = scores.compute()
        expected = expected[expected.centroid.isin([1, 3])].reset_index(drop=True)
        for chosen in (
            scores.partitions[[1, 3]],
            scores.optimize(fuse=False).partitions[[1, 3]],
            scores.optimize(fuse=False).partitions[1:].partitions[[0, 2]],
        ):
            assert chosen.npartitions == 2
            pd.testing.assert_frame_equal(chosen.compute().reset_index(drop=True), expected)

    def test_it_knows_what_is_known_of_the_scores(self, ddf: dd.DataFrame) -> None:
        scores = ddf.semdedup.pairwise()
        (lowered,) = scores.optimize(fuse=False).expr.find_operations(ScoresOfFiles)
        pd.testing.assert_frame_equal(lowered._meta, scores._meta)
        assert lowered.divisions == scores.divisions
        claims = "unique_partition_mapping_columns_from_shuffle"
        assert getattr(lowered, claims) == getattr(scores.expr, claims) == {("centroid",)}

    def test_columns_of_the_scores_can_be_chosen(self, ddf: dd.DataFrame) -> None:
        scores = ddf.semdedup.pairwise()
        pd.testing.assert_frame_equal(scores[["max_id", "id"]].compute(), scores.compute()[["max_id", "id"]])

    def test_verbose_logs_each_partition(self, ddf: dd.DataFrame, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="dask_semdedup"):
            ddf.semdedup.pairwise(verbose=True).compute()
        assert caplog.text.count("8 rows in 1 clusters took") == 5


BAD: dict[str, tuple[dict[int, Any], dict[str, Any]]] = {
    "null": ({3: None, 27: None}, {}),
    "null elements": ({3: [1.0, None, 1.0], 27: [None] * 3}, {}),
    "NaN": ({3: [1.0, np.nan, 1.0], 27: [np.inf, 0.0, 0.0]}, {}),
    "another width": ({3: [1.0, 1.0], 27: [1.0] * 4}, {}),
    "another width in each of a cluster's rows": ({row: [1.0, 1.0] for row in range(20, 30)}, {}),
    "another width in most rows, not in the first ones": ({row: [1.0, 1.0] for row in range(10, 30)}, {}),
    "empty": ({3: [], 27: []}, {}),
    "a width that is not that asked for": ({}, {"embedding_dim": 5}),
    "null in the first row": ({row: None for row in range(10)}, {}),
}


@pytest.mark.parametrize(("bad", "options"), BAD.values(), ids=BAD)
def test_bad_rows_are_reported_as_if_all_had_been_read_at_once(
    tmp_path: Path, run: int, bad: dict[int, Any], options: dict[str, Any]
) -> None:
    rows = [bad.get(row, [1.0, float(row), 0.5]) for row in range(30)]
    column = pd.Series(pd.array(rows, dtype=pd.ArrowDtype(pa.list_(pa.float32()))))
    path = write_layout(tmp_path, by_cluster(make_frame(column, np.repeat([0, 1, 2], 10))))
    with pytest.raises(EmbeddingError) as whole:
        pairwise_partition(
            read_clusters(path).compute(),
            ranking=make_strategy("hard"),
            columns=Columns(),
            options=SearchOptions(**options),
        )
    with pytest.raises(EmbeddingError) as found:
        read_clusters(path).semdedup.pairwise(**options).compute()
    assert str(found.value) == str(whole.value)


class Peak:
    """Bytes allocated at most, beyond those of before, by Arrow and by Python and NumPy."""

    arrow = numpy = 0


@contextmanager
def measured() -> Iterator[Peak]:
    before, peak = pa.default_memory_pool(), Peak()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        yield peak
        peak.arrow, peak.numpy = pool.max_memory(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def test_a_partition_is_never_in_memory_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, n_clusters = 100 * 256 * 4, 40
    rows = np.random.default_rng(2).standard_normal((100 * n_clusters, 256)).astype(np.float32)
    frame = make_frame(arrow_lists(rows), np.repeat(np.arange(n_clusters), 100))
    ddf = read_clusters(write_layout(tmp_path, by_cluster(frame)))
    assert ddf.npartitions == 1
    scores = ddf.semdedup.pairwise()
    scores.compute()  # First uses take memory of their own.
    peaks = []
    for run in (2**25, 3 * cluster):
        monkeypatch.setattr(expressions, "RUN", run)
        with measured() as peak:
            scores.compute(scheduler="synchronous")
        peaks.append(peak)
    whole, in_runs = peaks
    assert whole.arrow > n_clusters * cluster
    assert whole.numpy > n_clusters * cluster
    assert in_runs.arrow < 8 * cluster
    assert in_runs.numpy < 8 * cluster
