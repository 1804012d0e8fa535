"""Columns in the names of folders, as ``lang=en/year=2024/part.parquet``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa

__all__ = ["NULL_NAMES", "Keys", "integers_or_names", "key_type", "keys_below"]


class Keys(NamedTuple):
    """Columns in the names of folders or files: their fields, and the values of each file in the fields' order."""

    fields: pa.Schema
    values: dict[str, tuple[Any, ...]]

    @property
    def nullable(self) -> frozenset[str]:
        """The columns for which some files have no value."""
        columns = zip(self.fields.names, zip(*self.values.values(), strict=True), strict=False)
        return frozenset(name for name, values in columns if None in values)

    def without(self, names: Collection[str]) -> Keys:
        """Return the columns that do not have these names."""
        kept = [place for place, name in enumerate(self.fields.names) if name not in names]
        values = {path: tuple(of_file[place] for place in kept) for path, of_file in self.values.items()}
        return Keys(pa.schema([self.fields.field(place) for place in kept]), values)


def keys_below(roots: Sequence[str], files: Collection[str]) -> Keys:
    """Return the columns in the names of folders below the roots: int64 if all values are integers, else strings."""
    values = {file: _key_values(file.removeprefix(_longest(roots, file))) for file in files}
    columns = {}
    for name in dict.fromkeys(name for found in values.values() for name in found):
        known = {file: found[name] for file, found in values.items() if found.get(name, "") not in NULL_NAMES}
        columns[name] = integers_or_names(known)
    fields = pa.schema({name: key_type(column.values()) for name, column in columns.items()})
    return Keys(fields, {file: tuple(column.get(file) for column in columns.values()) for file in files})


def _longest(roots: Sequence[str], file: str) -> str:
    return max((root for root in roots if file.startswith(root)), key=len, default="")


def _key_values(relative: str) -> dict[str, str]:
    parts = (folder.partition("=") for folder in relative.split("/")[:-1])
    return {key: unquote(value) for key, found, value in parts if key and found}


INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")

INT64 = range(-(2**63), 2**63)

# Values in the names of folders that mean null to Hive and Arrow.
NULL_NAMES = frozenset({"", "__HIVE_DEFAULT_PARTITION__"})


def integers_or_names(names: Mapping[str, str]) -> dict[str, Any]:
    """Return values in names of files or folders as integers, if all are plain int64, or else as strings."""
    distinct = set(names.values())
    if all(map(INTEGER.fullmatch, distinct)) and all(int(name) in INT64 for name in distinct):
        return {path: int(name) for path, name in names.items()}
    return dict(names)


def key_type(values: Iterable[Any]) -> pa.DataType:
    """Return the Arrow type of what `integers_or_names` returns."""
    return pa.int64() if all(isinstance(value, int) for value in values) else pa.string()
