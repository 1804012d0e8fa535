"""Rows that sketches leave: all that are near, whatever the processor multiplies, and few others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_semdedup.search import filter as of_filter
from dask_semdedup.search import sketch
from dask_semdedup.search.filter import NearFilter
from tests.strategies import KINDS, seeds

WIDTH = 64


@pytest.fixture(params=[torch.bfloat16, torch.int8, torch.float32], autouse=True)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    monkeypatch.setattr(of_filter, "sketch_dtype", lambda: request.param)
    return request.param


def filter_of(rows: torch.Tensor, at_least: float) -> NearFilter:
    axes, defect = sketch.fit_axes(sketch.unit_rows(rows), 15, tf32=False)
    return NearFilter(rows, sketch.sketcher(axes, float(defect), at_least, tf32=False))


@settings(max_examples=40)
@given(
    rng=seeds(),
    kind=st.sampled_from(KINDS),
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    clusters=st.integers(1, 4),
    at_least=st.sampled_from([0.5, 0.8, 0.95]),
    tile=st.sampled_from([(1024, 512), (16, 8)]),
)
def test_no_near_row_is_left_out(rng, kind, sizes, clusters, at_least, tile) -> None:
    n, m = sizes
    rows = kind(rng, n + m, WIDTH).astype(np.float32)
    of_row, of_other = (np.sort(rng.integers(clusters, size=size)) for size in sizes)
    first, last = np.searchsorted(of_row, of_other), np.searchsorted(of_row, of_other, side="right")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_filter, "TILE", tile)
        found = filter_of(torch.from_numpy(rows[:n]), at_least)
        # A filter is asked again and again.
        found.near(torch.from_numpy(rows[n:][:1]), first[:1], last[:1])
        is_near, is_met = found.near(torch.from_numpy(rows[n:]), first, last)
    unit = rows.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(float).tiny)
    reached = (unit[n:] @ unit[:n].T >= at_least) & (of_other[:, None] == of_row)
    assert not (reached.any(axis=1) & ~is_near.numpy()).any()
    assert not (reached.any(axis=0) & ~is_met.numpy()).any()


def test_rows_that_are_far_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    # Of as many dimensions as the sketches have.
    rows = torch.randn(3000, 12, generator=generator) @ torch.randn(12, WIDTH, generator=generator)
    others = torch.cat([rows[:3] + 0.001, torch.randn(1000, 12, generator=generator) @ rows[:12]])
    is_near, is_met = filter_of(rows, 0.95).near(others, np.zeros(1003, int), np.full(1003, 3000))
    cosines = torch.nn.functional.normalize(others) @ torch.nn.functional.normalize(rows).T
    assert is_near[:3].all()
    assert bool((cosines.amax(dim=1)[is_near] >= 0.9).all())
    assert bool((cosines.amax(dim=0)[is_met] >= 0.9).all())
    assert is_near.sum() < 300
