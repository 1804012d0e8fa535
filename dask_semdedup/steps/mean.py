"""The mean of all rows, which ranks rows without clusters: the same bits for any order and partitioning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_semdedup.frames.backend import array_like, column_like, tensor_like
from dask_semdedup.frames.columns import DISTANCE_COLUMNS
from dask_semdedup.steps.kmeans import CHUNK_BYTES

if TYPE_CHECKING:
    import torch

__all__ = ["mean_of", "total_of", "with_distances"]

# Coordinates of unit rows are multiples of its inverse in the sum of all: integers, whose order does not matter.
FIXED_POINT = 2.0**32


def total_of(rows: torch.Tensor, device: str) -> np.ndarray:
    """Return the (d,) int64 sum of unit rows, in fixed point, computed on a device."""
    sums = [(unit * FIXED_POINT).round_().long().sum(dim=0) for unit in _unit64(rows, device)]
    return sum((part.cpu().numpy() for part in sums), np.zeros(rows.shape[1], np.int64))


def mean_of(totals: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
    """Return the (d,) float64 mean of all unit rows, from sums and numbers of rows."""
    total, count = (sum(parts) for parts in zip(*totals, strict=True))
    return np.asarray(total / FIXED_POINT / max(1, count))


def with_distances(frame: Any, parts: Sequence[torch.Tensor], mean: np.ndarray, device: str) -> Any:
    """Return a frame with the distances of its rows to the mean, in the columns of k-means.

    Parameters
    ----------
    frame : DataFrame
    parts : sequence of torch.Tensor
        (n_i, d) float32 embeddings, of all rows together.
    mean : numpy.ndarray
        (d,) float64.
    device : {"cpu", "cuda"}
        Device that computes the distances.
    """
    import torch

    from dask_semdedup.search.certify import snap

    centre = tensor_like(mean).to(device)
    length = torch.linalg.vector_norm(centre)
    direction = centre / length if length else centre
    found: dict[str, list[torch.Tensor]] = {"l2": [], "cosine": []}
    for part in parts:
        for unit in _unit64(part, device):
            found["cosine"].append(1 - unit @ direction)
            found["l2"].append(torch.linalg.vector_norm(unit.sub_(centre), dim=1))
    # No machine's order of summation decides between them.
    snapped = {metric: snap(torch.cat(distances)) for metric, distances in found.items()}
    values = {
        name: column_like(array_like(snapped[metric], frame), frame[frame.columns[0]])
        for metric, name in DISTANCE_COLUMNS.items()
    }
    return frame.reset_index(drop=True).assign(**values)


def _unit64(rows: torch.Tensor, device: str) -> Iterator[torch.Tensor]:
    """Yield the unit rows in float64 on a device, some at a time; zero rows stay zero."""
    import torch

    from dask_semdedup.search.certify import chunks

    for chunk in chunks(len(rows), 8 * rows.shape[1], CHUNK_BYTES[device]):
        unit = rows[chunk].to(device).double()
        norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
        yield unit.div_(torch.where(norm > 0, norm, 1.0))
