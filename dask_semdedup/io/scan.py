"""Scanning the footers of a dataset: one schema for all files, and the rows, sizes and bounds of each."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate, pairwise, repeat
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dask_semdedup.errors import MissingColumnsError
from dask_semdedup.frames.categories import is_ordered, one_order
from dask_semdedup.io.footers import arrow_schema, fetch_footer, fetch_footers, read_metadata
from dask_semdedup.io.fragments import (
    EXPANSION,
    UNSUSPECTED,
    FileStats,
    Fragment,
    RowGroup,
    read_checked,
    too_large,
    unreadable,
)
from dask_semdedup.io.listing import THREADS, State, is_local
from dask_semdedup.io.schemas import refuse, unify, without, without_index, without_order
from dask_semdedup.io.thrift import Bounded, FooterError, Group, read_alike, read_footer

# Footers held at once: FIRST_BLOCK at first, then as many as take BLOCK_BYTES by the last block, but BLOCK at most.
FIRST_BLOCK = 64

BLOCK = 4096

BLOCK_BYTES = 2**28

# Footers of one shape are read side by side while MANY are left, for up to SHAPES shapes.
MANY = 64

SHAPES = 4

# Bytes of a value in memory, by physical type.
LEAF_BYTES = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 8}


# Bytes of an offset of text or a list, of which each value may need one.
OFFSET_BYTES = 8


class Scan(NamedTuple):
    """A dataset as its footers describe it, for the columns that are to be read.

    Parameters
    ----------
    schema : pyarrow.Schema
        The columns, and the types to which all files can be converted, with the metadata of the first file.
    files : list of FileStats
        In the files' order.
    nullable : frozenset of str
        Integer and Boolean columns that may hold nulls.
    problems : dict
        From a column that cannot be read to the reason.
    unordered : frozenset of str
        Columns of categories whose order the files do not tell.
    odd : frozenset of str
        Files whose types are not those of the schema.
    names : list of str
        All columns of the files, including those that are not to be read.
    orders : dict
        From a column of ordered categories to the categories of all files in their order.
    lacking : dict
        From a column that not all files have to the first file with rows, but without it: there it is null.
    """

    schema: pa.Schema
    files: list[FileStats]
    nullable: frozenset[str]
    problems: dict[str, str]
    unordered: frozenset[str]
    odd: frozenset[str]
    names: list[str]
    orders: Mapping[str, pa.Array]
    lacking: Mapping[str, str]

    def check_columns(self, columns: Iterable[str], others: Iterable[str], advice: str) -> None:
        """Raise if one of the columns is neither in the files nor among the others, or cannot be read."""
        columns, present = list(columns), [*self.names, *others]
        if not set(columns) <= set(present):
            raise MissingColumnsError.build(columns, present, advice, parameters=["columns"])
        refuse(self.problems, columns, COLUMNS_ADVICE)


def scan_files(
    fs: fsspec.AbstractFileSystem,
    files: Mapping[str, Mapping[str, Any]],
    columns: Collection[str] | None = None,
    cluster_column: str | None = None,
    *,
    nulls: bool = True,
) -> Scan:
    """Read the footers of all files, each once, and return what they say with the schema that they agree on.

    For ordered categories the first rows of each file are read too, since no footer tells the order.

    Parameters
    ----------
    fs, files
        As `list_files` returns them.
    columns
        The columns that are to be read, if they exist; None stands for all. Other columns are ignored.
    cluster_column
        A column in the files whose bounds and nulls are wanted.
    nulls
        Whether to find the integer columns that may hold nulls. Otherwise `Scan.nullable` is empty.

    Raises
    ------
    DataReadError
        If a file cannot be read as Parquet.
    """
    shapes = _Shapes(columns, cluster_column, nulls=nulls)
    paths = list(files)
    stats: list[FileStats] = []
    size = FIRST_BLOCK
    while len(stats) < len(paths):
        block = {path: State.of(fs, files[path]) for path in paths[len(stats) : len(stats) + size]}
        sizes = {path: state.size for path, state in block.items()}
        footers = dict(zip(block, fetch_footers(fs, sizes), strict=True))
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
            # All files together may have more categories than the codes of one file can number.
            wide = pa.field(name, pa.dictionary(pa.int32(), type_.value_type, ordered=True))
            scan = scan._replace(schema=scan.schema.set(scan.schema.get_field_index(name), wide))
        scan = scan._replace(orders={**scan.orders, name: pa.array(order, type_.value_type)})
    return scan


def _dictionaries(fs: fsspec.AbstractFileSystem, files: Sequence[FileStats], name: str) -> list[pa.Array]:
    """Return the categories of a column in the first rows of each file, since no footer tells their order."""

    def read(file: FileStats) -> list[pa.Array]:
        group = next((index for index, group in enumerate(file.row_groups) if group.rows), None)
        if group is None:
            return []
        fragment = Fragment(file.path, file.row_groups[group].rows, (group,), state=file.state)
        table = read_checked(fs, fragment, [name])
        chunks = table[name].chunks if name in table.column_names else []
        return [chunk.dictionary for chunk in chunks if pa.types.is_dictionary(chunk.type)]

    with ThreadPoolExecutor(1 if is_local(fs) else THREADS, thread_name_prefix="orders") as pool:
        return [dictionary for found in pool.map(read, files) for dictionary in found]


class _Shape:
    """Positions of the wanted columns among the leaf columns of files with one schema."""

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
        schema = arrow_schema(path, metadata)
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
        self.integers = {field.name: span[0] for field, span in wanted if nulls and is_integer(field.type)}
        self.ordered = {field.name: span[0] for field, span in wanted if is_ordered(field.type)}
        self.cluster = next((span[0] for field, span in wanted if field.name == cluster_column), None)
        cluster = self.cluster
        self.bounded = None if cluster is None else Bounded.of(metadata.schema.column(cluster), cluster)


class _Shapes:
    """The few shapes that all files have."""

    def __init__(self, columns: Collection[str] | None, cluster_column: str | None, *, nulls: bool) -> None:
        self.columns, self.cluster_column, self.nulls = columns, cluster_column, nulls
        self.by_schema: dict[pa.Schema, _Shape] = {}

    def of(self, path: str, metadata: pq.FileMetaData) -> _Shape:
        """Return the shape of a file."""
        key = arrow_schema(path, metadata).remove_metadata()
        if key not in self.by_schema:
            number = len(self.by_schema)
            self.by_schema[key] = _Shape(number, path, metadata, self.columns, self.cluster_column, nulls=self.nulls)
        return self.by_schema[key]

    def scan(self, stats: list[FileStats]) -> Scan:
        """Return the scan of all files."""
        shapes = list(self.by_schema.values())
        unified = unify({shape.path: shape.schema for shape in shapes})
        integers = {field.name for field in unified.schema if self.nulls and is_integer(field.type)}
        lacking = [frozenset(name for name in integers if _lacks(shape.schema, name)) for shape in shapes]
        if any(lacking) or not integers.issuperset(name for shape in shapes for name in shape.integers):
            stats = [
                file._replace(nullable=(file.nullable & integers) | (lacking[file.shape] if file.rows else frozenset()))
                for file in stats
            ]
        unordered = unified.unordered.union(*(file.unordered for file in stats))
        # Workers lose names within fixed-size lists. All write the same files if threads lose them, too.
        schema = without_order(unified.schema, unordered)
        with suppress(ValueError):  # What cannot be sent is refused when it is read.
            schema = pickle.loads(pickle.dumps(schema))
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
            self._lacking(stats, unified.schema.names),
        )

    def _lacking(self, stats: list[FileStats], names: Iterable[str]) -> dict[str, str]:
        """Return the first file with rows that lacks a column, for each column that some files lack."""
        partial = {shape.number: shape.schema for shape in self.by_schema.values()}
        lacked = {number: [name for name in names if _lacks(schema, name)] for number, schema in partial.items()}
        if not any(lacked.values()):
            return {}
        return {name: file.path for file in reversed(stats) if file.rows for name in lacked[file.shape]}


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
    """Return the bytes of a value in memory, or None if its size varies."""
    if column.physical_type == "FIXED_LEN_BYTE_ARRAY":
        return int(column.length)
    return LEAF_BYTES.get(column.physical_type)


def is_integer(type_: pa.DataType) -> bool:
    """Return whether a type is one of integers or Booleans."""
    return bool(pa.types.is_integer(type_) or pa.types.is_boolean(type_))


def _stats_of_block(
    fs: fsspec.AbstractFileSystem, footers: Mapping[str, bytes], states: Mapping[str, State], shapes: _Shapes
) -> dict[str, FileStats]:
    """Return what footers say. Footers that are built alike are read side by side, and the rest one by one."""
    stats: dict[str, FileStats] = {}
    rest = list(footers)
    for _ in range(SHAPES):
        if len(rest) < MANY:
            break
        stats |= _stats_of_alike(fs, {path: footers[path] for path in rest}, states, shapes)
        rest = [path for path in rest if path not in stats]
    return stats | {path: _stats_of_one(fs, path, footers[path], states, shapes)[0] for path in rest}


def _stats_of_alike(
    fs: fsspec.AbstractFileSystem, footers: Mapping[str, bytes], states: Mapping[str, State], shapes: _Shapes
) -> dict[str, FileStats]:
    """Return what the first footer says, and what those say that are built like it."""
    paths = list(footers)
    first, shape = _stats_of_one(fs, paths[0], footers[paths[0]], states, shapes)
    alike, groups = read_alike(list(footers.values()), shape.bounded)
    stats = _stats_of_groups([paths[index] for index in alike.tolist()], groups, states, shape)
    # The others are trusted if the first is read as it is by itself.
    return {file.path: file for file in stats} if stats[:1] == [first] else {first.path: first}


def _stats_of_one(
    fs: fsspec.AbstractFileSystem, path: str, footer: bytes, states: Mapping[str, State], shapes: _Shapes
) -> tuple[FileStats, _Shape]:
    """Return what one footer says, and its shape."""
    shape = shapes.of(path, read_metadata(fs, path, footer))
    try:
        # The footer is empty if the file has grown since it was listed.
        groups = read_footer(footer or fetch_footer(fs, path, fs.size(path)), shape.leaves, shape.bounded)
    except FooterError as error:
        raise unreadable(path, error) from error
    return _stats_of_groups([path], groups, states, shape)[0], shape


def _stats_of_groups(
    paths: Sequence[str], groups: Sequence[Group[Any]], states: Mapping[str, State], shape: _Shape
) -> list[FileStats]:
    """Return what the row groups of alike files say. Numbers are arrays over all files, or integers for one file."""
    _check_asked(paths, groups, states, shape)
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
    listed = [states[path] for path in paths]
    columns = (paths, rows.tolist(), by_file, nullable, null_clusters.tolist(), repeat(shape.number), unordered, listed)
    return list(map(FileStats, *columns))


def _check_asked(
    paths: Sequence[str], groups: Sequence[Group[Any]], states: Mapping[str, State], shape: _Shape
) -> None:
    """Raise if a file asks for far more memory than it has bytes."""
    asked = np.zeros(len(paths))
    for group in groups:
        for index, width in shape.widths.items():
            chunk = group.chunks[index]
            asked += np.maximum(chunk.nbytes, chunk.values * float(width or OFFSET_BYTES))
    for file in np.flatnonzero(asked > UNSUSPECTED).tolist():
        path, size = paths[file], states[paths[file]].size
        if asked[file] > EXPANSION * size:
            raise too_large(path, size, asked[file])


# Advice on a column that cannot be read, which only some calls need.
COLUMNS_ADVICE = "Give it one type in all files, or name columns that agree."
