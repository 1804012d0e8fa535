"""Reading the numbers that planning needs from one Parquet footer, or from thousands at once.

A footer is a Thrift struct. Arrow reads it safely only if it is sound: an impossible statistic ends the process. Arrow
is also slow with thousands of footers, since it decodes all of each one: `read_clusters` of 50,000 files takes 7 s, and
takes 37 to 53 s if Arrow reads the footers. So this module reads the numbers, and Arrow the schema of the first file.

There are two engines, and the wanted fields are listed once for both. `read_footer` reads one footer with Python's
integers. `read_alike` reads many side by side: footers of one writer differ in their numbers and statistics, but hardly
ever in their fields and the order of these. Each step takes the same value out of all footers with a few NumPy
operations. Footers that are damaged, or are not built like the first, are left out, and then read one by one.

This module knows only Thrift's compact protocol [1]_ and the numbers of a few fields of Parquet's metadata [2]_.
Neither can change, or old files could not be read.

References
----------
.. [1] https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
.. [2] https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

# Types of the compact protocol.
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12

INTEGERS = (4, 5, 6)

# Bytes of the length and the magic number, which follow the struct.
TRAILER = 8

# Bits of a number in each byte, and in the longest number.
BITS, MAX_BITS = 7, 64

# Levels of nested structs and lists. Parquet has few, and damaged data must not exhaust Python's stack.
MAX_DEPTH = 32

# No column chunk or file has so many rows, values or bytes.
MAX_NUMBER = 2**40

# Bytes of an integer, by its physical type.
WIDTHS = {"INT32": 4, "INT64": 8}

# One number, or an array with that of each file.
Number = TypeVar("Number", int, np.ndarray)


class FooterError(ValueError):
    """A footer is damaged; the message says how."""


class Chunk(NamedTuple, Generic[Number]):
    """A column of a row group: its numbers of values, bytes and, if known, nulls, and whether it has a dictionary.

    `bounds` are a pair for each file, for the column whose bounds are wanted. They are None if the file has none.
    """

    values: Number
    nbytes: Number
    nulls: Number | None
    has_dictionary: bool = False
    bounds: Sequence[tuple[Any, Any]] = ()


class Group(NamedTuple, Generic[Number]):
    """A row group: the number of its rows, and its columns."""

    rows: Number
    chunks: list[Chunk[Number]]


class Bounded(NamedTuple):
    """A leaf column whose bounds are wanted: integers of so many bytes, or text, whose width is 0."""

    leaf: int
    width: int
    is_signed: bool = False

    @classmethod
    def of(cls, column: Any, leaf: int) -> Bounded | None:
        """Return how to read the bounds of a column of Arrow's Parquet schema, or None if their order is unknown."""
        kind, width = column.logical_type.type, WIDTHS.get(column.physical_type)
        if width and kind in ("NONE", "INT"):
            return cls(leaf, width, is_signed=not column.converted_type.startswith("UINT"))
        return cls(leaf, 0) if kind == "STRING" else None

    def decode(self, low: bytes, high: bytes) -> tuple[Any, Any]:
        """Return the bounds that these bytes encode, or None if they are invalid. Text may have been truncated."""
        try:
            bounds = self._value(low), self._value(high)
        except ValueError:
            return None, None
        return bounds if bounds[0] <= bounds[1] else (None, None)

    def _value(self, data: bytes) -> Any:
        if not self.width:
            return data.decode()
        if len(data) != self.width:
            raise ValueError(f"{len(data)} bytes, not {self.width}")
        return int.from_bytes(data, "little", signed=self.is_signed)


def read_footer(footer: bytes, leaves: int, bounded: Bounded | None = None) -> list[Group[int]]:
    """Return the row groups of one footer.

    Parameters
    ----------
    footer
        The end of a Parquet file, from where its footer begins.
    leaves
        The number of leaf columns of its schema.
    bounded
        The column whose bounds are wanted.

    Returns
    -------
    list of Group
        The row groups, with integers.

    Raises
    ------
    FooterError
        If the footer is damaged. Damage goes unnoticed if all numbers are possible.
    """
    thrift = _One(footer)
    try:
        file = thrift.struct(_wanted(bounded))
    except IndexError:
        raise FooterError("the footer ends too early") from None
    groups = _read_groups(thrift, file, bounded)
    for number, group in enumerate(groups):
        if len(group.chunks) != leaves:
            raise FooterError(f"row group {number} has {len(group.chunks)} columns, and the schema {leaves}")
    return groups


def read_alike(footers: Sequence[bytes], bounded: Bounded | None = None) -> tuple[np.ndarray, list[Group[np.ndarray]]]:
    """Return the row groups of those footers that are built like the first.

    Parameters
    ----------
    footers : sequence of n bytes
        Ends of Parquet files, each from where its footer begins. The first must be one that `read_footer` reads.
    bounded
        The column whose bounds are wanted.

    Returns
    -------
    alike : (m,) int64 array
        Positions of the footers that are sound, and have the schema and shape of the first.
    groups : list of Group
        Their row groups, as many as the first has, with arrays of m numbers.
    """
    thrift = _Many(footers)
    try:
        groups = _read_groups(thrift, thrift.struct(_wanted(bounded)), bounded)
    except FooterError:
        return np.zeros(0, dtype=np.int64), []
    thrift.must(thrift.at == thrift.ends)
    alike = np.flatnonzero(thrift.alike)
    return alike, [_take_group(group, alike) for group in groups]


def _take_group(group: Group[np.ndarray], files: np.ndarray) -> Group[np.ndarray]:
    return Group(group.rows[files], [_take_chunk(chunk, files) for chunk in group.chunks])


def _take_chunk(chunk: Chunk[np.ndarray], files: np.ndarray) -> Chunk[np.ndarray]:
    return chunk._replace(
        values=chunk.values[files],
        nbytes=chunk.nbytes[files],
        nulls=None if chunk.nulls is None else chunk.nulls[files],
        bounds=[chunk.bounds[file] for file in files.tolist()] if chunk.bounds else (),
    )


class _Structs(NamedTuple):
    """A list of structs, of which the same fields are wanted, and of some of them others."""

    fields: Mapping[int, Any]
    of_some: Mapping[int, Mapping[int, Any]] = {}


# Any value, which must be the same in all footers.
SAME = object()


def _wanted(bounded: Bounded | None) -> Mapping[int, Any]:
    """Return the wanted fields of a footer by number: `int`, `bytes`, the fields of a struct, or a list of structs."""
    # ColumnMetaData: values, uncompressed bytes, offset of the dictionary, and Statistics, with the nulls
    chunk = {5: int, 6: int, 11: int, 12: {3: int}}
    # and the largest and smallest value, by the old rules and the new.
    with_bounds = {**chunk, 12: {1: bytes, 2: bytes, 3: int, 5: bytes, 6: bytes}}
    chunks = _Structs({3: chunk}, {bounded.leaf: {3: with_bounds}} if bounded else {})
    # FileMetaData: schema, rows, row groups with their columns and rows, and the order of each column.
    return {2: SAME, 3: int, 4: _Structs({1: chunks, 3: int}), 7: _Structs({1: {}})}


def _read_groups(thrift: _Thrift, file: Mapping[int, Any], bounded: Bounded | None) -> list[Group[Any]]:
    """Return the row groups among a footer's fields. All of their numbers must be possible."""
    fields = _fields_of_bounds(bounded, file.get(7, ()))
    try:
        groups = [Group(group[3], [_read_chunk(chunk[3], bounded, fields) for chunk in group[1]]) for group in file[4]]
        thrift.must(sum(group.rows for group in groups) == file[3], "its row groups have other rows than the file")
    except KeyError as error:
        raise FooterError(f"one of its structs has no field {error}") from None
    for group in groups:
        thrift.must((group.rows >= 0) & (group.rows < MAX_NUMBER), "a row group has an impossible number of rows")
        for chunk in group.chunks:
            # The union of the bits is negative or too large if one of the numbers is.
            bits = chunk.values | chunk.nbytes | (0 if chunk.nulls is None else chunk.nulls)
            thrift.must(
                (bits >= 0) & (bits < MAX_NUMBER), "a column has an impossible number of values, bytes or nulls"
            )
            # Arrow makes room for the rows, whatever the columns hold.
            thrift.must(chunk.values >= group.rows, "a column has fewer values than its row group has rows")
    return groups


def _read_chunk(metadata: Mapping[int, Any], bounded: Bounded | None, fields: Sequence[tuple[int, int]]) -> Chunk[Any]:
    statistics = metadata.get(12, {})
    bounds: list[tuple[Any, Any]] = []
    for low, high in fields:
        if not bounds and bounded and low in statistics and high in statistics:
            bounds = list(map(bounded.decode, statistics[low], statistics[high]))
    return Chunk(metadata[5], metadata[6], statistics.get(3), 11 in metadata, bounds)


def _fields_of_bounds(bounded: Bounded | None, orders: Sequence[Mapping[int, Any]]) -> list[tuple[int, int]]:
    """Return the fields of the smallest and the largest value, the better pair first.

    The new ones follow the column's order. The old ones were compared as signed values, whatever the column.
    """
    if bounded is None:
        return []
    is_ordered = bounded.leaf < len(orders) and 1 in orders[bounded.leaf]
    return [(6, 5)] * is_ordered + [(2, 1)] * bounded.is_signed


class _Thrift(ABC):
    """Reads structs in the compact protocol. The engines read one struct or many side by side.

    Each value takes a byte or more, and no length exceeds the rest of the data. So the time and memory that damaged
    data takes are bounded by its length.
    """

    at: Any

    @abstractmethod
    def must(self, condition: Any, reason: str) -> None:
        """Reject the footers that do not meet a condition."""

    @abstractmethod
    def must_equal_so_far(self) -> None:
        """Reject the footers that differ from the first one up to here."""

    @abstractmethod
    def same(self, value: Any) -> int:
        """Return a value that must be the same in all footers, since it decides what comes next."""

    @abstractmethod
    def byte(self) -> Any:
        """Read a byte."""

    @abstractmethod
    def unsigned(self) -> Any:
        """Read an unsigned integer: 7 bits in each byte, the lowest first, and a bit that says whether more follow."""

    @abstractmethod
    def length(self) -> Any:
        """Read an unsigned integer that is no more than the length of the remaining data."""

    @abstractmethod
    def binary(self) -> list[bytes]:
        """Read bytes from each footer."""

    def struct(self, wanted: Mapping[int, Any], depth: int = 0) -> dict[int, Any]:
        """Read a struct, and return its wanted fields of the wanted types by number."""
        found: dict[int, Any] = {}
        field = 0
        while head := self.same(self.byte()):
            field = field + (head >> 4) if head > 15 else self.same(_signed(self.unsigned()))
            value = self._value(head & 15, wanted.get(field), depth)
            if value is not None:
                found[field] = value
        return found

    def _value(self, kind: int, want: Any, depth: int) -> Any:
        """Read the value of a field, or skip it and return None if it is not wanted."""
        if want is int and kind in INTEGERS:
            return _signed(self.unsigned())
        if want is bytes and kind == BINARY:
            return self.binary()
        if isinstance(want, dict) and kind == STRUCT:
            return self.struct(want)
        if isinstance(want, _Structs) and kind == LIST:
            return self._structs(want)
        self._skip(kind, depth)
        if want is SAME:
            self.must_equal_so_far()
        return None

    def _structs(self, wanted: _Structs) -> list[dict[int, Any]]:
        n, kind = self._items()
        if n and kind != STRUCT:
            raise FooterError(f"a list of structs is one of type {kind}")
        return [self.struct(wanted.of_some.get(index, wanted.fields)) for index in range(n)]

    def _items(self) -> tuple[int, int]:
        """Read the number of a list's items, and their type."""
        n, kind = divmod(self.same(self.byte()), 16)
        return n if n < 15 else self.same(self.length()), kind

    def _skip(self, kind: int, depth: int) -> None:
        """Skip a field's value."""
        if kind in INTEGERS:
            self.unsigned()
        elif kind == BINARY:
            length = self.length()  # which advances `at`
            self.at += length
        elif kind in (TRUE, FALSE):
            return  # the type is the value
        elif kind in (BYTE, DOUBLE):
            self.at += 1 if kind == BYTE else 8
        elif depth == MAX_DEPTH:
            raise FooterError(f"more than {MAX_DEPTH} structs and lists lie in one another")
        elif kind == STRUCT:
            self.struct({}, depth + 1)
        elif kind in (LIST, SET):
            n, item = self._items()
            for _ in range(n):
                self._skip(BYTE if item in (TRUE, FALSE) else item, depth + 1)
        else:
            raise FooterError(f"a value is of type {kind}, which Parquet does not use")


def _signed(value: Any) -> Any:
    """Return the signed integer that an unsigned one encodes: 0, -1, 1, -2, ..."""
    return (value >> 1) ^ -(value & 1)


class _One(_Thrift):
    """Reads one footer with Python's integers. Raises `IndexError` if the data ends too early."""

    def __init__(self, footer: bytes) -> None:
        self.data = footer[:-TRAILER]
        self.at = 0

    def must(self, condition: bool, reason: str) -> None:
        if not condition:
            raise FooterError(reason)

    def must_equal_so_far(self) -> None:
        pass

    def struct(self, wanted: Mapping[int, Any], depth: int = 0) -> dict[int, Any]:
        # The same, but faster for long footers: most values are skipped without a call.
        data, at, field = self.data, self.at, 0
        found: dict[int, Any] = {}
        while head := data[at]:
            at += 1
            if head < 16:
                self.at = at
                field = _signed(self.unsigned())
                at = self.at
            else:
                field += head >> 4
            kind, want = head & 15, wanted.get(field)
            if want is None and kind in INTEGERS:
                while data[at] > 127:
                    at += 1
                at += 1
            elif want is None and kind == BINARY and data[at] < 128:
                at += 1 + data[at]
            else:
                self.at = at
                value = self._value(kind, want, depth)
                at = self.at
                if value is not None:
                    found[field] = value
        self.at = at + 1
        return found

    def same(self, value: int) -> int:
        return value

    def byte(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return value

    def unsigned(self) -> int:
        value = self.data[self.at]
        self.at += 1
        if value < 128:
            return value
        value &= 127
        for shift in range(BITS, MAX_BITS, BITS):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise FooterError("a number is too long")

    def length(self) -> int:
        value = self.unsigned()
        self.must(value <= len(self.data) - self.at, "a length is more than what is left")
        return value

    def binary(self) -> list[bytes]:
        n = self.length()
        self.at += n
        return [self.data[self.at - n : self.at]]


class _Many(_Thrift):
    """Reads footers side by side, with arrays of their numbers. The first footer decides what comes next.

    Footers that continue differently are no longer `alike`. Their positions then mean nothing, but stay in the data.
    """

    def __init__(self, footers: Sequence[bytes]) -> None:
        self.footers = footers
        self.joined = b"".join(footers)
        self.data = np.frombuffer(self.joined, np.uint8)
        ends = np.cumsum([len(footer) for footer in footers])
        self.at = np.concatenate([[0], ends[:-1]])
        self.ends = ends - TRAILER
        self.alike = np.ones(len(footers), dtype=bool)

    def must(self, condition: np.ndarray, reason: str = "") -> None:
        self.alike &= condition

    def must_equal_so_far(self) -> None:
        so_far = self.footers[0][: int(self.at[0])]
        self.alike &= [footer.startswith(so_far) for footer in self.footers]

    def same(self, value: np.ndarray) -> int:
        self.must(value == value[0])
        return int(value[0])

    def byte(self) -> np.ndarray:
        values = self.data.take(self.at, mode="clip")
        self.at += 1
        return values

    def unsigned(self) -> np.ndarray:
        first = self.byte()
        values = (first & 127).astype(np.int64)
        longer = np.flatnonzero(first > 127)
        for shift in range(BITS, MAX_BITS, BITS):
            if not len(longer):
                break
            following = self.data.take(self.at[longer], mode="clip")
            self.at[longer] += 1
            values[longer] |= (following & 127).astype(np.int64) << shift
            longer = longer[following > 127]
        self.alike[longer] = False
        return values

    def length(self) -> np.ndarray:
        values = self.unsigned()
        fits = (values >= 0) & (values <= self.ends - self.at)
        self.must(fits)
        return np.where(fits, values, 0)

    def binary(self) -> list[bytes]:
        lengths = self.length()
        starts = self.at.tolist()
        self.at += lengths
        return [self.joined[start:stop] for start, stop in zip(starts, self.at.tolist(), strict=True)]
