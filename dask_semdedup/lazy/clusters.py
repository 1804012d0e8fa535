"""Cluster-aligned frames: read the k-means layout, plan partitions by cost, align by shuffle, write cluster files.

A frame is aligned when no cluster spans two partitions. Pairwise similarity is then the business of one partition at
a time. `read_clusters` yields aligned frames from files, and `align` any other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import dask.dataframe as dd
import fsspec
import pyarrow as pa
from dask.dataframe.api import new_collection
from dask.tokenize import tokenize

from dask_semdedup._validate import check_bytes, check_names
from dask_semdedup.errors import ClusterError, have, some
from dask_semdedup.io.folder_keys import key_type
from dask_semdedup.io.fragments import FileStats, Fragment, RowGroup, fragments_of
from dask_semdedup.io.layout import clusters_of_folders
from dask_semdedup.io.listing import checksum, list_files
from dask_semdedup.io.reader import Reader
from dask_semdedup.io.scan import scan_files
from dask_semdedup.io.schemas import without
from dask_semdedup.io.targets import real_path
from dask_semdedup.lazy.alignment import align, no_cluster_column
from dask_semdedup.lazy.expressions import ReadClusters
from dask_semdedup.lazy.planning import CUDF_ELEMENTS, arrange, check_backend, cut_into_runs, default_size, fitting_size

__all__ = ["read_clusters", "read_listed"]


def read_clusters(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    cluster_field: str = "centroid",
    backend: str | None = None,
    columns: Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    partition_size: str | int | None = None,
) -> dd.DataFrame:
    """Read clustered embeddings into a Dask DataFrame in which no cluster spans two partitions.

    The call lists files and reads their footers, to plan partitions of whole clusters and about equal cost. It reads no
    data.

    Parameters
    ----------
    path : str, path-like or list of them
        A folder in the layout of k-means, ``<path>/<cluster_field>=<k>/*.parquet``, or any Parquet with a cluster
        column: a file, a folder, a pattern, or a list. A local path or an fsspec URL.
    cluster_field : str, default "centroid"
        Cluster column, and the key in folder names. In the layout of k-means, the column comes from the folder names
        and is the last one: int64 if all names are integers, else strings.
    backend : {"pandas", "cudf"}, optional
        Type of the partitions. By default Dask's configuration ``dataframe.backend``.
    columns : sequence of str, optional
        Columns to read, in this order. By default all.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    partition_size : str or int, optional
        Maximum size of the columns of a partition in memory, unless a single cluster is larger. By default "128MiB" for
        pandas, and up to "2GiB" for cuDF, since a GPU is fastest if it reads many files at once. Five partitions
        fill at most half of the GPU. Partitions are smaller, down to 16 MiB for pandas and 128 MiB for cuDF, if that is
        needed to keep all cores, or all GPUs of this process, busy, or to fit the memory of the workers.

    Returns
    -------
    dask.dataframe.DataFrame
        Lists are Arrow lists, strings have Dask's string dtype, and integers are NumPy integers, or Arrow integers if a
        column may hold nulls. Divisions are unknown. Clusters ascend within a partition, and from one partition to the
        next. Partitions that cost more than twice the median are exceptions: they are placed where Dask starts.

    Raises
    ------
    DataReadError
        If there are no files, one cannot be read, or two disagree about a column that is asked for. If two disagree
        about another column, an error follows when it is computed.
    ClusterError
        If there is no cluster column, or rows have a null cluster.
    MissingColumnsError
        If a column in `columns` is not there.
    InvalidArgumentError
        If `backend`, `columns` or `partition_size` is invalid.
    MissingDependencyError
        If `backend` is "cudf" and cuDF cannot be imported.

    Notes
    -----
    For files in another layout, the statistics of the cluster column in the footers may prove that clusters do not span
    files. Partitions are then planned in the same way. Otherwise the frame is lazily shuffled by cluster.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"id": [1, 2, 3], "embeddings": [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]})
    >>> folder = tempfile.mkdtemp()
    >>> frame.assign(centroid=[0, 0, 1]).to_parquet(folder, partition_cols=["centroid"])
    >>> ddf = read_clusters(folder)
    >>> list(ddf.columns)
    ['id', 'embeddings', 'centroid']
    >>> ddf[["id", "centroid"]].compute()
       id  centroid
    0   1         0
    1   2         0
    2   3         1
    """
    fs, files = list_files(path, storage_options)
    return read_listed(
        fs, files, cluster_field=cluster_field, backend=backend, columns=columns, partition_size=partition_size
    )


def read_listed(
    fs: fsspec.AbstractFileSystem,
    files: Mapping[str, Mapping[str, Any]],
    *,
    cluster_field: str,
    backend: str | None,
    partition_size: str | int | None,
    columns: Sequence[str] | None = None,
) -> dd.DataFrame:
    """Read files as `read_clusters` does, once they are listed."""
    backend = check_backend(backend)
    check_names("columns", columns)
    size = default_size(backend) if partition_size is None else check_bytes("partition_size", partition_size)
    folders = clusters_of_folders(files, cluster_field)
    source = _scan(fs, files, folders, cluster_field, columns, size, backend)
    wanted = source.reader.columns if columns is None else list(dict.fromkeys(columns))
    reading = wanted if source.aligned else list(dict.fromkeys([*wanted, cluster_field]))
    ddf = new_collection(ReadClusters(source, reading))
    return ddf if source.aligned else align(ddf, cluster_field)[wanted]


@dataclass(frozen=True)
class Source:
    """Files as planned partitions.

    Parameters
    ----------
    reader
        Reads a partition.
    partitions
        The fragments of each.
    cluster_field
        The cluster column.
    aligned
        Whether no cluster spans two partitions.
    token
        Changes when a file or the plan does.
    """

    reader: Reader
    partitions: tuple[tuple[Fragment, ...], ...]
    cluster_field: str
    aligned: bool
    token: str

    def folder_around(self, fs: fsspec.AbstractFileSystem, folder: str) -> str | None:
        """The folder of these clusters, if another one within it would be taken for one of them; else None."""
        if self.cluster_field not in self.reader.folders.names or type(fs) is not type(self.reader.fs):
            return None
        paths = (fragment.path for fragments in self.partitions for fragment in fragments)
        # The innermost key is that of the cluster.
        roots = {path.rpartition(f"/{self.cluster_field}=")[0] for path in paths}
        return next((root for root in roots if real_path(fs, folder).startswith(f"{real_path(fs, root)}/")), None)

    def __dask_tokenize__(self) -> str:
        return self.token

    def __repr__(self) -> str:
        return f"<{sum(map(len, self.partitions))} fragments in {len(self.partitions)} partitions>"


@dataclass(slots=True)
class _Unit:
    """Fragments that must not be parted: those of one cluster, or of clusters that share row groups."""

    key: Any
    fragments: list[Fragment] = field(default_factory=list)
    rows: int = 0
    nbytes: int = 0
    elements: int = 0

    def add(self, fragment: Fragment, groups: Iterable[RowGroup]) -> None:
        self.fragments.append(fragment)
        for group in groups:
            self.rows += group.rows
            self.nbytes += group.nbytes
            self.elements += group.elements


def _scan(
    fs: fsspec.AbstractFileSystem,
    files: Mapping[str, Mapping[str, Any]],
    folders: Mapping[str, Any] | None,
    cluster_field: str,
    columns: Sequence[str] | None,
    size: int,
    backend: str,
) -> Source:
    """Read the footers and plan the partitions."""
    bounded = cluster_field if folders is None else None
    scan = scan_files(fs, files, columns, bounded, nulls=backend == "pandas")
    if bounded and bounded not in scan.names:
        raise no_cluster_column(cluster_field, f"{next(iter(files))} and no folders {cluster_field}=<k>", scan.names)
    scan.check_columns([*(columns or []), *([bounded] if bounded else [])], [cluster_field], "Pass other `columns`.")
    _check_null_clusters(scan.files, cluster_field)
    keys = pa.schema([])
    if folders is not None:
        keys = pa.schema({cluster_field: key_type(folders.values())})
        scan = scan._replace(schema=without(scan.schema, [cluster_field]))
    reader = Reader.of(fs, scan, folders=keys, backend=backend)
    units = _units_of_bounds(scan.files, size) if folders is None else _units_of_folders(scan.files, folders)
    aligned = units is not None
    if units is None:
        units = _units_of_row_groups(scan.files)
    if backend == "cudf":
        _check_cudf(units, cluster_field)
    size = fitting_size(size, backend, sum(unit.nbytes for unit in units))
    units.sort(key=attrgetter("key"))
    runs, oversized = cut_into_runs([(place, unit.rows, unit.nbytes) for place, unit in enumerate(units)], size)
    partitions = tuple(
        _join(fragment for place in places for fragment in units[place].fragments)
        for places in arrange(runs, oversized)
    )
    wanted = None if columns is None else tuple(columns)
    token = tokenize(checksum(files), reader, cluster_field, aligned, size, wanted)
    return Source(reader, partitions, cluster_field, aligned, token)


def _join(fragments: Iterable[Fragment]) -> tuple[Fragment, ...]:
    """Join neighbouring row groups of a file, which then is opened once."""
    joined: list[Fragment] = []
    for fragment in fragments:
        last = joined[-1] if joined else None
        if last and fragment.row_groups and last.row_groups and fragment.path == last.path:
            joined[-1] = last._replace(rows=last.rows + fragment.rows, row_groups=last.row_groups + fragment.row_groups)
        else:
            joined.append(fragment)
    return tuple(joined)


def _check_null_clusters(stats: Sequence[FileStats], name: str) -> None:
    nulls = {file.path: file.null_clusters for file in stats if file.null_clusters}
    if nulls:
        raise ClusterError(
            f"{have(sum(nulls.values()), 'row')} a null cluster in {name!r}, in {some(nulls)}. "
            "Drop what has none, or give it one.",
            parameters=["cluster_field"],
            columns=[name],
        )


def _check_cudf(units: Iterable[_Unit], name: str) -> None:
    for unit in units:
        if unit.elements > CUDF_ELEMENTS:
            raise ClusterError(
                f"{name} {unit.key} has {unit.rows} rows with {unit.elements} elements, more than the "
                f"{CUDF_ELEMENTS} that a cuDF list column can hold. Use backend='pandas', or more clusters.",
                parameters=["backend"],
            )


def _units_of_folders(stats: Sequence[FileStats], folders: Mapping[str, Any]) -> list[_Unit]:
    """The clusters of the layout, each with its files."""
    units: dict[Any, _Unit] = {}
    for file in stats:
        cluster = folders[file.path]
        if cluster not in units:
            units[cluster] = _Unit(cluster)
        nbytes = sum(group.nbytes for group in file.row_groups)
        piece = Fragment(file.path, file.rows, None, (cluster,), nbytes, file.state)
        units[cluster].add(piece, file.row_groups)
    return list(units.values())


def _units_of_bounds(stats: Sequence[FileStats], size: int) -> list[_Unit] | None:
    """Runs of row groups whose cluster bounds overlap, if these prove that no cluster spans two files; else None.

    A run of several clusters that is larger than a partition and could be cut gives None too: it is better shuffled.
    """
    groups = [
        (group, fragment)
        for file in stats
        for group, fragment in zip(file.row_groups, fragments_of(file), strict=True)
        if group.rows
    ]
    if any(group.low is None for group, _ in groups):
        return None
    units: list[_Unit] = []
    high = None
    for group, fragment in sorted(groups, key=lambda item: (item[0].low, item[0].high, item[1])):
        if high is None or group.low > high:
            units.append(_Unit(group.low))
            high = group.high
        elif units[-1].fragments[0].path != fragment.path:
            return None
        units[-1].add(fragment, [group])
        high = max(high, group.high)
        if units[-1].nbytes > size and len(units[-1].fragments) > 1 and units[-1].key != high:
            return None
    return units


def _units_of_row_groups(stats: Sequence[FileStats]) -> list[_Unit]:
    """Every row group by itself, in the files' order."""
    units: list[_Unit] = []
    for file in stats:
        for group, fragment in zip(file.row_groups, fragments_of(file), strict=True):
            units.append(_Unit(len(units)))
            units[-1].add(fragment, [group])
    return units
