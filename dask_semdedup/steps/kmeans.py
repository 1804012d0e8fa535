"""K-means over embeddings: fit on a sample, then assign and measure distances, one partition at a time.

The fit is that of scikit-learn on a CPU and of cuML on a GPU. Assignment is ours, so that its memory is bounded:
products of a block of rows with a block of centroids, of which only the nearest are kept. All of it works on rows of
unit length. Only `kmeans_partition` and `kmeans_meta` handle frames.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
from dask.tokenize import tokenize

from dask_semdedup.device.devices import check_device, choose_device
from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.device.queues import cores_for
from dask_semdedup.errors import EmbeddingError, InvalidArgumentError, have, some
from dask_semdedup.frames.backend import array_like, device_of, is_cudf, shares_memory
from dask_semdedup.frames.columns import DISTANCE_COLUMNS, Columns, SearchOptions
from dask_semdedup.frames.embeddings import to_embeddings, to_tensor

if TYPE_CHECKING:
    import torch

__all__ = ["Centroids", "assign", "check_centroids", "distances", "kmeans_meta", "kmeans_partition", "normalise"]

# Rows and centroids that are multiplied at once: a product of 8 MiB stays in a CPU's cache, and 64 MiB keep a GPU busy.
BLOCKS = {"cpu": (2048, 1024), "cuda": (4096, 4096)}

# Bytes of rows that are normalised, or measured in float64, at once.
CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass(frozen=True)
class Centroids:
    """Centroids in the form that tasks of a graph take.

    Parameters
    ----------
    values : (k, d) float32 array
        One centroid per row.
    """

    values: np.ndarray

    @property
    def width(self) -> int:
        """Number of dimensions, d."""
        return self.values.shape[1]

    @cached_property
    def distinct(self) -> np.ndarray:
        """Numbers of the centroids that equal no earlier one, ascending: only these are ever nearest."""
        rows = np.ascontiguousarray(self.values + np.float32(0))  # -0.0 becomes 0.0.
        keys = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel()
        return np.sort(np.unique(keys, return_index=True)[1])

    @cached_property
    def token(self) -> str:
        """Token that changes with the centroids."""
        return tokenize(self.values)

    def __dask_tokenize__(self) -> str:
        return self.token

    def __len__(self) -> int:
        return len(self.values)


def check_centroids(centroids: Any) -> Centroids:
    """Read centroids if a path is given, and check them.

    Parameters
    ----------
    centroids : (k, d) array_like, str or path-like
        An array of NumPy or CuPy, or the path of a ``.npy`` file: a local path or an fsspec URL.

    Raises
    ------
    InvalidArgumentError
        If they are not a matrix of finite numbers with at least one row.
    """
    origin = "centroids"
    if isinstance(centroids, str | os.PathLike):
        origin = f"centroids in {os.fspath(centroids)!r}"
        centroids = _load(os.fspath(centroids))
    array = centroids.get() if type(centroids).__module__.partition(".")[0] == "cupy" else np.asarray(centroids)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise InvalidArgumentError(
            f"The {origin} must be a matrix of numbers, one centroid a row, not {array.dtype} of shape {array.shape}.",
            parameters=["centroids"],
        )
    # A copy: the caller's may change later, and what is lazy must not.
    values = np.array(array, dtype=np.float32, order="C")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise InvalidArgumentError(
            f"Of the {origin}, {have(len(bad), 'row')} NaN or infinite values: {some(bad)}.", parameters=["centroids"]
        )
    return Centroids(values)


def _load(path: str) -> np.ndarray:
    try:
        with fsspec.open(path, "rb") as file:
            return np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InvalidArgumentError(
            f"centroids: {path!r} is not a .npy file of numbers ({error}).", parameters=["centroids"]
        ) from error


def normalise(rows: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
    """Normalise rows to unit length.

    Parameters
    ----------
    rows : (n, d) float32 tensor
        Finite.
    in_place : bool, default False
        Whether `rows` may be written to.

    Returns
    -------
    (n, d) float32 tensor
        `rows` itself if all have unit length to within 2⁻²⁰. Such rows, and all-zero rows, stay the same, bit for
        bit.
    """
    import torch

    from dask_semdedup.search.certify import UNIT_TOLERANCE, chunks, measure

    out = rows if in_place else None
    for part in chunks(len(rows), rows.element_size() * rows.shape[1], CHUNK_BYTES[rows.device.type]):
        unit = measure(rows[part])
        if unit.is_unit:
            if out is not None and out is not rows:
                out[part] = rows[part]
            continue
        if out is None:
            out = torch.empty_like(rows)
            out[: part.start] = rows[: part.start]
        keep = unit.is_zero | ((unit.inverse_norm - 1).abs() <= UNIT_TOLERANCE)
        torch.mul(unit.rows, torch.where(keep, 1.0, unit.inverse_norm)[:, None], out=out[part])
    return rows if out is None else out


def assign(rows: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """For every row, find the nearest centroid by Euclidean distance.

    Parameters
    ----------
    rows : (n, d) float32 tensor
        Rows on any device. They are sent block by block to the device of the centroids.
    centroids : (k, d) float32 tensor
        Distinct centroids. Of two equal ones, either may be found.

    Returns
    -------
    (n,) int32 tensor, on the device of the rows
        Number of the nearest centroid of each row, the lowest among equally near ones.

    Notes
    -----
    ``|x - c|²`` is least where ``x·c - |c|²/2`` is largest. This is computed in float32 for a block of rows and a block
    of centroids at a time, and only the best is kept. So memory beyond the result does not depend on the number of rows
    or centroids: it is less than 64 MB on a CPU, and 256 MB on a GPU.
    """
    import torch

    from dask_semdedup.search import ieee_products

    device = centroids.device
    row_step, centroid_step = BLOCKS[device.type]
    half_squares = _half_squares(centroids)
    labels = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    product = torch.empty(min(row_step, len(rows)) * min(centroid_step, len(centroids)), device=device)
    with ieee_products:
        for start in range(0, len(rows), row_step):
            block = rows[start : start + row_step].to(device)
            labels[start : start + row_step] = _nearest(block, centroids, half_squares, centroid_step, product)
    return labels


def _half_squares(centroids: torch.Tensor) -> torch.Tensor:
    """Return half the squared length of each centroid, computed in float64 without a copy of all of them."""
    import torch

    from dask_semdedup.search.certify import chunks

    # Into one array: small ones that are kept would lie between the large ones that are freed, and keep their memory.
    halves = torch.empty(len(centroids), device=centroids.device)
    for part in chunks(len(centroids), 8 * centroids.shape[1], CHUNK_BYTES[centroids.device.type]):
        halves[part] = centroids[part].double().square_().sum(dim=1).div_(2)
    return halves


def _nearest(
    rows: torch.Tensor, centroids: torch.Tensor, half_squares: torch.Tensor, step: int, memory: torch.Tensor
) -> torch.Tensor:
    """Return the numbers of the nearest centroids of a block of rows."""
    import torch

    best = torch.full((len(rows),), -torch.inf, device=rows.device)
    numbers = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for start in range(0, len(centroids), step):
        block = centroids[start : start + step]
        product = memory[: len(rows) * len(block)].view(len(rows), len(block))
        torch.addmm(half_squares[start : start + step], rows, block.T, beta=-1, out=product)
        values, found = product.max(dim=1)
        # Lower numbers come first: they win among equals.
        is_nearer = values > best
        best = torch.where(is_nearer, values, best)
        numbers = torch.where(is_nearer, found + start, numbers)
    return numbers


def distances(rows: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure the distances of rows to their centroids.

    Parameters
    ----------
    rows : (n, d) float32 tensor
        Rows on any device. They are sent block by block to the device of the centroids.
    centroids : (k, d) float32 tensor
    labels : (n,) integer tensor
        Number of the centroid of each row.

    Returns
    -------
    l2, cosine : (n,) float32 tensors, on the device of the rows
        The Euclidean distance of the normalised row to its centroid, and 1 minus the cosine similarity of the two.
        Both are computed in float64. The cosine distance of an all-zero row, or to an all-zero centroid, is 1.
    """
    import torch

    from dask_semdedup.search.certify import chunks

    l2, cosine = (torch.empty(len(rows), device=rows.device) for _ in range(2))
    for part in chunks(len(rows), 8 * rows.shape[1], CHUNK_BYTES[centroids.device.type]):
        # By index_select: it takes int32 as it is.
        own = centroids.index_select(0, labels[part].to(centroids.device)).double()
        unit, is_zero = _unit(rows[part].to(centroids.device).double())
        l2[part] = (unit - own).norm(dim=1)
        direction, is_zero_too = _unit(own)
        # |u - v|²/2 is 1 - u·v for unit vectors, and as precise near 0 as elsewhere.
        half = unit.sub_(direction).square_().sum(dim=1).div_(2)
        cosine[part] = half.masked_fill_(is_zero | is_zero_too, 1.0)
    return l2, cosine


def _unit(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 rows normalised to unit length, and which of them are zero."""
    norms = rows.norm(dim=1, keepdim=True)
    is_zero = norms == 0
    return rows / norms.masked_fill(is_zero, 1.0), is_zero.flatten()


def kmeans_partition(frame: Any, centroids: Centroids, columns: Columns, options: SearchOptions | None = None) -> Any:
    """Assign the rows of a partition to their nearest centroids.

    Parameters
    ----------
    frame : pandas.DataFrame or cudf.DataFrame
    centroids : Centroids
    columns : Columns
        Columns of embeddings, and of clusters, which is made. The column of ids is for messages and may be missing.
    options : SearchOptions, optional
        Width of the embeddings, and the device.

    Returns
    -------
    DataFrame
        A frame of the same backend, order and index: see `SemDedupAccessor.kmeans`.

    Raises
    ------
    EmbeddingError
        If embeddings are null, not finite, or not of the centroids' width.
    InvalidArgumentError
        If the device is "cuda" and torch sees none.
    """
    import torch

    options = options or SearchOptions()
    check_device(options.device)
    if is_cudf(frame):
        share_memory_pool()
    if len(frame) == 0:
        return kmeans_meta(frame, columns)
    column = frame[columns.embedding]
    frame_device = device_of(frame)
    # As much work as searching one cluster of so many rows.
    work = np.array([0, math.isqrt(2 * len(frame) * len(centroids))])
    device = choose_device(options.device, frame_device, work)
    with cores_for(device, work):
        rows = to_tensor(
            column,
            name=columns.embedding,
            ids=frame[columns.id] if columns.id in frame.columns else None,
            embedding_dim=options.embedding_dim,
            device=device if frame_device == "cuda" else "cpu",
        )
        if rows.shape[1] != centroids.width:
            raise EmbeddingError(
                f"Column {columns.embedding!r} has embeddings of width {rows.shape[1]}, but the centroids are of width "
                f"{centroids.width}. Use centroids that were fitted to embeddings of the same model.",
                parameters=["embedding_field", "centroids"],
                columns=[columns.embedding],
            )
        rows = normalise(rows, in_place=not shares_memory(rows, column))
        # Without a copy, unless they came from another process in memory that must not be written to.
        values = torch.from_numpy(np.require(centroids.values, requirements="W")).to(device)
        labels, l2, cosine = _assign_and_measure(rows, values, centroids.distinct)
    embeddings = to_embeddings(array_like(rows, frame), frame)
    return _clustered(frame, embeddings, [array_like(array, frame) for array in (labels, l2, cosine)], columns)


def kmeans_meta(meta: Any, columns: Columns) -> Any:
    """Return an empty frame with exactly the dtypes of `kmeans_partition`.

    Parameters
    ----------
    meta : pandas.DataFrame or cudf.DataFrame
        A frame with the dtypes of the partitions.
    columns : Columns
        As in `kmeans_partition`.

    Returns
    -------
    DataFrame
        Without rows.
    """
    empty = meta.iloc[:0]
    number, distance = np.empty(0, np.int32), np.empty(0, np.float32)
    embeddings = to_embeddings(np.empty((0, 1), np.float32), empty)
    return _clustered(empty, embeddings, [number, distance, distance], columns)


def _assign_and_measure(
    rows: torch.Tensor, centroids: torch.Tensor, distinct: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the nearest centroid of each row, the first among equals, and the distances to it."""
    import torch

    if len(distinct) == len(centroids):
        labels = assign(rows, centroids)
    else:
        numbers = torch.from_numpy(distinct)
        labels = assign(rows, centroids[numbers.to(centroids.device)])
        labels = numbers.to(labels.device, torch.int32)[labels.long()]
    return labels, *distances(rows, centroids, labels)


def _clustered(frame: Any, embeddings: Any, values: list[Any], columns: Columns) -> Any:
    """Return the frame with its new columns, which replace those of the same names."""
    names = [columns.cluster, DISTANCE_COLUMNS["l2"], DISTANCE_COLUMNS["cosine"]]
    result = frame[[name for name in frame.columns if name not in names]].copy(deep=False)
    result[columns.embedding] = embeddings
    for name, column in zip(names, values, strict=True):
        result[name] = column
    return result
