"""The numbers that planning needs, out of thousands of Parquet footers at once.

A footer is a Thrift struct. Arrow takes 50 microseconds for one, most of them for the schema, which is the same in all
files of a dataset; so are which fields there are, and in what order: footers of one writer differ in numbers and in
statistics. `read_alike` therefore reads them side by side. Each step takes the same value out of all of them, with a
few operations of NumPy. What is not built like the first footer is told apart, and is Arrow's business.

Only the shape of Thrift's compact protocol [1]_ and the numbers of a few fields of Parquet's metadata [2]_ are known
here; both are fixed, since otherwise old files could not be read.

References
----------
.. [1] https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
.. [2] https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

# Types of the compact protocol.
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
INTEGERS = (4, 5, 6)
# The length of the struct and the magic number, which follow it.
TRAILER = 8
# Bits of a number that a byte holds, and of the longest number.
BITS, MOST_BITS = 7, 64


class Chunk(NamedTuple):
    """A column of a row group in each file: (n,) numbers of values, bytes, and nulls, if the files say."""

    values: np.ndarray
    nbytes: np.ndarray
    nulls: np.ndarray | None

    def take(self, files: np.ndarray) -> Chunk:
        """The same of some of the files."""
        return Chunk(self.values[files], self.nbytes[files], None if self.nulls is None else self.nulls[files])


class Group(NamedTuple):
    """A row group in each file: (n,) numbers of rows, and its columns."""

    rows: np.ndarray
    chunks: list[Chunk]

    def take(self, files: np.ndarray) -> Group:
        """The same of some of the files."""
        return Group(self.rows[files], [chunk.take(files) for chunk in self.chunks])


def read_alike(footers: Sequence[bytes]) -> tuple[np.ndarray, list[Group]]:
    """Read those footers that are built like the first.

    Parameters
    ----------
    footers : sequence of n bytes
        Ends of Parquet files, each from where its footer begins. The first must be known to be sound.

    Returns
    -------
    alike : (m,) int64 array
        Positions of the footers that are whole, and of the first one's schema and shape.
    groups : list of Group
        Their row groups, as many as the first has, with m numbers of each kind.

    Examples
    --------
    >>> import io
    >>> import pyarrow as pa
    >>> import pyarrow.parquet as pq
    >>> def footer(table):
    ...     pq.write_table(table, file := io.BytesIO())
    ...     return file.getvalue()[-8 - int.from_bytes(file.getvalue()[-8:-4], "little") :]
    >>> tables = [pa.table({"id": [1, 2]}), pa.table({"id": [3]}), pa.table({"x": [1.0]})]
    >>> alike, (group,) = read_alike([footer(table) for table in tables])
    >>> alike.tolist(), group.rows.tolist()
    ([0, 1], [2, 1])
    """
    thrift = _Thrift(footers)
    groups: list[Group] = []
    try:
        for field, kind in thrift.fields():
            if field == 4:
                groups = [_read_group(thrift) for _ in thrift.items()]
            else:
                thrift.skip(kind)
            if field == 2:
                thrift.must_equal_so_far()
    except _UnknownTypeError:
        return np.zeros(0, dtype=np.int64), []
    thrift.must_end()
    alike = np.flatnonzero(thrift.alike)
    return alike, [group.take(alike) for group in groups]


def _read_group(thrift: _Thrift) -> Group:
    rows, chunks = thrift.zeros, []
    for field, kind in thrift.fields():
        if field == 1:
            chunks = [_read_chunk(thrift) for _ in thrift.items()]
        elif field == 3:
            rows = thrift.integers()
        else:
            thrift.skip(kind)
    return Group(rows, chunks)


def _read_chunk(thrift: _Thrift) -> Chunk:
    chunk = Chunk(thrift.zeros, thrift.zeros, None)
    for field, kind in thrift.fields():
        if field == 3:
            chunk = _read_chunk_metadata(thrift)
        else:
            thrift.skip(kind)
    return chunk


def _read_chunk_metadata(thrift: _Thrift) -> Chunk:
    values = nbytes = thrift.zeros
    nulls = None
    for field, kind in thrift.fields():
        if field == 5:
            values = thrift.integers()
        elif field == 6:
            nbytes = thrift.integers()
        elif field == 12:
            nulls = _read_nulls(thrift)
        else:
            thrift.skip(kind)
    return Chunk(values, nbytes, nulls)


def _read_nulls(thrift: _Thrift) -> np.ndarray | None:
    nulls = None
    for field, kind in thrift.fields():
        if field == 3:
            nulls = thrift.integers()
        else:
            thrift.skip(kind)
    return nulls


class _UnknownTypeError(Exception):
    """A type that Parquet does not use: what follows cannot be told."""


class _Thrift:
    """Structs in the compact protocol, read side by side: every method takes all of them on by the same value.

    The first says what comes next. Those that go on otherwise are `alike` no more; where they are then read means
    nothing, but is always inside of the data.
    """

    def __init__(self, footers: Sequence[bytes]) -> None:
        self.footers = footers
        self.data = np.frombuffer(b"".join(footers), np.uint8)
        self.ends = np.cumsum([len(footer) for footer in footers])
        self.at = np.concatenate([[0], self.ends[:-1]])
        self.alike = np.ones(len(footers), dtype=bool)
        self.zeros = np.zeros(len(footers), dtype=np.int64)

    def must_equal_so_far(self) -> None:
        """Tell apart what is not, up to here, the same as in the first."""
        so_far = self.footers[0][: int(self.at[0])]
        self.alike &= [footer.startswith(so_far) for footer in self.footers]

    def must_end(self) -> None:
        """Tell apart what does not end here."""
        self.alike &= self.at == self.ends - TRAILER

    def fields(self) -> Iterator[tuple[int, int]]:
        """The number and type of each field of a struct; the caller reads the value before asking for the next."""
        field = 0
        while head := self._same(self._bytes()):
            step, kind = divmod(head, 16)
            field = field + step if step else self._same(self.integers())
            yield field, kind

    def items(self) -> Iterator[int]:
        """The type of each item of a list, which the caller reads before asking for the next."""
        n, kind = divmod(self._same(self._bytes()), 16)
        yield from repeat(kind, n if n < 15 else self._same(self._varints()))

    def integers(self) -> np.ndarray:
        """An integer of each struct, (n,) int64."""
        values = self._varints()
        return (values >> 1) ^ -(values & 1)

    def skip(self, kind: int) -> None:
        """Pass over a field's value."""
        if kind in (TRUE, FALSE):
            return  # the type is the value
        if kind in INTEGERS:
            self._varints()
        elif kind == BINARY:
            self.at += self._varints()
        elif kind in (LIST, SET):
            for item in self.items():
                self.skip(BYTE if item in (TRUE, FALSE) else item)
        elif kind == STRUCT:
            for _, inner in self.fields():
                self.skip(inner)
        elif kind in (BYTE, DOUBLE):
            self.at += 1 if kind == BYTE else 8
        else:
            raise _UnknownTypeError(kind)

    def _bytes(self) -> np.ndarray:
        values = self.data.take(self.at, mode="clip")
        self.at += 1
        return values

    def _same(self, values: np.ndarray) -> int:
        """The first one's value, which the others must have too."""
        self.alike &= values == values[0]
        return int(values[0])

    def _varints(self) -> np.ndarray:
        """An unsigned number of each, as int64: 7 bits a byte, the lowest first, and a bit for whether it goes on."""
        first = self._bytes()
        values = (first & 127).astype(np.int64)
        longer = np.flatnonzero(first > 127)
        for shift in range(BITS, MOST_BITS, BITS):
            if not len(longer):
                break
            following = self.data.take(self.at[longer], mode="clip")
            self.at[longer] += 1
            values[longer] |= (following & 127).astype(np.int64) << shift
            longer = longer[following > 127]
        return values
