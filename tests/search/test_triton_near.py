"""Pairs of sketches found by Triton's kernels, in the interpreter and on a GPU: no near one is missed."""

from __future__ import annotations

from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from dask_semdedup.search import near
from dask_semdedup.search.index import PACES, Pace, fit_index, sample_rows
from dask_semdedup.search.near import near_pairs, sketch_parts
from tests.search.test_near import connected, index_of, near_rows, parts_of, row_numbers
from tests.strategies import KINDS, seeds

triton = pytest.importorskip("triton")
from dask_semdedup.search import triton_near, triton_sketch  # noqa: E402
from dask_semdedup.search.triton_sketch import Shape, choose_shape  # noqa: E402

SMALL = Shape(queries=16, candidates=16, run=2, chunk=4, warps=1, stages=1)

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled here")


@given(
    counts=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=6),
    among=st.booleans(),
    shape=st.sampled_from([SMALL, Shape(), Shape(candidates=256, run=128)]),
    word_bytes=st.sampled_from([1, 4096, 1 << 28]),
)
def test_blocks_cover_every_pair_of_a_cell(
    counts: list[tuple[int, int]], among: bool, shape: Shape, word_bytes: int
) -> None:
    members, visitors = np.array(counts).T
    limit = np.cumsum(members)
    start = limit - members
    queries = members if among else visitors
    begin = np.cumsum(queries) - queries
    tensors = map(torch.from_numpy, (queries, start, limit))
    blocks = triton_near._blocks(*tensors, shape, among=among, word_bytes=word_bytes)
    met = {}
    n_fields = triton_sketch.FIELDS
    table = blocks.table[: len(blocks.table) // n_fields * n_fields].reshape(-1, n_fields).tolist()
    words = 0
    for launch in blocks.launches:
        assert launch.first_word == words
        words += launch.words
        assert launch.words == table[launch.last][5] - table[launch.first][5]
        assert launch.tiles == max(row[4] for row in table[launch.first : launch.last])
    assert words == table[-1][5]
    for query, stop, candidate, full, tiles, _ in table[:-1]:
        for row in range(query, min(query + shape.queries, stop)):
            met[row] = candidate, candidate + full * shape.candidates, candidate + tiles * shape.candidates
    for cell, count in enumerate(queries):
        for row in range(count):
            stop = start[cell] + row if among else limit[cell]
            if stop > start[cell]:
                first, full, last = met[int(begin[cell] + row)]
                assert first == start[cell]
                assert full <= stop <= last


# The highest bit of a word is its sign.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@interpreted
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    rng=seeds(),
    kind=st.sampled_from(KINDS),
    n=st.integers(2, 50),
    k=st.integers(1, 5),
    at_least=st.sampled_from([0.5, 0.9]),
    most_hits=st.sampled_from([0, 2, 128]),
    with_others=st.booleans(),
    data=st.data(),
)
def test_every_near_pair_is_connected(
    rng: np.random.Generator,
    kind,
    n: int,
    k: int,
    at_least: float,
    most_hits: int,
    with_others: bool,
    data: st.DataObject,
) -> None:
    rows = kind(rng, n, 64).astype(np.float32)
    index = index_of(rows, at_least, k)
    if index is None:
        return
    cuts = sorted(data.draw(st.lists(st.integers(0, n), min_size=1, max_size=2)))
    parts = parts_of(rows, cuts, index)
    with (
        patch.object(near, "has_triton", lambda device: True),
        patch.object(near, "MANY", data.draw(st.sampled_from([0, 8]))),
        patch.object(triton_near, "choose_shape", lambda segments: SMALL),
        patch.object(triton_near, "PROGRAMS", 2),
        patch.object(triton_near, "ELEMENTS", data.draw(st.sampled_from([50, 1 << 20]))),
        patch.object(triton_near, "HITS", data.draw(st.sampled_from([5, 1 << 20]))),
        patch.object(triton_near, "TILE", (4, 16)),
        patch.object(triton_near, "WORD_BYTES", data.draw(st.sampled_from([64, 1 << 28]))),
        patch.object(triton_sketch, "MAX_HITS", most_hits),
    ):
        sides = (parts[:1], parts[1:]) if with_others else (parts, None)
        links = near_pairs(*sides, slice(0, len(index.cells)), index)
    label = connected(n, links, parts, cuts)
    query, candidate = near_rows(rows, at_least)
    if with_others:
        is_between = (query < cuts[0]) != (candidate < cuts[0])
        query, candidate = query[is_between], candidate[is_between]
        assert ((links.pairs[:, 0] >> 32 == 0) != (links.pairs[:, 1] >> 32 == 0)).all()
    assert (label[query] == label[candidate]).all()


@interpreted
def test_rows_that_are_far_apart_are_in_no_pair() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 64)).astype(np.float32)
    rows[30] = rows[7] + 1e-3
    index = index_of(rows, 0.95, 4, size=48)
    assert index is not None
    with (
        patch.object(near, "has_triton", lambda device: True),
        patch.object(triton_near, "choose_shape", lambda segments: SMALL),
        patch.object(triton_near, "PROGRAMS", 2),
    ):
        links = near_pairs(parts_of(rows, [20], index), None, slice(0, len(index.cells)), index)
    assert {frozenset(row_numbers(pair, [20]).tolist()) for pair in links.pairs} == {frozenset({7, 30})}
    assert not len(links.bundles)


@interpreted
def test_zero_rows_are_in_no_pair() -> None:
    index = index_of(np.random.default_rng(0).standard_normal((60, 64)).astype(np.float32), 0.95, 4)
    assert index is not None
    parts = parts_of(np.zeros((6, 64), np.float32), [2], index)
    with patch.object(near, "has_triton", lambda device: True):
        links = near_pairs(parts, None, slice(0, len(index.cells)), index)
        between = near_pairs(parts[:1], parts[1:], slice(0, len(index.cells)), index)
    assert not any(len(found) for one in (links, between) for found in (one.pairs, one.bundles))


def real_like(rng: np.random.Generator, n: int, d: int = 256) -> np.ndarray:
    """Rows around centres, a twentieth of them near-copies, in random order."""
    weights = np.arange(1, d + 1) ** -0.5
    centres = rng.standard_normal((200, d)) * weights
    rows = centres[rng.integers(200, size=n)] + 0.5 * rng.standard_normal((n, d)) * weights
    rows[: n // 20] = rows[n // 20 : n // 10] + 0.01 * rng.standard_normal((n // 20, d))
    return rows[rng.permutation(n)].astype(np.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [0, 3000])
@pytest.mark.parametrize("at_least", [0.9, 0.97])
def test_an_index_on_a_gpu_misses_none(at_least: float, dense: int) -> None:
    rng = np.random.default_rng(dense)
    n = 30_000
    rows = real_like(rng, n)
    rows[:dense] = rows[0] + 1e-3 * rng.standard_normal((dense, rows.shape[1]))
    on_gpu = torch.from_numpy(rows).cuda()
    with patch.dict(PACES, cuda=Pace(0, 0, 0, 0, 0)):
        index = fit_index(on_gpu[torch.randperm(n)[: sample_rows(n)]], n, at_least, at_once=False)
    assert index is not None
    cuts = [0, 7000, 18_000, n]
    parts = [sketch_parts(p, on_gpu[cuts[p] : cuts[p + 1]], index, stays=p > 0)[0] for p in range(3)]
    unit = torch.nn.functional.normalize(on_gpu.double(), dim=1)
    k = len(index.cells)
    for cells in ([slice(0, k)], [slice(0, k // 3), slice(k // 3, k)]):
        found = [near_pairs(parts, None, some, index, "cuda") for some in cells]
        links = near.Links(np.concatenate([one.pairs for one in found]), np.concatenate([one.bundles for one in found]))
        label = torch.from_numpy(connected(n, links, parts, cuts[1:-1])).cuda()
        for start in range(0, n, 5000):
            query, candidate = (unit[start : start + 5000] @ unit.T >= at_least).nonzero(as_tuple=True)
            assert (label[query + start] == label[candidate]).all()
        if not dense:
            assert len(links.pairs) < 4 * n


@pytest.mark.gpu
def test_sketches_of_a_gpu_are_those_of_the_cpu() -> None:
    rows = torch.from_numpy(real_like(np.random.default_rng(1), 20_000))
    index = index_of(rows.numpy()[:4000], 0.95, 60)
    assert index is not None
    [ours], [theirs] = sketch_parts(0, rows, index), sketch_parts(0, rows.cuda(), index)
    same = np.argsort(ours.rows), np.argsort(theirs.rows)
    np.testing.assert_array_equal(ours.rows[same[0]], theirs.rows[same[1]])
    np.testing.assert_allclose(ours.coordinates[same[0]], theirs.coordinates[same[1]], atol=1e-3)
    np.testing.assert_allclose(ours.left[same[0]], theirs.left[same[1]], atol=1e-4)
    np.testing.assert_allclose(np.diff(ours.members), np.diff(theirs.members), atol=3)


@pytest.mark.gpu
def test_large_cells_take_large_tiles() -> None:
    rng = np.random.default_rng(2)
    rows = torch.from_numpy(real_like(rng, 40_000)).cuda()
    index = index_of(rows.cpu().numpy()[:4000], 0.97, 1, size=64)
    assert index is not None
    assert choose_shape(np.array([0, 40_000])).candidates == 256
    [part] = sketch_parts(0, rows, index)
    links = near_pairs([part], None, slice(0, 1), index, "cuda")
    label = torch.from_numpy(connected(40_000, links, [part], [])).cuda()
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    for start in range(0, 40_000, 5000):
        query, candidate = (unit[start : start + 5000] @ unit.T >= 0.97).nonzero(as_tuple=True)
        assert (label[query + start] == label[candidate]).all()
