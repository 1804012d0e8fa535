"""Files of scores: what their folder may hold, and the clusters in their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from urllib.parse import unquote

import fsspec
import pyarrow as pa

from dask_semdedup.errors import DataReadError
from dask_semdedup.frames.columns import SCORE_COLUMNS
from dask_semdedup.io.folder_keys import Keys, integers_or_names, key_type
from dask_semdedup.io.footers import read_schema
from dask_semdedup.io.staging import Contents
from dask_semdedup.io.write import PART_FILE

__all__ = ["SCORES"]

# The stages' files, one a cluster.
CLUSTER_FILE = re.compile(r"cluster_(.+)\.parquet")


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
    return sorted(set(names) - set(named))


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
