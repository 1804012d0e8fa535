"""Scores to duplicates."""

from __future__ import annotations

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

import dask_semdedup  # noqa: F401  (registers the accessor)
from dask_semdedup import InvalidArgumentError, MissingColumnsError
from dask_semdedup.duplicates import find_duplicates


@pytest.fixture
def scores() -> pd.DataFrame:
    values = np.array([0.0, 1.0, 0.99, 0.9899, 0.5, -0.25], dtype=np.float32)
    return pd.DataFrame(
        {"id": range(6), "max_id": [0, 0, 1, 2, 0, 1], "cosine_sim_score": values, "centroid": [0, 0, 0, 0, 1, 1]}
    )


@pytest.mark.parametrize(
    ("eps", "ids"),
    [(0, [1]), (0.01, [1, 2]), (0.0102, [1, 2, 3]), (0.5, [1, 2, 3, 4]), (1, [0, 1, 2, 3, 4]), (2.0, list(range(6)))],
)
def test_rows_at_or_above_the_threshold(scores: pd.DataFrame, eps: float, ids: list[int]) -> None:
    assert find_duplicates(scores, eps).id.to_list() == ids
    lazy = dd.from_pandas(scores, npartitions=2).semdedup.duplicates(eps=eps)
    assert isinstance(lazy, dd.DataFrame)
    pd.testing.assert_frame_equal(lazy.compute(), scores[scores.id.isin(ids)])


def test_default_eps(scores: pd.DataFrame) -> None:
    assert dd.from_pandas(scores, npartitions=1).semdedup.duplicates().id.compute().to_list() == [1, 2]


@pytest.mark.parametrize("eps", [-0.01, 2.01, float("nan"), "0.1", None, True])
def test_eps_out_of_range(scores: pd.DataFrame, eps: object) -> None:
    with pytest.raises(InvalidArgumentError, match="eps must be a number from 0 to 2"):
        dd.from_pandas(scores, npartitions=1).semdedup.duplicates(eps=eps)


def test_no_scores() -> None:
    ddf = dd.from_pandas(pd.DataFrame({"id": [1]}), npartitions=1)
    with pytest.raises(MissingColumnsError, match=r"\['cosine_sim_score'\] not found.*\['id'\].*pairwise"):
        ddf.semdedup.duplicates()
