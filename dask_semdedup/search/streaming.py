"""Search of rows in host memory on a GPU, whose own memory need not hold them.

Segments are cut into *jobs* that fit on the device. While one job is searched, the rows of the next one are uploaded:
through two pinned staging buffers, on a separate stream, to the other of two row buffers. These are allocated once, and
the streams wait for each other by events, so that memory never changes hands through an allocator.

A segment that is too large for the device is cut into chunks A1, ..., Am in rank order. The segments [Ai; Aj] of all
i < j are searched, the rows of Ai as candidates only, and a row of Aj keeps its best answer over i. No pair of rows is
multiplied twice.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch

from dask_semdedup.search import certify, checked_arguments, nearest_earlier
from dask_semdedup.search.merging import MARGIN, cosines

__all__ = ["nearest_earlier_from_host"]

STAGING_BYTES = 32 << 20
"""Bytes of each of the two pinned buffers through which rows are uploaded."""

WORKSPACE = 256 << 20
"""Bytes that a search may take beyond those per row."""

MIN_ROWS = 4096
"""Rows of a job even if too little memory is free for them."""


def nearest_earlier_from_host(
    rows: torch.Tensor,
    segments: torch.Tensor,
    *,
    device: torch.device | str,
    stops: torch.Tensor | None = None,
    at_least: float | None = None,
    compute_dtype: str = "auto",
    batch_size: int | None = None,
    memory_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most similar earlier row of the same segment for every row in host memory, searched on `device`.

    Parameters
    ----------
    rows : torch.Tensor
        (n, d) finite floating-point rows on the CPU, in rank order within each segment. They may be in pageable memory.
    segments : torch.Tensor
        (k + 1,) integer offsets, ascending from 0 to n; segments may be empty.
    device : torch.device or str
        The device to search on. One search at a time has it to itself in this process, as it claims the memory that is
        free when it begins.
    stops, at_least, compute_dtype, batch_size
        As of `dask_semdedup.search.nearest_earlier`.
    memory_bytes : int, optional
        Bytes of device memory that the search may take. By default all that is free.

    Returns
    -------
    scores : torch.Tensor
        (n,) float32 on the CPU.
    index : torch.Tensor
        (n,) int64 on the CPU. Both are as of `dask_semdedup.search.nearest_earlier`, and exact even if a segment
        exceeds the device's memory: answers of several chunks whose float32 scores are too close are then decided in
        float64, on the host.

    Raises
    ------
    ValueError
        If an argument is not allowed.
    """
    segments, stops = checked_arguments(rows, segments, stops, compute_dtype, batch_size, at_least)
    rows = certify.as_float32(rows)
    # Threads that come first at once must share one link. A tensor's device has an index even if `device` has none.
    with _making:
        target = torch.empty(0, device=device).device
        if target not in _links:
            _links[target] = _CudaLink(target) if target.type == "cuda" else _Link(target)
        link = _links[target]
    scores = torch.zeros(len(rows))
    index = torch.arange(len(rows))
    is_exact = compute_dtype == "auto"
    options = {"at_least": at_least, "compute_dtype": compute_dtype, "batch_size": batch_size}
    with link.lock:
        # If no memory is free, it is better to run out of it than to search a few rows at a time.
        least = WORKSPACE + MIN_ROWS * row_bytes(rows.shape[1])
        available = max(link.free_bytes(), least) if memory_bytes is None else memory_bytes
        most = max_rows(rows.shape[1], available)
        # Crowded rows are gathered: a search by sketches may take as much again.
        jobs = list(_jobs(segments, most if at_least is None else max(2, most // 2)))
        with closing(_answers(link, rows, stops, jobs, options)) as answers:
            for job, found, where in answers:
                _keep_better(rows, job, found, where, scores, index, is_exact)
    return scores, index


def row_bytes(width: int) -> int:
    """Return the bytes of device memory that one row takes.

    Each dimension takes 4 bytes in each of the two row buffers, 2 in the half-precision copy of the rows that are
    searched, and 10% of 4 for intermediate results. The row's candidates and answers take 128 bytes.
    """
    return 2 * 4 * width + 2 * width + 4 * width // 10 + 128


def max_rows(width: int, memory_bytes: int) -> int:
    """Return the number of rows of a job that fit in memory with the workspace: at least 2, to compare any."""
    return max(2, (memory_bytes - WORKSPACE) // row_bytes(width))


@dataclass(frozen=True)
class _Job:
    """Rows that are searched at once.

    Attributes
    ----------
    runs : tuple of slice
        One or two runs of the host's rows, which are adjacent on the device.
    segments : torch.Tensor
        Offsets of the segments on the device.
    answers : slice
        The host's rows that the job answers, which are its last ones.
    """

    runs: tuple[slice, ...]
    segments: torch.Tensor
    answers: slice

    @property
    def n_rows(self) -> int:
        """Number of rows on the device."""
        return sum(run.stop - run.start for run in self.runs)

    def host_rows(self, index: torch.Tensor) -> torch.Tensor:
        """Return positions on the host, given positions on the device."""
        first, last = self.runs[0], self.runs[-1]
        n_first = first.stop - first.start
        return torch.where(index < n_first, index + first.start, index - n_first + last.start)

    def stops(self, stops: torch.Tensor | None) -> torch.Tensor | None:
        """Return the ends of the candidates on the device, given those on the host."""
        if len(self.runs) == 1:
            return None if stops is None else stops[self.runs[0]] - self.runs[0].start
        earlier, chunk = self.runs
        ends = torch.arange(chunk.start, chunk.stop) if stops is None else stops[chunk]
        last = chunk.stop if earlier.stop == chunk.start else earlier.stop
        no_queries = torch.zeros(earlier.stop - earlier.start, dtype=torch.int64)
        return torch.cat([no_queries, ends.clamp(earlier.start, last) - earlier.start])


def _jobs(segments: torch.Tensor, most: int) -> Iterator[_Job]:
    """Yield the segments in jobs of at most `most` rows, and each longer segment in pairs of chunks."""
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
    """Yield the pairs of chunks of one segment of more than `most` rows."""
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
    options: dict[str, Any],
) -> Generator[tuple[_Job, torch.Tensor, torch.Tensor]]:
    """Yield each job with its scores and index on the device; the rows of the next job are uploaded meanwhile."""
    largest = max((job.n_rows for job in jobs), default=0)
    buffers = [link.empty(largest, rows.shape[1]) for _ in jobs[:2]]
    # Uploads have a thread of their own: the torch engine waits for the device, and the host copies pageable memory.
    uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
    try:
        ahead = [
            uploads.submit(link.upload, rows, job.runs, buffer) for job, buffer in zip(jobs, buffers, strict=False)
        ]
        pending = None
        for number, job in enumerate(jobs):
            link.wait_for_rows(ahead[number].result())
            buffer = buffers[number % 2]
            found = nearest_earlier(buffer.rows[: job.n_rows], job.segments, stops=job.stops(stops), **options)
            link.release(buffer)
            if number + 2 < len(jobs):
                ahead.append(uploads.submit(link.upload, rows, jobs[number + 2].runs, buffer))
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
    """Write the answers of a job that are better than those of earlier jobs, or equal and of an earlier row."""
    first = job.n_rows - (job.answers.stop - job.answers.start)
    found, where = found[first:], job.host_rows(where[first:])
    held, held_where = scores[job.answers], index[job.answers]
    # A row that is its own answer has no answer yet.
    own = torch.arange(job.answers.start, job.answers.stop)
    is_new, is_contest = (where != own) & (held_where == own), (where != own) & (held_where != own)
    is_better = is_new | (is_contest & ((found > held) | ((found == held) & (where < held_where))))
    if is_exact:
        close = (((found - held).abs() <= MARGIN) & is_contest).nonzero().flatten()
        query = close + job.answers.start
        cosine, held_cosine = (cosines(rows, query, candidate[close]) for candidate in (where, held_where))
        is_better[close] = (cosine > held_cosine) | ((cosine == held_cosine) & (where[close] < held_where[close]))
    scores[job.answers] = torch.where(is_better, found, held)
    index[job.answers] = torch.where(is_better, where, held_where)


@dataclass
class _Buffer:
    """Device memory for the rows of a job, and the event after which it may be overwritten."""

    rows: torch.Tensor
    free: Any = None


@dataclass(frozen=True)
class _Download:
    """Answers being copied to the host, and the event after which they have arrived."""

    answers: tuple[torch.Tensor, torch.Tensor]
    arrived: torch.cuda.Event | None = None

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for the answers and return them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.answers


@dataclass(eq=False)
class _Link:
    """Transfers of rows to a device and of answers back. This class, for the CPU, does everything at once."""

    device: torch.device
    lock: threading.Lock = field(default_factory=threading.Lock)

    def free_bytes(self) -> int:
        """Return the bytes that a search may take."""
        import psutil

        return int(psutil.virtual_memory().available)

    def empty(self, n_rows: int, width: int) -> _Buffer:
        """Return memory for the rows of a job."""
        return _Buffer(torch.empty(n_rows, width, device=self.device))

    def upload(self, rows: torch.Tensor, runs: tuple[slice, ...], buffer: _Buffer) -> torch.cuda.Event | None:
        """Copy runs of the host's rows to `buffer`, one after another; return the event that ends the copy."""
        torch.cat([rows[run] for run in runs], out=buffer.rows[: sum(run.stop - run.start for run in runs)])
        return None

    def wait_for_rows(self, uploaded: Any) -> None:
        """Let the search wait for an upload."""

    def release(self, buffer: _Buffer) -> None:
        """Let the next upload to `buffer` wait for the search of its present rows."""

    def download(self, scores: torch.Tensor, index: torch.Tensor) -> _Download:
        """Begin to copy answers to the host."""
        return _Download((scores, index))

    def drain(self) -> None:
        """Wait for all uploads, so that no buffer is freed while it is written to."""


@dataclass(eq=False)
class _CudaLink(_Link):
    """Transfers to a GPU through pinned memory, concurrent with the search.

    The buffers belong to the stream of the search, and are returned to the allocator in its order. The stream of
    uploads is done before: the search has waited for every upload, and `drain` waits for those that it did not reach.
    """

    def __post_init__(self) -> None:
        self.stream = torch.cuda.Stream(self.device)
        self.staging = cycle([(self._pinned(STAGING_BYTES // 4), torch.cuda.Event()) for _ in range(2)])

    @staticmethod
    def _pinned(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def free_bytes(self) -> int:
        """Return CUDA's free memory plus what torch's allocator holds unused, or half of the former with cuDF's pool.

        Unused memory of an RMM pool counts as taken; `dask_semdedup.device.memory` bounds it.
        """
        free = torch.cuda.mem_get_info(self.device)[0]
        allocator = torch.cuda.memory.get_allocator_backend()
        if allocator == "pluggable":
            return free // 2  # Other threads need memory to read cuDF partitions meanwhile.
        if allocator == "native":  # Other allocators keep no such statistics.
            free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free

    def empty(self, n_rows: int, width: int) -> _Buffer:
        buffer = super().empty(n_rows, width)
        # The previous owner's work on this memory may not be done.
        self.release(buffer)
        return buffer

    def upload(self, rows: torch.Tensor, runs: tuple[slice, ...], buffer: _Buffer) -> torch.cuda.Event:
        target, start = buffer.rows.view(-1), 0
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(buffer.free)
            for piece in (piece for run in runs for piece in rows[run].view(-1).split(STAGING_BYTES // 4)):
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

_links: dict[torch.device, _Link] = {}
"""The one link to each device, which keeps its pinned memory, as to pin memory takes long."""
