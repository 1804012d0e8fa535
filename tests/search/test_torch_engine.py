"""The pieces of the torch engine."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dask_semdedup.search import certify, half_dtype, torch_engine


@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=10), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_strips_hold_every_query_once_and_stay_in_one_segment(sizes: list[int], size: int, seed: int) -> None:
    segments = torch.tensor([0, *sizes]).cumsum(0)
    torch.manual_seed(seed)
    queries = (torch.rand(int(segments[-1])) < 0.7).nonzero().flatten()
    seen = []
    for strip in torch_engine.strips(queries, segments, size):
        assert 1 <= len(strip.queries) <= size
        segment = torch.searchsorted(segments, strip.queries, right=True) - 1
        assert (segments[segment] == strip.start).all()
        assert strip.stop == strip.queries[-1]
        seen += strip.queries.tolist()
    assert seen == queries.tolist()


@given(sizes=st.lists(st.integers(1, 250), min_size=1, max_size=60), row_bytes=st.sampled_from([4, 1000, 10**6]))
def test_batches_hold_every_segment_once_and_pad_little(sizes: list[int], row_bytes: int) -> None:
    segments = torch.tensor([0, *sizes]).cumsum(0)
    seen = []
    for batch in torch_engine.batches(segments, torch.arange(len(sizes)), row_bytes, torch.device("cpu")):
        assert batch.longest == batch.lengths.max()
        assert batch.lengths.min() >= 0.75 * batch.longest
        assert len(batch.starts) == 1 or row_bytes * batch.longest * len(batch.starts) <= torch_engine.BATCH_BYTES
        rows = batch.rows()
        if batch.is_contiguous:
            assert (rows.flatten().diff() == 1).all()
        for row, start, length in zip(rows, batch.starts, batch.lengths, strict=True):
            assert row[:length].tolist() == list(range(start, start + length))
            assert (row[length:] == start + length - 1).all()
        seen += batch.starts.tolist()
    assert sorted(seen) == segments[:-1].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [[5, 6, 7, 8], [1, 4, 9], [3]])
def test_panels_mask_the_candidates_that_are_not_ranked_before_the_query(
    dtype: torch.dtype, queries: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "BLOCK", 4)
    monkeypatch.setattr(torch_engine, "workspace_bytes", lambda device: 1)
    rows = torch.nn.functional.normalize(torch.rand(10, 6) + 0.1, dim=1)
    coarse = torch_engine.Coarse(rows.to(dtype), None, torch.zeros(10))
    strip = torch_engine.Strip(0, torch.tensor(queries), queries[-1])
    for panel in torch_engine.Panels(coarse, len(queries)).of(strip):
        candidates = panel.first + torch.arange(4)
        earlier = candidates[:, None] < strip.queries
        expected = coarse.rows[candidates.clamp(max=9)] @ coarse.rows[strip.queries].T
        positive = torch.where(earlier, expected, 0).amax(dim=0)
        torch.testing.assert_close(panel.positive_maxima()[0], positive)
        maxima = torch.where(earlier, expected, -torch.inf).amax(dim=0)
        torch.testing.assert_close(panel.maxima()[0], maxima)


def test_crowded_queries_are_named_and_add_no_pairs() -> None:
    """300 copies of one row: no certificate can choose among them."""
    unit = certify.measure(torch.ones(300, 16))
    scores, index = torch.zeros(300), torch.arange(300)
    pairs = torch_engine.Pairs(unit, scores, index)
    segments = torch.tensor([0, 300])
    crowded = torch_engine.certified(torch_engine.in_float32(unit), torch.arange(1, 300), segments, pairs)
    pairs.flush()
    # What counts is the blocks that reach the window, here one, and the candidates in them.
    few = torch_engine.MOST_HITS
    assert crowded.tolist() == list(range(few, 300))
    assert index[:few].tolist() == [0] * few
    assert index[few:].tolist() == list(range(few, 300))


def test_half_precision_is_used_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert half_dtype(torch.device("cpu")) is None
    assert half_dtype(torch.device("cuda")) is torch.float16
