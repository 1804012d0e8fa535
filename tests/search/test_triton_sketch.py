"""The kernels of sketches in Triton's interpreter on small shapes, and the tables that drive them."""

from __future__ import annotations

from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from dask_semdedup import search
from dask_semdedup.search import nearest_earlier, sketch
from dask_semdedup.search.crowded import answer_crowded, centred
from tests.search.test_sketch import exact, fitted
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
    with patch.object(sketch, "SIZES", (size,)):
        sketcher = fitted(rows, segments, stops, at_least, triton_sketch.COSTS)
    assume(sketcher is not None)
    with patch.object(triton_sketch, "MAX_HITS", most_hits):
        crowded = nearest_reaching(rows, segments, scores, index, sketcher, stops=stops, shape=SMALL, word_bytes=512)
        answer_crowded(rows, segments, stops, *crowded, exact, scores, index)
    search.without_answers_below(at_least, scores, index)
    expected = nearest_earlier(rows, segments, stops=stops, at_least=at_least)
    assert torch.equal(scores, expected[0])
    assert torch.equal(index, expected[1])


def axes_with(row: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal columns, the first of which is a row's direction."""
    others = torch.eye(len(row))[:, : count - 1]
    return torch.linalg.qr(torch.cat([row[:, None], others], dim=1))[0].contiguous()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@interpreted
@pytest.mark.parametrize("exponent", [-143, -100, -60, -41, -40, -39, 39, 40, 41, 100, 127])
def test_rows_of_any_length_have_the_same_sketch(exponent: int) -> None:
    row = torch.ones(2048)
    row[::7] = 1 / 64
    rows = torch.stack([row, (row.double() * 2.0**exponent * 0.8).float()])
    scores, index = torch.empty(2), torch.empty(2, dtype=torch.int64)
    sketcher = sketch.sketcher(axes_with(row, 31), 0.0, 0.9)
    nearest_reaching(rows, torch.tensor([0, 2]), scores, index, sketcher, shape=SMALL)
    assert index[1] == 0
    assert scores[1] > 0.999


@interpreted
def test_what_rounding_lost_is_multiplied_by_the_length_of_a_sketch() -> None:
    row = torch.ones(64)
    rows = torch.cat([row[None], torch.randn(15, 64, generator=torch.Generator().manual_seed(0))])
    rows[8:] -= rows[8:] @ axes_with(row, 31) @ axes_with(row, 31).T
    sketcher = sketch.sketcher(axes_with(row, 31), 0.004, 0.9)
    filter_ = triton_sketch._RowFilter(rows, sketcher, None, SMALL, 512)
    filter_.sketch(torch.empty(16), torch.empty(16, dtype=torch.int64))
    sketches = sketcher.sketches(torch.nn.functional.normalize(rows, dim=1)).double()
    lost = torch.linalg.vector_norm(sketches - filter_.sketches[:16].double() / sketch.SCALE, dim=1)
    longest = torch.linalg.vector_norm(sketches, dim=1).max()
    assert longest > 1 + 2.0**-9
    assert (filter_.residual[:16] >= lost * longest - 1e-6).all()


@interpreted
@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_tensors_are_aligned_as_the_launcher_says(n: int) -> None:
    sketcher = sketch.sketcher(torch.eye(64)[:, :31], 0.0, 0.9)
    filter_ = triton_sketch._RowFilter(torch.ones(n, 64), sketcher, None, SMALL, 512)
    for tensor in (filter_.residual, filter_.count, filter_.offset, filter_.hit_query, filter_.hit_run):
        assert (tensor.data_ptr() - filter_.hit_score.data_ptr()) % 16 == 0
    assert len(filter_.count) == n


def test_more_words_than_an_int32_counts_are_refused() -> None:
    block_table(np.array([0, 47_000_000]), None, Shape(candidates=256, run=128))
    with pytest.raises(ValueError, match="48,000,000 rows"):
        block_table(np.array([0, 48_000_000]), None, Shape(candidates=256, run=128))


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
