"""Write the layout of k-means, ``<path>/<cluster_field>=<k>/part.<i>.parquet``: a folder for each cluster.

It takes aligned frames, in which no cluster spans two partitions. So a cluster is written by one task, and has one
file unless it is large, however many partitions it came from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa

from dask_semdedup._writer import write_table
from dask_semdedup.embeddings import is_cudf, to_numpy
from dask_semdedup.errors import ClusterError, InvalidArgumentError, have, some
from dask_semdedup.folders import Contents
from dask_semdedup.tasks import compute_to_the_end

__all__ = [
    "CLUSTERS",
    "NULL_NAMES",
    "check_cluster_dtype",
    "integers_or_names",
    "key_type",
    "write_layout",
    "write_partition",
]

INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
INT64 = range(-(2**63), 2**63)
# Values in the names of folders that stand for none, to Hive and Arrow.
NULL_NAMES = frozenset({"", "__HIVE_DEFAULT_PARTITION__"})

FILE_OF_CLUSTER = re.compile(r"[^/=]+=[^/]*/[^/]+\.parquet")


def _not_of_clusters(_fs: fsspec.AbstractFileSystem, _folder: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if not FILE_OF_CLUSTER.fullmatch(name)]


CLUSTERS = Contents("clusters", _not_of_clusters)


def check_cluster_dtype(clusters: Any) -> None:
    """Raise unless clusters can be folders' names that are read back as they were: integers or strings.

    Parameters
    ----------
    clusters : pandas.Series or cudf.Series
        The column, which may be empty.

    Raises
    ------
    InvalidArgumentError
        Naming the column and its dtype.

    Examples
    --------
    >>> check_cluster_dtype(pd.Series([3, 4], name="centroid"))
    """
    dtype = clusters.dtype
    types = pd.api.types
    if isinstance(dtype, pd.CategoricalDtype) or types.is_integer_dtype(dtype) or types.is_object_dtype(dtype):
        return
    if not types.is_string_dtype(dtype):
        raise InvalidArgumentError(
            f"Column {clusters.name!r} has dtype {dtype}. Clusters must be integers or strings to be folders' names."
        )


def integers_or_names(names: Mapping[str, str]) -> dict[str, Any]:
    """Read values in names of files or folders back: as int64 where all are, as they are written, else as strings.

    Examples
    --------
    >>> integers_or_names({"a": "3", "b": "-10"}), integers_or_names({"a": "3", "b": "010"})
    ({'a': 3, 'b': -10}, {'a': '3', 'b': '010'})
    """
    distinct = set(names.values())
    if all(map(INTEGER.fullmatch, distinct)) and all(int(name) in INT64 for name in distinct):
        return {path: int(name) for path, name in names.items()}
    return dict(names)


def key_type(values: Iterable[Any]) -> pa.DataType:
    """Arrow type of what `integers_or_names` gives.

    Examples
    --------
    >>> key_type([3, -10]), key_type(["3", "010"])
    (DataType(int64), DataType(string))
    """
    return pa.int64() if all(isinstance(value, int) for value in values) else pa.string()


def write_layout(
    ddf: dd.DataFrame,
    folder: str,
    cluster_field: str,
    max_file_size: int,
    stored: pa.Schema | None = None,
    **options: Any,
) -> None:
    """Write an aligned frame into a new folder.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        Aligned: no cluster spans two partitions.
    folder : str
        A path or URL. It must not exist.
    cluster_field : str
        The cluster column. It becomes the folders' names and is not in the files.
    max_file_size : int
        Bytes in memory of what goes to one file; a cluster of more has several.
    stored : pyarrow.Schema, optional
        Of the files that the columns come from: they get its types, and the files its metadata.
    **options
        Of the fsspec file system.

    Raises
    ------
    ClusterError
        If there are no rows, rows have no cluster, or two partitions differ in schema.

    Examples
    --------
    >>> import os, tempfile
    >>> folder = os.path.join(tempfile.mkdtemp(), "clusters")
    >>> ddf = dd.from_pandas(pd.DataFrame({"id": [1, 2, 3], "centroid": [0, 1, 0]}), npartitions=1)
    >>> write_layout(ddf, folder, "centroid", 2**28)
    >>> sorted(os.listdir(folder))
    ['centroid=0', 'centroid=1']
    """
    fs, root = fsspec.url_to_fs(folder, **options)
    fs.makedirs(root)
    meta = pd.DataFrame({"rows": pd.Series(dtype="int64"), "schema": pd.Series(dtype=object)})
    written = ddf.map_partitions(write_partition, folder, cluster_field, max_file_size, options, stored, meta=meta)
    # Optimised here, reading, assigning and writing a partition become one task; compute() alone may not fuse them.
    parts = compute_to_the_end(written.optimize())
    if not len(parts):
        raise ClusterError("The frame has no rows: there is no cluster to write.")
    _check_schemas(list(parts["schema"]))


def write_partition(
    frame: Any,
    folder: str,
    cluster_field: str,
    max_file_size: int,
    options: dict[str, Any],
    stored: pa.Schema | None = None,
) -> pd.DataFrame:
    """Write whole clusters, each into its folder, and return how many rows they have and their schema.

    Parameters
    ----------
    frame : pandas.DataFrame or cudf.DataFrame
        Whole clusters, in any order.
    folder : str
        The folder of all clusters, which exists.
    cluster_field, max_file_size, options, stored
        As in `write_layout`.

    Examples
    --------
    >>> import os, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> parts = write_partition(pd.DataFrame({"id": [1, 2], "centroid": [7, 7]}), folder, "centroid", 2**28, {})
    >>> os.listdir(folder), os.listdir(f"{folder}/centroid=7")
    (['centroid=7'], ['part.0.parquet'])
    """
    if len(frame) == 0:
        return pd.DataFrame({"rows": pd.Series(dtype="int64"), "schema": pd.Series(dtype=object)})
    fs, root = fsspec.url_to_fs(folder, **options)
    clusters, order, starts = _runs(frame[cluster_field])
    table = _to_arrow(frame.drop(columns=cluster_field))
    for cluster, (start, stop) in zip(clusters, pairwise(starts), strict=True):
        path = f"{root}/{cluster_field}={quote(str(cluster), safe='')}"
        with suppress(FileExistsError):  # Dask runs a task again if its worker is lost.
            # Not its parents: a late writer of a run that has failed must not make the folder anew.
            fs.mkdir(path, create_parents=False)
        _write_files(fs, path, table.take(order[start:stop]), max_file_size, stored)
    return pd.DataFrame({"rows": [len(frame)], "schema": [table.schema]})


def _runs(column: Any) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """The clusters ascending, the order that sorts rows by them, and where each begins in it, and the end."""
    codes, clusters = column.factorize(sort=True)
    codes = to_numpy(codes)
    if lost := int((codes < 0).sum()):
        raise ClusterError(
            f"Column {column.name!r}: {have(lost, 'row')} no cluster. Drop them, or assign them to clusters."
        )
    names = (clusters.to_pandas() if is_cudf(clusters) else clusters).tolist()
    if alike := _alike(names):
        raise ClusterError(
            f"Column {column.name!r}: clusters of different types have one name ({some(map(repr, alike))}), and would "
            "share a folder. Convert the column with astype."
        )
    if unreadable := [name for name in names if name in NULL_NAMES or (isinstance(name, int) and name not in INT64)]:
        rows = int(np.isin(codes, [names.index(name) for name in unreadable]).sum())
        raise ClusterError(
            f"Column {column.name!r}: {have(rows, 'row')} a cluster whose folder would be read back as null, or not as "
            f"an integer ({some(map(repr, unreadable))}). Give it another name."
        )
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(clusters) + 1))
    return names, order, starts


def _alike(names: list[Any]) -> list[Any]:
    """Names that are written as others are."""
    counts = Counter(map(str, names))
    return [name for name in names if counts[str(name)] > 1]


def _to_arrow(frame: Any) -> pa.Table:
    """The frame in one chunk, since to take rows from several Arrow would put them together each time.

    Without pandas' notes on dtypes: with those of Arrow lists, no reader makes a pandas frame of it.
    """
    if is_cudf(frame):
        table = frame.to_arrow(preserve_index=False)
    else:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    return table.combine_chunks().replace_schema_metadata()


def _write_files(
    fs: fsspec.AbstractFileSystem, path: str, table: pa.Table, max_file_size: int, stored: pa.Schema | None
) -> None:
    """Write the rows of one cluster to as many files as they need, all but the last of one length."""
    step = max(1, max_file_size * len(table) // max(1, table.nbytes))
    for number, start in enumerate(range(0, len(table), step)):
        with fs.open(f"{path}/part.{number}.parquet", "wb") as file:
            write_table(table.slice(start, step), file, stored)


def _check_schemas(schemas: list[pa.Schema]) -> None:
    for schema in schemas[1:]:
        if not schema.equals(schemas[0]):
            differ = [name for name in schema.names if schema.field(name) != schemas[0].field(name)]
            types = [f"{name}: {schemas[0].field(name).type} and {schema.field(name).type}" for name in differ]
            raise ClusterError(f"Partitions differ in schema, {some(types)}. Give the columns one dtype first.")
