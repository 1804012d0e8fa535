"""Where work runs, and on how many cores: what searches, assignments and models on one machine agree on."""

from __future__ import annotations

import numpy as np
from dask.system import CPU_COUNT

from dask_semdedup._validate import check_choice
from dask_semdedup.errors import InvalidArgumentError

__all__ = [
    "DEVICES",
    "DEVICE_OF_BACKEND",
    "check_device",
    "choose_device",
    "cores_per_gpu",
    "has_cuda",
    "pairs_of",
    "visible_gpus",
]

DEVICES = ("auto", "cpu", "cuda")

# Where the frames of each backend are.
DEVICE_OF_BACKEND = {"pandas": "cpu", "cudf": "cuda"}

# Pairs of rows from which on a GPU repays the way to it: 2,000 rows of 384 took an H200 half as long as 16 cores.
PAIRS_WORTH_A_GPU = 2_000_000


def check_device(device: str) -> None:
    """Raise `InvalidArgumentError` unless a device is one of `DEVICES`, and there."""
    check_choice("device", device, DEVICES)
    if device == "cuda" and not has_cuda():
        raise InvalidArgumentError(
            "device is 'cuda', but torch sees no CUDA device. Use device='cpu' or 'auto', or install a torch with CUDA."
        )


def choose_device(device: str, frame_device: str, segments: np.ndarray) -> str:
    """Where to search: as told, else where the frame is, or on a GPU that is there if the work repays the way to it.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
    frame_device : {"cpu", "cuda"}
        Where the frame is.
    segments : numpy.ndarray
        (k + 1,) offsets of the clusters: every pair of rows of one is work.
    """
    if device != "auto":
        return device
    return "cuda" if pairs_of(segments) >= PAIRS_WORTH_A_GPU and has_cuda() else frame_device


def pairs_of(segments: np.ndarray) -> float:
    """About how many pairs of rows clusters have: half the squares of their rows.

    Parameters
    ----------
    segments : numpy.ndarray
        (k + 1,) offsets of the clusters.
    """
    return float(np.square(np.diff(segments), dtype=np.float64).sum() / 2)


def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def visible_gpus() -> int:
    """How many GPUs this process sees, as which it takes one that it does not."""
    import torch

    # Asks the driver, and does not make torch use CUDA.
    return max(1, torch.cuda.device_count())


def cores_per_gpu() -> int:
    """The share that a GPU has of the machine's cores, where each has a process of its own.

    Dask-CUDA shows all GPUs to each of its workers.
    """
    return max(1, CPU_COUNT // visible_gpus())
