"""The package's exceptions, all of them picklable, since Dask sends them between processes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sized
from itertools import islice

__all__ = [
    "ClusterError",
    "EmbeddingError",
    "IdError",
    "InvalidArgumentError",
    "MissingColumnsError",
    "MissingDependencyError",
    "SemDedupError",
    "have",
    "some",
]


class SemDedupError(Exception):
    """Base class of every error that this package raises on purpose."""


class MissingColumnsError(SemDedupError, KeyError, ValueError):
    """Columns that the work needs are not in the frame.

    It is a `KeyError` and a `ValueError`, as either is what callers look for.
    """

    # KeyError would print the message's repr, quotes and all.
    __str__ = Exception.__str__

    @classmethod
    def build(cls, required: Iterable[Hashable], present: Iterable[Hashable], advice: str = "") -> MissingColumnsError:
        """Name the columns of `required` that are absent from `present`, list what is there, and advise.

        Parameters
        ----------
        required, present
            The columns that are needed and those that the frame has.
        advice
            What to do about it: a sentence.
        """
        present = list(present)
        missing = [column for column in dict.fromkeys(required) if column not in present]
        return cls(f"Required columns {missing} not found in the frame, which has {present}. {advice}".rstrip())


class EmbeddingError(SemDedupError, ValueError):
    """An embedding column of a wrong type, or with rows that cannot be compared."""


class ClusterError(SemDedupError, ValueError):
    """Rows without a cluster, no cluster column, or a layout that keeps clusters apart badly."""


class IdError(SemDedupError, ValueError):
    """Ids that are null or repeat where they may not, or that lead to one another in a circle."""


class InvalidArgumentError(SemDedupError, ValueError):
    """A parameter has a value that is not allowed."""


class MissingDependencyError(SemDedupError, ImportError):
    """A library that only some of the work needs is not installed."""


def have(count: int, noun: str) -> str:
    """Open a sentence on so many of something."""
    return f"1 {noun} has" if count == 1 else f"{count} {noun}s have"


def some(ids: Iterable[object], limit: int = 5) -> str:
    """List a few ids for an error message.

    Parameters
    ----------
    ids
        Any iterable of ids; a sized one is counted without being walked.
    limit
        The most ids to spell out.

    Returns
    -------
    str
        The first `limit` ids and, where there are more, the number of all.
    """
    if not isinstance(ids, Sized):
        ids = list(ids)
    count = len(ids)
    shown = ", ".join(str(value) for value in islice(ids, limit))
    return shown if count <= limit else f"{shown}, ... ({count} in all)"
