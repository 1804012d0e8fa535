"""Reading partitions of JSON lines into pandas frames.

Python's json finds the types in a sample of the lines, and Arrow's parser reads all lines into them. Arrow may round
numbers, skip keys and stop at columns that are not wanted. If it may have done so, Python's json reads the lines again:
it returns every value as it was written, or raises an error that names the line.
"""

from __future__ import annotations

import io
import json
import re
import reprlib
import shlex
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import IO, Any, NamedTuple, cast

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from dask.tokenize import tokenize
from fsspec.utils import read_block

from dask_semdedup.errors import DataReadError, IdError, MissingColumnsError, have, some
from dask_semdedup.io.folder_keys import Keys
from dask_semdedup.io.fragments import Fragment, check_state, state_now
from dask_semdedup.io.json_types import AS_WRITTEN, DEPTH, EXACT, PLAIN, fit_value, kind_of, type_of
from dask_semdedup.io.listing import THREADS, State, is_local
from dask_semdedup.io.reader import Reader, configured_string_dtype, taken_for_ids

__all__ = ["JSON_SUFFIXES", "Block", "JsonReader", "read_json", "rows_before"]

# Commands that print each kind of file, for advice.
PRINTED_BY = {"": "cat", ".gz": "gzip -dc", ".zst": "zstd -dc"}

JSON_SUFFIXES = tuple(kind + codec for codec in PRINTED_BY for kind in (".jsonl", ".ndjson", ".json"))

BOM = b"\xef\xbb\xbf"

# Bytes that are sampled: of the first file; of each other file or block; and of all other files, or blocks, together.
INFERRED_BYTES = 2**23

PIECE_BYTES = 2**15

SPREAD_BYTES = 2**24

# A request takes as long as the transfer of so many bytes.
REQUEST_BYTES = 2**12

# Blocks held at once while lines are counted.
COUNTING_THREADS = 4

# A compressed file may hold so many bytes, and EXPANSION times its own bytes in any case.
UNPACKED_BYTES = 2**28

EXPANSION = 200

# Bytes unpacked at once.
STEP_BYTES = 2**24

# Lists and objects on a line, fewer of which no parser finds too many to lie in one another.
MANY_NESTED = 2**12

# All bytes but those that begin a list, an object or a line.
NO_BEGINNING = bytes(set(range(256)).difference(b"[{\n"))

STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')

# Numbers that float64 may round: integers from 2⁵³ on, numbers of 18 digits or more, and exponents of three digits.
ROUNDED = r"-?(?:[0-9]{16}|0*\.?0*[1-9](?:\.?[0-9]){17}|[0-9.]+[eE][-+]?[0-9]{3})"

ANY_ROUNDED = rf"[:\[,]\s*{ROUNDED}"

# With keys of up to so many characters in all, the search for numbers by their keys is faster: it skips embeddings.
KEYED = 200

BLANK_LINE = re.compile(rb"\n\s*\n")

FIRST_OBJECT = re.compile(rb"\s*\{")

# A line that is not an object. Arrow crashes if the first line is null, and takes a later one for a row.
NO_OBJECT = r"\n[ \t\r]*[^{\s]"


class Block(NamedTuple):
    """A piece of a file of JSON lines: the lines that begin in these bytes, or all of a compressed file.

    `keys` are values in the names of folders, `first_row` is the number of the first row in the file, and `state` that
    of the file when it was listed.
    """

    path: str
    start: int = 0
    length: int | None = None
    keys: tuple[Any, ...] = ()
    first_row: int = 0
    state: State = State()


@dataclass(frozen=True)
class JsonReader:
    """Reads blocks of JSON lines, always with the same dtypes.

    Parameters
    ----------
    arrow
        Turns Arrow tables of the lines' schema into pandas.
    required
        A column that may not be null.
    origins
        From a column to the file from which its type is taken.
    complete
        Whether columns outside of the schema are an error.
    """

    arrow: Reader
    required: str
    origins: Mapping[str, str]
    complete: bool

    def __dask_tokenize__(self) -> Any:
        return tokenize(self.arrow, self.required, self.complete)

    @property
    def schema(self) -> pa.Schema:
        """The columns in the lines."""
        return self.arrow.schema

    @property
    def columns(self) -> list[str]:
        """All columns."""
        return self.arrow.columns

    def meta(self, columns: Sequence[str]) -> pd.DataFrame:
        """Return an empty frame with the dtypes of every partition."""
        return cast(pd.DataFrame, self.arrow.meta(columns))

    def read(self, block: Block, columns: Sequence[str]) -> pd.DataFrame:
        """Return the rows of a block, with a new `RangeIndex`."""
        text = _read_text(self.arrow.fs, block)
        rows = _count_rows(text)
        in_lines = [name for name in columns if name in self.schema.names]
        table = self._parse(text, block, pa.schema([self.schema.field(name) for name in in_lines]))
        if in_lines and rows != len(table):
            raise DataReadError(f"{block.path} has {rows} lines of {len(table)} objects. {EACH_LINE}")
        if self.required in in_lines and (count := table[self.required].null_count):
            message = f"{have(count, 'row')} no {self.required!r} in {block.path}. Give every row one."
            raise IdError(message, parameters=["id_field"], columns=[self.required])
        fragment = Fragment(block.path, rows, keys=block.keys, first_row=block.first_row)
        return self.arrow.to_pandas(table, [fragment], columns)

    def _parse(self, text: bytes, block: Block, schema: pa.Schema) -> pa.Table:
        """Return the lines as a table. Arrow reads what it reads exactly, and Python the rest."""
        complete = self.complete and len(schema) == len(self.schema)
        written = [field for field in schema if _holds(field.type, AS_WRITTEN)]
        table = _parse_fast(text, pa.schema([field for field in schema if field not in written]), schema, complete)
        if table is None:
            return self._parse_exactly(enumerate(text.split(b"\n"), 1), block, schema, complete)
        self._parse_exactly(_rounded_lines(text, table.schema), block, table.schema)
        if written:
            exact = self._parse_exactly(enumerate(text.split(b"\n"), 1), block, pa.schema(written))
            for field in written:
                table = table.append_column(field, exact[field.name])
        return table.select(schema.names)

    def _parse_exactly(
        self, lines: Iterable[tuple[int, bytes]], block: Block, schema: pa.Schema, complete: bool = False
    ) -> pa.Table:
        """Return numbered lines as a table of a schema. Raise `DataReadError` for the first line that does not fit."""
        values: dict[str, list[Any]] = {name: [] for name in schema.names}
        for number, line in lines:
            if not line.strip():
                continue
            row = _load(line, block, number, EXACT)
            others = [name for name, value in row.items() if value is not None and name not in values]
            if complete and others:
                raise DataReadError(
                    f"Column {others[0]!r} of {_where(block, number)} is new: the lines that columns are taken from "
                    f"have {schema.names}. Write it in the first lines too, or name the columns to read.",
                    parameters=["columns"],
                    columns=others,
                )
            for field in schema:
                try:
                    values[field.name].append(fit_value(row.get(field.name), field.type))
                except ValueError as error:
                    _check_utf8(line, block, number, field.name)
                    origin = self.origins.get(field.name, block.path)
                    raise DataReadError(
                        f"Column {field.name!r} is {_shown(field.type)} in {origin}, from which its type is taken, but "
                        f"{_shown(row[field.name])} in {_where(block, number)}: {error}. {ONE_TYPE}",
                        parameters=["columns"],
                        columns=[field.name],
                    ) from error
        return pa.table([pa.array(values[field.name], field.type) for field in schema], schema)


def read_json(
    fs: fsspec.AbstractFileSystem,
    files: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str] | None,
    keys: Keys,
    required: str,
    embeddings: str,
    size: int,
    **options: Any,
) -> tuple[JsonReader, list[Block]]:
    """Return a reader of the files' lines, and the blocks in which they are read.

    Parameters
    ----------
    fs, files
        As `list_files` returns them.
    columns
        The columns to read; None stands for all.
    keys
        Columns in the names of folders, which give way to those in the lines.
    required
        A column that may not be null.
    embeddings
        A column that becomes float32 if it holds lists of numbers.
    size
        About how many bytes a block has.
    **options
        Arguments of `Reader`.
    """
    states = {path: State.of(fs, info) for path, info in files.items() if info["size"]}
    blocks = [block for path, state in states.items() for block in _blocks(path, state, size)]
    lines = list(_sample(fs, blocks, columns))
    if not lines:
        raise DataReadError(f"No rows in {some(files)}: nothing but empty files or blank lines.")
    present = dict.fromkeys(chain.from_iterable(line.row for line in lines))
    keys = keys.without(present)
    made = taken_for_ids(options.get("make_ids"), present)
    if columns is not None and not set(columns) <= {*present, *keys.fields.names, *made}:
        names = [*present, *keys.fields.names]
        advice = f"Name columns of {lines[0].block.path} as columns."
        raise MissingColumnsError.build(columns, names, advice, parameters=["columns"])
    types = {name: _type_of_column(name, lines) for name in dict.fromkeys(columns or present) if name in present}
    found = types.get(embeddings, pa.null())
    if pa.types.is_list(found) and not pa.types.is_nested(found.value_type):
        types[embeddings] = pa.list_(pa.float32())
    # Any line may lack a key that others have.
    arrow = Reader(
        fs,
        pa.schema(list(types.items())),
        (frozenset(types) - {required}) | keys.nullable,
        keys.fields,
        string_dtype=configured_string_dtype(),
        **options,
    )
    starts = rows_before(fs, blocks) if made else [0] * len(blocks)
    blocks = [
        block._replace(keys=keys.values[block.path], first_row=row) for block, row in zip(blocks, starts, strict=True)
    ]
    origins = {name: line.block.path for line in reversed(lines) for name in types if line.row.get(name) is not None}
    return JsonReader(arrow, required, origins, complete=columns is None), blocks


def rows_before(fs: fsspec.AbstractFileSystem, blocks: Sequence[Block]) -> list[int]:
    """Return how many rows of its file precede each block. All blocks of a file but the last are read.

    The blocks of a file must be consecutive and in their order.
    """
    counted = [block for block, after in pairwise(blocks) if block.path == after.path]
    with ThreadPoolExecutor(1 if is_local(fs) else COUNTING_THREADS) as pool:
        counts = dict(zip(counted, pool.map(lambda block: _count_rows(_read_text(fs, block)), counted), strict=True))
    rows = [0] * len(blocks)
    for index, (block, after) in enumerate(pairwise(blocks)):
        if block.path == after.path:
            rows[index + 1] = rows[index] + counts[block]
    return rows


def _blocks(path: str, state: State, size: int) -> list[Block]:
    if path.endswith((".gz", ".zst")):
        return [Block(path, state=state)]
    length = -(-state.size // -(-state.size // size))
    return [Block(path, start, length, state=state) for start in range(0, state.size, length)]


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn what goes wrong in the block into a `DataReadError` that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise DataReadError(f"Cannot read {path} (truncated, damaged or gone?): {error}") from error


@contextmanager
def _open(fs: fsspec.AbstractFileSystem, path: str, **options: Any) -> Iterator[IO[bytes]]:
    """Open a file, decompressed."""
    if not path.endswith(".zst"):
        with fs.open(path, "rb", compression="infer", **options) as file:
            yield file
        return
    # Not every Python has a library for Zstandard.
    with fs.open(path, "rb", **options) as file, pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd") as stream:
        yield io.BufferedReader(stream)


def _read_text(fs: fsspec.AbstractFileSystem, block: Block) -> bytes:
    with _naming(block.path), _open(fs, block.path) as file:
        # A file that is unpacked has another size.
        found = state_now(fs, block.path, file if block.length else None)
        check_state(block.path, block.state, found, "first lines")
        text = _unpack(file, block) if block.length is None else read_block(file, block.start, block.length, b"\n")
    return cast(bytes, text if block.start else text.removeprefix(BOM))


def _unpack(file: IO[bytes], block: Block, separator: bytes = b"") -> bytes:
    """Return what is left of a compressed file, or what is left up to a separator. Raise if that is too much."""
    read = file.readline if separator else file.read
    pieces, left = [], max(UNPACKED_BYTES, EXPANSION * block.state.size)
    while piece := read(STEP_BYTES):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise DataReadError(
                f"{block.path} has {block.state.size} bytes, and holds more than {EXPANSION} times as many. It may be "
                f"made to exhaust memory. If it is not, unpack it first, since files that are not compressed are read "
                f"in blocks: {_printed(block.path)} > rows.jsonl"
            )
        if separator and piece.endswith(separator):
            break
    return b"".join(pieces)


def _read_beginning(fs: fsspec.AbstractFileSystem, block: Block, nbytes: int) -> bytes:
    """Return about so many bytes of whole lines. Hardly more is fetched from a remote file."""
    with _naming(block.path):
        if block.length is None:
            with _open(fs, block.path, block_size=nbytes) as file:
                return (file.read(nbytes) + _unpack(file, block, b"\n")).removeprefix(BOM)
        text = fs.cat_file(block.path, start=block.start, end=block.start + nbytes)
    lines = text.partition(b"\n")[2] if block.start else text.removeprefix(BOM)
    if len(text) < nbytes:
        return cast(bytes, lines)
    # A single line may be longer.
    return lines[: lines.rfind(b"\n") + 1] or _read_beginning(fs, block, 4 * nbytes)


def _count_rows(text: bytes) -> int:
    """Return how many lines are not blank."""
    text = text.strip()
    if BLANK_LINE.search(text):
        return sum(map(bool, map(bytes.strip, text.split(b"\n"))))
    return text.count(b"\n") + 1 if text else 0


def _load(line: bytes, block: Block, number: int, decoder: json.JSONDecoder) -> dict[str, Any]:
    """Return the object on a line, or raise `DataReadError`. Columns that are not read may hold invalid UTF-8."""
    try:
        row = decoder.decode(line.decode("utf-8", "surrogateescape"))
        if isinstance(row, dict):
            return row
        why: object = f"{kind_of(row)}, not an object"
    except (ValueError, RecursionError) as error:
        why = error
    raise DataReadError(
        f"Cannot read {_where(block, number)} as JSON lines ({why}). {_advice(line.strip(), block.path)}"
    )


def _check_utf8(line: bytes, block: Block, number: int, column: str) -> None:
    """Raise `DataReadError` if a line is of another encoding."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise DataReadError(
            f"Column {column!r} is not UTF-8 in {_where(block, number)}: {error}. If the file is Latin-1, convert it: "
            f"{_printed(block.path)} | iconv -f latin1 -t utf-8 > rows.jsonl; or name the columns to read.",
            parameters=["columns"],
            columns=[column],
        ) from error


def _advice(line: bytes, path: str) -> str:
    """Return advice on a line that is not an object: often the file is JSON of another form."""
    printed = f"{_printed(path)} | python"
    if line.startswith(b"["):
        rows = "import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]"
        return f"If the file is one JSON array, convert it: {printed} -c {shlex.quote(rows)} > rows.jsonl"
    if line == b"{":
        return f"If the file is one object on many lines, convert it: {printed} -m json.tool --compact > rows.jsonl"
    return EACH_LINE


def _printed(path: str) -> str:
    """Return the command that prints a file."""
    suffix = next(suffix for suffix in reversed(PRINTED_BY) if path.endswith(suffix))
    return f"{PRINTED_BY[suffix]} {shlex.quote(path)}"


def _where(block: Block, number: int) -> str:
    return f"line {number}{f' after byte {block.start}' if block.start else ''} of {block.path}"


EACH_LINE = "Each line must be one object of JSON, in UTF-8."

ONE_TYPE = "Write the column with one type in all files, or name the columns to read."


class _Line(NamedTuple):
    """An object of the sample, with its block and line number."""

    block: Block
    number: int
    row: dict[str, Any]


def _sample(fs: fsspec.AbstractFileSystem, blocks: Sequence[Block], columns: Sequence[str] | None) -> Iterator[_Line]:
    """Yield lines of the first file, and of places in other files and blocks, with these columns only."""
    starts = [block for block in blocks if not block.start]
    others = _spread(starts[1:]) + _spread([block for block in blocks if block.start])
    chosen = dict.fromkeys(starts[:1], INFERRED_BYTES) | dict.fromkeys(others, PIECE_BYTES)
    with ThreadPoolExecutor(1 if is_local(fs) else THREADS) as pool:
        for block, text in zip(chosen, pool.map(lambda item: _read_beginning(fs, *item), chosen.items()), strict=True):
            lines = text.split(b"\n")
            rounded = pc.match_substring_regex(pa.array(lines, pa.large_binary()), ANY_ROUNDED).to_pylist()
            for number, (line, is_rounded) in enumerate(zip(lines, rounded, strict=True), 1):
                if line.strip():
                    row = _load(line, block, number, EXACT if is_rounded else PLAIN)
                    wanted = row if columns is None else {name: row[name] for name in columns if name in row}
                    yield _Line(block, number, wanted)


def _spread(blocks: Sequence[Block]) -> list[Block]:
    """Return as many of the blocks, at equal distances, as may be sampled."""
    nbytes = (min(PIECE_BYTES, max(REQUEST_BYTES, block.length or PIECE_BYTES)) for block in blocks)
    return list(blocks[:: max(1, -(-sum(nbytes) // SPREAD_BYTES))])


def _type_of_column(name: str, lines: Sequence[_Line]) -> pa.DataType:
    if why := _disagreement([{name: None}]):
        first_line = next(line for line in lines if name in line.row)
        raise DataReadError(f"Key {name!r} in {_where(*first_line[:2])}: {why}. {EACH_LINE}")
    values = [line.row.get(name) for line in lines]
    try:
        return type_of(values)
    except ValueError as error:
        # The first line that disagrees, with the first that it disagrees with, unless that is itself.
        last = bisect_left(range(len(values)), True, key=lambda index: bool(_disagreement(values[: index + 1])))
        first = next(index for index in (last, *range(last)) if _disagreement([values[index], values[last]]))
        found = [f"{_shown(values[index])} in {_where(*lines[index][:2])}" for index in sorted({first, last})]
        why = _disagreement([values[first], values[last]])
        message = f"Column {name!r} is {' but '.join(found)}: {why}. {ONE_TYPE}"
        raise DataReadError(message, parameters=["columns"], columns=[name]) from error


def _disagreement(values: Sequence[Any]) -> str:
    """Return why no type represents all of the values, or nothing if one does."""
    try:
        type_of(values)
    except ValueError as error:
        return str(error)
    return ""


# What is deep cannot be shown whole.
SHOWN = reprlib.Repr()
SHOWN.maxlevel, SHOWN.maxdict, SHOWN.maxlist, SHOWN.maxstring, SHOWN.maxother = 10, 80, 80, 80, 80


def _shown(value: object) -> str:
    text = str(value) if isinstance(value, pa.DataType) else SHOWN.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse_fast(text: bytes, schema: pa.Schema, known: pa.Schema, complete: bool) -> pa.Table | None:
    """Return the lines as Arrow reads them into a schema, or None if it fails or would lose something."""
    from pyarrow import json

    if not FIRST_OBJECT.match(text) or _matches(text, NO_OBJECT) or _is_deep(text):
        return None
    # New keys are seen only if their types are inferred.
    infer = complete or any(_holds(field.type, None) for field in schema)
    options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="infer" if infer else "ignore")
    # The parser needs a whole line in a block, and a line may be as long as the text.
    reading = json.ReadOptions(use_threads=False, block_size=min(len(text), 2**31 - 1))
    try:
        table = json.read_json(pa.BufferReader(text), read_options=reading, parse_options=options)
        others = set(table.column_names) - set(known.names)
        table = table.select(schema.names)
        # Arrow accepts any bytes as text; only names of columns raise `UnicodeError`.
        table.validate(full=True)
    except (pa.ArrowException, UnicodeError):
        return None
    return table if table.schema.equals(schema) and not (complete and others) else None


def _is_deep(text: bytes) -> bool:
    """Return whether lists and objects lie so deep in one another that Arrow's recursive parser may end the process."""
    opened = text.translate(None, NO_BEGINNING).split(b"\n")
    crowded = [number for number, line in enumerate(opened) if len(line) > MANY_NESTED]
    if not crowded:
        return False
    split = text.split(b"\n")
    return any(_depth(split[line]) > DEPTH for line in crowded)


def _depth(line: bytes) -> int:
    """Return how deep the lists and objects of a line lie in one another."""
    codes = np.frombuffer(STRING.sub(b"", line), np.uint8)
    steps = np.isin(codes, list(b"[{")).astype(np.int64) - np.isin(codes, list(b"]}"))
    return int(steps.cumsum().max(initial=0))


def _matches(text: bytes, pattern: str) -> bool:
    """Return whether Arrow finds a pattern, which takes it a fraction of the time of Python's re."""
    buffers = [None, pa.array([0, len(text)], pa.int64()).buffers()[1], pa.py_buffer(text)]
    return cast(
        bool, pc.match_substring_regex(pa.Array.from_buffers(pa.large_binary(), 1, buffers), pattern)[0].as_py()
    )


def _rounded_lines(text: bytes, schema: pa.Schema) -> list[tuple[int, bytes]]:
    """Return the numbered lines in which a number of a column of float64 may have been rounded."""
    keys = {key for field in schema for key in _keys_of_floats(field.name, field.type)}
    pattern = ANY_ROUNDED
    if sum(map(len, keys)) <= KEYED:
        pattern = rf'"(?:{"|".join(map(_spellings, sorted(keys)))})"\s*:(?:[^"{{}}]*[\s,\[])?{ROUNDED}'
    if not keys or not _matches(text, pattern):
        return []
    lines = text.split(b"\n")
    found = pc.match_substring_regex(pa.array(lines, pa.large_binary()), pattern).to_pylist()
    return [(number, line) for number, (line, is_found) in enumerate(zip(lines, found, strict=True), 1) if is_found]


def _keys_of_floats(name: str, type_: pa.DataType) -> Iterator[str]:
    if pa.types.is_list(type_):
        yield from _keys_of_floats(name, type_.value_type)
    elif pa.types.is_struct(type_):
        yield from chain.from_iterable(_keys_of_floats(field.name, field.type) for field in type_)
    elif type_ == pa.float64():
        yield name


def _spellings(key: str) -> str:
    """Return a pattern for the ways in which JSON may write a key: each character as it is, or escaped."""
    return "".join(
        rf"(?:\\?{re.escape(char)}|{re.escape(json.dumps(char)[1:-1])}|(?i:{_escaped(char)}))" for char in key
    )


def _escaped(char: str) -> str:
    return re.sub("(.{4})", r"\\\\u\1", char.encode("utf-16-be", "surrogatepass").hex())


def _holds(type_: pa.DataType, wanted: pa.DataType | None) -> bool:
    """Return whether a type is the wanted one or has it among its members; None stands for any object."""
    if pa.types.is_list(type_):
        return _holds(type_.value_type, wanted)
    if pa.types.is_struct(type_):
        return wanted is None or any(_holds(field.type, wanted) for field in type_)
    return type_ == wanted
