"""The kept rows are the first maximal independent set, and dropped rows get the nearest of them."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from dask_semdedup.search import nearest_earlier
from dask_semdedup.search.kept import nearest_kept
from tests import oracle
from tests.strategies import rows_and_segments


@settings(max_examples=150)
@given(data=rows_and_segments(), at_least=st.sampled_from([0.2, 0.5, 0.8, 0.95, 1.0]))
def test_as_in_rank_order(data: tuple[np.ndarray, np.ndarray], at_least: float) -> None:
    rows, segments = data
    scores, index = nearest_kept(torch.from_numpy(rows), torch.from_numpy(segments), at_least=at_least)
    expected_scores, expected_index = oracle.kept(rows, segments, at_least)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-7, rtol=0)


def test_a_chain_takes_every_other_row_at_most() -> None:
    """Each row is like the ones next to it only, so that what is kept is decided one after the other."""
    angle = torch.arange(40.0) * 0.1
    rows = torch.stack([angle.cos(), angle.sin()], dim=1)
    _, index = nearest_kept(rows, torch.tensor([0, 40]), at_least=float(np.cos(0.15)))
    assert index.tolist() == [row - row % 2 for row in range(40)]


def test_most_rows_have_the_answer_of_the_search_for_any_neighbour() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, 32))
    rows[1000:] = rows[rng.integers(1000, size=2000)] + 0.05 * rng.standard_normal((2000, 32))
    tensor = torch.from_numpy(rows.astype(np.float32))
    segments = torch.tensor([0, 1200, 3000])
    scores, index = nearest_kept(tensor, segments, at_least=0.95)
    any_scores, any_index = nearest_earlier(tensor, segments, at_least=0.95)
    is_dropped = index != torch.arange(3000)
    assert torch.equal(is_dropped, any_index != torch.arange(3000))
    assert not is_dropped[index[is_dropped]].any(), "the nearest kept row is kept"
    assert (scores[is_dropped] >= np.float32(0.95)).all()
    assert (scores <= any_scores).all()


@pytest.mark.parametrize("at_least", [0, 1.5])
def test_at_least_must_be_a_positive_similarity(at_least: float) -> None:
    with pytest.raises(ValueError, match="at_least must be a cosine similarity above 0"):
        nearest_kept(torch.randn(3, 2), torch.tensor([0, 3]), at_least=at_least)
