"""The package's exceptions. All can be pickled, since Dask sends them between processes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sized
from itertools import islice

__all__ = [
    "ClusterError",
    "DataNotFoundError",
    "DataReadError",
    "EmbeddingError",
    "IdError",
    "InvalidArgumentError",
    "MissingColumnsError",
    "MissingDependencyError",
    "OutputError",
    "OutputExistsError",
    "SemDedupError",
    "ZeroEmbeddingWarning",
    "counted",
    "have",
    "some",
]


class SemDedupError(Exception):
    """Base class of every error that this package raises on purpose.

    Parameters
    ----------
    *args
        The message.
    parameters
        The names of the parameters that the error is about.
    columns
        The columns that it is about.

    Attributes
    ----------
    parameters : tuple of str
        The names of the parameters that the error is about; may be empty.
    columns : tuple
        The columns that it is about; may be empty.
    """

    def __init__(self, *args: object, parameters: Iterable[str] = (), columns: Iterable[Hashable] = ()) -> None:
        super().__init__(*args)
        self.parameters = tuple(parameters)
        self.columns = tuple(columns)


class MissingColumnsError(SemDedupError, KeyError, ValueError):
    """The frame lacks columns that are needed.

    It is also a `KeyError` and a `ValueError`, so that code that catches either of them works.

    Attributes
    ----------
    advice : str
        The end of the message, which says what to do; may be empty.
    """

    advice = ""

    # KeyError would print the message's repr, quotes and all.
    __str__ = Exception.__str__

    @classmethod
    def build(
        cls,
        required: Iterable[Hashable],
        present: Iterable[Hashable],
        advice: str = "",
        *,
        parameters: Iterable[str] = (),
    ) -> MissingColumnsError:
        """Return the error that names the missing columns, lists those that are there, and advises.

        Parameters
        ----------
        required, present
            The columns that are needed and those that the frame has.
        advice
            What to do about it: a sentence.
        parameters
            The parameters that name the columns.
        """
        present = list(present)
        missing = [column for column in dict.fromkeys(required) if column not in present]
        message = f"Required columns {missing} not found in the frame, which has {present}. {advice}".rstrip()
        error = cls(message, parameters=parameters, columns=missing)
        error.advice = advice
        return error


class EmbeddingError(SemDedupError, ValueError):
    """The embedding column has a wrong type, or rows that cannot be compared."""


class ClusterError(SemDedupError, ValueError):
    """Rows have no cluster, there is no cluster column, or the layout does not keep clusters apart."""


class IdError(SemDedupError, ValueError):
    """Ids are null or repeat where they may not, or form a cycle."""


class InvalidArgumentError(SemDedupError, ValueError):
    """A parameter has a value that is not allowed."""


class DataReadError(SemDedupError, OSError, ValueError):
    """Files cannot be read: they are missing, damaged, changed since they were listed, or disagree about a column.

    It is also an `OSError` and a `ValueError`, so that code that catches either of them works.
    """


class DataNotFoundError(DataReadError, FileNotFoundError):
    """There are no files at a path."""


class OutputError(SemDedupError, OSError, ValueError):
    """Output cannot be written to a path, or moved there."""


class OutputExistsError(OutputError, FileExistsError):
    """The output path holds files that may not be replaced."""


class ClusterUnavailableError(SemDedupError, ConnectionError):
    """A cluster cannot do the work: it has no workers, or unsuitable ones, or its scheduler cannot be reached."""


class MissingDependencyError(SemDedupError, ImportError):
    """An optional library that this work needs is not installed."""


class ZeroEmbeddingWarning(UserWarning):
    """Rows have all-zero embeddings, which are similar to no row and never duplicates."""


def counted(count: int, noun: str) -> str:
    """Return a number of things: "1 row", "2,000 rows"."""
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}s"


def have(count: int, noun: str) -> str:
    """Return the beginning of a sentence on a number of things: "1 row has", "2 rows have"."""
    return f"1 {noun} has" if count == 1 else f"{count} {noun}s have"


def some(ids: Iterable[object], limit: int = 5) -> str:
    """Return a few ids as text for an error message.

    Parameters
    ----------
    ids
        Any iterable of ids; a sized one is counted without being walked.
    limit
        The number of ids to spell out.

    Returns
    -------
    str
        The first `limit` ids and, if there are more, the number of all.
    """
    if not isinstance(ids, Sized):
        ids = list(ids)
    count = len(ids)
    shown = ", ".join(str(value) for value in islice(ids, limit))
    return shown if count <= limit else f"{shown}, ... ({count} in all)"
