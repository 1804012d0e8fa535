"""The search against float64, through every path it can take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from dask_semdedup import search
from dask_semdedup.search import nearest_earlier, torch_engine
from tests import oracle
from tests.strategies import KINDS, rows_and_segments, seeds, stops_of

GOLDEN_ROWS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [1, 2, 3], [1, 2, 3]], dtype=torch.float32)


@pytest.mark.parametrize("compute_dtype", ["auto", "float32"])
@pytest.mark.parametrize("off", [2.0**-13, -(2.0**-13), 2.0**-19])
def test_rows_of_nearly_unit_length_are_normalised(compute_dtype: str, off: float) -> None:
    rows = torch.nn.functional.normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    rows[1::2] = rows[::2]
    rows = rows * (1 + off)
    scores, _ = nearest_earlier(rows, torch.tensor([0, 300]), compute_dtype=compute_dtype)
    exact = torch.nn.functional.normalize(rows.double(), dim=1)
    truth = (exact @ exact.T).tril(-1).masked_fill(torch.ones(300, 300).triu().bool(), -2).amax(dim=1).clamp(max=1)
    assert (scores[1:] - truth[1:]).abs().max() < 2e-6


@contextmanager
def engine(half: torch.dtype | None, small: int, block: int, most_hits: int, one_block_panels: bool) -> Iterator[None]:
    """Sizes so small that a few dozen rows take every path of the torch engine.

    One thread: searches of a few rows wait longer for threads than they take.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.enter_context(patch.object(search, "half_dtype", lambda device: half))
        stack.enter_context(patch.object(torch_engine, "SMALL", small))
        stack.enter_context(patch.object(torch_engine, "BLOCK", block))
        stack.enter_context(patch.object(torch_engine, "MAX_HITS", most_hits))
        stack.enter_context(patch.object(torch_engine.Pairs, "FLUSH", 10))
        if one_block_panels:
            stack.enter_context(patch.object(torch_engine, "workspace_bytes", lambda device: 1))
        yield


engines = st.builds(
    engine,
    half=st.sampled_from([None, torch.bfloat16, torch.float16]),
    small=st.sampled_from([0, 10, 256]),
    block=st.sampled_from([4, 64]),
    most_hits=st.sampled_from([0, 1, 16]),
    one_block_panels=st.booleans(),
)


@settings(max_examples=100)
@given(data=rows_and_segments(), paths=engines, batch_size=st.sampled_from([None, 1, 3, 16]))
def test_exact_on_anything(data: tuple[np.ndarray, np.ndarray], paths: ExitStack, batch_size: int | None) -> None:
    rows, segments = data
    with paths:
        scores, index = nearest_earlier(torch.from_numpy(rows), torch.from_numpy(segments), batch_size=batch_size)
    oracle.assert_nearest_earlier(rows, segments, scores.numpy(), index.numpy())


@settings(max_examples=60)
@given(data=rows_and_segments(), paths=engines, rng=seeds(), batch_size=st.sampled_from([None, 1, 3, 16]))
def test_exact_with_stops(
    data: tuple[np.ndarray, np.ndarray], paths: ExitStack, rng: np.random.Generator, batch_size: int | None
) -> None:
    rows, segments = data
    stops = stops_of(rng, segments)
    with paths:
        scores, index = nearest_earlier(
            torch.from_numpy(rows), torch.from_numpy(segments), stops=torch.from_numpy(stops), batch_size=batch_size
        )
    oracle.assert_nearest_earlier(rows, segments, scores.numpy(), index.numpy(), stops)


@settings(max_examples=100)
@given(data=rows_and_segments(), paths=engines, rng=seeds(), quantile=st.floats(0, 1), with_stops=st.booleans())
def test_at_least_gives_the_same_bits_to_the_rows_that_reach_it(
    data: tuple[np.ndarray, np.ndarray],
    paths: ExitStack,
    rng: np.random.Generator,
    quantile: float,
    with_stops: bool,
) -> None:
    rows, segments = map(torch.from_numpy, data)
    stops = torch.from_numpy(stops_of(rng, data[1])) if with_stops else None
    with paths:
        scores, index = nearest_earlier(rows, segments, stops=stops)
        # A score that a row has is the hardest threshold.
        positive = scores[scores > 0]
        at_least = float(positive.quantile(quantile, interpolation="nearest")) if len(positive) else 0.5
        found = nearest_earlier(rows, segments, stops=stops, at_least=at_least)
    reach = scores >= at_least
    assert torch.equal(found[0], torch.where(reach, scores, 0))
    assert torch.equal(found[1], torch.where(reach, index, torch.arange(len(index))))


@pytest.mark.parametrize("at_least", [0, -0.5, 1.5, float("nan")])
def test_at_least_must_be_a_positive_similarity(at_least: float) -> None:
    with pytest.raises(ValueError, match="at_least must be a cosine similarity above 0"):
        nearest_earlier(GOLDEN_ROWS, torch.tensor([0, 6]), at_least=at_least)


@pytest.mark.parametrize("small", [0, 256])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_plain_searches_keep_to_stops(compute_dtype: str, small: int) -> None:
    rng = np.random.default_rng(8)
    rows, segments = rng.standard_normal((300, 96)).astype(np.float32), np.array([0, 90, 300])
    stops = stops_of(rng, segments)
    with patch.object(torch_engine, "SMALL", small):
        scores, index = nearest_earlier(
            torch.from_numpy(rows),
            torch.from_numpy(segments),
            stops=torch.from_numpy(stops),
            compute_dtype=compute_dtype,
        )
    starts = np.repeat(segments[:-1], np.diff(segments))
    has_none = stops == starts
    assert (index.numpy()[has_none] == np.flatnonzero(has_none)).all()
    assert (index.numpy()[~has_none] < stops[~has_none]).all()
    expected, _ = oracle.nearest_earlier(rows, segments, stops)
    np.testing.assert_allclose(scores, expected, atol=2e-2, rtol=0)


@settings(max_examples=25)
@given(rng=seeds(), kind=st.sampled_from(KINDS), n=st.integers(257, 1500), d=st.sampled_from([1, 3, 64, 200]))
def test_exact_on_large_segments(rng: np.random.Generator, kind, n: int, d: int) -> None:
    rows = kind(rng, n, d).astype(np.float32)
    segments = np.array([0, n // 3, n // 3, n - 1, n])
    scores, index = nearest_earlier(torch.from_numpy(rows), torch.from_numpy(segments))
    oracle.assert_nearest_earlier(rows, segments, scores.numpy(), index.numpy())


@pytest.mark.parametrize("compute_dtype", ["auto", "float32"])
@pytest.mark.parametrize("small", [0, 256])
def test_golden(compute_dtype: str, small: int) -> None:
    for batch_size in (None, 1, 2, 3, 4, 5, 6, 7, 1024, 10**9):
        with patch.object(torch_engine, "SMALL", small):
            scores, index = nearest_earlier(
                GOLDEN_ROWS, torch.tensor([0, 6]), compute_dtype=compute_dtype, batch_size=batch_size
            )
        torch.testing.assert_close(scores, torch.tensor([0, 0.974631, 0.998190, 0.999618, 1, 1]), atol=2e-6, rtol=0)
        assert index.tolist() == [0, 0, 1, 2, 0, 0], batch_size


@pytest.mark.parametrize("small", [0, 256])
@pytest.mark.parametrize(("compute_dtype", "error"), [("float32", 2e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_plain_searches_are_within_their_precision(compute_dtype: str, error: float, small: int) -> None:
    torch.manual_seed(7)
    rows, segments = torch.randn(600, 96), torch.tensor([0, 200, 599, 600])
    with patch.object(torch_engine, "SMALL", small):
        scores, index = nearest_earlier(rows, segments, compute_dtype=compute_dtype)
    expected, _ = oracle.nearest_earlier(rows.numpy(), segments.numpy())
    np.testing.assert_allclose(scores, expected, atol=error, rtol=0)
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    reached = (unit * unit[index]).sum(dim=1)
    first = segments[:-1]
    reached[first] = 0
    np.testing.assert_allclose(reached, expected, atol=error, rtol=0)


def test_bfloat16_search_is_lossy_and_the_exact_one_is_not() -> None:
    """The data must be hard enough for the exactness tests to mean something."""
    torch.manual_seed(0)
    rows = torch.randn(8) + 1e-3 * torch.randn(800, 8)
    segments = torch.tensor([0, 800])
    _, expected = oracle.nearest_earlier(rows.numpy(), segments.numpy())
    _, lossy = nearest_earlier(rows, segments, compute_dtype="bfloat16")
    _, exact = nearest_earlier(rows, segments)
    assert (lossy.numpy() != expected).sum() > 100
    assert (exact.numpy() != expected).sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_rows_of_any_floating_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    rows, segments = torch.randn(300, 20).to(dtype), torch.tensor([0, 100, 300])
    scores, index = nearest_earlier(rows, segments)
    oracle.assert_nearest_earlier(rows.float().numpy(), segments.numpy(), scores.numpy(), index.numpy())


def test_rows_need_not_be_contiguous_and_are_not_changed() -> None:
    torch.manual_seed(2)
    rows = torch.randn(16, 400).T
    before = rows.clone()
    scores, index = nearest_earlier(rows, torch.tensor([0, 400]))
    oracle.assert_nearest_earlier(rows.numpy(), np.array([0, 400]), scores.numpy(), index.numpy())
    assert torch.equal(rows, before)


def test_empty_and_single() -> None:
    scores, index = nearest_earlier(torch.empty(0, 4), torch.tensor([0]))
    assert scores.shape == index.shape == (0,)
    scores, index = nearest_earlier(torch.ones(3, 4), torch.tensor([0, 1, 1, 2, 3]))
    assert scores.tolist() == [0, 0, 0]
    assert index.tolist() == [0, 1, 2]


def test_settings_of_the_process_neither_disturb_the_search_nor_are_changed_by_it() -> None:
    torch.manual_seed(3)
    rows = torch.randn(64) + 1e-3 * torch.randn(700, 64)
    torch.set_float32_matmul_precision("medium")
    try:
        scores, index = nearest_earlier(rows, torch.tensor([0, 700]))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    oracle.assert_nearest_earlier(rows.numpy(), np.array([0, 700]), scores.numpy(), index.numpy())


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_nor_are_those_that_were_set_by_other_names() -> None:
    # Each in a process of its own, as these cannot all be taken back.
    script = """
import os, torch
from dask_semdedup.search import ieee_products, nearest_earlier

def state():
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    return [older, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]

def check(setting):
    exec(setting)
    before = state()
    nearest_earlier(torch.eye(3), torch.tensor([0, 3]))
    with ieee_products:
        assert state() == ["highest", "ieee", "ieee"], (setting, state())
    assert state() == before, (setting, before, state())

for setting in (
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.fp32_precision = 'bf16'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "pass",
):
    child = os.fork()
    if child == 0:
        check(setting)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_process_forked_during_a_search_has_its_settings_back() -> None:
    script = """
import os, torch
from dask_semdedup.search import ieee_products

torch.set_float32_matmul_precision("medium")
with ieee_products:
    child = os.fork()
    if child == 0:
        os._exit(torch.get_float32_matmul_precision() != "medium")
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize(
    ("rows", "segments", "options", "message"),
    [
        (torch.ones(3, 2), [0, 3], {"compute_dtype": "float8"}, "compute_dtype must be one of auto, float32"),
        (torch.ones(3, 2), [0, 3], {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (torch.ones(3), [0, 3], {}, "rows must be a floating-point matrix"),
        (torch.ones(3, 2, dtype=torch.int64), [0, 3], {}, "rows must be a floating-point matrix"),
        (torch.ones(3, 2), [0, 2], {}, "ascend from 0 to the number of rows, 3"),
        (torch.ones(3, 2), [1, 3], {}, "ascend from 0"),
        (torch.ones(3, 2), [0, 2, 1, 3], {}, "ascend from 0"),
        (torch.ones(3, 2), [], {}, "ascend from 0"),
        (torch.ones(3, 2), [0, 3], {"stops": torch.tensor([0, 0])}, "stops must give each row a position"),
        (torch.ones(3, 2), [0, 3], {"stops": torch.tensor([0, 2, 2])}, "stops must give each row a position"),
        (torch.ones(3, 2), [0, 2, 3], {"stops": torch.tensor([0, 0, 1])}, "stops must give each row a position"),
    ],
)
def test_bad_arguments(rows: torch.Tensor, segments: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_earlier(rows, torch.tensor(segments), **options)


@pytest.mark.parametrize("length", [50, 600])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_copies_score_exactly_one(length: int, scale: float) -> None:
    """So that eps=0 finds them all, whatever float32 makes of their norms."""
    torch.manual_seed(5)
    rows = torch.randn(length, 384)
    rows = torch.cat([rows, scale * rows])
    scores, index = nearest_earlier(rows, torch.tensor([0, 2 * length]))
    assert (scores[length:] == 1).all()
    assert index[length:].tolist() == list(range(length))
