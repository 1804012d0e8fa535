"""Ids to 64 bits, the same on every backend: what a shuffle sorts by.

All arithmetic is that of uint64, modulo 2**64, which NumPy and CuPy agree on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from dask_semdedup.device.streams import default_stream
from dask_semdedup.frames.backend import device_of, is_cudf
from dask_semdedup.frames.ids import ids_to_arrow, plain_ids

__all__ = ["hash_ids"]

# The base of the polynomial that hashes strings: odd, so that it has an inverse modulo 2**64.
BASE = 0x9E3779B97F4A7C15

BASE_INVERSE = pow(BASE, -1, 1 << 64)

# Strings are hashed so many bytes at a time, each of which takes a few uint64.
HASH_BLOCK_BYTES = 1 << 18


def hash_ids(ids: Any, seed: int) -> Any:
    """Hash ids to 64 bits.

    Parameters
    ----------
    ids : pandas.Series or cudf.Series
        Integers of any width, strings of any dtype, or anything else that Arrow makes strings of.
    seed : int

    Returns
    -------
    (n,) uint64 array
        Of NumPy or CuPy. Equal for equal ids and seeds, whatever the dtype that holds them.

    References
    ----------
    The finaliser is that of splitmix64: G. L. Steele, D. Lea and C. H. Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014.
    """
    key = _mix(np.array([seed % 2**64], np.uint64))[0]
    with default_stream(device_of(ids)):
        return _mix(_fingerprints(ids) ^ key)


def _mix(values: Any) -> Any:
    """The finaliser of splitmix64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _fingerprints(ids: Any) -> Any:
    """A uint64 for each id: the bits of an integer, a hash of the characters of anything else."""
    ids = plain_ids(ids)
    if is_cudf(ids) and ids.dtype.kind in "iu":
        return ids.fillna(0).astype("int64").values.view(np.uint64)
    array = ids_to_arrow(ids)
    convert = _integers if pa.types.is_integer(array.type) else _hashed_strings
    hashes = np.concatenate([np.empty(0, np.uint64), *map(convert, array.chunks)])
    return _to_cupy(hashes) if is_cudf(ids) else hashes


def _to_cupy(array: np.ndarray) -> Any:
    import cupy

    return cupy.asarray(array)


def _integers(chunk: pa.Array) -> np.ndarray:
    return chunk.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64)


def _hashed_strings(chunk: pa.Array) -> np.ndarray:
    """Hash strings from Arrow's buffers, a block of them at a time."""
    if len(chunk) == 0:
        return np.empty(0, np.uint64)
    _, offset_buffer, data_buffer = chunk.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    data = np.frombuffer(data_buffer or b"", np.uint8)
    step = 1 + HASH_BLOCK_BYTES * len(chunk) // max(1, int(offsets[-1] - offsets[0]))
    blocks = [offsets[start : start + step + 1] for start in range(0, len(chunk), step)]
    longest = max(int(block[-1] - block[0]) for block in blocks)
    powers, inverses = _powers(BASE, longest + 1), _powers(BASE_INVERSE, longest + 1)
    return np.concatenate([_polynomials(data, block, powers, inverses) for block in blocks])


def _polynomials(data: np.ndarray, offsets: np.ndarray, powers: np.ndarray, inverses: np.ndarray) -> np.ndarray:
    """Each string's characters as the coefficients of a polynomial in BASE, and its length.

    The sums over all strings are differences of one running sum, whose powers count from the block's beginning.
    """
    starts = offsets - offsets[0]
    sums = np.zeros(starts[-1] + 1, np.uint64)
    np.cumsum(data[offsets[0] : offsets[-1]] * powers[: starts[-1]], out=sums[1:])
    return np.diff(sums[starts]) * inverses[starts[:-1]] + _mix(np.diff(starts).view(np.uint64))


def _powers(base: int, count: int) -> np.ndarray:
    """The powers of `base` from 0 on."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
