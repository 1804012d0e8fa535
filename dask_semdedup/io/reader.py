"""Parquet files as pieces of partitions: listing, footers, and reading them into pandas or cuDF.

Nothing here knows about similarity or Dask expressions. A dataset is listed once and its footers are read once; what
they say (`FileStats`) is all that planning needs. A partition is a tuple of `Fragment`, and `Reader` turns it into a
frame whose dtypes are those of `Reader.meta`, because both come from the same conversion.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from dask.dataframe.utils import pyarrow_strings_enabled

from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.device.streams import current_stream, default_stream, finish
from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.frames.backend import take
from dask_semdedup.io.cudf_reader import cupy_repeat, import_cudf, in_cudf, read_fragments_cudf
from dask_semdedup.io.fragments import Fragment, read_fragment
from dask_semdedup.io.scan import COLUMNS_ADVICE, Scan, is_integer
from dask_semdedup.io.schemas import conform, in_frames, is_ordered, refuse


@dataclass(frozen=True)
class Reader:
    """Reads partitions of one dataset, always with the same dtypes.

    Parameters
    ----------
    fs
        The file system of the files.
    schema
        Fields of the columns in the files, with the types that all files can be brought to.
    nullable
        Integer, Boolean and floating-point columns that NumPy cannot hold as they are: they stay Arrow's.
    folders
        Fields of the columns that come from the folders' names, in the order of `Fragment.keys`.
    backend
        "pandas" or "cudf".
    string_dtype
        The pandas dtype of strings, or None for pandas' own choice.
    problems
        From a column that cannot be read to the reason.
    unordered
        Ordered categories whose order the files do not tell.
    odd
        Files whose types are not those of the schema, which Arrow reads for cuDF.
    orders
        From an ordered category to its categories in their order: all partitions have the same.
    make_ids
        A column of ids to be made, of the file's name below `root` and the row's number in it; or None.
    root
        The folder of all files.
    """

    fs: fsspec.AbstractFileSystem
    schema: pa.Schema
    nullable: frozenset[str] = frozenset()
    folders: pa.Schema = field(default_factory=lambda: pa.schema([]))
    backend: str = "pandas"
    string_dtype: pd.StringDtype[Any] | None = None
    problems: Mapping[str, str] = field(default_factory=dict)
    unordered: frozenset[str] = frozenset()
    odd: frozenset[str] = frozenset()
    orders: Mapping[str, pa.Array] = field(default_factory=dict)
    make_ids: str | None = None
    root: str = ""

    @classmethod
    def of(cls, fs: fsspec.AbstractFileSystem, scan: Scan, **options: Any) -> Reader:
        """The reader of files that have been scanned."""
        columns = {
            name: getattr(scan, name) for name in ("schema", "nullable", "problems", "unordered", "odd", "orders")
        }
        return cls(fs, **columns, string_dtype=configured_string_dtype(), **options)

    def with_arrow_floats(self) -> Reader:
        """The reader whose floats are Arrow's: NumPy cannot tell null from NaN, and pandas writes both as null."""
        floats = (field.name for field in self.schema if pa.types.is_floating(field.type))
        return replace(self, nullable=self.nullable.union(floats))

    def __dask_tokenize__(self) -> object:
        # A file system's own token is another one in each thread and process.
        values = [getattr(self, field.name) for field in fields(self)[1:]]
        return type(self.fs), self.fs.storage_options, self.schema.metadata, values

    @property
    def columns(self) -> list[str]:
        """All columns: ids that are made first, those from the folders' names last."""
        return [*([self.make_ids] if self.make_ids else []), *self.schema.names, *self.folders.names]

    def meta(self, columns: Sequence[str]) -> Any:
        """Empty frame with the dtypes of every partition."""
        table = self._schema_in_frames(columns).empty_table()
        if self.backend == "cudf":
            for name in self.folders.names:
                if name in columns:
                    table = table.append_column(name, pa.array([], self.folders.field(name).type))
            return import_cudf().DataFrame.from_arrow(table)[list(columns)]
        return self.to_pandas(table, (), columns)

    def read(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        """Rows of the fragments in their order, with a new `RangeIndex`.

        What cuDF reads, it reads in the current CUDA stream, if it can: the frame is complete, and outlives it.

        Raises
        ------
        ClusterError
            If a column cannot be read, or a file is not what it was when it was planned.
        """
        refuse(self.problems, columns, COLUMNS_ADVICE)
        if self.backend == "cudf":
            return self._read_cudf(fragments, columns)
        return self.to_pandas(self._read_arrow(fragments, columns), fragments, columns)

    def _read_arrow(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> pa.Table:
        schema = self._schema_in_frames(columns)
        if not schema.names:
            return schema.empty_table()
        return pa.concat_tables(
            [schema.empty_table(), *(read_fragment(self.fs, piece, schema, self.orders) for piece in fragments)]
        )

    def _read_cudf(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        if not fragments:
            return self.meta(columns)
        share_memory_pool()
        in_files = [name for name in columns if name in self.schema.names]
        keys = {name: self._cudf_keys(fragments, name) for name in columns if name in self.folders.names}
        # libcudf does not know the order of categories.
        ordered = [name for name in in_files if is_ordered(self.schema.field(name).type)]
        frame = self._read_cudf_files(fragments, [name for name in in_files if name not in ordered])
        if ordered:
            categories = self._from_arrow(fragments, ordered)
            with default_stream("cuda"):
                frame = frame.assign(**{name: categories[name] for name in ordered})
        if keys:
            finish()
            for name, column in keys.items():
                frame[name] = column
        return frame[list(columns)]

    def _read_cudf_files(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        """Columns of files: those of odd types by way of Arrow, which brings them to the types of the others."""
        if not self.odd:
            return read_fragments_cudf(self.fs, fragments, columns)
        runs = [list(run) for _, run in groupby(fragments, lambda fragment: fragment.path in self.odd)]
        frames = [
            self._from_arrow(run, columns)
            if columns and run[0].path in self.odd
            else read_fragments_cudf(self.fs, run, columns)
            for run in runs
        ]
        if len(frames) == 1:
            return frames[0]
        with default_stream("cuda"):
            return import_cudf().concat(frames, ignore_index=True)

    def _from_arrow(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        table = self._read_arrow(fragments, columns)
        with default_stream("cuda"):
            return import_cudf().DataFrame.from_arrow(table)

    def _cudf_keys(self, fragments: Sequence[Fragment], name: str) -> Any:
        cudf = import_cudf()
        import pylibcudf

        column = cudf.Series.from_pylibcudf(
            pylibcudf.Column.from_arrow(self._keys(fragments, name), stream=current_stream())
        )
        return take(column, cupy_repeat(np.array([fragment.rows for fragment in fragments])))

    def _keys(self, fragments: Sequence[Fragment], name: str) -> pa.Array:
        """The value in the folders' names, one a fragment."""
        place = self.folders.get_field_index(name)
        return pa.array([fragment.keys[place] for fragment in fragments], self.folders.field(place).type)

    def _schema_in_frames(self, columns: Sequence[str]) -> pa.Schema:
        """Schema of those columns that come from the files, of the types that they have in frames."""
        types = in_cudf if self.backend == "cudf" else in_frames
        wanted = [self.schema.field(name) for name in columns if name in self.schema.names]
        return pa.schema([pa.field(field.name, types(field.type)) for field in wanted])

    def to_pandas(self, table: pa.Table, fragments: Sequence[Fragment], columns: Sequence[str]) -> pd.DataFrame:
        """The frame of what was read of fragments, with the columns that come from their names and rows."""
        table = conform(table, self._schema_in_frames(table.column_names))
        series = {name: self._to_series(table[name], name) for name in table.column_names}
        for name in self.folders.names:
            if name in columns:
                rows = np.array([fragment.rows for fragment in fragments], dtype=np.int64)
                keys = self._keys(fragments, name).take(pa.array(np.repeat(np.arange(len(rows)), rows)))
                series[name] = self._to_series(pa.chunked_array([keys]), name)
        if self.make_ids in columns:
            ids = pa.chunked_array([made_ids(self.root, fragment) for fragment in fragments], pa.large_string())
            series[str(self.make_ids)] = self._to_series(ids, str(self.make_ids))
        index = pd.RangeIndex(sum(fragment.rows for fragment in fragments))
        return pd.DataFrame({name: series[name] for name in columns}, index, copy=False)

    def _to_series(self, column: pa.ChunkedArray, name: str) -> pd.Series:
        dtype = _extension_dtype(column.type, name in self.nullable, self.string_dtype)
        return column.to_pandas(types_mapper=None if dtype is None else lambda _: dtype)


def taken_for_ids(name: str | None, present: Collection[str]) -> list[str]:
    """The column of ids that is to be made, if one is; it may not be there."""
    if name in present:
        raise InvalidArgumentError(
            f"The files have a column {name!r}, and ids are to be made of that name. Name another as id_field."
        )
    return [] if name is None else [name]


def made_ids(root: str, fragment: Fragment) -> pa.Array:
    """Ids of a fragment's rows: the file's name below a folder, and the row's number in the file."""
    name = pa.scalar(fragment.path.removeprefix(root).lstrip("/"), pa.large_string())
    rows = pa.array(np.arange(fragment.first_row, fragment.first_row + fragment.rows)).cast(pa.large_string())
    return pc.binary_join_element_wise(name, rows, pa.scalar(":", pa.large_string()))


def configured_string_dtype() -> pd.StringDtype[Any] | None:
    """The pandas dtype that Dask is configured to give to strings; None leaves it to pandas."""
    return pd.StringDtype("pyarrow") if pyarrow_strings_enabled() else None


def _extension_dtype(
    type_: pa.DataType, nullable: bool, string_dtype: pd.StringDtype[Any] | None
) -> pd.api.extensions.ExtensionDtype | None:
    """The pandas extension dtype that holds an Arrow type; None where NumPy (or pandas itself) holds it as well."""
    types = pa.types
    if types.is_string(type_) or types.is_large_string(type_):
        return string_dtype
    if is_integer(type_) or types.is_floating(type_):
        return pd.ArrowDtype(type_) if nullable else None
    if types.is_timestamp(type_) or types.is_duration(type_):
        return None
    return pd.ArrowDtype(type_)
