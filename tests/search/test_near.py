"""No pair of near rows is missed by sketches and cells, whatever the cells are, and where the rows stand."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import pairwise
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from dask_semdedup.search import near, sketch, torch_near
from dask_semdedup.search.cells import ELEMENTS, Cells, fit_cells, reach_of
from dask_semdedup.search.index import PACES, Index, fit_index, n_cells, sample_rows
from dask_semdedup.search.near import Links, Part, components, near_pairs, sketch_parts
from dask_semdedup.search.sketch import Sketcher, fit_axes, sketcher, unit_rows
from tests import oracle
from tests.strategies import KINDS, seeds

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products of a few rows wait longer for threads than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def index_of(rows: np.ndarray, at_least: float, k: int, size: int = 32) -> Index | None:
    """An index of so many cells, whether it pays or not; None where rows have no directions."""
    unit = unit_rows(torch.from_numpy(rows))
    unit = unit[unit.any(dim=1)]
    if not len(unit):
        return None
    axes, defect = fit_axes(unit, size + 15, tf32=False)
    found, longer = (
        sketcher(part.contiguous(), float(defect), at_least, tf32=False) for part in (axes[:, : size - 1], axes)
    )
    cells = fit_cells(found.sketches(unit), k, reach_of(found))
    return Index(found, longer, cells, np.ones(len(cells)), 0.0, 0.0, 0.0)


def parts_of(rows: np.ndarray, cuts: list[int], index: Index, first: int = 0) -> list[Part]:
    """The rows in parts that end at these places."""
    bounds = [0, *sorted(cuts), len(rows)]
    tensors = [torch.from_numpy(rows[start:stop]) for start, stop in pairwise(bounds)]
    return [part for number, rows in enumerate(tensors, first) for part in sketch_parts(number, rows, index)]


def row_numbers(keys: np.ndarray, cuts: list[int], first: int = 0) -> np.ndarray:
    return np.array([0, *sorted(cuts)])[(keys >> 32) - first] + (keys & 0xFFFFFFFF)


def connected(n: int, links: Links, parts: list[Part], cuts: list[int]) -> np.ndarray:
    """The component of each row."""
    copies = [part.first + part.copies for part in parts]
    keys = np.concatenate([links.pairs, links.bundles, *copies])
    return components(n, row_numbers(keys, cuts))


def near_rows(rows: np.ndarray, at_least: float) -> tuple[np.ndarray, np.ndarray]:
    """All pairs that are so similar in float64."""
    return (oracle.cosines(rows) >= at_least).nonzero()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(
    rng=seeds(),
    kind=st.sampled_from(KINDS),
    n=st.integers(2, 150),
    k=st.integers(1, 30),
    at_least=st.sampled_from([0.5, 0.8, 0.95, 0.99]),
    data=st.data(),
)
def test_every_near_pair_is_connected(
    dtype: torch.dtype, rng: np.random.Generator, kind, n: int, k: int, at_least: float, data: st.DataObject
) -> None:
    rows = kind(rng, n, 64).astype(np.float32)
    index = index_of(rows, at_least, k)
    if index is None:
        return
    cuts = data.draw(st.lists(st.integers(0, n), max_size=4))
    with patch.dict(near.PART_ROWS, cpu=data.draw(st.sampled_from([1, 20, 1 << 15]))):
        parts = parts_of(rows, cuts, index)
    with (
        patch.object(torch_near, "sketch_dtype", lambda: dtype),
        patch.object(near, "MANY", data.draw(st.sampled_from([0, 1, 8]))),
        patch.object(torch_near, "BATCH", data.draw(st.sampled_from([1, 100, 1 << 14]))),
        patch.object(torch_near, "TILE", data.draw(st.sampled_from([8, 64, 512]))),
        patch.object(torch_near, "CHUNK", data.draw(st.sampled_from([1, 50, 1 << 16]))),
    ):
        links = near_pairs(parts, None, slice(0, len(index.cells)), index)
    label = connected(n, links, parts, cuts)
    query, candidate = near_rows(rows, at_least)
    assert (label[query] == label[candidate]).all()


@settings(max_examples=25)
@given(rng=seeds(), kind=st.sampled_from(KINDS), n=st.integers(4, 150), k=st.integers(1, 20), data=st.data())
def test_blocks_and_shares_find_what_one_comparison_does(
    rng: np.random.Generator, kind, n: int, k: int, data: st.DataObject
) -> None:
    rows = kind(rng, n, 64).astype(np.float32)
    index = index_of(rows, 0.9, k)
    if index is None:
        return
    cuts = sorted(data.draw(st.lists(st.integers(0, n), min_size=1, max_size=3)))
    parts = parts_of(rows, cuts, index)
    half = data.draw(st.integers(1, len(parts) - 1))
    cut = data.draw(st.integers(0, len(index.cells)))
    blocks = [(parts[:half], None), (parts[:half], parts[half:]), (parts[half:], None)]
    found = [
        near_pairs(block, others, cells, index)
        for block, others in blocks
        for cells in (slice(0, cut), slice(cut, len(index.cells)))
    ]
    links = Links(np.concatenate([one.pairs for one in found]), np.concatenate([one.bundles for one in found]))
    label = connected(n, links, parts, cuts)
    query, candidate = near_rows(rows, 0.9)
    assert (label[query] == label[candidate]).all()
    if not len(links.bundles):
        whole = near_pairs(parts, None, slice(0, len(index.cells)), index)
        assert {frozenset(pair) for pair in links.pairs.tolist()} >= {frozenset(pair) for pair in whole.pairs.tolist()}


def test_rows_of_others_are_not_compared_with_each_other() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 64)).astype(np.float32)
    rows[50:100] = rows[:50] + 1e-3 * rng.standard_normal((50, 64))
    rows[100:] = rows[:100] + 1e-3 * rng.standard_normal((100, 64))
    index = index_of(rows, 0.95, 10)
    assert index is not None
    queries = parts_of(rows[:100], [30], index)
    others = parts_of(rows[100:], [60], index, first=2)
    links = near_pairs(queries, others, slice(0, len(index.cells)), index)
    left, right = np.sort(links.pairs >> 32, axis=1).T
    assert (left < 2).all()
    assert (right >= 2).all()
    pairs = {
        (row_numbers(pair[:1], [30])[0], row_numbers(pair[1:], [60], 2)[0]) for pair in np.sort(links.pairs, axis=1)
    }
    assert pairs >= {(row, row) for row in range(100)} | {(row + 50, row) for row in range(50)}


def plane_case(gap: float) -> tuple[Cells, torch.Tensor]:
    """Two cells, and two points at equal distances to the plane between them, and `gap` from each other."""
    cells = Cells(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), reach=0.3)
    return cells, torch.tensor([[gap / 2, 0.5], [-gap / 2, 0.5]])


def test_a_pair_at_the_reach_meets_and_one_beyond_does_not() -> None:
    cells, points = plane_case(0.2999)
    visits = cells.visits(points)
    assert visits.cell.tolist() == [0, 1]
    assert (visits.visited.tolist(), visits.offsets.tolist()) == ([1, 0], [0, 1, 2])
    cells, points = plane_case(0.3005)
    assert not len(cells.visits(points).visited)


def test_limits_that_are_computed_in_pieces_are_the_same() -> None:
    centroids = torch.randn(300, 16, generator=torch.Generator().manual_seed(3))
    whole = Cells(centroids, reach=0.3).limits
    with patch.dict(ELEMENTS, cpu=7 * 300):
        assert torch.allclose(Cells(centroids, reach=0.3).limits, whole, rtol=1e-6, atol=0)


def test_the_reach_holds_what_is_added_to_sketches() -> None:
    """Rows just as similar as is asked for, with nothing left of them, have sketches that are farther apart."""
    axes = torch.eye(64)[:, :31].contiguous()
    found = Sketcher(axes, tail=0.004, floor=0.95 - 0.004)
    cosine = 0.95
    rows = torch.zeros(2, 64)
    rows[0, 0] = 1.0
    rows[1, :2] = torch.tensor([cosine, (1 - cosine**2) ** 0.5])
    sketches = found.sketches(rows).double()
    apart = float((sketches[0] - sketches[1]).norm())
    assert (2 * (1 - cosine)) ** 0.5 - 1e-6 < apart <= reach_of(found)


def test_close_centroids_are_one() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([1.0, 0, 0, 0]) + 1e-3 * torch.randn(500, 4, generator=generator)
    others = torch.nn.functional.normalize(torch.randn(500, 4, generator=generator), dim=1)
    sketches = torch.cat([group, others])[torch.randperm(1000, generator=generator)]
    cells = fit_cells(sketches, 100, 0.3)
    near = torch.cdist(cells.centroids, cells.centroids).fill_diagonal_(9.0)
    assert 10 < len(cells) < 80
    assert near.min() >= 0.15


def test_copies_are_named_and_not_compared() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.standard_normal((10, 64)), 20, axis=0).astype(np.float32)
    rows[100] = 0
    index = index_of(rows, 0.95, 3)
    assert index is not None
    (part,) = parts_of(rows, [], index)
    assert len(part.rows) == 10
    assert len(part.copies) == 189
    assert not (part.copies == 100).any(), "zero rows are near none"


def test_rows_of_a_dense_region_are_bundled() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, 64)).astype(np.float32)
    rows[:1000] = rows[0] + 1e-3 * rng.standard_normal((1000, 64))
    index = index_of(rows, 0.95, 20)
    assert index is not None
    parts = parts_of(rows, [1500], index)
    links = near_pairs(parts, None, slice(0, len(index.cells)), index)
    assert len(links.pairs) + len(links.bundles) < 40_000, "not the 499,500 pairs that there are"
    label = connected(3000, links, parts, [1500])
    assert len(set(label[:1000])) == 1


@pytest.fixture(scope="module")
def many() -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Rows of which some are nearly alike, and the similarities of 0.95 or more in float64, with their places."""
    rng = np.random.default_rng(0)
    n, d = 20_000, 256
    centres = rng.standard_normal((200, d)) / np.arange(1, d + 1) ** 0.5
    rows = centres[rng.integers(200, size=n)] + 0.5 * rng.standard_normal((n, d)) / np.arange(1, d + 1) ** 0.5
    rows[: n // 20] = rows[n // 20 : n // 10] + 0.01 * rng.standard_normal((n // 20, d))
    rows = rows[rng.permutation(n)].astype(np.float32)
    unit = torch.nn.functional.normalize(torch.from_numpy(rows).double(), dim=1)
    single = unit.float()
    # float32 is off by less than 1e-4 here, and takes half the time.
    found = [(single[start : start + 2000] @ single.T >= 0.9499).nonzero() for start in range(0, n, 2000)]
    pairs = torch.cat([part + torch.tensor([start, 0]) for start, part in zip(range(0, n, 2000), found, strict=True)])
    similarity = torch.cat([(unit[part[:, 0]] * unit[part[:, 1]]).sum(1) for part in pairs.split(10_000)])
    return rows, pairs, similarity


@pytest.mark.parametrize("at_least", [0.95, 0.97])
def test_an_index_that_pays_skips_most_pairs_and_misses_none(
    at_least: float, many: tuple[np.ndarray, torch.Tensor, torch.Tensor]
) -> None:
    rows, pairs, similarity = many
    n = len(rows)
    sample = torch.from_numpy(rows[np.random.default_rng(1).permutation(n)[: sample_rows(n)]])
    with patch.dict(PACES, cpu=PACES["cpu"]._replace(again=0)):
        index = fit_index(sample, n, at_least)
    assert index is not None
    assert 1 < len(index.cells) <= n_cells(n)
    parts = parts_of(rows, [5000, 12_000], index)
    links = near_pairs(parts, None, slice(0, len(index.cells)), index)
    counts = [sum(np.diff(part.members) for part in parts), sum(np.diff(part.visits[1]) for part in parts)]
    multiplied = (counts[0] * (counts[0] / 2 + counts[1])).sum()
    assert index.pairs == pytest.approx(multiplied, rel=0.2)
    assert index.pairs < n * n / 4
    label = connected(n, links, parts, [5000, 12_000])
    query, candidate = pairs[similarity >= at_least].numpy().T
    assert len(query) > n
    assert (label[query] == label[candidate]).all()


@pytest.mark.parametrize("width", [8, 16, 63])
def test_narrow_rows_take_no_index(width: int) -> None:
    sample = torch.randn(5000, width, generator=torch.Generator().manual_seed(0))
    assert fit_index(sample, 1_000_000, 0.95) is None


def test_without_directions_or_rows_there_is_no_index() -> None:
    assert fit_index(torch.zeros(5000, 128), 1_000_000, 0.95) is None
    assert fit_index(torch.randn(5000, 128), 5000, 0.95) is None
    assert fit_index(torch.randn(5000, 128), 1_000_000, sketch.LEAST / 2) is None
    assert fit_index(torch.randn(5000, 128), 1_000_000, 0.95, others=0) is None


def test_cells_are_sent_without_what_is_made_of_them() -> None:
    cells, points = plane_case(0.2999)
    before = cells.visits(points)
    assert "limits" in vars(cells)
    again = pickle.loads(pickle.dumps(cells))
    assert vars(again).keys() == {"centroids", "reach"}
    np.testing.assert_array_equal(again.visits(points).visited, before.visited)
