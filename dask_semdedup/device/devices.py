"""The choice of a device for each search, and the number of GPUs and cores of this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec

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
    "only_on",
    "pairs_of",
    "visible_gpus",
]

DEVICES = ("auto", "cpu", "cuda")

# The device that holds the frames of each backend.
DEVICE_OF_BACKEND = {"pandas": "cpu", "cudf": "cuda"}

# Rows are copied to a GPU to be searched from this many pairs on: 2,000 rows of 384 dimensions took an H200, copy
# included, half as long as 16 cores.
PAIRS_WORTH_A_GPU = 2_000_000

P = ParamSpec("P")


def check_device(device: str) -> None:
    """Raise `InvalidArgumentError` unless a device is one of `DEVICES` and available."""
    check_choice("device", device, DEVICES)
    if device == "cuda" and not has_cuda():
        raise InvalidArgumentError(
            "device is 'cuda', but torch sees no CUDA device. Use device='cpu' or 'auto', or install torch with CUDA.",
            parameters=["device"],
        )


def choose_device(device: str, frame_device: str, segments: np.ndarray) -> str:
    """Return the device to search on: "cpu" or "cuda".

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        "auto" searches on the frame's device, or on an available GPU if there are enough pairs to repay the copy.
    frame_device : {"cpu", "cuda"}
        The device that holds the frame.
    segments : numpy.ndarray
        (k + 1,) offsets of the clusters, within which every pair of rows is compared.
    """
    if device != "auto":
        return device
    return "cuda" if pairs_of(segments) >= PAIRS_WORTH_A_GPU and has_cuda() else frame_device


def pairs_of(segments: np.ndarray) -> float:
    """Return about how many pairs of rows clusters have: half the squares of their numbers of rows.

    Parameters
    ----------
    segments : numpy.ndarray
        (k + 1,) offsets of the clusters.
    """
    return float(np.square(np.diff(segments), dtype=np.float64).sum() / 2)


def has_cuda() -> bool:
    """Return whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def visible_gpus() -> int:
    """Return the number of GPUs that this process sees, at least 1."""
    import torch

    # This asks the driver and does not initialize CUDA in torch.
    return max(1, torch.cuda.device_count())


def cores_per_gpu() -> int:
    """Return the number of cores per GPU of this machine, for workers that have one GPU each.

    Each worker of Dask-CUDA still sees all GPUs.
    """
    return max(1, CPU_COUNT // visible_gpus())


def only_on(
    kind: str,
) -> Callable[[Callable[P, AbstractContextManager[None]]], Callable[Concatenate[str, P], AbstractContextManager[None]]]:
    """Return a decorator that gives a context manager a first parameter, `device`: on any but `kind` it does nothing.

    Parameters
    ----------
    kind : {"cpu", "cuda"}
    """

    def decorate(
        enter: Callable[P, AbstractContextManager[None]],
    ) -> Callable[Concatenate[str, P], AbstractContextManager[None]]:
        @wraps(enter)
        def on_device(device: str, /, *args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[None]:
            return enter(*args, **kwargs) if device == kind else nullcontext()

        return on_device

    return decorate
