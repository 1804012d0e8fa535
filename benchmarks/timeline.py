"""Timelines: the parts of the work that each thread was in, and when.

Functions that do the parts are replaced, for a while, by ones that note when they are entered and left. Nothing else
changes: threads run side by side as they do, and a call that only launches work on a GPU is as short as it is. With
`finish`, which waits for the device, a part is as long as its work; that is for runs in a single thread.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any, NamedTuple
from unittest import mock


class Interval(NamedTuple):
    """One call: seconds since the run began."""

    part: str
    thread: str
    start: float
    end: float


class Part(NamedTuple):
    """Seconds of a part: of all threads together, and those in which at least one of them was in it."""

    name: str
    calls: int
    total: float
    union: float


@dataclass
class Timeline:
    """The calls of one run of `seconds`, and the parts that were not found in the library."""

    parts: Sequence[str]
    intervals: list[Interval] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> list[Part]:
        """The parts in their order."""
        calls: dict[str, list[Interval]] = {part: [] for part in self.parts}
        for interval in self.intervals:
            calls[interval.part].append(interval)
        return [
            Part(part, len(found), sum(call.end - call.start for call in found), union(found))
            for part, found in calls.items()
        ]

    @property
    def idle(self) -> float:
        """Seconds in which no thread was in any part."""
        return self.seconds - union(self.intervals)

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {
            "seconds": self.seconds,
            "idle": self.idle,
            "parts": [part._asdict() for part in self.summary()],
            "intervals": [interval._asdict() for interval in self.intervals],
            "missing": self.missing,
        }


def union(intervals: Iterable[Interval]) -> float:
    """Seconds that at least one of the intervals covers."""
    covered, reached = 0.0, float("-inf")
    for interval in sorted(intervals, key=lambda interval: interval.start):
        covered += max(0.0, interval.end - max(interval.start, reached))
        reached = max(reached, interval.end)
    return covered


@contextmanager
def recorded(parts: Mapping[str, str], finish: Callable[[], object] | None = None) -> Iterator[Timeline]:
    """Record the calls of functions; `parts` names them as ``module:attribute`` or ``module:Class.method``."""
    timeline = Timeline(list(parts))
    began = time.perf_counter()

    def noting(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if finish:
                finish()
            start = time.perf_counter()
            try:
                result = function(*args, **kwargs)
                if finish:
                    finish()
                return result
            finally:
                thread = threading.current_thread().name
                timeline.intervals.append(Interval(part, thread, start - began, time.perf_counter() - began))

        return call

    with ExitStack() as stack:
        for part, where in parts.items():
            try:
                owner, attribute = _owner(where)
                function = getattr(owner, attribute)
            except (ImportError, AttributeError):
                timeline.missing.append(f"{part} ({where})")
                continue
            stack.enter_context(mock.patch.object(owner, attribute, noting(part, function)))
        began = time.perf_counter()
        yield timeline
        timeline.seconds = time.perf_counter() - began


def _owner(where: str) -> tuple[Any, str]:
    """The module or class that a function is an attribute of, and its name there."""
    module, _, path = where.partition(":")
    owner, _, attribute = path.rpartition(".")
    return resolve_name(f"{module}:{owner}" if owner else module), attribute


def as_trace(runs: Mapping[str, Iterable[Interval]]) -> list[dict[str, Any]]:
    """Runs as Chrome's trace events, a process each: for Perfetto, or ``chrome://tracing``."""
    events: list[dict[str, Any]] = []
    for process, (run, intervals) in enumerate(runs.items()):
        events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": run}})
        threads: dict[str, int] = {}
        for part, thread, start, end in intervals:
            if thread not in threads:
                threads[thread] = len(threads)
                name = {"name": thread}
                events.append({"name": "thread_name", "ph": "M", "pid": process, "tid": threads[thread], "args": name})
            track = {"pid": process, "tid": threads[thread]}
            events.append({"name": part, "ph": "X", "ts": 1e6 * start, "dur": 1e6 * (end - start), **track})
    return events
