"""A sample of a frame's embeddings, drawn evenly over its rows, and reproducibly.

Rows are counted first: from the footers of Parquet files where the frame is read from them. Which rows are drawn then
depends on the counts and the seed alone, and only the partitions that hold some of them are read, one column each.
"""

from __future__ import annotations

from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
from dask.dataframe.dask_expr._collection import new_collection
from dask.dataframe.dask_expr._expr import Lengths

from dask_semdedup.embeddings import to_tensor
from dask_semdedup.errors import EmbeddingError, some

__all__ = ["draw", "partition_lengths", "sample_embeddings"]

# Partitions are drawn until they hold this many times the rows of the sample, and are at least so many. All of them
# would be read for few rows each, and fewer might be all alike, where rows stand in the order of their subjects.
ROWS_READ_PER_ROW = 4
LEAST_PARTITIONS = 32


def partition_lengths(ddf: dd.DataFrame, embedding_field: str) -> list[int]:
    """Count the rows of each partition.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
    embedding_field : str
        The column that need not be read for it, unless it is the only one.

    Returns
    -------
    list of int

    Examples
    --------
    >>> import pandas as pd
    >>> partition_lengths(dd.from_pandas(pd.DataFrame({"id": range(5)}), npartitions=2), "embeddings")
    [3, 2]
    """
    others = [name for name in ddf.columns if name != embedding_field]
    narrow = ddf[others[:1] or [embedding_field]]
    return list(new_collection(Lengths(narrow.expr)).compute())


def draw(lengths: list[int], size: int, seed: int) -> dict[int, np.ndarray]:
    """Draw rows without replacement, evenly over those of the partitions that are read.

    Parameters
    ----------
    lengths : list of int
        The rows of each partition.
    size : int
        The rows to draw, at most all.
    seed : int

    Returns
    -------
    dict
        From a partition's number to the positions of its rows, both ascending.

    Notes
    -----
    Where partitions are more than 32, as many of them are read as hold four times the sample, but at least 32. They
    are chosen at random, so that every row has about the same chance.

    Examples
    --------
    >>> draw([3, 0, 2], 5, seed=0)
    {0: array([0, 1, 2]), 2: array([0, 1])}
    """
    rng = np.random.default_rng(seed)
    counts = np.asarray(lengths, np.int64)
    order = rng.permutation(np.flatnonzero(counts))
    enough = int(np.searchsorted(np.cumsum(counts[order]), min(ROWS_READ_PER_ROW * size, counts.sum()))) + 1
    chosen = np.sort(order[: max(enough, LEAST_PARTITIONS)])
    drawn = rng.multivariate_hypergeometric(counts[chosen], size, method="marginals")
    return {
        int(number): np.sort(rng.choice(counts[number], rows, replace=False))
        for number, rows in zip(chosen, drawn, strict=True)
        if rows
    }


def sample_embeddings(
    ddf: dd.DataFrame,
    picks: dict[int, np.ndarray],
    *,
    embedding_field: str,
    id_field: str,
    embedding_dim: int | None = None,
) -> np.ndarray:
    """Read the drawn rows' embeddings.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
    picks : dict
        What `draw` returned.
    embedding_field : str
        The column of embeddings.
    id_field : str
        The column of ids, for messages. It need not be there.
    embedding_dim : int, optional
        The width that every embedding must have.

    Returns
    -------
    (n, d) float32 array
        In the frame's order, not normalised.

    Raises
    ------
    EmbeddingError
        If the rows are null, not finite, or of different widths.

    Examples
    --------
    >>> import pandas as pd
    >>> import pyarrow as pa
    >>> embeddings = pd.array([[1.0], [2.0], [3.0]], dtype=pd.ArrowDtype(pa.list_(pa.float32())))
    >>> ddf = dd.from_pandas(pd.DataFrame({"embeddings": embeddings}), npartitions=2)
    >>> sample_embeddings(ddf, {0: np.array([1])}, embedding_field="embeddings", id_field="id")
    array([[2.]], dtype=float32)
    """
    narrow = ddf[[name for name in ddf.columns if name in (embedding_field, id_field)]]
    partitions = narrow.partitions[list(picks)].to_delayed()
    take = dask.delayed(take_embeddings, pure=False)
    parts = [
        take(part, positions, embedding_field, id_field, embedding_dim)
        for part, positions in zip(partitions, picks.values(), strict=True)
    ]
    return _stack(list(dask.compute(*parts)), embedding_field)


def take_embeddings(
    frame: Any, positions: np.ndarray, embedding_field: str, id_field: str, embedding_dim: int | None
) -> np.ndarray:
    """Take some rows' embeddings out of a partition."""
    rows = frame.iloc[positions]
    ids = rows[id_field] if id_field in rows.columns else None
    matrix = to_tensor(rows[embedding_field], name=embedding_field, ids=ids, embedding_dim=embedding_dim, device="cpu")
    return matrix.numpy()


def _stack(parts: list[np.ndarray], embedding_field: str) -> np.ndarray:
    """Put the parts together, letting go of each as soon as it is copied."""
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise EmbeddingError(
            f"Column {embedding_field!r} has rows of width {some(widths)}. All embeddings must come from one model."
        )
    rows = np.empty((sum(map(len, parts)), widths[0]), np.float32)
    start = len(rows)
    while parts:
        part = parts.pop()
        rows[start - len(part) : start] = part
        start -= len(part)
    return rows
