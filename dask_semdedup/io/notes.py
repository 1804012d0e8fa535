"""Notes: JSON in a file of its own, next to data that other programs read too."""

from __future__ import annotations

import io
import json
from typing import Any

import fsspec
import pyarrow.parquet as pq

from dask_semdedup.io.footers import read_schema
from dask_semdedup.io.listing import PARQUET_SUFFIXES, is_data_file
from dask_semdedup.io.write import writing

__all__ = ["NOTE_KEY", "read_note", "write_note"]

# The key of the JSON in the metadata of a Parquet file.
NOTE_KEY = b"dask_semdedup"


def write_note(fs: fsspec.AbstractFileSystem, path: str, value: Any) -> None:
    """Write JSON to a file; if its name ends in ``.parquet``, to the footer of a Parquet file without rows.

    Such a file has the schema of the Parquet files next to it, of which there must be one. Programs that read all files
    of a folder would fail at a file of JSON, and find no rows in this one.
    """
    with writing(path):
        note = json.dumps(value, indent=2).encode()
        fs.pipe_file(path, _without_rows(fs, path.rpartition("/")[0], note) if path.endswith(".parquet") else note)


def read_note(fs: fsspec.AbstractFileSystem, path: str) -> Any:
    """Return the JSON that `write_note` wrote. Whatever else is there raises one of Python's own errors."""
    if not path.endswith(".parquet"):
        return json.loads(fs.cat_file(path))
    with fs.open(path, "rb") as file:
        return json.loads((pq.read_metadata(file).metadata or {})[NOTE_KEY])


def _without_rows(fs: fsspec.AbstractFileSystem, folder: str, note: bytes) -> bytes:
    """Return a Parquet file without rows, with the schema of the files in a folder."""
    sizes = {path: info["size"] for path, info in fs.find(folder, detail=True).items()}
    data = min(path for path in sizes if is_data_file(path, folder, PARQUET_SUFFIXES))
    schema = read_schema(fs, data, sizes[data])
    file = io.BytesIO()
    # Without row groups either: Hugging Face Datasets fails at an empty one.
    pq.ParquetWriter(file, schema.with_metadata({**(schema.metadata or {}), NOTE_KEY: note})).close()
    return file.getvalue()
