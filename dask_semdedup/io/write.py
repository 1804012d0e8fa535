"""Writing Parquet: tables, the files of partitions, and those of the stages."""

from __future__ import annotations

import io
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.system import CPU_COUNT

from dask_semdedup.errors import OutputError
from dask_semdedup.frames.backend import is_cudf, to_arrow, to_host
from dask_semdedup.io.footers import fetch_footers, read_metadata
from dask_semdedup.io.listing import THREADS, is_local
from dask_semdedup.io.schemas import restore
from dask_semdedup.io.targets import Contents

__all__ = [
    "PARTS",
    "finished_parts",
    "whole_file",
    "write_cluster",
    "write_clusters",
    "write_part",
    "write_table",
    "writing",
]

# Bytes of a row group: large enough to be read fast, small enough to be read one at a time.
ROW_GROUP_BYTES = 1 << 26


def write_table(
    table: pa.Table, file: Any, stored: pa.Schema | None = None, *, least_groups: int = 0, **options: Any
) -> None:
    """Write a table to a Parquet file, in row groups of a size that suits readers.

    Parameters
    ----------
    table : pyarrow.Table
    file : file object
        Open for writing.
    stored : pyarrow.Schema, optional
        The schema of the files that the columns come from. The columns get its types, and the file its metadata.
    least_groups : {0, 1}
        Row groups of a table without rows. pandas writes one, at which Hugging Face Datasets fails.
    **options
        Those of `ARROW_OPTIONS`.
    """
    step = options.pop("row_group_size", None) or max(1, ROW_GROUP_BYTES * len(table) // max(1, table.nbytes))
    schema = table.schema if stored is None else restore(table.schema.empty_table(), stored).schema
    # Embeddings do not repeat: a dictionary of them would only be given up after some work.
    repeating = [field.name for field in schema if not pa.types.is_nested(field.type)]
    options = {"use_dictionary": repeating, "write_page_checksum": True, **options}
    with pq.ParquetWriter(file, schema, **options) as writer:
        for start in range(0, max(least_groups, len(table)), step):
            rows = table.slice(start, step)
            # The stored types may have 32-bit offsets, which suffice for the rows of a group.
            rows = rows if stored is None else restore(rows, stored).replace_schema_metadata(schema.metadata)
            writer.write_table(rows, step)


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn an `OSError` in the block into an `OutputError` that names the path."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error}") from error


# The stages' files are those of pandas, byte for byte.
AS_PANDAS = {"row_group_size": 2**20, "write_page_checksum": False, "least_groups": 1}

# Local files that a partition writes at once; other partitions write theirs at the same time.
LOCAL_WRITERS = max(1, min(4, CPU_COUNT // 4))

# Arguments of `to_parquet` of pandas that mean the same to Arrow's writer.
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
    """Write the scores of one cluster to ``<output_path>/cluster_<k>.parquet``, completely or not at all.

    The file is written under a temporary name in the same folder and then renamed. The temporary name does not end in
    ``.parquet``, so that readers do not take it for data.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        The scores, whose index is not written.
    output_path : str or path-like
        The folder, which is created if it is missing: local, or a URL that fsspec understands.
    cluster : int or str
        The cluster. It is quoted in the file's name as in a URL, so that it may hold slashes.
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
        Scores of all clusters. A cuDF frame is copied to the host at once.
    rows : mapping from cluster to range
        The positions of each cluster's rows.
    output_path, **write_kwargs
        As for `write_cluster`.

    Returns
    -------
    dict
        From cluster to the path of its file.

    Raises
    ------
    OutputError
        If a file cannot be written. Some of the others may have been.
    """
    folder = os.fspath(output_path).rstrip("/")
    fs, root = fsspec.core.url_to_fs(folder, **(write_kwargs.pop("storage_options", None) or {}))
    encode = _encoder(frame, write_kwargs)
    names = {cluster: f"cluster_{quote(str(cluster), safe='')}.parquet" for cluster in rows}
    with writing(root):
        fs.makedirs(root, exist_ok=True)

    def write(cluster: int | str) -> None:
        _write_whole(fs, f"{root}/{names[cluster]}", encode(rows[cluster]))

    threads = LOCAL_WRITERS if is_local(fs) else THREADS
    with ThreadPoolExecutor(max(1, min(threads, len(rows))), thread_name_prefix="write") as pool:
        list(pool.map(write, rows))
    return {cluster: f"{folder}/{name}" for cluster, name in names.items()}


def _encoder(frame: Any, options: Mapping[str, Any]) -> Callable[[range], bytes | pa.Buffer]:
    """Return a function that turns rows of a frame into a Parquet file. If it can, it converts the frame only once."""
    if options.keys() <= ARROW_OPTIONS:
        table = to_arrow(frame)

        def encode(rows: range) -> pa.Buffer:
            sink = pa.BufferOutputStream()
            write_table(table.slice(rows.start, len(rows)), sink, **{**AS_PANDAS, **options})
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
        with writing(final):
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
        # Its `mv` would first ask whether either path is a folder.
        fs.cp_file(temporary, final)
        fs.rm_file(temporary)
    else:
        fs.mv(temporary, final)


# Names of the files of partitions, as this package and Dask write them.
PART_FILE = re.compile(r"part\.\d+\.parquet")


def _not_of_parts(_fs: fsspec.AbstractFileSystem, _folder: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if not PART_FILE.fullmatch(name)]


PARTS = Contents("parts of a frame", _not_of_parts)


def write_part(
    rows: Any, number: int, folder: str, storage_options: Mapping[str, Any], stored: pa.Schema | None = None
) -> pd.DataFrame:
    """Write one partition to a file of a folder, completely or not at all, and return its number of rows.

    A part with its final name is complete and on disk, so a later run can rely on it.
    """
    fs, root = fsspec.url_to_fs(folder, **storage_options)
    # Beside the folder: it may get another name, and late writers of a run that was killed must leave nothing in it.
    with whole_file(fs, f"{root}/{part_name(number)}", f"{root}.{part_name(number)}") as file:
        _write_rows(rows, file, stored)
    return pd.DataFrame({"rows": [len(rows)]})


@contextmanager
def whole_file(fs: fsspec.AbstractFileSystem, final: str, temporary: str) -> Iterator[Any]:
    """Open a file to write that has its final name only once it is complete and on disk.

    Until then, a local file has the `temporary` name and a suffix.
    """
    with writing(final):
        if not is_local(fs):
            # An object appears when all of it is there.
            with fs.open(final, "wb") as file:
                yield file
            return
        temporary = f"{temporary}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, final)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def part_name(number: int) -> str:
    """Return the name of the file of a partition."""
    return f"part.{number:06d}.parquet"


def _write_rows(rows: Any, file: Any, stored: pa.Schema | None) -> None:
    if is_cudf(rows) and any(type(dtype).__name__ in ("ListDtype", "StructDtype") for dtype in rows.dtypes):
        # A GPU encodes embeddings faster, but without the types and the metadata of `stored`.
        rows.to_parquet(file, index=False)
    else:
        write_table(to_arrow(rows), file, stored)


def finished_parts(folder: str, storage_options: Mapping[str, Any]) -> dict[int, int]:
    """Return the number of rows of each part that a stopped run has left in a folder, by the number of its partition.

    The folder is created if it is missing.
    """
    fs, root = fsspec.url_to_fs(folder, **storage_options)
    fs.makedirs(root, exist_ok=True)
    files = {
        path: info for path, info in fs.find(root, detail=True).items() if PART_FILE.fullmatch(path[len(root) + 1 :])
    }
    if not files:
        return {}
    footers = fetch_footers(fs, {path: info["size"] for path, info in files.items()})
    rows = [read_metadata(fs, path, footer).num_rows for path, footer in zip(files, footers, strict=True)]
    return {int(path.rpartition("/")[2].split(".")[1]): count for path, count in zip(files, rows, strict=True)}
