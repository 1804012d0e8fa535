"""The layout of k-means, ``<path>/<key>=<k>/part.<i>.parquet``: a folder for each cluster.

Frames to be written are aligned: no cluster spans two partitions. A cluster is then written by one task, and has one
file unless it is large.
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
from dask_semdedup.io.listing import is_local, list_files
from dask_semdedup.io.targets import Contents
from dask_semdedup.io.write import write_table, writing

__all__ = ["CLUSTERS", "check_cluster_dtype", "cluster_files", "write_partition"]

# Bytes of a name in the usual file systems.
MAX_NAME = 255

FILE_OF_CLUSTER = re.compile(r"[^/=]+=[^/]*/[^/]+\.parquet")


def _not_of_clusters(_fs: fsspec.AbstractFileSystem, _folder: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if not FILE_OF_CLUSTER.fullmatch(name)]


CLUSTERS = Contents("clusters", _not_of_clusters)


def check_cluster_dtype(clusters: Any) -> None:
    """Raise unless clusters are integers or strings, which can be read back from the names of folders.

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
        message = f"Column {clusters.name!r} has dtype {dtype}. Clusters must be integers or strings to name folders."
        raise InvalidArgumentError(message, parameters=["cluster_field"], columns=[clusters.name])


def write_partition(
    frame: Any,
    folder: str,
    key: str,
    max_file_size: int,
    options: dict[str, Any],
    stored: pa.Schema | None = None,
) -> pd.DataFrame:
    """Write whole clusters, each into its folder, and return the number of rows and their schema.

    Parameters
    ----------
    frame : pandas.DataFrame or cudf.DataFrame
        Whole clusters, in any order.
    folder : str
        The folder of all clusters, which exists.
    key : str
        The column of clusters, which is the key in the folders' names.
    max_file_size : int
        The size in memory of the rows of a file.
    options : dict
        Arguments of the fsspec file system.
    stored : pyarrow.Schema, optional
        The schema of the files that the columns come from.
    """
    if len(frame) == 0:
        return pd.DataFrame({"rows": pd.Series(dtype="int64"), "schema": pd.Series(dtype=object)})
    fs, root = fsspec.url_to_fs(folder, **options)
    clusters, order, starts = _runs(frame[key])
    names = _names_of_folders(key, clusters)
    table = _to_arrow(frame.drop(columns=key))
    for name, (start, stop) in zip(names, pairwise(starts), strict=True):
        path = f"{root}/{name}"
        # Without parents: a late task of a failed run must not make the folder of all clusters again.
        with writing(path), suppress(FileExistsError):  # Dask runs a task again if its worker is lost.
            fs.mkdir(path, create_parents=False)
        _write_files(fs, path, table.take(order[start:stop]), max_file_size, stored)
    return pd.DataFrame({"rows": [len(frame)], "schema": [table.schema]})


def _runs(column: Any) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """Return the sorted clusters, the order that sorts rows by them, and the bounds of each cluster in that order."""
    codes, clusters = column.factorize(sort=True)
    codes = to_numpy(codes)
    if lost := int((codes < 0).sum()):
        raise ClusterError(
            f"Column {column.name!r}: {have(lost, 'row')} no cluster. Drop them, or assign them to clusters.",
            parameters=["cluster_field"],
            columns=[column.name],
        )
    names = (clusters.to_pandas() if is_cudf(clusters) else clusters).tolist()
    if alike := _alike(names):
        raise ClusterError(
            f"Column {column.name!r}: clusters of different types have one name ({some(map(repr, alike))}), and would "
            "share a folder. Convert the column with astype.",
            parameters=["cluster_field"],
            columns=[column.name],
        )
    if unreadable := [name for name in names if name in NULL_NAMES or (isinstance(name, int) and name not in INT64)]:
        rows = int(np.isin(codes, [names.index(name) for name in unreadable]).sum())
        raise ClusterError(
            f"Column {column.name!r}: {have(rows, 'row')} a cluster whose folder would be read back as null, or not as "
            f"an integer ({some(map(repr, unreadable))}). Give it another name.",
            parameters=["cluster_field"],
            columns=[column.name],
        )
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(clusters) + 1))
    return names, order, starts


def _names_of_folders(key: str, clusters: Sequence[Any]) -> list[str]:
    """Return the name of each cluster's folder. Raise if one is longer than file systems allow."""
    names = [f"{key}={quote(str(cluster), safe='')}" for cluster in clusters]
    if long := [cluster for cluster, name in zip(clusters, names, strict=True) if len(name.encode()) > MAX_NAME]:
        raise ClusterError(
            f"Column {key!r}: {have(len(long), 'cluster')} a folder's name of more than {MAX_NAME} bytes "
            f"({some([f'{str(cluster)[:40]!r}...' for cluster in long])}). Give shorter names: characters other than "
            "letters, digits and _.-~ take three bytes or more.",
            parameters=["cluster_field"],
            columns=[key],
        )
    return names


def _alike(names: list[Any]) -> list[Any]:
    """Return the names that are written like others."""
    counts = Counter(map(str, names))
    return [name for name in names if counts[str(name)] > 1]


def _to_arrow(frame: Any) -> pa.Table:
    """Return the frame in one chunk: `take` would concatenate several chunks each time.

    The metadata of pandas is left out, since pandas cannot parse what it says there about columns of lists.
    """
    if is_cudf(frame):
        table = frame.to_arrow(preserve_index=False)
    else:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    return table.combine_chunks().replace_schema_metadata()


def _write_files(
    fs: fsspec.AbstractFileSystem, path: str, table: pa.Table, max_file_size: int, stored: pa.Schema | None
) -> None:
    """Write the rows of one cluster to as many files as they need; all but the last have equally many rows."""
    step = max(1, max_file_size * len(table) // max(1, table.nbytes))
    for number, start in enumerate(range(0, len(table), step)):
        name = f"{path}/part.{number}.parquet"
        with writing(name), fs.open(name, "wb") as file:
            write_table(table.slice(start, step), file, stored)


def cluster_files(
    path: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    cluster_field: str = "centroid",
) -> dict[int | str, list[str]]:
    """Return the files of each cluster in the layout of k-means, ``<path>/<cluster_field>=<k>/*.parquet``.

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
        From cluster to its files, both in ascending order. Clusters are int if all folders' names are integers, or else
        str. Files of remote systems are URLs.

    Raises
    ------
    DataNotFoundError
        If there are no files.
    ClusterError
        If a file is in no cluster's folder.
    """
    return list_clusters(path, storage_options, cluster_field).urls()


class Listing(NamedTuple):
    """Files of clusters: their file system, the info of each path, and the paths of each cluster."""

    fs: fsspec.AbstractFileSystem
    infos: Mapping[str, Mapping[str, Any]]
    by_cluster: dict[Any, list[str]]

    def urls(self) -> dict[Any, list[str]]:
        """Return the files of each cluster as paths or URLs that anyone can open."""
        if is_local(self.fs):
            return self.by_cluster
        return {cluster: list(map(self.fs.unstrip_protocol, files)) for cluster, files in self.by_cluster.items()}


def list_clusters(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None, key: str = "centroid"
) -> Listing:
    """Return the files of each cluster as `cluster_files` does, with what the listing says about them."""
    fs, files = list_files(path, storage_options)
    folders = clusters_of_folders(files, key)
    if folders is None:
        message = f"No folders {key}=<k> in {path}, but files such as {some(files, 1)}."
        raise ClusterError(message, parameters=["cluster_field"])
    by_cluster = defaultdict(list)
    for file, cluster in folders.items():
        by_cluster[cluster].append(file)
    return Listing(fs, files, dict(sorted(by_cluster.items())))


def clusters_of_folders(files: Iterable[str], key: str) -> dict[str, Any] | None:
    """Return the cluster of each file from the name of its folder ``<key>=<k>``, or None if no file has one.

    Raises
    ------
    ClusterError
        If only some of the files have one, or a cluster is null.
    """
    names: dict[str, Any] = {file: _folder_name(file, f"/{key}=") for file in files}
    outside = [file for file, name in names.items() if name is None]
    if len(outside) == len(names):
        return None
    if outside:
        message = f"{have(len(outside), 'file')} no folder {key}=<k>, others have: {some(outside)}."
        raise ClusterError(message, parameters=["cluster_field"])
    null = [file for file, name in names.items() if name in NULL_NAMES]
    if null:
        raise ClusterError(f"{have(len(null), 'file')} a null cluster in {key!r}: {some(null)}.", columns=[key])
    return integers_or_names(names)


def _folder_name(file: str, prefix: str) -> str | None:
    """Return what follows the prefix in the name of a file's folder, the innermost one if there are several."""
    folders = f"/{file}"[: file.rfind("/") + 2]
    _, found, name = folders.rpartition(prefix)
    return unquote(name[: name.find("/")]) if found else None
