"""Exact search for the nearest earlier neighbour within each segment, at half-precision speed.

This package takes and returns only tensors, and can be used by itself. `nearest_earlier` is its entry point. `certify`
holds the error bounds and the exact rescoring. The engines do the coarse pass.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from contextlib import nullcontext, suppress
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from dask_semdedup.search import certify, sketch, torch_engine
from dask_semdedup.search.certify import UnitRows
from dask_semdedup.search.crowded import Centred, Search, answer_crowded
from dask_semdedup.search.torch_engine import half_dtype

__all__ = ["COMPUTE_DTYPES", "half_dtype", "nearest_earlier"]

COMPUTE_DTYPES = ("auto", "float32", "float16", "bfloat16")


def nearest_earlier(
    rows: torch.Tensor,
    segments: torch.Tensor,
    *,
    stops: torch.Tensor | None = None,
    at_least: float | None = None,
    compute_dtype: str = "auto",
    batch_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every row, return the most similar earlier row of its segment.

    Parameters
    ----------
    rows : torch.Tensor
        (n, d) finite floating-point rows on any device, in rank order within each segment. They need not be of unit
        length. An all-zero row has similarity 0 to everything.
    segments : torch.Tensor
        (k + 1,) integer offsets, ascending from 0 to n; segments may be empty. Segment ``s`` is
        ``rows[segments[s]:segments[s + 1]]``.
    stops : torch.Tensor, optional
        (n,) integers: row ``i`` of a segment that starts at ``s`` is compared with ``rows[s:stops[i]]``, where
        ``s <= stops[i] <= i``. A row with ``stops[i] == s`` is only a candidate for others. To compare queries with
        candidates, make a segment of the candidates followed by the queries, and let the stops of all queries be the
        end of the candidates. By default ``stops[i] == i``.
    at_least : float, optional
        A cosine similarity in (0, 1], rounded to float32. Rows whose most similar candidate reaches it get the same
        answers as without it, bit for bit. All others are answered like rows without candidates.
    compute_dtype : {"auto", "float32", "float16", "bfloat16"}, default "auto"
        "auto" is exact: a coarse pass, in half precision if the hardware has it; a certificate; and rescoring of the
        remaining candidates. The others are plain searches for the largest score as computed in that dtype.
    batch_size : int, optional
        Queries multiplied at once by the torch engine, at most 8,192; by default 512, or 4,096 on a GPU. They are
        multiplied by as many candidates at a time as memory allows. The Triton engine ignores it.

    Returns
    -------
    scores : torch.Tensor
        (n,) float32 cosine similarities in [-1, 1], within 2e-6 of float64 in the exact search. A row without
        candidates, such as the first of a segment, gets 0.0.
    index : torch.Tensor
        (n,) int64 positions in `rows`, the first among equally similar rows. A row without candidates gets itself.

    Raises
    ------
    TypeError
        If `rows` or `segments` is not a tensor.
    ValueError
        If `compute_dtype`, `batch_size` or `at_least` is invalid, `segments` do not cover `rows`, or a stop is outside
        its segment or after its row.

    Examples
    --------
    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [1.0, 1.0]])
    >>> nearest_earlier(rows, torch.tensor([0, 3, 4]))
    (tensor([0.0000, 0.0000, 0.8000, 0.0000]), tensor([0, 0, 1, 3]))

    Compare the last two rows, as queries, with the first two:

    >>> nearest_earlier(rows, torch.tensor([0, 4]), stops=torch.tensor([0, 0, 2, 2]))
    (tensor([0.0000, 0.0000, 0.8000, 0.7071]), tensor([0, 1, 1, 0]))

    Answer only rows that are at least 0.75 similar to one of these:

    >>> nearest_earlier(rows, torch.tensor([0, 4]), stops=torch.tensor([0, 0, 2, 2]), at_least=0.75)
    (tensor([0.0000, 0.0000, 0.8000, 0.0000]), tensor([0, 1, 1, 3]))
    """
    segments, stops = checked_arguments(rows, segments, stops, compute_dtype, batch_size, at_least)
    rows = certify.as_float32(rows)
    if compute_dtype != "float32" and len(rows) and has_triton(rows.device):
        search = partial(_by_triton, compute_dtype=compute_dtype)
    else:
        search = partial(_by_torch, compute_dtype=compute_dtype, batch_size=batch_size)
    if at_least is None:
        return search(rows, segments, stops)
    is_exact = compute_dtype == "auto" and len(rows) > 0
    found = _by_sketches(rows, segments, stops, at_least, search) if is_exact else None
    scores, index = found or search(rows, segments, stops)
    without_answers_below(at_least, scores, index)
    return scores, index


MAX_UNEXPECTED = 0.125
"""Share of rows that may be crowded beyond what the sample shows, before larger sketches are tried."""


def _by_sketches(
    rows: torch.Tensor, segments: torch.Tensor, stops: torch.Tensor | None, at_least: float, search: Search
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Answer the rows that reach `at_least`, and some others. Return None if `search`, which answers all, is faster."""
    if has_triton(rows.device):
        from dask_semdedup.search import triton_sketch as engine
    elif rows.is_cuda:
        return None
    else:
        from dask_semdedup.search import torch_sketch as engine  # type: ignore[no-redef]
    # Crowded rows are multiplied here, too, and by kernels that are launched on the current device.
    with ieee_products, torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
        sketcher = sketch.choose(rows, segments, stops, at_least, engine.COSTS)
        if sketcher is None:
            return None
        scores = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        index = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        while sketcher is not None:
            crowded = engine.nearest_reaching(rows, segments, scores, index, sketcher, stops=stops)
            if len(crowded[0]) <= (sketcher.crowded + MAX_UNEXPECTED) * len(rows):
                break
            sketcher = sketch.choose(rows, segments, stops, at_least, engine.COSTS, rejected=sketcher)
        answer_crowded(rows, segments, stops, *crowded, search, scores, index)
    return scores, index


def without_answers_below(at_least: float, scores: torch.Tensor, index: torch.Tensor) -> None:
    """Replace answers that are less than `at_least` similar by those of rows without candidates, in place."""
    below = scores < float(np.float32(at_least))
    scores.masked_fill_(below, 0.0)
    torch.where(below, torch.arange(len(index), device=index.device), index, out=index)


@cache
def has_triton(device: torch.device) -> bool:
    """Return whether the Triton engine runs on `device`: on NVIDIA GPUs from Ampere on, if Triton is installed."""
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _by_triton(
    rows: torch.Tensor,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    compute_dtype: str,
    centred: Centred | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search with the fused kernels."""
    from dask_semdedup.search import triton_engine

    exact = compute_dtype == "auto"
    dtype = torch.float16 if exact else getattr(torch, compute_dtype)
    with torch.cuda.device(rows.device):
        scores = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        index = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        triton_engine.nearest(rows, segments, scores, index, stops=stops, dtype=dtype, exact=exact, centred=centred)
    return scores, index


def _by_torch(
    rows: torch.Tensor,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    compute_dtype: str,
    batch_size: int | None,
    centred: None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search with matrix products."""
    scores = torch.zeros(len(rows), dtype=torch.float32, device=rows.device)
    index = torch.arange(len(rows), device=rows.device)
    if not len(rows):
        return scores, index
    unit = certify.measure(rows)
    stops = None if stops is None else stops.to(rows.device)
    strip_size = torch_engine.strip_size(batch_size, segments, rows)
    with ieee_products:
        if compute_dtype == "auto":
            _exact(unit, segments, stops, strip_size, scores, index)
        else:
            _plain(unit, segments, stops, getattr(torch, compute_dtype), strip_size, scores, index)
    return scores.clamp_(-1.0, 1.0), index


def checked_arguments(
    rows: torch.Tensor,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    compute_dtype: str,
    batch_size: int | None,
    at_least: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `segments` and `stops` on the CPU; raise unless the arguments of `nearest_earlier` are valid."""
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, not {compute_dtype!r}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if at_least is not None and not 0 < at_least <= 1:
        raise ValueError(f"at_least must be a cosine similarity above 0, at most 1, not {at_least}")
    if not isinstance(rows, torch.Tensor) or not isinstance(segments, torch.Tensor):
        given = f"{type(rows).__name__} and {type(segments).__name__}"
        raise TypeError(f"rows and segments must be torch tensors, not {given}: torch.as_tensor makes them")
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(f"rows must be a floating-point matrix, not {rows.dtype} of shape {tuple(rows.shape)}")
    segments = segments.to("cpu", torch.int64)
    offsets = segments.numpy()
    covers = offsets.ndim == 1 and len(offsets) and offsets[0] == 0 and offsets[-1] == len(rows)
    if not covers or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"segments must be offsets that ascend from 0 to the number of rows, {len(rows)}")
    if stops is None:
        return segments, None
    stops = stops.to("cpu", torch.int64)
    ends, starts = stops.numpy(), np.repeat(offsets[:-1], np.diff(offsets))
    if ends.shape != (len(rows),) or (ends < starts).any() or (ends > np.arange(len(rows))).any():
        raise ValueError("stops must give each row a position between the first of its segment and its own")
    return segments, stops


def _exact(
    unit: UnitRows,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    strip_size: int,
    scores: torch.Tensor,
    index: torch.Tensor,
) -> None:
    """Search exactly: a coarse pass, then more precise ones for the queries with too many candidates."""
    small, queries = _by_size(unit, segments, stops)
    pairs = torch_engine.Pairs(unit, scores, index)
    single = torch_engine.in_float32(unit)
    crowded = torch_engine.certified_in_batches(single, unit.is_zero, segments, stops, small, pairs)
    half = half_dtype(unit.rows.device)
    if half is not None and len(queries):
        queries = torch_engine.certified(torch_engine.in_half(unit, half), queries, segments, stops, pairs, strip_size)
    queries = torch_engine.certified(single, queries, segments, stops, pairs, strip_size)
    pairs.flush()
    crowded = torch.cat([crowded, queries]).sort().values
    torch_engine.nearest(torch_engine.Double(unit.rows), crowded, segments, stops, scores, index, strip_size)
    _answer_zero_rows(unit, segments, stops, index)


def _plain(
    unit: UnitRows,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    dtype: torch.dtype,
    strip_size: int,
    scores: torch.Tensor,
    index: torch.Tensor,
) -> None:
    """Search in one dtype, without a certificate."""
    coarse = torch_engine.in_float32(unit) if dtype == torch.float32 else torch_engine.in_half(unit, dtype)
    small, queries = _by_size(unit, segments, stops)
    torch_engine.nearest_in_batches(coarse, segments, stops, small, scores, index)
    torch_engine.nearest(coarse, queries, segments, stops, scores, index, strip_size)
    _answer_zero_rows(unit, segments, stops, index)


def _by_size(unit: UnitRows, segments: torch.Tensor, stops: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the segments to search in batches, and the queries of the larger ones, in ascending order.

    Queries are the rows that are not zero and have a candidate.
    """
    lengths = segments.diff()
    is_small = lengths <= torch_engine.SMALL
    is_query = (~is_small).repeat_interleave(lengths)
    is_query[segments[:-1][~is_small]] = False
    is_query = is_query.to(unit.rows.device) & ~unit.is_zero
    if stops is not None:
        is_query &= stops > segments[:-1].repeat_interleave(lengths).to(stops.device)
    return (is_small & (lengths > 1)).nonzero().flatten(), is_query.nonzero().flatten()


def _answer_zero_rows(unit: UnitRows, segments: torch.Tensor, stops: torch.Tensor | None, index: torch.Tensor) -> None:
    """Write the first candidate of each zero row, to which all rows are equally similar."""
    zero = unit.is_zero.nonzero().flatten()
    segment = torch.searchsorted(segments, zero.cpu(), right=True) - 1
    first = segments[segment].to(index.device)
    index[zero] = first if stops is None else torch.where(stops[zero] > first, first, zero)


class _IeeeProducts:
    """Context in which products of float32 are computed, and those of float16 summed, in float32, whatever is set.

    The settings belong to the process: the first thread to enter changes them, the last to leave restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._saved = _Settings.now()
                self._saved.replace()
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            # A process forked inside of the context has left it already.
            self._inside = max(0, self._inside - 1)
            if not self._inside:
                self._saved.restore()

    def leave(self) -> None:
        """Restore the settings in a forked process, where none of the threads inside of the context run."""
        self._lock = threading.Lock()
        if self._inside:
            self._inside = 0
            self._saved.restore()


class _Settings(NamedTuple):
    """Precision of torch's products: of all backends, unless one was set by itself (from torch 2.9 on), and of each."""

    precision: str | None
    of_backends: tuple[str, ...]
    reduced: bool

    @classmethod
    def now(cls) -> _Settings:
        precision = None
        # Torch raises if a precision was set under one of the newer names.
        with suppress(RuntimeError):
            precision = torch.get_float32_matmul_precision()
        of_backends = tuple(backend.fp32_precision for backend in _backends())
        return cls(precision, of_backends, bool(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction))

    def replace(self) -> None:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        if self.precision is not None:
            torch.set_float32_matmul_precision("highest")
            return
        for backend in _backends():
            backend.fp32_precision = "ieee"

    def restore(self) -> None:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = self.reduced
        if self.precision is not None:
            torch.set_float32_matmul_precision(self.precision)
        for backend, precision in zip(_backends(), self.of_backends, strict=True):
            backend.fp32_precision = precision


def _backends() -> tuple[Any, ...]:
    """Return torch's backends for products of float32, if each has a precision of its own."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return ()
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


ieee_products = _IeeeProducts()
os.register_at_fork(after_in_child=ieee_products.leave)
