"""Frames as Parquet files, one a partition, with the types and the metadata of the files that they were read from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
from dask.dataframe.utils import has_known_categories

from dask_semdedup._validate import stack_level
from dask_semdedup._writer import write_table
from dask_semdedup.embeddings import as_lists, is_cudf, list_type
from dask_semdedup.errors import some
from dask_semdedup.folders import Contents
from dask_semdedup.sources import stored_schema
from dask_semdedup.tables import PART_FILE

__all__ = ["PARTS", "parts", "writable", "write_part"]


def _not_of_parts(_fs: fsspec.AbstractFileSystem, _folder: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if not PART_FILE.fullmatch(name)]


PARTS = Contents("parts of a frame", _not_of_parts)


def parts(ddf: dd.DataFrame, folder: str, storage_options: Mapping[str, Any] | None = None) -> dd.DataFrame:
    """Write each partition to a file of its own, lazily: the number of rows of each.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
    folder : str
        A new folder, which is made now.
    storage_options : mapping, optional
        Arguments of the fsspec file system.

    Examples
    --------
    >>> import tempfile
    >>> ddf = dd.from_pandas(pd.DataFrame({"id": [1, 2, 3]}), npartitions=2)
    >>> parts(ddf, tempfile.mkdtemp()).compute()["rows"].sum()
    np.int64(3)
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

    Examples
    --------
    >>> import dask
    >>> with dask.config.set({"dataframe.convert-string": False}):
    ...     ddf = dd.from_pandas(pd.DataFrame({"embeddings": [[3.0, 4.0]]}), npartitions=1)
    >>> writable(ddf, "embeddings").dtypes["embeddings"]
    list<item: double>[pyarrow]
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


def write_part(
    rows: Any,
    folder: str,
    storage_options: Mapping[str, Any],
    stored: pa.Schema | None = None,
    partition_info: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """Write one partition to ``folder`` and return how many rows it has.

    Examples
    --------
    >>> import os, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> _ = write_part(pd.DataFrame({"id": [1, 2]}), folder, {})
    >>> os.listdir(folder)
    ['part.000000.parquet']
    """
    number = partition_info["number"] if partition_info else 0
    fs, path = fsspec.url_to_fs(folder, **storage_options)
    # Unlike `fsspec.open`, this does not make the folder anew for a late writer of a run that has failed.
    with fs.open(f"{path}/part.{number:06d}.parquet", "wb") as file:
        if is_cudf(rows):
            rows.to_parquet(file, index=False)
        else:
            # Without pandas' own metadata: pandas cannot read what it says there of columns of lists.
            write_table(pa.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata(None), file, stored)
    return pd.DataFrame({"rows": [len(rows)]})
