"""Rows compared with all others of a frame: what brute force in float64 finds, in whatever partitions they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dask
import dask.dataframe as dd
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from dask_semdedup import (
    EmbeddingError,
    InvalidArgumentError,
    MissingColumnsError,
    RankingStrategy,
    from_pandas,
    read_table,
)
from dask_semdedup.errors import DataReadError
from dask_semdedup.io.results import Results
from dask_semdedup.lazy import join
from dask_semdedup.lazy.blocks import PROCESS_BYTES
from dask_semdedup.search import index as search_index
from dask_semdedup.search import nearest_earlier
from dask_semdedup.search.index import PACES
from dask_semdedup.search.near import sketch_parts
from dask_semdedup.search.torch_sketch import COSTS
from dask_semdedup.steps.duplicates import threshold
from dask_semdedup.steps.join import mean_of
from tests import oracle
from tests.data import arrow_lists, objects
from tests.search.test_near import index_of
from tests.strategies import KINDS, id_columns, seeds

ROWS = 120


@contextmanager
def indexed(k: int, **settings: Any) -> Iterator[None]:
    """Frames are compared by sketches and so many cells, however few rows they have; by no sketches, if none."""

    def fit(sample: torch.Tensor, n: int, at_least: float, others: int | None = None, **_: Any) -> Any:
        return index_of(sample.cpu().numpy(), at_least, k) if k else None

    with ExitStack() as patches:
        patches.enter_context(patch("dask_semdedup.search.index.fit_index", fit))
        for least in ("LEAST_ROWS", "LEAST_ROWS_ON_GPU"):
            patches.enter_context(patch(f"dask_semdedup.search.index.{least}", 0 if k else 1 << 40))
        for name, value in settings.items():
            patches.enter_context(patch.object(join, name, value))
        yield


def frame_of(rows: np.ndarray, **columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"id": np.arange(len(rows)), **columns, "embeddings": arrow_lists(rows.astype(np.float32))})


def in_parts(frame: pd.DataFrame, cuts: list[int]) -> dd.DataFrame:
    """The frame in partitions that end at these places, of which some may be empty."""
    bounds = [0, *sorted(cuts), len(frame)]
    parts = [frame.iloc[start:stop] for start, stop in pairwise(bounds)]
    return dd.from_delayed([dask.delayed(part) for part in parts], meta=frame.iloc[:0], verify_meta=False)


def expected(frame: pd.DataFrame, order: np.ndarray, eps: float, duplicate_of: str) -> pd.DataFrame:
    """The duplicates among rows in this order, by brute force."""
    ranked = frame.iloc[order]
    rows, segments = np.array(ranked["embeddings"].tolist(), np.float32), np.array([0, len(frame)])
    if duplicate_of == "kept":
        scores, index = oracle.kept(rows, segments, float(threshold(eps)))
    else:
        scores, index = oracle.nearest_earlier(rows, segments)
    is_duplicate = (scores.astype(np.float32) >= threshold(eps)) & (index != np.arange(len(frame)))
    ids = ranked["id"].to_numpy()
    return pd.DataFrame({"id": ids, "max_id": ids[index], "cosine_sim_score": scores})[is_duplicate]


def assert_scores(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    assert list(found.columns) == ["id", "max_id", "cosine_sim_score"]
    assert found["id"].tolist() == wanted["id"].tolist()
    np.testing.assert_allclose(found["cosine_sim_score"], wanted["cosine_sim_score"], atol=2e-6, rtol=0)
    assert found["max_id"].tolist() == wanted["max_id"].tolist()


# --- What brute force finds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate_of", ["any", "kept"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(rng=seeds(), kind=st.sampled_from(KINDS), n=st.integers(1, ROWS), k=st.integers(0, 12), data=st.data())
def test_as_brute_force_finds(
    duplicate_of: str, rng: np.random.Generator, kind: Any, n: int, k: int, data: st.DataObject
) -> None:
    rows = kind(rng, n, 64).astype(np.float32).clip(-1e18, 1e18)
    ids, dtype = data.draw(id_columns(n))
    frame = frame_of(rows, rank=rng.integers(4, size=n))
    frame["id"] = pd.Series(ids, dtype=dtype)
    eps = data.draw(st.sampled_from([1e-3, 0.05, 0.2, 0.5]))
    # Scores that float64 and the search round to different sides of the threshold are no matter here.
    similarity = oracle.cosines(rows)
    if (abs(similarity - float(threshold(eps))) < 1e-7).any():
        return
    ddf = in_parts(frame, data.draw(st.lists(st.integers(0, n), max_size=5)))
    ranking = RankingStrategy(["rank"], ascending=data.draw(st.booleans()))
    order = ranking.order(frame, cluster_field=None, id_field="id")
    options = {"eps": eps, "cluster_field": None, "duplicate_of": duplicate_of, "ranking_strategy": ranking}
    with indexed(k, BLOCK_BYTES=data.draw(st.sampled_from([1, 10_000, 1 << 30]))):
        lazy = ddf.semdedup.pairwise(**options)
    found = lazy.compute(scheduler="sync")
    wanted = expected(frame, order, eps, duplicate_of)
    assert found["id"].tolist() == wanted["id"].tolist()
    np.testing.assert_allclose(found["cosine_sim_score"], wanted["cosine_sim_score"], atol=2e-6, rtol=0)
    assert found.dtypes.equals(lazy._meta.dtypes)
    position = pd.Series(np.arange(n), index=frame["id"].astype(str))
    own, chosen, best = (position[column.astype(str)] for column in (found["id"], found["max_id"], wanted["max_id"]))
    both = np.fmax(similarity, similarity.T)
    # Float64 may not tell two rows apart; of copies the first is named.
    assert (abs(both[own, chosen] - both[own, best]) <= oracle.EQUAL).all()
    assert not [1 for a, b in zip(chosen, best, strict=True) if a != b and np.array_equal(rows[a], rows[b])]


def clustered(n: int = 3000, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, 96))
    rows = centres[rng.integers(40, size=n)] + 0.7 * rng.standard_normal((n, 96))
    near = rng.integers(n // 2, size=n // 4)
    rows[-len(near) :] = rows[near] + rng.uniform(0, 0.3, (len(near), 1)) * rng.standard_normal((len(near), 96))
    return frame_of(rows[rng.permutation(n)], quality=rng.integers(10, size=n))


@pytest.mark.parametrize("which_to_keep", ["hard", "easy", "random"])
@pytest.mark.parametrize("duplicate_of", ["any", "kept"])
def test_the_same_bits_in_any_partitions_cells_and_blocks(which_to_keep: str, duplicate_of: str) -> None:
    frame = clustered(1500)
    options = {"which_to_keep": which_to_keep, "duplicate_of": duplicate_of, "cluster_field": None, "eps": 0.05}
    alone = in_parts(frame, []).semdedup.pairwise(**options).compute()
    assert len(alone) > 50
    shuffled = frame.sample(frac=1, random_state=0)
    cases = [
        ([], 1, 1 << 30),
        ([500], 25, 1 << 30),
        ([10, 10, 1000, 1250], 25, 50_000),
        (list(range(0, 1500, 300)), 1, 50_000),
    ]
    for cuts, k, block_bytes in cases:
        with indexed(k, BLOCK_BYTES=block_bytes, BLOCK_ROWS=350):
            found = in_parts(shuffled, cuts).semdedup.pairwise(**options)
        pd.testing.assert_frame_equal(found.compute(), alone)


def test_a_result_of_several_partitions_holds_the_same_rows() -> None:
    frame = clustered()
    alone = in_parts(frame, []).semdedup.pairwise(eps=0.1, cluster_field=None, which_to_keep="random").compute()
    with indexed(25, BIN_BYTES=frame["embeddings"].size * 96 * 4 // 3):
        found = in_parts(frame, [700, 1900]).semdedup.pairwise(eps=0.1, cluster_field=None, which_to_keep="random")
    assert found.npartitions > 2
    assert min(map(len, dask.compute(*found.to_delayed()))) > 10
    by_id = [scores.sort_values("id").reset_index(drop=True) for scores in (found.compute(), alone)]
    pd.testing.assert_frame_equal(*by_id)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_hard_and_easy_go_by_the_distance_to_the_mean(metric: str) -> None:
    frame = clustered(1000)
    unit = np.array(frame["embeddings"].tolist(), np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    mean = unit.mean(axis=0)
    distance = np.linalg.norm(unit - mean, axis=1) if metric == "l2" else 1 - unit @ mean / np.linalg.norm(mean)
    for which_to_keep, order in (("hard", np.argsort(-distance)), ("easy", np.argsort(distance))):
        with indexed(20):
            found = in_parts(frame, [150, 700]).semdedup.pairwise(
                eps=0.05, cluster_field=None, which_to_keep=which_to_keep, sim_metric=metric, duplicate_of="kept"
            )
        assert_scores(found.compute(), expected(frame, order, 0.05, "kept"))


def test_the_mean_depends_on_no_order() -> None:
    rng = np.random.default_rng(0)
    totals = [(rng.integers(-(2**40), 2**40, 64), int(rng.integers(1, 100))) for _ in range(20)]
    first = mean_of(totals)
    for _ in range(5):
        rng.shuffle(totals)
        np.testing.assert_array_equal(mean_of(totals), first)


def test_a_column_of_distances_is_not_what_hard_goes_by() -> None:
    """Distances to centroids say nothing among all rows; who names them as a strategy means them."""
    frame = clustered(400)
    frame["cosine_dist_to_cent"] = np.arange(400.0)
    ddf = in_parts(frame, [200])
    plain = in_parts(frame.drop(columns="cosine_dist_to_cent"), [200])
    options = {"eps": 0.05, "cluster_field": None, "duplicate_of": "kept"}
    pd.testing.assert_frame_equal(
        ddf.semdedup.pairwise(**options).compute(), plain.semdedup.pairwise(**options).compute()
    )
    by_column = ddf.semdedup.pairwise(ranking_strategy=RankingStrategy(["cosine_dist_to_cent"]), **options).compute()
    assert_scores(by_column, expected(frame, np.arange(400), 0.05, "kept"))


def test_scores_of_all_rows_are_those_of_one_cluster() -> None:
    frame = clustered(500).assign(centroid=7)
    ddf = in_parts(frame, [100, 300])
    options = {"ranking_strategy": RankingStrategy(["quality"])}
    alone = ddf.semdedup.pairwise(**options).drop(columns="centroid").compute()
    completely = ddf.semdedup.pairwise(cluster_field=None, **options)
    pd.testing.assert_frame_equal(completely.compute(), alone)
    # Who filters them takes the search at that similarity.
    (search,) = completely.semdedup.duplicates(0.1).optimize(fuse=False).find_operations(join.CompleteScores)
    assert search.options.at_least == pytest.approx(0.9)


# --- Against another frame -------------------------------------------------------------------------------------------


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(rng=seeds(), kind=st.sampled_from(KINDS), n=st.integers(2, ROWS), k=st.integers(0, 12), data=st.data())
def test_against_as_brute_force_finds(rng: np.random.Generator, kind: Any, n: int, k: int, data: st.DataObject) -> None:
    rows = kind(rng, n, 64).astype(np.float32).clip(-1e18, 1e18)
    similarity = oracle.cosines(rows)
    if (abs(similarity - 0.9) < 1e-7).any():
        return
    half = data.draw(st.integers(1, n - 1))
    queries, corpus = frame_of(rows[half:]), frame_of(rows[:half]).rename(columns={"id": "key"})
    ours = in_parts(queries, data.draw(st.lists(st.integers(0, n - half), max_size=3)))
    theirs = in_parts(corpus, data.draw(st.lists(st.integers(0, half), max_size=3)))
    with indexed(k, BLOCK_BYTES=data.draw(st.sampled_from([1, 1 << 30]))):
        lazy = ours.semdedup.against(theirs, eps=0.1, reference_id_field="key")
    found = lazy.compute(scheduler="sync")
    best = similarity[half:, :half].max(axis=1)
    wanted = np.flatnonzero(best >= 0.9)
    assert found["id"].tolist() == wanted.tolist()
    np.testing.assert_allclose(found["cosine_sim_score"], best[wanted], atol=2e-6, rtol=0)
    chosen = similarity[half + wanted, found["max_id"].to_numpy(np.int64)]
    assert (best[wanted] - chosen <= oracle.EQUAL).all()
    assert found.dtypes.equals(lazy._meta.dtypes)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("eps", [0.05, None])
def test_rows_that_are_not_as_wide_as_the_reference_are_told_whose_width_is_expected(k: int, eps: float | None) -> None:
    wide = np.random.default_rng(0).normal(size=(ROWS, 8))
    ours, theirs = in_parts(frame_of(wide[:, :5]), [50]), in_parts(frame_of(wide), [70])
    message = r"rows with width 5, where 8 is expected, that of the reference, in the frame that is compared with it"
    with indexed(k), pytest.raises(EmbeddingError, match=message):
        ours.semdedup.against(theirs, eps=eps).compute()


def test_groups_of_scores_against_another_frame_are_refused() -> None:
    frame = clustered(100)
    ddf = in_parts(frame, [])
    with pytest.raises(InvalidArgumentError, match="against"):
        ddf.semdedup.against(ddf, eps=0.1).semdedup.groups(0.1)


# --- Lazily, and from files ------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, pd.DataFrame]:
    frame = clustered()
    for number, part in enumerate(np.array_split(np.arange(len(frame)), 5)):
        frame.iloc[part].to_parquet(tmp_path / f"{number}.parquet", index=False)
    return tmp_path, frame


def test_files_are_read_twice_and_columns_only_as_needed(files: tuple[Path, pd.DataFrame]) -> None:
    path, _ = files
    with indexed(20):
        lazy = read_table(path).semdedup.pairwise(eps=0.05, cluster_field=None, which_to_keep="random")
    seen: list[list[str]] = []

    def spy(self: Any, partition: Any, columns: Any) -> Any:
        seen.append(sorted(columns))
        return self.reader.read(partition, columns)

    with patch("dask_semdedup.lazy.tables.ReadPart.__call__", spy):
        lazy.compute(scheduler="sync")
    assert seen == [["embeddings", "id"]] * (2 * read_table(path).npartitions)


def test_what_is_persisted_is_not_computed_again(files: tuple[Path, pd.DataFrame]) -> None:
    path, _ = files
    ddf = read_table(path).persist()
    with indexed(20):
        lazy = ddf.semdedup.pairwise(eps=0.05, cluster_field=None, which_to_keep="random")
    with patch("dask_semdedup.lazy.tables.ReadPart.__call__") as read:
        assert len(lazy.compute()) > 0
    assert not read.called


def test_nothing_but_a_sample_is_read_at_once(files: tuple[Path, pd.DataFrame]) -> None:
    path, _ = files
    ddf = read_table(path)
    with indexed(20), patch("dask_semdedup.lazy.join.sample_embeddings", wraps=join.sample_embeddings) as sampled:
        ddf.semdedup.pairwise(eps=0.05, cluster_field=None)
        assert sampled.call_count == 1
        ddf.semdedup.pairwise(cluster_field=None)
        assert sampled.call_count == 1


def test_a_worker_that_cannot_hold_a_partition_is_refused(files: tuple[Path, pd.DataFrame]) -> None:
    ddf = read_table(files[0])
    with indexed(20):
        plan = ddf.semdedup.plan(eps=0.05)
        assert plan.task_bytes >= plan.partition_rows * 4 * plan.width > 0
        fits = PROCESS_BYTES + plan.task_bytes
        with patch.object(join, "least_limit", lambda: fits):
            assert ddf.semdedup.plan(eps=0.05).tasks == plan.tasks
        message = rf"largest partition has {plan.partition_rows:,} rows.* a worker has .*Make partitions smaller"
        with (
            patch.object(join, "least_limit", lambda: fits - plan.task_bytes),
            pytest.raises(InvalidArgumentError, match=message),
        ):
            ddf.semdedup.pairwise(eps=0.05, cluster_field=None)


def test_few_comparisons_are_ready_where_workers_cannot_hold_all_sketches(files: tuple[Path, pd.DataFrame]) -> None:
    ddf = read_table(files[0])
    with indexed(20, BLOCK_BYTES=1), patch.object(join, "threads_of_workers", lambda: 3):
        plan, wanted = ddf.semdedup.plan(eps=0.05), ddf.semdedup.pairwise(eps=0.05, cluster_field=None)
        assert plan.at_once == 0
        with patch.object(join, "task_bytes", lambda: plan.sketch_bytes - 1):
            assert ddf.semdedup.plan(eps=0.05).at_once == 6
            scores = ddf.semdedup.pairwise(eps=0.05, cluster_field=None)
    compared = {key: task for key, task in scores.optimize().dask.items() if str(key[0]).startswith("compare-")}
    assert len(compared) == plan.tasks > 6
    assert sum(compared.keys().isdisjoint(task.dependencies) for task in compared.values()) == 6
    pd.testing.assert_frame_equal(scores.compute(), wanted.compute())


@pytest.mark.parametrize(("seconds", "tasks"), [(0, 2), (2, 4), (60, 8), (600, 20)])
def test_comparisons_that_take_longer_are_more_tasks(
    files: tuple[Path, pd.DataFrame], seconds: float, tasks: int
) -> None:
    """A task takes a second on one of the two cores that seconds are of, or up to a minute where they are many."""
    with indexed(200, TASKS=(2, 8)):
        fit = search_index.fit_index

        def slow(*args: Any, **options: Any) -> Any:
            return replace(fit(*args, **options), seconds=seconds)

        with patch.object(search_index, "fit_index", slow):
            assert read_table(files[0]).semdedup.plan(eps=0.05).tasks == tasks


def test_deduplicate_keeps_what_the_rule_keeps(files: tuple[Path, pd.DataFrame]) -> None:
    path, frame = files
    ranking = RankingStrategy(["quality"])
    order = ranking.order(frame, cluster_field=None, id_field="id")
    for duplicate_of in ("kept", "any"):
        dropped = set(expected(frame, order, 0.1, duplicate_of)["id"])
        with indexed(20):
            kept = read_table(path).semdedup.deduplicate(
                eps=0.1, ranking_strategy=ranking, **({} if duplicate_of == "kept" else {"duplicate_of": "any"})
            )
        found = kept.compute()
        assert found["id"].tolist() == [name for name in frame["id"] if name not in dropped]
        assert list(found.columns) == ["id", "quality", "embeddings"]


def test_every_dropped_row_has_a_kept_near_one() -> None:
    frame = clustered()
    with indexed(20):
        scores = in_parts(frame, [1000]).semdedup.pairwise(eps=0.2, cluster_field=None, duplicate_of="kept").compute()
        loose = in_parts(frame, [1000]).semdedup.pairwise(eps=0.2, cluster_field=None).compute()
    assert not set(scores["max_id"]) & set(scores["id"])
    assert set(scores["id"]) < set(loose["id"])
    groups = dd.from_pandas(scores, npartitions=2).semdedup.groups(eps=0.2).compute()
    assert groups["kept_id"].tolist() == scores["max_id"].tolist()


def test_within_clusters_kept_rows_are_those_of_each_cluster() -> None:
    frame = clustered(600)
    frame["centroid"] = frame["id"] % 3
    ranking = RankingStrategy(["quality"])
    found = in_parts(frame, [250]).semdedup.pairwise(eps=0.2, ranking_strategy=ranking, duplicate_of="kept").compute()
    for cluster, part in frame.groupby("centroid"):
        part = part.reset_index(drop=True)
        order = ranking.order(part, cluster_field=None, id_field="id")
        wanted = expected(part, order, 0.2, "kept")
        assert_scores(found[found["centroid"] == cluster].drop(columns="centroid"), wanted)


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_on_every_scheduler(files: tuple[Path, pd.DataFrame], scheduler: str) -> None:
    path, frame = files
    with indexed(20):
        lazy = read_table(path).semdedup.pairwise(eps=0.05, cluster_field=None, duplicate_of="kept")
    found = lazy.compute(scheduler=scheduler)
    alone = in_parts(frame, []).semdedup.pairwise(eps=0.05, cluster_field=None, duplicate_of="kept").compute()
    pd.testing.assert_frame_equal(found, alone)


def test_dense_groups_and_copies_are_no_trouble() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4000, 64)).astype(np.float32)
    rows[:1500] = rows[0]
    rows[1500:2500] = rows[1500] + 1e-3 * rng.standard_normal((1000, 64))
    frame = frame_of(rows[rng.permutation(4000)])
    ranking = RankingStrategy(["id"])
    for duplicate_of in ("any", "kept"):
        options = {"eps": 0.05, "cluster_field": None, "ranking_strategy": ranking, "duplicate_of": duplicate_of}
        with indexed(30):
            found = in_parts(frame, [1000, 2200]).semdedup.pairwise(**options).compute()
        unit = torch.from_numpy(np.array(frame["embeddings"].tolist(), np.float32))
        if duplicate_of == "any":
            scores, index = nearest_earlier(unit, torch.tensor([0, 4000]))
            is_duplicate = (scores >= float(threshold(0.05))).numpy()
            assert found["id"].tolist() == np.flatnonzero(is_duplicate).tolist()
            assert found["max_id"].tolist() == index.numpy()[is_duplicate].tolist()
        else:
            assert len(found) == 2498
            assert found["max_id"].nunique() == 2


def test_the_plan_is_near_what_is_done(files: tuple[Path, pd.DataFrame]) -> None:
    path, frame = files
    ddf = read_table(path)
    small = ddf.semdedup.plan(eps=0.05)
    assert (small.rows, small.index, small.pairs) == (3000, None, 3000 * 2999 / 2)
    assert "all rows in one task" in repr(small)
    assert small.seconds is None
    assert "0.05" in repr(small)
    assert ddf.semdedup.plan(eps=2).rows == 3000
    with patch("dask_semdedup.search.index.LEAST_ROWS", 0), patch.dict(PACES, cpu=PACES["cpu"]._replace(again=-1e15)):
        plan = ddf.semdedup.plan(eps=0.05)
    assert plan.index is not None
    rows = torch.from_numpy(np.array(frame["embeddings"].tolist(), np.float32))
    [part] = sketch_parts(0, rows, plan.index)
    members, visitors = np.diff(part.members), np.diff(part.visits[1])
    assert plan.pairs == pytest.approx((members * (members / 2 + visitors)).sum(), rel=0.25)
    assert plan.skipped == pytest.approx(1 - plan.pairs / (3000 * 2999 / 2))
    assert plan.tasks == len(list(plan.comparisons())) > 1
    for word in ("3,000 x 96", "pairs skipped", "cells", "plus reading the rows twice"):
        assert word in repr(plan)
    assert re.search(
        r"memory of a worker +.* for each thread, plus \d+\.00 MiB for each process, at least 1", repr(plan)
    )
    assert f"{plan.index.longer.size} numbers for a row of 96, " in repr(plan)
    assert f"of their first {plan.index.sketcher.size} numbers" in repr(plan)
    with patch("dask_semdedup.search.index.LEAST_ROWS", 0):
        together = ddf.semdedup.plan(eps=0.5)
    assert together.index is None
    assert together.seconds == pytest.approx(together.pairs * (COSTS.pair + 64 * COSTS.pair_value) / 1e12)
    assert "s, plus reading the rows\n" in repr(together)


# --- Frames that are computed more than once -------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["order", "rows"])
def test_rows_that_are_others_when_they_are_read_again_are_noticed(change: str, tmp_path: Path) -> None:
    """They were not: no duplicate was found."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 64))
    rows[200:] = rows[:100] + 0.01 * rng.standard_normal((100, 64))
    frame = frame_of(rows)
    frame.to_parquet(tmp_path / "rows.parquet", row_group_size=150)
    read = read_table(tmp_path / "rows.parquet", partition_size=1)

    def another(part: pd.DataFrame) -> pd.DataFrame:
        return part.sample(frac=1 if change == "order" else 0.9, random_state=rng.integers(1 << 30))

    ddf = read.map_partitions(another, meta=read._meta)
    with indexed(6):
        with pytest.raises(
            DataReadError, match=r"rows, was computed twice, and its rows or their order differ. Persist"
        ):
            ddf.semdedup.pairwise(eps=0.05, cluster_field=None).compute()
        with pytest.raises(DataReadError, match=r"computed twice"):
            read.semdedup.against(ddf, eps=0.05).compute()
        if change == "order":
            assert len(ddf.persist().semdedup.pairwise(eps=0.05, cluster_field=None)) == 100


@pytest.mark.parametrize("n_clusters", [None, 2])
@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.filterwarnings("ignore:k-means is fitted to")
def test_kept_rows_may_be_optimised_and_then_computed(k: int, n_clusters: int | None) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 64))
    rows[200:] = rows[:100] + 0.01 * rng.standard_normal((100, 64))
    ddf = from_pandas(frame_of(rows, text="a"), npartitions=2)
    with indexed(k):
        kept = ddf.semdedup.deduplicate(0.05, n_clusters)
        wanted = kept["id"].compute().tolist()
        assert kept.optimize()["id"].compute().tolist() == wanted
        assert [row.id for row in kept.itertuples()] == wanted
        assert kept.optimize().partitions[0]["id"].compute().tolist() == wanted[: len(kept.partitions[0])]


# --- Results that are saved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_mean", [True, False])
def test_a_comparison_goes_on_from_what_is_saved(tmp_path: Path, by_mean: bool) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 64))
    rows[200:] = rows[:100] + 0.01 * rng.standard_normal((100, 64))
    rows[150] = rows[50]
    ddf = in_parts(frame_of(rows), [100, 100, 180])
    options = {} if by_mean else {"ranking_strategy": RankingStrategy(["id"])}
    results = Results(str(tmp_path / "results"))
    with indexed(6, BLOCK_BYTES=1, SAVED_SECONDS=0):
        lazy = ddf.semdedup.pairwise(eps=0.05, cluster_field=None, **options)
        wanted = lazy.compute()
        saving, saved, tasks = join.saving_results(lazy, results)
        assert (saved, tasks) == (0, saving.expr.find_operations(join.CompleteScores).__next__().plan.tasks)
        pd.testing.assert_frame_equal(saving.compute(), wanted)
        [folder] = (tmp_path / "results").iterdir()
        assert len(list(folder.iterdir())) == tasks + ddf.npartitions
        for path in (folder / "sketch-1.npz", folder / "compare-0.npz", folder / "compare-2.npz"):
            path.unlink()
        calls: list[str] = []

        def counting(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(function.__name__)
                return function(*args, **kwargs)

            return call

        with ExitStack() as patches:
            for name in ("sketch_partition", "find_near_pairs"):
                patches.enter_context(patch.object(join, name, counting(getattr(join, name))))
            again, saved, _ = join.saving_results(lazy, results)
            pd.testing.assert_frame_equal(again.compute(), wanted)
        assert saved == tasks - 2
        assert sorted(calls) == ["find_near_pairs", "find_near_pairs", "sketch_partition"]


def test_short_comparisons_save_nothing(tmp_path: Path) -> None:
    ddf = in_parts(frame_of(np.random.default_rng(0).standard_normal((300, 64))), [100])
    for k in (0, 6):
        with indexed(k):
            lazy = ddf.semdedup.pairwise(eps=0.05, cluster_field=None)
            saving, *counts = join.saving_results(lazy, Results(str(tmp_path / "results")))
            saving.compute()
        assert counts == [0, 0]
    assert not (tmp_path / "results").exists()


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_a_frame_that_is_planned_is_shown_in_a_line() -> None:
    rows = np.eye(4)
    ddf = in_parts(frame_of(rows), [2])
    plan = ddf.semdedup.plan(0.05)
    assert repr(plan) == str(plan)
    assert len(str(plan).splitlines()) > 2
    found = ddf.semdedup.pairwise(eps=0.05, cluster_field=None)
    for lazy in (found, ddf.semdedup.against(ddf, eps=0.05), found.semdedup.duplicates(0.01)["id"]):
        assert repr(lazy).splitlines()[-1].startswith("Expr=")
        assert len(str(lazy.expr).splitlines()) == 1
        assert not any(line.startswith("search ") for line in lazy.expr._tree_repr_lines())


def test_kept_needs_an_eps_below_one() -> None:
    ddf = in_parts(clustered(100), [])
    for eps in (None, 1, 2):
        with pytest.raises(InvalidArgumentError, match=r"needs an eps below 1.* or duplicate_of='any'\.") as error:
            ddf.semdedup.pairwise(eps=eps, cluster_field=None, duplicate_of="kept")
        assert error.value.parameters == ("duplicate_of", "eps")
    with pytest.raises(InvalidArgumentError, match="duplicate_of must be one of 'any', 'kept', not 'all'"):
        ddf.semdedup.deduplicate(eps=0.1, duplicate_of="all")


def test_options_of_a_fit_without_clusters_are_refused() -> None:
    ddf = in_parts(clustered(100), [])
    for method in (ddf.semdedup.deduplicate, lambda **options: ddf.semdedup.against(ddf, **options)):
        with pytest.raises(InvalidArgumentError, match="max_iter would have no effect"):
            method(max_iter=3)


def test_missing_columns_are_named_before_anything_is_read() -> None:
    ddf = in_parts(clustered(100), [])
    with pytest.raises(MissingColumnsError, match="vectors"):
        ddf.semdedup.deduplicate(embedding_field="vectors")
    with pytest.raises(MissingColumnsError, match="score"):
        ddf.semdedup.pairwise(eps=0.1, cluster_field=None, ranking_strategy=RankingStrategy(["score"]))


@pytest.mark.parametrize("k", [0, 5])
def test_bad_rows_are_named(k: int) -> None:
    frame = clustered(200)
    rows = frame["embeddings"].tolist()
    rows[150] = [float("nan"), *rows[150][1:]]
    frame["embeddings"] = arrow_lists(np.array(rows, np.float32))
    ddf = in_parts(frame, [100])
    with pytest.raises(EmbeddingError, match=r"1 row .*150"), indexed(k):
        ddf.semdedup.pairwise(eps=0.1, cluster_field=None).compute(scheduler="sync")


def test_partitions_of_another_width_are_named() -> None:
    wide, narrow = clustered(200), frame_of(np.random.default_rng(0).standard_normal((100, 64)))
    parts = [dask.delayed(wide), dask.delayed(narrow.assign(id=narrow["id"] + 1000, quality=0)[wide.columns])]
    ddf = dd.from_delayed(parts, meta=wide.iloc[:0], verify_meta=False)
    with pytest.raises(EmbeddingError, match=r"(64|96)"), indexed(5):
        ddf.semdedup.pairwise(eps=0.1, cluster_field=None).compute(scheduler="sync")


def test_embeddings_may_be_objects_and_frames_may_be_empty() -> None:
    frame = clustered(300)
    alone = in_parts(frame, []).semdedup.pairwise(eps=0.1, cluster_field=None).compute()
    with dask.config.set({"dataframe.convert-string": False}), indexed(5):
        as_objects = frame.assign(embeddings=objects(list(np.array(frame["embeddings"].tolist(), np.float32))))
        found = in_parts(as_objects, [100, 100]).semdedup.pairwise(eps=0.1, cluster_field=None).compute()
    pd.testing.assert_frame_equal(found, alone)
    nothing = in_parts(frame.iloc[:0], [0]).semdedup.pairwise(eps=0.1, cluster_field=None)
    assert len(nothing.compute()) == 0
    assert nothing.compute().dtypes.equals(alone.dtypes)
