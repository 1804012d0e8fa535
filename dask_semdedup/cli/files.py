"""Where a command's files go: folders that appear when all of them is written."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import fsspec
import pandas as pd

from dask_semdedup.cli.execution import follow_futures, show_tasks
from dask_semdedup.errors import InvalidArgumentError, some

if TYPE_CHECKING:
    import dask.dataframe as dd
    from distributed import Client
    from rich.progress import Progress

# What a run says of a step, beside the step's files.
MANIFEST = "_manifest.json"


@contextmanager
def staged_folder(
    output_path: str,
    input_path: str,
    *,
    overwrite: bool,
    storage_options: dict[str, Any],
    suffixes: tuple[str, ...] = (".parquet",),
) -> Iterator[str]:
    """Yield the URL of a folder that becomes ``output_path`` when the block succeeds, if that is free.

    With ``overwrite`` it may hold files that end in one of ``suffixes``, as the command's own do, and no others.
    """
    fs, final = fsspec.url_to_fs(output_path.rstrip("/"), **storage_options)
    refuse_overlap(final, fsspec.url_to_fs(input_path.rstrip("/"), **storage_options)[1])
    _refuse_occupied(fs, final, overwrite=overwrite, suffixes=suffixes)
    with replaced_when_done(fs, final) as staged:
        yield staged


@contextmanager
def replaced_when_done(fs: fsspec.AbstractFileSystem, final: str) -> Iterator[str]:
    """Yield the URL of a sibling of a folder that takes its place when the block succeeds.

    When the block fails, the sibling is removed and the folder stays as it was.
    """
    staged = f"{final}.partial-{secrets.token_hex(4)}"
    try:
        # A URL of an absolute path: workers may have other working directories.
        yield fs.unstrip_protocol(staged)
    except BaseException:
        if fs.exists(staged):
            fs.rm(staged, recursive=True)
        raise
    # Should one of these fail, the finished scores stay where they are.
    if fs.exists(final):
        fs.rm(final, recursive=True)
    fs.mv(staged, final, recursive=True)


def refuse_overlap(output: str, source: str) -> None:
    """Keep --overwrite from removing the input, and the input from swallowing scores."""
    if f"{output}/".startswith(f"{source}/") or f"{source}/".startswith(f"{output}/"):
        raise InvalidArgumentError(f"OUTPUT {output!r} and INPUT {source!r} overlap. Name a folder apart from INPUT.")


def _refuse_occupied(fs: fsspec.AbstractFileSystem, output: str, *, overwrite: bool, suffixes: tuple[str, ...]) -> None:
    """Refuse an output that is not free; with ``overwrite``, one that holds other files than a command's."""
    if fs.isfile(output):
        raise InvalidArgumentError(f"OUTPUT {output!r} is a file. Name a folder.")
    files = fs.find(output)
    if files and not overwrite:
        raise InvalidArgumentError(
            f"OUTPUT {output!r} is not empty: {len(files):,} files. Pass --overwrite to replace it, or name another."
        )
    others = [file.removeprefix(f"{output}/") for file in files if not file.endswith((*suffixes, MANIFEST))]
    if others:
        raise InvalidArgumentError(
            f"OUTPUT {output!r} holds files that are not this command's and would be lost: {some(others)}. "
            "Remove it yourself."
        )


def write_frame(
    frame: dd.DataFrame,
    folder: str,
    storage_options: dict[str, Any],
    *,
    client: Client | None,
    progress: Progress,
    title: str,
) -> int:
    """Compute a frame and write each partition to a file of its own, moving a bar as they are done; count the rows."""
    fs, path = fsspec.url_to_fs(folder, **storage_options)
    fs.makedirs(path, exist_ok=True)
    meta = pd.DataFrame({"rows": pd.Series(dtype="int64")})
    written = frame.map_partitions(write_part, folder, storage_options, meta=meta)
    # Optimised here, reading, scoring and writing a partition become one task; compute() alone does not fuse them.
    written = written.optimize()
    if client is None:
        with show_tasks(progress, title, client=None):
            counts = written.compute(scheduler="threads")["rows"]
    else:
        counts = pd.concat(follow_futures(client, client.persist(written), progress, title))["rows"]
    return int(counts.sum())


def write_part(
    rows: Any, folder: str, storage_options: dict[str, Any], partition_info: dict[str, Any] | None = None
) -> pd.DataFrame:
    """Write one partition to ``folder`` and return how many rows it has."""
    number = partition_info["number"] if partition_info else 0
    fs, path = fsspec.url_to_fs(folder, **storage_options)
    # Unlike `fsspec.open`, this does not make the folder anew for a late writer of a run that has failed.
    with fs.open(f"{path}/part.{number:06d}.parquet", "wb") as file:
        rows.to_parquet(file, index=False)
    return pd.DataFrame({"rows": [len(rows)]})
