"""A sample of a frame's embeddings, drawn evenly over its rows, and reproducibly.

Rows are counted first, from the footers if the frame is read from Parquet files. The choice of rows depends only on the
counts and the seed. Only the partitions that hold some of these rows are read, one column each.
"""

from __future__ import annotations

import uuid
from typing import Any

import dask.dataframe as dd
import numpy as np
from dask.dataframe.api import new_collection
from dask.delayed import Delayed

from dask_semdedup._dask import Lengths, Task, TaskRef
from dask_semdedup.errors import EmbeddingError, some
from dask_semdedup.frames.columns import Columns
from dask_semdedup.frames.embeddings import to_tensor
from dask_semdedup.lazy.sources import chains_of, lengths_in_footers
from dask_semdedup.lazy.tasks import compute

__all__ = ["draw", "partition_lengths", "sample_embeddings"]

# Partitions are drawn until they hold this many times the rows of the sample, and are at least so many. All of them
# would be read for few rows each, and fewer might be all alike, where rows stand in the order of their subjects.
ROWS_READ_PER_ROW = 4

MIN_PARTITIONS = 32


def partition_lengths(ddf: dd.DataFrame, columns: Columns) -> list[int]:
    """Count the rows of each partition, from footers or else from a column, if possible not that of embeddings."""
    known = lengths_in_footers(ddf)
    if known is not None:
        return known
    others = [name for name in ddf.columns if name != columns.embedding]
    narrow = ddf[others[:1] or [columns.embedding]]
    return list(compute(new_collection(Lengths(narrow.expr)))[0])


def draw(lengths: list[int], size: int, seed: int) -> dict[int, np.ndarray]:
    """Draw rows without replacement and with equal probability, from few partitions.

    Parameters
    ----------
    lengths : list of int
        Number of rows of each partition.
    size : int
        Number of rows to draw, at most all.
    seed : int

    Returns
    -------
    dict
        From the number of a partition to the positions of its rows, both ascending.

    Notes
    -----
    Of more than 32 partitions, at least 32 are read, and about as many as hold four times the sample at the mean size.
    They are chosen in proportion to their rows, with small ones grouped, and the same number of rows is drawn from each
    choice [1]_.

    References
    ----------
    .. [1] Madow, "On the theory of systematic sampling, II", Annals of Mathematical Statistics 20 (1949).
    """
    rng = np.random.default_rng(seed)
    counts = np.asarray(lengths, np.int64)
    order = rng.permutation(np.flatnonzero(counts))
    choices = max(MIN_PARTITIONS, -(-ROWS_READ_PER_ROW * size * len(order) // max(1, int(counts.sum()))))
    if choices >= len(order):
        units, chosen = [order], np.array([1])
    else:
        # So large that a unit has the rows of all the choices that may fall on it.
        units = _units(order, counts, least=2 * (size // choices + 2))
        chosen = _shared_out(choices, np.array([counts[unit].sum() for unit in units]), rng)
    drawn: dict[int, int] = {}
    for unit, rows in zip(units, _shared_out(size, chosen, rng), strict=True):
        drawn |= dict(zip(unit.tolist(), _shared_out(int(rows), counts[unit], rng).tolist(), strict=True))
    return {
        number: np.sort(rng.choice(counts[number], drawn[number], replace=False))
        for number in sorted(drawn)
        if drawn[number]
    }


def _units(order: np.ndarray, counts: np.ndarray, least: int) -> list[np.ndarray]:
    """Return partitions in this order, grouped so that each group has at least so many rows."""
    bounds, rows = [0], 0
    for place, number in enumerate(order.tolist(), 1):
        rows += int(counts[number])
        if rows >= least:
            bounds.append(place)
            rows = 0
    # The last unit takes what is left over.
    return np.split(order, bounds[1:-1])


def _shared_out(total: int, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return whole numbers that sum to a total, in proportion to weights up to random rounding."""
    # Those of Python do not overflow.
    bounds = np.concatenate([[0], np.cumsum(weights)]).astype(object)
    start = int(rng.integers(bounds[-1])) if len(weights) else 0
    return np.diff((bounds * total + start) // max(1, bounds[-1])).astype(np.int64)


def sample_embeddings(
    ddf: dd.DataFrame, picks: dict[int, np.ndarray], columns: Columns, embedding_dim: int | None = None
) -> np.ndarray:
    """Read the drawn rows' embeddings.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
    picks : dict
        What `draw` returned.
    columns : Columns
        Columns of embeddings and of ids. The ids are for messages and may be missing.
    embedding_dim : int, optional
        Width that every embedding must have.

    Returns
    -------
    (n, d) float32 array
        Rows in the order of the frame, not normalised.

    Raises
    ------
    EmbeddingError
        If the rows are null, not finite, or of different widths.
    """
    narrow = ddf[[name for name in ddf.columns if name in (columns.embedding, columns.id)]]
    made = narrow.partitions[list(picks)].optimize().expr
    graph, name = made.__dask_graph__(), f"take-embeddings-{uuid.uuid4().hex}"
    parts = []
    for number, (chain, positions) in enumerate(zip(chains_of(made), picks.values(), strict=True)):
        key, partition = (name, number), TaskRef((made._name, number))
        take = Task(key, take_embeddings, partition, positions, columns, embedding_dim)
        # Partitions that one task makes do not wait in memory for another one to take their rows.
        parts.append(Delayed(key, {key: Task.fuse(*chain, take, key=key)} if chain else {**graph, key: take}))
    return _stack(list(compute(*parts)), columns)


def take_embeddings(frame: Any, positions: np.ndarray, columns: Columns, embedding_dim: int | None) -> np.ndarray:
    """Take some rows' embeddings out of a partition."""
    rows, name = frame.iloc[positions], columns.embedding
    ids = rows[columns.id] if columns.id in rows.columns else None
    # The search warns of the zeros of all rows.
    options: dict[str, Any] = {"embedding_dim": embedding_dim, "device": "cpu", "warn_of_zeros": False}
    return to_tensor(rows[name], name=name, ids=ids, **options).numpy()


def _stack(parts: list[np.ndarray], columns: Columns) -> np.ndarray:
    """Concatenate the parts, and release each as soon as it is copied."""
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise EmbeddingError(
            f"Column {columns.embedding!r} has rows of width {some(widths)}. All embeddings must come from one model.",
            columns=[columns.embedding],
        )
    rows = np.empty((sum(map(len, parts)), widths[0]), np.float32)
    start = len(rows)
    while parts:
        part = parts.pop()
        rows[start - len(part) : start] = part
        start -= len(part)
    return rows
