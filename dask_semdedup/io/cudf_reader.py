"""Reading fragments into cuDF frames with few calls."""

from __future__ import annotations

import os
import re
import resource
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from dask_semdedup.device.devices import cores_per_gpu
from dask_semdedup.device.streams import current_stream, default_stream, finish
from dask_semdedup.errors import MissingDependencyError, SemDedupError
from dask_semdedup.io.fragments import Fragment, changed, check_state, state_now, unreadable
from dask_semdedup.io.listing import is_local


def in_cudf(type_: pa.DataType) -> pa.DataType:
    """Return the type of a file's column in cuDF, which lacks fixed-size lists, extension types and binaries."""
    types = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return in_cudf(type_.storage_type)
    if types.is_dictionary(type_):
        return type_ if type_.ordered else in_cudf(type_.value_type)
    if types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return pa.list_(type_.value_field)
    strings = (
        types.is_string_view,
        types.is_large_string,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
    )
    return pa.string() if any(is_string(type_) for is_string in strings) else type_


@cache
def import_cudf() -> Any:
    """Configure the libraries that read and write for cuDF, and return the cuDF module.

    Raises
    ------
    MissingDependencyError
        If it cannot be imported.
    """
    # They are read once, at the first use. KvikIO, which reads files for cuDF, uses 4 threads by default. A GPU is slow
    # to compress few pages, as of scores: it writes 66,000 scores in 35 ms, and with compression on the host in 10 ms.
    os.environ.setdefault("KVIKIO_NTHREADS", str(min(READING_THREADS, cores_per_gpu())))
    os.environ.setdefault("LIBCUDF_HOST_COMPRESSION", "AUTO")
    os.environ.setdefault("LIBCUDF_HOST_COMPRESSION_THRESHOLD", str(PAGES_A_CORE * cores_per_gpu()))
    try:
        import cudf
    except ImportError as error:
        raise MissingDependencyError(
            f"cuDF partitions need cuDF, which cannot be imported ({error}). Run pip install '.[cu13]', or "
            "'.[cu12]' for CUDA 12, in a clone of dask-semdedup, or use backend='pandas'."
        ) from error
    return cudf


# KvikIO reads no faster with more threads. Those of several GPUs' processes fill the host's cache with their buffers of
# 4 MiB each: with 16 threads for each of four H200s, everything was 10% slower.
READING_THREADS = 10

# Up to so many pages, a core of the host compresses faster than a GPU.
PAGES_A_CORE = 64

# Concurrent calls of cuDF's reader in a process: one keeps the reading threads busy, the other the GPU.
READERS = 2

_readers = threading.BoundedSemaphore(READERS)


def files_at_once() -> int:
    """Return how many files a call of cuDF's reader may open: each takes two descriptors in `READERS` calls."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if soft == resource.RLIM_INFINITY else max(64, min(1024, soft // (4 * READERS)))


def read_fragments_cudf(fs: fsspec.AbstractFileSystem, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
    """Return the columns of all fragments as one cuDF frame, read in few calls: small reads leave a GPU idle."""
    cudf = import_cudf()
    rows = sum(fragment.rows for fragment in fragments)
    if not columns:
        return cudf.DataFrame(index=cudf.RangeIndex(rows))
    limit = files_at_once()
    batches = [fragments[start : start + limit] for start in range(0, len(fragments), limit)]
    frames = [_read_with_cudf(fs, batch, columns) for batch in batches]
    frame = frames[0]
    if len(frames) > 1:
        with default_stream("cuda"):
            frame = cudf.concat(frames, ignore_index=True)
    if len(frame) != rows:
        raise changed([fragment.path for fragment in fragments])
    return frame


def _read_with_cudf(fs: fsspec.AbstractFileSystem, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
    groups = [list(fragment.row_groups) for fragment in fragments if fragment.row_groups is not None]
    try:
        with _readers:
            if is_local(fs):
                for fragment in fragments:
                    check_state(fragment.path, fragment.state, state_now(fs, fragment.path))
                return _read_with_libcudf(fragments, columns, groups)
            with default_stream("cuda"):
                return import_cudf().read_parquet(
                    [fragment.path for fragment in fragments],
                    columns=list(columns),
                    row_groups=groups or None,
                    filesystem=fs,
                    use_pandas_metadata=False,
                    # Otherwise folders named key=value are read one by one.
                    dataset_kwargs={"partitioning": None},
                    allow_mismatched_pq_schemas=True,
                )
    except (RuntimeError, OSError, IndexError) as error:
        # An error of the GPU, which another thread may have caused, is no fault of the files.
        if isinstance(error, SemDedupError) or re.search("cuda[ _]?error|cuda out of memory", str(error), re.I):
            raise
        raise unreadable(_first_of(fragments), error) from error


def _read_with_libcudf(fragments: Sequence[Fragment], columns: Sequence[str], groups: list[list[int]]) -> Any:
    """Return a frame as `cudf.read_parquet` does, but in the current stream."""
    from pylibcudf import TypeId
    from pylibcudf.io import SourceInfo, parquet

    builder = parquet.ParquetReaderOptions.builder(SourceInfo([fragment.path for fragment in fragments]))
    options = builder.use_pandas_metadata(False).allow_mismatched_pq_schemas(True).build()
    options.set_column_names(list(columns))
    if groups:
        options.set_row_groups(groups)
    table = parquet.read_parquet(options, current_stream())
    finish()
    _check_rows(fragments, table.num_rows_per_source)
    # cuDF converts dates to timestamps.
    is_converted = any(column.type().id() == TypeId.TIMESTAMP_DAYS for column in table.columns)
    with default_stream("cuda" if is_converted else "cpu"):
        frame = import_cudf().DataFrame.from_pylibcudf(table)
    return frame


def _check_rows(fragments: Sequence[Fragment], rows: Sequence[int]) -> None:
    """Raise if a file has other rows than planned: its neighbours would get rows of another cluster."""
    found = [fragment.path for fragment, n in zip(fragments, rows, strict=False) if fragment.rows != n]
    if found:
        raise changed(found)


def cupy_repeat(counts: np.ndarray) -> Any:
    """Return the positions 0, 1, ... on the GPU, each repeated as often as its count says."""
    import cupy

    ends = cupy.asarray(np.cumsum(counts))
    return cupy.searchsorted(ends, cupy.arange(int(counts.sum())), side="right")


def _first_of(fragments: Sequence[Fragment]) -> str:
    return f"{fragments[0].path} (the first of {len(fragments)} files)"
