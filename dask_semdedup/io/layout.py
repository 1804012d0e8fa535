"""Write the layout of k-means, ``<path>/<cluster_field>=<k>/part.<i>.parquet``: a folder for each cluster.

It takes aligned frames, in which no cluster spans two partitions. So a cluster is written by one task, and has one
file unless it is large, however many partitions it came from.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa

from dask_semdedup.errors import ClusterError, InvalidArgumentError, have, some
from dask_semdedup.frames.backend import is_cudf, to_numpy
from dask_semdedup.io.folder_keys import INT64, NULL_NAMES, integers_or_names
from dask_semdedup.io.footers import read_schema
from dask_semdedup.io.listing import above_pattern, is_local, list_files
from dask_semdedup.io.staging import Contents
from dask_semdedup.io.write import write_table

__all__ = ["CLUSTERS", "check_cluster_dtype", "cluster_files", "write_partition"]

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
    """
    dtype = clusters.dtype
    types = pd.api.types
    if isinstance(dtype, pd.CategoricalDtype) or types.is_integer_dtype(dtype) or types.is_object_dtype(dtype):
        return
    if not types.is_string_dtype(dtype):
        raise InvalidArgumentError(
            f"Column {clusters.name!r} has dtype {dtype}. Clusters must be integers or strings to be folders' names."
        )


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


def cluster_files(
    path: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    cluster_field: str = "centroid",
) -> dict[int | str, list[str]]:
    """List the files of each cluster in the layout of k-means, ``<path>/<cluster_field>=<k>/*.parquet``.

    Parameters
    ----------
    path : str or path-like
        The folder; local, or a URL that fsspec understands.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    cluster_field : str, default "centroid"
        The key in the folders' names.

    Returns
    -------
    dict
        From cluster to its files, both in ascending order. Clusters are int where all folders' names are integers,
        and str where not. Files of remote systems are URLs.

    Raises
    ------
    ClusterError
        If there are no files, or a file is in no cluster's folder.
    """
    return list_clusters(path, storage_options, cluster_field).urls()


class Listing(NamedTuple):
    """Files of clusters: their file system, each file's info by path, and the paths of each cluster."""

    fs: fsspec.AbstractFileSystem
    infos: Mapping[str, Mapping[str, Any]]
    by_cluster: dict[Any, list[str]]

    def urls(self) -> dict[Any, list[str]]:
        """The files of each cluster as anyone may open them."""
        if is_local(self.fs):
            return self.by_cluster
        return {cluster: list(map(self.fs.unstrip_protocol, files)) for cluster, files in self.by_cluster.items()}


def list_clusters(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None, cluster_field: str = "centroid"
) -> Listing:
    """List the layout of k-means as `cluster_files` does, with what the listing says of each file."""
    fs, files = list_files(path, storage_options)
    folders = _clusters_of_folders(files, cluster_field)
    if folders is None:
        raise ClusterError(f"No folders {cluster_field}=<k> in {path}, but files such as {some(files, 1)}.")
    by_cluster = defaultdict(list)
    for file, cluster in folders.items():
        by_cluster[cluster].append(file)
    return Listing(fs, files, dict(sorted(by_cluster.items())))


def clusters_beneath(
    fs: fsspec.AbstractFileSystem,
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    storage_options: Mapping[str, Any] | None,
    files: Mapping[str, Mapping[str, Any]],
    cluster_field: str,
) -> dict[str, Any] | None:
    """As `_clusters_of_folders`, unless there is but one, above the folder of all files, which have the column.

    That is a folder around a clustering, as ``centroid=256`` around a run with so many.
    """
    folders = _clusters_of_folders(files, cluster_field)
    if folders is None or not isinstance(path, str | os.PathLike):
        return folders
    first, info = next(iter(files.items()))
    key = f"/{cluster_field}="
    above = above_pattern(fs, fsspec.url_to_fs(os.fspath(path), **(storage_options or {}))[1])
    is_beneath = any(_folder_name(file.removeprefix(above), key) is not None for file in files)
    if is_beneath or f"/{first}".rsplit("/", 2)[-2].startswith(key[1:]):
        return folders
    return None if cluster_field in read_schema(fs, first, info["size"]).names else folders


def _clusters_of_folders(files: Iterable[str], cluster_field: str) -> dict[str, Any] | None:
    """Cluster of each file by its folder's name; None where no file has one."""
    key = f"/{cluster_field}="
    names: dict[str, Any] = {file: _folder_name(file, key) for file in files}
    outside = [file for file, name in names.items() if name is None]
    if len(outside) == len(names):
        return None
    if outside:
        raise ClusterError(f"{have(len(outside), 'file')} no folder {cluster_field}=<k>, others have: {some(outside)}.")
    null = [file for file, name in names.items() if name in NULL_NAMES]
    if null:
        raise ClusterError(f"{have(len(null), 'file')} a null cluster in {cluster_field!r}: {some(null)}.")
    return integers_or_names(names)


def _folder_name(file: str, key: str) -> str | None:
    """The rest of the name of the file's folder that begins with the key, of the innermost if there are several."""
    folders = f"/{file}"[: file.rfind("/") + 2]
    _, found, name = folders.rpartition(key)
    return unquote(name[: name.find("/")]) if found else None
