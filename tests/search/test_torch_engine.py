"""The pieces of the torch engine."""

from __future__ import annotations

from itertools import product

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
    for batch in torch_engine.batches(segments, torch.arange(len(sizes)), torch.empty(1, row_bytes // 4)):
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


@pytest.mark.parametrize(
    ("start", "queries"),
    [(0, [5, 6, 7, 8]), (0, [1, 4, 9]), (0, [3]), (2, [*range(3, 17)]), (3, [*range(9, 20)]), (6, [7, 8, 11, 19])],
    ids=str,
)
def test_panels_mask_the_candidates_that_are_not_ranked_before_the_query(
    start: int, queries: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some strips are runs, whose products leave out earlier queries step by step, others are not. Runs that end before
    the last row are padded with rows of the next segment."""
    monkeypatch.setattr(torch_engine, "BLOCK", 4)
    monkeypatch.setattr(torch_engine, "STEP", 3)
    for dtype, panel_bytes in product([torch.bfloat16, torch.float32], [1, 1 << 20]):
        monkeypatch.setattr(torch_engine, "workspace_bytes", lambda rows, panel_bytes=panel_bytes: panel_bytes)
        check_panels(dtype, start, queries)


def check_panels(dtype: torch.dtype, start: int, queries: list[int]) -> None:
    rows = torch.nn.functional.normalize(torch.randn(20, 6), dim=1)
    coarse = torch_engine.Coarse(rows.to(dtype), None, torch.zeros(20))
    rows_of_strip = torch.tensor(queries)
    strip = torch_engine.Strip(start, queries[-1], rows_of_strip, rows_of_strip)
    panels = torch_engine.Panels(coarse, len(queries) + 1)
    # What an earlier strip has left behind must not matter.
    panels.buffer.fill_(torch.nan)
    seen = 0
    for panel in panels.of(strip):
        candidates = panel.first + torch.arange(panel.scores.shape[0] * 4)
        earlier = candidates[:, None] < strip.queries
        expected = coarse.rows[candidates.clamp(max=19)] @ coarse.rows[strip.queries].T
        shape = (-1, 4, len(queries))
        positive = torch.where(earlier, expected, 0).view(shape).amax(dim=1)
        torch.testing.assert_close(panel.positive_maxima().clamp(min=0), positive.clamp(min=0))
        maxima = torch.where(earlier, expected, -torch.inf).view(shape).amax(dim=1)
        some = torch.arange(len(queries))[::2]
        torch.testing.assert_close(panel.maxima(some), maxima[:, some])
        torch.testing.assert_close(panel.maxima(), maxima)
        seen += len(candidates)
    assert strip.stop - start <= seen < strip.stop - start + 4


def test_crowded_queries_are_named_and_add_no_pairs() -> None:
    """300 copies of one row: no certificate can choose among them."""
    unit = certify.measure(torch.ones(300, 16))
    scores, index = torch.zeros(300), torch.arange(300)
    pairs = torch_engine.Pairs(unit, scores, index)
    segments = torch.tensor([0, 300])
    crowded = torch_engine.certified(torch_engine.in_float32(unit), torch.arange(1, 300), segments, None, pairs)
    pairs.flush()
    # What counts is the blocks that reach the window, here one, and the candidates in them.
    few = torch_engine.MAX_HITS
    assert crowded.tolist() == list(range(few, 300))
    assert index[:few].tolist() == [0] * few
    assert index[few:].tolist() == list(range(few, 300))


def test_half_precision_is_used_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert half_dtype(torch.device("cpu")) is None
    assert half_dtype(torch.device("cuda")) is torch.float16
