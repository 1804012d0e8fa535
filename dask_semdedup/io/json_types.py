"""Arrow types that represent JSON values without loss: integers and decimals exactly, or as text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import chain
from typing import Any

import pyarrow as pa

# The type of numbers that no 64-bit type represents exactly; other text is `pa.string()`.
AS_WRITTEN = pa.large_string()

BOUNDS = {pa.int64(): (-(2**63), 2**63 - 1), pa.uint64(): (0, 2**64 - 1)}

# Levels of nested types, more of which neither pandas nor Dask accepts.
DEPTH = 100


class _Number(str):
    """A number as it is written."""

    __repr__ = str.__str__


PLAIN = json.JSONDecoder()

EXACT = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_Number)


def type_of(values: Sequence[Any], depth: int = DEPTH) -> pa.DataType:
    """Return the type that represents all of the values without loss, or raise `ValueError`. All nulls are text."""
    if not depth:
        raise ValueError(f"members of members, {DEPTH} times")
    kinds = set(map(type, values)) - {type(None)}
    if kinds == {dict}:
        fields: dict[str, list[Any]] = {}
        for name, value in chain.from_iterable(value.items() for value in values if value is not None):
            fields.setdefault(name, []).append(value)
        # Raises for invalid UTF-8.
        "".join(fields).encode()
        return pa.struct([(name, type_of(members, depth - 1)) for name, members in fields.items()])
    if kinds == {list}:
        return pa.list_(type_of(list(chain.from_iterable(filter(None, values))), depth - 1))
    if kinds == {bool}:
        return pa.bool_()
    if kinds <= {str}:
        return pa.string()
    if kinds <= {int, float, _Number}:
        return _type_of_numbers([value for value in values if value is not None])
    raise ValueError(" and ".join(sorted({kind_of(value) for value in values if value is not None})))


def _type_of_numbers(numbers: Sequence[int | float | _Number]) -> pa.DataType:
    if _Number in set(map(type, numbers)):
        numbers = [_resolved(number) if isinstance(number, _Number) else number for number in numbers]
    kinds = set(map(type, numbers))
    integers = [number for number in numbers if isinstance(number, int)]
    if kinds == {int}:
        low, high = min(integers), max(integers)
        fitting = (type_ for type_, bounds in BOUNDS.items() if bounds[0] <= low and high <= bounds[1])
        return next(fitting, AS_WRITTEN)
    is_exact = _Number not in kinds and all(float(number) == number for number in integers)
    return pa.float64() if is_exact else AS_WRITTEN


def _resolved(text: _Number) -> int | float | _Number:
    """Return a number as an integer or float, or as it is written if neither represents it exactly."""
    if text.lstrip("-").isdigit():
        # No integer of 64 bits is longer.
        return int(text) if len(text) <= 20 else text
    return float(text) if _is_exact(text) else text


def _is_exact(text: str) -> bool:
    """Return whether float64 represents a number: an integer exactly, a decimal to the digits written, at most 17."""
    value, mantissa = float(text), re.split("[eE]", text)[0]
    if not math.isfinite(value) or not value:
        return not re.search("[1-9]", mantissa)
    if text.lstrip("-").isdigit():
        return Decimal(text) == Decimal(value)
    digits = len(Decimal(text).as_tuple().digits)
    return digits <= 17 or Decimal(text) == Decimal(f"{value:.{digits - 1}e}")


def fit_value(value: Any, type_: pa.DataType) -> Any:
    """Return a value as Arrow takes it for a type, or raise `ValueError` if the type does not represent it."""
    types = pa.types
    if value is None or (isinstance(value, bool) and types.is_boolean(type_)):
        return value
    if isinstance(value, dict) and types.is_struct(type_):
        fields = {field.name: field.type for field in type_}
        if new := [name for name in value if value[name] is not None and name not in fields]:
            raise ValueError(f"{new[0]!r} is a new key")
        return {name: fit_value(value.get(name), member) for name, member in fields.items()}
    if isinstance(value, list) and types.is_list(type_):
        return [fit_value(member, type_.value_type) for member in value]
    if isinstance(value, _Number):
        return _fit_number(value, type_)
    if isinstance(value, str) and type_ == pa.string():
        # Raises for invalid UTF-8.
        value.encode()
        return value
    raise ValueError(f"{kind_of(value)} is no {'number' if type_ == AS_WRITTEN else type_}")


def _fit_number(text: _Number, type_: pa.DataType) -> str | int | float:
    if type_ == AS_WRITTEN:
        return str(text)
    number = _resolved(text)
    if type_ in BOUNDS and isinstance(number, int) and BOUNDS[type_][0] <= number <= BOUNDS[type_][1]:
        return number
    if type_ == pa.float32() or (type_ == pa.float64() and _is_exact(text)):
        return float(text)
    raise ValueError(f"{type_} does not give {text} back")


def kind_of(value: object) -> str:
    """Return what JSON calls a value's kind, for error messages."""
    names = {dict: "an object", list: "a list", bool: "true or false", str: "text", type(None): "null"}
    return names.get(type(value), "a number")
