"""How a command writes frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dask_semdedup.cli.execution import follow_futures, show_tasks
from dask_semdedup.embeddings import is_cudf

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
        if is_cudf(rows):
            rows.to_parquet(file, index=False)
        else:
            # Without pandas' own metadata: pandas cannot read what it says there of columns of lists.
            pq.write_table(pa.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata(None), file)
    return pd.DataFrame({"rows": [len(rows)]})
