"""The search of rows that lie in host memory, on a GPU whose memory need not hold them.

Segments are cut into *jobs* that fit the device. While one job is searched, the rows of the next one are on their
way: through two pinned staging buffers, on a stream of their own, into the other of two row buffers. Those are
allocated once, and streams wait for each other by events: no allocator has to know who still uses what.

A segment that is too large for the device is cut into chunks A1, ..., Am in rank order. The segments [Ai; Aj] of all
i < j are searched, the rows of Ai as candidates only, and a row of Aj keeps its best answer over i. No pair of rows is
multiplied twice.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Any

import torch

from dask_semdedup.search import _check, certify, nearest_earlier

__all__ = ["nearest_earlier_from_host"]

STAGING_BYTES = 32 << 20
"""Bytes of each of the two pinned buffers that rows pass through on their way to the device."""

WORKSPACE = 256 << 20
"""Bytes that a search may take beyond what grows with its rows."""

MIN_ROWS = 4096
"""Rows of a job that a search asks for even if there is no memory for them."""

MARGIN = 4e-6
"""Scores are within 2e-6 of float64: where two differ by more than twice that, they are in the right order."""


def nearest_earlier_from_host(
    rows: torch.Tensor,
    segments: torch.Tensor,
    *,
    device: torch.device | str,
    stops: torch.Tensor | None = None,
    compute_dtype: str = "auto",
    batch_size: int | None = None,
    memory_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find for every row in host memory its most similar earlier row of the same segment, searching on `device`.

    Parameters
    ----------
    rows : torch.Tensor
        (n, d) finite floating-point rows on the CPU, in rank order within each segment. Pageable memory will do.
    segments : torch.Tensor
        (k + 1,) integer offsets, from 0 to n, not descending.
    device : torch.device or str
        Where to search. In a process one search at a time has a GPU: it is told how much memory is free, and that
        must stay true.
    stops, compute_dtype, batch_size
        Of the search: see `dask_semdedup.search.nearest_earlier`.
    memory_bytes : int, optional
        Bytes of the device's memory that the search may take. By default what is free.

    Returns
    -------
    scores : torch.Tensor
        (n,) float32 on the CPU.
    index : torch.Tensor
        (n,) int64 on the CPU. Both as of `dask_semdedup.search.nearest_earlier`; exact also where a segment is larger
        than the device's memory. There, answers whose scores are too near to each other for float32 are decided in
        float64, on the host.

    Raises
    ------
    ValueError
        If an argument is not one of those allowed.
    """
    segments, stops = _check(rows, segments, stops, compute_dtype, batch_size)
    rows = certify.as_float32(rows)
    # Two threads that come first at once must not get a way each.
    with _making:
        link = _link(_with_index(torch.device(device)))
    scores = torch.zeros(len(rows))
    index = torch.arange(len(rows))
    is_exact = compute_dtype == "auto"
    with link.lock:
        # Where nothing is free, to run out of memory is better than a search of a few rows at a time.
        least = WORKSPACE + MIN_ROWS * row_bytes(rows.shape[1])
        available = max(link.free_bytes(), least) if memory_bytes is None else memory_bytes
        jobs = list(_jobs(segments, most_rows(rows.shape[1], available)))
        with closing(_answers(link, rows, stops, jobs, compute_dtype, batch_size)) as answers:
            for job, found, where in answers:
                _keep_better(rows, job, found, where, scores, index, is_exact)
    return scores, index


def row_bytes(width: int) -> int:
    """Bytes of the device's memory that one row takes.

    4 bytes a dimension in each of the two row buffers, 2 in the half-precision copy of the rows that are searched and
    10% of 4 for what comes with them; and 128 bytes for the row's candidates and answers.
    """
    return 2 * 4 * width + 2 * width + 4 * width // 10 + 128


def most_rows(width: int, memory_bytes: int) -> int:
    """Rows of a job: as many as fit beside the workspace; two at least, as a job of fewer compares nothing."""
    return max(2, (memory_bytes - WORKSPACE) // row_bytes(width))


@dataclass(frozen=True)
class _Job:
    """Rows that are searched in one go.

    Attributes
    ----------
    parts : tuple of slice
        One or two runs of the host's rows, which stand on the device one behind the other.
    segments : torch.Tensor
        Offsets of the segments that these are.
    answers : slice
        Those of the host's rows that the job answers: its last ones.
    """

    parts: tuple[slice, ...]
    segments: torch.Tensor
    answers: slice

    @property
    def n_rows(self) -> int:
        """Rows on the device."""
        return sum(part.stop - part.start for part in self.parts)

    def host_rows(self, index: torch.Tensor) -> torch.Tensor:
        """Turn positions on the device into positions on the host."""
        first, last = self.parts[0], self.parts[-1]
        n_first = first.stop - first.start
        return torch.where(index < n_first, index + first.start, index - n_first + last.start)

    def stops(self, stops: torch.Tensor | None) -> torch.Tensor | None:
        """Where the candidates of the device's rows end, given where those of the host's do."""
        if len(self.parts) == 1:
            return None if stops is None else stops[self.parts[0]] - self.parts[0].start
        earlier, chunk = self.parts
        ends = torch.arange(chunk.start, chunk.stop) if stops is None else stops[chunk]
        last = chunk.stop if earlier.stop == chunk.start else earlier.stop
        no_queries = torch.zeros(earlier.stop - earlier.start, dtype=torch.int64)
        return torch.cat([no_queries, ends.clamp(earlier.start, last) - earlier.start])


def _jobs(segments: torch.Tensor, most: int) -> Iterator[_Job]:
    """Cut the segments into runs of at most `most` rows, and what is longer by itself into pairs of chunks."""
    first, n_segments = 0, len(segments) - 1
    while first < n_segments:
        start = int(segments[first])
        last = int(torch.searchsorted(segments, start + most, right=True)) - 1
        if last > first:
            rows = slice(start, int(segments[last]))
            if rows.start < rows.stop:
                yield _Job((rows,), segments[first : last + 1] - start, rows)
        else:
            last = first + 1
            yield from _pairs(start, int(segments[last]), most)
        first = last


def _pairs(start: int, stop: int, most: int) -> Iterator[_Job]:
    """Pair the chunks of one segment of more than `most` rows."""
    n_chunks = -(-(stop - start) // (most // 2))
    size = -(-(stop - start) // n_chunks)
    chunks = [slice(begin, min(begin + size, stop)) for begin in range(start, stop, size)]
    both = slice(start, chunks[1].stop)
    yield _Job((both,), torch.tensor([0, both.stop - both.start]), both)
    for number, chunk in enumerate(chunks[2:], start=2):
        for earlier in chunks[:number]:
            yield _Job((earlier, chunk), torch.tensor([0, chunk.stop - chunk.start + size]), chunk)


def _answers(
    link: _Link,
    rows: torch.Tensor,
    stops: torch.Tensor | None,
    jobs: list[_Job],
    compute_dtype: str,
    batch_size: int | None,
) -> Generator[tuple[_Job, torch.Tensor, torch.Tensor]]:
    """Search job by job, uploading the rows of the next one meanwhile; yield scores and the host's rows."""
    largest = max((job.n_rows for job in jobs), default=0)
    buffers = [link.empty(largest, rows.shape[1]) for _ in jobs[:2]]
    # Uploads have a thread: the torch engine waits for the device, and what is pageable is copied by the host.
    uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
    try:
        ahead = [uploads.submit(link.upload, rows, job.parts, slot) for job, slot in zip(jobs, buffers, strict=False)]
        pending = None
        for number, job in enumerate(jobs):
            link.wait_for_rows(ahead[number].result())
            buffer = buffers[number % 2]
            found = nearest_earlier(
                buffer.rows[: job.n_rows],
                job.segments,
                stops=job.stops(stops),
                compute_dtype=compute_dtype,
                batch_size=batch_size,
            )
            link.release(buffer)
            if number + 2 < len(jobs):
                ahead.append(uploads.submit(link.upload, rows, jobs[number + 2].parts, buffer))
            if pending is not None:
                yield pending[0], *pending[1].get()
            pending = job, link.download(*found)
        if pending is not None:
            yield pending[0], *pending[1].get()
    finally:
        uploads.shutdown(cancel_futures=True)
        link.drain()


def _keep_better(
    rows: torch.Tensor,
    job: _Job,
    found: torch.Tensor,
    where: torch.Tensor,
    scores: torch.Tensor,
    index: torch.Tensor,
    is_exact: bool,
) -> None:
    """Put the answers of a job; where others have been put before, those that are better, among equals the first."""
    first = job.n_rows - (job.answers.stop - job.answers.start)
    found, where = found[first:], job.host_rows(where[first:])
    held, held_where = scores[job.answers], index[job.answers]
    # A row that is its own answer has none yet.
    own = torch.arange(job.answers.start, job.answers.stop)
    is_new, is_contest = (where != own) & (held_where == own), (where != own) & (held_where != own)
    is_better = is_new | (is_contest & ((found > held) | ((found == held) & (where < held_where))))
    if is_exact:
        close = (((found - held).abs() <= MARGIN) & is_contest).nonzero().flatten()
        query = close + job.answers.start
        cosine, held_cosine = (_cosines(rows, query, candidate[close]) for candidate in (where, held_where))
        is_better[close] = (cosine > held_cosine) | ((cosine == held_cosine) & (where[close] < held_where[close]))
    scores[job.answers] = torch.where(is_better, found, held)
    index[job.answers] = torch.where(is_better, where, held_where)


def _cosines(rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Float64 cosine similarities as the search decides by them."""
    return certify.snap(certify._cosines64(rows, query, candidate))


@dataclass
class _Buffer:
    """Memory on the device for the rows of a job, and the event after which it is free to be overwritten."""

    rows: torch.Tensor
    free: Any = None


@dataclass(frozen=True)
class _Download:
    """Answers on their way to the host, and the event after which they are there."""

    answers: tuple[torch.Tensor, torch.Tensor]
    arrived: torch.cuda.Event | None = None

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.answers


class _Link:
    """The way of rows to a device and of answers back; this one to a CPU, where everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()

    def free_bytes(self) -> int:
        """Bytes that a search may take."""
        import psutil

        return int(psutil.virtual_memory().available)

    def empty(self, n_rows: int, width: int) -> _Buffer:
        """Memory for the rows of a job."""
        return _Buffer(torch.empty(n_rows, width, device=self.device))

    def upload(self, rows: torch.Tensor, parts: tuple[slice, ...], buffer: _Buffer) -> torch.cuda.Event | None:
        """Copy parts of the host's rows into `buffer`, one behind the other; return the event that ends it."""
        torch.cat([rows[part] for part in parts], out=buffer.rows[: sum(part.stop - part.start for part in parts)])
        return None

    def wait_for_rows(self, uploaded: Any) -> None:
        """Let the search wait for an upload."""

    def release(self, buffer: _Buffer) -> None:
        """Let the next upload into `buffer` wait for the search of what it holds."""

    def download(self, scores: torch.Tensor, index: torch.Tensor) -> _Download:
        """Send answers to the host."""
        return _Download((scores, index))

    def drain(self) -> None:
        """Wait for all uploads, so that no buffer is freed while one writes to it."""


class _CudaLink(_Link):
    """To a GPU, through pinned memory and beside the search.

    The buffers belong to the stream of the search, and are returned to the allocator in its order: that of uploads
    ends before, as the search has waited for every upload, and `drain` for those that it has not come to.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self.staging = cycle([(self._pinned(STAGING_BYTES // 4), torch.cuda.Event()) for _ in range(2)])

    @staticmethod
    def _pinned(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def free_bytes(self) -> int:
        """What CUDA calls free, and what torch's own allocator holds for nobody; half of it where cuDF shares the pool.

        What a pool of RMM's holds counts as taken: `dask_semdedup.memory` bounds that.
        """
        free = torch.cuda.mem_get_info(self.device)[0]
        allocator = torch.cuda.memory.get_allocator_backend()
        if allocator == "pluggable":
            return free // 2  # Partitions of cuDF that other threads read meanwhile need memory too.
        if allocator == "native":  # Others keep no such statistics.
            free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free

    def empty(self, n_rows: int, width: int) -> _Buffer:
        buffer = super().empty(n_rows, width)
        # What had this memory before may still be at work on it.
        self.release(buffer)
        return buffer

    def upload(self, rows: torch.Tensor, parts: tuple[slice, ...], buffer: _Buffer) -> torch.cuda.Event:
        target, start = buffer.rows.view(-1), 0
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(buffer.free)
            for piece in (piece for part in parts for piece in rows[part].view(-1).split(STAGING_BYTES // 4)):
                staging, sent = next(self.staging)
                sent.synchronize()
                staging[: len(piece)].copy_(piece)
                target[start : start + len(piece)].copy_(staging[: len(piece)], non_blocking=True)
                sent.record(self.stream)
                start += len(piece)
            return self.stream.record_event()

    def wait_for_rows(self, uploaded: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(uploaded)

    def release(self, buffer: _Buffer) -> None:
        buffer.free = torch.cuda.current_stream(self.device).record_event()

    def download(self, scores: torch.Tensor, index: torch.Tensor) -> _Download:
        host = self._pinned(len(scores)), self._pinned(len(index), torch.int64)
        for pinned, answers in zip(host, (scores, index), strict=True):
            pinned.copy_(answers, non_blocking=True)
        return _Download(host, torch.cuda.current_stream(self.device).record_event())

    def drain(self) -> None:
        self.stream.synchronize()


_making = threading.Lock()


@cache
def _link(device: torch.device) -> _Link:
    """The way to a device: one for all, with its pinned memory, as to pin memory takes long."""
    return _CudaLink(device) if device.type == "cuda" else _Link(device)


def _with_index(device: torch.device) -> torch.device:
    """Name the device that "cuda" means at present."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
