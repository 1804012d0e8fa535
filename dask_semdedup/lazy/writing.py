"""Frames as Parquet files, one a partition, with the types and the metadata of the files that they were read from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
from dask.dataframe.utils import has_known_categories

from dask_semdedup._validate import stack_level
from dask_semdedup.errors import ClusterError, some
from dask_semdedup.frames.backend import is_cudf
from dask_semdedup.frames.embeddings import as_lists, list_type
from dask_semdedup.io.layout import write_partition
from dask_semdedup.io.write import write_part
from dask_semdedup.lazy.sources import stored_schema
from dask_semdedup.lazy.tasks import compute_to_the_end

__all__ = ["parts", "writable", "write_layout"]


def parts(ddf: dd.DataFrame, folder: str, storage_options: Mapping[str, Any] | None = None) -> dd.DataFrame:
    """Write each partition to a file of its own, lazily: the number of rows of each.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
    folder : str
        A new folder, which is made now.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    """
    options = dict(storage_options or {})
    fs, path = fsspec.url_to_fs(folder, **options)
    fs.makedirs(path, exist_ok=True)
    meta = pd.DataFrame({"rows": pd.Series(dtype="int64")})
    written = ddf.map_partitions(write_part, folder, options, stored_schema(ddf), meta=meta)
    # Optimised here, reading, working and writing a partition become one task; compute() alone may not fuse them.
    return written.optimize()


def writable(ddf: dd.DataFrame, embedding_field: str) -> dd.DataFrame:
    """The frame with its embeddings as Arrow lists, where they are objects: Dask cannot write these to Parquet.

    Which lists they are, their first row tells.

    Warns
    -----
    UserWarning
        If Dask cannot write other columns either.
    """
    meta = ddf._meta
    objects = [] if is_cudf(meta) else [name for name, dtype in meta.dtypes.items() if dtype == np.dtype(object)]
    categories = [name for name, dtype in meta.dtypes.items() if isinstance(dtype, pd.CategoricalDtype)]
    unknown = [name for name in categories if not has_known_categories(meta[name])]
    if others := [name for name in [*objects, *unknown] if name != embedding_field]:
        warnings.warn(
            f"Dask's to_parquet cannot write columns of Python objects or unknown categories ({some(others)}). Write "
            "the rows that are kept with .semdedup.to_parquet(path), or read the files with "
            "dask_semdedup.read_table(path) or dtype_backend='pyarrow'.",
            stacklevel=stack_level(),
        )
    if embedding_field not in objects:
        return ddf
    column = ddf[embedding_field]
    rows = (part.head(1).dropna() for part in column.partitions)
    first = next((found for found in rows if len(found)), None)
    type_ = None if first is None else list_type(first)
    if type_ is None:
        return ddf  # What reads it says what is wrong.
    lists = column.map_partitions(as_lists, type_, embedding_field, meta=as_lists(column._meta, type_, embedding_field))
    return ddf.assign(**{embedding_field: lists})


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


def _check_schemas(schemas: list[pa.Schema]) -> None:
    for schema in schemas[1:]:
        if not schema.equals(schemas[0]):
            differ = [name for name in schema.names if schema.field(name) != schemas[0].field(name)]
            types = [f"{name}: {schemas[0].field(name).type} and {schema.field(name).type}" for name in differ]
            raise ClusterError(f"Partitions differ in schema, {some(types)}. Give the columns one dtype first.")
