"""Conversion of embedding columns of any layout, in pandas or cuDF, to validated (n, d) tensors and back.

Each backend yields its column as *pieces*: flat NumPy or CuPy arrays of whole rows, which alias the memory of the
column if its layout allows. Conversion to float32, gathering in rank order and the check for NaN are shared. On a CPU,
NumPy converts and gathers: torch's threads would compete with those of Dask.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dask_semdedup.device.streams import default_stream, reading_stream
from dask_semdedup.errors import EmbeddingError, ZeroEmbeddingWarning, have, some
from dask_semdedup.frames.backend import is_cudf, is_string, tensor_like, to_list, to_numpy

if TYPE_CHECKING:
    import torch

__all__ = [
    "JOINED_IN_DASK",
    "JOINED_IN_PANDAS",
    "as_lists",
    "check_embedding_dtype",
    "dimensions_advice",
    "first_width",
    "gather_rows",
    "list_type",
    "rows_not_finite",
    "to_embeddings",
    "to_tensor",
]

# Numbers that are converted to float32 at a time: few enough for a CPU's cache, and enough to keep a GPU busy.
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}

# Warnings that Python has shown: the same one is not repeated.
SHOWN: dict[Any, Any] = {}

NUMERIC = {np.dtype(code) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2")}

# Numbered columns are taken for dimensions if there are at least this many.
MIN_DIMENSIONS = 8

# Advice on joining them, in Dask and in pandas.
JOINED_IN_DASK = (
    "import pandas as pd and pyarrow as pa, and join them: ddf[{name}] = ddf[{columns}].map_partitions(lambda rows: "
    "pd.Series(list(rows.to_numpy('float32')), rows.index, pd.ArrowDtype(pa.list_(pa.float32()))))."
)

JOINED_IN_PANDAS = "join them: frame[{name}] = list(frame[{columns}].to_numpy('float32'))."

# Arrow list arrays hold no more elements, as their offsets are int32.
MAX_LIST_ELEMENTS = 2**31 - 1

ADVICE = "Drop these rows, or embed them again."

BITS_ADVICE = (
    " Lists of uint16 are read as the bits of float16: if they hold numbers, cast them to int32, with "
    ".astype(pd.ArrowDtype(pa.list_(pa.int32())))."
)

ACCEPTED = "lists of float16, float32, float64 or small integers, or of uint16 that carry float16 bits"


def check_embedding_dtype(meta_column: Any, name: str, embedding_dim: int | None = None) -> None:
    """Raise `EmbeddingError` unless the dtype of a column can hold embeddings. No data are needed.

    Parameters
    ----------
    meta_column : pandas.Series or cudf.Series
        The column, which may be empty.
    name : str
        The column's name, for the message.
    embedding_dim : int, optional
        Width that every row must have. It is checked if the dtype has a fixed width.

    Raises
    ------
    EmbeddingError
        If the column holds strings, to which Dask converts object columns; numbers; lists of other elements than
        numbers; or lists of a fixed size other than `embedding_dim`.
    """
    dtype = meta_column.dtype
    if is_cudf(meta_column) and len(meta_column) == 0 and dtype == np.dtype(object):
        return  # Dask-cuDF says this of list columns in Parquet files. The rows will tell.
    if is_string(meta_column):
        raise EmbeddingError(
            f"Column {name!r} has dtype {dtype}: it holds strings, not embeddings. Name the column of embeddings. "
            "If it held arrays or lists in pandas, Dask has made strings of them: use dask_semdedup.from_pandas "
            "instead of dd.from_pandas. For dd.from_map and dd.from_delayed, give the column the dtype "
            "pd.ArrowDtype(pa.list_(pa.float32())) in your function, or first call "
            "dask.config.set({'dataframe.convert-string': False}). If the strings are lists in JSON, import json and "
            "parse them: "
            f"ddf[{name!r}] = ddf[{name!r}].apply(json.loads, meta=({name!r}, object)).",
            columns=[name],
        )
    if _is_vector_of_spark(dtype):
        raise EmbeddingError(
            f"Column {name!r} holds Spark's VectorUDT ({dtype}). Write it as an array: in Spark, "
            f"df.withColumn({name!r}, pyspark.ml.functions.vector_to_array({name!r}, 'float32')); or, where all "
            f"vectors are dense, ddf.assign({name}=ddf[{name!r}].struct.field('values'))."
        )
    if _element_type(dtype) not in NUMERIC:
        raise EmbeddingError(f"Column {name!r} has dtype {dtype}, not embeddings: it must hold {ACCEPTED}.")
    width = getattr(_storage(getattr(dtype, "pyarrow_dtype", pa.null())), "list_size", None)
    if None not in (width, embedding_dim) and width != embedding_dim:
        raise EmbeddingError(
            f"Column {name!r} has dtype {dtype}, of width {width}, where {embedding_dim} is expected. "
            "All embeddings must come from one model.",
            parameters=["embedding_dim"],
            columns=[name],
        )


def list_type(column: pd.Series) -> pa.DataType | None:
    """Return the Arrow type of a column of lists or arrays of numbers, or None for any other column."""
    try:
        type_ = pa.array(column).type
    except pa.ArrowException:
        return None
    if _element_type(pd.ArrowDtype(type_)) not in NUMERIC:
        return None
    # Python numbers that are integers in one row may be floats in the next.
    return pa.list_(pa.float64()) if type_.value_type == pa.int64() else type_


def as_lists(column: pd.Series, type_: pa.DataType, name: str) -> pd.Series:
    """Return a pandas column of lists and arrays as Arrow lists of a type.

    Raises
    ------
    EmbeddingError
        If rows cannot be converted to it.
    """
    try:
        lists = pa.chunked_array([pa.array(column, type_, from_pandas=True)])
    except (pa.ArrowException, TypeError) as error:
        to_tensor(column, name=name)  # Its errors name the rows.
        raise EmbeddingError(
            f"Column {name!r} cannot be converted to {type_}, the type of its first row: {error}."
        ) from error
    return pd.Series(pd.array(lists, dtype=pd.ArrowDtype(type_)), column.index, name=column.name)


def dimensions_advice(columns: Iterable[object], name: str, how: str = JOINED_IN_DASK) -> str:
    """Return advice on joining columns that look like the dimensions of embeddings; an empty string if none do.

    Parameters
    ----------
    columns : iterable
        Names of the columns that are there: strings that end in a number, or integers.
    name : str
        The column to make.
    how : str
        The advice, of `{columns}` and `{name}`.
    """
    numbers: dict[tuple[bool, str], list[int]] = {}
    for column in columns:
        if match := re.fullmatch(r"(.*?)(0|[1-9]\d*)", str(column)):
            numbers.setdefault((isinstance(column, str), match[1]), []).append(int(match[2]))
    for (are_strings, prefix), found in numbers.items():
        first, last = min(found), max(found)
        if len(found) >= MIN_DIMENSIONS and last - first + 1 == len(found):
            span = f"range({first}, {last + 1})"
            joined = f"[f{prefix + '{i}'!r} for i in {span}]" if are_strings else f"list({span})"
            advice = how.replace("{columns}", joined).replace("{name}", repr(name))
            return f" If {prefix}{first} to {prefix}{last} are the dimensions of embeddings, {advice}"
    return ""


def first_width(column: pd.Series) -> int | None:
    """Return the width of a column's first row, or None if it is null."""
    first = column.iloc[0]
    return len(first) if isinstance(first, Sized) else None


def to_tensor(
    column: Any,
    *,
    name: str,
    ids: Any = None,
    clusters: Any = None,
    embedding_dim: int | None = None,
    width_of: str = "",
    order: Any = None,
    device: str | None = None,
    warn_of_zeros: bool = True,
) -> torch.Tensor:
    """Return an embedding column as a float32 matrix.

    Parameters
    ----------
    column : pandas.Series or cudf.Series
        One of: Arrow lists (``list``, ``large_list``, ``fixed_size_list``) of float16, float32, float64, signed
        integers, or of uint16 that carry float16 bits; a pandas object column of arrays, lists or tuples of those; a
        cuDF list column.
    name : str
        The column's name, for messages.
    ids, clusters : Series, optional
        The rows' ids and clusters, for messages. Without ids, messages name rows by their labels in the index.
    embedding_dim : int, optional
        Width that every row must have. By default that of most rows.
    width_of : str
        What has this width, for messages.
    order : (n,) int64 array, optional
        A NumPy or CuPy permutation: row ``i`` of the result is row ``order[i]`` of the column. It saves the copy that
        gathering afterwards would take.
    device : {"cpu", "cuda"}, optional
        The device of the result. By default that of the column.
    warn_of_zeros : bool, default True
        Whether to warn of all-zero rows.

    Returns
    -------
    (n, d) float32 tensor, C-contiguous
        It may alias the column's own memory unless `order` is given, and must not be written to then.

    Raises
    ------
    EmbeddingError
        If rows are null, empty or of different or unexpected width, if elements are null, NaN or infinite, or if the
        column does not hold embeddings.

    Warns
    -----
    ZeroEmbeddingWarning
        If rows are all zeros.

    Notes
    -----
    Only the direction of a row matters to the cosine. Float64 rows that are too large or too small for float32 are
    divided by their largest entry.
    """
    import torch

    check_embedding_dtype(column, name)
    report = _Report(name, column.index, ids, clusters, width_of)
    source: _Source = (_CudfSource if is_cudf(column) else _PandasSource)(column, report)
    device = device or source.device
    if len(column) == 0:
        return torch.empty((0, embedding_dim or 0), device=device)
    width = source.check_rows(embedding_dim)
    rows = _assemble(source.float32_blocks(width), (len(column), width), order, device)
    with reading_stream(device):
        bad = rows_not_finite(rows)
    if len(bad):
        positions = bad if order is None else to_numpy(order)[bad]
        advice = BITS_ADVICE if _holds_bits(column) else ""
        raise report.error(positions, "with NaN or infinite values", f"{ADVICE}{advice}")
    if warn_of_zeros and len(zero := _zero_rows(rows)):
        report.warn_of_zeros(zero if order is None else to_numpy(order)[zero])
    return rows


def gather_rows(parts: list[torch.Tensor], position: np.ndarray) -> torch.Tensor:
    """Return rows of several matrices as one.

    Parameters
    ----------
    parts : list of torch.Tensor
        (n_i, d) float32. The list is emptied, so that none is held twice.
    position : numpy.ndarray
        (m,) int64 rows, each once, counted through all parts.
    """
    import torch

    n = sum(map(len, parts))
    places = np.full(n, -1)
    places[position] = np.arange(len(position))
    rows = parts[0].new_empty((len(position), parts[0].shape[1]))
    start = 0
    while parts:
        part = parts.pop(0)
        place = torch.from_numpy(places[start : start + len(part)]).to(part.device)
        start += len(part)
        if len(position) < n:
            part, place = part[place >= 0], place[place >= 0]
        rows.index_copy_(0, place, part)
    return rows


def _zero_rows(rows: torch.Tensor) -> np.ndarray:
    """Return the positions of the all-zero rows of a matrix."""
    # Few rows begin with a zero, and only these are read in full.
    candidates = (rows[:, 0] == 0).nonzero().flatten()
    return candidates[~rows[candidates].any(dim=1)].cpu().numpy()


def rows_not_finite(rows: torch.Tensor) -> np.ndarray:
    """Return the positions of the rows of a matrix that hold NaN or infinities."""
    import torch

    # NaN and infinities survive a sum, which is cheaper than a test of each number.
    if rows.sum().isfinite():
        return np.empty(0, np.int64)
    blocks = rows.split(max(1, BLOCK_ELEMENTS[rows.device.type] // rows.shape[1]))
    finite = torch.cat([block.isfinite().all(dim=1) for block in blocks])
    return finite.logical_not().nonzero().flatten().cpu().numpy()


def to_embeddings(rows: Any, frame: Any) -> Any:
    """Return a matrix as an embedding column of a frame, the inverse of `to_tensor`.

    Parameters
    ----------
    rows : (n, d) float32 array, C-contiguous
        NumPy for pandas, CuPy for cuDF. The column aliases its memory.
    frame : DataFrame
        The pandas or cuDF frame, of n rows.

    Returns
    -------
    Series
        Arrow lists or cuDF lists, with the frame's index.
    """
    if is_cudf(frame):
        return _cudf_lists(rows, frame)
    width = rows.shape[1]
    step = max(1, MAX_LIST_ELEMENTS // max(1, width))
    blocks = [rows[start : start + step] for start in range(0, len(rows), step)]
    lists = [
        pa.ListArray.from_arrays(np.arange(len(block) + 1, dtype=np.int32) * np.int32(width), pa.array(block.ravel()))
        for block in blocks
    ]
    chunks = pa.chunked_array(lists, pa.list_(pa.float32()))
    return pd.Series(pd.array(chunks, dtype=pd.ArrowDtype(chunks.type)), index=frame.index)


def _cudf_lists(rows: Any, frame: Any) -> Any:
    import cudf
    import pylibcudf

    if len(rows) == 0:
        return cudf.Series([], dtype=cudf.ListDtype("float32"), index=frame.index)
    series = cudf.Series.from_pylibcudf(pylibcudf.Column.from_cuda_array_interface(rows))
    series.index = frame.index
    return series


@dataclass(frozen=True)
class _Report:
    """The names, index, ids and clusters that errors about rows quote."""

    name: str
    index: Any
    ids: Any
    clusters: Any
    width_of: str

    def error(self, positions: Any, problem: str, advice: str, parameters: Sequence[str] = ()) -> EmbeddingError:
        """Return the error about the rows at `positions`, which are sorted."""
        positions = np.sort(np.asarray(positions))
        count = "1 row" if len(positions) == 1 else f"{len(positions)} rows"
        where = f"{self.name!r}{self._in_clusters(positions)}"
        is_part = self.ids is not None and self.clusters is None and len(positions) < len(self.ids)
        elsewhere = " Other partitions may have more." if is_part else ""
        return EmbeddingError(
            f"Column {where}: {count} {problem} ({self._rows(positions)}). {advice}{elsewhere}",
            parameters=parameters,
            columns=[self.name],
        )

    def _rows(self, positions: np.ndarray) -> str:
        # Positions would not lead back to rows that have been shuffled.
        if self.ids is None:
            return f"index labels {some(to_list(self.index[positions]))}"
        return f"ids {some(to_list(self.ids.iloc[positions]))}"

    def warn_of_zeros(self, positions: Any) -> None:
        """Warn that rows of this partition are all zeros."""
        positions = np.sort(positions)
        # No line of this package or of Dask, which runs the task, would tell a user anything.
        warnings.warn_explicit(
            f"Column {self.name!r}: {have(len(positions), 'row')} an all-zero embedding in one partition "
            f"({self._rows(positions)}). Such a row is similar to no other and is never a duplicate. Embed it again, "
            "or drop it.",
            ZeroEmbeddingWarning,
            filename="dask_semdedup",
            lineno=1,
            registry=SHOWN,
        )

    def _in_clusters(self, positions: np.ndarray) -> str:
        if self.clusters is None:
            return ""
        return f", cluster {some(dict.fromkeys(to_list(self.clusters.iloc[positions])))}"


def _holds_bits(column: Any) -> bool:
    """Return whether the lists of a column, which has rows, hold uint16."""
    is_object = column.dtype == np.dtype(object)
    return bool((getattr(column.iloc[0], "dtype", None) if is_object else _element_type(column.dtype)) == np.uint16)


def _is_vector_of_spark(dtype: Any) -> bool:
    type_ = getattr(dtype, "pyarrow_dtype", pa.null())
    return pa.types.is_struct(type_) and {"type", "size", "indices", "values"} <= {field.name for field in type_}


def _storage(type_: pa.DataType) -> pa.DataType:
    """Return the storage type of an extension type, such as that of tensors, and any other type as it is."""
    return type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_


def _element_type(dtype: Any) -> np.dtype | None:
    """Return the dtype of the numbers in a list column, or None; object columns are taken to hold float64."""
    if dtype == np.dtype(object):
        return np.dtype(np.float64)
    if isinstance(dtype, pd.ArrowDtype):
        lists = _storage(dtype.pyarrow_dtype)
        kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        return np.dtype(lists.value_type.to_pandas_dtype()) if any(kind(lists) for kind in kinds) else None
    element = getattr(dtype, "element_type", None)  # cudf.ListDtype
    return element if isinstance(element, np.dtype) else None


class _Source(ABC):
    """A column of either backend, whose rows are checked and then converted block by block."""

    device: str

    def __init__(self, column: Any, report: _Report) -> None:
        self.column = column
        self.report = report

    @abstractmethod
    def check_rows(self, embedding_dim: int | None) -> int:
        """Return the width of all rows; raise for null rows, null elements and rows of another width."""

    @abstractmethod
    def pieces(self) -> Iterator[Any]:
        """Yield flat arrays of whole rows, in the column's order."""

    def float32_blocks(self, width: int) -> Iterator[Any]:
        """Yield float32 matrices: pieces that are float32 as they are, others converted block by block."""
        for piece in self.pieces():
            rows = piece.reshape(-1, width)
            step = max(1, len(rows)) if rows.dtype == np.float32 else self._block_rows(width)
            for start in range(0, len(rows), step):
                yield _to_float32(rows[start : start + step])

    def _block_rows(self, width: int) -> int:
        return max(1, BLOCK_ELEMENTS[self.device] // width)

    def _check_null(self, null: np.ndarray, what: str) -> None:
        if null.any():
            raise self.report.error(np.flatnonzero(null), what, ADVICE)

    def _check_widths(self, widths: np.ndarray, embedding_dim: int | None) -> int:
        expected = _most_common(widths) if embedding_dim is None else embedding_dim
        if (widths == 0).any():
            raise self.report.error(np.flatnonzero(widths == 0), "with an empty embedding", "Drop them first.")
        if (other := widths != expected).any():
            found = some(np.unique(widths[other]), limit=3)
            raise self.report.error(
                np.flatnonzero(other),
                f"with width {found}, where {expected} is expected{self.report.width_of}",
                "All embeddings must come from one model.",
                ["embedding_dim"] if embedding_dim is not None else [],
            )
        return expected


def _most_common(widths: np.ndarray) -> int:
    """Return the width that most rows have; on a tie that of the first row, if it is among the most common."""
    first = widths[0]
    if (widths == first).all():
        return int(first)
    values, counts = np.unique(widths, return_counts=True)
    return int(first if counts[values == first] == counts.max() else values[counts.argmax()])


class _PandasSource(_Source):
    device = "cpu"

    def __init__(self, column: pd.Series, report: _Report) -> None:
        super().__init__(column, report)
        self.is_object = column.dtype == np.dtype(object)

    def check_rows(self, embedding_dim: int | None) -> int:
        self._check_null(self.column.isna().to_numpy(dtype=bool), "with a null embedding")
        return self._check_objects(embedding_dim) if self.is_object else self._check_lists(embedding_dim)

    def pieces(self) -> Iterator[np.ndarray]:
        return self._object_pieces() if self.is_object else self._list_pieces()

    def _chunks(self) -> list[pa.Array]:
        chunks = self.column.array.__arrow_array__().chunks
        return [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in chunks]

    def _check_lists(self, embedding_dim: int | None) -> int:
        lengths = [pc.list_value_length(chunk).to_numpy() for chunk in self._chunks()]
        width = self._check_widths(np.concatenate(lengths), embedding_dim)
        nulls = [_rows_with_nulls(chunk, width) for chunk in self._chunks()]
        self._check_null(np.concatenate(nulls), "with null or NaN elements")
        return width

    def _list_pieces(self) -> Iterator[np.ndarray]:
        import torch

        # `flatten` respects the chunk's slice and does not copy. Arrow's own NumPy arrays are read-only, of which torch
        # would warn; nothing here writes to them.
        for chunk in self._chunks():
            yield _from_bits(torch.from_dlpack(chunk.flatten()).numpy())

    def _check_objects(self, embedding_dim: int | None) -> int:
        rows = self.column.to_numpy()
        if kinds := {kind for kind in set(map(type, rows)) if kind not in (np.ndarray, list, tuple)}:
            odd = [isinstance(row, tuple(kinds)) for row in rows]
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            tensors = " Convert a tensor with list(tensor.numpy())." if "Tensor" in names else ""
            raise self.report.error(
                np.flatnonzero(odd), f"of type {names}", f"The column must hold {ACCEPTED}.{tensors}"
            )
        if scalars := [position for position, row in enumerate(rows) if getattr(row, "ndim", 1) == 0]:
            raise self.report.error(scalars, "that is a single number", f"The column must hold {ACCEPTED}.")
        return self._check_widths(np.fromiter(map(len, rows), np.int64, len(rows)), embedding_dim)

    def _object_pieces(self) -> Iterator[np.ndarray]:
        rows = self.column.to_numpy()
        step = self._block_rows(len(rows[0]))
        for start in range(0, len(rows), step):
            yield _from_bits(self._concatenate(rows, start, start + step))

    def _concatenate(self, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        flat = _try_concatenate(rows[start:stop])
        if flat is None:
            odd = [position for position, row in enumerate(rows) if _try_concatenate([row]) is None]
            problem = "with something other than a flat list of numbers"
            raise self.report.error(odd, problem, f"The column must hold {ACCEPTED}.")
        return flat


class _CudfSource(_Source):
    device = "cuda"

    def check_rows(self, embedding_dim: int | None) -> int:
        if self.column.null_count:
            self._check_null(self.column.isnull().to_numpy(), "with a null embedding")
        shortest, longest = self._extreme_widths()
        self.width = shortest if embedding_dim is None else embedding_dim
        if not 0 < shortest == self.width == longest:
            self._check_widths(self.column.list.len().to_numpy(), embedding_dim)
        leaves = self._leaves()
        if leaves.null_count:
            self._check_null(
                leaves.isnull().to_numpy().reshape(-1, self.width).any(axis=1), "with null or NaN elements"
            )
        return self.width

    def _extreme_widths(self) -> list[int]:
        """Return the least and the greatest width, found on the device: only to report bad rows are all copied."""
        import cudf
        import torch

        data, _ = self.column.to_pylibcudf()
        offsets = cudf.Series.from_pylibcudf(data.list_view().offsets()).values
        with reading_stream(self.device):
            widths = tensor_like(offsets)[data.offset() : data.offset() + len(self.column) + 1].diff()
            return torch.stack(widths.aminmax()).tolist()

    def pieces(self) -> Iterator[Any]:
        yield _from_bits(self._leaves().values)

    def _leaves(self) -> Any:
        leaves = self.column.list.leaves
        if len(leaves) != len(self.column) * self.width:
            # A slice of a longer column may still refer to all leaves of that column: compact it.
            with default_stream("cuda"):
                self.column = self.column.take(np.arange(len(self.column)))
            leaves = self.column.list.leaves
        return leaves


def _rows_with_nulls(chunk: pa.Array, width: int) -> np.ndarray:
    leaves = chunk.flatten()
    if leaves.null_count == 0:
        return np.zeros(len(chunk), bool)
    return leaves.is_null().to_numpy(zero_copy_only=False).reshape(-1, width).any(axis=1)


def _try_concatenate(rows: Any) -> np.ndarray | None:
    """Return vectors of numbers as one, or None if they are anything else."""
    try:
        flat = np.concatenate(rows)
    except (TypeError, ValueError):
        return None
    return flat if flat.ndim == 1 and flat.dtype in NUMERIC else None


def _from_bits(flat: Any) -> Any:
    return flat.view(np.float16) if flat.dtype == np.uint16 else flat


def _to_float32(block: Any) -> Any:
    if block.dtype == np.float64:
        from dask_semdedup.search.certify import scaled

        block = scaled(block, abs(block).max(axis=1))
    return block.astype(np.float32, copy=False)


def _assemble(blocks: Iterator[Any], shape: tuple[int, int], order: Any, device: str) -> torch.Tensor:
    """Return blocks as one matrix on a device, in `order`."""
    import torch

    def moved(array: Any) -> Any:
        return to_numpy(array) if device == "cpu" else tensor_like(array).to(device)

    first = next(blocks)
    if order is None and first.shape == shape:
        return tensor_like(first).to(device)
    # NumPy asks for huge pages, which torch does not.
    rows: Any = np.empty(shape, np.float32) if device == "cpu" else torch.empty(shape, device=device)
    slots = None if order is None else moved(_inverse(order))
    start = 0
    with reading_stream(device):
        for block in chain([first], blocks):
            stop = start + len(block)
            rows[slice(start, stop) if slots is None else slots[start:stop]] = moved(block)
            start = stop
    return tensor_like(rows) if device == "cpu" else rows


def _inverse(order: Any) -> Any:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order), like=order)
    return inverse
