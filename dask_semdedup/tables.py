"""Plain tables, Parquet or JSON lines, as lazy frames, and a few of their rows by id.

Nothing here knows about clusters as `clusters` does: partitions are runs of rows in the files' order.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

import dask.dataframe as dd
import fsspec
import pandas as pd
import pyarrow as pa
from dask.tokenize import tokenize
from fsspec.utils import read_block

from dask_semdedup._parquet import (
    PARQUET_SUFFIXES,
    Fragment,
    Reader,
    above_pattern,
    checksum,
    configured_string_dtype,
    list_files,
    read_footers,
    read_schema,
)
from dask_semdedup._validate import check_bytes, check_names, stack_level
from dask_semdedup.duplicates import SCORE_COLUMNS
from dask_semdedup.errors import ClusterError, InvalidArgumentError, MissingColumnsError, have, some
from dask_semdedup.folders import Contents
from dask_semdedup.layout import NULL_NAMES, integers_or_names

__all__ = ["SCORES", "find_rows", "read_scores", "read_table", "table_token"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
# How much of the first file the types are taken from.
INFERRED_BYTES = 2**24
# The stages' files, one a cluster.
CLUSTER_FILE = re.compile(r"cluster_(.+)\.parquet")
# Those of the command, and of Dask.
PART_FILE = re.compile(r"part\.\d+\.parquet")


def _not_of_scores(fs: fsspec.AbstractFileSystem, folder: str, names: Sequence[str]) -> list[str]:
    """Files of other names; all, if the first of them has no scores in it."""
    named = [name for name in names if PART_FILE.fullmatch(name) or CLUSTER_FILE.fullmatch(name)]
    if named:
        path = f"{folder}/{named[0]}"
        try:
            columns = read_schema(fs, path, fs.size(path)).names
        except ClusterError:  # What is damaged may be anything.
            columns = []
        if not set(SCORE_COLUMNS) <= set(columns):
            return list(names)
    return sorted(set(names) - set(named))


SCORES = Contents("scores", _not_of_scores)


def read_table(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    columns: Sequence[str] | None = None,
    *,
    id_field: str = "id",
    embedding_field: str = "embeddings",
    storage_options: Mapping[str, Any] | None = None,
    partition_size: str | int = "128MiB",
) -> dd.DataFrame:
    """Read Parquet or JSON lines as a lazy frame of pandas partitions.

    Only Parquet footers are read now, and the first block of JSON lines, from which the types are taken.

    Parameters
    ----------
    path : str, path-like or list of them
        A file, a folder, a pattern, or a list of them: local, or a URL that fsspec understands. JSON lines are files
        that end in .jsonl, .ndjson or .json, or in one of these and .gz; there is an object on each line.
    columns : sequence of str, optional
        The columns to read; by default all that the files hold. Of Parquet in folders named as ``lang=en``, one such
        column may be among them.
    id_field : str, default "id"
        Column that may not be null in JSON.
    embedding_field : str, default "embeddings"
        Column that becomes float32 where it is lists of numbers in JSON.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    partition_size : str or int, default "128MiB"
        About how much memory a partition takes.

    Returns
    -------
    dask.dataframe.DataFrame
        Lists are Arrow's, as are integers that may be null.

    Raises
    ------
    ClusterError
        If there are no files, one cannot be read, some hold columns that others do not and `columns` does not say what
        to read, or several of the columns stand in the names of folders.
    MissingColumnsError
        If a column is not there.

    Warns
    -----
    UserWarning
        If columns stand in the names of folders only, and `columns` does not say what to read.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with open(f"{folder}/a.jsonl", "w") as file:
    ...     _ = file.write('{"id": 1, "embeddings": [1, 0]}')
    >>> read_table(folder).compute()
       id embeddings
    0   1    [1. 0.]
    """
    size = check_bytes("partition_size", partition_size)
    check_names("columns", columns)
    options = dict(storage_options or {})
    fs, files, are_json = _list_table(path, options)
    # What folders of several paths are named after is none of one table's columns.
    root = None
    if isinstance(path, str | os.PathLike):
        root = above_pattern(fs, fsspec.url_to_fs(os.fspath(path), **options)[1])
    if are_json:
        ddf = _read_json(fs, files, columns, id_field, embedding_field, size)
    else:
        reader, fragments, sizes = _scan(fs, files, columns, root=root)
        ddf = _lazy(reader, _group(fragments, sizes, size), columns or reader.columns, checksum(files))
    if columns is None and root is not None:
        _warn_of_folders(root, files, ddf.columns)
    return ddf


def read_scores(
    path: str | os.PathLike[str],
    *,
    cluster_field: str = "centroid",
    storage_options: Mapping[str, Any] | None = None,
    partition_size: str | int = "32MiB",
) -> dd.DataFrame:
    """Read scores as a lazy frame: those that the command writes, or the files of the stages.

    Parameters
    ----------
    path : str or path-like
        A folder of Parquet files.
    cluster_field : str, default "centroid"
        Column of clusters. Where the files have none, it is taken from names such as ``cluster_7.parquet``.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    partition_size : str or int, default "32MiB"
        About how much memory a partition takes: a million rows or so, to be sorted.

    Returns
    -------
    dask.dataframe.DataFrame
        With ``id``, ``max_id`` and ``cosine_sim_score``, and the cluster where it is known.

    Raises
    ------
    ClusterError
        If there are no files, or one cannot be read as Parquet.
    MissingColumnsError
        If one of the three columns is not there.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> scores = pd.DataFrame({"id": ["a", "b"], "max_id": ["a", "a"], "cosine_sim_score": [0.0, 0.5]})
    >>> scores.to_parquet(f"{folder}/cluster_7.parquet")
    >>> read_scores(folder).compute()
      id max_id  cosine_sim_score  centroid
    0  a      a               0.0         7
    1  b      a               0.5         7
    """
    size = check_bytes("partition_size", partition_size)
    fs, files = list_files(path, storage_options)
    first, info = next(iter(files.items()))
    schema = read_schema(fs, first, info["size"])
    if not set(SCORE_COLUMNS) <= set(schema.names):
        raise MissingColumnsError.build(SCORE_COLUMNS, schema.names, f"{first} holds no scores of `pairwise`.")
    columns, clusters = list(SCORE_COLUMNS), None
    if cluster_field in schema.names:
        columns.append(cluster_field)
    else:
        clusters = _clusters_of_files(files)
    reader, fragments, sizes = _scan(fs, files, columns, cluster_field, clusters)
    return _lazy(reader, _group(fragments, sizes, size), reader.columns, checksum(files))


def find_rows(
    path: str | os.PathLike[str],
    ids: Collection[Any],
    columns: Sequence[str],
    *,
    id_field: str = "id",
    storage_options: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Fetch the rows of a few ids from a table, partition by partition.

    Only these columns are read, and of each partition only those rows are kept.

    Parameters
    ----------
    path : str or path-like
        As for `read_table`.
    ids : collection
        The ids that are wanted, of the column's type.
    columns : sequence of str
        What is wanted of them.
    id_field : str, default "id"
        Column of ids.
    storage_options
        As for `read_table`.

    Returns
    -------
    pandas.DataFrame
        The rows found, indexed by id, each id once.

    Raises
    ------
    MissingColumnsError
        If a column is not there.

    Examples
    --------
    >>> import tempfile
    >>> path = f"{tempfile.mkdtemp()}/table.parquet"
    >>> pd.DataFrame({"id": [1, 2, 3], "text": ["a", "b", "c"]}).to_parquet(path)
    >>> find_rows(path, [3, 1], ["text"])["text"].to_dict()
    {1: 'a', 3: 'c'}
    """
    needed = list(dict.fromkeys([id_field, *columns]))
    table = read_table(path, needed, id_field=id_field, storage_options=storage_options)
    wanted = pd.Index(list(dict.fromkeys(ids)))
    found = table.map_partitions(_select_ids, id_field, wanted, meta=table._meta).compute()
    found[id_field] = _as_objects(found[id_field])
    return found.drop_duplicates(id_field).set_index(id_field, drop=False)[list(columns)]


def table_token(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> str:
    """A token of a table's files, their names and states: it changes when one of them does."""
    _, files, _ = _list_table(path, storage_options)
    return checksum(files)


def _list_table(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], storage_options: Mapping[str, Any] | None
) -> tuple[fsspec.AbstractFileSystem, dict[str, Any], bool]:
    """The files of a table, and whether they are JSON lines; beside Parquet, what ends in .json is about the data."""
    kinds = PARQUET_SUFFIXES + JSON_SUFFIXES
    fs, files = list_files(path, storage_options, kinds, kind="Parquet or JSON-lines")
    parquet = [name for name in files if name.endswith(PARQUET_SUFFIXES)]
    lines = {name: info for name, info in files.items() if name.endswith(JSON_SUFFIXES)}
    if parquet:
        lines = {name: info for name, info in lines.items() if not name.endswith((".json", ".json.gz"))}
    if lines and parquet:
        raise ClusterError(f"{path} holds both Parquet ({some(parquet, 1)}) and JSON ({some(lines, 1)}). Part them.")
    # What is named may be Parquet whatever its name, unless it is beside lines.
    return fs, lines or {name: files[name] for name in files if not name.endswith(JSON_SUFFIXES)}, bool(lines)


def _select_ids(rows: pd.DataFrame, id_field: str, wanted: pd.Index) -> pd.DataFrame:
    return rows[_as_objects(rows[id_field]).isin(wanted)]


def _as_objects(ids: pd.Series) -> pd.Series:
    """Ids of an extension type of Arrow, as UUIDs, as Python objects, which can be looked up."""
    type_ = getattr(ids.dtype, "pyarrow_dtype", None)
    return pd.Series(list(ids), ids.index, object) if isinstance(type_, pa.BaseExtensionType) else ids


def _group(items: Sequence[Any], sizes: Sequence[int], most: int) -> list[tuple[Any, ...]]:
    """Runs of items of at most so many bytes, or of one item."""
    groups: list[list[Any]] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if not groups or total + size > most:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size
    return [tuple(group) for group in groups]


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _scan(
    fs: fsspec.AbstractFileSystem,
    files: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str] | None,
    cluster_field: str | None = None,
    clusters: Mapping[str, int | str] | None = None,
    root: str | None = None,
) -> tuple[Reader, list[Fragment], list[int]]:
    """A reader of the files, their row groups, and the bytes of each.

    A column may come from the files' names; one that is wanted and in no file, from those of folders below the root.
    """
    first, info = next(iter(files.items()))
    schema = read_schema(fs, first, info["size"])
    if columns is not None:
        wanted = set(columns) - set(schema.names)
        if root is not None and wanted:
            cluster_field, clusters = _folder_column(root, files, wanted) or (None, None)
        present = [*schema.names, *([cluster_field] if clusters else [])]
        if not set(columns) <= set(present):
            raise MissingColumnsError.build(columns, present, f"They are wanted of {first}.")
        schema = pa.schema([schema.field(name) for name in columns if name in schema.names])
    stats = read_footers(fs, files, schema.names, complete=columns is None)
    nullable = frozenset().union(*(file.nullable for file in stats))
    type_ = None
    if clusters:
        type_ = pa.int64() if all(isinstance(cluster, int) for cluster in clusters.values()) else pa.string()
    reader = Reader(
        fs, schema, nullable, cluster_field if clusters else None, type_, string_dtype=configured_string_dtype()
    )
    fragments = [
        Fragment(file.path, group.rows, (index,), clusters[file.path] if clusters else None)
        for file in stats
        for index, group in enumerate(file.row_groups)
    ]
    return reader, fragments, [group.nbytes for file in stats for group in file.row_groups]


def _clusters_of_files(files: Mapping[str, Any]) -> dict[str, int | str] | None:
    """Cluster of each file by its name, integers where all are; None where a name has none."""
    matches = {path: CLUSTER_FILE.fullmatch(path.rsplit("/", 1)[-1]) for path in files}
    names = {path: unquote(match[1]) for path, match in matches.items() if match}
    return None if len(names) < len(files) else integers_or_names(names)


def _values_of_folders(root: str, files: Iterable[str]) -> dict[str, dict[str, str]]:
    """What the folders of each file say below the root, as ``lang=en``."""
    return {file: _key_values(file.removeprefix(root)) for file in files}


def _key_values(relative: str) -> dict[str, str]:
    parts = (folder.partition("=") for folder in relative.split("/")[:-1])
    return {key: unquote(value) for key, found, value in parts if key and found}


def _folder_column(root: str, files: Iterable[str], wanted: Collection[str]) -> tuple[str, dict[str, int | str]] | None:
    """Of the columns that are wanted and in no file, the one in folders' names, and its value for each file."""
    values = _values_of_folders(root, files)
    keys = sorted({key for found in values.values() for key in found if key in wanted})
    if not keys:
        return None
    bare = [file for file, found in values.items() if found.get(keys[0], "") in NULL_NAMES]
    if len(keys) > 1 or bare:
        where = f"; {have(len(bare), 'file')} no value, such as {some(bare, 1)}" if bare else ""
        raise ClusterError(
            f"In the names of folders only: {', '.join(keys)}{where}. One such column can be read, which "
            "every file has. Read more with dd.read_parquet(path, dtype_backend='pyarrow')."
        )
    return keys[0], integers_or_names({file: found[keys[0]] for file, found in values.items()})


def _warn_of_folders(root: str, files: Iterable[str], present: Sequence[str]) -> None:
    """Say that columns in the names of folders are not read: to take them for clusters may be wrong."""
    keys = {key for found in _values_of_folders(root, files).values() for key in found}
    if left := sorted(keys - set(present)):
        warnings.warn(
            f"Folders of {root} are named by {', '.join(left)}, which is not read. Files of clusters are read by "
            "read_clusters, or scored by 'dask-semdedup pairwise'; another such column of Parquet by "
            "read_table(path, columns=[...]).",
            stacklevel=stack_level(),
        )


def _lazy(reader: Reader | JsonReader, partitions: list[Any], columns: Sequence[str], token: str) -> dd.DataFrame:
    columns = list(columns)
    # Every partition has the columns' dtypes, so that Dask need not check them.
    return dd.from_map(
        _ReadPart(reader, tokenize(token, columns, reader)),
        partitions or [()],
        columns=columns,
        meta=reader.meta(columns),
        label="read-table",
        enforce_metadata=False,
    )


@dataclass(frozen=True)
class _ReadPart:
    """The task of reading a partition. Dask narrows `columns` to those that are needed."""

    reader: Reader | JsonReader
    token: str

    def __call__(self, partition: Any, columns: Sequence[str]) -> pd.DataFrame:
        return cast(pd.DataFrame, self.reader.read(partition, columns))

    def __dask_tokenize__(self) -> str:
        return self.token


# --- JSON lines ------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A piece of a file of JSON lines: the lines that begin in these bytes, or all of a compressed file."""

    path: str
    start: int = 0
    length: int | None = None


@dataclass(frozen=True)
class JsonReader:
    """Reads blocks of JSON lines, always with the same dtypes.

    Parameters
    ----------
    fs
        The file system of the files.
    schema
        What each line holds.
    arrow
        Turns Arrow tables of that schema into pandas.
    id_field
        A column that may not be null.
    """

    fs: fsspec.AbstractFileSystem
    schema: pa.Schema
    arrow: Reader
    id_field: str

    def __dask_tokenize__(self) -> Any:
        return tokenize(self.arrow, self.id_field)

    def meta(self, columns: Sequence[str]) -> pd.DataFrame:
        """Empty frame with the dtypes of every partition."""
        return cast(pd.DataFrame, self.arrow.meta(columns))

    def read(self, block: Block, columns: Sequence[str]) -> pd.DataFrame:
        """Rows of a block, with a new `RangeIndex`."""
        table = _parse(self.fs, block, self.schema).select(list(columns))
        if self.id_field in columns and table[self.id_field].null_count:
            count = table[self.id_field].null_count
            raise InvalidArgumentError(f"{have(count, 'row')} no {self.id_field!r} in {block.path}.")
        return self.arrow.to_pandas(table)


def _read_json(
    fs: fsspec.AbstractFileSystem,
    files: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str] | None,
    id_field: str,
    embedding_field: str,
    size: int,
) -> dd.DataFrame:
    blocks = [block for path, info in files.items() for block in _blocks(path, info["size"], size)]
    schema = _infer(fs, blocks[0], id_field, embedding_field, columns)
    if columns is not None and not set(columns) <= set(schema.names):
        raise MissingColumnsError.build(columns, schema.names, f"They are wanted of {blocks[0].path}.")
    # Any line may lack what others have.
    nullable = frozenset(set(schema.names) - {id_field})
    arrow = Reader(fs, schema, nullable, string_dtype=configured_string_dtype())
    return _lazy(JsonReader(fs, schema, arrow, id_field), blocks, columns or schema.names, checksum(files))


def _blocks(path: str, nbytes: int, size: int) -> list[Block]:
    if path.endswith(".gz"):
        return [Block(path)]
    count = max(1, -(-nbytes // size))
    length = -(-nbytes // count)
    return [Block(path, start, length) for start in range(0, max(nbytes, 1), max(length, 1))]


def _infer(
    fs: fsspec.AbstractFileSystem, block: Block, id_field: str, embedding_field: str, columns: Sequence[str] | None
) -> pa.Schema:
    """What the lines of a block hold: numbers of the embedding as float32, ids that need it as uint64; else text."""
    block = block._replace(length=block.length and min(block.length, INFERRED_BYTES))
    rows = _parse(fs, block, None)
    schema = rows.schema
    types = {field.name: _as_written(field.type) for field in schema}
    if pa.types.is_list(types.get(embedding_field, pa.null())):
        types[embedding_field] = pa.list_(pa.float32())
    if types.get(id_field) == pa.float64() and (columns is None or id_field in columns):
        # So Arrow takes integers from 2⁶³ on, many of which are then one.
        try:
            _parse(fs, block, pa.schema([(id_field, pa.uint64())]), "ignore")
            types[id_field] = pa.uint64()
        except ClusterError as error:
            if large := [id_ for id_ in rows[id_field].to_pylist() if id_ is not None and abs(id_) >= 2**53]:
                raise InvalidArgumentError(
                    f"Column {id_field!r} of {block.path}: {have(len(large), 'id')} a value that floats cannot tell "
                    f"from others, such as {large[0]:.0f}. Write ids as text, or as integers that all fit in int64, or "
                    "all in uint64."
                ) from error
    return pa.schema(list(types.items()))


def _as_written(type_: pa.DataType) -> pa.DataType:
    """Text for what only looks like a time, and where all is null, which may yet be text."""
    if pa.types.is_list(type_):
        return pa.list_(_as_written(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([pa.field(field.name, _as_written(field.type)) for field in type_])
    return pa.string() if pa.types.is_null(type_) or pa.types.is_timestamp(type_) else type_


def _parse(
    fs: fsspec.AbstractFileSystem, block: Block, schema: pa.Schema | None, others: str | None = None
) -> pa.Table:
    """The lines of a block, all of them of a schema; `others` says what is done where they hold more."""
    from pyarrow import json

    try:
        with fs.open(block.path, "rb", compression="infer") as file:
            text = file.read() if block.length is None else read_block(file, block.start, block.length, b"\n")
        if not text.strip():
            return (schema or pa.schema([])).empty_table()
        others = others or ("error" if schema else "infer")
        options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others)
        # A line is in one block of the parser: it may be as long as the text.
        reading = json.ReadOptions(use_threads=False, block_size=min(max(len(text), 1), 2**31 - 1))
        return json.read_json(io.BytesIO(text), read_options=reading, parse_options=options)
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise ClusterError(
            f"Cannot read {block.path} as JSON lines ({error}). Each line must be an object, with the columns and "
            "types of the first lines of all."
        ) from error
