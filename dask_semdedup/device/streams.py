"""CUDA streams of each thread, so that one partition's search does not delay the reading of the next.

Work on the default stream waits for all earlier work that any thread has queued there, and for the copies of KvikIO,
which reads the files; later copies wait for it in turn. While a search fills the GPU and the default stream stalls, no
file is read. Each thread therefore reads, ranks and gathers on a stream of its own (`reading_stream`) and searches on
another (`search_stream`) of lower priority: the first gets multiprocessors as soon as they are free. The default stream
(`default_stream`) is left to what cuDF does by itself, and to frames that are handed on.

Memory belongs to the stream that allocated it, and is reused as soon as that stream reaches its release: if another
stream uses it, the owner must wait for that stream before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

from dask_semdedup.device.devices import only_on

if TYPE_CHECKING:
    import torch

__all__ = ["current_stream", "default_stream", "finish", "owned", "reading_stream", "search_stream"]

# Priorities; the smaller number goes first. The default stream has that of the search.
READING, SEARCH = -1, 0


class _Streams(threading.local):
    """Streams of a thread, by device and priority."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int], torch.cuda.Stream] = {}


_streams = _Streams()


def _stream(priority: int) -> torch.cuda.Stream:
    """Return this thread's stream on the current device, for which the default stream does not wait."""
    import torch

    key = torch.cuda.current_device(), priority
    if key not in _streams.made:
        _streams.made[key] = torch.cuda.Stream(key[0], priority=priority)
    return _streams.made[key]


@only_on("cuda")
def reading_stream() -> AbstractContextManager[None]:
    """Let torch and CuPy work on this thread's stream for reading, after all work queued on the current stream so far.

    On leaving, the host waits until the work is done, unless the context was entered within another one like it.
    """
    return _within(READING)


@only_on("cuda")
def search_stream() -> AbstractContextManager[None]:
    """Let torch and CuPy work on this thread's stream for the search, as in `reading_stream`, which goes first."""
    return _within(SEARCH)


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
        finally:  # After a failure, too, nothing may be released while the GPU still works on it.
            stream.synchronize()


@cache
def _cupy() -> Any:
    """Return CuPy, or None: to search the rows of pandas frames on a GPU, torch is enough."""
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


@only_on("cuda")
def default_stream() -> AbstractContextManager[None]:
    """Let cuDF work by itself, on the default stream, during work on another one, such as `reading_stream`.

    Work queued on the current stream is done first, and its later work waits for that on the default stream. Nothing
    changes if the default stream is the current one.

    Memory allocated within is released on the default stream, which does not wait for the current one: keep it until
    the work on the current stream is done (`finish`), or leave none.
    """
    return _default_stream()


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
    """Return the stream that pylibcudf shall use, or None for its default."""
    import torch

    # Before CUDA is initialized no stream is set. To ask for it would initialize CUDA, or fail without it.
    if not torch.cuda.is_initialized():
        return None
    stream = torch.cuda.current_stream()
    return None if stream == torch.cuda.default_stream() else stream


def finish() -> None:
    """Wait for all work on the current stream; on the default stream, cuDF waits by itself."""
    stream = current_stream()
    if stream is not None:
        stream.synchronize()


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor of `search_stream` that the current stream owns; on a CPU, the tensor itself."""
    import torch

    if tensor.device.type == "cpu":
        return tensor
    copy = tensor.clone()
    _stream(SEARCH).wait_stream(torch.cuda.current_stream())
    return copy
