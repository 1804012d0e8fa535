"""Fetching the footers of Parquet files, many at once."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dask_semdedup.io.fragments import unreadable
from dask_semdedup.io.listing import THREADS, is_local
from dask_semdedup.io.schemas import without_index

# The last bytes of a Parquet file.
MAGIC = b"PAR1"

# Bytes fetched from the end of a remote or local file, which hold nearly every footer.
FOOTER_GUESS = 2**16

LOCAL_GUESS = 2**13

# A local file system is slow where the first few footers of a block take so many seconds.
PROBES = 8
SLOW = 1e-4


def read_schema(fs: fsspec.AbstractFileSystem, path: str, size: int) -> pa.Schema:
    """Return the Arrow schema of a file, without columns that pandas or Dask wrote only to restore an index."""
    return without_index(arrow_schema(path, read_metadata(fs, path, fetch_footer(fs, path, size))))


def fetch_footers(fs: fsspec.AbstractFileSystem, sizes: Mapping[str, int]) -> list[bytes]:
    """Return the footers of files of these sizes: read by this thread where that is fast, else by many at once.

    From the page cache a footer takes less time than a thread takes to get hold of Python's lock.
    """
    files = iter(sizes.items())
    footers = []
    if is_local(fs):
        seconds = []
        for path, size in islice(files, PROBES):
            start = time.perf_counter()
            footers.append(fetch_footer(fs, path, size))
            seconds.append(time.perf_counter() - start)
        if statistics.median(seconds) < SLOW:
            return footers + [fetch_footer(fs, path, size) for path, size in files]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="footers") as pool:
        return footers + list(pool.map(lambda file: fetch_footer(fs, *file), files))


def fetch_footer(fs: fsspec.AbstractFileSystem, path: str, size: int) -> bytes:
    """Return the end of a file from where its footer begins, or nothing if it does not look like Parquet."""
    # S3's file system has another parameter at the second place.
    fetch, guess = (_read_range, LOCAL_GUESS) if is_local(fs) else (fs.cat_file, FOOTER_GUESS)
    try:
        tail: bytes = fetch(path, start=max(0, size - guess), end=size)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if not tail.endswith(MAGIC) or length > size:
            return b""
        return tail[-length:] if length <= len(tail) else fetch(path, start=size - length, end=size)
    except OSError as error:
        raise unreadable(path, error) from error


def _read_range(path: str, start: int, end: int) -> bytes:
    """Return bytes of a local file, with as few system calls as possible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, end - start, start)
    finally:
        os.close(descriptor)


def read_metadata(fs: fsspec.AbstractFileSystem, path: str, footer: bytes) -> pq.FileMetaData:
    """Return the metadata in a footer, as Arrow reads it. Arrow also says what is wrong with a file that has none."""
    try:
        if footer:
            return pq.read_metadata(pa.BufferReader(footer))
        with fs.open(path) as file:
            return pq.read_metadata(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def arrow_schema(path: str, metadata: pq.FileMetaData) -> pa.Schema:
    """Return the Arrow schema in a file's metadata, with all of its names decoded."""
    try:
        schema = metadata.schema.to_arrow_schema()
        # This decodes all names, of fields in fields too.
        schema.to_string(show_field_metadata=False, show_schema_metadata=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    return schema
