"""Writing: tables as Parquet, the files of one partition, and those of the stages."""

from __future__ import annotations

import io
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.system import CPU_COUNT

from dask_semdedup.frames.backend import is_cudf, to_arrow, to_host
from dask_semdedup.io.footers import REMOTE_THREADS
from dask_semdedup.io.listing import is_local
from dask_semdedup.io.schemas import restore
from dask_semdedup.io.staging import Contents

__all__ = ["PARTS", "write_cluster", "write_clusters", "write_part", "write_table"]

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


def _not_of_parts(_fs: fsspec.AbstractFileSystem, _folder: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if not PART_FILE.fullmatch(name)]


PARTS = Contents("parts of a frame", _not_of_parts)


def write_part(
    rows: Any,
    folder: str,
    storage_options: Mapping[str, Any],
    stored: pa.Schema | None = None,
    partition_info: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """Write one partition to ``folder`` and return how many rows it has."""
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


# Those of the command, and of Dask.
PART_FILE = re.compile(r"part\.\d+\.parquet")
