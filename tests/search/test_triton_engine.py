"""The kernels in Triton's interpreter on small shapes, and the tables that drive them.

Tests marked ``gpu``, in `test_cuda`, run the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests import oracle
from tests.strategies import KINDS, seeds, stops_of

triton = pytest.importorskip("triton")
from dask_semdedup.search import certify, triton_engine, triton_launch  # noqa: E402
from dask_semdedup.search import tiling as tiles  # noqa: E402
from dask_semdedup.search.tiling import GROUP, Config, Tiling, tiling  # noqa: E402

TWO = Config(queries=16, candidates=32, depth=16, stages=1, warps=1, keep=2)
THREE = Config(queries=16, candidates=16, depth=16, stages=1, warps=1, keep=3)

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="kernels are compiled here: see test_cuda",
)


def blocks_of_tile(tiles: Tiling, config: Config) -> list[tuple[int, int, int]]:
    """(segment's first row, query block, candidate block) of each tile, from the kernels' own arithmetic in Python."""
    found = []
    for record, following in zip(tiles.groups[:-1].tolist(), tiles.groups[1:].tolist(), strict=True):
        first_tile, start, length, first_block, n_blocks, _, most = record

        def candidate_blocks(block: int, length: int = length, most: int = most) -> int:
            return -(-min(min((block + 1) * config.queries, length) - 1, most) // config.candidates)

        common = candidate_blocks(first_block)
        shared = [(start, first_block + member, block) for block in range(common) for member in range(n_blocks)]
        rest = [
            (start, first_block + member, block)
            for member in range(1, n_blocks)
            for block in range(common, candidate_blocks(first_block + member))
        ]
        assert len(shared) + len(rest) == following[0] - first_tile
        found += shared + rest
    return found


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=8),
    config=st.sampled_from([TWO, THREE, Config(), Config(128, 128), Config(16, 64)]),
)
def test_tiles_cover_every_pair_once_and_none_wholly_above_the_diagonal(sizes: list[int], config: Config) -> None:
    segments = np.cumsum([0, *sizes])
    tiles = tiling(segments, config)
    found = blocks_of_tile(tiles, config)
    assert len(found) == tiles.n_tiles == len(set(found))
    starts = {int(start): size for start, size in zip(segments[:-1], sizes, strict=True) if size > 1}
    covered = dict.fromkeys(starts, 0)
    for start, query_block, block in found:
        last_query = min((query_block + 1) * config.queries, starts[start]) - 1
        first = block * config.candidates
        assert first < last_query, "a tile without an earlier candidate"
        queries = np.arange(query_block * config.queries, last_query + 1)
        covered[start] += int(np.clip(queries - first, 0, config.candidates).sum())
    assert covered == {start: size * (size - 1) // 2 for start, size in starts.items()}


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=8),
    config=st.sampled_from([TWO, THREE, Config(), Config(128, 128), Config(16, 64)]),
    rng=seeds(),
)
def test_tiles_cover_every_pair_before_the_stops(sizes: list[int], config: Config, rng: np.random.Generator) -> None:
    segments = np.cumsum([0, *sizes])
    stops = stops_of(rng, segments)
    tiles = tiling(segments, config, stops)
    found = blocks_of_tile(tiles, config)
    assert len(found) == tiles.n_tiles == len(set(found))
    covered = dict.fromkeys(segments[:-1].tolist(), 0)
    ends = dict(zip(segments[:-1].tolist(), segments[1:].tolist(), strict=True))
    for start, query_block, block in found:
        first_query = start + query_block * config.queries
        of_queries = stops[first_query : min(first_query + config.queries, ends[start])]
        assert block * config.candidates < stops[start : ends[start]].max() - start, "a tile without a candidate"
        covered[start] += int(np.clip(of_queries - start - block * config.candidates, 0, config.candidates).sum())
    pairs = stops - np.repeat(segments[:-1], sizes)
    assert sum(covered.values()) == pairs.sum()


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    config=st.sampled_from([TWO, THREE, Config(), Config(128, 128), Config(16, 64)]),
)
def test_few_segments_are_tiled_as_many_are(sizes: list[int], config: Config) -> None:
    segments = np.cumsum([0, *sizes])
    with patch.object(tiles, "FEW_SEGMENTS", 0), patch.object(triton_engine, "FEW_SEGMENTS", 0):
        many, chosen = tiling(segments, config), triton_engine.choose_config(segments, 1 << 20)
    np.testing.assert_array_equal(tiling(segments, config).groups[:-1], many.groups[:-1])
    assert (tiling(segments, config).n_tiles, tiling(segments, config).n_blocks) == (many.n_tiles, many.n_blocks)
    assert triton_engine.choose_config(segments, 1 << 20) == chosen


@pytest.mark.parametrize("with_stops", [False, True])
def test_more_tiles_than_can_be_counted_are_refused(with_stops: bool) -> None:
    """Their numbers would wrap around."""
    rows, config = 1_060_000, Config(16, 16)
    stops = np.arange(rows) if with_stops else None
    with pytest.raises(ValueError, match=r"2,194,\d{3},\d{3} tiles.*largest segment has 1,060,000 rows. Cluster more"):
        tiling(np.array([0, rows]), config, stops)
    assert tiling(np.array([0, rows - 20_000]), config, None if stops is None else stops[:-20_000]).n_tiles > 2.1e9


def test_candidates_that_are_no_queries_have_no_tiles() -> None:
    """1,000 rows against 64: no more tiles than those of the 64."""
    stops = np.concatenate([np.zeros(1000, np.int64), np.full(64, 1000)])
    tiles = tiling(np.array([0, 1064]), TWO, stops)
    assert tiles.n_tiles <= (64 // TWO.queries + 1) * -(-1000 // TWO.candidates)


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=8), most=st.integers(1, 500))
def test_launches_hold_every_group_once_and_no_more_tiles_than_asked(sizes: list[int], most: int) -> None:
    tiles = tiling(np.cumsum([0, *sizes]), TWO)
    launches = tiles.launches(most)
    starts = [tuple(start) for start in tiles.groups[:, [0, 5]].tolist()]
    reached = starts[0]
    for first_tile, stop_tile, first_block, stop_block in launches:
        assert (first_tile, first_block) == reached
        reached = stop_tile, stop_block
        n_groups = starts.index(reached) - starts.index((first_tile, first_block))
        assert n_groups == 1 or stop_tile - first_tile <= most
    assert reached == starts[-1]


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_exact(kind) -> None:
    rng = np.random.default_rng(3)
    segments = np.array([0, 1, 1, 3, 45, 46, 60])
    rows = np.concatenate([kind(rng, size, 21) for size in np.diff(segments) if size]).astype(np.float32)
    for config in (TWO, THREE):
        check(rows, segments, config)


@interpreted
@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    d=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    config=st.sampled_from([TWO, THREE]),
    seed=st.integers(0, 2**32 - 1),
)
def test_kernels_are_exact_on_anything(sizes: list[int], d: int, kind, config: Config, seed: int) -> None:
    rows = kind(np.random.default_rng(seed), sum(sizes), d).astype(np.float32)
    check(rows, np.cumsum([0, *sizes]), config)


@interpreted
@pytest.mark.parametrize("config", [TWO, THREE])
@pytest.mark.parametrize("exact", [True, False])
def test_kernels_keep_to_stops(config: Config, exact: bool) -> None:
    rng = np.random.default_rng(7)
    segments = np.array([0, 1, 30, 30, 90])
    rows = rng.standard_normal((90, 12)).astype(np.float32)
    for _ in range(3):
        stops = stops_of(rng, segments)
        scores, index = search(rows, segments, config, stops=torch.from_numpy(stops), exact=exact)
        if exact:
            oracle.assert_nearest_earlier(rows, segments, scores, index, stops)
        else:
            expected, _ = oracle.nearest_earlier(rows, segments, stops)
            np.testing.assert_allclose(scores, expected, atol=2e-3)


@interpreted
@pytest.mark.parametrize("most_pairs", [0, 1])
def test_queries_with_too_many_candidates_are_multiplied_in_float64(most_pairs: int) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal(10) + 1e-4 * rng.standard_normal((40, 10))).astype(np.float32)
    with patch.object(triton_engine, "MAX_PAIRS", most_pairs):
        check(rows, np.array([0, 25, 40]), TWO)


@interpreted
def test_pairs_that_find_no_room_lose_nothing() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((6, 10))[rng.integers(6, size=60)].astype(np.float32)
    with patch.object(triton_launch, "PAIRS_PER_QUERY", 0), patch.object(triton_launch, "MIN_PAIRS", 30):
        check(rows, np.array([0, 60]), THREE)


@interpreted
def test_several_launches_are_as_one() -> None:
    rows = np.random.default_rng(2).standard_normal((100, 9)).astype(np.float32)
    check(rows, np.array([0, 70, 100]), TWO, key_bytes=4 * 2 * 16 * 3)


@interpreted
def test_largest_tile_group_fits_the_plan() -> None:
    """More query blocks than a group holds."""
    rows = np.random.default_rng(4).standard_normal((16 * (GROUP + 2) + 5, 8)).astype(np.float32)
    check(rows, np.array([0, len(rows)]), TWO)


@interpreted
def test_plain_search_finds_the_best_coarse_score() -> None:
    rows = np.random.default_rng(5).standard_normal((90, 12)).astype(np.float32)
    segments = np.array([0, 60, 90])
    scores, index = search(rows, segments, TWO, exact=False)
    expected, _ = oracle.nearest_earlier(rows, segments)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    reached = (unit * unit[index]).sum(axis=1)
    reached[segments[:-1]] = 0
    error = 4 * torch.finfo(torch.float16).eps
    np.testing.assert_allclose(scores, expected, atol=error)
    np.testing.assert_allclose(reached, expected, atol=error)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_halving_loses_what_it_says(kind) -> None:
    rows = torch.from_numpy(kind(np.random.default_rng(6), 30, 37).astype(np.float32))
    scores, index = torch.full((30,), torch.nan), torch.full((30,), -1)
    table = triton_engine.upload(tiling(np.array([0, 30]), TWO), None, rows)
    work = triton_engine.Workspace.empty(rows, 0)
    half = triton_engine.halve(triton_engine.Launcher(), rows, torch.float16, table, work, scores, index)
    residual, largest = work.residual[:30], table.largest[:1]
    assert half.shape == (30, 40)
    assert not half[:, 37:].any()
    zero = (rows == 0).all(dim=1)
    assert (residual[zero] == -1).all()
    exact = rows[~zero].double()
    exact /= exact.abs().amax(dim=1, keepdim=True)
    exact /= exact.norm(dim=1, keepdim=True)
    lost = (exact - half[~zero, :37].double()).norm(dim=1)
    assert (lost <= residual[~zero] + certify.UNIT_TOLERANCE).all()
    assert (residual <= 2.0**-10).all()
    assert largest.view(torch.float32) == residual.clamp(min=0).max()
    assert index.tolist() == list(range(30))
    assert not work.count[:30].any()
    assert not scores.any()


@pytest.fixture(autouse=True, scope="module")
def few_pairs() -> Iterator[None]:
    """Limits so low that a few rows reach them: the interpreter takes a millisecond a pair."""
    with patch.object(triton_engine, "RUN", 4), patch.object(triton_engine, "MAX_PAIRS", 9):
        yield


def search(rows: np.ndarray, segments: np.ndarray, config: Config, **options) -> tuple[np.ndarray, np.ndarray]:
    scores, index = torch.full((len(rows),), torch.nan), torch.full((len(rows),), -1)
    triton_engine.nearest(torch.from_numpy(rows), torch.from_numpy(segments), scores, index, config=config, **options)
    return scores.numpy(), index.numpy()


def check(rows: np.ndarray, segments: np.ndarray, config: Config, **options) -> None:
    scores, index = search(rows, segments, config, **options)
    oracle.assert_nearest_earlier(rows, segments, scores, index)
