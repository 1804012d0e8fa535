"""Scores in blocks of rows: those of the whole partition, bit for bit, wherever it is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dask_semdedup.errors import ClusterError, EmbeddingError, ZeroEmbeddingWarning
from dask_semdedup.frames.columns import Columns, SearchOptions
from dask_semdedup.steps.blocks import kept_in_blocks, rank_rows, score_block, scores_of_blocks
from dask_semdedup.steps.pairwise import pairwise_partition
from dask_semdedup.steps.ranking import RankingStrategy, make_strategy
from tests import oracle
from tests.data import GOLDEN, arrow_lists
from tests.strategies import KINDS, id_columns, rows_and_segments, seeds

pytestmark = pytest.mark.filterwarnings("ignore::dask_semdedup.errors.ZeroEmbeddingWarning")

COLUMNS = Columns()
RANKINGS = [
    make_strategy("hard"),
    make_strategy("easy"),
    make_strategy("random"),
    RankingStrategy(["quality", "cosine_dist_to_cent"], ascending=[False, True]),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Searches of a few rows wait longer for threads than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_blocks(
    frame: pd.DataFrame, cuts: Sequence[int], ranking: RankingStrategy, options: SearchOptions, step: int = 5
) -> tuple[pd.DataFrame, list[list[int]]]:
    """Scores of a frame that is cut at these rows, and which rows were read, by block."""
    blocks = [slice(*ends) for ends in pairwise(cuts)]
    ranked = rank_rows(frame.drop(columns="embeddings"), COLUMNS, ranking)
    reads: list[list[int]] = []

    def read(slices: Sequence[slice]) -> Iterator[pd.DataFrame]:
        reads[-1] += [row for rows in slices for row in range(rows.start, rows.stop)]
        for rows in slices:
            for start in range(rows.start, rows.stop, step):
                yield frame[["embeddings"]].iloc[start : min(start + step, rows.stop)]

    answers = []
    for block in blocks:
        reads.append([])
        answers.append(score_block(read, ranked, block, blocks, COLUMNS, options))
    kept = None
    if options.duplicate_of == "kept":
        reads.append([])
        kept = kept_in_blocks(read, ranked, blocks, answers, COLUMNS, options)
    return scores_of_blocks(ranked, answers, kept), reads


def assert_same_bits(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=0)
    bits = [frame.cosine_sim_score.to_numpy().view(np.int32) for frame in (found, expected)]
    np.testing.assert_array_equal(*bits)


def make_frame(rows: np.ndarray, clusters: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "id": rng.permutation(len(rows)),
            "embeddings": arrow_lists(rows),
            "centroid": clusters,
            "cosine_dist_to_cent": rng.integers(4, size=len(rows)) / np.float32(8),
            "quality": rng.integers(3, size=len(rows)),
        }
    )
    return frame.iloc[rng.permutation(len(rows))].reset_index(drop=True)


@st.composite
def cut(draw: st.DrawFn, n: int) -> list[int]:
    return [0, *sorted(draw(st.sets(st.integers(1, max(1, n - 1)), max_size=3)) - {n}), n]


@settings(max_examples=40)
@given(data=st.data(), case=rows_and_segments(), rng=seeds(), ranking=st.sampled_from(RANKINGS))
def test_any_clusters_cut_anywhere(data: st.DataObject, case: Any, rng: np.random.Generator, ranking: Any) -> None:
    rows, segments = case
    if len(rows) == 0:
        return
    frame = make_frame(rows, np.repeat(np.arange(len(segments) - 1), np.diff(segments)), rng)
    found, _ = in_blocks(frame, data.draw(cut(len(frame))), ranking, SearchOptions(), data.draw(st.integers(1, 40)))
    assert_same_bits(found, pairwise_partition(frame, COLUMNS, ranking))


@settings(max_examples=30)
@given(
    rng=seeds(),
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 400),
    count=st.integers(1, 4),
    at_least=st.sampled_from([None, 0.5, 1.0]),
)
@example(rng=np.random.default_rng(0), kind=KINDS[-1], n=30, count=30, at_least=None)
def test_one_large_cluster(rng: np.random.Generator, kind: Any, n: int, count: int, at_least: float | None) -> None:
    rows = kind(rng, n, 24).astype(np.float32)
    frame = make_frame(rows, np.zeros(n, np.int64), rng)
    options, ranking = SearchOptions(at_least=at_least), make_strategy("hard")
    cuts = [n * number // count for number in range(count + 1)]
    found, _ = in_blocks(frame, sorted(set(cuts)), ranking, options, 64)
    assert_same_bits(found, pairwise_partition(frame, COLUMNS, ranking, options))
    if at_least is None:
        ranked = ranking.rank_cluster(frame)
        positions = pd.Series(range(n), ranked.id)
        scores, index = (found.cosine_sim_score.to_numpy(), positions[found.max_id].to_numpy())
        oracle.assert_nearest_earlier(np.stack(ranked.embeddings), [0, n], scores, index)


@settings(max_examples=40)
@given(
    data=st.data(),
    rng=seeds(),
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 120),
    at_least=st.sampled_from([0.2, 0.6, 1.0]),
)
def test_only_kept_rows(data: st.DataObject, rng: np.random.Generator, kind: Any, n: int, at_least: float) -> None:
    frame = make_frame(kind(rng, n, 4).astype(np.float32), rng.integers(2, size=n), rng)
    options = SearchOptions(at_least=at_least, duplicate_of="kept")
    found, _ = in_blocks(frame, data.draw(cut(n)), RANKINGS[0], options)
    assert_same_bits(found, pairwise_partition(frame, COLUMNS, RANKINGS[0], options))


@settings(max_examples=25)
@given(data=st.data(), rng=seeds())
def test_ids_of_any_dtype(data: st.DataObject, rng: np.random.Generator) -> None:
    n = data.draw(st.integers(1, 30))
    frame = make_frame(KINDS[1](rng, n, 3).astype(np.float32), rng.integers(2, size=n), rng)
    ids, dtype = data.draw(id_columns(n))
    frame["id"] = pd.Series(ids, dtype=dtype)
    found, _ = in_blocks(frame, data.draw(cut(n)), RANKINGS[2], SearchOptions())
    assert_same_bits(found, pairwise_partition(frame, COLUMNS, RANKINGS[2]))


def test_pairs_of_blocks_that_share_a_cluster_meet_once() -> None:
    rng = np.random.default_rng(0)
    frame = make_frame(rng.standard_normal((60, 4)).astype(np.float32), np.arange(60) // 20, rng)
    frame = frame.sort_values(["centroid", "cosine_dist_to_cent", "id"], ascending=[True, False, False])
    _, reads = in_blocks(frame.reset_index(drop=True), range(0, 61, 10), make_strategy("hard"), SearchOptions())
    # The first block of each cluster reads the second, too.
    ends = [10, 0, 10, 0, 10, 0]
    assert reads == [[*range(start, start + 10 + more)] for start, more in zip(range(0, 60, 10), ends, strict=True)]


@pytest.mark.parametrize("count", range(1, 9))
def test_each_pair_of_blocks_meets_once(count: int) -> None:
    rng = np.random.default_rng(0)
    frame = make_frame(rng.standard_normal((8 * count, 4)).astype(np.float32), np.zeros(8 * count, int), rng)
    _, reads = in_blocks(frame, range(0, 8 * count + 1, 8), make_strategy("hard"), SearchOptions())
    met = [{frozenset({number, row // 8}) for row in rows} for number, rows in enumerate(reads)]
    every = {frozenset({some, other}) for some in range(count) for other in range(count)}
    assert set.union(*met) == every
    assert sum(map(len, met)) == len(every)
    assert max(map(len, met)) <= min(map(len, met)) + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_searches(dtype: str) -> None:
    rng = np.random.default_rng(1)
    frame = make_frame(rng.standard_normal((90, 8)).astype(np.float32), np.zeros(90, np.int64), rng)
    options = SearchOptions(compute_dtype=dtype)
    found, _ = in_blocks(frame, [0, 50, 70, 90], RANKINGS[0], options)
    expected = pairwise_partition(frame, COLUMNS, RANKINGS[0], options)
    np.testing.assert_allclose(
        found.cosine_sim_score, expected.cosine_sim_score, atol=1e-6 if dtype == "float32" else 0.02
    )
    assert found.id.equals(expected.id)


def test_bad_rows_are_named() -> None:
    frame = GOLDEN.copy()
    frame["embeddings"] = arrow_lists(np.where(np.arange(6)[:, None] == 4, np.nan, np.eye(6, dtype=np.float32)))
    with pytest.raises(EmbeddingError, match=r"'embeddings', cluster 0: 1 row with NaN .*\(ids 4\)"):
        in_blocks(frame, [0, 3, 6], RankingStrategy(["custom_score"]), SearchOptions())
    with pytest.raises(ClusterError, match=r"1 row has no cluster \(ids 2\)"):
        in_blocks(GOLDEN.assign(centroid=[0, 0, None, 0, 0, 0]), [0, 6], make_strategy("hard"), SearchOptions())


def test_zero_rows_are_warned_of_once() -> None:
    frame = GOLDEN.copy()
    frame["embeddings"] = arrow_lists(np.diag([1, 1, 0, 1, 1, 1]).astype(np.float32))
    with pytest.warns(ZeroEmbeddingWarning) as warned:
        in_blocks(frame, [0, 2, 4, 6], make_strategy("hard"), SearchOptions())
    assert ["ids 2" in str(warning.message) for warning in warned] == [True]


def test_rows_of_another_width_are_named() -> None:
    frame = GOLDEN.copy()
    lists = [[1.0, 2.0]] * 4 + [[1.0]] * 2
    frame["embeddings"] = pd.Series(lists, dtype=arrow_lists(np.eye(2, dtype=np.float32)).dtype)
    with pytest.raises(EmbeddingError, match=r"2 rows with width 1, where 2 is expected \(ids 4, 5\)"):
        in_blocks(frame, [0, 4, 6], make_strategy("hard"), SearchOptions())
