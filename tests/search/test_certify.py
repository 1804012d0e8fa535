"""The bounds hold, and the rescoring finds what they leave."""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from dask_semdedup.search import certify
from tests.strategies import KINDS, seeds


@settings(max_examples=60)
@given(rng=seeds(), kind=st.sampled_from(KINDS), n=st.integers(2, 60), d=st.integers(1, 300))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_true_nearest_is_within_the_window(
    dtype: torch.dtype, rng: np.random.Generator, kind, n: int, d: int
) -> None:
    """Rounded rows and rounded scores: what falls below the window is never the nearest."""
    unit = certify.measure(torch.from_numpy(kind(rng, n, d).astype(np.float32)))
    half, residual = certify.half_copy(unit, dtype)
    coarse = (half.float() @ half.float().T).to(dtype)
    rows = unit.rows.double()
    exact = torch.nn.functional.normalize(rows, dim=1, eps=1e-300)
    best = coarse.max(dim=0).values
    bound = certify.half_bound(residual, residual.max(), unit.width)
    threshold = best.float() - certify.window(best, bound, dtype)
    truly_best = (exact @ exact.T).argmax(dim=0)
    assert (coarse[truly_best, torch.arange(n)].float() >= threshold).all()


def assert_none_is_lost(query: torch.Tensor, candidates: torch.Tensor, dtype: torch.dtype) -> None:
    """Of the candidates up to each one, in the order of their true scores, the last is nearest: it must be kept."""
    unit = certify.measure(torch.cat([query[None], candidates]).float())
    half, residual = certify.half_copy(unit, dtype)
    coarse = (half[1:].float() @ half[0].float()).to(dtype)
    exact = torch.nn.functional.normalize(unit.rows.double(), dim=1)
    coarse = coarse[(exact[1:] @ exact[0]).argsort()]
    best = coarse.float().cummax(dim=0).values.to(dtype)
    bound = certify.half_bound(residual[:1], residual[1:].max(), unit.width)
    assert (coarse.float() >= best.float() - certify.window(best, bound, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_candidates_of_few_dimensions_are_kept(dtype: torch.dtype) -> None:
    """Rounding errors are nearest to the bounds there."""
    for width, seed in product([2, 3, 4], range(40)):
        torch.manual_seed(seed)
        query = torch.nn.functional.normalize(torch.randn(width), dim=0)
        assert_none_is_lost(query, query + 0.02 * torch.randn(3000, width), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_may_favour_one_candidate_entirely_and_disfavour_another(dtype: torch.dtype) -> None:
    """A row is compared with one of eighths, which lose nothing, that has the signs of its loss, and the opposite."""
    for seed in range(10):
        torch.manual_seed(seed)
        row = torch.nn.functional.normalize(torch.randn(64), dim=0)
        lost = row - row.to(dtype).float()
        # Signs that matter little make the first the nearer one, but hardly.
        flips = torch.ones(20_000, 64)
        flips[:, lost.abs().argsort()[:24]] = torch.randint(2, (20_000, 24)).float() * 2 - 1
        eighths = lost.sign() * flips / 8
        scores = (eighths.double() @ row.double()).masked_fill(eighths @ row <= 1e-6, 1)
        exact = eighths[scores.argmin()]
        for query, candidate in ((row, exact), (exact, row)):
            assert_none_is_lost(query, torch.stack([candidate, -candidate]), dtype)


@settings(max_examples=60)
@given(rng=seeds(), kind=st.sampled_from(KINDS), n=st.integers(1, 60), d=st.integers(1, 300))
def test_residuals_are_no_smaller_than_what_rounding_lost(rng: np.random.Generator, kind, n: int, d: int) -> None:
    unit = certify.measure(torch.from_numpy(kind(rng, n, d).astype(np.float32)))
    half, residual = certify.half_copy(unit, torch.bfloat16)
    exact = torch.nn.functional.normalize(unit.rows.double(), dim=1, eps=1e-300)
    lost = (exact - half.double()).norm(dim=1)
    # Norms and products in float32 are themselves rounded: `half_bound` allows for that.
    assert (lost <= residual.double() + 2 * certify.UNIT_TOLERANCE).all()


def test_extreme_rows_are_rescaled_without_changing_their_direction() -> None:
    rows = torch.tensor([[3e-40, 4e-40], [3e30, 4e30], [3.0, 4.0], [0.0, 0.0]])
    unit = certify.measure(rows)
    directions = unit.rows * unit.inverse_norm[:, None]
    torch.testing.assert_close(directions[:3], torch.tensor([[0.6, 0.8]]).expand(3, 2), atol=1e-4, rtol=0)
    assert unit.is_zero.tolist() == [False, False, False, True]


@pytest.mark.parametrize("width", [1, 7, 64, 1000, 5000])
def test_float32_scores_are_within_their_bounds(width: int) -> None:
    torch.manual_seed(width)
    alternating = torch.randn(64, width).abs() * torch.tensor([1.0, -1.0]).repeat(width)[:width]
    for rows in (torch.full((64, width), 1 / 3), torch.randn(64, width), alternating):
        unit = torch.nn.functional.normalize(rows, dim=1)
        query, candidate = torch.arange(64).repeat_interleave(8), torch.randint(64, (512,))
        exact = (unit.double()[query] * unit.double()[candidate]).sum(dim=1)
        assert (certify._dots(unit, query, candidate) - exact).abs().max() < 1e-6
        assert (certify._sampled_dots(unit, query, candidate) - exact).abs().max() < certify.sampled_bound(width)


def test_rescore_finds_the_first_of_equals_and_the_best_of_near_ties() -> None:
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(50), dim=0).double()
    offset = torch.nn.functional.normalize(torch.randn(50), dim=0).double()
    # Candidates 1 to 4 of row 0: 2 and 3 are copies and nearest, by less than float32 can see.
    steps = torch.tensor([0.0, 2e-4, 1e-4, 1e-4, 3e-4], dtype=torch.float64)
    unit = certify.measure((direction + steps[:, None] * offset).float())
    scores, index = torch.zeros(5), torch.full((5,), -1)
    certify.rescore(unit, torch.zeros(4, dtype=torch.int64), torch.tensor([4, 3, 2, 1]), scores, index)
    assert index.tolist() == [2, -1, -1, -1, -1]
    assert scores[0] == pytest.approx(1, abs=1e-6)


def test_chunks_cover_everything_once() -> None:
    parts = certify.chunks(1000, row_bytes=3000, chunk_bytes=10_000)
    assert [row for part in parts for row in range(1000)[part]] == list(range(1000))
    assert certify.chunks(3, row_bytes=10**9) == [slice(0, 1), slice(1, 2), slice(2, 3)]
