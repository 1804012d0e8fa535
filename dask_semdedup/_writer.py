"""Arrow tables as Parquet files."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dask_semdedup._schemas import restore

__all__ = ["write_table"]

# Bytes of a row group: large enough to be read fast, small enough for a reader to take one at a time.
ROW_GROUP_BYTES = 1 << 26


def write_table(table: pa.Table, file: Any, stored: pa.Schema | None = None) -> None:
    """Write a table to a Parquet file, in row groups of a size that suits readers.

    Parameters
    ----------
    table : pyarrow.Table
    file : file object
        Open for writing.
    stored : pyarrow.Schema, optional
        Of the files that the columns come from: they get its types, and the file its metadata.

    Examples
    --------
    >>> import io
    >>> write_table(pa.table({"id": [1]}), file := io.BytesIO(), pa.schema({"id": pa.int64()}, {"made by": "hand"}))
    >>> pq.read_schema(file).metadata
    {b'made by': b'hand'}
    """
    stored = stored or pa.schema([])
    step = max(1, ROW_GROUP_BYTES * len(table) // max(1, table.nbytes))
    schema = restore(table.schema.empty_table(), stored).schema
    # Embeddings do not repeat: a dictionary of them would only be given up after some work.
    repeating = [field.name for field in schema if not pa.types.is_nested(field.type)]
    with pq.ParquetWriter(file, schema, use_dictionary=repeating) as writer:
        for start in range(0, max(1, len(table)), step):
            # Types of files may have offsets that only so few rows fit into.
            writer.write_table(restore(table.slice(start, step), stored).replace_schema_metadata(schema.metadata), step)
