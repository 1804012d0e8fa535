"""Writing frames with a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from dask_semdedup.cli.execution import follow_futures, show_tasks
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
    """Write each partition of a frame to a file of its own with a progress bar, and return the number of rows."""
    written = parts(frame, folder, storage_options)
    if client is None:
        with show_tasks(progress, title, client=None):
            counts = written.compute(scheduler="threads")["rows"]
    else:
        counts = pd.concat(follow_futures(client, client.persist(written), progress, title))["rows"]
    return int(counts.sum())
