"""Hashes of ids, the same on every backend: the keys of shuffles and of random orders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_semdedup.device.streams import default_stream
from dask_semdedup.frames.backend import device_of, is_cudf
from dask_semdedup.frames.ids import ids_to_arrow, plain_ids

__all__ = ["checksum", "hash_ids"]

# Strings are hashed in blocks of this many rows: pandas needs them as Python objects, which take several times the
# memory of Arrow's, and blocks that stay in the cache are hashed faster.
BLOCK_ROWS = 1 << 16


def hash_ids(ids: Any, seed: int) -> Any:
    """Return a 64-bit hash of each id.

    Parameters
    ----------
    ids : pandas.Series or cudf.Series
        Integers of any width, strings of any dtype, or anything else that `ids_to_arrow` converts.
    seed : int

    Returns
    -------
    (n,) uint64 array
        NumPy or CuPy. Equal ids get equal hashes under one seed, whatever their dtype.

    References
    ----------
    The finaliser is that of splitmix64: G. L. Steele, D. Lea and C. H. Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014.
    """
    key = _mix(np.array([seed % 2**64], np.uint64))[0]
    with default_stream(device_of(ids)):
        return _mix(_fingerprints(ids) ^ key)


def checksum(ids: Any) -> int:
    """Return a number that tells these ids in this order from other ids, or another order; on one backend.

    Parameters
    ----------
    ids : pandas.Series or cudf.Series
        As of `hash_ids`.
    """
    with default_stream(device_of(ids)):
        # cuDF's own hashes of strings need no copy to the host.
        hashes = ids.hash_values().values.astype("uint64") if is_cudf(ids) else hash_ids(ids, 0)
        odd = 2 * np.arange(len(hashes), dtype=np.uint64, like=hashes) + np.uint64(1)
        return int((hashes * odd).sum())


def _mix(values: Any) -> Any:
    """Apply the finaliser of splitmix64, in uint64 arithmetic modulo 2**64 on NumPy and CuPy alike."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _fingerprints(ids: Any) -> Any:
    """Return a uint64 for each id: the bits of an integer, pandas' hash of any string or bytes."""
    ids = plain_ids(ids)
    if is_cudf(ids) and ids.dtype.kind in "iu":
        return ids.fillna(0).astype("int64").values.view(np.uint64)
    array = ids_to_arrow(ids)
    convert = _integers if pa.types.is_integer(array.type) else _hashed_strings
    hashes = np.concatenate([np.empty(0, np.uint64), *map(convert, array.chunks)])
    if not is_cudf(ids):
        return hashes
    import cupy

    return cupy.asarray(hashes)


def _integers(chunk: pa.Array) -> np.ndarray:
    return chunk.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64)


def _hashed_strings(chunk: pa.Array) -> np.ndarray:
    blocks = (chunk.slice(start, BLOCK_ROWS) for start in range(0, len(chunk), BLOCK_ROWS))
    # Ids hardly repeat: to look for repeats first would only cost time.
    hashes = [pd.util.hash_array(block.to_numpy(zero_copy_only=False), categorize=False) for block in blocks]
    return np.concatenate([np.empty(0, np.uint64), *hashes])
