"""Files of scores: the contents of their folder, the clusters in their names, and the number of rows compared."""

from __future__ import annotations

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
from dask_semdedup.io.targets import Contents
from dask_semdedup.io.write import PART_FILE, writing

__all__ = ["COMPARED", "SCORES", "Compared", "clusters_of_files", "read_compared", "write_compared"]

# The stages' files, one a cluster.
CLUSTER_FILE = re.compile(r"cluster_(.+)\.parquet")

# The file of `Compared`, which is Parquet. Neither readers of the folder nor the pattern `*.parquet` find it.
COMPARED = "_compared"


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
    """Write what was compared into a folder of scores."""
    fs, path = fsspec.url_to_fs(folder, **(storage_options or {}))
    rows = compared.clusters
    columns = {"rows": [compared.total]} if rows is None else {"cluster": rows.index, "rows": rows.to_numpy()}
    table = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
    with writing(name := f"{path}/{COMPARED}"), fs.open(name, "wb") as file:
        pq.write_table(table.replace_schema_metadata({"eps": repr(compared.eps)}), file)


def read_compared(folder: str, storage_options: Mapping[str, Any] | None = None) -> Compared | None:
    """Read what was compared for a folder of scores. None if it holds the scores of all rows."""
    fs, path = fsspec.url_to_fs(folder, **(storage_options or {}))
    name = f"{path.rstrip('/')}/{COMPARED}"
    if not fs.exists(name):
        return None
    try:
        with fs.open(name, "rb") as file:
            table = pq.read_table(file)
        eps, rows = float(table.schema.metadata[b"eps"]), table.column("rows")
        if "cluster" in table.column_names:
            return Compared(eps, rows.to_pandas().set_axis(table.column("cluster").to_pandas()))
        (count,) = rows.to_pylist()
        return Compared(eps, int(count))
    except (ValueError, KeyError, TypeError) as error:  # Arrow's are of the first kind.
        raise DataReadError(
            f"{name} does not say which rows were compared ({error}). Make the scores again."
        ) from error
