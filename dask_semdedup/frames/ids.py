"""Comparison of ids of any dtype.

The same id may be an int32 in one column and an Arrow int64 in another, or a string of any of pandas' dtypes. Before
ids are compared they are converted to one dtype per kind: an Arrow dtype in pandas, a native dtype in cuDF.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_semdedup.errors import IdError, InvalidArgumentError
from dask_semdedup.frames.backend import concat, is_cudf, is_string

__all__ = ["are_equal", "as_stored", "check_same_kind", "factorize", "ids_to_arrow", "is_in", "plain_ids", "repeats"]

# Decimal digits that hold every int64 and every uint64.
INTEGER_DIGITS = 20

# The only category of an empty column whose categories are not known before its data are read.
UNKNOWN_CATEGORIES = "__UNKNOWN_CATEGORIES__"


def check_same_kind(left: Any, right: Any) -> None:
    """Raise `InvalidArgumentError` if the dtypes of two columns of ids rule out that any of them are equal.

    Parameters
    ----------
    left, right : pandas.Series or cudf.Series
        They may be empty. Object columns pass: what they hold is known only once `is_in` reads them.
    """
    kinds = {kind for kind in (_kind(left), _kind(right)) if kind is not None}
    if len(kinds) > 1:
        raise _different_kinds(left, right)


def is_in(ids: Any, others: Any) -> Any:
    """Return a mask of the ids that are among others; null ids are not.

    Parameters
    ----------
    ids, others : pandas.Series or cudf.Series

    Returns
    -------
    Series of bool
        With the index of `ids`.

    Raises
    ------
    InvalidArgumentError
        If object columns turn out to hold ids of different types.
    """
    left, right = _comparable(ids), _comparable(others).dropna()
    if left.count() == 0:
        # There is nothing to find, whatever dtype an object column without values was converted to.
        right = right.iloc[:0].astype(left.dtype)
    # cuDF compares strings of all its string dtypes.
    if len(right) and left.dtype != right.dtype and not (is_string(left) and is_string(right)):
        if not _is_integer(left) or not _is_integer(right):
            raise _different_kinds(ids, others)
        left, right = _widened(left), _widened(right)
    return left.isin(right)


def are_equal(left: Any, right: Any) -> Any:
    """Return a mask of the rows where two columns hold the same id; null ids equal nothing."""
    return (_comparable(left) == _comparable(right)).fillna(False).astype("bool")


def repeats(ids: Any) -> Any:
    """Return a mask of the ids that occur in an earlier row."""
    return _comparable(ids).duplicated()


def factorize(*columns: Any) -> Any:
    """Return codes of the ids of several columns, counted from 0, equal for equal ids.

    Returns
    -------
    int64 array
        NumPy or CuPy: the codes of the first column's rows, then those of the next. Nulls have -1.
    """
    ids = [_comparable(column) for column in columns]
    if len({str(column.dtype) for column in ids}) > 1 and all(map(_is_integer, ids)):
        ids = [_widened(column) for column in ids]
    codes, _ = concat(ids).factorize()
    return codes.astype(np.int64, copy=False)


def _kind(ids: Any) -> str | None:
    """Return what equal ids have in common; None for objects and for unknown categories."""
    if ids.dtype == "category" and UNKNOWN_CATEGORIES in ids.cat.categories:
        return None
    ids = plain_ids(ids)
    if isinstance(ids.dtype, pd.ArrowDtype):
        ids = _comparable(ids) if _is_encoded(ids.dtype.pyarrow_dtype) else ids
    if not is_cudf(ids) and ids.dtype == np.dtype(object):
        return None
    if is_string(ids):
        return "string"
    return "integer" if _is_integer(ids) else str(ids.dtype)


def _is_encoded(arrow_type: pa.DataType) -> bool:
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_dictionary)
    return isinstance(arrow_type, pa.BaseExtensionType) or any(kind(arrow_type) for kind in binary)


def _is_integer(ids: Any) -> bool:
    return getattr(ids.dtype, "kind", "") in ("i", "u")


def _comparable(ids: Any) -> Any:
    """Return ids in the dtype of their kind: int64 or uint64, large strings, large binaries."""
    if is_cudf(ids):
        ids = plain_ids(ids)
        return ids.astype("int64") if _is_integer(ids) and ids.dtype != np.uint64 else ids
    array = ids_to_arrow(ids)
    if pa.types.is_integer(array.type) and array.type != pa.uint64():
        array = array.cast(pa.int64())
    return pd.Series(pd.arrays.ArrowExtensionArray(array), index=ids.index, name=ids.name)


def _widened(ids: Any) -> Any:
    """Return integers as decimals, in which int64 and uint64 can be compared."""
    if is_cudf(ids):
        import cudf

        return ids.astype(cudf.Decimal128Dtype(INTEGER_DIGITS, 0))
    return ids.astype(pd.ArrowDtype(pa.decimal128(INTEGER_DIGITS, 0)))


def _different_kinds(left: Any, right: Any) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"Ids of different types cannot be compared: column {left.name!r} has dtype {left.dtype}, "
        f"column {right.name!r} of the duplicates has dtype {right.dtype}. Convert one of them with astype first.",
        columns=[left.name, right.name],
    )


# Object columns that Arrow converts to integers, strings or bytes, as `pandas.api.types.infer_dtype` names them.
OBJECTS_OF_ARROW = ("integer", "string", "bytes", "empty")


def plain_ids(ids: Any) -> Any:
    """Return categorical ids in the dtype of their categories, others as they are."""
    if ids.dtype != "category":
        return ids
    dtype = ids.cat.categories.dtype
    if not is_cudf(ids) and dtype.kind in "iu" and ids.isna().any():
        dtype = dtype.name.replace("uint", "UInt").replace("int", "Int")  # which hold nulls
    return ids.astype(dtype)


def as_stored(column: Any) -> Any:
    """Return values of an Arrow extension type, such as UUIDs, in their storage type, which can be sorted."""
    type_ = getattr(column.dtype, "pyarrow_dtype", None)
    return column.astype(pd.ArrowDtype(type_.storage_type)) if isinstance(type_, pa.BaseExtensionType) else column


def ids_to_arrow(ids: Any) -> pa.ChunkedArray:
    """Return ids as Arrow integers, large strings or large binaries; nulls stay null.

    Parameters
    ----------
    ids : pandas.Series or cudf.Series

    Returns
    -------
    pyarrow.ChunkedArray
        Without a copy if the column is already of such an Arrow type.
    """
    ids = plain_ids(ids)
    if not is_cudf(ids) and ids.dtype == np.dtype(object) and pd.api.types.infer_dtype(ids) not in OBJECTS_OF_ARROW:
        ids = ids.astype(str).where(ids.notna())
    array = ids.to_arrow() if is_cudf(ids) else _to_arrow(ids)
    array = pa.chunked_array([array]) if isinstance(array, pa.Array) else array
    if isinstance(array.type, pa.BaseExtensionType):  # UUIDs
        array = array.cast(array.type.storage_type)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_integer(array.type):
        return array
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return array.cast(pa.large_binary() if any(kind(array.type) for kind in kinds) else pa.large_string())


def _to_arrow(ids: pd.Series) -> pa.Array | pa.ChunkedArray:
    try:
        return pa.array(ids, from_pandas=True)
    except OverflowError:  # Python integers of 2⁶³ and more.
        try:
            return pa.array(ids, pa.uint64(), from_pandas=True)
        except OverflowError as error:
            raise IdError(
                f"Column {ids.name!r} holds integers that fit neither int64 nor uint64. Convert them to strings, with "
                "astype(str).",
                columns=[ids.name],
            ) from error
