"""Sketches never underestimate, each term of their bound is needed, and a search by them gives the same bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from dask_semdedup.search import (
    certify,
    crowded,
    ieee_products,
    nearest_earlier,
    sketch,
    torch_engine,
    torch_sketch,
    without_answers_below,
)
from dask_semdedup.search.crowded import first_copies
from dask_semdedup.search.sketch import SCALE, Costs, Sketcher, choose, fit_axes, sketcher
from tests.strategies import KINDS, seeds, stops_of

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def unit(rows: np.ndarray) -> torch.Tensor:
    """Rows of unit length in float64; zero rows stay as they are."""
    return torch.nn.functional.normalize(torch.from_numpy(rows).double(), dim=1, eps=1e-300)


@settings(max_examples=80)
@given(rng=seeds(), kind=st.sampled_from(KINDS), n=st.integers(2, 60), d=st.integers(8, 200), count=st.integers(1, 7))
@pytest.mark.parametrize("defect", [0.0, 1e-3, 0.05])
def test_products_reach_the_floor_whatever_the_basis(
    defect: float, rng: np.random.Generator, kind, n: int, d: int, count: int
) -> None:
    exact = unit(kind(rng, n, d))
    axes = torch.linalg.qr(torch.from_numpy(rng.standard_normal((d, count))))[0]
    axes = axes @ (torch.eye(count) + defect * torch.from_numpy(rng.standard_normal((count, count))) / count)
    axes = axes.float()
    off = float(torch.linalg.matrix_norm(axes.double().T @ axes.double() - torch.eye(count), 2))
    found = sketcher(axes, off, 0.0)
    sketches = found.sketches(exact.float()).double()
    is_zero = (exact == 0).all(dim=1)
    lacking = (exact @ exact.T + found.floor - sketches @ sketches.T)[~is_zero][:, ~is_zero]
    assert lacking.numel() == 0 or lacking.max() <= 0


def shortfall(rows: torch.Tensor, sketches: torch.Tensor) -> float:
    """How far the product of the first two sketches is below the similarity of the rows."""
    return float(rows[0].double() @ rows[1].double() - sketches[0].double() @ sketches[1].double())


def test_axes_that_are_not_orthonormal_need_their_term() -> None:
    tilt = 0.01
    axes = torch.tensor([[(1 + tilt) ** 0.5, 0], [0, (1 - tilt) ** 0.5], [0, 0]])
    rows = torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0.6, 0.8, 0]])
    naive = Sketcher(axes, tail=0.0, floor=0.0)
    assert shortfall(rows, naive.sketches(rows)) > 1e-3
    careful = sketcher(axes, tilt, 0.0)
    assert shortfall(rows, careful.sketches(rows)) < -careful.floor


def test_rows_that_are_rounded_to_tf32_need_their_term() -> None:
    axes, rest = torch.eye(8)[:, :7], 2.0**-10 - 2.0**-23
    row = torch.tensor([[1.0 + rest] * 7 + [0.0], [1.0] * 7 + [0.0]])
    truncated = (row.view(torch.int32) & -0x2000).view(torch.float32)
    rows = torch.nn.functional.normalize(row, dim=1)
    # Its length is that of the row before it is rounded.
    rounded = truncated / torch.linalg.vector_norm(row, dim=1, keepdim=True)
    naive = Sketcher(axes, tail=0.0, floor=0.0)
    assert shortfall(rows, naive.sketches(rounded)) > 5e-4
    careful = sketcher(axes, 0.0, 0.0)
    assert shortfall(rows, careful.sketches(rounded)) < -careful.floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_rounded_sketches_need_the_term_of_what_they_lost(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # All of their length is in the axes, and half of the pairs are a little more than 0.9 similar.
    rows = torch.zeros(800, 64)
    rows[:400, :31] = torch.nn.functional.normalize(torch.randn(400, 31, generator=generator), dim=1)
    side = torch.randn(400, 31, generator=generator)
    side -= (side * rows[:400, :31]).sum(dim=1, keepdim=True) * rows[:400, :31]
    rows[400:, :31] = 0.9001 * rows[:400, :31] + (1 - 0.9001**2) ** 0.5 * torch.nn.functional.normalize(side, dim=1)
    found = Sketcher(torch.eye(64)[:, :31].contiguous(), tail=0.0, floor=0.9)
    rounded = torch_sketch.sketches(certify.measure(rows), found, dtype)
    scale = SCALE**2 if dtype == torch.int8 else 1
    values = rounded.rows[: len(rows)].double()
    product, similarity = values @ values.T / scale, rows.double() @ rows.double().T
    is_near = similarity >= 0.9
    assert (product[is_near] < found.floor).any(), "the data must be hard enough"
    assert (product[is_near] >= (rounded.least.double() / scale)[:, None].expand_as(product)[is_near]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_rounding_loses_no_more_than_its_bound(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Of numbers of all sizes, down to those that are subnormal in float16, with one that loses the most.
    exact = torch.randn(2000, 64, generator=generator) * 10 ** (-8 * torch.rand(2000, 64, generator=generator))
    exact = torch.nn.functional.normalize(exact, dim=1)
    exact[0] = 0
    exact[0, 0] = 0.5 / SCALE if dtype == torch.int8 else 1 + torch.finfo(dtype).eps / 2
    values, bound = torch_sketch.rounded(exact, dtype)
    scale = SCALE if dtype == torch.int8 else 1
    lost = torch.linalg.vector_norm(values.double() / scale - exact.double(), dim=1)
    assert (lost <= bound).all()
    assert lost[0] > 0.98 * bound[0], "the data must be hard enough"


def fitted(rows: torch.Tensor, *others: Any, rejected: Sketcher | None = None) -> Sketcher | None:
    """A sketcher of the smallest size, fitted to all rows, in place of `choose`; None for nothing but zero rows."""
    if rejected is not None:
        return None
    axes, defect = fit_axes(sketch.unit_rows(rows), sketch.SIZES[0] - 1)
    _, _, at_least, _ = others
    found = sketcher(axes, float(defect), at_least)
    return found if found.floor > 0 else None


@contextmanager
def always(dtype: torch.dtype, most_hits: int, block: int = 64, group: int = 2048) -> Iterator[None]:
    """Sketches are used whatever they cost, in one dtype, and rows with more than `most_hits` hits are crowded."""
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.enter_context(patch.object(sketch, "choose", fitted))
        stack.enter_context(patch.object(torch_sketch, "sketch_dtype", lambda: dtype))
        stack.enter_context(patch.object(torch_engine, "MAX_HITS", most_hits))
        stack.enter_context(patch.object(torch_engine, "BLOCK", block))
        stack.enter_context(patch("dask_semdedup.search.crowded.LEAST_GROUP", group))
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(
    rng=seeds(),
    kind=st.sampled_from(KINDS),
    n=st.integers(2, 300),
    d=st.sampled_from([64, 100, 400]),
    most_hits=st.sampled_from([0, 1, 16]),
    block=st.sampled_from([4, 64]),
    group=st.sampled_from([1, 2048]),
    at_least=st.sampled_from([0.3, 0.8, 0.95, 1.0]),
    with_stops=st.booleans(),
)
def test_the_same_bits_as_without_sketches(
    dtype: torch.dtype,
    rng: np.random.Generator,
    kind,
    n: int,
    d: int,
    most_hits: int,
    block: int,
    group: int,
    at_least: float,
    with_stops: bool,
) -> None:
    rows = torch.from_numpy(kind(rng, n, d).astype(np.float32))
    segments = np.array([0, n // 3, n // 3, n - 1, n])
    stops = torch.from_numpy(stops_of(rng, segments)) if with_stops else None
    expected = nearest_earlier(rows, torch.from_numpy(segments), stops=stops)
    with always(dtype, most_hits, block, group):
        scores, index = nearest_earlier(rows, torch.from_numpy(segments), stops=stops, at_least=at_least)
    reach = expected[0] >= np.float32(at_least)
    assert torch.equal(scores, torch.where(reach, expected[0], 0))
    assert torch.equal(index, torch.where(reach, expected[1], torch.arange(n)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [0, 1e-7, 1e-6, 1e-5, 1e-4])
def test_copies_are_nearer_to_each_other_than_to_a_row_that_float32_cannot_tell_apart(
    dtype: torch.dtype, distance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    rows = torch.stack([row + distance * torch.randn(64, generator=generator), *[row] * 40])
    expected = nearest_earlier(rows, torch.tensor([0, 41]))
    with always(dtype, most_hits=0, block=4, group=1):
        scores, index = nearest_earlier(rows, torch.tensor([0, 41]), at_least=0.9)
    assert torch.equal(scores, expected[0])
    assert torch.equal(index, expected[1])


def test_a_length_above_1_of_what_is_left_does_not_overflow() -> None:
    axes = torch.eye(384)[:, :191].contiguous()
    rest = torch.randn(1, 193, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(torch.cat([torch.zeros(2, 191), rest.expand(2, 193)], dim=1), dim=1)
    rows[1, 0] = 0.1
    # As much as the axes that are fitted lack.
    found = sketcher(axes, 0.004, 0.95)
    assert (1 + found.tail) ** 0.5 * SCALE > SCALE + 0.5, "the data must be hard enough"
    with (
        always(torch.int8, most_hits=16),
        patch.object(sketch, "choose", lambda *_, rejected=None: None if rejected else found),
    ):
        scores, index = nearest_earlier(rows, torch.tensor([0, 2]), at_least=0.95)
    assert index.tolist() == [0, 0]
    assert scores[1] > 0.99


def steep(n: int, d: int, rng: np.random.Generator) -> torch.Tensor:
    """Rows most of whose length is in few directions, as embeddings are."""
    rows = rng.standard_normal((n, d)) * np.linspace(1, 0, d) ** 4
    return torch.from_numpy(rows.astype(np.float32))


ENGINE = Costs(
    fit=0,
    value=1,
    pair=0.1,
    pair_value=0.001,
    hit=3000,
    hit_value=2,
    exact_row_value=5,
    exact_pair=1,
    exact_value=0.002,
)


def test_sketches_are_as_short_as_the_spectrum_allows() -> None:
    rng = np.random.default_rng(0)
    segments = torch.tensor([0, 20_000])
    found = {}
    for name, rows in {
        "steep": steep(20_000, 384, rng),
        "flat": torch.randn(20_000, 384, generator=torch.Generator().manual_seed(0)),
    }.items():
        for at_least in (0.95, 0.5):
            with patch.object(sketch, "_known", {}):
                chosen = choose(rows, segments, None, at_least, ENGINE)
            found[name, at_least] = chosen and chosen.size
    assert found["steep", 0.95] in sketch.SIZES[:2]
    assert found["steep", 0.5] is None or found["steep", 0.5] > found["steep", 0.95]
    assert found["flat", 0.5] is None


def test_a_basis_is_not_judged_by_the_rows_that_it_fits() -> None:
    """Axes fitted to a few isotropic rows hold much of these rows, and little of any others."""
    rows = torch.randn(8000, 1536, generator=torch.Generator().manual_seed(0))
    with patch.object(sketch, "_known", {}):
        assert choose(rows, torch.tensor([0, 8000]), None, 0.9, ENGINE) is None


@pytest.mark.parametrize(
    ("n", "d", "at_least", "fit"), [(20_000, 8, 0.95, 0), (20_000, 384, 0.1, 0), (2000, 384, 0.95, 1e12)]
)
def test_none_is_chosen_where_it_cannot_pay(n: int, d: int, at_least: float, fit: float) -> None:
    rows = steep(n, d, np.random.default_rng(1))
    with patch.object(sketch, "_known", {}), patch.object(sketch, "_fitted") as fitted:
        assert choose(rows, torch.tensor([0, n]), None, at_least, dataclasses.replace(ENGINE, fit=fit)) is None
    fitted.assert_not_called()


def test_a_sketcher_is_fitted_once_for_searches_of_a_kind() -> None:
    segments = torch.tensor([0, 5000])
    first, second = (steep(5000, 128, np.random.default_rng(seed)) for seed in (0, 1))
    with patch.object(sketch, "_known", {}):
        found = choose(first, segments, None, 0.95, ENGINE)
        assert choose(second, segments, None, 0.95, ENGINE) is found is not None


def test_larger_sketches_follow_one_that_left_too_much_and_then_none_for_some_time() -> None:
    rows, segments = steep(5000, 384, np.random.default_rng(0)), torch.tensor([0, 5000])
    with patch.object(sketch, "_known", {}):
        found = choose(rows, segments, None, 0.95, ENGINE)
        sizes = []
        while found is not None:
            sizes.append(found.size)
            found = choose(rows, segments, None, 0.95, ENGINE, rejected=found)
        assert sizes == sorted(set(sizes))
        assert len(sizes) > 1
        for _ in range(sketch.RETRY):
            assert choose(rows, segments, None, 0.95, ENGINE) is None
        assert choose(rows, segments, None, 0.95, ENGINE) is not None


def test_larger_sketches_are_tried_where_short_ones_leave_too_much() -> None:
    rows, segments = steep(4000, 384, np.random.default_rng(0)), torch.tensor([0, 4000])
    expected = nearest_earlier(rows, segments)
    without_answers_below(0.9, *expected)
    tried = []
    reaching = torch_sketch.nearest_reaching

    def crowding(*args: Any, **options: Any) -> Any:
        crowded, candidates_of = reaching(*args, **options)
        tried.append(args[4].size)
        return (torch.arange(4000) if len(tried) == 1 else crowded), candidates_of

    with (
        patch.object(sketch, "_known", {}),
        patch.object(torch_sketch, "COSTS", ENGINE),
        patch.object(torch_sketch, "nearest_reaching", crowding),
    ):
        found = nearest_earlier(rows, segments, at_least=0.9)
    assert len(tried) == 2
    assert tried[0] < tried[1]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_only_sketchers_of_some_last_kinds_are_kept() -> None:
    rows = steep(2000, 128, np.random.default_rng(0))
    with patch.object(sketch, "_known", {}) as known, patch.object(sketch, "_fitted", return_value=None):
        for step in range(3 * sketch.KINDS):
            choose(rows, torch.tensor([0, 2000]), None, 0.5 + step / 1000, ENGINE)
            assert 1 <= len(known) <= sketch.KINDS


@pytest.mark.parametrize(("defect", "is_chosen"), [(0.0, True), (0.095, False), (0.2, False), (math.nan, False)])
def test_least_products_are_positive(defect: float, is_chosen: bool) -> None:
    """The search on the CPU takes a product of 0 for one that does not reach it."""
    rows = steep(5000, 128, np.random.default_rng(0))
    none = torch.zeros(2, dtype=torch.float64)
    axes = torch.eye(128)[:, :63].contiguous()
    with (
        patch.object(sketch, "_known", {}),
        patch.object(sketch, "fit_axes", lambda *_, **__: (axes, torch.tensor(defect, dtype=torch.float64))),
        patch.object(sketch, "_shares", lambda *_: (none, none, none)),
    ):
        found = choose(rows, torch.tensor([0, 5000]), None, sketch.LEAST, ENGINE)
    assert (found is not None) == is_chosen
    if found is not None:
        # Nothing is left to do on the stream of the thread that fitted it.
        assert found.axes.data_ptr() == axes.data_ptr()
        assert (torch_sketch.sketches(certify.measure(rows), found, torch.int8).least > 0).all()


def test_crowded_rows_are_multiplied_in_full_precision() -> None:
    inside = []
    rows = steep(100, 64, np.random.default_rng(0))
    with (
        always(torch.float32, most_hits=0),
        patch("dask_semdedup.search.answer_crowded", lambda *_: inside.append(ieee_products._inside)),
    ):
        nearest_earlier(rows, torch.tensor([0, 100]), at_least=0.9)
    assert inside == [1]


@pytest.mark.parametrize("length", [1e-41, 1e-30, 1e-25, 1.0, 1e25, 1e38])
@pytest.mark.parametrize("with_stops", [False, True])
def test_groups_are_of_rows_of_any_length(length: float, with_stops: bool) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal(64) + 1e-2 * rng.standard_normal((200, 64))
    rows[50:60], rows[120:130] = rng.standard_normal((10, 64)), rows[7]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[rng.random(200) < 0.4] *= length
    rows[150] = 0
    rows = torch.from_numpy(rows.astype(np.float32))
    segments = torch.tensor([0, 70, 200])
    stops = torch.from_numpy(stops_of(rng, segments.numpy())) if with_stops else torch.arange(200)
    expected = nearest_earlier(rows, segments, stops=stops)
    scores, index = torch.zeros(200), torch.arange(200)
    every = torch.arange(200)
    is_original = first_copies(rows, segments) == every
    with patch.object(crowded, "LEAST_GROUP", 8), patch.object(crowded, "centred", return_value=()) as centred:
        whole = crowded.Subset(rows, every, segments, stops)
        left = crowded._answer_groups(whole, is_original, every[rows.any(dim=1)], exact, scores, index)
    centred.assert_called()
    answered = torch.ones(200, dtype=torch.bool)
    answered[left] = answered[150] = False
    assert answered.any()
    assert torch.equal(scores[answered], expected[0][answered])
    assert torch.equal(index[answered], expected[1][answered])


def exact(
    rows: torch.Tensor, segments: torch.Tensor, stops: torch.Tensor, centred: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The search of all rows."""
    return nearest_earlier(rows, segments, stops=stops)


@pytest.mark.parametrize("distinct", [1, 3, 40])
def test_axes_of_few_distinct_rows_are_orthonormal_too(distinct: int) -> None:
    rows = torch.nn.functional.normalize(torch.randn(distinct, 96, generator=torch.Generator().manual_seed(0)), dim=1)
    axes, defect = fit_axes(rows.repeat(100, 1), 63)
    assert axes.shape == (96, 63)
    assert float(defect) < 0.01


def test_first_copies_are_equal_bit_by_bit_and_of_one_segment() -> None:
    rows = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
    expected = [0, 1, 0, 3, 3, 5]
    assert first_copies(rows, torch.tensor([0, 3, 6])).tolist() == expected
    with patch("torch.randint", lambda most, size, generator: torch.zeros(size, dtype=torch.int64)):
        # All factors are equal, and so are the hashes of rows whose numbers are in another order.
        assert first_copies(rows, torch.tensor([0, 3, 6])).tolist() == expected
