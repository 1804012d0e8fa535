"""What hypothesis draws: rows in segments, of the kinds that break a search; scores; ids of any dtype."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import strategies as st

Rows = np.ndarray

# What "str" is to pandas 3; to pandas 2 it is a column of objects.
STR = pd.StringDtype("pyarrow", na_value=np.nan)


def _random(rng: np.random.Generator, n: int, d: int) -> Rows:
    return rng.standard_normal((n, d))


def _clustered(rng: np.random.Generator, n: int, d: int) -> Rows:
    centres = rng.standard_normal((1 + n // 8, d))
    return centres[rng.integers(len(centres), size=n)] + 0.1 * rng.standard_normal((n, d))


def _near_ties(rng: np.random.Generator, n: int, d: int) -> Rows:
    """All within about 1e-4 of one another: half precision cannot tell them apart."""
    return rng.standard_normal(d) + 1e-4 * rng.standard_normal((n, d))


def _duplicates(rng: np.random.Generator, n: int, d: int) -> Rows:
    return rng.standard_normal((1 + n // 4, d))[rng.integers(1 + n // 4, size=n)]


def _opposed(rng: np.random.Generator, n: int, d: int) -> Rows:
    """Corners of a simplex, each at an obtuse angle to all others, as far as there are dimensions for that."""
    corners = np.eye(n, max(d, n)) - 1 / n + 1e-3 * rng.standard_normal((n, max(d, n)))
    return corners[:, :d]


def _zeros(rng: np.random.Generator, n: int, d: int) -> Rows:
    return rng.standard_normal((n, d)) * rng.integers(2, size=(n, 1))


def _denormals(rng: np.random.Generator, n: int, d: int) -> Rows:
    """Rows whose numbers are so small that float32 keeps only some of their bits."""
    return rng.standard_normal((n, d)) * rng.choice([1e-39, 1.0], size=(n, 1))


def _extremes(rng: np.random.Generator, n: int, d: int) -> Rows:
    """Rows whose squares overflow or vanish in float32."""
    return rng.standard_normal((n, d)) * rng.choice([1e-30, 1.0, 1e30], size=(n, 1))


def _one_hot(rng: np.random.Generator, n: int, d: int) -> Rows:
    """Nothing but equal similarities, 0 or 1."""
    return np.eye(d)[rng.integers(d, size=n)]


KINDS: list[Callable[[np.random.Generator, int, int], Rows]] = [
    _random,
    _clustered,
    _near_ties,
    _duplicates,
    _opposed,
    _zeros,
    _denormals,
    _extremes,
    _one_hot,
]


def seeds() -> st.SearchStrategy[np.random.Generator]:
    """A NumPy generator, drawn by its seed."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def rows_and_segments(
    draw: st.DrawFn, max_segments: int = 6, max_rows: int = 40, max_width: int = 48
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of float32 and the offsets of their segments, each segment of a kind of its own.

    Returns
    -------
    rows : (n, d) float32 array
    segments : (k + 1,) int64 array
        Segments have one row or more.
    """
    sizes = draw(st.lists(st.integers(1, max_rows), max_size=max_segments))
    width = draw(st.integers(1, max_width))
    rng = draw(seeds())
    kinds = [draw(st.sampled_from(KINDS)) for _ in sizes]
    parts = [kind(rng, size, width) for kind, size in zip(kinds, sizes, strict=True)]
    rows = np.concatenate([np.empty((0, width)), *parts]).astype(np.float32)
    return rows, np.cumsum([0, *sizes], dtype=np.int64)


def stops_of(rng: np.random.Generator, segments: np.ndarray) -> np.ndarray:
    """Where the candidates of each row end: members with all earlier ones, then queries with any of these.

    Some segments are all members, some all queries of none, and of some the members are candidates only.
    """
    stops = np.arange(segments[-1])
    for start, stop in pairwise(segments):
        members = start + int(rng.integers(0, stop - start + 1)) if stop > start else start
        stops[members:stop] = np.sort(rng.integers(start, members + 1, stop - members))
        if rng.random() < 0.3:
            stops[start:members] = start
    return stops


def score_lists() -> st.SearchStrategy[list[float]]:
    """Scores of float32, some of them alike, at which comparisons in float32 and in float64 part ways."""
    rounded = st.integers(-100, 100).map(lambda percent: float(np.float32(percent / 100)))
    return st.lists(rounded | st.floats(-1, 1, width=32))


@st.composite
def id_columns(draw: st.DrawFn, count: int) -> tuple[list[Any], str]:
    """Different ids, as many as asked for, and a dtype that a column of them can have."""
    numbers = draw(st.lists(st.integers(0, 2**31 - 1), min_size=count, max_size=count, unique=True))
    integers = ["int32", "int64", "uint64", "Int64", "int32[pyarrow]"]
    strings = ["str", "object", "string[python]", "category", "string[pyarrow]", "large_string[pyarrow]"]
    dtype = draw(st.sampled_from([*integers, *strings]))
    if dtype in integers:
        return numbers, dtype
    as_string = draw(
        st.sampled_from([str, lambda number: str(uuid.UUID(int=number)), lambda number: "ä" * 3 + f"/{number}"])
    )
    return [as_string(number) for number in numbers], dtype
