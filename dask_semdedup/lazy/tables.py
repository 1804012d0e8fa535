"""Tables without clusters, Parquet or JSON lines, as lazy frames; and a few of their rows by id.

Partitions are runs of rows in the order of the files.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
from dask.tokenize import tokenize

from dask_semdedup._validate import check_bytes, check_names, check_positive, stack_level, type_name
from dask_semdedup.errors import DataReadError, EmbeddingError, InvalidArgumentError, MissingColumnsError, some
from dask_semdedup.frames.columns import SCORE_COLUMNS, Columns, unique_columns
from dask_semdedup.frames.embeddings import JOINED_IN_PANDAS, to_embeddings, to_tensor
from dask_semdedup.io.folder_keys import Keys, keys_below
from dask_semdedup.io.footers import read_schema
from dask_semdedup.io.fragments import Fragment, fragments_of
from dask_semdedup.io.jsonlines import JSON_SUFFIXES, JsonReader, read_json
from dask_semdedup.io.listing import PARQUET_SUFFIXES, above_pattern, as_paths, checksum, list_files
from dask_semdedup.io.reader import Reader, taken_for_ids
from dask_semdedup.io.scan import scan_files
from dask_semdedup.io.scores import clusters_of_files
from dask_semdedup.lazy.planning import check_backend, default_size, fitting_size
from dask_semdedup.lazy.tasks import compute

__all__ = ["find_rows", "from_pandas", "read_scores", "read_table", "table_token"]

# In such files, embeddings are strings; a converter for a column that is not there does nothing.
PARSED = "converters={'embeddings': json.loads}"

# Files that others read, what they are, and what makes Parquet of them.
CONVERSIONS = {
    ".arrow": (
        "an Arrow IPC file",
        "pyarrow.parquet.write_table(pyarrow.ipc.open_stream(path).read_all(), 'documents.parquet'), with open_file in "
        "place of open_stream if the file begins with ARROW1; or, for a folder that Hugging Face Datasets have saved, "
        "datasets.load_from_disk(folder).to_parquet('documents.parquet')",
    ),
    ".feather": ("a Feather file", "pandas.read_feather(path).to_parquet('documents.parquet')"),
    ".csv": ("a CSV file", f"pandas.read_csv(path, {PARSED}).to_parquet('documents.parquet')"),
    ".csv.gz": ("a CSV file", f"pandas.read_csv(path, {PARSED}).to_parquet('documents.parquet')"),
    ".tsv": ("a TSV file", f"pandas.read_csv(path, sep='\\t', {PARSED}).to_parquet('documents.parquet')"),
}

# The same of files that are no data in a folder, but may be named. NumPy's have no ids but the numbers of the rows.
NUMBERED = ".reset_index(names='id').to_parquet('documents.parquet')"
CONVERSIONS_OF_NAMED = {
    ".npy": ("a NumPy array", f"pandas.DataFrame({{'embeddings': list(numpy.load(path))}}){NUMBERED}"),
    ".npz": (
        "an archive of NumPy arrays",
        f"pandas.DataFrame({{'embeddings': list(next(iter(numpy.load(path).values())))}}){NUMBERED}",
    ),
    ".pkl": ("a pickle", "pandas.read_pickle(path).to_parquet('documents.parquet')"),
    ".txt": (
        "a text file",
        "pandas.DataFrame({'text': open(path).read().splitlines()}).to_parquet('documents.parquet'); or, if its lines "
        "are JSON, rename it to .jsonl",
    ),
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

    The call lists files and reads Parquet footers, or a sample of JSON lines, from which it infers the types. The data
    are read when the frame is computed.

    Parameters
    ----------
    path : str, path-like or list of them
        A file, a folder, a pattern, or a list of them. A local path or an fsspec URL. Files of JSON lines hold an
        object on each line. Their names end in .jsonl, .ndjson or .json, optionally followed by .gz or .zst.
    columns : sequence of str, optional
        Columns to read. By default all columns of the files, and the keys in folder names, such as ``lang=en``.
    id_field : str, default "id"
        Column of ids. In JSON lines it may not be null. With `make_ids`, the name of the column that is made. The frame
        does not remember the names given here: pass them to the methods of the accessor, too.
    embedding_field : str, default "embeddings"
        Column of embeddings. In JSON lines, its lists of numbers become float32. Lists of uint16 are read as the bits
        of float16.
    make_ids : bool, default False
        Make a first column `id_field` of strings such as ``en/part-3.parquet:17``: the path of the file relative to the
        folder that is read, and the number of the row in the file. The ids of a file do not depend on other files.
    backend : {"pandas", "cudf"}, optional
        Type of the partitions. By default Dask's configuration ``dataframe.backend``. JSON lines are always read into
        pandas.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    partition_size : str or int, optional
        Approximate size of a partition in memory. By default "128MiB", less where workers have little memory, and more
        on a GPU, as for `read_clusters`.

    Returns
    -------
    dask.dataframe.DataFrame
        Lists, floats, ordered categories and nullable integers have Arrow types, so that values stay as they are in the
        files. `to_parquet` of the accessor writes them with the types of the files. A column of JSON numbers becomes
        text if int64, uint64 and float64 cannot represent one of them exactly: integers from 2⁶⁴ on, or decimals of
        more than 17 digits.

    Raises
    ------
    DataReadError
        If there are no files, one cannot be read, or two disagree about a column in `columns`. If two disagree about
        another column, an error follows when that column is computed.
    MissingColumnsError
        If a column in `columns` does not exist.
    InvalidArgumentError
        If `make_ids` is set and the files have a column `id_field`.

    Notes
    -----
    Files may have different schemas. A column that a file lacks is null for its rows. Integers, floats, decimals and
    lists of them are read as the widest of their types [1]_. Types that cannot be unified are an error, such as
    integers and strings.

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
    paths = tuple(as_paths(path))
    fs, files, are_json = _list_table(paths, options)
    roots = _roots(fs, paths, options)
    keys, ids = keys_below(roots, files), {"make_ids": id_field if make_ids else None, "root": _common_root(roots)}
    if are_json:
        size = size or default_size("pandas")
        lines, blocks = read_json(fs, files, columns, keys, id_field, embedding_field, size, **ids)
        return _lazy(lines, blocks, columns or lines.columns, checksum(files), paths, options)
    reader, fragments = _scan(fs, files, columns, keys, backend=backend, **ids)
    reader = reader.with_arrow_floats()
    if size is None:
        size = default_size(backend)
        if backend == "cudf":
            size = fitting_size(size, backend, sum(fragment.nbytes for fragment in fragments))
    return _lazy(reader, _group(fragments, size), columns or reader.columns, checksum(files), paths, options)


def from_pandas(
    frame: pd.DataFrame, npartitions: int | None = None, *, embedding_field: str = "embeddings"
) -> dd.DataFrame:
    """Make a Dask DataFrame from a pandas DataFrame with embeddings.

    `dask.dataframe.from_pandas` converts all Python objects to strings. Here, embeddings become Arrow lists of float32,
    and other columns of objects, such as bytes, decimals, dates, lists and mappings, get the Arrow type that holds
    them.

    The rows are part of the graph. If you work on a cluster, write them to Parquet and use `read_table`: otherwise Dask
    sends them to the scheduler with every computation, and warns of a large graph.

    Parameters
    ----------
    frame : pandas.DataFrame
        Rows with embeddings. To add the rows of a 2-D array, assign a list of them: ``frame["embeddings"] =
        list(array)``.
    npartitions : int, optional
        Number of partitions. By default one for every 128 MiB. There are more, of at least 16 MiB each, if that keeps
        all cores busy or fits workers with little memory.
    embedding_field : str, default "embeddings"
        Column of embeddings: arrays, lists or tuples of numbers, all of the same length, or Arrow lists of numbers.
        Lists of uint16 are read as the bits of float16, with a warning.

    Returns
    -------
    dask.dataframe.DataFrame
        All columns, in the order of the rows and with their index.

    Raises
    ------
    MissingColumnsError
        If there is no column of embeddings.
    EmbeddingError
        If the column does not hold embeddings, or rows of it are null, not finite or of different lengths.
    InvalidArgumentError
        If `frame` is not a pandas DataFrame, has several columns of one name, a column of objects that no plain Arrow
        type holds, or an index of several levels or with missing labels; or if `npartitions` is not positive.

    See Also
    --------
    read_table : Read files.

    Examples
    --------
    >>> vectors = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01]])
    >>> frame = pd.DataFrame({"id": [1, 2, 3], "embeddings": list(vectors)})
    >>> ddf = from_pandas(frame)
    >>> ddf.dtypes["embeddings"]
    list<item: float>[pyarrow]
    >>> ddf.semdedup.deduplicate(eps=0.01)["id"].compute().tolist()
    [1, 2]
    """
    if not isinstance(frame, pd.DataFrame):
        # Of Polars, Arrow and Datasets.
        advice = "Pass frame.to_pandas()." if hasattr(frame, "to_pandas") else "Pass pandas.DataFrame({...})."
        if isinstance(frame, dd.DataFrame):
            advice = "It needs no conversion: call its methods, as frame.semdedup.deduplicate()."
        raise InvalidArgumentError(
            f"frame must be a pandas DataFrame, not {type_name(frame)}. {advice}", parameters=["frame"]
        )
    check_positive("npartitions", npartitions)
    if isinstance(frame.index, pd.MultiIndex) or frame.index.hasnans:
        raise InvalidArgumentError(
            "The index of frame has several levels or missing labels, which Dask does not take: call "
            "frame.reset_index() first.",
            parameters=["frame"],
        )
    Columns(embedding=embedding_field).require(unique_columns(frame), "embedding", joined=JOINED_IN_PANDAS)
    column = frame[embedding_field]
    if isinstance(_first(column), str):
        raise EmbeddingError(
            f"Column {embedding_field!r} holds strings, not embeddings. Name the column of embeddings as "
            "embedding_field. If the strings are lists in JSON, import json and parse them: "
            f"frame[{embedding_field!r}] = frame[{embedding_field!r}].map(json.loads).",
            parameters=["embedding_field"],
            columns=[embedding_field],
        )
    in_arrow = getattr(getattr(column.dtype, "pyarrow_dtype", None), "value_type", None)
    if in_arrow == pa.uint16() or np.asarray(_first(column)).dtype == np.uint16:
        warnings.warn(
            f"Column {embedding_field!r}: uint16 values are read as the bits of float16, as NeMo Curator writes them. "
            "If they are numbers, cast them to int32 first.",
            stacklevel=stack_level(),
        )
    # Zeros are warned of by what compares the rows.
    rows = to_tensor(column, name=embedding_field, warn_of_zeros=False)
    frame = frame.copy(deep=False)
    frame[embedding_field] = to_embeddings(rows.numpy(), frame)
    for name in frame.columns[frame.dtypes == np.dtype(object)]:
        frame[name] = _in_arrow(frame[name])
    if npartitions is None:
        nbytes = int(frame.memory_usage(index=False).sum())
        npartitions = max(1, -(-nbytes // fitting_size(default_size("pandas"), "pandas", nbytes)))
    # Rows stay where they are; Dask knows divisions only of an index that ascends.
    return dd.from_pandas(frame, npartitions=npartitions, sort=frame.index.is_monotonic_increasing)


def _in_arrow(column: pd.Series) -> pd.Series:
    """Return a column of Python objects in the Arrow type that holds them; strings, and nulls alone, as they are."""
    try:
        values = pa.array(column, from_pandas=True)
        # Of UUIDs, for one, pandas makes bytes.
        if isinstance(values.type, pa.BaseExtensionType):
            raise pa.ArrowTypeError(f"they would be {values.type}")
    except (pa.ArrowException, OverflowError) as error:
        raise InvalidArgumentError(
            f"Column {column.name!r} holds Python objects that no plain Arrow type holds: {error}. Convert them, to "
            f"strings with frame[{column.name!r}].astype(str), or leave the column out.",
            parameters=["frame"],
            columns=[column.name],
        ) from error
    if pa.types.is_string(values.type) or pa.types.is_null(values.type):
        return column
    return pd.Series(pd.array(values, dtype=pd.ArrowDtype(values.type)), column.index)


def _first(column: pd.Series) -> Any:
    """Return the first value that is not missing, or None. Before pandas 3, strings are objects like any other."""
    return next(iter(column.dropna()), None)


def read_scores(
    path: str | os.PathLike[str],
    *,
    cluster_field: str = "centroid",
    storage_options: Mapping[str, Any] | None = None,
    partition_size: str | int = "32MiB",
) -> dd.DataFrame:
    """Read scores that the command or the stages have written, as a lazy frame.

    Parameters
    ----------
    path : str or path-like
        A folder of Parquet files.
    cluster_field : str, default "centroid"
        Column of clusters. If the files lack it, it comes from file names such as ``cluster_7.parquet``.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    partition_size : str or int, default "32MiB"
        Approximate size of a partition in memory. The default holds about a million rows.

    Returns
    -------
    dask.dataframe.DataFrame
        With ``id``, ``max_id`` and ``cosine_sim_score``, and the cluster if it is known.

    Raises
    ------
    DataReadError
        If there are no files, or one cannot be read as Parquet.
    MissingColumnsError
        If one of the three columns is missing.
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
    """Fetch the rows of a few ids from a table.

    Only these columns are read. Of each partition, only the wanted rows stay in memory.

    Parameters
    ----------
    path : str or path-like
        As for `read_table`.
    ids : collection
        The wanted ids, of the type of the column.
    columns : sequence of str
        The wanted columns.
    id_field : str, default "id"
        Column of ids.
    make_ids, storage_options
        As for `read_table`.

    Returns
    -------
    pandas.DataFrame
        The rows that exist, indexed by id, each id once.

    Raises
    ------
    MissingColumnsError
        If a column does not exist.
    """
    needed = list(dict.fromkeys([id_field, *columns]))
    options: dict[str, Any] = {"id_field": id_field, "make_ids": make_ids, "storage_options": storage_options}
    table = read_table(path, needed, backend="pandas", **options)
    wanted = pd.Index(list(dict.fromkeys(ids)))
    (found,) = compute(table.map_partitions(_select_ids, id_field, wanted, meta=table._meta))
    found[id_field] = _as_objects(found[id_field])
    return found.drop_duplicates(id_field).set_index(id_field, drop=False)[list(columns)]


def table_token(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> str:
    """Return a token of the names and states of a table's files, which changes when a file changes."""
    _, files, _ = _list_table(path, storage_options)
    return checksum(files)


def _list_table(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], storage_options: Mapping[str, Any] | None
) -> tuple[fsspec.AbstractFileSystem, dict[str, Any], bool]:
    """Return a table's files, and whether they are JSON lines. Beside Parquet, .json files are taken for metadata."""
    kinds = (*PARQUET_SUFFIXES, *JSON_SUFFIXES, *CONVERSIONS)
    fs, files = list_files(path, storage_options, kinds, kind="Parquet or JSON-lines")
    others = {name for name in files if name.endswith(tuple(CONVERSIONS))}
    parquet = [name for name in files if name.endswith(PARQUET_SUFFIXES)]
    lines = {name: info for name, info in files.items() if name.endswith(JSON_SUFFIXES)}
    if parquet or others:
        lines = {name: info for name, info in lines.items() if not re.search(r"\.json(\.\w+)?$", name)}
    conversions = CONVERSIONS | CONVERSIONS_OF_NAMED
    if not parquet and not lines and (foreign := [name for name in files if name.endswith(tuple(conversions))]):
        name = min(foreign)
        what, conversion = next(found for suffix, found in conversions.items() if name.endswith(suffix))
        raise DataReadError(f"{name} is {what}, which is not supported. Convert it first: {conversion}.")
    if lines and parquet:
        raise DataReadError(
            f"{some(as_paths(path))} holds both Parquet ({some(parquet, 1)}) and JSON ({some(lines, 1)}). "
            "Split them into two folders."
        )
    # What is named may be Parquet whatever its name, unless it is beside lines.
    tables = {name: info for name, info in files.items() if name not in others and not name.endswith(JSON_SUFFIXES)}
    return fs, lines or tables, bool(lines)


def _select_ids(rows: pd.DataFrame, name: str, wanted: pd.Index) -> pd.DataFrame:
    return rows[_as_objects(rows[name]).isin(wanted)]


def _as_objects(ids: pd.Series) -> pd.Series:
    """Return ids of an Arrow extension type, such as UUIDs, as Python objects, which can be looked up."""
    type_ = getattr(ids.dtype, "pyarrow_dtype", None)
    return pd.Series(list(ids), ids.index, object) if isinstance(type_, pa.BaseExtensionType) else ids


def _group(fragments: Sequence[Fragment], most: int) -> list[tuple[Fragment, ...]]:
    """Return runs of fragments, each of at most so many bytes or of one fragment."""
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
    """Return a reader of the files, and their row groups. Columns of files take precedence over keys of folders."""
    scan = scan_files(fs, files, columns, nulls=options.get("backend") != "cudf")
    made = taken_for_ids(options.get("make_ids"), scan.names)
    named = keys.fields if keys else pa.schema([])
    scan.check_columns(columns or [], [*named.names, *made], f"Name columns of {next(iter(files))} as columns.")
    reader = Reader.of(fs, scan, **options)
    if keys is None:
        return reader, [fragment for file in scan.files for fragment in fragments_of(file)]
    keys = keys.without(scan.names)
    reader = replace(reader, folders=keys.fields, nullable=reader.nullable | keys.nullable)
    return reader, [fragment for file in scan.files for fragment in fragments_of(file, keys.values[file.path])]


def _roots(fs: fsspec.AbstractFileSystem, paths: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Return the folders that paths and patterns refer to. For a file, it is the file itself."""
    return [above_pattern(fs, fsspec.url_to_fs(path, **options)[1]) for path in paths]


def _common_root(roots: Sequence[str]) -> str:
    """Return the folder that holds all files."""
    if len(roots) == 1:
        return roots[0] if not roots[0].endswith(PARQUET_SUFFIXES + JSON_SUFFIXES) else roots[0].rpartition("/")[0]
    return os.path.commonpath(roots)


def _lazy(
    reader: Reader | JsonReader,
    partitions: list[Any],
    columns: Sequence[str],
    token: str,
    paths: tuple[str, ...] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> dd.DataFrame:
    columns = list(columns)
    # Every partition has the columns' dtypes, so that Dask need not check them.
    return dd.from_map(
        ReadPart(reader, tokenize(token, columns, reader, paths), paths, storage_options or {}),
        partitions or [()],
        columns=columns,
        meta=reader.meta(columns),
        label="read-table",
        enforce_metadata=False,
    )


@dataclass(frozen=True)
class ReadPart:
    """The task of reading a partition. Dask narrows `columns` to those that are needed.

    The paths are those that the user gave.
    """

    reader: Reader | JsonReader
    token: str
    paths: tuple[str, ...]
    storage_options: Mapping[str, Any]

    def __call__(self, partition: Any, columns: Sequence[str]) -> pd.DataFrame:
        return cast(pd.DataFrame, self.reader.read(partition, columns))

    def __dask_tokenize__(self) -> str:
        return self.token
