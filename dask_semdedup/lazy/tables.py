"""Plain tables, Parquet or JSON lines, as lazy frames, and a few of their rows by id.

Nothing here knows about clusters as `clusters` does: partitions are runs of rows in the files' order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import dask.dataframe as dd
import fsspec
import pandas as pd
import pyarrow as pa
from dask.tokenize import tokenize

from dask_semdedup._validate import check_bytes, check_names
from dask_semdedup.errors import DataReadError, MissingColumnsError, some
from dask_semdedup.frames.columns import SCORE_COLUMNS
from dask_semdedup.io.folder_keys import Keys, keys_below
from dask_semdedup.io.footers import read_schema
from dask_semdedup.io.fragments import Fragment, fragments_of
from dask_semdedup.io.jsonlines import JSON_SUFFIXES, JsonReader, read_json
from dask_semdedup.io.listing import PARQUET_SUFFIXES, above_pattern, checksum, list_files
from dask_semdedup.io.reader import Reader, taken_for_ids
from dask_semdedup.io.scan import scan_files
from dask_semdedup.io.scores import clusters_of_files
from dask_semdedup.lazy.planning import check_backend, default_size, fitting_size
from dask_semdedup.lazy.tasks import compute

__all__ = ["find_rows", "read_scores", "read_table", "table_token"]

# Files that others read, what they are, and what makes Parquet of them.
CONVERSIONS = {
    ".arrow": (
        "an Arrow IPC file, as Hugging Face datasets save them",
        "datasets.load_from_disk(folder).to_parquet('documents.parquet')",
    ),
    ".feather": ("a Feather file", "pandas.read_feather(path).to_parquet('documents.parquet')"),
    ".csv": ("a CSV file", "pandas.read_csv(path).to_parquet('documents.parquet')"),
    ".csv.gz": ("a CSV file", "pandas.read_csv(path).to_parquet('documents.parquet')"),
    ".tsv": ("a TSV file", "pandas.read_csv(path, sep='\\t').to_parquet('documents.parquet')"),
}


def read_table(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    columns: Sequence[str] | None = None,
    *,
    id_field: str = "id",
    embedding_field: str = "embeddings",
    make_ids: bool = False,
    backend: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    partition_size: str | int | None = None,
) -> dd.DataFrame:
    """Read Parquet or JSON lines as a lazy frame of pandas or cuDF partitions.

    Only Parquet footers are read now, and a sample of JSON lines, from which the types are taken.

    Parameters
    ----------
    path : str, path-like or list of them
        A file, a folder, a pattern, or a list of them: local, or a URL that fsspec understands. JSON lines are files
        that end in .jsonl, .ndjson or .json, or in one of these and .gz or .zst; there is an object on each line.
    columns : sequence of str, optional
        The columns to read; by default all that the files hold, and those in the names of folders, as ``lang=en``.
    id_field : str, default "id"
        Column that may not be null in JSON, or that is made.
    embedding_field : str, default "embeddings"
        Column that becomes float32 where it is lists of numbers in JSON.
    make_ids : bool, default False
        Make ids, as the first column, `id_field`: strings of the file's path below the folder that is read, and the
        row's number in the file, as ``en/part-3.parquet:17``. They stay the same as long as the file does, whatever
        other files there are.
    backend : {"pandas", "cudf"}, optional
        What partitions are. By default Dask's configuration ``dataframe.backend``. JSON lines are always pandas.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    partition_size : str or int, optional
        About how much memory a partition takes. By default 128 MiB, and more on a GPU: see `read_clusters`.

    Returns
    -------
    dask.dataframe.DataFrame
        Lists are Arrow's, as are floats, categories that have an order, and integers that may be null: what is read is
        what stands in the files, and `to_parquet` of the accessor writes it back with the same types. Numbers in JSON
        that neither int64 nor uint64 nor float64 gives back, as integers from 2⁶⁴ on or decimals of more than 17
        digits, make their column text.

    Raises
    ------
    DataReadError
        If there are no files, one cannot be read, or two disagree about one of `columns`. If two disagree about another
        column, that is an error when it is computed.
    MissingColumnsError
        If a column is not there.
    InvalidArgumentError
        If ids are to be made under a name that is taken.

    Notes
    -----
    Files need not have one schema. Columns that a file lacks, or that are null in all of it, are null; integers,
    floats, decimals and their lists are read as the widest type that there is [1]_. What disagrees beyond that, as
    integers with strings, is an error.

    References
    ----------
    .. [1] Apache Arrow, `pyarrow.unify_schemas`, with ``promote_options="permissive"``.

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
    backend = check_backend(backend)
    size = None if partition_size is None else check_bytes("partition_size", partition_size)
    check_names("columns", columns)
    options = dict(storage_options or {})
    fs, files, are_json = _list_table(path, options)
    roots = _roots(fs, path, options)
    keys, ids = keys_below(roots, files), {"make_ids": id_field if make_ids else None, "root": _common_root(roots)}
    if are_json:
        size = size or default_size("pandas")
        lines, blocks = read_json(fs, files, columns, keys, id_field, embedding_field, size, **ids)
        return _lazy(lines, blocks, columns or lines.columns, checksum(files))
    reader, fragments = _scan(fs, files, columns, keys, backend=backend, **ids)
    reader = reader.with_arrow_floats()
    if size is None:
        size = default_size(backend)
        if backend == "cudf":
            size = fitting_size(size, backend, sum(fragment.nbytes for fragment in fragments))
    return _lazy(reader, _group(fragments, size), columns or reader.columns, checksum(files))


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
    DataReadError
        If there are no files, or one cannot be read as Parquet.
    MissingColumnsError
        If one of the three columns is not there.
    """
    size = check_bytes("partition_size", partition_size)
    fs, files = list_files(path, storage_options)
    first = next(iter(files))
    names = read_schema(fs, first, files[first]["size"]).names
    if not set(SCORE_COLUMNS) <= set(names):
        raise MissingColumnsError.build(SCORE_COLUMNS, names, f"{first} holds no scores of `pairwise`.")
    columns, keys = list(SCORE_COLUMNS), None
    if cluster_field in names or (keys := clusters_of_files(files, cluster_field)):
        columns.append(cluster_field)
    reader, fragments = _scan(fs, files, columns, keys)
    return _lazy(reader, _group(fragments, size), reader.columns, checksum(files))


def find_rows(
    path: str | os.PathLike[str],
    ids: Collection[Any],
    columns: Sequence[str],
    *,
    id_field: str = "id",
    make_ids: bool = False,
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
    make_ids, storage_options
        As for `read_table`.

    Returns
    -------
    pandas.DataFrame
        The rows found, indexed by id, each id once.

    Raises
    ------
    MissingColumnsError
        If a column is not there.
    """
    needed = list(dict.fromkeys([id_field, *columns]))
    options: dict[str, Any] = {"id_field": id_field, "make_ids": make_ids, "storage_options": storage_options}
    table = read_table(path, needed, backend="pandas", **options)
    wanted = pd.Index(list(dict.fromkeys(ids)))
    (found,) = compute(table.map_partitions(_select_ids, id_field, wanted, meta=table._meta))
    found[id_field] = _as_objects(found[id_field])
    return found.drop_duplicates(id_field).set_index(id_field, drop=False)[list(columns)]


def table_token(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> str:
    """A token of a table's files, their names and states: it changes when one of them does."""
    _, files, _ = _list_table(path, storage_options)
    return checksum(files)


def _list_table(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], storage_options: Mapping[str, Any] | None
) -> tuple[fsspec.AbstractFileSystem, dict[str, Any], bool]:
    """Return a table's files, and whether they are JSON lines; among Parquet, .json files are about the data."""
    kinds = (*PARQUET_SUFFIXES, *JSON_SUFFIXES, *CONVERSIONS)
    fs, files = list_files(path, storage_options, kinds, kind="Parquet or JSON-lines")
    others = {name for name in files if name.endswith(tuple(CONVERSIONS))}
    parquet = [name for name in files if name.endswith(PARQUET_SUFFIXES)]
    lines = {name: info for name, info in files.items() if name.endswith(JSON_SUFFIXES)}
    if parquet or others:
        lines = {name: info for name, info in lines.items() if not re.search(r"\.json(\.\w+)?$", name)}
    if others and not parquet and not lines:
        name = min(others)
        what, conversion = next(found for suffix, found in CONVERSIONS.items() if name.endswith(suffix))
        raise DataReadError(f"{name} is {what}, which is not read. Convert it first: {conversion}.")
    if lines and parquet:
        raise DataReadError(
            f"{path} holds both Parquet ({some(parquet, 1)}) and JSON ({some(lines, 1)}). Split them into two folders."
        )
    # What is named may be Parquet whatever its name, unless it is beside lines.
    tables = {name: info for name, info in files.items() if name not in others and not name.endswith(JSON_SUFFIXES)}
    return fs, lines or tables, bool(lines)


def _select_ids(rows: pd.DataFrame, name: str, wanted: pd.Index) -> pd.DataFrame:
    return rows[_as_objects(rows[name]).isin(wanted)]


def _as_objects(ids: pd.Series) -> pd.Series:
    """Ids of an extension type of Arrow, as UUIDs, as Python objects, which can be looked up."""
    type_ = getattr(ids.dtype, "pyarrow_dtype", None)
    return pd.Series(list(ids), ids.index, object) if isinstance(type_, pa.BaseExtensionType) else ids


def _group(fragments: Sequence[Fragment], most: int) -> list[tuple[Fragment, ...]]:
    """Runs of fragments of at most so many bytes, or of one fragment."""
    groups: list[list[Fragment]] = []
    total = 0
    for fragment in fragments:
        if not groups or total + fragment.nbytes > most:
            groups.append([])
            total = 0
        groups[-1].append(fragment)
        total += fragment.nbytes
    return [tuple(group) for group in groups]


def _scan(
    fs: fsspec.AbstractFileSystem,
    files: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str] | None,
    keys: Keys | None = None,
    **options: Any,
) -> tuple[Reader, list[Fragment]]:
    """A reader of the files, and their row groups. What is in the files comes before what stands in names."""
    scan = scan_files(fs, files, columns, nulls=options.get("backend") != "cudf")
    made = taken_for_ids(options.get("make_ids"), scan.names)
    named = keys.fields if keys else pa.schema([])
    scan.check_columns(columns or [], [*named.names, *made], f"They are wanted of {next(iter(files))}.")
    reader = Reader.of(fs, scan, **options)
    if keys is None:
        return reader, [fragment for file in scan.files for fragment in fragments_of(file)]
    keys = keys.without(scan.names)
    reader = replace(reader, folders=keys.fields, nullable=reader.nullable | keys.nullable)
    return reader, [fragment for file in scan.files for fragment in fragments_of(file, keys.values[file.path])]


def _roots(fs: fsspec.AbstractFileSystem, path: Any, options: Mapping[str, Any]) -> list[str]:
    """The folders that paths or patterns stand for; those of files are the files themselves."""
    paths = [path] if isinstance(path, str | os.PathLike) else path
    return [above_pattern(fs, fsspec.url_to_fs(os.fspath(entry), **options)[1]) for entry in paths]


def _common_root(roots: Sequence[str]) -> str:
    """The folder of all files."""
    if len(roots) == 1:
        return roots[0] if not roots[0].endswith(PARQUET_SUFFIXES + JSON_SUFFIXES) else roots[0].rpartition("/")[0]
    return os.path.commonpath(roots)


def _lazy(reader: Reader | JsonReader, partitions: list[Any], columns: Sequence[str], token: str) -> dd.DataFrame:
    columns = list(columns)
    # Every partition has the columns' dtypes, so that Dask need not check them.
    return dd.from_map(
        ReadPart(reader, tokenize(token, columns, reader)),
        partitions or [()],
        columns=columns,
        meta=reader.meta(columns),
        label="read-table",
        enforce_metadata=False,
    )


@dataclass(frozen=True)
class ReadPart:
    """The task of reading a partition. Dask narrows `columns` to those that are needed."""

    reader: Reader | JsonReader
    token: str

    def __call__(self, partition: Any, columns: Sequence[str]) -> pd.DataFrame:
        return cast(pd.DataFrame, self.reader.read(partition, columns))

    def __dask_tokenize__(self) -> str:
        return self.token
