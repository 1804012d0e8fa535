"""Writing frames with a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from dask_semdedup.cli.execution import follow_futures, show_tasks
from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.io.results import Results
from dask_semdedup.io.staging import results_beside
from dask_semdedup.lazy.join import saving_results
from dask_semdedup.lazy.tasks import compute_to_the_end
from dask_semdedup.lazy.workers import check_memory
from dask_semdedup.lazy.writing import parts

if TYPE_CHECKING:
    import dask.dataframe as dd
    from distributed import Client
    from rich.progress import Progress


def write_frame(
    frame: dd.DataFrame,
    folder: str,
    storage_options: dict[str, Any],
    *,
    client: Client | None,
    progress: Progress,
    title: str,
) -> int:
    """Write each partition of a frame to a file of its own with a progress bar, and return the number of rows.

    What a stopped run has written is used, and said.
    """
    frame, saved, tasks = saving_results(frame, Results(results_beside(folder), storage_options))
    found, rest = parts(frame, folder, storage_options)
    rows = sum(found.values())
    if saved and rest is not None:
        progress.console.print(f"{title}: {saved:,} of {tasks:,} comparisons were there already.")
    if found:
        progress.console.print(f"{title}: {len(found):,} of {frame.npartitions:,} parts were there already.")
    if rest is None:
        return rows
    if client is None:
        with show_tasks(progress, title, client=None):
            counts = compute_to_the_end(rest)["rows"]
    else:
        check_memory(client, frame)
        counts = pd.concat(follow_futures(client, rest, progress, title))["rows"]
    return rows + int(counts.sum())


def work_of(frame: dd.DataFrame) -> dict[str, str]:
    """Return what decides on the bytes of a frame's files, beside the options: its partitions, and versions."""
    import pyarrow as pa

    import dask_semdedup

    return {
        "versions": f"dask-semdedup {dask_semdedup.__version__}, pyarrow {pa.__version__}",
        "partitions": f"{frame._name} of {frame.npartitions}",
    }


def refuse_memory_output(path: str) -> None:
    """Raise if what is written would be gone when the command ends."""
    if "memory://" in path:
        raise InvalidArgumentError(
            f"{path} is in the memory of this process, which ends with the command, so nothing would be left. Name a "
            "folder on a disk or in object storage."
        )
