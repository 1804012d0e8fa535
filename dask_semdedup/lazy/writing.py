"""Write frames as Parquet, one file per partition, with the types and metadata of the files they were read from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
from dask.dataframe.utils import has_known_categories

from dask_semdedup._validate import check_bytes, stack_level
from dask_semdedup.errors import ClusterError, InvalidArgumentError, some
from dask_semdedup.frames.backend import is_cudf
from dask_semdedup.frames.columns import Columns, unique_columns
from dask_semdedup.frames.embeddings import as_lists, list_type
from dask_semdedup.io.layout import CLUSTERS, check_cluster_dtype, cluster_files, write_partition
from dask_semdedup.io.staging import staged_folder
from dask_semdedup.io.targets import refuse_overlap
from dask_semdedup.io.write import PARTS, finished_parts, write_part
from dask_semdedup.lazy.alignment import align
from dask_semdedup.lazy.expressions import ReadClusters
from dask_semdedup.lazy.held import with_note
from dask_semdedup.lazy.sources import paths_of, stored_schema
from dask_semdedup.lazy.tasks import compute, compute_to_the_end
from dask_semdedup.steps.ranking import RankingStrategy

__all__ = ["Parts", "parts", "writable", "write_clusters_of", "write_layout", "write_parts_of"]


class Parts(NamedTuple):
    """The files of a frame's partitions: those that exist, and those that are written when `rest` is computed.

    Parameters
    ----------
    found : dict
        From the number of a partition to its rows, for each existing file.
    rest : dask.dataframe.DataFrame or None
        Frame that writes the others, and holds their numbers of rows. None if all files exist.
    """

    found: dict[int, int]
    rest: dd.DataFrame | None


def parts(ddf: dd.DataFrame, folder: str, storage_options: Mapping[str, Any] | None = None) -> Parts:
    """Write each partition to a file of its own, lazily.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
    folder : str
        Created now, unless it exists: then it may hold parts of the same frame, and of no other.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    """
    options = dict(storage_options or {})
    found = finished_parts(folder, options)
    missing = [number for number in range(ddf.npartitions) if number not in found]
    if not missing:
        return Parts(found, None)
    # Each partition's number goes with it: that of Dask counts those that are computed.
    numbers = dd.from_map(_itself, range(ddf.npartitions), meta=pd.Series(dtype="int64"))
    written = ddf.map_partitions(
        write_part,
        numbers,
        folder,
        options,
        with_note(stored_schema(ddf), ddf),
        align_dataframes=False,
        meta=pd.DataFrame({"rows": pd.Series(dtype="int64")}),
    )
    return Parts(found, written.partitions[missing] if found else written)


def _itself(number: int) -> int:
    return number


def writable(ddf: dd.DataFrame, columns: Columns) -> dd.DataFrame:
    """Return the frame with object embeddings as Arrow lists, since Dask cannot write objects to Parquet.

    The type of the lists is that of the first row.

    Warns
    -----
    UserWarning
        If there are other columns that Dask cannot write.
    """
    meta = ddf._meta
    objects = [] if is_cudf(meta) else [name for name, dtype in meta.dtypes.items() if dtype == np.dtype(object)]
    categories = [name for name, dtype in meta.dtypes.items() if isinstance(dtype, pd.CategoricalDtype)]
    unknown = [name for name in categories if not has_known_categories(meta[name])]
    if others := [name for name in [*objects, *unknown] if name != columns.embedding]:
        warnings.warn(
            f"Dask's to_parquet cannot write columns of Python objects or unknown categories ({some(others)}). Write "
            "the rows that are kept with .semdedup.to_parquet(path), or read the files with "
            "dask_semdedup.read_table(path) or dtype_backend='pyarrow'.",
            stacklevel=stack_level(),
        )
    if columns.embedding not in objects:
        return ddf
    column = ddf[columns.embedding]
    rows = (compute(part.head(1, compute=False))[0].dropna() for part in column.partitions)
    first = next((found for found in rows if len(found)), None)
    type_ = None if first is None else list_type(first)
    if type_ is None:
        return ddf  # What reads it says what is wrong.
    meta = as_lists(column._meta, type_, columns.embedding)
    lists = column.map_partitions(as_lists, type_, columns.embedding, meta=meta)
    return ddf.assign(**{columns.embedding: lists})


def write_parts_of(
    ddf: dd.DataFrame, path: str | os.PathLike[str], *, overwrite: bool, storage_options: Mapping[str, Any] | None
) -> None:
    """Write a frame to Parquet, one file per partition: see `SemDedupAccessor.to_parquet`."""
    unique_columns(ddf)
    ddf = _with_named_index(ddf)
    final = os.fspath(path)
    _refuse_sources(ddf, final, storage_options or {})
    with staged_folder(final, contents=PARTS, overwrite=overwrite, storage_options=storage_options) as folder:
        if (rest := parts(ddf, folder, storage_options).rest) is not None:
            compute_to_the_end(rest)


def _with_named_index(ddf: dd.DataFrame) -> dd.DataFrame:
    """Return the frame with an index that has a name as its first column, unless a column has the name already."""
    return ddf if ddf.index.name in (None, *ddf.columns) else ddf.reset_index()


def _refuse_sources(ddf: dd.DataFrame, path: str, storage_options: Mapping[str, Any]) -> None:
    """Raise if a frame would be written into a folder that it is read from, whose next reader would read both."""
    fs, output = fsspec.url_to_fs(path, **storage_options)
    for source, options in paths_of(ddf):
        refuse_overlap(fs, output, source, options, parameters=["path"])
    for read in ddf.expr.find_operations(ReadClusters):
        if (root := read.source.folder_around(fs, output)) is not None:
            raise InvalidArgumentError(
                f"Output {output!r} is within {root!r}, which is read: its clusters would be read twice from then on. "
                "Choose a folder outside the input.",
                parameters=["path"],
            )


def write_clusters_of(
    ddf: dd.DataFrame,
    path: str | os.PathLike[str],
    key: str,
    id_field: str | None,
    *,
    overwrite: bool,
    max_file_size: str | int,
    storage_options: Mapping[str, Any] | None,
) -> dict[int | str, list[str]]:
    """Write a frame in the layout of k-means: see `SemDedupAccessor.to_clusters`."""
    size = check_bytes("max_file_size", max_file_size)
    if "/" in key or "=" in key:
        raise InvalidArgumentError(
            f"cluster_field {key!r} cannot be part of a folder's name. Rename it.",
            parameters=["cluster_field"],
            columns=[key],
        )
    ddf = _with_named_index(ddf)
    aligned = align(ddf, key)
    check_cluster_dtype(ddf._meta[key])
    if id_field is not None:
        Columns(id=id_field).require(ddf.columns, "id")
        aligned = aligned.map_partitions(_sorted, RankingStrategy([id_field]), id_field, meta=aligned._meta)
    if len(ddf.columns) == 1:
        raise InvalidArgumentError(f"The frame has no columns to write but {key!r}.", columns=[key])
    final, options = os.fspath(path), dict(storage_options or {})
    _refuse_sources(ddf, final, options)
    with staged_folder(final, contents=CLUSTERS, overwrite=overwrite, storage_options=storage_options) as folder:
        write_layout(aligned, folder, key, size, with_note(stored_schema(ddf), ddf), options)
    return cluster_files(path, storage_options, cluster_field=key)


def _sorted(frame: Any, ranking: RankingStrategy, id_field: str) -> Any:
    return frame.iloc[ranking.order(frame, cluster_field=None, id_field=id_field)]


def write_layout(
    ddf: dd.DataFrame,
    folder: str,
    key: str,
    max_file_size: int,
    stored: pa.Schema | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Write an aligned frame into a new folder.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        Aligned frame: no cluster spans two partitions.
    folder : str
        A path or URL. It must not exist.
    key : str
        The cluster column. It becomes the folders' names and is not in the files.
    max_file_size : int
        Maximum size in memory of the rows of a file. Larger clusters have several files.
    stored : pyarrow.Schema, optional
        Schema of the files that the columns come from. It gives the types of columns and the metadata of files.
    storage_options : mapping, optional
        Arguments of the fsspec file system.

    Raises
    ------
    ClusterError
        If there are no rows, rows have no cluster, or two partitions differ in schema.
    """
    options = dict(storage_options or {})
    fs, root = fsspec.url_to_fs(folder, **options)
    fs.makedirs(root)
    meta = pd.DataFrame({"rows": pd.Series(dtype="int64"), "schema": pd.Series(dtype=object)})
    written = ddf.map_partitions(write_partition, folder, key, max_file_size, options, stored, meta=meta)
    parts = compute_to_the_end(written)
    if not len(parts):
        raise ClusterError("The frame has no rows: there is no cluster to write.")
    _check_schemas(list(parts["schema"]))


def _check_schemas(schemas: list[pa.Schema]) -> None:
    for schema in schemas[1:]:
        if not schema.equals(schemas[0]):
            differ = [name for name in schema.names if schema.field(name) != schemas[0].field(name)]
            types = [f"{name}: {schemas[0].field(name).type} and {schema.field(name).type}" for name in differ]
            raise ClusterError(f"Partitions differ in schema, {some(types)}. Give the columns one dtype first.")
