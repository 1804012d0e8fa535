"""Rows, frames and files that tests of several modules share, and what is expected of them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import dask
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.dataframe.dask_expr._shuffle import ShuffleBase
from fsspec.implementations.memory import MemoryFileSystem

from dask_semdedup.frames.columns import Columns, SearchOptions
from dask_semdedup.steps.pairwise import pairwise_partition
from dask_semdedup.steps.ranking import RankingStrategy, make_strategy
from tests import oracle
from tests.strategies import STR

# --- Columns of embeddings -------------------------------------------------------------------------------------------

# Numbers that every accepted element type holds exactly.
ROWS = np.array([[1.0, -2.0, 0.5], [0.25, 4.0, -8.0], [0.0, 0.0, 0.0], [3.0, 1.0, 1.0]])
ORDER = np.array([2, 0, 3, 1])


def arrow_series(chunks: list, arrow_type: pa.DataType) -> pd.Series:
    chunked = pa.chunked_array([pa.array(chunk, arrow_type) for chunk in chunks], arrow_type)
    return pd.Series(pd.arrays.ArrowExtensionArray(chunked))


def arrow_lists(
    rows: np.ndarray, element: pa.DataType | None = None, kind: Callable[[pa.DataType], pa.DataType] = pa.list_
) -> pd.Series:
    """Lists of Arrow, one a row; uint16 are the bits of halves."""
    element = element or pa.from_numpy_dtype(rows.dtype)
    values = rows.astype(np.float16).view(np.uint16) if element == pa.uint16() else rows
    return arrow_series([list(values.astype(element.to_pandas_dtype()))], kind(element))


def fixed_size(element: pa.DataType) -> pa.DataType:
    return pa.list_(element, ROWS.shape[1])


def objects(rows: Sequence[Any]) -> pd.Series:
    column = pd.Series([None] * len(rows), dtype=object)
    column[:] = rows
    return column


LAYOUTS = {
    **{
        f"{kind.__name__}<{element}>": arrow_lists(ROWS, element, kind)
        for kind in (pa.list_, pa.large_list, fixed_size)
        for element in (pa.float16(), pa.float32(), pa.float64(), pa.uint16())
    },
    "several chunks": arrow_series([ROWS[:1].tolist(), [], ROWS[1:].tolist()], pa.list_(pa.float32())),
    "several chunks, float64": arrow_series([ROWS[:3].tolist(), ROWS[3:].tolist()], pa.list_(pa.float64())),
    "slice": arrow_lists(np.tile(ROWS, (3, 1)), pa.float32()).iloc[4:8],
    "slice of fixed size": arrow_lists(np.tile(ROWS, (3, 1)), pa.float32(), fixed_size).iloc[4:8],
    "slice over chunks": arrow_series([ROWS[2:].tolist()] + [ROWS.tolist()] * 2, pa.list_(pa.float32())).iloc[2:6],
    "lists": objects(ROWS.tolist()),
    "tuples": objects([tuple(row) for row in ROWS.tolist()]),
    "lists of NumPy numbers": objects([list(row) for row in ROWS]),
    "lists and arrays": objects([ROWS[0], ROWS[1].tolist(), tuple(ROWS[2]), ROWS[3].astype(np.float32)]),
    **{f"arrays of {code}": objects(list(ROWS.astype(code))) for code in ("f2", "f4", "f8", ">f4")},
    "arrays of float16 bits": objects(list(ROWS.astype(np.float16).view(np.uint16))),
    "strided arrays": objects(list(np.repeat(ROWS, 2, axis=1)[:, ::2])),
}

# --- Frames ----------------------------------------------------------------------------------------------------------

NORMED = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [1, 2, 3], [1, 2, 3]], dtype=float)
NORMED /= np.linalg.norm(NORMED, axis=1, keepdims=True)
GOLDEN = pd.DataFrame(
    {
        "id": range(6),
        "embeddings": arrow_lists(NORMED, pa.float32()),
        "centroid": 0,
        "cosine_dist_to_cent": 1 - NORMED @ NORMED[0],
        "l2_dist_to_cent": np.linalg.norm(NORMED - NORMED[0], axis=1),
        "custom_score": [0.1, 0.8, 0.3, 0.9, 0.2, 0.15],
        "priority": [3, 1, 2, 1, 3, 2],
    }
)
# Equal rows are exactly as far from their centroid.
GOLDEN.loc[[0, 4, 5], ["cosine_dist_to_cent", "l2_dist_to_cent"]] = 0.0


def run(frame: pd.DataFrame, ranking: RankingStrategy | None = None, **arguments: Any) -> pd.DataFrame:
    """Scores of a partition; arguments are those of `Columns` and `SearchOptions`."""
    columns = Columns(**{name: arguments.pop(name) for name in ("id", "embedding", "cluster") if name in arguments})
    return pairwise_partition(frame, columns, ranking or make_strategy("hard"), SearchOptions(**arguments))


def check_hard(path: str) -> None:
    """Assert that a file holds the scores of :data:`GOLDEN` as "hard" ranks it."""
    scores = pd.read_parquet(path)
    assert list(scores.columns) == ["id", "max_id", "cosine_sim_score"]
    assert scores["id"].tolist() == [3, 2, 1, 5, 4, 0]
    assert scores["max_id"].tolist() == [3, 3, 2, 1, 5, 5]
    np.testing.assert_allclose(scores["cosine_sim_score"], [0, 0.99961, 0.99819, 0.974631, 1, 1], atol=2e-5)
    assert scores["cosine_sim_score"].dtype == np.float32


def make_frame(seed: int = 0, clusters: int = 9, max_rows: int = 30) -> pd.DataFrame:
    """Random documents in random order, with exact duplicates among them and ties in their distances."""
    rng = np.random.default_rng(seed)
    centroid = np.repeat(np.arange(clusters) * 3, rng.integers(1, max_rows + 1, clusters))
    rows = rng.standard_normal((len(centroid), 8)).astype(np.float32)
    copies = rng.integers(len(rows), size=len(rows) // 3)
    rows[copies] = rows[np.maximum(copies - 1, 0)]
    frame = pd.DataFrame(
        {
            "id": rng.permutation(10 * len(rows))[: len(rows)],
            "embeddings": arrow_lists(rows),
            "centroid": centroid,
            "cosine_dist_to_cent": rng.integers(0, 20, len(rows)) / np.float32(16),
            "text": pd.Series("not needed", range(len(rows)), STR),
        }
    )
    return frame.sample(frac=1, random_state=seed, ignore_index=True)


def expected_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """What ``which_to_keep="hard"`` must give, by the float64 oracle."""
    ranked = frame.sort_values(
        ["centroid", "cosine_dist_to_cent", "id"], ascending=[True, False, False], ignore_index=True
    )
    segments = np.append(np.flatnonzero(~ranked.centroid.duplicated()), len(ranked))
    scores, index = oracle.nearest_earlier(np.array(ranked.embeddings.to_list()), segments)
    return pd.DataFrame(
        {
            "id": ranked.id,
            "max_id": ranked.id.to_numpy()[index],
            "cosine_sim_score": scores.astype(np.float32),
            "centroid": ranked.centroid,
        }
    )


def blobs(n: int, k: int = 4, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around k far corners, of any length, and their corners' numbers."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(k, size=n)
    rows = np.eye(width)[labels] + 0.05 * rng.standard_normal((n, width))
    return (rows * rng.uniform(0.1, 10, (n, 1))).astype(np.float32), labels


def in_partitions(frame: pd.DataFrame, npartitions: int = 4) -> dd.DataFrame:
    return dd.from_pandas(frame, npartitions=npartitions, sort=False)


def partition_frames(ddf: dd.DataFrame) -> list[pd.DataFrame]:
    return list(dask.compute(*ddf.to_delayed(), scheduler="synchronous"))


def clusters_are_whole(ddf: dd.DataFrame, cluster_field: str = "centroid") -> bool:
    seen: set[object] = set()
    for frame in partition_frames(ddf[[cluster_field]]):
        clusters = set(frame[cluster_field].unique())
        if seen & clusters:
            return False
        seen |= clusters
    return True


def shuffles(ddf: dd.DataFrame) -> list[object]:
    return list(ddf.optimize(fuse=False).expr.find_operations(ShuffleBase))


# --- Files -----------------------------------------------------------------------------------------------------------


def by_cluster(frame: pd.DataFrame, files: int = 2) -> dict[Any, list[pd.DataFrame]]:
    """Clusters as :func:`write_layout` takes them, the rows of each dealt out to several files."""
    return {cluster: [rows[part::files] for part in range(files)] for cluster, rows in frame.groupby("centroid")}


def write_layout(root: Path | str, clusters: Mapping[Any, Sequence[pd.DataFrame | pa.Table]]) -> Path | str:
    """Write the files of each cluster, ``centroid=<cluster>/part.<number>.parquet``, and return the folder."""
    fs, folder = fsspec.url_to_fs(str(root))
    for cluster, files in clusters.items():
        fs.makedirs(f"{folder}/centroid={cluster}", exist_ok=True)
        for number, rows in enumerate(files):
            table = rows
            if isinstance(rows, pd.DataFrame):
                table = pa.Table.from_pandas(rows.drop(columns="centroid", errors="ignore"), preserve_index=False)
            with fs.open(f"{folder}/centroid={cluster}/part.{number}.parquet", "wb") as file:
                pq.write_table(table, file)
    return root


def write_random_layout(root: Path | str, sizes: Mapping[int | str, Sequence[int]]) -> pd.DataFrame:
    """Write files of so many rows for each cluster, and return what they hold, by clusters and ids."""
    clusters: dict[int | str, list[pa.Table]] = {cluster: [] for cluster in sizes}
    first_id, width = 0, 4
    for number, (cluster, files) in enumerate(sizes.items()):
        for rows in files:
            rng = np.random.default_rng([number, first_id])
            columns = {
                "id": np.arange(first_id, first_id + rows),
                "embeddings": pa.array(
                    list(rng.standard_normal((rows, width)).astype(np.float32)), pa.list_(pa.float32())
                ),
                "cosine_dist_to_cent": rng.random(rows).astype(np.float32),
                "text": pa.array([f"text {first_id + row}" for row in range(rows)], pa.string()),
            }
            clusters[cluster].append(pa.table(columns))
            first_id += rows
    write_layout(root, clusters)
    frames = [table.to_pandas().assign(centroid=cluster) for cluster, files in clusters.items() for table in files]
    return pd.concat(frames).sort_values(["centroid", "id"], ignore_index=True)


# Documents as lines of JSON.
RECORDS = [
    {"id": f"d{number}", "text": f"text {number}\nwith lines", "embeddings": [number, 0.5]} for number in range(50)
]


def write_json(path: Path, rows: list[dict], compress: bool = False) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if compress else text)
    return path


# --- The command -----------------------------------------------------------------------------------------------------


def assert_one_line(message: str, *words: str) -> None:
    """Assert that an error of the command is one line with these words, after lines of finished steps."""
    *finished, error = message.splitlines()
    assert all(re.fullmatch(r"[a-z]+: .* s", line) for line in finished), message
    assert error.startswith("Error: "), message
    for word in words:
        assert word in error


# --- Object storage --------------------------------------------------------------------------------------------------


class ObjectStore(MemoryFileSystem):
    """``store://``: like object storage it has no renames, and unlike ``memory://`` a command may write to it."""

    protocol = "store"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("store://", "memory://", 1))
