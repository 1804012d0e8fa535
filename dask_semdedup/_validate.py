"""Checks of arguments. Each raises an `InvalidArgumentError` that names the parameter and what it may be."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from numbers import Integral
from pathlib import Path

from dask.utils import parse_bytes

from dask_semdedup.errors import InvalidArgumentError

__all__ = [
    "check_bytes",
    "check_choice",
    "check_keywords",
    "check_name",
    "check_names",
    "check_positive",
    "check_seed",
    "stack_level",
    "type_name",
]

PACKAGE = f"{Path(__file__).parent}{os.sep}"


def check_bytes(name: str, value: str | int) -> int:
    """Return a size in bytes as a number. Raise unless it is a positive one."""
    try:
        size = int(parse_bytes(value))
    except ValueError as error:
        raise _invalid(name, f"must be bytes, as '128MiB', not {value!r}.") from error
    if size <= 0:
        raise _invalid(name, f"must be positive, not {value!r}.")
    return size


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless a value is one of those allowed."""
    # An array is equal to a string element by element.
    if not isinstance(value, str) or value not in allowed:
        shown = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
        raise _invalid(name, f"must be one of {', '.join(map(repr, allowed))}, not {shown}.")


def check_keywords(
    method: str, given: Iterable[str], passed_on: Callable[..., object], own: Callable[..., object]
) -> None:
    """Raise `TypeError` for a keyword that a method neither takes nor passes on, and suggest one that is similar."""
    known = list(inspect.signature(passed_on).parameters)
    for name in given:
        if name not in known:
            alike = difflib.get_close_matches(name, [*inspect.signature(own).parameters, *known], 1)
            hint = f" Did you mean {alike[0]!r}?" if alike else ""
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}.{hint}")


def check_names(name: str, value: Sequence[str] | None) -> None:
    """Raise if names of columns are not a list but one string."""
    if isinstance(value, str):
        raise _invalid(name, f"must be a list of names, as [{value!r}], not {value!r}.")


def check_name(name: str, value: object) -> None:
    """Raise unless a value can be the name of a column, which in pandas may be anything hashable."""
    if value is None or not isinstance(value, Hashable):
        raise _invalid(name, f"must be the name of a column, not {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Raise unless a value is None or a positive integer of Python or NumPy."""
    if value is not None and (not _is_integer(value) or value < 1):  # type: ignore[operator]
        raise _invalid(name, f"must be a positive integer or None, not {value!r}.")


def check_seed(value: object) -> None:
    """Raise unless a value can be a `random_seed`: an integer of Python or NumPy."""
    if not _is_integer(value):
        raise _invalid("random_seed", f"must be an integer, not {value!r}.")


def _invalid(name: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} {reason}", parameters=[name])


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def type_name(value: object) -> str:
    """Return the type of a value and, unless it is Python's own, its library: "list", "pandas.DataFrame"."""
    library = type(value).__module__.partition(".")[0]
    return type(value).__qualname__ if library == "builtins" else f"{library}.{type(value).__qualname__}"


def stack_level() -> int:
    """Return the `stacklevel` with which a warning points at the first caller outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    return level
