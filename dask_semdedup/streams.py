"""A CUDA stream for each thread, so that one partition's search does not hold up the reading of the next.

What the default stream is given waits for all that other threads have given to it, and the copies of KvikIO, which
reads the files, wait for it too. Reading, gathering and the search therefore run in a stream of their thread's own.
What is short stays in the default stream, where cuDF does everything.

Memory belongs to the stream that asked for it, and is given away again as soon as that stream has come to its release:
where the default stream uses it, the other must have waited for that before (`catch_up`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from dask_semdedup.memory import share_memory_pool

if TYPE_CHECKING:
    import torch

__all__ = ["beside", "catch_up", "own_stream", "owned", "thread_stream"]


class _Streams(threading.local):
    """The streams of a thread, by device."""

    def __init__(self) -> None:
        self.by_device: dict[int, torch.cuda.Stream] = {}


_streams = _Streams()


def thread_stream() -> torch.cuda.Stream:
    """The stream of this thread on the current device, which the default stream does not wait for."""
    import torch

    device = torch.cuda.current_device()
    if device not in _streams.by_device:
        _streams.by_device[device] = torch.cuda.Stream(device)
    return _streams.by_device[device]


def beside(home: str) -> AbstractContextManager[None]:
    """Let torch and CuPy work in this thread's stream, after what the default stream has been given by now.

    Parameters
    ----------
    home : {"cpu", "cuda"}
        Where the work is; on a CPU nothing changes. On a GPU the work is done when the context is left.

    Examples
    --------
    >>> with beside("cpu"):
    ...     pass
    """
    return _beside() if home == "cuda" else nullcontext()


@contextmanager
def _beside() -> Iterator[None]:
    import torch

    stream = thread_stream()
    catch_up()
    # Nobody uses CuPy who has not imported it: torch alone can search the rows of pandas frames on a GPU.
    cupy = sys.modules.get("cupy")
    with torch.cuda.stream(stream), cupy.cuda.Stream.from_external(stream) if cupy else nullcontext():
        try:
            yield
        finally:  # What failed half way is not released either while the GPU works on it.
            stream.synchronize()


@contextmanager
def own_stream() -> Iterator[torch.cuda.Stream]:
    """Give this thread's stream; when it is left, what belongs to it may be released: see `catch_up`."""
    # Torch can only share a pool that it finds when it first uses CUDA.
    share_memory_pool()
    try:
        yield thread_stream()
    finally:
        catch_up()


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """Bring what was made in this thread's stream into memory of the default stream; on a CPU there is but one kind.

    Examples
    --------
    >>> import torch
    >>> owned(torch.arange(2))
    tensor([0, 1])
    """
    if tensor.device.type == "cpu":
        return tensor
    copy = tensor.clone()
    catch_up()
    return copy


def catch_up() -> None:
    """Let this thread's stream wait for what the default stream has been given by now; the thread does not wait."""
    import torch

    thread_stream().wait_stream(torch.cuda.default_stream())
