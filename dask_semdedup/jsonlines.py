"""JSON lines as pieces of partitions: what types they hold, and reading them into pandas."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import fsspec
import pandas as pd
import pyarrow as pa
from dask.tokenize import tokenize
from fsspec.utils import read_block

from dask_semdedup._parquet import Reader, configured_string_dtype
from dask_semdedup.errors import ClusterError, InvalidArgumentError, MissingColumnsError, have

__all__ = ["JSON_SUFFIXES", "Block", "JsonReader", "read_json"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
# How much of the first file the types are taken from.
INFERRED_BYTES = 2**24


class Block(NamedTuple):
    """A piece of a file of JSON lines: the lines that begin in these bytes, or all of a compressed file."""

    path: str
    start: int = 0
    length: int | None = None


@dataclass(frozen=True)
class JsonReader:
    """Reads blocks of JSON lines, always with the same dtypes.

    Parameters
    ----------
    fs
        The file system of the files.
    schema
        What each line holds.
    arrow
        Turns Arrow tables of that schema into pandas.
    id_field
        A column that may not be null.
    """

    fs: fsspec.AbstractFileSystem
    schema: pa.Schema
    arrow: Reader
    id_field: str

    def __dask_tokenize__(self) -> Any:
        return tokenize(self.arrow, self.id_field)

    def meta(self, columns: Sequence[str]) -> pd.DataFrame:
        """Empty frame with the dtypes of every partition."""
        return cast(pd.DataFrame, self.arrow.meta(columns))

    def read(self, block: Block, columns: Sequence[str]) -> pd.DataFrame:
        """Rows of a block, with a new `RangeIndex`."""
        table = _parse(self.fs, block, self.schema).select(list(columns))
        if self.id_field in columns and table[self.id_field].null_count:
            count = table[self.id_field].null_count
            raise InvalidArgumentError(f"{have(count, 'row')} no {self.id_field!r} in {block.path}.")
        return self.arrow.to_pandas(table)


def read_json(
    fs: fsspec.AbstractFileSystem,
    files: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str] | None,
    id_field: str,
    embedding_field: str,
    size: int,
) -> tuple[JsonReader, list[Block]]:
    """A reader of the files' lines, and the blocks that they are read in."""
    blocks = [block for path, info in files.items() for block in _blocks(path, info["size"], size)]
    schema = _infer(fs, blocks[0], id_field, embedding_field, columns)
    if columns is not None and not set(columns) <= set(schema.names):
        raise MissingColumnsError.build(columns, schema.names, f"They are wanted of {blocks[0].path}.")
    # Any line may lack what others have.
    nullable = frozenset(set(schema.names) - {id_field})
    arrow = Reader(fs, schema, nullable, string_dtype=configured_string_dtype())
    return JsonReader(fs, schema, arrow, id_field), blocks


def _blocks(path: str, nbytes: int, size: int) -> list[Block]:
    if path.endswith(".gz"):
        return [Block(path)]
    count = max(1, -(-nbytes // size))
    length = -(-nbytes // count)
    return [Block(path, start, length) for start in range(0, max(nbytes, 1), max(length, 1))]


def _infer(
    fs: fsspec.AbstractFileSystem, block: Block, id_field: str, embedding_field: str, columns: Sequence[str] | None
) -> pa.Schema:
    """What the lines of a block hold: numbers of the embedding as float32, ids that need it as uint64; else text."""
    block = block._replace(length=block.length and min(block.length, INFERRED_BYTES))
    rows = _parse(fs, block, None)
    schema = rows.schema
    types = {field.name: _as_written(field.type) for field in schema}
    if pa.types.is_list(types.get(embedding_field, pa.null())):
        types[embedding_field] = pa.list_(pa.float32())
    if types.get(id_field) == pa.float64() and (columns is None or id_field in columns):
        # So Arrow takes integers from 2⁶³ on, many of which are then one.
        try:
            _parse(fs, block, pa.schema([(id_field, pa.uint64())]), "ignore")
            types[id_field] = pa.uint64()
        except ClusterError as error:
            if large := [id_ for id_ in rows[id_field].to_pylist() if id_ is not None and abs(id_) >= 2**53]:
                raise InvalidArgumentError(
                    f"Column {id_field!r} of {block.path}: {have(len(large), 'id')} a value that floats cannot tell "
                    f"from others, such as {large[0]:.0f}. Write ids as text, or as integers that all fit in int64, or "
                    "all in uint64."
                ) from error
    return pa.schema(list(types.items()))


def _as_written(type_: pa.DataType) -> pa.DataType:
    """Text for what only looks like a time, and where all is null, which may yet be text."""
    if pa.types.is_list(type_):
        return pa.list_(_as_written(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([pa.field(field.name, _as_written(field.type)) for field in type_])
    return pa.string() if pa.types.is_null(type_) or pa.types.is_timestamp(type_) else type_


def _parse(
    fs: fsspec.AbstractFileSystem, block: Block, schema: pa.Schema | None, others: str | None = None
) -> pa.Table:
    """The lines of a block, all of them of a schema; `others` says what is done where they hold more."""
    from pyarrow import json

    try:
        with fs.open(block.path, "rb", compression="infer") as file:
            text = file.read() if block.length is None else read_block(file, block.start, block.length, b"\n")
        if not text.strip():
            return (schema or pa.schema([])).empty_table()
        others = others or ("error" if schema else "infer")
        options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others)
        # A line is in one block of the parser: it may be as long as the text.
        reading = json.ReadOptions(use_threads=False, block_size=min(max(len(text), 1), 2**31 - 1))
        return json.read_json(io.BytesIO(text), read_options=reading, parse_options=options)
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise ClusterError(
            f"Cannot read {block.path} as JSON lines ({error}). Each line must be an object, with the columns and "
            "types of the first lines of all."
        ) from error
