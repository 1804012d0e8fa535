"""The answer, computed the plain way in float64: what the package's search is held against."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

# Similarities closer than this are equal to float64.
EQUAL = 1e-12


def cosines(rows: np.ndarray) -> np.ndarray:
    """Cosine similarity of each row to each earlier one, -inf elsewhere; a zero row has similarity 0 to all."""
    rows = np.asarray(rows, np.float64)
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 0.5)
    return np.where(np.tri(len(rows), k=-1, dtype=bool), unit @ unit.T, -np.inf)


def nearest_earlier(rows: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row the largest similarity to an earlier row of its segment, and the first row that has it."""
    scores, index = np.zeros(len(rows)), np.arange(len(rows))
    for start, stop in pairwise(segments):
        if stop - start < 2:
            continue
        similarity = cosines(rows[start:stop])[1:]
        scores[start + 1 : stop] = similarity.max(axis=1, initial=-np.inf)
        index[start + 1 : stop] = start + (similarity >= scores[start + 1 : stop, None] - EQUAL).argmax(axis=1)
    return np.clip(scores, -1, 1), index


def assert_nearest_earlier(rows: np.ndarray, segments: np.ndarray, scores: np.ndarray, index: np.ndarray) -> None:
    """Assert that an answer is exact.

    Scores must be within 2e-6 of float64. The chosen row must have the largest similarity to within 1e-12, and be the
    first of those that equal it bit for bit.
    """
    rows, segments, scores, index = (np.asarray(array) for array in (rows, segments, scores, index))
    expected_scores, expected_index = nearest_earlier(rows, segments)
    assert scores.dtype == np.float32
    assert index.dtype == np.int64
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=2e-6)
    assert scores.min(initial=0) >= -1
    assert scores.max(initial=0) <= 1
    for start, stop in pairwise(segments):
        similarity = cosines(rows[start:stop])
        for row in range(start, stop):
            chosen, expected = int(index[row]), int(expected_index[row])
            if row == start:
                assert chosen == start, f"row {row} opens its segment, but has neighbour {chosen}"
                continue
            assert start <= chosen < row, f"row {row} of segment {start}:{stop} has neighbour {chosen}"
            loss = similarity[row - start].max() - similarity[row - start, chosen - start]
            assert loss <= EQUAL, f"row {row}: neighbour {chosen} is {loss} less similar than {expected}"
            is_copy = np.array_equal(rows[chosen], rows[expected])
            assert not is_copy or chosen == expected, f"row {row}: neighbour {chosen} is a copy of row {expected}"
