"""Operations on pandas and cuDF frames, columns and arrays whose code differs between the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_semdedup.device.streams import current_stream, default_stream
from dask_semdedup.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch

__all__ = [
    "array_like",
    "check_plain_dtype",
    "column_like",
    "concat",
    "device_of",
    "frame_like",
    "is_cudf",
    "is_string",
    "positions_like",
    "published",
    "release_unused",
    "shares_memory",
    "take",
    "tensor_like",
    "to_arrow",
    "to_host",
    "to_list",
    "to_numpy",
]


def check_plain_dtype(meta_column: Any, parameter: str) -> None:
    """Raise if a column holds lists, structs or maps, which cannot be ids or clusters.

    Parameters
    ----------
    meta_column : pandas.Series or cudf.Series
        The column, which may be empty.
    parameter : str
        The parameter that names the column, for the message.

    Raises
    ------
    InvalidArgumentError
        With the column and its dtype.
    """
    dtype = meta_column.dtype
    arrow = isinstance(dtype, pd.ArrowDtype) and pa.types.is_nested(dtype.pyarrow_dtype)
    if arrow or type(dtype).__name__ in ("ListDtype", "StructDtype"):
        raise InvalidArgumentError(
            f"Column {meta_column.name!r} has dtype {dtype}. Name a column of integers or strings as {parameter}.",
            parameters=[parameter],
            columns=[meta_column.name],
        )


def shares_memory(rows: torch.Tensor, column: Any) -> bool:
    """Return whether a matrix from `to_tensor` may alias its column, and so must not be written to."""
    if is_cudf(column):
        return True
    if column.dtype == np.dtype(object):
        return False
    buffers = [buffer for chunk in column.array.__arrow_array__().chunks for buffer in chunk.buffers() if buffer]
    return any(buffer.address <= rows.data_ptr() < buffer.address + buffer.size for buffer in buffers)


def array_like(tensor: torch.Tensor, frame: Any) -> Any:
    """Return a tensor as an array of a frame's backend.

    Parameters
    ----------
    tensor : torch.Tensor
    frame : DataFrame or Series
        Of pandas or cuDF.

    Returns
    -------
    numpy.ndarray or cupy.ndarray
        Without a copy if the tensor is already on the frame's device.
    """
    if not is_cudf(frame):
        return tensor.cpu().numpy()
    import cupy

    return cupy.from_dlpack(tensor.to("cuda"))


def positions_like(positions: np.ndarray, frame: Any) -> Any:
    """Return NumPy's positions of rows as an array of a frame's backend."""
    return array_like(tensor_like(positions), frame)


def column_like(array: Any, frame: Any) -> Any:
    """Return an array of numbers as a column of a frame's backend; NaN stays NaN."""
    if not is_cudf(frame):
        return pd.Series(array)
    import cudf

    # To convert NaN to nulls, cuDF would count them, and the host would wait for the device.
    return cudf.Series(array, nan_as_null=False)


def take(column: Any, positions: Any) -> Any:
    """Return rows of a column, with a new index.

    Parameters
    ----------
    column : Series
        Of pandas or cuDF.
    positions : (m,) int64 array
        A NumPy or CuPy array of positions within the column.
    """
    if not is_cudf(column):
        return column.iloc[positions].reset_index(drop=True)
    taken = _cudf_take(column, positions)
    if taken.dtype == column.dtype:
        return taken
    with default_stream("cuda"):
        return column.iloc[positions].reset_index(drop=True)


def _cudf_take(column: Any, positions: Any) -> Any:
    """Return rows of a cuDF column. Positions are not checked, since the host would have to wait for the device.

    A dtype that libcudf does not have, such as categories, is lost.
    """
    import cudf
    import pylibcudf as plc

    table = plc.Table([column.to_pylibcudf()[0]])
    where = plc.Column.from_cuda_array_interface(positions)
    unchecked = plc.copying.OutOfBoundsPolicy.DONT_CHECK
    (rows,) = plc.copying.gather(table, where, unchecked, current_stream()).columns()
    return cudf.Series.from_pylibcudf(rows, metadata={"name": column.name})


def tensor_like(array: Any) -> torch.Tensor:
    """Return a NumPy or CuPy array as a tensor on the same device, without a copy."""
    import torch

    return torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.from_dlpack(array)


def to_numpy(array: Any) -> np.ndarray:
    """Return a NumPy or CuPy array as a NumPy array."""
    return array if isinstance(array, np.ndarray) else array.get()


def to_list(column: Any) -> list[Any]:
    """Return a pandas or cuDF column as a list of Python values."""
    return (column.to_pandas() if is_cudf(column) else column).tolist()


def to_arrow(frame: Any) -> pa.Table:
    """Return a pandas or cuDF frame as an Arrow table, without its index."""
    if is_cudf(frame) and not _has_integer_nulls(frame):
        return frame.to_arrow(preserve_index=False)
    # With the metadata that pandas adds to the schema, readers do not turn integers with nulls into floats.
    return pa.Table.from_pandas(to_host(frame), preserve_index=False)


def to_host(frame: Any) -> pd.DataFrame:
    """Return a pandas or cuDF frame as a pandas frame. Integers with nulls stay integers."""
    return frame.to_pandas(nullable=_has_integer_nulls(frame)) if is_cudf(frame) else frame


def _has_integer_nulls(frame: Any) -> bool:
    return any(frame[name].null_count for name in frame.columns if frame[name].dtype.kind in "iub")


def release_unused() -> None:
    """Give back the memory that Arrow keeps after rows are gone: of a process that has read much, up to a gigabyte."""
    pa.default_memory_pool().release_unused()


def is_cudf(frame: Any) -> bool:
    """Return whether a frame or column is a cuDF one, without importing cuDF."""
    return type(frame).__module__.partition(".")[0] == "cudf"


def device_of(frame: Any) -> str:
    """Return the device of a frame or column, "cuda" or "cpu"."""
    return "cuda" if is_cudf(frame) else "cpu"


def is_string(column: Any) -> bool:
    """Return whether a pandas or cuDF column has a string dtype."""
    dtype = column.dtype
    if isinstance(dtype, pd.ArrowDtype):
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        return any(kind(dtype.pyarrow_dtype) for kind in kinds)
    # cuDF has no object columns: it gives its string columns that dtype.
    return isinstance(dtype, pd.StringDtype) or (is_cudf(column) and dtype == np.dtype(object))


def frame_like(columns: Mapping[str, Any], like: Any) -> Any:
    """Return columns as a frame of the backend of another frame or column."""
    if not is_cudf(like):
        return pd.DataFrame(columns)
    import cudf

    return cudf.DataFrame(columns)


def concat(columns: Sequence[Any]) -> Any:
    """Return several columns of one backend as one, with a new index."""
    if not is_cudf(columns[0]):
        return pd.concat(columns, ignore_index=True)
    import cudf

    return cudf.concat(columns, ignore_index=True)


def published(frame: Any) -> Any:
    """Return a cuDF frame, made in a stream of this thread, in memory of the current stream."""
    return frame.copy() if is_cudf(frame) else frame
