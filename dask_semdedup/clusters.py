"""Cluster-aligned frames: read the k-means layout, plan partitions by cost, align by shuffle, write cluster files.

A frame is aligned when no cluster spans two partitions. Pairwise similarity is then the business of one partition at
a time. `read_clusters` yields aligned frames from files, and `align` any other.
"""

from __future__ import annotations

import functools
import io
import math
import os
import statistics
import uuid
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote

import dask
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask import _expr as core
from dask._task_spec import Task
from dask.dataframe.dask_expr._collection import new_collection
from dask.dataframe.dask_expr._expr import Expr, Filter, Lengths, Literal, PartitionsFiltered, Projection
from dask.dataframe.dask_expr._merge import Merge
from dask.dataframe.dask_expr._reductions import Len
from dask.dataframe.dask_expr._shuffle import RearrangeByColumn
from dask.dataframe.dask_expr.io.io import BlockwiseIO
from dask.system import CPU_COUNT
from dask.tokenize import tokenize
from dask.typing import Key
from dask.utils import get_default_shuffle_method

from dask_semdedup._compat import OwnExpr
from dask_semdedup._parquet import (
    REMOTE_THREADS,
    FileStats,
    Fragment,
    Reader,
    RowGroup,
    above_pattern,
    checksum,
    fragments_of,
    is_local,
    list_files,
    read_schema,
    scan_files,
)
from dask_semdedup._schemas import without
from dask_semdedup._validate import check_bytes, check_names
from dask_semdedup.embeddings import to_arrow, to_host
from dask_semdedup.errors import ClusterError, InvalidArgumentError, have, some
from dask_semdedup.folders import real_path
from dask_semdedup.layout import NULL_NAMES, integers_or_names, key_type
from dask_semdedup.memory import device_bytes
from dask_semdedup.placement import partitions_per_gpu, visible_gpus

if TYPE_CHECKING:
    from distributed import Client

__all__ = [
    "align",
    "align_both",
    "cluster_files",
    "is_aligned",
    "plan",
    "read_clusters",
    "write_cluster",
    "write_clusters",
]

BACKENDS = ("pandas", "cudf")
# A partition that costs more than so many times the median is begun before the others.
GIANT = 2
# Reading a row costs about as much as comparing it with this many others, so that small clusters are not free.
READING_COST = 1024
# Bytes of a partition of pandas, and the least and the most of one of cuDF.
PARTITION = 2**27
GPU_PARTITIONS = (2**27, 2**31)
# What a partition takes on a GPU while it is read, in its own size: as in the file, decompressed, and as columns.
GPU_COPIES = 3
# Where there is little to read, partitions of pandas get as small as this, for so many a core.
SMALL_PARTITION = 2**24
PARTITIONS_A_CORE = 4
# Those of cuDF are no fewer than so many a GPU: the smaller they are, the longer they take to read.
PARTITIONS_A_GPU = 2
# The longest list column that cuDF can hold, in elements; the bytes are those of its narrowest elements.
CUDF_ELEMENTS = 2**31 - 1
CUDF_BYTES = 2 * CUDF_ELEMENTS
# Local files written at once by a partition: other partitions are written beside it.
LOCAL_WRITERS = max(1, min(4, CPU_COUNT // 4))
# Arguments of `to_parquet` that mean the same to Arrow's writer.
ARROW_OPTIONS = frozenset(
    {
        "compression",
        "compression_level",
        "data_page_size",
        "row_group_size",
        "use_dictionary",
        "version",
        "write_statistics",
    }
)


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

    Files are listed and their footers are read, to plan partitions of whole clusters and of about equal cost. No data
    is read before the frame is computed.

    Parameters
    ----------
    path : str, path-like or list of them
        A folder in the layout of k-means, ``<path>/<cluster_field>=<k>/*.parquet``, or any Parquet with a cluster
        column: a file, a folder, a glob, or a list. Local, or a URL that fsspec understands.
    cluster_field : str, default "centroid"
        The cluster column, and the key in the folders' names. In the layout, the column is made from the folder's
        name, after all others: int64 where all names are integers, strings where not.
    backend : {"pandas", "cudf"}, optional
        What partitions are. By default Dask's configuration ``dataframe.backend``.
    columns : sequence of str, optional
        The columns to read, in this order. By default all that there are.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    partition_size : str or int, optional
        The most bytes that the columns of a partition take in memory, unless a single cluster takes more. By default
        "128MiB" for pandas and, as many files in one call are what a GPU reads fast, up to "2GiB" for cuDF: less where
        the five that are read and scored at once would fill more than half of the GPU. Partitions are made smaller,
        down to 16 MiB for pandas and 128 MiB for cuDF, where there would else be too few to keep all cores busy, or
        all GPUs that this process sees.

    Returns
    -------
    dask.dataframe.DataFrame
        Lists as Arrow lists, strings in Dask's string dtype, integers as NumPy's (as Arrow's, where a column may hold
        nulls). Divisions are unknown. Partitions hold their clusters in ascending order, and ascend from one to the
        next, except those that cost more than twice the median: they stand where Dask begins, which is not the front.

    Raises
    ------
    ClusterError
        If there are no files, one cannot be read, two disagree about a column that is asked for, there is no cluster
        column, or rows have a null cluster. If two disagree about another column, an error follows when it is computed.
    MissingColumnsError
        If a column in `columns` is not there.
    InvalidArgumentError
        If `backend`, `columns` or `partition_size` is not one of those allowed.
    MissingDependencyError
        If `backend` is "cudf" and cuDF cannot be imported.

    Notes
    -----
    For files that are not in the layout, the footers' bounds of the cluster column may prove that clusters do not
    span files; partitions are then planned in the same way. Otherwise the frame is shuffled by cluster, lazily.

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
    backend = _check_backend(backend)
    check_names("columns", columns)
    size = default_size(backend) if partition_size is None else check_bytes("partition_size", partition_size)
    fs, files = list_files(path, storage_options)
    folders = _clusters_beneath(fs, path, storage_options, files, cluster_field)
    source = _scan(fs, files, folders, cluster_field, columns, size, backend)
    wanted = source.reader.columns if columns is None else list(dict.fromkeys(columns))
    reading = wanted if source.aligned else list(dict.fromkeys([*wanted, cluster_field]))
    ddf = new_collection(ReadClusters(source, reading))
    return ddf if source.aligned else align(ddf, cluster_field)[wanted]


def _check_backend(backend: str | None) -> str:
    if backend is None:
        backend = dask.config.get("dataframe.backend", "pandas")
    if backend not in BACKENDS:
        raise InvalidArgumentError(f"backend must be one of {list(BACKENDS)} or None, not {backend!r}.")
    return backend


def default_size(backend: str, client: Client | None = None) -> int:
    """Bytes of a partition: on a GPU so few that those that are there at once take half of it.

    Of the client, or the default one, the workers' threads are asked for.

    Examples
    --------
    >>> default_size("pandas") // 2**20
    128
    """
    if backend == "pandas":
        return PARTITION
    memory = device_bytes()
    if memory is None:
        return GPU_PARTITIONS[1]
    return int(np.clip(memory // (GPU_COPIES * partitions_per_gpu(client)), *GPU_PARTITIONS))


def fitting_size(size: int, backend: str, nbytes: int) -> int:
    """Bytes of a partition of all `nbytes`: no more than cuDF can hold, nor than keep all cores or GPUs busy.

    Examples
    --------
    >>> fitting_size(2**27, "pandas", nbytes=1000) // 2**20
    16
    """
    if backend == "cudf":
        return min(size, CUDF_BYTES, max(GPU_PARTITIONS[0], nbytes // (PARTITIONS_A_GPU * visible_gpus())))
    return min(size, max(SMALL_PARTITION, nbytes // (PARTITIONS_A_CORE * CPU_COUNT)))


def no_cluster_column(cluster_field: str, where: str, columns: Iterable[object]) -> ClusterError:
    """The error for a missing cluster column, which says how to get one."""
    return ClusterError(
        f"No cluster column {cluster_field!r} in {where}, only columns {list(columns)}. Cluster the embeddings first, "
        "with k-means: ddf.semdedup.kmeans() and, to keep them, .semdedup.to_clusters(path); or name the column that "
        "holds the clusters as cluster_field."
    )


# ---------------------------------------------------------------------------------------------------------------------
# The layout: a folder a cluster
# ---------------------------------------------------------------------------------------------------------------------


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

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> folder = tempfile.mkdtemp()
    >>> pd.DataFrame({"id": [1, 2], "centroid": [10, 9]}).to_parquet(folder, partition_cols=["centroid"])
    >>> list(cluster_files(folder))
    [9, 10]
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


def _clusters_beneath(
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


# ---------------------------------------------------------------------------------------------------------------------
# Scanning: what there is to read
# ---------------------------------------------------------------------------------------------------------------------


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
    runs, giants = _runs([(place, unit.rows, unit.nbytes) for place, unit in enumerate(units)], size)
    partitions = tuple(
        _join(fragment for place in places for fragment in units[place].fragments) for places in _arranged(runs, giants)
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


def _check_null_clusters(stats: Sequence[FileStats], cluster_field: str) -> None:
    nulls = {file.path: file.null_clusters for file in stats if file.null_clusters}
    if nulls:
        raise ClusterError(
            f"{have(sum(nulls.values()), 'row')} a null cluster in {cluster_field!r}, in {some(nulls)}. "
            "Drop what has none, or give it one."
        )


def _check_cudf(units: Iterable[_Unit], cluster_field: str) -> None:
    for unit in units:
        if unit.elements > CUDF_ELEMENTS:
            raise ClusterError(
                f"{cluster_field} {unit.key} has {unit.rows} rows with {unit.elements} elements, more than the "
                f"{CUDF_ELEMENTS} that a cuDF list column can hold. Use backend='pandas', or more clusters."
            )


def _units_of_folders(stats: Sequence[FileStats], folders: Mapping[str, Any]) -> list[_Unit]:
    """The clusters of the layout, each with its files."""
    units: dict[Any, _Unit] = {}
    for file in stats:
        cluster = folders[file.path]
        if cluster not in units:
            units[cluster] = _Unit(cluster)
        nbytes = sum(group.nbytes for group in file.row_groups)
        piece = Fragment(file.path, file.rows, None, (cluster,), nbytes, file.size)
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


def read_partition(reader: Reader, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
    """Read one partition: the task that `ReadClusters` puts into the graph."""
    return reader.read(fragments, columns)


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def plan(sizes: Iterable[tuple[Any, int, int]], partition_size: int) -> list[list[Any]]:
    """Share clusters out to partitions of whole clusters, as few as fit and of about equal cost.

    Searching a cluster of n rows of d numbers costs n²·d, and n·d are its bytes; reading it costs its bytes. So the
    cost of a cluster is taken as ``nbytes * (rows + 1024)``.

    Partitions that cost more than twice the median come first, the dearest at the head, so that no worker is left with
    one of them when the others are done [1]_. The rest follow in the order of their clusters.

    Parameters
    ----------
    sizes : iterable of (cluster, rows, nbytes)
        The clusters, in any order.
    partition_size : int
        The most bytes of a partition, unless it is of one cluster.

    Returns
    -------
    list of list
        The clusters of each partition, ascending within it.

    References
    ----------
    .. [1] Graham, "Bounds on multiprocessing timing anomalies", SIAM Journal on Applied Mathematics 17 (1969): longest
       processing time first.

    Examples
    --------
    >>> plan([(2, 20, 800), (0, 10, 400), (1, 10, 400)], partition_size=1000)
    [[0, 1], [2]]
    >>> plan([(0, 10, 400), (1, 10, 400), (2, 10, 400), (3, 9000, 9000)], partition_size=400)
    [[3], [0], [1], [2]]
    """
    runs, giants = _runs(sizes, partition_size)
    return [*(runs[run] for run in giants), *_without(runs, giants)]


def _runs(sizes: Iterable[tuple[Any, int, int]], partition_size: int) -> tuple[list[list[Any]], list[int]]:
    """The clusters of each partition, ascending throughout, and the positions of the giants, the costliest first."""
    ordered = sorted(sizes, key=itemgetter(0))
    if not ordered:
        return [[]], []
    clusters = [cluster for cluster, _, _ in ordered]
    total_bytes = list(accumulate((nbytes for _, _, nbytes in ordered), initial=0))
    total_cost = list(accumulate((nbytes * (rows + READING_COST) for _, rows, nbytes in ordered), initial=0))
    runs = list(pairwise(_cut_evenly(total_bytes, total_cost, partition_size)))
    costs = [total_cost[stop] - total_cost[start] for start, stop in runs]
    most = GIANT * statistics.median(costs)
    giants = sorted((run for run, cost in enumerate(costs) if cost > most), key=lambda run: -costs[run])
    return [clusters[start:stop] for start, stop in runs], giants


def _arranged(runs: Sequence[list[Any]], giants: Sequence[int]) -> list[list[Any]]:
    """Partitions with the giants where Dask begins, and the others in order.

    Where tasks do not depend on each other, it begins with the one whose number is the last in the order of text: of
    twelve with 9, then 8; not with 0. See `dask.order`.
    """
    begun = sorted(range(len(runs)), key=lambda place: f"{place})", reverse=True)
    places = {place: runs[run] for place, run in zip(begun, giants, strict=False)}
    others = iter(_without(runs, giants))
    return [places[place] if place in places else next(others) for place in range(len(runs))]


def _without(runs: Sequence[list[Any]], giants: Iterable[int]) -> list[list[Any]]:
    giants = set(giants)
    return [clusters for run, clusters in enumerate(runs) if run not in giants]


def _cut_evenly(total_bytes: Sequence[int], total_cost: Sequence[int], partition_size: int) -> list[int]:
    """Bounds of the fewest runs that fit, with the largest cost as small as bisection to 2 percent finds it.

    Given are the bytes and the cost of all that stands before each bound.
    """
    bounds = _cut(total_bytes, total_cost, partition_size, math.inf)
    costs = [after - before for before, after in pairwise(total_cost)]
    high: float = max(total_cost[stop] - total_cost[start] for start, stop in pairwise(bounds))
    low: float = max(max(costs), total_cost[-1] / (len(bounds) - 1))
    while high > 1.02 * low:
        middle = (low + high) / 2
        trial = _cut(total_bytes, total_cost, partition_size, middle)
        if len(trial) > len(bounds):
            low = middle
        else:
            bounds, high = trial, middle
    return bounds


def _cut(total_bytes: Sequence[int], total_cost: Sequence[int], most_bytes: int, most_cost: float) -> list[int]:
    """Bounds of runs, each as long as the limits allow, and at least of one."""
    bounds = [0]
    while (start := bounds[-1]) < len(total_bytes) - 1:
        stop = bisect_right(total_bytes, total_bytes[start] + most_bytes, start + 1)
        stop = bisect_right(total_cost, total_cost[start] + most_cost, start + 1, stop)
        bounds.append(max(stop - 1, start + 1))
    return bounds


# ---------------------------------------------------------------------------------------------------------------------
# Expressions
# ---------------------------------------------------------------------------------------------------------------------


class ReadClusters(OwnExpr, PartitionsFiltered, BlockwiseIO):
    """Partitions of whole clusters, read from Parquet files.

    To Dask the property `unique_partition_mapping_columns_from_shuffle` means more than that no cluster spans two
    partitions: two frames that have it are taken to be partitioned alike, and merged partition by partition. That
    would be wrong here, so the claim is dropped wherever a merge is to come (`_simplify_up`).
    """

    _parameters = ["source", "columns", "claims_alignment", "_partitions"]  # noqa: RUF012
    _defaults = {"claims_alignment": True, "_partitions": None}  # noqa: RUF012
    _absorb_projections = True

    @functools.cached_property
    def _name(self) -> str:
        return f"read_clusters-{self.deterministic_token}"

    @property
    def columns(self) -> list[str]:
        return list(self.operand("columns"))

    @functools.cached_property
    def _meta(self) -> Any:
        return self.source.reader.meta(self.columns)

    @functools.cached_property
    def unique_partition_mapping_columns_from_shuffle(self) -> set[tuple[str, ...]]:
        claimed = self.source.aligned and self.claims_alignment and self.source.cluster_field in self.columns
        return {(self.source.cluster_field,)} if claimed else set()

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (len(self.source.partitions) + 1)

    def _filtered_task(self, name: Key, index: int) -> Task:
        return Task(
            name, read_partition, self.source.reader, self.source.partitions[index], self.columns, _data_producer=True
        )

    def _simplify_up(self, parent: Expr, dependents: Mapping[str, Any]) -> core.Expr | None:
        if self.claims_alignment and is_merged(self, dependents):
            return parent.substitute(self, self.substitute_parameters({"claims_alignment": False}))
        if isinstance(parent, Lengths):
            return Literal(self._lengths())
        if isinstance(parent, Len):
            return Literal(sum(self._lengths()))
        return super()._simplify_up(parent, dependents)

    def _lengths(self) -> tuple[int, ...]:
        partitions = self.source.partitions
        return tuple(sum(fragment.rows for fragment in partitions[index]) for index in self._partitions)


def is_merged(expr: Expr, dependents: Mapping[str, Any]) -> bool:
    """Whether a merge depends on the expression."""
    names: set[str] = set()
    stack = [expr._name]
    while stack:
        parents = [parent for ref in dependents.get(stack.pop(), ()) if (parent := ref()) is not None]
        if any(isinstance(parent, Merge) for parent in parents):
            return True
        new = {parent._name for parent in parents} - names
        names |= new
        stack.extend(new)
    return False


class ShuffleByCluster(OwnExpr, RearrangeByColumn):
    """A shuffle that carries list columns: the peer-to-peer method fails on Arrow lists, so tasks replace it."""

    def _lower(self) -> core.Expr:
        method = self.method or get_default_shuffle_method()
        operands = dict(zip(self._parameters, self.operands, strict=True))
        # In the same step as Dask lowers its own: later the frame below would be lowered, and have other partitions.
        return RearrangeByColumn(**{**operands, "method": "tasks" if method == "p2p" else method})._lower()


def align(ddf: dd.DataFrame, cluster_field: str) -> dd.DataFrame:
    """Bring every cluster into one partition.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        Any frame with the cluster column.
    cluster_field : str
        The cluster column.

    Returns
    -------
    dask.dataframe.DataFrame
        The frame itself where it is aligned already (see `is_aligned`), else the frame shuffled by cluster, lazily.

    Raises
    ------
    ClusterError
        If the frame has no such column.

    Examples
    --------
    >>> import pandas as pd
    >>> ddf = dd.from_pandas(pd.DataFrame({"id": range(6), "centroid": [0, 1, 2, 0, 1, 2]}), npartitions=2)
    >>> is_aligned(ddf, "centroid")
    False
    >>> is_aligned(align(ddf, "centroid"), "centroid")
    True
    """
    if cluster_field not in ddf.columns:
        raise no_cluster_column(cluster_field, "the frame", ddf.columns)
    if is_aligned(ddf, cluster_field):
        return ddf
    return new_collection(ShuffleByCluster(ddf.expr, [cluster_field], ddf.npartitions))


def align_both(left: dd.DataFrame, right: dd.DataFrame, cluster_field: str) -> tuple[dd.DataFrame, dd.DataFrame]:
    """Partition two frames alike: the rows of a cluster stand in the same partition of both.

    Parameters
    ----------
    left, right : dask.dataframe.DataFrame
        Any frames with the cluster column.
    cluster_field : str
        The cluster column, of integers in both or of one dtype.

    Returns
    -------
    tuple of dask.dataframe.DataFrame
        The frames as they are where each has one partition, else both shuffled by cluster, lazily.

    Raises
    ------
    InvalidArgumentError
        If clusters are of different kinds.

    Examples
    --------
    >>> import pandas as pd
    >>> left = dd.from_pandas(pd.DataFrame({"id": range(6), "centroid": [0, 1, 2, 0, 1, 2]}), npartitions=3)
    >>> right = dd.from_pandas(pd.DataFrame({"id": range(2), "centroid": [2, 0]}), npartitions=1)
    >>> [frame.npartitions for frame in align_both(left, right, "centroid")]
    [3, 3]
    """
    ours, theirs = left._meta[cluster_field].dtype, right._meta[cluster_field].dtype
    if ours != theirs:
        if not (pd.api.types.is_integer_dtype(ours) and pd.api.types.is_integer_dtype(theirs)):
            raise InvalidArgumentError(
                f"Column {cluster_field!r} is {ours} in one frame and {theirs} in the other: clusters must be of one "
                "clustering. If they are, convert one of the columns with astype."
            )
        # Numbers of different widths may be sent to different partitions. Nulls are left to be named by their ids.
        may_be_null = any(pd.api.types.is_extension_array_dtype(dtype) for dtype in (ours, theirs))
        to = "Int64" if may_be_null else "int64"
        left, right = (frame.assign(**{cluster_field: frame[cluster_field].astype(to)}) for frame in (left, right))
    n = max(left.npartitions, right.npartitions)
    if n == 1:
        return left, right
    shuffled = [new_collection(ShuffleByCluster(frame.expr, [cluster_field], n)) for frame in (left, right)]
    return shuffled[0], shuffled[1]


def is_aligned(ddf: dd.DataFrame, cluster_field: str) -> bool:
    """Whether the frame is known to have no cluster in two partitions.

    It is when there is one partition, or when Dask knows that it came from a shuffle by cluster or from
    `read_clusters`. Not all that Dask says of the result of a merge is believed. Of a broadcast merge it says that both
    sides were shuffled, and neither need be; of others, that the columns of both sides are distinct, whichever of them
    now has the name; and it goes on to say so of a name by itself, not in a tuple, when a column has been assigned or
    renamed.
    """
    if ddf.npartitions == 1:
        return True
    known: set[Any] = {(cluster_field,)}
    above = ddf.expr
    while isinstance(above, (Projection, Filter)):
        above = above.frame
    if isinstance(above, Merge):
        known.add(cluster_field)
    return not known.isdisjoint(claims_of(ddf.expr)) and all(
        _is_hashed_by(merge, cluster_field) for merge in _last_merges(ddf.expr)
    )


def _last_merges(expr: core.Expr) -> Iterator[Merge]:
    """The merges that are not followed by a shuffle."""
    if isinstance(expr, Merge):
        yield expr
    elif not isinstance(expr, (RearrangeByColumn, ReadClusters)):
        for dependency in expr.dependencies():
            yield from _last_merges(dependency)


def _is_hashed_by(merge: Merge, column: str) -> bool:
    """Whether a merge brings rows of equal values in a column of both sides into one partition."""
    broadcast = merge.is_broadcast_join or merge._is_single_partition_broadcast
    return not broadcast and all(column == on or on == [column] for on in (merge.left_on, merge.right_on))


def claims_of(expr: Expr) -> set[Any]:
    """What Dask says the partitions are distinct in; nothing where its own answer fails.

    That of a frame whose ``columns`` were set does, and where a dropped column was the one.
    """
    try:
        return expr.unique_partition_mapping_columns_from_shuffle
    except (KeyError, TypeError):
        return set()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_cluster(frame: Any, output_path: str | os.PathLike[str], cluster: int | str, **write_kwargs: Any) -> str:
    """Write the scores of one cluster to ``<output_path>/cluster_<k>.parquet``, whole or not at all.

    The file is written under a temporary name in the same folder and then renamed. The temporary name does not end in
    ``.parquet``, so that no reader takes it for data.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        What to write, without its index.
    output_path : str or path-like
        The folder, made where it is missing; local, or a URL that fsspec understands.
    cluster : int or str
        The cluster. In the file's name it is quoted as in a URL, so that it may hold slashes.
    **write_kwargs
        Arguments of ``to_parquet`` of pandas, and ``storage_options`` for the fsspec file system.

    Returns
    -------
    str
        Path of the file.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> path = write_cluster(pd.DataFrame({"id": [1]}), tempfile.mkdtemp(), 7)
    >>> os.path.basename(path)
    'cluster_7.parquet'
    """
    return write_clusters(frame, {cluster: range(len(frame))}, output_path, **write_kwargs)[cluster]


def write_clusters(
    frame: Any, rows: Mapping[int | str, range], output_path: str | os.PathLike[str], **write_kwargs: Any
) -> dict[int | str, str]:
    """Write the scores of many clusters as `write_cluster` does, several files at once.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        Scores of all clusters. Those of cuDF come to the host at once.
    rows : mapping from cluster to range
        The rows of each, by position, one after the other.
    output_path, **write_kwargs
        As for `write_cluster`.

    Returns
    -------
    dict
        From cluster to the path of its file. If a file cannot be written, some of the others may have been.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> paths = write_clusters(pd.DataFrame({"id": [1, 2, 3]}), {7: range(2), 9: range(2, 3)}, tempfile.mkdtemp())
    >>> pd.read_parquet(paths[7]).id.to_list(), pd.read_parquet(paths[9]).id.to_list()
    ([1, 2], [3])
    """
    folder = os.fspath(output_path).rstrip("/")
    fs, root = fsspec.core.url_to_fs(folder, **(write_kwargs.pop("storage_options", None) or {}))
    encode = _encoder(frame, write_kwargs)
    # Quoted as in the folders' names of the layout: a cluster may be called "a/b".
    names = {cluster: f"cluster_{quote(str(cluster), safe='')}.parquet" for cluster in rows}
    fs.makedirs(root, exist_ok=True)

    def write(cluster: int | str) -> None:
        _write_whole(fs, f"{root}/{names[cluster]}", encode(rows[cluster]))

    threads = LOCAL_WRITERS if is_local(fs) else REMOTE_THREADS
    with ThreadPoolExecutor(max(1, min(threads, len(rows))), thread_name_prefix="write") as pool:
        list(pool.map(write, rows))
    return {cluster: f"{folder}/{name}" for cluster, name in names.items()}


def _encoder(frame: Any, options: Mapping[str, Any]) -> Callable[[range], bytes | pa.Buffer]:
    """What turns rows of a frame into a Parquet file; the frame becomes Arrow's once, not once a file, if it can."""
    if options.keys() <= ARROW_OPTIONS:
        table = to_arrow(frame)

        def encode(rows: range) -> pa.Buffer:
            sink = pa.BufferOutputStream()
            pq.write_table(table.slice(rows.start, len(rows)), sink, **options)
            return sink.getvalue()

        return encode
    host = to_host(frame)

    def encode_pandas(rows: range) -> bytes:
        sink = io.BytesIO()
        host.iloc[rows.start : rows.stop].to_parquet(sink, index=False, **options)
        return sink.getvalue()

    return encode_pandas


def _write_whole(fs: fsspec.AbstractFileSystem, final: str, data: bytes | pa.Buffer) -> None:
    """Write a file under a temporary name, and rename it."""
    temporary = f"{final}.{uuid.uuid4().hex}.tmp"
    try:
        if is_local(fs):
            with pa.OSFile(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, final)
        else:
            fs.pipe_file(temporary, bytes(data))
            _rename(fs, temporary, final)
    except BaseException:
        if fs.exists(temporary):
            fs.rm_file(temporary)
        raise


def _rename(fs: fsspec.AbstractFileSystem, temporary: str, final: str) -> None:
    if type(fs).mv is fsspec.AbstractFileSystem.mv:
        # It copies and removes, as object stores must, but first it asks whether either path is a folder.
        fs.cp_file(temporary, final)
        fs.rm_file(temporary)
    else:
        fs.mv(temporary, final)
