"""One Arrow schema for all files of a dataset, and the conversion of tables to it.

Files of different writers, or of one writer on different data, rarely have exactly the same schema: a column is all
null in one file, int32 in another, and missing in a third. Arrow's promotion rules say which types mean the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dask_semdedup.errors import DataReadError, some
from dask_semdedup.frames.categories import is_ordered

__all__ = [
    "INDEX_COLUMNS",
    "Unified",
    "conform",
    "in_frames",
    "range_index_of",
    "refuse",
    "restore",
    "unify",
    "without",
    "without_index",
]

# Columns that pandas and Dask write only to restore an index.
INDEX_COLUMNS = ("__index_level_", "__null_dask_index__")

# float16 as bits: beside lists of numbers they would be taken for numbers.
BITS = pa.uint16()


class Unified(NamedTuple):
    """One schema for several files.

    Parameters
    ----------
    schema : pyarrow.Schema
        All columns, in the order in which files bring them, with the metadata of the first file.
    problems : dict
        From a column that cannot be read to the reason, a sentence. The schema has the first file's type of it.
    unordered : frozenset of str
        Columns that some of the files hold as an ordered dictionary, and others not: their order is lost.
    """

    schema: pa.Schema
    problems: dict[str, str]
    unordered: frozenset[str]


def range_index_of(schema: pa.Schema) -> str | None:
    """Return the name of an index of pandas that a file holds as a range in its metadata, not as a column."""
    try:
        (index,) = json.loads((schema.metadata or {})[b"pandas"])["index_columns"]
        return str(index["name"]) if index["kind"] == "range" and index["name"] is not None else None
    except (ValueError, KeyError, TypeError):
        return None


def without_index(schema: pa.Schema) -> pa.Schema:
    """Return a schema without the columns that were written only to restore an index."""
    return without(schema, [name for name in schema.names if name.startswith(INDEX_COLUMNS)])


def without(schema: pa.Schema, names: Collection[str]) -> pa.Schema:
    """Return a schema without the columns of these names, which need not exist."""
    return pa.schema([field for field in schema if field.name not in names], schema.metadata)


def without_order(schema: pa.Schema, names: Collection[str]) -> pa.Schema:
    """Return a schema in which the dictionaries of these names are unordered."""
    for place, field in enumerate(schema):
        if field.name in names and is_ordered(field.type):
            schema = schema.set(place, field.with_type(pa.dictionary(field.type.index_type, field.type.value_type)))
    return schema


def unify(schemas: Mapping[str, pa.Schema]) -> Unified:
    """Return the schema to which the columns of all files can be converted, as far as their types mean the same.

    Parameters
    ----------
    schemas : mapping from path to pyarrow.Schema
        One file of each distinct schema.
    """
    merged: dict[str, pa.Field] = {}
    origins: dict[str, str] = {}
    problems: dict[str, str] = {}
    unordered: set[str] = set()
    for path, schema in schemas.items():
        for name in [name for name, count in Counter(schema.names).items() if count > 1]:
            problems.setdefault(name, f"{path} has several columns named {name!r}.")
        for field in schema:
            known = merged.setdefault(field.name, field)
            types = {is_ordered(type_) for type_ in (known.type, field.type) if not pa.types.is_null(type_)}
            if len(types) > 1:
                unordered.add(field.name)
            type_ = _merge(known.type, field.type)
            if type_ is None:
                first = f"{known.type} in {origins[field.name]}"
                problems.setdefault(field.name, f"Column {field.name!r} is {field.type} in {path} but {first}.")
                continue
            if type_ != known.type or field.name not in origins:
                origins[field.name] = path
            merged[field.name] = pa.field(field.name, type_, metadata=known.metadata)
    metadata = next(iter(schemas.values())).metadata if schemas else None
    return Unified(pa.schema(list(merged.values()), metadata), problems, frozenset(unordered))


def _merge(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the type to which values of both types can be converted, or None."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if is_ordered(one) != is_ordered(other) or pa.types.is_dictionary(one) != pa.types.is_dictionary(other):
        one, other = _decoded(one), _decoded(other)
    one, other = _plain(one), _plain(other)
    if _holds_bits(one) != _holds_bits(other) and not any(map(_is_of_nulls, (one, other))):
        return None
    try:
        fields = [pa.schema([pa.field("", type_)]) for type_ in (one, other)]
        return pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except pa.ArrowTypeError:
        return None


def _decoded(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _plain(type_: pa.DataType) -> pa.DataType:
    """Return the plain type of a view, which Arrow does not unify."""
    if pa.types.is_string_view(type_):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(type_) else type_


def _holds_bits(type_: pa.DataType) -> bool:
    return _is_list(type_) and type_.value_type == BITS


def _is_of_nulls(type_: pa.DataType) -> bool:
    return bool(pa.types.is_null(type_) or (_is_list(type_) and pa.types.is_null(type_.value_type)))


def _is_list(type_: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_))


def in_frames(type_: pa.DataType) -> pa.DataType:
    """Return the type of a file's column in frames: dictionaries are decoded unless ordered, offsets have 64 bits.

    The strings or binaries of a partition may exceed 2 GiB, which 32-bit offsets cannot address.
    """
    types = pa.types
    if types.is_dictionary(type_):
        return type_ if type_.ordered else in_frames(type_.value_type)
    if types.is_string(type_) or types.is_string_view(type_):
        return pa.large_string()
    if types.is_binary(type_) or types.is_binary_view(type_):
        return pa.large_binary()
    if types.is_struct(type_):
        return pa.struct([_field_in_frames(field) for field in type_])
    if types.is_map(type_):
        return pa.map_(_field_in_frames(type_.key_field), _field_in_frames(type_.item_field), type_.keys_sorted)
    if types.is_fixed_size_list(type_):
        # A damaged file may say 0 or less, which Arrow reads and does not make.
        return pa.list_(_field_in_frames(type_.value_field), type_.list_size if type_.list_size > 0 else -1)
    if types.is_large_list(type_):
        return pa.large_list(_field_in_frames(type_.value_field))
    return pa.list_(_field_in_frames(type_.value_field)) if types.is_list(type_) else type_


def _field_in_frames(field: pa.Field) -> pa.Field:
    return field.with_type(in_frames(field.type))


def conform(table: pa.Table, schema: pa.Schema, orders: Mapping[str, pa.Array] | None = None) -> pa.Table:
    """Return a table with exactly these fields. Columns that it lacks are null, and categories are in these orders.

    Raises
    ------
    DataReadError
        If values of a column do not fit its type.
    """
    present = set(table.column_names)
    columns = {field.name: _column(table, field) if field.name in present else _nulls(table, field) for field in schema}
    for name in set(orders or {}).intersection(columns):
        columns[name] = _in_order(columns[name], (orders or {})[name], name)
    return pa.table(list(columns.values()), schema=pa.schema(list(schema)))


def _in_order(column: pa.ChunkedArray, order: pa.Array, name: str) -> pa.ChunkedArray:
    """Return a column of ordered categories with this dictionary, so that its order survives concatenation."""
    chunks = []
    for chunk in column.chunks:
        places = pc.index_in(chunk.dictionary, order)
        known = places.drop_null()
        if places.null_count > chunk.dictionary.null_count or not known.equals(
            known.take(pc.array_sort_indices(known))
        ):
            raise DataReadError(
                f"Column {name!r} holds ordered categories {chunk.dictionary.to_pylist()}, other than its files begin "
                f"with: {order.to_pylist()}. Write all files with the same categories.",
                columns=[name],
            )
        codes = places.take(chunk.indices).cast(column.type.index_type)
        chunks.append(pa.DictionaryArray.from_arrays(codes, order, ordered=True))
    return pa.chunked_array(chunks, column.type)


def _nulls(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    return pa.chunked_array([pa.nulls(len(table), field.type)])


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    column = table[field.name]
    if column.type == field.type:
        return column
    if pa.types.is_null(column.type):
        return _nulls(table, field)
    try:
        return _cast(column, field.type)
    except pa.ArrowException as error:
        message = f"Column {field.name!r} is {column.type}, and cannot be read as {field.type}: {error}."
        raise DataReadError(message, columns=[field.name]) from error


def _cast(column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    """Return a column cast to a type, which may be a dictionary, unlike in Arrow's own cast."""
    if not pa.types.is_dictionary(type_):
        return column.cast(type_)
    if not pa.types.is_dictionary(column.type):
        column = column.cast(type_.value_type).dictionary_encode()
    chunks = [
        pa.DictionaryArray.from_arrays(
            chunk.indices.cast(type_.index_type), chunk.dictionary.cast(type_.value_type), ordered=type_.ordered
        )
        for chunk in column.chunks
    ]
    return pa.chunked_array(chunks, type_)


def restore(table: pa.Table, stored: pa.Schema) -> pa.Table:
    """Return a table whose columns have the types that they had in the files, and with the files' metadata.

    Columns whose types are not what `in_frames` makes of those in the files were made later, and stay as they are. If
    no column comes from files, the metadata of pandas is that of the table.
    """
    fields, columns = [], []
    for field, column in zip(table.schema, table.columns, strict=True):
        place = stored.get_field_index(field.name)
        if place >= 0 and in_frames(stored.field(place).type) == in_frames(field.type):
            field = stored.field(place).with_nullable(True)
            column = column if column.type == field.type else _cast(column, field.type)
        fields.append(field)
        columns.append(column)
    names = table.column_names
    own = None if len(stored) else _metadata(table.schema.metadata or {}, names, _is_needed)
    metadata = _metadata({**(own or {}), **(stored.metadata or {})}, names)
    return pa.table(columns, schema=pa.schema(fields, metadata))


def _metadata(
    metadata: Mapping[bytes, bytes], columns: Sequence[str], wanted: Callable[[str], bool] = bool
) -> dict[bytes, bytes] | None:
    """Return a schema's metadata for these columns. The metadata of pandas names columns and an index itself.

    Of its notes on columns those are left that name a `wanted` dtype.
    """
    if b"pandas" not in metadata:
        return dict(metadata) or None
    try:
        notes = json.loads(metadata[b"pandas"])
        notes["index_columns"] = [name for name in notes["index_columns"] if name in columns]
        notes["columns"] = [
            note for note in notes["columns"] if _is_readable(note, columns) and wanted(note["numpy_type"])
        ]
    except (ValueError, KeyError, TypeError):
        return {key: value for key, value in metadata.items() if key != b"pandas"}
    return {**metadata, b"pandas": json.dumps(notes).encode()}


def _is_needed(dtype: str) -> bool:
    """Return whether pandas needs a note to read a column as it was before Dask made an Arrow type of it."""
    # Without a note it makes floats of integers with nulls.
    return dtype != "string" and ("int" in dtype or not dtype.endswith("[pyarrow]"))


def _is_readable(note: Mapping[str, Any], columns: Iterable[str]) -> bool:
    """Return whether pandas' note is on one of the columns, and names a dtype that pandas can parse."""
    try:
        pd.api.types.pandas_dtype(note["numpy_type"])
    except (TypeError, NotImplementedError):  # pandas raises the latter for Arrow types with parameters.
        return False
    return note["field_name"] in columns


def refuse(problems: Mapping[str, str], columns: Iterable[str], advice: str) -> None:
    """Raise `DataReadError` if one of the columns cannot be read."""
    if found := {name: problems[name] for name in columns if name in problems}:
        raise DataReadError(f"{some(found.values(), 1)} {advice}", parameters=["columns"], columns=found)
