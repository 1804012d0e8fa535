"""The kernels of sketches in Triton's interpreter on small shapes, and the tables that drive them."""

from __future__ import annotations

from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from dask_semdedup import search
from dask_semdedup.search import nearest_earlier
from dask_semdedup.search.crowded import answer_crowded, centred
from tests.search.test_sketch import fitted
from tests.strategies import KINDS, seeds, stops_of

triton = pytest.importorskip("triton")
from dask_semdedup.search import triton_engine, triton_sketch  # noqa: E402
from dask_semdedup.search.tiling import Config  # noqa: E402
from dask_semdedup.search.triton_sketch import Shape, block_table, nearest_reaching  # noqa: E402

SMALL = Shape(queries=16, candidates=16, run=2, chunk=4, warps=1, stages=1)

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="kernels are compiled here: see test_cuda",
)


@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=8),
    shape=st.sampled_from([SMALL, Shape(), Shape(candidates=256, run=128)]),
    rng=seeds(),
    with_stops=st.booleans(),
)
def test_blocks_cover_every_pair(sizes: list[int], shape: Shape, rng: np.random.Generator, with_stops: bool) -> None:
    segments = np.cumsum([0, *sizes])
    stops = stops_of(rng, segments) if with_stops else np.arange(segments[-1])
    table = block_table(segments, stops if with_stops else None, shape)
    words = 0
    seen = np.zeros(segments[-1], bool)
    for query, end, start, full, tiles, word in table[:-1].tolist():
        rows = slice(query, min(query + shape.queries, end))
        seen[rows] = True
        assert word == words
        words += -(-tiles * (shape.candidates // shape.run) // 32)
        assert start + full * shape.candidates <= stops[rows].min(), "all of these are before all stops"
        assert stops[rows].max() <= start + tiles * shape.candidates, "no candidate is left out"
    assert table[-1, 5] == words
    starts = np.repeat(segments[:-1], sizes)
    assert seen[stops > starts].all()


# The highest bit of a word is its sign.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@interpreted
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    rng=seeds(),
    kind=st.sampled_from(KINDS),
    n=st.integers(2, 90),
    most_hits=st.sampled_from([0, 2, 128]),
    with_stops=st.booleans(),
    at_least=st.sampled_from([0.4, 0.9]),
    size=st.sampled_from([32, 192]),
)
def test_the_same_bits_as_without_sketches(
    rng: np.random.Generator, kind, n: int, most_hits: int, with_stops: bool, at_least: float, size: int
) -> None:
    rows = torch.from_numpy(kind(rng, n, 2 * size).astype(np.float32))
    segments = np.array([0, n // 3, n // 3, n - 1, n])
    stops = torch.from_numpy(stops_of(rng, segments)) if with_stops else None
    segments = torch.from_numpy(segments)
    scores, index = torch.empty(n), torch.empty(n, dtype=torch.int64)
    with patch.object(search.sketch, "SIZES", (size,)):
        sketcher = fitted(rows, segments, stops, at_least, triton_sketch.COSTS)
    with patch.object(triton_sketch, "MAX_HITS", most_hits):
        crowded = nearest_reaching(rows, segments, scores, index, sketcher, stops=stops, shape=SMALL, word_bytes=512)
        answer_crowded(rows, segments, stops, *crowded, exact, scores, index)
    search.without_answers_below(at_least, scores, index)
    expected = nearest_earlier(rows, segments, stops=stops, at_least=at_least)
    assert torch.equal(scores, expected[0])
    assert torch.equal(index, expected[1])


def exact(
    rows: torch.Tensor, segments: torch.Tensor, stops: torch.Tensor, centred: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The search of all rows."""
    return nearest_earlier(rows, segments, stops=stops)


@interpreted
@pytest.mark.parametrize("distance", [0.02, 1e-3, 1e-5, 1e-9])
def test_rows_that_are_nearly_alike_are_told_apart(distance: float) -> None:
    """Centred, they leave few pairs: none of the queries is crowded."""
    rng = np.random.default_rng(0)
    centre = rng.standard_normal(96)
    rows = centre / np.linalg.norm(centre) + rng.standard_normal((80, 96)) * (distance / 96) ** 0.5
    rows[50] = rows[7]
    rows = torch.from_numpy((rows * rng.uniform(0.1, 3, (80, 1))).astype(np.float32))
    segments = torch.tensor([0, 50, 80])
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    close = centred(rows, unit.mean(dim=0))
    scores, index = torch.empty(80), torch.empty(80, dtype=torch.int64)
    config = Config(queries=16, candidates=16, depth=16, stages=1, warps=1, keep=3)
    with patch.object(triton_engine, "MAX_PAIRS", 16):
        triton_engine.nearest(rows, segments, scores, index, config=config, centred=close)
    expected = nearest_earlier(rows, segments)
    assert torch.equal(scores, expected[0])
    assert torch.equal(index, expected[1])
