"""Scores tell up to which eps they hold duplicates, and are asked for no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup import DataReadError, InvalidArgumentError, RankingStrategy, plots, read_clusters, read_table
from dask_semdedup.lazy.duplicates import EPS_GRID
from dask_semdedup.lazy.held import NOTE, Held, _eps_of, held
from dask_semdedup.steps.duplicates import threshold
from tests.data import by_cluster, make_frame, write_layout

BY_ID: dict[str, Any] = {"ranking_strategy": RankingStrategy(["id"])}

SEARCHES: dict[str, Callable[[dd.DataFrame, float], dd.DataFrame]] = {
    "of all rows": lambda ddf, eps: ddf.semdedup.pairwise(eps=eps, cluster_field=None, **BY_ID),
    "of clusters": lambda ddf, eps: ddf.semdedup.pairwise(eps=eps, **BY_ID),
    "against": lambda ddf, eps: ddf.semdedup.against(ddf, eps=eps),
    "against, of clusters": lambda ddf, eps: ddf.semdedup.against(ddf, eps=eps, cluster_field="centroid"),
    "selected": lambda ddf, eps: ddf.semdedup.pairwise(**BY_ID).semdedup.duplicates(eps),
    "filtered": lambda ddf, eps: (scores := ddf.semdedup.pairwise(**BY_ID))[
        (scores.centroid >= 0) & (scores.cosine_sim_score >= 1 - eps)
    ],
    "twice": lambda ddf, eps: ddf.semdedup.pairwise(eps=2 * eps, **BY_ID).semdedup.duplicates(eps),
}

ASKED: dict[str, Callable[[dd.DataFrame, dd.DataFrame, float], Any]] = {
    "duplicates": lambda _, scores, eps: scores.semdedup.duplicates(eps),
    "several": lambda _, scores, eps: scores.semdedup.duplicates([0.1, eps]),
    "eps_curve": lambda _, scores, eps: scores.semdedup.eps_curve([0.1, eps]),
    "remove": lambda ddf, scores, eps: ddf.semdedup.remove(scores, eps=eps),
}


@pytest.fixture
def ddf() -> dd.DataFrame:
    return dd.from_pandas(make_frame(3), npartitions=3)


def written(scores: dd.DataFrame, path: Path) -> dd.DataFrame:
    scores.semdedup.to_parquet(path)
    return read_table(path)


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_no_more_than_was_searched_for(ddf: dd.DataFrame, search: Any, tmp_path: Path) -> None:
    lazy = search(ddf, 0.1)
    for scores in (lazy, written(lazy, tmp_path / "scores"), lazy[["cosine_sim_score", "id", "max_id"]]):
        for ask in ASKED.values():
            with pytest.raises(InvalidArgumentError, match=r"only up to eps = 0.1, not at 0.3. Search.* larger eps"):
                ask(ddf, scores, 0.3)
            ask(ddf, scores, 0.05)
        assert len(scores.semdedup.duplicates(0.05)) == (lazy.compute()["cosine_sim_score"] >= threshold(0.05)).sum()
    assert len(lazy.semdedup.duplicates(0.1)) == len(lazy)


def test_groups_are_not_asked_for_more(ddf: dd.DataFrame) -> None:
    scores = ddf.semdedup.pairwise(eps=0.1, **BY_ID)
    with pytest.raises(InvalidArgumentError, match=r"only up to eps = 0.1, not at 0.3"):
        scores.semdedup.groups(0.3)
    assert len(scores.semdedup.groups(0.1)) == len(scores)


def test_figures_and_pairs_are_not_asked_for_more(ddf: dd.DataFrame) -> None:
    scores = ddf.semdedup.pairwise(eps=0.1, **BY_ID)
    for ask in (plots.pairs_around, plots.score_histogram, plots.duplicates_curve):
        with pytest.raises(InvalidArgumentError, match=r"only up to eps = 0.1, not at 0.3"):
            ask(scores, 0.3)
    line = plots.duplicates_curve(scores).axes[0].lines[0]
    assert max(line.get_xdata()) == 0.1


@pytest.mark.parametrize("clusters", ["centroid", None])
def test_scores_of_kept_rows_hold_for_one_eps(ddf: dd.DataFrame, clusters: str | None, tmp_path: Path) -> None:
    lazy = ddf.semdedup.pairwise(eps=0.1, duplicate_of="kept", cluster_field=clusters, **BY_ID)
    for scores in (lazy, written(lazy, tmp_path / "scores")):
        for eps in (0.05, 0.3):
            with pytest.raises(InvalidArgumentError, match=rf"'kept' hold for eps = 0.1 only, not at {eps}"):
                scores.semdedup.duplicates(eps)
        assert scores.semdedup.eps_curve()["eps"].compute().tolist() == [0.1]


@pytest.mark.parametrize("eps", [0.05, 0.12])
def test_the_curve_ends_with_the_search_and_shares_are_of_all_rows(ddf: dd.DataFrame, eps: float) -> None:
    all_scores = ddf.semdedup.pairwise(cluster_field=None, **BY_ID).persist()
    scores = ddf.semdedup.pairwise(eps=eps, cluster_field=None, **BY_ID)
    curve = scores.semdedup.eps_curve().compute()
    assert curve["eps"].tolist() == [*(value for value in EPS_GRID if value < eps), eps]
    pd.testing.assert_frame_equal(curve, all_scores.semdedup.eps_curve(curve["eps"]).compute())
    assert curve["share"].max() < 1


def test_the_number_of_rows_may_be_unknown(ddf: dd.DataFrame, tmp_path: Path) -> None:
    by_files = read_clusters(write_layout(tmp_path, by_cluster(make_frame(3)))).semdedup.pairwise(eps=0.1, **BY_ID)
    assert held(by_files) == Held(0.1, rows=len(ddf))
    some = by_files[by_files.id > 3]
    assert held(some) == Held(0.1)
    assert some.semdedup.eps_curve([0.1])["share"].isna().compute().all()


def test_rows_that_another_search_has_left_are_searched_anew(ddf: dd.DataFrame) -> None:
    kept = ddf.semdedup.deduplicate(0.1, **BY_ID)
    assert held(kept.semdedup.pairwise(**BY_ID)) == Held(2)
    assert held(kept.semdedup.pairwise(eps=0.2, **BY_ID)) == Held(0.2)  # Rows are not counted for this.


@pytest.mark.parametrize("search", [search for name, search in SEARCHES.items() if name != "filtered"])
def test_what_else_is_made_of_scores_tells_their_eps(ddf: dd.DataFrame, search: Any, tmp_path: Path) -> None:
    scores = search(ddf, 0.1)
    scores.compute().to_parquet(tmp_path / "scores.parquet")
    for made in (
        scores.persist(),
        scores.sample(frac=0.5),
        scores.assign(batch=1),
        scores.sort_values("cosine_sim_score"),
        scores.partitions[:1],
        scores.map_partitions(lambda part: part),
        scores.compute(),
        dd.from_pandas(scores.compute(), npartitions=2),
        pd.read_parquet(tmp_path / "scores.parquet"),
    ):
        assert held(made) == Held(0.1)
    with pytest.raises(InvalidArgumentError, match=r"only up to eps = 0.1, not at 0.3"):
        scores.persist().semdedup.duplicates(0.3)
    assert scores.persist().semdedup.eps_curve().compute()["eps"].max() == 0.1
    assert held(scores.repartition(npartitions=1).reset_index(drop=True)).eps == 0.1


def test_of_scores_of_all_rows_that_were_changed_nothing_is_known(ddf: dd.DataFrame) -> None:
    scores = ddf.semdedup.pairwise(**BY_ID)
    for made in (scores.persist(), scores.assign(batch=1), scores.compute()):
        assert held(made) is None
    labels = dd.from_pandas(pd.DataFrame({"id": range(5)}), npartitions=1)
    assert held(scores.semdedup.duplicates(0.1).merge(labels, on="id").compute()) is None
    assert held(scores.persist().semdedup.duplicates(0.1).persist()) == Held(0.1)


def test_the_default_eps_is_that_of_the_search(ddf: dd.DataFrame) -> None:
    scores = ddf.semdedup.pairwise(eps=0.1, cluster_field=None, **BY_ID)
    for made in (scores, scores.persist()):
        assert len(made.semdedup.duplicates()) == len(made.semdedup.groups()) == len(scores)
    kept = ddf.semdedup.pairwise(eps=0.1, cluster_field=None, duplicate_of="kept", **BY_ID)
    assert len(kept.semdedup.groups()) == len(kept)
    full = ddf.semdedup.pairwise(cluster_field=None, **BY_ID)
    assert len(full.semdedup.duplicates()) == len(full.semdedup.duplicates(0.01)) < len(scores)


def test_a_filter_tells_nothing_of_kept_rows(ddf: dd.DataFrame) -> None:
    kept = ddf.semdedup.pairwise(eps=0.1, duplicate_of="kept", cluster_field=None, **BY_ID)
    narrow = kept[kept.cosine_sim_score >= 0.99]
    assert held(narrow) == held(kept) == Held(0.1, "kept", len(ddf))
    with pytest.raises(InvalidArgumentError, match=r"hold for eps = 0.1 only, not at 0.01. Pass that eps"):
        narrow.semdedup.duplicates(0.01)
    with pytest.raises(InvalidArgumentError, match=r"hold for eps = 0.1 only"):
        plots.duplicates_curve(kept)


@pytest.mark.parametrize(("least", "eps"), [(-2, None), (-1, None), (float("nan"), None), (1, 0), (1.5, 0), (0.5, 0.5)])
def test_a_filter_of_any_bound(ddf: dd.DataFrame, tmp_path: Path, least: float, eps: float | None) -> None:
    scores = ddf.semdedup.pairwise(**BY_ID)
    some = scores[scores.cosine_sim_score >= least]
    assert held(some) == (Held(2) if eps is None else Held(eps, rows=len(ddf)))
    assert held(written(some, tmp_path)) == held(some)


def test_files_of_several_folders_tell_nothing(ddf: dd.DataFrame, tmp_path: Path) -> None:
    for name, eps in (("wide", 0.2), ("narrow", 0.01)):
        written(ddf.semdedup.pairwise(eps=eps, cluster_field=None, **BY_ID), tmp_path / name)
    assert held(read_table(tmp_path / "wide")) == Held(0.2, rows=len(ddf))
    assert held(read_table([tmp_path / "wide", tmp_path / "narrow"])) is None
    assert held(read_table(tmp_path)) is None
    assert held(read_table(tmp_path / "wide").partitions[:0]) is None


def test_files_without_duplicates_tell_what_was_compared(ddf: dd.DataFrame, tmp_path: Path) -> None:
    few = ddf.partitions[0][["id", "embeddings"]].head(3, compute=False)
    empty = few.semdedup.pairwise(eps=0, cluster_field=None, **BY_ID)
    read = written(empty, tmp_path / "none")
    assert len(read) == 0
    assert held(read) == held(empty) == Held(0, rows=3)
    assert read.semdedup.eps_curve([0]).compute()["share"].tolist() == [0]
    written(ddf.semdedup.pairwise(eps=0.2, cluster_field=None, **BY_ID), tmp_path / "wide")
    assert held(read_table([tmp_path / "none", tmp_path / "wide"])) is None


def test_figures_of_duplicates_alone_know_all_rows(ddf: dd.DataFrame) -> None:
    scores = ddf.semdedup.pairwise(eps=0.1, cluster_field=None, **BY_ID)
    [share] = scores.semdedup.eps_curve([0.1]).compute()["share"]
    assert plots.duplicates_curve(scores).axes[0].lines[0].get_ydata()[-1] == share < 1
    copies = ddf.semdedup.pairwise(eps=0, cluster_field=None, **BY_ID)
    assert set(plots.duplicates_curve(copies).axes[0].lines[0].get_xdata()) == {0}


def test_only_filters_by_the_score_count(ddf: dd.DataFrame) -> None:
    scores = ddf.semdedup.pairwise(**BY_ID)
    for predicate in (
        scores.max_id > 0.9,
        (1 - scores.cosine_sim_score) >= 0.9,
        (scores.cosine_sim_score >= 0.9) | (scores.id > 3),
    ):
        assert held(scores[predicate]) == Held(2)
    (in_memory,) = dask.persist(scores.semdedup.duplicates(0.1))
    assert held(in_memory) == Held(0.1)


@pytest.mark.parametrize("rule", ["any", "kept"])
@pytest.mark.parametrize("clusters", ["centroid", None])
def test_shares_are_unknown_rather_than_those_of_duplicates(ddf: dd.DataFrame, clusters: str | None, rule: str) -> None:
    lazy = ddf.semdedup.pairwise(eps=0.1, duplicate_of=rule, cluster_field=clusters, **BY_ID)
    (made,) = lazy.semdedup.eps_curve([0.1]).compute()["duplicates"]
    for scores in (lazy.persist(), lazy.assign(batch=1), dd.from_pandas(lazy.compute(), npartitions=2)):
        curve = scores.semdedup.eps_curve([0.1]).compute()
        assert curve["duplicates"].tolist() == [made]
        assert curve["share"].isna().all()
        if rule == "any":
            title = plots.duplicates_curve(scores, 0.1).axes[0].get_title(loc="left")
            assert title == f"Duplicates at eps = 0.1: {made:,}"
        assert plots.score_histogram(scores, 0.1).axes[0].get_title(loc="left") == f"{made:,} duplicates"


def test_scores_of_all_rows_show_that_they_are(ddf: dd.DataFrame) -> None:
    lazy = ddf.semdedup.pairwise(**BY_ID)
    for scores in (lazy, lazy.persist(), lazy.assign(batch=1)):
        curve = scores.semdedup.eps_curve([0.1]).compute()
        assert curve["share"].tolist() == [curve["duplicates"][0] / len(ddf)]
        assert f"of {len(ddf):,} rows" in plots.duplicates_curve(scores, 0.1).axes[0].get_title(loc="left")


def test_scores_against_another_frame_know_that_they_are_all(ddf: dd.DataFrame, tmp_path: Path) -> None:
    lazy = ddf.semdedup.against(ddf.assign(id=ddf["id"] + 10_000), eps=None)
    for scores in (lazy, written(lazy, tmp_path)):
        assert held(scores) == Held(2)
        assert scores.semdedup.eps_curve([0.1]).compute()["share"].tolist() == [1.0]


def test_clusters_are_not_those_of_duplicates(ddf: dd.DataFrame) -> None:
    with pytest.raises(InvalidArgumentError, match="duplicates alone, not the rows of each cluster"):
        plots.cluster_sizes(ddf.semdedup.pairwise(eps=0.1, **BY_ID))


def test_files_do_not_keep_what_no_longer_holds(ddf: dd.DataFrame, tmp_path: Path) -> None:
    scores = written(ddf.semdedup.pairwise(eps=0.2, cluster_field=None, **BY_ID), tmp_path / "wide")
    assert held(scores) == Held(0.2, rows=len(ddf))
    assert held(written(scores.semdedup.duplicates(0.1), tmp_path / "narrow")) == Held(0.1, rows=len(ddf))
    assert held(written(scores[["id"]].assign(cosine_sim_score=1.0), tmp_path / "made")) is None


@pytest.mark.parametrize("note", [b"{", b"3", b'{"eps": "x"}', b'{"eps": 9}', b'{"eps": 0.1, "other": 1}', b"\xff"])
def test_a_damaged_note_is_named(ddf: dd.DataFrame, tmp_path: Path, note: bytes) -> None:
    table = pa.Table.from_pandas(ddf.semdedup.pairwise(eps=0.2, cluster_field=None, **BY_ID).compute())
    pq.write_table(table.replace_schema_metadata({NOTE: note}), tmp_path / "scores.parquet")
    with pytest.raises(DataReadError, match=r"says in 'dask_semdedup\.scores'.*Write the scores again"):
        read_table(tmp_path / "scores.parquet").semdedup.duplicates(0.1)


@given(st.floats(0, 2))
def test_an_eps_is_told_from_its_threshold(eps: float) -> None:
    assert threshold(_eps_of(float(threshold(eps)))) == threshold(eps)
    assert _eps_of(float(threshold(round(eps, 3)))) == pytest.approx(round(eps, 3), abs=1e-9)
