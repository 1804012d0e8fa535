"""The search on a GPU: the properties of `test_nearest_earlier`, through both engines, compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from dask_semdedup import search
from dask_semdedup.search import nearest_earlier
from tests import oracle
from tests.search.test_sketch import fitted
from tests.strategies import KINDS, rows_and_segments, seeds, stops_of

pytestmark = pytest.mark.gpu

ENGINES = ["triton", "torch"]


@contextmanager
def engine(name: str):
    """The engine called `name`, and no other."""
    with patch.object(search, "has_triton", lambda device: name == "triton"):
        yield


def on_gpu(rows: np.ndarray, segments: np.ndarray, **options) -> tuple[np.ndarray, np.ndarray]:
    scores, index = nearest_earlier(torch.from_numpy(rows).cuda(), torch.from_numpy(segments), **options)
    return scores.cpu().numpy(), index.cpu().numpy()


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=60)
@given(data=rows_and_segments(max_rows=200, max_width=200))
def test_exact_on_anything(name: str, data: tuple[np.ndarray, np.ndarray]) -> None:
    with engine(name):
        oracle.assert_nearest_earlier(*data, *on_gpu(*data))


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=40)
@given(data=rows_and_segments(max_rows=400, max_width=200), rng=seeds())
def test_exact_with_stops(name: str, data: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> None:
    rows, segments = data
    stops = stops_of(rng, segments)
    with engine(name):
        answers = on_gpu(rows, segments, stops=torch.from_numpy(stops))
    oracle.assert_nearest_earlier(rows, segments, *answers, stops)


@pytest.mark.parametrize("name", ENGINES)
def test_queries_against_candidates_where_large_tiles_are_chosen(name: str) -> None:
    rows = np.random.default_rng(9).standard_normal((6000, 100)).astype(np.float32)
    segments, stops = np.array([0, 6000]), np.concatenate([np.zeros(5000, np.int64), np.full(1000, 5000)])
    with engine(name):
        answers = on_gpu(rows, segments, stops=torch.from_numpy(stops))
    oracle.assert_nearest_earlier(rows, segments, *answers, stops)


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=30)
@given(rng=seeds(), kind=st.sampled_from(KINDS), n=st.integers(300, 4000), d=st.sampled_from([1, 3, 64, 100, 384]))
def test_exact_on_large_segments(name: str, rng: np.random.Generator, kind, n: int, d: int) -> None:
    rows = kind(rng, n, d).astype(np.float32)
    segments = np.array([0, n // 3, n // 3, n - 1, n])
    with engine(name):
        oracle.assert_nearest_earlier(rows, segments, *on_gpu(rows, segments))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_where_large_tiles_are_chosen(kind) -> None:
    rows = kind(np.random.default_rng(1), 5000, 200).astype(np.float32)
    segments = np.array([0, 5000])
    oracle.assert_nearest_earlier(rows, segments, *on_gpu(rows, segments))


@pytest.mark.parametrize("kind", KINDS)
def test_cpu_and_gpu_agree(kind) -> None:
    rows = kind(np.random.default_rng(0), 3000, 96).astype(np.float32)
    segments = np.array([0, 1000, 1001, 1100, 3000])
    scores, index = nearest_earlier(torch.from_numpy(rows), torch.from_numpy(segments))
    gpu_scores, gpu_index = on_gpu(rows, segments)
    np.testing.assert_allclose(gpu_scores, scores, atol=2e-6, rtol=0)
    np.testing.assert_array_equal(gpu_index, index)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("compute_dtype", "error"), [("float32", 2e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_plain_searches_are_within_their_precision(name: str, compute_dtype: str, error: float) -> None:
    rows = np.random.default_rng(2).standard_normal((3000, 96)).astype(np.float32)
    segments = np.array([0, 200, 2999, 3000])
    with engine(name):
        scores, index = on_gpu(rows, segments, compute_dtype=compute_dtype)
    expected, _ = oracle.nearest_earlier(rows, segments)
    np.testing.assert_allclose(scores, expected, atol=error, rtol=0)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    reached = (unit * unit[index]).sum(axis=1)
    reached[segments[:-1]] = 0
    np.testing.assert_allclose(reached, expected, atol=error, rtol=0)


def test_the_host_does_not_wait() -> None:
    rows = torch.randn(3000, 128, device="cuda")
    segments = torch.tensor([0, 1000, 3000])
    nearest_earlier(rows, segments)  # Compiles.
    torch.cuda.set_sync_debug_mode("error")
    try:
        nearest_earlier(rows, segments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("n", "d"), [(30_000, 384), (100_000, 100)])
def test_extra_memory_is_half_the_rows_and_a_bounded_workspace(
    device_memory: Callable[..., tuple[int, int]], n: int, d: int
) -> None:
    rows, segments = torch.randn(n, d, device="cuda"), torch.tensor([0, n])
    most, _ = device_memory(lambda: nearest_earlier(rows, segments))
    assert 0 < most <= 0.6 * rows.nbytes + (256 << 20)


def test_twenty_thousand_small_segments_and_a_large_one_in_one_call() -> None:
    rng = np.random.default_rng(3)
    sizes = np.concatenate([rng.integers(1, 12, 10_000), [6000], rng.integers(1, 12, 10_000)])
    segments = np.cumsum([0, *sizes])
    rows = rng.standard_normal((segments[-1], 32)).astype(np.float32)
    scores, index = on_gpu(rows, segments)
    expected_scores, expected_index = nearest_earlier(torch.from_numpy(rows), torch.from_numpy(segments))
    np.testing.assert_allclose(scores, expected_scores, atol=2e-6, rtol=0)
    np.testing.assert_array_equal(index, expected_index)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_copies_score_exactly_one(name: str, scale: float) -> None:
    rows = np.random.default_rng(4).standard_normal((600, 384)).astype(np.float32)
    rows = np.concatenate([rows, np.float32(scale) * rows])
    with engine(name):
        scores, index = on_gpu(rows, np.array([0, 1200]))
    assert (scores[600:] == 1).all()
    assert index[600:].tolist() == list(range(600))


def test_rows_that_do_not_begin_at_a_multiple_of_16_bytes() -> None:
    rng = np.random.default_rng(5)
    flat = torch.from_numpy(rng.standard_normal(300 * 33 + 1).astype(np.float32)).cuda()
    segments = np.array([0, 300])
    for rows in (flat[1:].view(300, 33), flat[:-1].view(300, 33)):
        scores, index = nearest_earlier(rows, torch.from_numpy(segments))
        oracle.assert_nearest_earlier(rows.cpu().numpy(), segments, scores.cpu().numpy(), index.cpu().numpy())


def test_a_new_number_of_rows_compiles_nothing() -> None:
    """Sizes differ from partition to partition; a kernel takes a second to compile."""
    from dask_semdedup.search import triton_engine

    kernels = ["halve_kernel", "coarse_kernel", "select_kernel", "score_kernel", "finish_kernel", "dense_kernel"]

    def compiled() -> int:
        return sum(len(getattr(triton_engine, name).device_caches[torch.cuda.current_device()][0]) for name in kernels)

    def run(sizes: list[int]) -> None:
        rows = torch.randn(sum(sizes), 64, device="cuda")
        nearest_earlier(rows, torch.tensor([0, *sizes]).cumsum(0))

    run([300, 16])
    before = compiled()
    for sizes in ([301, 16], [17, 2], [640, 1, 1], [1000, 333, 7]):
        run(sizes)
    assert compiled() == before


@contextmanager
def sketches():
    """Sketches are used whatever they cost."""
    with patch.object(search.sketch, "choose", fitted):
        yield


@settings(max_examples=40)
@given(
    rng=seeds(),
    kind=st.sampled_from(KINDS),
    n=st.integers(2, 3000),
    d=st.sampled_from([64, 100, 384, 1000]),
    at_least=st.sampled_from([0.3, 0.8, 0.95, 1.0]),
    with_stops=st.booleans(),
)
def test_at_least_gives_the_same_bits_on_both_devices(
    rng: np.random.Generator, kind, n: int, d: int, at_least: float, with_stops: bool
) -> None:
    rows = kind(rng, n, d).astype(np.float32)
    segments = np.array([0, n // 3, n // 3, n - 1, n])
    stops = torch.from_numpy(stops_of(rng, segments)) if with_stops else None
    scores, index = on_gpu(rows, segments, stops=stops)
    reach = scores >= np.float32(at_least)
    expected = np.where(reach, scores, 0), np.where(reach, index, np.arange(n))
    with sketches():
        found = on_gpu(rows, segments, stops=stops, at_least=at_least)
        on_cpu = nearest_earlier(torch.from_numpy(rows), torch.from_numpy(segments), stops=stops, at_least=at_least)
    for array, cpu, wanted in zip(found, on_cpu, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)
        np.testing.assert_array_equal(cpu, wanted)


@pytest.mark.parametrize("size", [32, 64, 128, 192])
@pytest.mark.parametrize("n", [300, 20_000])
def test_sketches_of_every_size(size: int, n: int) -> None:
    rows = alike(np.random.default_rng(size), n, 400, groups=n // 10, distance=0.04)
    segments = np.array([0, n // 5, n])
    scores, index = on_gpu(rows, segments)
    reach = scores >= np.float32(0.95)
    with sketches(), patch.object(search.sketch, "SIZES", (size,)):
        found = on_gpu(rows, segments, at_least=0.95)
    assert reach.mean() > 0.5
    np.testing.assert_array_equal(found[0], np.where(reach, scores, 0))
    np.testing.assert_array_equal(found[1], np.where(reach, index, np.arange(n)))


def alike(rng: np.random.Generator, n: int, d: int, *, groups: int, distance: float) -> np.ndarray:
    """Rows in groups, whose members are at a cosine distance of about `distance` from each other."""
    centres = rng.standard_normal((groups, d))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rows = centres[rng.integers(groups, size=n)] + rng.standard_normal((n, d)) * (distance / d) ** 0.5
    return rows.astype(np.float32)


@pytest.mark.parametrize("with_stops", [False, True])
@pytest.mark.parametrize("distance", [1e-3, 1e-7, 0])
@pytest.mark.parametrize("groups", [1, 3])
def test_rows_with_thousands_nearly_alike(groups: int, distance: float, with_stops: bool) -> None:
    rng = np.random.default_rng(groups)
    rows = rng.standard_normal((24_000, 128)).astype(np.float32)
    which = rng.permutation(len(rows))[:14_000]
    rows[which] = alike(rng, len(which), 128, groups=groups, distance=distance)
    segments = np.array([0, 4000, 24_000])
    stops = torch.from_numpy(stops_of(rng, segments)) if with_stops else None
    scores, index = on_gpu(rows, segments, stops=stops)
    reach = scores >= np.float32(0.95)
    with sketches():
        found = on_gpu(rows, segments, stops=stops, at_least=0.95)
    assert reach.mean() > 0.3
    np.testing.assert_array_equal(found[0], np.where(reach, scores, 0))
    np.testing.assert_array_equal(found[1], np.where(reach, index, np.arange(len(rows))))


def test_sketches_take_less_memory_than_half_the_rows(device_memory: Callable[..., tuple[int, int]]) -> None:
    rows, segments = torch.randn(100_000, 384, device="cuda"), torch.tensor([0, 100_000])
    with sketches():
        most, _ = device_memory(lambda: nearest_earlier(rows, segments, at_least=0.95))
    assert 0 < most <= 0.6 * rows.nbytes + (256 << 20)
