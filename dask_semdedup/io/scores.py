"""Files of scores: the contents of their folder, the clusters in their names, and the number of rows compared."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dask_semdedup.errors import DataReadError
from dask_semdedup.frames.columns import SCORE_COLUMNS
from dask_semdedup.io.folder_keys import Keys, integers_or_names, key_type
from dask_semdedup.io.footers import read_schema
from dask_semdedup.io.notes import read_note, write_note
from dask_semdedup.io.targets import Contents
from dask_semdedup.io.write import PART_FILE

__all__ = ["COMPARED", "SCORES", "Compared", "clusters_of_files", "read_compared", "write_compared"]

# The stages' files, one a cluster.
CLUSTER_FILE = re.compile(r"cluster_(.+)\.parquet")

# The note of `Compared`, in which readers of the folder find no rows.
COMPARED = "_compared.parquet"


def _not_of_scores(fs: fsspec.AbstractFileSystem, folder: str, names: Sequence[str]) -> list[str]:
    """Return the files that have other names, or all files if the first does not hold scores."""
    named = [name for name in names if PART_FILE.fullmatch(name) or CLUSTER_FILE.fullmatch(name)]
    if named:
        path = f"{folder}/{named[0]}"
        try:
            columns = read_schema(fs, path, fs.size(path)).names
        except DataReadError:  # A damaged file may have been anything.
            columns = []
        if not set(SCORE_COLUMNS) <= set(columns):
            return list(names)
    return sorted(set(names) - {*named, COMPARED})


SCORES = Contents("scores", _not_of_scores)


def clusters_of_files(files: Collection[str], key: str) -> Keys | None:
    """Return the cluster of each file from its name, as column `key`, or None if a name has no cluster."""
    matches = {path: CLUSTER_FILE.fullmatch(path.rsplit("/", 1)[-1]) for path in files}
    names = {path: unquote(match[1]) for path, match in matches.items() if match}
    if len(names) < len(files):
        return None
    clusters = integers_or_names(names)
    fields = pa.schema({key: key_type(clusters.values())})
    return Keys(fields, {path: (cluster,) for path, cluster in clusters.items()})


@dataclass(frozen=True)
class Compared:
    """The rows that were compared, if only scores up to an eps were stored.

    Parameters
    ----------
    eps : float
        The eps up to which scores were stored.
    rows : pandas.Series of int64, or int
        The number of rows of each cluster; without clusters, of all rows.
    """

    eps: float
    rows: pd.Series | int

    @property
    def clusters(self) -> pd.Series | None:
        """The number of rows of each cluster; None if rows were compared without clusters."""
        return None if isinstance(self.rows, int) else self.rows

    @property
    def total(self) -> int:
        """The number of all rows."""
        return self.rows if isinstance(self.rows, int) else int(self.rows.sum())


def write_compared(compared: Compared, folder: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Write what was compared into a folder of scores, once one of them is there."""
    fs, path = fsspec.url_to_fs(folder, **(storage_options or {}))
    rows = compared.clusters
    columns = {"rows": [compared.total]} if rows is None else {"cluster": rows.index, "rows": rows.to_numpy()}
    table = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"eps": repr(compared.eps)}), file)
    # As a table, since clusters may be of any type, such as dates.
    write_note(fs, f"{path}/{COMPARED}", base64.b64encode(file.getvalue()).decode())


def read_compared(folder: str, storage_options: Mapping[str, Any] | None = None) -> Compared | None:
    """Read what was compared for a folder of scores. None if it holds the scores of all rows."""
    fs, path = fsspec.url_to_fs(folder, **(storage_options or {}))
    name = f"{path.rstrip('/')}/{COMPARED}"
    if not fs.exists(name):
        return None
    try:
        table = pq.read_table(io.BytesIO(base64.b64decode(read_note(fs, name))))
        eps, rows = float(table.schema.metadata[b"eps"]), table.column("rows")
        if "cluster" in table.column_names:
            return Compared(eps, rows.to_pandas().set_axis(table.column("cluster").to_pandas()))
        (count,) = rows.to_pylist()
        return Compared(eps, int(count))
    except (ValueError, KeyError, TypeError) as error:  # Arrow's are of the first kind.
        raise DataReadError(
            f"{name} does not say which rows were compared ({error}). Make the scores again."
        ) from error
