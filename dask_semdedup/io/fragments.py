"""Fragments of files: what planning knows about them, and reading one into an Arrow table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate, groupby
from operator import attrgetter
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dask_semdedup.errors import DataReadError, SemDedupError, some
from dask_semdedup.io.listing import State, is_local
from dask_semdedup.io.schemas import conform

# Bytes in memory, and rows, of a batch. Arrow takes five times the bytes of lists while it decodes them, which is
# fastest in a core's cache, and cannot decode more than 2 GiB of strings within lists at once.
BATCH_BYTES, BATCH_ROWS = 2**22, 2**16

# Bytes of a file that is small.
SMALL_FILE = 2**25

# Bytes of a column that are read from a file at once, and of its first pages where no more is wanted.
BUFFER, FIRST_PAGES = 2**20, 2**16

TEXTS = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())

# Rows that are looked at for a dictionary.
FIRST_ROWS = 64

# A file may ask for EXPANSION times its bytes in memory, and for UNSUSPECTED bytes in any case. A table with ids asks
# for 1,000 times its bytes even if all of its embeddings are equal.
EXPANSION = 2**13

UNSUSPECTED = 2**28


class Fragment(NamedTuple):
    """A piece of a partition: a file, or some of its row groups.

    Parameters
    ----------
    path, rows
        The file, and the rows of the piece.
    row_groups
        Numbers of the row groups; None stands for all.
    keys
        Values in the names of folders, such as the cluster.
    nbytes
        The planned size in memory.
    state
        The state of the file when it was listed.
    first_row
        The number of the first row in the file.
    """

    path: str
    rows: int
    row_groups: tuple[int, ...] | None = None
    keys: tuple[Any, ...] = ()
    nbytes: int = 0
    state: State = State()
    first_row: int = 0


def fragments_of(file: FileStats, keys: tuple[Any, ...] = ()) -> list[Fragment]:
    """Return each row group of a file as a fragment."""
    starts = accumulate((group.rows for group in file.row_groups), initial=0)
    return [
        Fragment(file.path, group.rows, (index,), keys, group.nbytes, file.state, start)
        for index, (group, start) in enumerate(zip(file.row_groups, starts, strict=False))
    ]


def in_runs(fragments: Iterable[Fragment], nbytes: int) -> Iterator[list[Fragment]]:
    """Yield runs of whole clusters, each of at most so many bytes unless it is a single cluster."""
    run: list[Fragment] = []
    held = 0
    for _, cluster in groupby(fragments, attrgetter("keys")):
        pieces = list(cluster)
        size = sum(piece.nbytes for piece in pieces)
        if run and held + size > nbytes:
            yield run
            run, held = [], 0
        run += pieces
        held += size
    yield run


class RowGroup(NamedTuple):
    """A row group as planning needs to know it, for the columns that are to be read.

    `nbytes` is their size in memory, `elements` the length of the longest leaf. `low` and `high` bound the cluster
    column; they are None if the file does not tell.
    """

    rows: int
    nbytes: int
    elements: int
    low: Any = None
    high: Any = None


class FileStats(NamedTuple):
    """A file as its footer describes it.

    It has the row groups, the integer columns that may hold nulls, the number of null clusters, the number of the
    schema's shape, the ordered categories that are not written as such, and the state of the file.
    """

    path: str
    rows: int
    row_groups: tuple[RowGroup, ...]
    nullable: frozenset[str]
    null_clusters: int = 0
    shape: int = 0
    unordered: frozenset[str] = frozenset()
    state: State = State()


def unreadable(path: str, error: Exception) -> DataReadError:
    """Return the error for a file that cannot be read."""
    if isinstance(error, OSError) and error.strerror:
        return DataReadError(f"Cannot read {path}: {error.strerror}.")
    return DataReadError(f"Cannot read {path} as Parquet (truncated, damaged, or of another format?): {error}")


def read_fragment(
    fs: fsspec.AbstractFileSystem, fragment: Fragment, schema: pa.Schema, orders: Mapping[str, pa.Array] | None = None
) -> pa.Table:
    """Return a fragment as an Arrow table of exactly this schema, with ordered categories in these orders."""
    return _conformed(read_checked(fs, fragment, schema.names), fragment, schema, orders)


def read_slices(
    fs: fsspec.AbstractFileSystem,
    fragment: Fragment,
    schema: pa.Schema,
    slices: Sequence[slice],
    step: int,
    orders: Mapping[str, pa.Array] | None = None,
) -> Iterator[pa.Table]:
    """Yield some rows of a fragment as `read_fragment` returns them, in tables of at most `step` rows of one slice.

    Slices ascend. Row groups without any of their rows are not read, and of a large one only a batch is in memory.
    """
    # What is read ahead would be all of a row group.
    with _opened(fs, fragment, pre_buffer=False) as (_, file):
        present = [name for name in file.schema_arrow.names if name in schema.names]
        end = 0
        for group in _groups_of(fragment, file):
            start, end = end, end + file.metadata.row_group(group).num_rows
            wanted = [rows for rows in slices if rows.start < end and start < rows.stop]
            if not wanted:
                continue
            for batch in file.iter_batches(step, [group], present, use_threads=False):
                for rows in wanted:
                    first, last = max(rows.start - start, 0), min(rows.stop - start, len(batch))
                    if first < last:
                        table = pa.Table.from_batches([batch.slice(first, last - first)])
                        yield _conformed(table, fragment, schema, orders)
                start += len(batch)
                if start >= wanted[-1].stop:
                    break
    if end != fragment.rows:
        raise changed([fragment.path])


def _conformed(
    table: pa.Table, fragment: Fragment, schema: pa.Schema, orders: Mapping[str, pa.Array] | None
) -> pa.Table:
    try:
        return conform(table, schema, orders or {})
    except DataReadError as error:
        raise DataReadError(f"{fragment.path}: {error}", columns=error.columns) from error


def read_checked(fs: fsspec.AbstractFileSystem, fragment: Fragment, names: Sequence[str]) -> pa.Table:
    """Return those of the columns that a fragment has. Raise if it no longer has the rows that were planned."""
    with _opened(fs, fragment, pre_buffer=not is_local(fs)) as (source, file):
        table = _read_row_groups(source, file, fragment, names)
    if len(table) != fragment.rows:
        raise changed([fragment.path])
    return table


@contextmanager
def _opened(
    fs: fsspec.AbstractFileSystem, fragment: Fragment, *, pre_buffer: bool
) -> Iterator[tuple[Any, pq.ParquetFile]]:
    """Open the file of a fragment. Raise if it is not the one that was planned, or cannot be read.

    Files are read one after another and without Arrow's threads, since Dask already runs a partition per core. They are
    not mapped into memory: reading a page of a file that was truncated meanwhile would kill the process.
    """
    path = fragment.path
    try:
        with nullcontext(path) if is_local(fs) else fs.open(path) as source:
            check_state(path, fragment.state, state_now(fs, path, source))
            buffered = {"pre_buffer": pre_buffer, "buffer_size": _buffer_size(fragment, BUFFER)}
            with pq.ParquetFile(source, page_checksum_verification=True, **buffered) as file:
                yield source, file
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:
        if isinstance(error, SemDedupError):
            raise
        raise unreadable(path, error) from error


def _groups_of(fragment: Fragment, file: pq.ParquetFile) -> list[int]:
    return list(range(file.metadata.num_row_groups) if fragment.row_groups is None else fragment.row_groups)


def _read_row_groups(source: Any, file: pq.ParquetFile, fragment: Fragment, names: Sequence[str]) -> pa.Table:
    groups = _groups_of(fragment, file)
    present = [name for name in file.schema_arrow.names if name in names]
    if not present:
        rows = sum(file.metadata.row_group(index).num_rows for index in groups)
        return pa.table({"": pa.nulls(rows)})
    most = max(UNSUSPECTED, EXPANSION * fragment.state.size)
    repeated = _most_bytes_of_text(source, file, fragment, groups, present)
    step = fragment.rows
    if any(pa.types.is_nested(file.schema_arrow.field(name).type) for name in present):
        step = min(BATCH_ROWS, max(1, BATCH_BYTES * fragment.rows // max(1, fragment.nbytes)))
    if repeated > most:
        step = min(step, max(1, BATCH_BYTES * fragment.rows // repeated))
    if step >= fragment.rows:
        return file.read_row_groups(groups, present, use_threads=False)
    batches, nbytes = [], 0
    for batch in file.iter_batches(step, groups, present, use_threads=False):
        batches.append(batch)
        if repeated > most:
            nbytes += sum(map(_decoded_bytes, batch.columns))
            if nbytes > most:
                raise too_large(fragment.path, fragment.state.size, nbytes)
    return pa.Table.from_batches(batches, pa.schema([file.schema_arrow.field(name) for name in present]))


def _most_bytes_of_text(
    source: Any, file: pq.ParquetFile, fragment: Fragment, groups: Sequence[int], names: Sequence[str]
) -> int:
    """Return the maximum size of texts, one per row: a dictionary may hold one long text for all rows.

    Dictionaries are read only if the size may exceed UNSUSPECTED. Arrow's metadata of column chunks is not used:
    impossible statistics in it end the process.
    """
    if fragment.rows * max(fragment.nbytes, fragment.state.size) <= UNSUSPECTED:
        return 0
    leaves = map(file.schema.column, range(len(file.schema)))
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    wanted = [path for path in texts if any(f"{path}.".startswith(f"{name}.") for name in names)]
    return sum(
        file.metadata.row_group(group).num_rows * _longest_text(source, file.metadata, fragment, group, path)
        for group in groups
        for path in wanted
    )


def _buffer_size(fragment: Fragment, size: int) -> int:
    """Return the size of the buffer through which a file is read; 0 stands for column by column.

    Through a buffer, Arrow takes as many bytes as the header of a page asks for, up to 2 GiB. Those of a column of a
    small file are no more than the file has.
    """
    return size if fragment.state.size > SMALL_FILE else 0


def _longest_text(source: Any, metadata: pq.FileMetaData, fragment: Fragment, group: int, path: str) -> int:
    """Return the bytes of the longest text in the dictionary of a leaf column."""
    options = {"read_dictionary": [path], "page_checksum_verification": True}
    # So only the first pages of large files are read.
    buffered = {"pre_buffer": False, "buffer_size": _buffer_size(fragment, FIRST_PAGES)}
    with pq.ParquetFile(source, metadata=metadata, **options, **buffered) as file:
        for batch in file.iter_batches(FIRST_ROWS, [group], [path], use_threads=False):
            leaves = list(_leaves(batch.column(0)))
            # Without values there is no dictionary.
            if any(map(len, leaves)):
                coded = [leaf.dictionary for leaf in leaves if pa.types.is_dictionary(leaf.type)]
                return max((pc.max(pc.binary_length(texts)).as_py() or 0 for texts in coded), default=0)
    return 0


def _decoded_bytes(array: pa.Array) -> int:
    """Return the bytes of an array, in which each row has its own text."""
    if not pa.types.is_dictionary(array.type) or array.type.value_type not in TEXTS:
        return int(array.nbytes)
    return pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    if pa.types.is_struct(array.type):
        for index in range(array.type.num_fields):
            yield from _leaves(array.field(index))
    elif pa.types.is_nested(array.type):
        yield from _leaves(array.values)
    else:
        yield array


def too_large(path: str, size: int, nbytes: float) -> DataReadError:
    """Return the error for a file that asks for far more memory than it has bytes."""
    return DataReadError(
        f"{path} has {size} bytes, and asks for {nbytes:.0f} or more in memory: over {EXPANSION} times as many. It is "
        "damaged or made to exhaust memory. If its columns do hold few values over and over, write it again without "
        "dictionaries and compression."
    )


def state_now(fs: fsspec.AbstractFileSystem, path: str, source: Any = None) -> State:
    """Return the state of a file, which is open as `source` unless it is local."""
    if is_local(fs):
        stat = os.stat(path)
        return State(stat.st_size, stat.st_mtime_ns)
    return State.of(fs, getattr(source, "details", None) or {"size": getattr(source, "size", None)})


def check_state(path: str, planned: State, found: State, read: str = "footers") -> None:
    """Raise if the state of a file has changed since it was listed, as far as both states are known."""
    if any(before and now and before != now for before, now in zip(planned, found, strict=True)):
        raise changed([path], read)


def changed(paths: Sequence[str], read: str = "footers") -> DataReadError:
    """Return the error for files that have changed since their footers or lines were planned."""
    return DataReadError(
        f"{some(paths)} changed since the {read} were read: the number of bytes or rows is different, the time of the "
        "last change, or the ETag. Read the files again. Copies on other machines need the same times."
    )
