"""The answer, computed the plain way in float64: what the package's search is held against."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

# Scores are multiples of this.
TIE = 2.0**-40

# Similarities closer than this are equal to float64.
EQUAL = 1e-12


def cosines(rows: np.ndarray) -> np.ndarray:
    """Cosine similarity of each row to each earlier one, -inf elsewhere; a zero row has similarity 0 to all."""
    rows = np.asarray(rows, np.float64)
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 0.5)
    return np.where(np.tri(len(rows), k=-1, dtype=bool), unit @ unit.T, -np.inf)


def nearest_earlier(
    rows: np.ndarray, segments: np.ndarray, stops: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the largest similarity to a candidate of its segment, and the first row that has it.

    The candidates of a row are those before it or, with `stops`, before the row that stands there.
    """
    scores, index = np.zeros(len(rows)), np.arange(len(rows))
    stops = index if stops is None else stops
    for start, stop in pairwise(segments):
        similarity = _to_candidates(rows, start, stop, stops)
        found = start + np.flatnonzero(stops[start:stop] > start)
        similarity = similarity[found - start]
        scores[found] = similarity.max(axis=1, initial=-np.inf)
        index[found] = start + (similarity >= scores[found, None] - EQUAL).argmax(axis=1) if len(found) else found
    return np.clip(scores, -1, 1), index


def _to_candidates(rows: np.ndarray, start: int, stop: int, stops: np.ndarray) -> np.ndarray:
    """Cosine similarity of each row of a segment to each of its candidates, -inf elsewhere."""
    is_candidate = np.arange(stop - start) < (stops[start:stop] - start)[:, None]
    return np.where(is_candidate, cosines(rows[start:stop]), -np.inf)


def assert_nearest_earlier(
    rows: np.ndarray, segments: np.ndarray, scores: np.ndarray, index: np.ndarray, stops: np.ndarray | None = None
) -> None:
    """Assert that an answer is exact.

    Scores must be within 2e-6 of float64. The chosen row must have the largest similarity to within 1e-12, and be the
    first of those that equal it bit for bit.
    """
    rows, segments, scores, index = (np.asarray(array) for array in (rows, segments, scores, index))
    expected_scores, expected_index = nearest_earlier(rows, segments, stops)
    assert scores.dtype == np.float32
    assert index.dtype == np.int64
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=2e-6)
    assert scores.min(initial=0) >= -1
    assert scores.max(initial=0) <= 1
    stops = np.arange(len(rows)) if stops is None else np.asarray(stops)
    for start, stop in pairwise(segments):
        similarity = _to_candidates(rows, start, stop, stops)
        for row in range(start, stop):
            chosen, expected, end = int(index[row]), int(expected_index[row]), int(stops[row])
            if end == start:
                assert chosen == row, f"row {row} has no candidates, but neighbour {chosen}"
                continue
            assert start <= chosen < end, f"row {row} of segment {start}:{stop} has neighbour {chosen}"
            loss = similarity[row - start].max() - similarity[row - start, chosen - start]
            assert loss <= EQUAL, f"row {row}: neighbour {chosen} is {loss} less similar than {expected}"
            is_copy = np.array_equal(rows[chosen], rows[expected])
            assert not is_copy or chosen == expected, f"row {row}: neighbour {chosen} is a copy of row {expected}"


def kept(rows: np.ndarray, segments: np.ndarray, at_least: float) -> tuple[np.ndarray, np.ndarray]:
    """One row after the other: a row is dropped if a kept, earlier one of its segment is so similar.

    Kept rows have score 0 and themselves.
    """
    similarity = np.round(cosines(rows) / TIE) * TIE
    scores, index = np.zeros(len(rows), np.float32), np.arange(len(rows))
    for start, stop in pairwise(segments):
        stay: list[int] = []
        for row in range(start, stop):
            near = [other for other in stay if np.float32(similarity[row, other]) >= np.float32(at_least)]
            if near:
                index[row] = max(near, key=lambda other, row=row: (similarity[row, other], -other))
                scores[row] = similarity[row, index[row]]
            else:
                stay.append(row)
    return scores, index
