"""Ids to 64 bits, the same on every backend: what a shuffle sorts by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_semdedup.embeddings import is_cudf, tensor_like

if TYPE_CHECKING:
    import torch

__all__ = ["hash_ids"]

# What `pandas.api.types.infer_dtype` calls columns of objects that Arrow takes for integers, strings or bytes.
OBJECTS_OF_ARROW = ("integer", "string", "bytes", "empty")

# The base of the polynomial that hashes strings: odd, so that it has an inverse modulo 2**64.
BASE = 0x9E3779B97F4A7C15
BASE_INVERSE = pow(BASE, -1, 1 << 64)
# Strings are hashed so many bytes at a time, each of which takes a few int64.
HASH_BLOCK_BYTES = 1 << 18


def hash_ids(ids: Any, seed: int) -> torch.Tensor:
    """Hash ids to 64 bits, the same on every backend.

    Parameters
    ----------
    ids : pandas.Series or cudf.Series
        Integers of any width, strings of any dtype, or anything else that Arrow makes strings of.
    seed : int

    Returns
    -------
    (n,) int64 tensor
        Equal for equal ids and seeds, whatever the dtype that holds them.

    References
    ----------
    The finaliser is that of splitmix64: G. L. Steele, D. Lea and C. H. Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014.

    Examples
    --------
    >>> hash_ids(pd.Series([7, 8], dtype="int8"), 42).equal(hash_ids(pd.Series([7, 8], dtype="UInt64"), 42))
    True
    """
    import torch

    return _mix(_fingerprints(ids) ^ _mix(torch.tensor(_signed(seed))).item())


def _mix(values: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64; products of int64 wrap modulo 2**64."""
    values = values + _signed(0x9E3779B97F4A7C15)
    values = (values ^ _shifted(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _shifted(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right, zeros coming in as if int64 had no sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _fingerprints(ids: Any) -> torch.Tensor:
    """An int64 for each id: itself where it is an integer, else a hash of its characters."""
    import torch

    ids = ids.astype(ids.cat.categories.dtype) if ids.dtype == "category" else ids
    if is_cudf(ids) and ids.dtype.kind in "iu":
        return tensor_like(ids.fillna(0).astype("int64").values)
    array = _to_arrow(ids)
    convert = _integers if pa.types.is_integer(array.type) else _hashed_strings
    return torch.cat([torch.empty(0, dtype=torch.int64), *map(convert, array.chunks)])


def _to_arrow(ids: Any) -> pa.ChunkedArray:
    """Ids as Arrow integers or large binaries."""
    if not is_cudf(ids) and ids.dtype == np.dtype(object) and pd.api.types.infer_dtype(ids) not in OBJECTS_OF_ARROW:
        ids = ids.astype(str)
    array = ids.to_arrow() if is_cudf(ids) else pa.array(ids, from_pandas=True)
    array = pa.chunked_array([array]) if isinstance(array, pa.Array) else array
    if pa.types.is_integer(array.type):
        return array
    return array.cast(pa.large_string() if not pa.types.is_binary(array.type) else pa.large_binary())


def _integers(chunk: pa.Array) -> torch.Tensor:
    return tensor_like(chunk.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64))


def _hashed_strings(chunk: pa.Array) -> torch.Tensor:
    """Hash strings from Arrow's buffers, a block of them at a time."""
    import torch

    if len(chunk) == 0:
        return torch.empty(0, dtype=torch.int64)
    _, offset_buffer, data_buffer = chunk.buffers()
    offsets = _from_buffer(pa.int64(), offset_buffer, chunk.offset, len(chunk) + 1)
    data = _from_buffer(pa.uint8(), data_buffer, 0, int(offsets[-1]))
    rows = 1 + HASH_BLOCK_BYTES * len(chunk) // max(1, int(offsets[-1] - offsets[0]))
    ends = [offsets[start : start + rows + 1] for start in range(0, len(chunk), rows)]
    longest = max(int(part[-1] - part[0]) for part in ends)
    powers, inverses = _powers(BASE, longest + 1), _powers(BASE_INVERSE, longest + 1)
    return torch.cat([_polynomials(data, part, powers, inverses) for part in ends])


def _polynomials(
    data: torch.Tensor, offsets: torch.Tensor, powers: torch.Tensor, inverses: torch.Tensor
) -> torch.Tensor:
    """Each string's characters as the coefficients of a polynomial in BASE, modulo 2**64, and its length.

    The sums over all strings are differences of one running sum, whose powers count from the block's beginning.
    """
    import torch

    starts = offsets - offsets[0]
    terms = data[offsets[0] : offsets[-1]].to(torch.int64) * powers[: starts[-1]]
    sums = torch.cat([terms.new_zeros(1), terms.cumsum(0)])[starts].diff()
    return sums * inverses[starts[:-1]] + _mix(starts.diff())


def _powers(base: int, count: int) -> torch.Tensor:
    """The powers of `base` from 0 on, modulo 2**64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return tensor_like(np.cumprod(factors).view(np.int64))


def _from_buffer(kind: pa.DataType, buffer: pa.Buffer | None, offset: int, count: int) -> torch.Tensor:
    import torch

    buffer = buffer or pa.py_buffer(b"")
    return torch.from_dlpack(pa.Array.from_buffers(kind, count, [None, buffer], offset=offset))
