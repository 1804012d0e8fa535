"""Filters of scores reach the search: the same rows as of all scores, and nowhere where others are needed too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_semdedup import InvalidArgumentError, MissingColumnsError, RankingStrategy, read_clusters
from dask_semdedup.lazy.pushdown import Searched
from dask_semdedup.steps.duplicates import find_duplicates, threshold
from tests.data import arrow_lists, by_cluster, make_frame, write_layout
from tests.strategies import id_columns, rows_and_segments, seeds

Frames = list[dd.DataFrame]


def together(*collections: Any) -> Any:
    """What `dask.compute` optimises."""
    return dask.base.collections_to_expr(collections).optimize(fuse=False)


def pushed(*collections: Any) -> list[float | None]:
    """Where each search stops that collections need when they are computed together."""
    searches = {expr._name: expr for expr in together(*collections).find_operations(Searched)}
    return [search.options.at_least for search in searches.values()]


def at(eps: float) -> float:
    return float(threshold(eps))


def source(path: Path, kind: str) -> dd.DataFrame:
    frame = make_frame(3)
    if kind == "files":
        return read_clusters(write_layout(path, by_cluster(frame)), partition_size="2kB")
    return dd.from_pandas(frame, npartitions=3)


@pytest.fixture(params=["files", "frame"])
def ddf(request: pytest.FixtureRequest, tmp_path: Path) -> dd.DataFrame:
    return source(tmp_path, request.param)


@pytest.fixture
def scores(ddf: dd.DataFrame) -> dd.DataFrame:
    return ddf.semdedup.pairwise()


# --- The same rows ---------------------------------------------------------------------------------------------------


@given(data=st.data(), case=rows_and_segments(max_segments=5, max_rows=20, max_width=6), rng=seeds())
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_a_search_at_eps_gives_what_is_left_of_all_scores(data: st.DataObject, case: Any, rng: Any) -> None:
    rows, segments = case
    if len(rows) == 0:
        return
    ids, dtype = data.draw(id_columns(len(rows)))
    frame = pd.DataFrame(
        {
            "id": pd.Series(ids, dtype=dtype),
            "embeddings": arrow_lists(rows.clip(-1e18, 1e18)),
            "centroid": rng.permutation(np.repeat(np.arange(len(segments) - 1), np.diff(segments))),
            "rank": rng.integers(5, size=len(rows)),
        }
    )
    ranking = RankingStrategy(["rank"])
    ddf = dd.from_pandas(frame, npartitions=data.draw(st.integers(1, 4)), sort=False)
    all_scores = ddf.semdedup.pairwise(ranking_strategy=ranking).compute()
    # Thresholds at scores that there are, and a float32 beside them.
    found = all_scores["cosine_sim_score"].to_numpy()
    near = [1 - float(score) + step for score in found[found > 0] for step in (-6e-8, 0, 6e-8)]
    eps = data.draw(st.sampled_from([0, 1e-3, 0.1, 0.999, 1, 1.5, 2, *near]).map(lambda eps: min(max(eps, 0), 2)))
    expected = find_duplicates(all_scores, eps)
    lazy = ddf.semdedup.pairwise(eps=eps, ranking_strategy=ranking)
    assert pushed(lazy) == [at(eps) if eps < 1 else None]
    pd.testing.assert_frame_equal(lazy.compute(), expected, check_exact=True)
    assert lazy._meta.dtypes.equals(expected.dtypes)


@pytest.mark.parametrize("partition_size", [1, "3kB", "128MiB"])
def test_of_files_of_any_plan(tmp_path: Path, partition_size: Any) -> None:
    ddf = read_clusters(write_layout(tmp_path, by_cluster(make_frame(4))), partition_size=partition_size)
    all_scores = ddf.semdedup.pairwise().compute()
    for eps in (0, 0.05, 0.3, 1):
        found = ddf.semdedup.pairwise(eps=eps).compute()
        pd.testing.assert_frame_equal(found, find_duplicates(all_scores, eps), check_exact=True)


@pytest.mark.parametrize("npartitions", [1, 3])
def test_against_another_frame(npartitions: int) -> None:
    frame, reference = make_frame(5), make_frame(6)
    reference["embeddings"] = pd.concat([frame["embeddings"][:40], reference["embeddings"][40:]])
    ours, theirs = (dd.from_pandas(side, npartitions=npartitions) for side in (frame, reference))
    all_scores = ours.semdedup.against(theirs, eps=None, cluster_field="centroid").compute()
    assert pushed(ours.semdedup.against(theirs, eps=None, cluster_field="centroid")) == [None]
    for eps in (0, 0.05, 0.3, 0.9, 1):
        lazy = ours.semdedup.against(theirs, eps=eps, cluster_field="centroid")
        assert pushed(lazy) == [at(eps) if eps < 1 else None]
        pd.testing.assert_frame_equal(lazy.compute(), find_duplicates(all_scores, eps), check_exact=True)


USES: dict[str, tuple[Callable[[Any], Any], float | None]] = {
    "duplicates": (lambda scores: scores.semdedup.duplicates(0.05), at(0.05)),
    "ids of duplicates": (lambda scores: scores.semdedup.duplicates(0.05)[["id"]], at(0.05)),
    "one column": (lambda scores: scores.semdedup.duplicates(0.05)["max_id"], at(0.05)),
    "the index": (lambda scores: scores.semdedup.duplicates(0.05).index, at(0.05)),
    "the number of rows": (lambda scores: scores.semdedup.duplicates(0.05).index.size, at(0.05)),
    "a partition": (lambda scores: scores.semdedup.duplicates(0.05).partitions[[0]], at(0.05)),
    "a literal": (lambda scores: scores[scores.cosine_sim_score >= 0.95], at(0.05)),
    "a literal that is rounded up": (
        lambda scores: scores[scores.cosine_sim_score >= 0.6],
        float(np.nextafter(np.float32(0.6), np.float32(0))),
    ),
    "a literal of float64": (
        lambda scores: scores[scores.cosine_sim_score >= np.float64(0.6)],
        float(np.nextafter(np.float32(0.6), np.float32(0))),
    ),
    "more than": (lambda scores: scores[scores.cosine_sim_score > 0.5], 0.5),
    "the other way round": (lambda scores: scores[0.5 <= scores.cosine_sim_score], 0.5),  # noqa: SIM300
    "a copy and no less": (lambda scores: scores[scores["cosine_sim_score"] >= 1], 1.0),
    "a filter of duplicates": (
        lambda scores: scores.semdedup.duplicates(0.1).pipe(lambda found: found[found.max_id % 2 == 0]),
        at(0.1),
    ),
    "duplicates of duplicates": (lambda scores: scores.semdedup.duplicates(0.3).semdedup.duplicates(0.1), at(0.3)),
    "a range": (
        lambda scores: scores[(scores.cosine_sim_score >= 0.5) & (scores.cosine_sim_score < 0.99)],
        0.5,
    ),
    "another condition": (lambda scores: scores[(scores.cosine_sim_score >= 0.5) & scores.max_id.isin(range(90))], 0.5),
    "ids of the others": (lambda scores: scores[~(scores.cosine_sim_score >= 0.5)]["id"], 0.5),
    "groups": (lambda scores: scores.semdedup.groups(0.05), at(0.05)),
    "a curve": (lambda scores: scores.semdedup.eps_curve(), at(0.3)),
    "flags": (lambda scores: scores.semdedup.duplicates([0.05, 0.1]), None),
    "the others": (lambda scores: scores[scores.cosine_sim_score < 0.5], None),
    "not the duplicates": (lambda scores: scores[~(scores.cosine_sim_score >= 0.5)], None),
    "or": (lambda scores: scores[(scores.cosine_sim_score >= 0.5) | (scores.id % 2 == 0)], None),
    "a filter by another column": (lambda scores: scores[scores.id % 2 == 0], None),
    "a filter by other scores": (
        lambda scores: scores[scores.cosine_sim_score >= scores.cosine_sim_score.mean()],
        None,
    ),
    "a maximum": (lambda scores: scores.cosine_sim_score.max(), None),
    "negative": (lambda scores: scores[scores.cosine_sim_score >= -0.1], None),
    "zero": (lambda scores: scores[scores.cosine_sim_score >= 0], None),
    "more than one": (lambda scores: scores[scores.cosine_sim_score >= 1.5], None),
    "a curve beyond 1": (lambda scores: scores.semdedup.eps_curve([0.1, 1]), None),
    "duplicates merged with all scores": (
        lambda scores: scores.semdedup.duplicates(0.05).merge(scores, on="id").max_id_y.sum(),
        None,
    ),
    "all scores in a function": (lambda scores: scores.map_partitions(lambda part: part.describe()), None),
}


def equal(found: Any, expected: Any) -> None:
    """Assert that a search for duplicates has changed nothing, not even the index."""
    if isinstance(found, pd.Index):
        pd.testing.assert_index_equal(found, expected)
    elif isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    elif isinstance(found, pd.Series):
        pd.testing.assert_series_equal(found, expected, check_exact=True)
    else:
        assert found == expected


@pytest.mark.parametrize(("use", "at_least"), USES.values(), ids=USES)
def test_uses_of_scores(tmp_path: Path, use: Callable[[Any], Any], at_least: float | None) -> None:
    scores = source(tmp_path, "files").semdedup.pairwise()
    # Dask sees nothing of where these come from.
    full = dd.from_delayed(scores.to_delayed(optimize_graph=False), meta=scores._meta, verify_meta=False)
    assert pushed(use(scores)) == [at_least]
    assert pushed(use(scores.optimize(fuse=False))) == [at_least]
    equal(use(scores).compute(), use(full).compute())


# --- Several uses ----------------------------------------------------------------------------------------------------


def test_the_largest_eps_of_those_computed_together(scores: dd.DataFrame) -> None:
    uses: list[Any] = [
        scores.semdedup.duplicates(0.05),
        scores.semdedup.duplicates(0.2)[["id", "cosine_sim_score"]],
        scores.semdedup.groups(0.1),
        scores.semdedup.duplicates(0.3)["id"],
        scores.semdedup.eps_curve([0, 0.15]),
        scores["centroid"].nunique(),
        scores["id"].size,
    ]
    alone = [use.compute() for use in uses]
    for order in (uses, uses[::-1], [*uses[3:], *uses[:3]]):
        assert pushed(*order) == [at(0.3)]
    for found, expected in zip(dask.compute(*uses), alone, strict=True):
        equal(found, expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        lambda scores: scores,
        lambda scores: scores.cosine_sim_score.sum(),
        lambda scores: scores[["max_id"]],
        lambda scores: scores.semdedup.duplicates([0.05, 0.1]),
        lambda scores: scores.semdedup.duplicates(1.2),
        lambda scores: scores[scores.max_id > 50],
    ],
)
def test_scores_that_are_used_otherwise_are_those_of_all_rows(scores: dd.DataFrame, other: Any, first: bool) -> None:
    uses = [other(scores), scores.semdedup.duplicates(0.05)]
    alone = [scores.compute().pipe(find_duplicates, 0.05), other(scores).compute()]
    uses, alone = (uses, alone[::-1]) if first else (uses[::-1], alone)
    assert pushed(*uses) == [None]
    for found, expected in zip(dask.compute(*uses), alone, strict=True):
        equal(found, expected)


def test_scores_that_are_kept_are_those_of_all_rows(scores: dd.DataFrame) -> None:
    full = scores.compute()
    kept = scores.persist()
    assert pushed(kept.semdedup.duplicates(0.05)) == []
    equal(kept.compute(), full)
    both = dask.persist(scores, scores.semdedup.duplicates(0.05))
    equal(both[0].compute(), full)
    equal(both[1].compute(), find_duplicates(full, 0.05))


def test_scores_that_are_written_are_those_of_all_rows(scores: dd.DataFrame, tmp_path: Path) -> None:
    written = scores.to_parquet(tmp_path / "out", compute=False)
    dask.compute(written, scores.semdedup.duplicates(0.05))
    equal(pd.read_parquet(tmp_path / "out").reset_index(drop=True), scores.compute().reset_index(drop=True))


@pytest.mark.parametrize("broadcast", [True, False])
def test_removal(ddf: dd.DataFrame, scores: dd.DataFrame, broadcast: bool) -> None:
    data = dd.from_pandas(make_frame(3).drop(columns="embeddings"), npartitions=4)
    dropped = find_duplicates(scores.compute(), 0.05)["id"]
    for duplicates, eps in ((scores, 0.05), (scores.semdedup.duplicates(0.05), None)):
        kept = data.semdedup.remove(duplicates, eps=eps, broadcast=broadcast)
        assert pushed(kept) == [at(0.05)]
        assert sorted(kept["id"].compute()) == sorted(set(data["id"].compute()) - set(dropped))
    # In the data itself, which the scores are made of.
    assert pushed(ddf.semdedup.remove(scores, eps=0.05)) == [at(0.05)]


def test_deduplication() -> None:
    ddf = dd.from_pandas(make_frame(3).drop(columns=["centroid", "cosine_dist_to_cent"]), npartitions=3)
    kept = ddf.semdedup.deduplicate(0.05, centroids=np.eye(8)[:3])
    assert pushed(kept) == [at(0.05)]
    clustered = ddf.semdedup.kmeans(centroids=np.eye(8)[:3])
    expected = ddf.semdedup.remove(clustered.semdedup.pairwise().persist(), eps=0.05)
    equal(kept.compute(), expected.compute())


def test_merges_of_duplicates(scores: dd.DataFrame) -> None:
    labels = dd.from_pandas(pd.DataFrame({"centroid": range(30), "name": range(30)}), npartitions=2)
    merged = scores.semdedup.duplicates(0.05).merge(labels, on="centroid", broadcast=False)
    assert pushed(merged) == [at(0.05)]
    expected = find_duplicates(scores.compute(), 0.05)
    assert sorted(merged["id"].compute()) == sorted(expected["id"])


# --- Arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [-0.1, 2.1, "0.1", [0.1], True])
def test_eps_is_one_distance(ddf: dd.DataFrame, eps: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="eps must be a number from 0 to 2"):
        ddf.semdedup.pairwise(eps=eps)


def test_missing_columns_are_named_as_without_eps(ddf: dd.DataFrame) -> None:
    with pytest.raises(MissingColumnsError, match="doc"):
        ddf.semdedup.pairwise(eps=0.1, id_field="doc")
