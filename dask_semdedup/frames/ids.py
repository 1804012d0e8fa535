"""Ids of any dtype: whether two columns can be compared, and which ids are among others.

The same id may be an int32 here and an Arrow int64 there, or a string of any of pandas' kinds. Before ids are compared
they are brought to one dtype for each kind: of Arrow on pandas, and of cuDF's own on cuDF.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from dask.dataframe.dispatch import concat
from dask.dataframe.utils import has_known_categories

from dask_semdedup.errors import IdError, InvalidArgumentError
from dask_semdedup.frames.backend import is_cudf, is_string

__all__ = ["are_equal", "as_stored", "check_same_kind", "factorize", "ids_to_arrow", "is_in", "plain_ids", "repeats"]

# Of the width that holds both int64 and uint64, which no integer has.
EVERY_INTEGER = 20


def check_same_kind(left: Any, right: Any) -> None:
    """Raise `InvalidArgumentError` if the dtypes of two columns of ids say that none of the one can equal the other's.

    Parameters
    ----------
    left, right : pandas.Series or cudf.Series
        They may be empty. What columns of objects hold shows only when `is_in` looks at them.
    """
    kinds = {kind for kind in (_kind(left), _kind(right)) if kind is not None}
    if len(kinds) > 1:
        raise _different_kinds(left, right)


def is_in(ids: Any, others: Any) -> Any:
    """Tell which ids are among others; null ids are not.

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
        If columns of objects turn out to hold ids of different types.
    """
    left, right = _comparable(ids), _comparable(others).dropna()
    if left.count() == 0:
        # Nothing to find, whatever type a column of objects without any objects is taken for.
        right = right.iloc[:0].astype(left.dtype)
    # cuDF has several dtypes for strings, which are one to it.
    if len(right) and left.dtype != right.dtype and not (is_string(left) and is_string(right)):
        if not _is_integer(left) or not _is_integer(right):
            raise _different_kinds(ids, others)
        left, right = _widened(left), _widened(right)
    return left.isin(right)


def are_equal(left: Any, right: Any) -> Any:
    """Tell which ids equal those beside them; null ids do not."""
    return (_comparable(left) == _comparable(right)).fillna(False).astype("bool")


def repeats(ids: Any) -> Any:
    """Tell which ids have stood in an earlier row."""
    return _comparable(ids).duplicated()


def factorize(*columns: Any) -> Any:
    """Number the different ids of several columns from 0.

    Returns
    -------
    int64 array
        Of NumPy or CuPy: the numbers of the first column's rows, then those of the next. Nulls have -1.
    """
    ids = [_comparable(column) for column in columns]
    if len({str(column.dtype) for column in ids}) > 1 and all(map(_is_integer, ids)):
        ids = [_widened(column) for column in ids]
    codes, _ = concat(ids, ignore_index=True).factorize()
    return codes.astype(np.int64, copy=False)


def _kind(ids: Any) -> str | None:
    """What equal ids have in common; None for objects and for categories that Dask has not seen."""
    if ids.dtype == "category" and not has_known_categories(ids):
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
    """Ids in the one dtype of their kind: int64 or uint64, large strings, large binaries."""
    if is_cudf(ids):
        ids = plain_ids(ids)
        return ids.astype("int64") if _is_integer(ids) and ids.dtype != np.uint64 else ids
    array = ids_to_arrow(ids)
    if pa.types.is_integer(array.type) and array.type != pa.uint64():
        array = array.cast(pa.int64())
    return pd.Series(pd.arrays.ArrowExtensionArray(array), index=ids.index, name=ids.name)


def _widened(ids: Any) -> Any:
    """Integers as decimals, in which int64 and uint64 can be compared."""
    if is_cudf(ids):
        import cudf

        return ids.astype(cudf.Decimal128Dtype(EVERY_INTEGER, 0))
    return ids.astype(pd.ArrowDtype(pa.decimal128(EVERY_INTEGER, 0)))


def _different_kinds(left: Any, right: Any) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"Ids of different types cannot be compared: column {left.name!r} has dtype {left.dtype}, "
        f"column {right.name!r} of the duplicates has dtype {right.dtype}. Convert one of them with astype first."
    )


# What `pandas.api.types.infer_dtype` calls columns of objects that Arrow takes for integers, strings or bytes.
OBJECTS_OF_ARROW = ("integer", "string", "bytes", "empty")


def plain_ids(ids: Any) -> Any:
    """Give ids as their categories' own dtype where they are categorical, else as they are."""
    if ids.dtype != "category":
        return ids
    dtype = ids.cat.categories.dtype
    if not is_cudf(ids) and dtype.kind in "iu" and ids.isna().any():
        dtype = dtype.name.replace("uint", "UInt").replace("int", "Int")  # which hold nulls
    return ids.astype(dtype)


def as_stored(column: Any) -> Any:
    """Give values of an extension type of Arrow, as UUIDs, as what they are stored as, which has an order."""
    type_ = getattr(column.dtype, "pyarrow_dtype", None)
    return column.astype(pd.ArrowDtype(type_.storage_type)) if isinstance(type_, pa.BaseExtensionType) else column


def ids_to_arrow(ids: Any) -> pa.ChunkedArray:
    """Give ids as Arrow integers, large strings or large binaries; nulls stay null.

    Parameters
    ----------
    ids : pandas.Series or cudf.Series

    Returns
    -------
    pyarrow.ChunkedArray
        Without a copy where the column is one of Arrow and of such a type.
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
    except OverflowError:  # Objects that are integers from 2⁶³ on.
        try:
            return pa.array(ids, pa.uint64(), from_pandas=True)
        except OverflowError as error:
            raise IdError(
                f"Column {ids.name!r}: integers that neither int64 nor uint64 holds all of. Make strings of them, with "
                "astype(str)."
            ) from error
