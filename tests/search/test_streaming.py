"""The search of host rows in jobs: whatever memory there is, the answer is that of the search in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings

from dask_semdedup.device import devices
from dask_semdedup.search import nearest_earlier, streaming
from dask_semdedup.search.streaming import WORKSPACE, nearest_earlier_from_host, row_bytes
from tests import oracle
from tests.data import GOLDEN, run
from tests.search.test_sketch import fitted
from tests.strategies import KINDS, rows_and_segments, seeds, stops_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Searches of a few rows wait longer for threads than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def memory_for(n_rows: int, width: int) -> int:
    return WORKSPACE + n_rows * row_bytes(width)


def search(rows: np.ndarray, segments: np.ndarray, device: str, n_rows: int, **options):
    """Scores and index where the device has memory for `n_rows`."""
    memory_bytes = memory_for(n_rows, rows.shape[1])
    host = torch.from_numpy(rows)
    return nearest_earlier_from_host(
        host, torch.from_numpy(segments), device=device, memory_bytes=memory_bytes, **options
    )


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=100)
@given(data=rows_and_segments(), n_rows=st.integers(10, 60))
def test_exact_on_anything_in_any_memory(device: str, data: tuple[np.ndarray, np.ndarray], n_rows: int) -> None:
    oracle.assert_nearest_earlier(*data, *search(*data, device, n_rows))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40)
@given(rng=seeds(), kind=st.sampled_from(KINDS), n=st.integers(60, 300), n_rows=st.integers(20, 120))
def test_exact_on_a_segment_larger_than_memory(
    device: str, rng: np.random.Generator, kind, n: int, n_rows: int
) -> None:
    rows = kind(rng, n, 24).astype(np.float32)
    segments = np.array([0, 3, n - 5, n])
    oracle.assert_nearest_earlier(rows, segments, *search(rows, segments, device, n_rows))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40)
@given(data=rows_and_segments(), rng=seeds(), n_rows=st.integers(4, 60))
def test_exact_with_stops(
    device: str, data: tuple[np.ndarray, np.ndarray], rng: np.random.Generator, n_rows: int
) -> None:
    rows, segments = data
    stops = stops_of(rng, segments)
    answers = search(rows, segments, device, n_rows, stops=torch.from_numpy(stops))
    oracle.assert_nearest_earlier(rows, segments, *answers, stops)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15)
@given(rng=seeds(), kind=st.sampled_from(KINDS), n=st.integers(60, 300), at_least=st.sampled_from([0.3, 0.9, 1.0]))
def test_at_least_gives_the_same_bits_in_any_memory(
    device: str, rng: np.random.Generator, kind, n: int, at_least: float
) -> None:
    rows = kind(rng, n, 64).astype(np.float32)
    segments = np.array([0, 3, n - 5, n])
    scores, index = search(rows, segments, device, 1000)
    with patch("dask_semdedup.search.sketch.choose", fitted):
        found = search(rows, segments, device, 40, at_least=at_least)
    reach = scores >= np.float32(at_least)
    np.testing.assert_array_equal(found[0], np.where(reach, scores, 0))
    np.testing.assert_array_equal(found[1], np.where(reach, index, np.arange(n)))


@pytest.mark.parametrize("device", DEVICES)
def test_of_copies_in_several_chunks_the_first_is_the_neighbour(device: str) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)[np.arange(60) % 5]
    scores, index = search(rows, np.array([0, 60]), device, 10)
    np.testing.assert_array_equal(index[5:], np.arange(55) % 5)
    np.testing.assert_allclose(scores[5:], 1, atol=2e-6)


def test_chunks_whose_scores_tie_in_float32_are_decided_in_float64() -> None:
    """The better of two candidates is in a later chunk, and better by less than float32 scores show."""
    angles = np.array([1e-4, 1.0, 2.0, 2.1, 2.2, -0.5e-4, 0.0])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert rows[-1] @ rows[0] == rows[-1] @ rows[5] == 1
    scores, index = search(rows, np.array([0, 7]), "cpu", 4)
    oracle.assert_nearest_earlier(rows, np.array([0, 7]), scores, index)
    assert index[-1] == 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("compute_dtype", "error"), [("float32", 2e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_plain_searches_are_within_their_precision(device: str, compute_dtype: str, error: float) -> None:
    rows = np.random.default_rng(1).standard_normal((300, 32)).astype(np.float32)
    segments = np.array([0, 40, 41, 299, 300])
    scores, index = search(rows, segments, device, 70, compute_dtype=compute_dtype)
    expected, _ = oracle.nearest_earlier(rows, segments)
    np.testing.assert_allclose(scores, expected, atol=error, rtol=0)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    reached = (unit * unit[index]).sum(axis=1)
    reached[segments[:-1]] = 0
    np.testing.assert_allclose(reached, expected, atol=error, rtol=0)


@given(
    sizes=st.lists(st.integers(0, 30), max_size=12),
    most=st.integers(2, 20),
)
def test_jobs_fit_and_meet_every_pair_of_rows_once(sizes: list[int], most: int) -> None:
    segments = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int64)
    n = int(segments[-1])
    met = np.zeros((n, n), dtype=int)
    for job in streaming._jobs(segments, most):
        assert 0 < job.n_rows <= most
        assert job.segments[-1] == job.n_rows
        host = job.host_rows(torch.arange(job.n_rows)).numpy()
        np.testing.assert_array_equal(host[-len(range(n)[job.answers]) :], range(n)[job.answers])
        stops = job.stops(None)
        stops = np.arange(job.n_rows) if stops is None else stops.numpy()
        for start, stop in pairwise(job.segments.tolist()):
            segment = np.arange(start, stop)
            met[np.ix_(host[segment], host[segment])] += segment < stops[segment, None]
    segment = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(met, np.tril(segment[:, None] == segment, k=-1))


def test_what_fits_is_one_job() -> None:
    (job,) = streaming._jobs(torch.tensor([0, 10, 30, 100]), 100)
    assert job.runs == (slice(0, 100),)


@pytest.mark.parametrize("n_rows", [1000, 60, 25])
def test_no_search_has_more_rows_than_memory_allows(n_rows: int) -> None:
    rows, seen = np.random.default_rng(2).standard_normal((200, 8)).astype(np.float32), []

    def spy(rows: torch.Tensor, segments: torch.Tensor, **options):
        seen.append(len(rows))
        return nearest_earlier(rows, segments, **options)

    with patch.object(streaming, "nearest_earlier", spy):
        search(rows, np.array([0, 50, 80, 200]), "cpu", n_rows)
    assert max(seen) <= n_rows
    assert len(seen) == 1 if n_rows == 1000 else len(seen) > 2


def test_nothing_and_single_rows() -> None:
    scores, index = search(np.empty((0, 4), np.float32), np.array([0]), "cpu", 10)
    assert scores.shape == index.shape == (0,)
    scores, index = search(np.ones((3, 4), np.float32), np.array([0, 1, 1, 2, 3]), "cpu", 2)
    assert scores.tolist() == [0, 0, 0]
    assert index.tolist() == [0, 1, 2]


def test_a_failed_search_leaves_the_device_to_the_next() -> None:
    rows, segments = torch.randn(100, 8), torch.tensor([0, 100])
    with (
        patch.object(streaming, "nearest_earlier", side_effect=RuntimeError("out of memory")),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        nearest_earlier_from_host(rows, segments, device="cpu", memory_bytes=memory_for(30, 8))
    scores, index = nearest_earlier_from_host(rows, segments, device="cpu", memory_bytes=memory_for(30, 8))
    oracle.assert_nearest_earlier(rows.numpy(), segments.numpy(), scores.numpy(), index.numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_rows_of_any_floating_dtype(dtype: torch.dtype) -> None:
    rows, segments = torch.randn(60, 12).to(dtype), torch.tensor([0, 20, 60])
    scores, index = nearest_earlier_from_host(rows, segments, device="cpu", memory_bytes=memory_for(25, 12))
    oracle.assert_nearest_earlier(rows.float().numpy(), segments.numpy(), scores.numpy(), index.numpy())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="compute_dtype must be one of"):
        nearest_earlier_from_host(torch.ones(3, 2), torch.tensor([0, 3]), device="cpu", compute_dtype="float8")
    with pytest.raises(ValueError, match="ascend from 0 to the number of rows, 3"):
        nearest_earlier_from_host(torch.ones(3, 2), torch.tensor([0, 2]), device="cpu")


def test_frames_in_host_memory_are_streamed_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def on_cpu(rows: torch.Tensor, segments: torch.Tensor, *, device: str, **options):
        sent.append((rows.device.type, device))
        return nearest_earlier_from_host(rows, segments, device="cpu", **options)

    monkeypatch.setattr(devices, "has_cuda", lambda: True)
    monkeypatch.setattr(streaming, "nearest_earlier_from_host", on_cpu)
    scores = run(GOLDEN, device="cuda")
    assert sent == [("cpu", "cuda")]
    pd.testing.assert_frame_equal(scores, run(GOLDEN, device="cpu"), atol=2e-6)
    assert len(sent) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("staging_bytes", [256, 1 << 20])
def test_rows_arrive_whole_through_staging_buffers_of_any_size(staging_bytes: int) -> None:
    n = 20_000 if staging_bytes > 256 else 1000
    rows = np.random.default_rng(3).standard_normal((n, 96)).astype(np.float32)
    segments = np.array([0, n // 5, n])
    with patch.object(streaming, "STAGING_BYTES", staging_bytes):
        streaming._links.clear()
        try:
            scores, index = search(rows, segments, "cuda", n // 3)
        finally:
            streaming._links.clear()
    expected_scores, expected_index = nearest_earlier(torch.from_numpy(rows), torch.from_numpy(segments))
    np.testing.assert_allclose(scores, expected_scores, atol=2e-6, rtol=0)
    np.testing.assert_array_equal(index, expected_index)


@pytest.mark.parametrize(("allocator", "expected"), [("native", 120), ("cudaMallocAsync", 100), ("pluggable", 50)])
def test_what_is_free_is_shared_with_cudf(allocator: str, expected: int) -> None:
    link = object.__new__(streaming._CudaLink)
    link.device = torch.device("cuda", 0)
    with (
        patch.object(torch.cuda, "mem_get_info", lambda device: (100, 1000)),
        patch.object(torch.cuda, "memory_reserved", lambda device: 50),
        patch.object(torch.cuda, "memory_allocated", lambda device: 30),
        patch.object(torch.cuda.memory, "get_allocator_backend", lambda: allocator),
    ):
        assert link.free_bytes() == expected


def test_where_no_memory_is_free_rows_are_not_searched_two_by_two() -> None:
    rows, seen = np.eye(100, dtype=np.float32), []

    def jobs(segments: torch.Tensor, most: int) -> Iterator[Any]:
        seen.append(most)
        return _jobs(segments, most)

    _jobs = streaming._jobs
    with patch.object(streaming._Link, "free_bytes", lambda link: 0), patch.object(streaming, "_jobs", jobs):
        streaming.nearest_earlier_from_host(torch.from_numpy(rows), torch.tensor([0, 100]), device="cpu")
    assert seen == [streaming.MIN_ROWS]


@pytest.mark.gpu
def test_device_memory_stays_within_what_was_given(device_memory: Callable[..., tuple[int, int]]) -> None:
    rows, segments = np.random.default_rng(4).standard_normal((60_000, 256)).astype(np.float32), np.array([0, 60_000])
    search(rows[:100], np.array([0, 100]), "cuda", 100)
    most, left = device_memory(lambda: search(rows, segments, "cuda", 20_000))
    assert 0 < most <= memory_for(20_000, 256)
    assert left == 0
