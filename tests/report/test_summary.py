"""A summary is the same as counting all scores at once, however they are split."""

from __future__ import annotations

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError
from dask_semdedup.report.summary import summarize
from dask_semdedup.steps.duplicates import threshold

SCORES = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40)


def frame_of(values: list[float]) -> pd.DataFrame:
    """Scores of rows that were compared, after the first row of their cluster, which was not."""
    count = len(values) + 1
    return pd.DataFrame(
        {
            "id": np.arange(count),
            "max_id": np.zeros(count, dtype=int),
            "cosine_sim_score": np.array([0.0, *values], dtype=np.float32),
            "centroid": np.arange(count) % 3,
        }
    )


@given(values=SCORES, eps=st.floats(0, 1), npartitions=st.integers(1, 20))
def test_summaries_of_partitions_make_the_whole_summary(values: list[float], eps: float, npartitions: int) -> None:
    scores = frame_of(values)
    whole = summarize(scores, eps)
    split = summarize(dd.from_pandas(scores, npartitions=npartitions, sort=False), eps)
    assert (whole.rows, whole.compared, whole.lowest) == (split.rows, split.compared, split.lowest)
    assert np.array_equal(whole.at_least, split.at_least)
    pd.testing.assert_frame_equal(whole.clusters, split.clusters)


@given(values=SCORES, eps=st.floats(0, 2))
def test_duplicates_are_those_that_the_threshold_selects(values: list[float], eps: float) -> None:
    summary = summarize(frame_of(values), eps)
    scores = np.array(values, dtype=np.float32)
    assert summary.duplicates(eps) == (scores >= threshold(eps)).sum()
    expected = [(scores >= threshold(value)).sum() for value in summary.grid]
    assert summary.duplicates(summary.grid).tolist() == expected
    assert summary.clusters["duplicates"].sum() == summary.duplicates(eps)


@given(values=SCORES, eps=st.one_of(st.none(), st.floats(0, 2)), bins=st.integers(1, 200))
@example(values=[-4e-19], eps=None, bins=1)
def test_bars_hold_every_score_once(values: list[float], eps: float | None, bins: int) -> None:
    summary = summarize(frame_of(values), eps)
    edges, counts = summary.histogram(bins)
    assert (np.diff(edges) > 0).all()
    assert edges[0] <= min(values)
    assert edges[-1] == 1
    expected, _ = np.histogram(np.array(values, dtype=np.float32), edges.astype(np.float32))
    assert counts.tolist() == expected.tolist()
    if eps:
        assert threshold(eps) in edges.astype(np.float32)


def test_only_counted_eps_are_answered() -> None:
    with pytest.raises(ValueError, match=r"eps=0\.0123456"):
        summarize(frame_of([0.5]), 0.01).duplicates(0.0123456)


def test_clusters_are_left_out_where_there_are_none() -> None:
    assert summarize(frame_of([0.5]).drop(columns="centroid"), 0.01).clusters is None


def test_frames_that_are_no_scores_are_refused() -> None:
    with pytest.raises(MissingColumnsError, match="max_id"):
        summarize(pd.DataFrame({"id": [1], "cosine_sim_score": [0.5]}))
    with pytest.raises(InvalidArgumentError, match="eps"):
        summarize(frame_of([0.5]), 3)
