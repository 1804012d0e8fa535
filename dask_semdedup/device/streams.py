"""CUDA streams for each thread, so that one partition's search does not hold up the reading of the next.

What the default stream is given waits for all that other threads have given to it and for the copies of KvikIO, which
reads the files; and those that come later wait for it. While it stands still, because a search fills the GPU, no file
is read. Reading, ranking and gathering therefore run in a stream of their thread's own (`reading_stream`), and the
search in another one (`search_stream`): as soon as multiprocessors are free, the first goes first. The default stream
(`default_stream`) keeps what cuDF does by itself, and frames that others will see.

Memory belongs to the stream that asked for it, and is given away again as soon as that stream has come to its release:
where another one uses it, the first must have waited for that before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["current_stream", "default_stream", "finish", "owned", "reading_stream", "search_stream"]

# Priorities, of which the smaller one comes first. The default stream has that of the search.
READING, SEARCH = -1, 0


class _Streams(threading.local):
    """The streams of a thread, by device and priority."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int], torch.cuda.Stream] = {}


_streams = _Streams()


def _stream(priority: int) -> torch.cuda.Stream:
    """The stream of this thread on the current device, which the default stream does not wait for."""
    import torch

    key = torch.cuda.current_device(), priority
    if key not in _streams.made:
        _streams.made[key] = torch.cuda.Stream(key[0], priority=priority)
    return _streams.made[key]


def reading_stream(device: str) -> AbstractContextManager[None]:
    """Let torch and CuPy work in this thread's stream for reading, after what the current stream has been given by now.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        Where the work is; on a CPU nothing changes. On a GPU the work is done when the context is left, unless it was
        entered within another one like it.
    """
    return _within(READING) if device == "cuda" else nullcontext()


def search_stream(device: str) -> AbstractContextManager[None]:
    """Do the same in this thread's stream for the search, after what waits in `reading_stream`.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        Where the work is.
    """
    return _within(SEARCH) if device == "cuda" else nullcontext()


@contextmanager
def _within(priority: int) -> Iterator[None]:
    import torch

    stream = _stream(priority)
    if torch.cuda.current_stream() == stream:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with _set(stream):
        try:
            yield
        finally:  # What failed half way is not released either while the GPU works on it.
            stream.synchronize()


@cache
def _cupy() -> Any:
    """CuPy, or None: torch alone can search the rows of pandas frames on a GPU."""
    try:
        import cupy
    except ImportError:
        return None
    return cupy


@contextmanager
def _set(stream: torch.cuda.Stream) -> Iterator[None]:
    """Make a stream the current one of torch and CuPy."""
    import torch

    cupy = _cupy()
    with torch.cuda.stream(stream), cupy.cuda.Stream.from_external(stream) if cupy else nullcontext():
        yield


def default_stream(device: str) -> AbstractContextManager[None]:
    """Let cuDF do something by itself, in the default stream, in the midst of work in `reading_stream`.

    What the current stream has been given is done before, and later it waits for what the default stream was given.
    Where that is the current stream, nothing changes.

    What is made there is released in the default stream, which does not wait for the current one: keep it until the
    current stream has done with it (`finish`), or leave nothing of it behind.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        Where the work is.
    """
    return _default_stream() if device == "cuda" else nullcontext()


@contextmanager
def _default_stream() -> Iterator[None]:
    import torch

    stream = current_stream()
    if stream is None:
        yield
        return
    stream.synchronize()
    default = torch.cuda.default_stream()
    with _set(default):
        try:
            yield
        finally:
            stream.wait_stream(default)


def current_stream() -> torch.cuda.Stream | None:
    """The stream that pylibcudf is to work in; None for the one that it takes by itself."""
    import torch

    # Nobody is in a stream who has not used CUDA; to ask for it would, and torch need not have been built for it.
    if not torch.cuda.is_initialized():
        return None
    stream = torch.cuda.current_stream()
    return None if stream == torch.cuda.default_stream() else stream


def finish() -> None:
    """Wait until what the current stream has been given is done; not for the default stream, as cuDF does by itself."""
    stream = current_stream()
    if stream is not None:
        stream.synchronize()


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """Bring what was made in this thread's stream for the search into memory of the current stream.

    On a CPU there is but one kind of memory.
    """
    import torch

    if tensor.device.type == "cpu":
        return tensor
    copy = tensor.clone()
    _stream(SEARCH).wait_stream(torch.cuda.current_stream())
    return copy
