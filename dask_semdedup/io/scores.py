"""Files of scores: what a folder of them holds, and the clusters in their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from urllib.parse import unquote

import fsspec
import pyarrow as pa

from dask_semdedup.errors import ClusterError
from dask_semdedup.frames.columns import SCORE_COLUMNS
from dask_semdedup.io.folder_keys import Keys, integers_or_names, key_type
from dask_semdedup.io.footers import read_schema
from dask_semdedup.io.staging import Contents
from dask_semdedup.io.write import PART_FILE

__all__ = ["SCORES"]

# The stages' files, one a cluster.
CLUSTER_FILE = re.compile(r"cluster_(.+)\.parquet")


def _not_of_scores(fs: fsspec.AbstractFileSystem, folder: str, names: Sequence[str]) -> list[str]:
    """Files of other names; all, if the first of them has no scores in it."""
    named = [name for name in names if PART_FILE.fullmatch(name) or CLUSTER_FILE.fullmatch(name)]
    if named:
        path = f"{folder}/{named[0]}"
        try:
            columns = read_schema(fs, path, fs.size(path)).names
        except ClusterError:  # What is damaged may be anything.
            columns = []
        if not set(SCORE_COLUMNS) <= set(columns):
            return list(names)
    return sorted(set(names) - set(named))


SCORES = Contents("scores", _not_of_scores)


def clusters_of_files(files: Collection[str], cluster_field: str) -> Keys | None:
    """Cluster of each file by its name, integers where all are; None where a name has none."""
    matches = {path: CLUSTER_FILE.fullmatch(path.rsplit("/", 1)[-1]) for path in files}
    names = {path: unquote(match[1]) for path, match in matches.items() if match}
    if len(names) < len(files):
        return None
    clusters = integers_or_names(names)
    fields = pa.schema({cluster_field: key_type(clusters.values())})
    return Keys(fields, {path: (cluster,) for path, cluster in clusters.items()})
