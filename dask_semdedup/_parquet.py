"""Parquet files as pieces of partitions: listing, footers, and reading them into pandas or cuDF.

Nothing here knows about similarity or Dask expressions. A dataset is listed once and its footers are read once; what
they say (`FileStats`) is all that planning needs. A partition is a tuple of `Fragment`, and `Reader` turns it into a
frame whose dtypes are those of `Reader.meta`, because both come from the same conversion.
"""

from __future__ import annotations

import fnmatch
import os
import re
import resource
import statistics
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import accumulate, groupby, islice, pairwise, repeat
from operator import attrgetter
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from dask.dataframe.utils import pyarrow_strings_enabled
from dask.tokenize import tokenize
from fsspec.implementations.local import LocalFileSystem

from dask_semdedup._footers import Bounded, FooterError, Group, read_alike, read_footer
from dask_semdedup._schemas import (
    conform,
    in_frames,
    is_ordered,
    one_order,
    refuse,
    unify,
    without,
    without_index,
    without_order,
)
from dask_semdedup.embeddings import take
from dask_semdedup.errors import (
    ClusterError,
    InvalidArgumentError,
    MissingColumnsError,
    MissingDependencyError,
    SemDedupError,
    some,
)
from dask_semdedup.memory import share_memory_pool
from dask_semdedup.placement import cores_per_gpu
from dask_semdedup.streams import current, finish, outside

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
# The last bytes of a Parquet file, and bytes fetched from the end of a file: enough for nearly every footer.
MAGIC = b"PAR1"
FOOTER_GUESS = 2**16
LOCAL_GUESS = 2**13
# Threads that wait for a file system together, where it is slow. A local one is where the first few footers of a block
# take so many seconds.
REMOTE_THREADS = 32
PROBES = 8
SLOW = 1e-4
# Footers held at once: at first so many, then as many as take about so many bytes, by the length of the last.
FIRST_BLOCK = 64
BLOCK = 4096
BLOCK_BYTES = 2**28
# As long as so many footers are left, and for so many shapes of them, those of one shape are read at once.
MANY = 64
SHAPES = 4
# What identifies the state of a file, under the names that fsspec's file systems give it.
STATE_KEYS = {
    *("size", "mtime", "created", "LastModified", "last_modified", "updated", "ETag", "etag", "md5Hash"),
    *("CRC", "date_time", "sha"),
}
LEAF_BYTES = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 8}
# Rows of a batch where a row group cannot be read as a whole.
BATCH_ROWS = 2**14


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
        The planned size in memory of a cluster's file; of others it is not needed.
    size
        Bytes of the file when it was listed; 0 where that is not known.
    first_row
        The number of the first row in the file.
    """

    path: str
    rows: int
    row_groups: tuple[int, ...] | None = None
    keys: tuple[Any, ...] = ()
    nbytes: int = 0
    size: int = 0
    first_row: int = 0


def fragments_of(file: FileStats, keys: tuple[Any, ...] = ()) -> list[Fragment]:
    """Each row group of a file as a fragment."""
    starts = accumulate((group.rows for group in file.row_groups), initial=0)
    return [
        Fragment(file.path, group.rows, (index,), keys, group.nbytes, file.size, start)
        for index, (group, start) in enumerate(zip(file.row_groups, starts, strict=False))
    ]


def in_runs(fragments: Iterable[Fragment], nbytes: int) -> Iterator[list[Fragment]]:
    """Cut fragments between clusters into runs of at most so many bytes, or of one cluster.

    Examples
    --------
    >>> fragments = [Fragment(name, 1, keys=(key,), nbytes=60) for name, key in [("a", 0), ("b", 0), ("c", 1)]]
    >>> [[fragment.path for fragment in run] for run in in_runs(fragments, 100)]
    [['a', 'b'], ['c']]
    """
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
    """What planning needs to know of a row group, for the columns that are to be read.

    `nbytes` is their size in memory, `elements` the length of the longest leaf; `low` and `high` bound the cluster
    column and are None where the file does not say.
    """

    rows: int
    nbytes: int
    elements: int
    low: Any = None
    high: Any = None


class FileStats(NamedTuple):
    """What a footer says of its file.

    Beside the row groups: the integer columns that may hold nulls, the number of null clusters, the shape of the
    schema, the ordered categories that are not written as such, and the size of the file.
    """

    path: str
    rows: int
    row_groups: tuple[RowGroup, ...]
    nullable: frozenset[str]
    null_clusters: int = 0
    shape: int = 0
    unordered: frozenset[str] = frozenset()
    size: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Listing
# ---------------------------------------------------------------------------------------------------------------------


def list_files(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    storage_options: Mapping[str, Any] | None = None,
    suffixes: tuple[str, ...] = PARQUET_SUFFIXES,
    kind: str = "Parquet",
) -> tuple[fsspec.AbstractFileSystem, dict[str, dict[str, Any]]]:
    """List the Parquet files under a path, a glob or a list of either: the file system, and each file's info by path.

    In folders, only files with one of the suffixes are data. Hidden files, and those that begin with an underscore, are
    left out, also where a pattern matches them, as are all files in such folders. A path that is there is no pattern.

    Raises
    ------
    ClusterError
        If there are no files, or one of the paths is not there; files are called by their `kind`.
    InvalidArgumentError
        If the paths are of several file systems.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise ClusterError(f"No {kind} files: the list of paths is empty.")
    located = [fsspec.url_to_fs(os.fspath(entry), **(storage_options or {})) for entry in paths]
    fs = located[0][0]
    for entry, (other, _) in zip(paths, located, strict=True):
        if (type(other), other.storage_options) != (type(fs), fs.storage_options):
            raise InvalidArgumentError(f"{entry} is on another file system than {paths[0]}. Read them one by one.")
    files: dict[str, dict[str, Any]] = {}
    gone: list[Any] = []
    for entry, (_, root) in zip(paths, located, strict=True):
        above = above_pattern(fs, root)
        found = _find_data(fs, root, root, suffixes) if above == root else _match(fs, root, above, suffixes)
        if not found and not fs.exists(root):
            gone.append(entry)
        files |= found
    if gone or not files:
        why = ": there is no such file or folder" if gone else ""
        raise ClusterError(f"No {kind} files found at {', '.join(map(str, (gone or paths)[:5]))}{why}.")
    return fs, {name: files[name] for name in sorted(files)}


def above_pattern(fs: fsspec.AbstractFileSystem, root: str) -> str:
    """The folder that all matches of a pattern lie in, or the path itself where it is none."""
    start = re.split(r"[*?\[]", root, maxsplit=1)[0]
    return root if start == root or fs.exists(root) else start[: start.rfind("/")]


def _match(
    fs: fsspec.AbstractFileSystem, pattern: str, above: str, suffixes: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """The files that a pattern stands for, and the data in folders that it stands for."""
    files: dict[str, dict[str, Any]] = {}
    local = is_local(fs)
    parts = pattern[len(above) :].lstrip("/").split("/")
    matches: dict[str, Any] = dict.fromkeys(_glob_locally(above, parts)) if local else fs.glob(pattern, detail=True)
    for name, info in matches.items():
        if is_hidden(name, above):
            continue
        # Local names may be of files, folders, or links to nothing.
        is_file = not local and info["type"] == "file"
        files |= {name: info} if is_file else _find_data(fs, name, above, suffixes)
    return files


def _glob_locally(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """Paths below a folder that match a pattern, part by part; unlike others, it raises for folders it cannot list."""
    head, *rest = parts
    if head == "**":
        if not rest:
            yield folder
            return
        yield from _glob_locally(folder, rest)
    matches = re.compile(fnmatch.translate("*" if head == "**" else head)).match
    with os.scandir(folder or "/") as entries:
        found = sorted(entry.path for entry in entries if matches(entry.name) and not is_hidden(entry.name, ""))
    for path in found:
        if head != "**" and not rest:
            yield path
        elif os.path.isdir(path) and not _is_above(path, folder):
            yield from _glob_locally(path, parts if head == "**" else rest)


def _is_above(path: str, folder: str) -> bool:
    """Whether a path is a link to a folder or to one that holds it."""
    return os.path.islink(path) and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(path)}/")


def _find_data(
    fs: fsspec.AbstractFileSystem, root: str, above: str, suffixes: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """The file at a path, whatever its name, or the data in a folder."""
    found = _find_locally(root) if is_local(fs) else fs.find(root, detail=True)
    if set(found) == {root}:
        return {root: found[root] or fs.info(root)}
    return {name: info for name, info in found.items() if is_data_file(name, above, suffixes)}


def _find_locally(root: str) -> dict[str, dict[str, Any]]:
    """What `fs.find` tells of local files, from Arrow, which lists them three times as fast."""
    fs = pafs.LocalFileSystem()
    found = fs.get_file_info(root)
    if found.type == pafs.FileType.Directory:
        infos = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    else:
        infos = [found]
    # Only files have a size. To ask for the type of each takes longer than all else.
    return {info.path: {"size": size, "mtime": info.mtime_ns} for info in infos if (size := info.size) is not None}


def is_data_file(path: str, root: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file below a root is data by its suffix, and not hidden, nor in a hidden folder.

    Examples
    --------
    >>> [is_data_file(f"data/{name}", "data", (".parquet",)) for name in ("a.parquet", "_temporary/0/a.parquet")]
    [True, False]
    """
    return path.endswith(suffixes) and not is_hidden(path, root)


def is_hidden(path: str, root: str) -> bool:
    """Whether the name of a file below a root, or of a folder that it is in, begins with a dot or an underscore.

    Examples
    --------
    >>> is_hidden("data/_temporary/0/a.parquet", "data"), is_hidden("data/_key=1/a.parquet", "data")
    (True, False)
    """
    below = f"/{path.removeprefix(root)}"
    # Most are not, which these two see at once. A key of a folder may begin with an underscore.
    return ("/_" in below or "/." in below) and any(
        part.startswith(("_", ".")) and "=" not in part for part in below.split("/")
    )


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether paths of this file system can be given to Arrow as they are."""
    return isinstance(fs, LocalFileSystem)


def checksum(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Token of the files' names and states: it changes when one of them does."""
    keys = sorted(set[str]().union(*files.values()) & STATE_KEYS)
    states = [[info.get(key) for info in files.values()] for key in keys]
    return tokenize(repr([keys, list(files), *states]))


# ---------------------------------------------------------------------------------------------------------------------
# Footers
# ---------------------------------------------------------------------------------------------------------------------


class Scan(NamedTuple):
    """What the footers of a dataset's files say, for the columns that are to be read.

    Parameters
    ----------
    schema : pyarrow.Schema
        The columns and the types that all files can be brought to, with the metadata of the first.
    files : list of FileStats
        In the files' order.
    nullable : frozenset of str
        Integer and Boolean columns that may hold nulls.
    problems : dict
        From a column that cannot be read to the reason.
    unordered : frozenset of str
        Ordered categories whose order the files do not tell.
    odd : frozenset of str
        Files whose types are not those of the schema.
    names : list of str
        All columns of the files, also those that are not to be read.
    orders : dict
        From an ordered category to its categories in their order, in all files together.
    """

    schema: pa.Schema
    files: list[FileStats]
    nullable: frozenset[str]
    problems: dict[str, str]
    unordered: frozenset[str]
    odd: frozenset[str]
    names: list[str]
    orders: Mapping[str, pa.Array]

    def check_columns(self, columns: Iterable[str], others: Iterable[str], advice: str) -> None:
        """Raise for columns that are neither in the files nor among others, or that cannot be read."""
        columns, present = list(columns), [*self.names, *others]
        if not set(columns) <= set(present):
            raise MissingColumnsError.build(columns, present, advice)
        refuse(self.problems, columns, COLUMNS_ADVICE)


def read_schema(fs: fsspec.AbstractFileSystem, path: str, size: int) -> pa.Schema:
    """Arrow schema of a file, without index columns that pandas or Dask wrote only to restore an index."""
    return without_index(_arrow_schema(path, _read_metadata(fs, path, _fetch_footer(fs, path, size))))


def scan_files(
    fs: fsspec.AbstractFileSystem,
    files: Mapping[str, Mapping[str, Any]],
    columns: Collection[str] | None = None,
    cluster_column: str | None = None,
    *,
    nulls: bool = True,
) -> Scan:
    """Read the footers of all files, each once, and find the schema that they agree on.

    Of ordered categories, the first rows of each file are read too: no footer tells the order.

    Parameters
    ----------
    fs, files
        As `list_files` returns them.
    columns
        The columns that are to be read, those that are there; None stands for all. Others are never looked at.
    cluster_column
        A column in the files whose bounds and nulls are wanted.
    nulls
        Whether it is wanted which integer columns may hold nulls. If not, `Scan.nullable` is empty.

    Raises
    ------
    ClusterError
        If a file is not readable as Parquet.
    """
    shapes = _Shapes(columns, cluster_column, nulls=nulls)
    paths = list(files)
    stats: list[FileStats] = []
    size = FIRST_BLOCK
    while len(stats) < len(paths):
        block = {path: files[path]["size"] for path in paths[len(stats) : len(stats) + size]}
        footers = dict(zip(block, _fetch_footers(fs, block), strict=True))
        size = min(BLOCK, 1 + BLOCK_BYTES * len(footers) // (1 + sum(map(len, footers.values()))))
        by_path = _stats_of_block(fs, footers, block, shapes)
        stats.extend(by_path[path] for path in footers)
    scan = shapes.scan(stats)
    for name, type_ in zip(scan.schema.names, scan.schema.types, strict=True):
        if not is_ordered(type_) or name in scan.problems:
            continue
        order = one_order(_dictionaries(fs, scan.files, name))
        if order is None:
            unordered = scan.unordered | {name}
            scan = scan._replace(unordered=unordered, schema=without_order(scan.schema, unordered))
            continue
        if len(order) >= 2 ** (type_.index_type.bit_width - 1):
            # All files together may have more categories than the codes of each can count.
            wide = pa.field(name, pa.dictionary(pa.int32(), type_.value_type, ordered=True))
            scan = scan._replace(schema=scan.schema.set(scan.schema.get_field_index(name), wide))
        scan = scan._replace(orders={**scan.orders, name: pa.array(order, type_.value_type)})
    return scan


def _dictionaries(fs: fsspec.AbstractFileSystem, files: Sequence[FileStats], name: str) -> list[pa.Array]:
    """The categories of a column as the first rows of each file have them: no footer tells their order."""

    def read(file: FileStats) -> list[pa.Array]:
        group = next((index for index, group in enumerate(file.row_groups) if group.rows), None)
        if group is None:
            return []
        fragment = Fragment(file.path, file.row_groups[group].rows, (group,), size=file.size)
        table = _read_checked(fs, fragment, [name])
        chunks = table[name].chunks if name in table.column_names else []
        return [chunk.dictionary for chunk in chunks if pa.types.is_dictionary(chunk.type)]

    with ThreadPoolExecutor(1 if is_local(fs) else REMOTE_THREADS, thread_name_prefix="orders") as pool:
        return [dictionary for found in pool.map(read, files) for dictionary in found]


def _fetch_footers(fs: fsspec.AbstractFileSystem, sizes: Mapping[str, int]) -> list[bytes]:
    """The footers of files of these sizes: one after the other where that is fast, else many at once.

    From the page cache a footer takes less time than it takes a thread to get hold of Python's lock.
    """
    files = iter(sizes.items())
    footers = []
    if is_local(fs):
        seconds = []
        for path, size in islice(files, PROBES):
            start = time.perf_counter()
            footers.append(_fetch_footer(fs, path, size))
            seconds.append(time.perf_counter() - start)
        if statistics.median(seconds) < SLOW:
            return footers + [_fetch_footer(fs, path, size) for path, size in files]
    with ThreadPoolExecutor(REMOTE_THREADS, thread_name_prefix="footers") as pool:
        return footers + list(pool.map(lambda file: _fetch_footer(fs, *file), files))


def _fetch_footer(fs: fsspec.AbstractFileSystem, path: str, size: int) -> bytes:
    """The footer of a file, to the file's end; nothing where that does not look like the end of a Parquet file."""
    # S3's file system has another parameter at the second place.
    fetch, guess = (_read_range, LOCAL_GUESS) if is_local(fs) else (fs.cat_file, FOOTER_GUESS)
    try:
        tail: bytes = fetch(path, start=max(0, size - guess), end=size)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if not tail.endswith(MAGIC) or length > size:
            return b""
        return tail[-length:] if length <= len(tail) else fetch(path, start=size - length, end=size)
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_range(path: str, start: int, end: int) -> bytes:
    """Bytes of a local file, in as few calls as it takes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, end - start, start)
    finally:
        os.close(descriptor)


def _read_metadata(fs: fsspec.AbstractFileSystem, path: str, footer: bytes) -> pq.FileMetaData:
    """What Arrow makes of a footer, or says of a file that has none."""
    try:
        if footer:
            return pq.read_metadata(pa.BufferReader(footer))
        with fs.open(path) as file:
            return pq.read_metadata(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _arrow_schema(path: str, metadata: pq.FileMetaData) -> pa.Schema:
    try:
        schema = metadata.schema.to_arrow_schema()
        # This decodes all names, of fields in fields too.
        schema.to_string(show_field_metadata=False, show_schema_metadata=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    return schema


def _unreadable(path: str, error: Exception) -> ClusterError:
    return ClusterError(f"Cannot read {path} as Parquet (truncated, damaged or gone?): {error}")


class _Shape:
    """Where the wanted columns lie among the leaf columns of files of one schema."""

    def __init__(
        self,
        number: int,
        path: str,
        metadata: pq.FileMetaData,
        columns: Collection[str] | None,
        cluster_column: str | None,
        *,
        nulls: bool,
    ) -> None:
        self.number, self.path = number, path
        schema = _arrow_schema(path, metadata)
        self.names = without_index(schema).names
        unwanted = set(self.names) - {*(self.names if columns is None else columns), cluster_column}
        self.schema = without(without_index(schema), unwanted)
        starts = [0, *accumulate(_count_leaves(field.type) for field in schema)]
        self.leaves = starts[-1]
        names = set(self.schema.names)
        wanted = [
            (field, range(*span)) for field, span in zip(schema, pairwise(starts), strict=True) if field.name in names
        ]
        self.widths = {index: _leaf_bytes(metadata.schema.column(index)) for _, span in wanted for index in span}
        self.integers = {field.name: span[0] for field, span in wanted if nulls and _is_integer(field.type)}
        self.ordered = {field.name: span[0] for field, span in wanted if is_ordered(field.type)}
        self.cluster = next((span[0] for field, span in wanted if field.name == cluster_column), None)
        cluster = self.cluster
        self.bounded = None if cluster is None else Bounded.of(metadata.schema.column(cluster), cluster)


class _Shapes:
    """The shapes of all files: few, of however many files."""

    def __init__(self, columns: Collection[str] | None, cluster_column: str | None, *, nulls: bool) -> None:
        self.columns, self.cluster_column, self.nulls = columns, cluster_column, nulls
        self.by_schema: dict[pa.Schema, _Shape] = {}

    def of(self, path: str, metadata: pq.FileMetaData) -> _Shape:
        """The shape of a file."""
        key = _arrow_schema(path, metadata).remove_metadata()
        if key not in self.by_schema:
            number = len(self.by_schema)
            self.by_schema[key] = _Shape(number, path, metadata, self.columns, self.cluster_column, nulls=self.nulls)
        return self.by_schema[key]

    def scan(self, stats: list[FileStats]) -> Scan:
        """What there is to say of all files together."""
        shapes = list(self.by_schema.values())
        unified = unify({shape.path: shape.schema for shape in shapes})
        integers = {field.name for field in unified.schema if self.nulls and _is_integer(field.type)}
        lacking = [frozenset(name for name in integers if _lacks(shape.schema, name)) for shape in shapes]
        if any(lacking) or not integers.issuperset(name for shape in shapes for name in shape.integers):
            stats = [
                file._replace(nullable=(file.nullable & integers) | (lacking[file.shape] if file.rows else frozenset()))
                for file in stats
            ]
        unordered = unified.unordered.union(*(file.unordered for file in stats))
        schema = without_order(unified.schema, unordered)
        types = {field.name: field.type for field in schema}
        odd = {shape.number for shape in shapes if {field.name: field.type for field in shape.schema} != types}
        return Scan(
            schema,
            stats,
            frozenset[str]().union(*(file.nullable for file in stats)),
            unified.problems,
            unordered,
            frozenset(file.path for file in stats if file.shape in odd),
            list(dict.fromkeys(name for shape in shapes for name in shape.names)),
            {},
        )


def _lacks(schema: pa.Schema, name: str) -> bool:
    place = schema.get_field_index(name)
    return place < 0 or bool(pa.types.is_null(schema.field(place).type))


def _count_leaves(type_: pa.DataType) -> int:
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    if not pa.types.is_nested(type_):
        return 1
    return sum(_count_leaves(type_.field(index).type) for index in range(type_.num_fields))


def _leaf_bytes(column: Any) -> int | None:
    """Bytes of a value in memory, or None where its size varies."""
    if column.physical_type == "FIXED_LEN_BYTE_ARRAY":
        return int(column.length)
    return LEAF_BYTES.get(column.physical_type)


def _is_integer(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_boolean(type_))


def _stats_of_block(
    fs: fsspec.AbstractFileSystem, footers: Mapping[str, bytes], sizes: Mapping[str, int], shapes: _Shapes
) -> dict[str, FileStats]:
    """What footers say: many that are built alike are read at once, and the rest one by one."""
    stats: dict[str, FileStats] = {}
    rest = list(footers)
    for _ in range(SHAPES):
        if len(rest) < MANY:
            break
        stats |= _stats_of_alike(fs, {path: footers[path] for path in rest}, sizes, shapes)
        rest = [path for path in rest if path not in stats]
    return stats | {path: _stats_of_one(fs, path, footers[path], sizes, shapes)[0] for path in rest}


def _stats_of_alike(
    fs: fsspec.AbstractFileSystem, footers: Mapping[str, bytes], sizes: Mapping[str, int], shapes: _Shapes
) -> dict[str, FileStats]:
    """What the first of the footers says, and those that are built like it."""
    paths = list(footers)
    first, shape = _stats_of_one(fs, paths[0], footers[paths[0]], sizes, shapes)
    alike, groups = read_alike(list(footers.values()), shape.bounded)
    stats = _stats_of_groups([paths[index] for index in alike.tolist()], groups, sizes, shape)
    # The others are believed if the first one is read as it is by itself.
    return {file.path: file for file in stats} if stats[:1] == [first] else {first.path: first}


def _stats_of_one(
    fs: fsspec.AbstractFileSystem, path: str, footer: bytes, sizes: Mapping[str, int], shapes: _Shapes
) -> tuple[FileStats, _Shape]:
    """What one footer says, and where the columns lie in it."""
    shape = shapes.of(path, _read_metadata(fs, path, footer))
    try:
        # There was none where the file has grown since the listing.
        groups = read_footer(footer or _fetch_footer(fs, path, fs.size(path)), shape.leaves, shape.bounded)
    except FooterError as error:
        raise _unreadable(path, error) from error
    return _stats_of_groups([path], groups, sizes, shape)[0], shape


def _stats_of_groups(
    paths: Sequence[str], groups: Sequence[Group[Any]], sizes: Mapping[str, int], shape: _Shape
) -> list[FileStats]:
    """What the row groups of alike files say; numbers are arrays of all files, or of one file Python's."""
    row_groups = []
    nullable, unordered = ([frozenset[str]()] * len(paths) for _ in range(2))
    rows, null_clusters = np.zeros((2, len(paths)), dtype=np.int64)
    for group in groups:
        nbytes, elements = np.zeros((2, len(paths)), dtype=np.int64)
        for index, width in shape.widths.items():
            chunk = group.chunks[index]
            nbytes += chunk.nbytes if width is None else chunk.values * width
            np.maximum(elements, chunk.values, out=elements)
        bounds: Iterable[tuple[Any, Any]] = repeat((None, None), len(paths))
        if shape.cluster is not None:
            chunk = group.chunks[shape.cluster]
            null_clusters += 0 if chunk.nulls is None else chunk.nulls
            bounds = chunk.bounds or bounds
        here = group.rows + np.zeros_like(rows)
        rows += here
        numbers = zip(here.tolist(), nbytes.tolist(), elements.tolist(), bounds, strict=True)
        row_groups.append([RowGroup(n, size, longest, *pair) for n, size, longest, pair in numbers])
        for name, index in shape.integers.items():
            nulls = group.chunks[index].nulls
            for file in np.flatnonzero((here > 0) & (True if nulls is None else nulls != 0)).tolist():
                nullable[file] |= {name}
        for name, index in shape.ordered.items():
            if not group.chunks[index].has_dictionary:
                for file in np.flatnonzero(here).tolist():
                    unordered[file] |= {name}
    by_file = zip(*row_groups, strict=True) if row_groups else repeat((), len(paths))
    listed = map(sizes.__getitem__, paths)
    columns = (paths, rows.tolist(), by_file, nullable, null_clusters.tolist(), repeat(shape.number), unordered, listed)
    return list(map(FileStats, *columns))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Reads partitions of one dataset, always with the same dtypes.

    Parameters
    ----------
    fs
        The file system of the files.
    schema
        Fields of the columns in the files, with the types that all files can be brought to.
    nullable
        Integer, Boolean and floating-point columns that NumPy cannot hold as they are: they stay Arrow's.
    folders
        Fields of the columns that come from the folders' names, in the order of `Fragment.keys`.
    backend
        "pandas" or "cudf".
    string_dtype
        The pandas dtype of strings, or None for pandas' own choice.
    problems
        From a column that cannot be read to the reason.
    unordered
        Ordered categories whose order the files do not tell.
    odd
        Files whose types are not those of the schema, which Arrow reads for cuDF.
    orders
        From an ordered category to its categories in their order: all partitions have the same.
    make_ids
        A column of ids to be made, of the file's name below `root` and the row's number in it; or None.
    root
        The folder of all files.
    """

    fs: fsspec.AbstractFileSystem
    schema: pa.Schema
    nullable: frozenset[str] = frozenset()
    folders: pa.Schema = field(default_factory=lambda: pa.schema([]))
    backend: str = "pandas"
    string_dtype: pd.StringDtype[Any] | None = None
    problems: Mapping[str, str] = field(default_factory=dict)
    unordered: frozenset[str] = frozenset()
    odd: frozenset[str] = frozenset()
    orders: Mapping[str, pa.Array] = field(default_factory=dict)
    make_ids: str | None = None
    root: str = ""

    @classmethod
    def of(cls, fs: fsspec.AbstractFileSystem, scan: Scan, **options: Any) -> Reader:
        """The reader of files that have been scanned."""
        columns = {
            name: getattr(scan, name) for name in ("schema", "nullable", "problems", "unordered", "odd", "orders")
        }
        return cls(fs, **columns, string_dtype=configured_string_dtype(), **options)

    def with_arrow_floats(self) -> Reader:
        """The reader whose floats are Arrow's: NumPy cannot tell null from NaN, and pandas writes both as null."""
        floats = (field.name for field in self.schema if pa.types.is_floating(field.type))
        return replace(self, nullable=self.nullable.union(floats))

    def __dask_tokenize__(self) -> object:
        # A file system's own token is another one in each thread and process.
        values = [getattr(self, field.name) for field in fields(self)[1:]]
        return type(self.fs), self.fs.storage_options, self.schema.metadata, values

    @property
    def columns(self) -> list[str]:
        """All columns: ids that are made first, those from the folders' names last."""
        return [*([self.make_ids] if self.make_ids else []), *self.schema.names, *self.folders.names]

    def meta(self, columns: Sequence[str]) -> Any:
        """Empty frame with the dtypes of every partition."""
        table = self._schema_in_frames(columns).empty_table()
        if self.backend == "cudf":
            for name in self.folders.names:
                if name in columns:
                    table = table.append_column(name, pa.array([], self.folders.field(name).type))
            return import_cudf().DataFrame.from_arrow(table)[list(columns)]
        return self.to_pandas(table, (), columns)

    def read(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        """Rows of the fragments in their order, with a new `RangeIndex`.

        What cuDF reads, it reads in the current CUDA stream, if it can: the frame is complete, and outlives it.

        Raises
        ------
        ClusterError
            If a column cannot be read, or a file is not what it was when it was planned.
        """
        refuse(self.problems, columns, COLUMNS_ADVICE)
        if self.backend == "cudf":
            return self._read_cudf(fragments, columns)
        return self.to_pandas(self._read_arrow(fragments, columns), fragments, columns)

    def _read_arrow(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> pa.Table:
        schema = self._schema_in_frames(columns)
        if not schema.names:
            return schema.empty_table()
        return pa.concat_tables(
            [schema.empty_table(), *(read_fragment(self.fs, piece, schema, self.orders) for piece in fragments)]
        )

    def _read_cudf(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        if not fragments:
            return self.meta(columns)
        share_memory_pool()
        in_files = [name for name in columns if name in self.schema.names]
        keys = {name: self._cudf_keys(fragments, name) for name in columns if name in self.folders.names}
        # libcudf does not know the order of categories.
        ordered = [name for name in in_files if is_ordered(self.schema.field(name).type)]
        frame = self._read_cudf_files(fragments, [name for name in in_files if name not in ordered])
        if ordered:
            categories = self._from_arrow(fragments, ordered)
            with outside("cuda"):
                frame = frame.assign(**{name: categories[name] for name in ordered})
        if keys:
            finish()
            for name, column in keys.items():
                frame[name] = column
        return frame[list(columns)]

    def _read_cudf_files(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        """Columns of files: those of odd types by way of Arrow, which brings them to the types of the others."""
        if not self.odd:
            return read_fragments_cudf(self.fs, fragments, columns)
        runs = [list(run) for _, run in groupby(fragments, lambda fragment: fragment.path in self.odd)]
        frames = [
            self._from_arrow(run, columns)
            if columns and run[0].path in self.odd
            else read_fragments_cudf(self.fs, run, columns)
            for run in runs
        ]
        if len(frames) == 1:
            return frames[0]
        with outside("cuda"):
            return import_cudf().concat(frames, ignore_index=True)

    def _from_arrow(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        table = self._read_arrow(fragments, columns)
        with outside("cuda"):
            return import_cudf().DataFrame.from_arrow(table)

    def _cudf_keys(self, fragments: Sequence[Fragment], name: str) -> Any:
        cudf = import_cudf()
        import pylibcudf

        column = cudf.Series.from_pylibcudf(pylibcudf.Column.from_arrow(self._keys(fragments, name), stream=current()))
        return take(column, _cupy_repeat(np.array([fragment.rows for fragment in fragments])))

    def _keys(self, fragments: Sequence[Fragment], name: str) -> pa.Array:
        """The value in the folders' names, one a fragment."""
        place = self.folders.get_field_index(name)
        return pa.array([fragment.keys[place] for fragment in fragments], self.folders.field(place).type)

    def _schema_in_frames(self, columns: Sequence[str]) -> pa.Schema:
        """Schema of those columns that come from the files, of the types that they have in frames."""
        types = in_cudf if self.backend == "cudf" else in_frames
        wanted = [self.schema.field(name) for name in columns if name in self.schema.names]
        return pa.schema([pa.field(field.name, types(field.type)) for field in wanted])

    def to_pandas(self, table: pa.Table, fragments: Sequence[Fragment], columns: Sequence[str]) -> pd.DataFrame:
        """The frame of what was read of fragments, with the columns that come from their names and rows."""
        table = conform(table, self._schema_in_frames(table.column_names))
        series = {name: self._to_series(table[name], name) for name in table.column_names}
        for name in self.folders.names:
            if name in columns:
                rows = np.array([fragment.rows for fragment in fragments], dtype=np.int64)
                keys = self._keys(fragments, name).take(pa.array(np.repeat(np.arange(len(rows)), rows)))
                series[name] = self._to_series(pa.chunked_array([keys]), name)
        if self.make_ids in columns:
            ids = pa.chunked_array([made_ids(self.root, fragment) for fragment in fragments], pa.large_string())
            series[str(self.make_ids)] = self._to_series(ids, str(self.make_ids))
        index = pd.RangeIndex(sum(fragment.rows for fragment in fragments))
        return pd.DataFrame({name: series[name] for name in columns}, index, copy=False)

    def _to_series(self, column: pa.ChunkedArray, name: str) -> pd.Series:
        dtype = _extension_dtype(column.type, name in self.nullable, self.string_dtype)
        return column.to_pandas(types_mapper=None if dtype is None else lambda _: dtype)


# What to do about a column that cannot be read, which only some of the work needs.
COLUMNS_ADVICE = "Give it one type in all files, or name columns that agree."


def taken_for_ids(name: str | None, present: Collection[str]) -> list[str]:
    """The column of ids that is to be made, if one is; it may not be there."""
    if name in present:
        raise InvalidArgumentError(
            f"The files have a column {name!r}, and ids are to be made of that name. Name another as id_field."
        )
    return [] if name is None else [name]


def made_ids(root: str, fragment: Fragment) -> pa.Array:
    """Ids of a fragment's rows: the file's name below a folder, and the row's number in the file.

    Examples
    --------
    >>> made_ids("data", Fragment("data/a.parquet", 2, first_row=10)).to_pylist()
    ['a.parquet:10', 'a.parquet:11']
    """
    name = pa.scalar(fragment.path.removeprefix(root).lstrip("/"), pa.large_string())
    rows = pa.array(np.arange(fragment.first_row, fragment.first_row + fragment.rows)).cast(pa.large_string())
    return pc.binary_join_element_wise(name, rows, pa.scalar(":", pa.large_string()))


def in_cudf(type_: pa.DataType) -> pa.DataType:
    """The type that a column of a file has in frames of cuDF, which knows no fixed sizes, extensions, or binaries."""
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


def configured_string_dtype() -> pd.StringDtype[Any] | None:
    """The pandas dtype that Dask is configured to give to strings; None leaves it to pandas."""
    return pd.StringDtype("pyarrow") if pyarrow_strings_enabled() else None


def _extension_dtype(
    type_: pa.DataType, nullable: bool, string_dtype: pd.StringDtype[Any] | None
) -> pd.api.extensions.ExtensionDtype | None:
    """The pandas extension dtype that holds an Arrow type; None where NumPy (or pandas itself) holds it as well."""
    types = pa.types
    if types.is_string(type_) or types.is_large_string(type_):
        return string_dtype
    if _is_integer(type_) or types.is_floating(type_):
        return pd.ArrowDtype(type_) if nullable else None
    if types.is_timestamp(type_) or types.is_duration(type_):
        return None
    return pd.ArrowDtype(type_)


def read_fragment(
    fs: fsspec.AbstractFileSystem, fragment: Fragment, schema: pa.Schema, orders: Mapping[str, pa.Array] | None = None
) -> pa.Table:
    """Read one fragment's columns as an Arrow table of exactly the given schema, with categories in given orders."""
    table = _read_checked(fs, fragment, schema.names)
    try:
        return conform(table, schema, orders or {})
    except ClusterError as error:
        raise ClusterError(f"{fragment.path}: {error}") from error


def _read_checked(fs: fsspec.AbstractFileSystem, fragment: Fragment, names: Sequence[str]) -> pa.Table:
    """Read those columns of a fragment that are there, if it still has the rows that were planned.

    Files are read one after another and without Arrow's threads, since Dask already runs a partition per core. They
    are not mapped into memory: a process that reads a page of a file that was cut meanwhile is killed.
    """
    path = fragment.path
    try:
        with nullcontext(path) if is_local(fs) else fs.open(path) as source:
            _check_size(path, fragment.size, os.path.getsize(path) if is_local(fs) else getattr(source, "size", None))
            with pq.ParquetFile(source, pre_buffer=not is_local(fs)) as file:
                table = _read_row_groups(file, fragment.row_groups, names)
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:
        if isinstance(error, SemDedupError):
            raise
        raise _unreadable(path, error) from error
    if len(table) != fragment.rows:
        raise _changed([path])
    return table


def _read_row_groups(file: pq.ParquetFile, row_groups: Sequence[int] | None, names: Sequence[str]) -> pa.Table:
    groups = list(range(file.metadata.num_row_groups) if row_groups is None else row_groups)
    present = [name for name in file.schema_arrow.names if name in names]
    if not present:
        rows = sum(file.metadata.row_group(index).num_rows for index in groups)
        return pa.table({"": pa.nulls(rows)})
    try:
        return file.read_row_groups(groups, present, use_threads=False)
    except pa.ArrowNotImplementedError:
        # More than 2 GiB of strings within lists or structs come only in batches.
        batches = file.iter_batches(BATCH_ROWS, groups, present, use_threads=False)
        return pa.Table.from_batches(batches, pa.schema([file.schema_arrow.field(name) for name in present]))


def _check_size(path: str, planned: int, found: int | None) -> None:
    if planned and found is not None and found != planned:
        raise _changed([path])


def _changed(paths: Sequence[str]) -> ClusterError:
    return ClusterError(f"{some(paths)} changed since the footers were read. Read the files anew.")


@cache
def import_cudf() -> Any:
    """CuDF, with the settings of the libraries that read and write for it.

    Raises
    ------
    MissingDependencyError
        If it cannot be imported.
    """
    # They are looked at once, at the first use. KvikIO, which reads files for cuDF, takes 4 threads by itself; and few
    # pages to compress, as of scores, take a GPU long: 66,000 scores are written in 35 ms, in 10 if the host does it.
    os.environ.setdefault("KVIKIO_NTHREADS", str(min(READING_THREADS, cores_per_gpu())))
    os.environ.setdefault("LIBCUDF_HOST_COMPRESSION", "AUTO")
    os.environ.setdefault("LIBCUDF_HOST_COMPRESSION_THRESHOLD", str(PAGES_A_CORE * cores_per_gpu()))
    try:
        import cudf
    except ImportError as error:
        raise MissingDependencyError(
            f"Frames of cuDF need cuDF, which cannot be imported ({error}). Install 'dask-semdedup[cu13]', or [cu12] "
            "for CUDA 12, or use backend='pandas'."
        ) from error
    return cudf


# Threads of KvikIO with which it reads as fast as with more. More of several GPUs' processes fill the host's cache with
# their buffers, of 4 MiB each: with 16 on each of four H200s, all was 10% slower.
READING_THREADS = 10
# Up to so many pages to compress, a core of the host is done before a GPU is.
PAGES_A_CORE = 64
# Calls of cuDF's reader at once in a process: one keeps the files' threads busy, the other the GPU meanwhile.
READERS = 2
_readers = threading.BoundedSemaphore(READERS)


def files_at_once() -> int:
    """How many files a call of cuDF's reader may have open: each takes two descriptors, and there are `READERS` calls.

    Examples
    --------
    >>> 64 <= files_at_once() <= 1024
    True
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if soft == resource.RLIM_INFINITY else max(64, min(1024, soft // (4 * READERS)))


def read_fragments_cudf(fs: fsspec.AbstractFileSystem, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
    """Read the columns of all fragments into one cuDF frame, in few calls: many small reads leave a GPU idle."""
    cudf = import_cudf()
    rows = sum(fragment.rows for fragment in fragments)
    if not columns:
        return cudf.DataFrame(index=cudf.RangeIndex(rows))
    most = files_at_once()
    parts = [fragments[start : start + most] for start in range(0, len(fragments), most)]
    frames = [_read_with_cudf(fs, part, columns) for part in parts]
    frame = frames[0]
    if len(frames) > 1:
        with outside("cuda"):
            frame = cudf.concat(frames, ignore_index=True)
    if len(frame) != rows:
        raise _changed([fragment.path for fragment in fragments])
    return frame


def _read_with_cudf(fs: fsspec.AbstractFileSystem, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
    groups = [list(fragment.row_groups) for fragment in fragments if fragment.row_groups is not None]
    try:
        with _readers:
            if is_local(fs):
                for fragment in fragments:
                    # Of whole files the rows say enough.
                    if fragment.row_groups is not None:
                        _check_size(fragment.path, fragment.size, os.path.getsize(fragment.path))
                return _read_with_libcudf(fragments, columns, groups)
            with outside("cuda"):
                return import_cudf().read_parquet(
                    [fragment.path for fragment in fragments],
                    columns=list(columns),
                    row_groups=groups or None,
                    filesystem=fs,
                    use_pandas_metadata=False,
                    # Folders named key=value would otherwise be read one by one.
                    dataset_kwargs={"partitioning": None},
                    allow_mismatched_pq_schemas=True,
                )
    except (RuntimeError, OSError, IndexError) as error:
        # What another thread did to the GPU is no fault of the files.
        if re.search("cuda[ _]?error|cuda out of memory", str(error), re.IGNORECASE):
            raise
        raise _unreadable(_first_of(fragments), error) from error


def _read_with_libcudf(fragments: Sequence[Fragment], columns: Sequence[str], groups: list[list[int]]) -> Any:
    """What `cudf.read_parquet` does, in the current stream."""
    from pylibcudf import TypeId
    from pylibcudf.io import SourceInfo, parquet

    builder = parquet.ParquetReaderOptions.builder(SourceInfo([fragment.path for fragment in fragments]))
    options = builder.use_pandas_metadata(False).allow_mismatched_pq_schemas(True).build()
    options.set_column_names(list(columns))
    if groups:
        options.set_row_groups(groups)
    table = parquet.read_parquet(options, current())
    finish()
    _check_rows(fragments, table.num_rows_per_source)
    # Of dates cuDF makes times.
    is_converted = any(column.type().id() == TypeId.TIMESTAMP_DAYS for column in table.columns)
    with outside("cuda" if is_converted else "cpu"):
        frame = import_cudf().DataFrame.from_pylibcudf(table)
    return frame


def _check_rows(fragments: Sequence[Fragment], rows: Sequence[int]) -> None:
    """Raise `ClusterError` if a file has other rows than planned: its neighbours would get some of another cluster."""
    changed = [fragment.path for fragment, n in zip(fragments, rows, strict=False) if fragment.rows != n]
    if changed:
        raise _changed(changed)


def _cupy_repeat(counts: np.ndarray) -> Any:
    """Positions 0, 1, ... on the GPU, each as often as its count says."""
    import cupy

    ends = cupy.asarray(np.cumsum(counts))
    return cupy.searchsorted(ends, cupy.arange(int(counts.sum())), side="right")


def _first_of(fragments: Sequence[Fragment]) -> str:
    return f"{fragments[0].path} (the first of {len(fragments)} files)"
