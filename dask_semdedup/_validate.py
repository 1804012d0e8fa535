"""Checks of arguments: each raises `InvalidArgumentError` that names the parameter and what it may be."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from dask.utils import parse_bytes

from dask_semdedup.errors import InvalidArgumentError

__all__ = ["check_bytes", "check_choice", "check_names", "check_positive", "check_seed"]


def check_bytes(name: str, value: str | int) -> int:
    """Give a size in bytes as a number, or raise unless it is one and positive.

    Examples
    --------
    >>> check_bytes("partition_size", "128MiB")
    134217728
    """
    try:
        size = int(parse_bytes(value))
    except ValueError as error:
        raise InvalidArgumentError(f"{name} must be bytes, as '128MiB', not {value!r}.") from error
    if size <= 0:
        raise InvalidArgumentError(f"{name} must be positive, not {value!r}.")
    return size


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless a value is one of those allowed.

    Examples
    --------
    >>> check_choice("device", "cpu", ["cpu", "cuda"])
    """
    if value not in allowed:
        raise InvalidArgumentError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}.")


def check_names(name: str, value: Sequence[str] | None) -> None:
    """Raise for one string, where columns are to be named in a list.

    Examples
    --------
    >>> check_names("columns", ["id"])
    """
    if isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be a list of names, as [{value!r}], not {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Raise unless a value is a positive integer, of Python or NumPy, or None.

    Examples
    --------
    >>> check_positive("embedding_dim", None)
    """
    if value is not None and (not _is_integer(value) or value < 1):  # type: ignore[operator]
        raise InvalidArgumentError(f"{name} must be a positive integer or None, not {value!r}.")


def check_seed(value: object) -> None:
    """Raise unless a value can be a `random_seed`: an integer, of Python or NumPy.

    Examples
    --------
    >>> check_seed(42)
    """
    if not _is_integer(value):
        raise InvalidArgumentError(f"random_seed must be an integer, not {value!r}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
