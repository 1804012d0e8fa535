"""The file of real embeddings that several benchmarks use, and its true duplicates."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from dask_semdedup.search import nearest_earlier

ROWS = 40_000
DEFAULT_DATA = Path("~/.cache/dask-semdedup/debian.parquet").expanduser()
EXAMPLE = Path(__file__).parent.parent / "examples" / "debian.py"


def ensure_data(path: Path) -> Path:
    """Make the file with the example of Debian's descriptions unless it is there: on two cores, ten minutes."""
    if not path.exists():
        subprocess.run([sys.executable, EXAMPLE, path, "--limit", str(ROWS)], check=True)
    return path


def read_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ids and the embeddings of a file, those as they are in Arrow's memory."""
    table = pq.read_table(path, columns=["id", "embeddings"])
    lists = table["embeddings"].combine_chunks()
    return table["id"].to_numpy(), lists.flatten().to_numpy().reshape(len(lists), -1)


@dataclass(frozen=True)
class Truth:
    """Scores of an exact search without clusters, in which rows with smaller ids are preferred."""

    ids: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, rows: np.ndarray) -> Truth:
        """Search all rows as one segment."""
        order = np.argsort(ids)
        scores, _ = nearest_earlier(torch.from_numpy(rows[order]), torch.tensor([0, len(rows)]))
        return cls(ids[order], scores.numpy())

    def duplicates(self, eps: float) -> np.ndarray:
        """Ids of the rows that are at least ``1 - eps`` similar to one preferred over them."""
        return self.ids[self.scores >= 1 - eps]

    def recall(self, found: np.ndarray, eps: float) -> float:
        """Share of the true duplicates that were found."""
        return float(np.isin(self.duplicates(eps), found).mean())
