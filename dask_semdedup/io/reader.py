"""Reading partitions of Parquet files into pandas or cuDF frames.

A partition is a tuple of `Fragment`. `Reader` turns it into a frame whose dtypes are those of `Reader.meta`, because
both come from the same conversion.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
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
from dask_semdedup.errors import DataReadError, InvalidArgumentError, have, some
from dask_semdedup.frames.backend import take
from dask_semdedup.frames.categories import is_ordered
from dask_semdedup.io.cudf_reader import cupy_repeat, import_cudf, in_cudf, read_fragments_cudf
from dask_semdedup.io.fragments import Fragment, read_fragment, read_slices
from dask_semdedup.io.scan import COLUMNS_ADVICE, Scan, is_integer
from dask_semdedup.io.schemas import conform, in_frames, refuse


@dataclass(frozen=True)
class Reader:
    """Reads partitions of one dataset, always with the same dtypes.

    Parameters
    ----------
    fs
        The file system of the files.
    schema
        Fields of the columns in the files, with the types to which all files can be converted.
    nullable
        Integer, Boolean and floating-point columns that keep their Arrow types, since NumPy has no nulls.
    folders
        Fields of the columns that come from the folders' names, in the order of `Fragment.keys`.
    backend
        "pandas" or "cudf".
    string_dtype
        The pandas dtype of strings, or None for pandas' own choice.
    problems
        From a column that cannot be read to the reason.
    unordered
        Columns of categories whose order the files do not tell.
    odd
        Files whose types are not those of the schema, which Arrow reads for cuDF.
    orders
        From a column of ordered categories to the categories in their order, which all partitions share.
    lacking
        From a column that not all files have to the first file with rows, but without it.
    make_ids
        A column of ids to be made from the file's name below `root` and the row's number in the file; or None.
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
    lacking: Mapping[str, str] = field(default_factory=dict)
    make_ids: str | None = None
    root: str = ""

    @classmethod
    def of(cls, fs: fsspec.AbstractFileSystem, scan: Scan, **options: Any) -> Reader:
        """Return the reader of scanned files."""
        columns = {
            name: getattr(scan, name)
            for name in ("schema", "nullable", "problems", "unordered", "odd", "orders", "lacking")
        }
        return cls(fs, **columns, string_dtype=configured_string_dtype(), **options)

    def with_arrow_floats(self) -> Reader:
        """Return a reader that keeps floats in Arrow types, since those of NumPy cannot tell null from NaN."""
        floats = (field.name for field in self.schema if pa.types.is_floating(field.type))
        return replace(self, nullable=self.nullable.union(floats))

    def __dask_tokenize__(self) -> object:
        # A file system's own token is another one in each thread and process.
        values = [getattr(self, field.name) for field in fields(self)[1:]]
        return type(self.fs), self.fs.storage_options, self.schema.metadata, values

    @property
    def columns(self) -> list[str]:
        """All columns: made ids come first, columns from the folders' names last."""
        return [*([self.make_ids] if self.make_ids else []), *self.schema.names, *self.folders.names]

    def meta(self, columns: Sequence[str]) -> Any:
        """Return an empty frame with the dtypes of every partition."""
        table = self._schema_in_frames(columns).empty_table()
        if self.backend == "cudf":
            for name in self.folders.names:
                if name in columns:
                    table = table.append_column(name, pa.array([], self.folders.field(name).type))
            if self.make_ids in columns:
                table = table.append_column(str(self.make_ids), pa.array([], pa.string()))
            return import_cudf().DataFrame.from_arrow(table)[list(columns)]
        return self.to_pandas(table, (), columns)

    def read(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        """Return the rows of the fragments in their order, with a new `RangeIndex`.

        cuDF reads in the current CUDA stream if it can. The frame is complete, and outlives the stream.

        Raises
        ------
        DataReadError
            If a column cannot be read, or a file has changed since it was planned.
        """
        refuse(self.problems, columns, COLUMNS_ADVICE)
        if self.backend == "cudf":
            return self._read_cudf(fragments, columns)
        frame = self.to_pandas(self._read_arrow(fragments, columns), fragments, columns)
        # Arrow would keep what reading took, several times a partition, and a worker that is full does not go on.
        pa.default_memory_pool().release_unused()
        return frame

    def read_slices(
        self, fragments: Sequence[Fragment], columns: Sequence[str], slices: Sequence[slice], step: int
    ) -> Iterator[pd.DataFrame]:
        """Yield some rows as `read` returns them, in pandas frames of at most `step` rows of one slice.

        Parameters
        ----------
        fragments, columns
            As of `read`.
        slices : sequence of slice
            Which rows, counted through all fragments; they ascend.
        step : int
            The most rows of a frame. No more are in memory.

        Raises
        ------
        DataReadError
            As of `read`.
        """
        refuse(self.problems, columns, COLUMNS_ADVICE)
        schema = self._schema_in_frames(columns)
        end = 0
        for piece in fragments:
            start, end = end, end + piece.rows
            within = [slice(rows.start - start, rows.stop - start) for rows in slices if start < rows.stop]
            within = [slice(max(rows.start, 0), rows.stop) for rows in within if rows.start < piece.rows]
            if within:
                for table in read_slices(self.fs, piece, schema, within, step, self.orders):
                    yield self.to_pandas(table, [piece._replace(rows=len(table))], columns)

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
        # libcudf does not keep the order of categories.
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
        if self.make_ids in columns:
            with default_stream("cuda"):
                frame[self.make_ids] = import_cudf().Series.from_arrow(self._made_ids(fragments))
        return frame[list(columns)]

    def _read_cudf_files(self, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        """Return columns of files. Arrow reads the files of odd types, and converts them to the types of the others."""
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
        """Return the value in the folders' names for each fragment."""
        place = self.folders.get_field_index(name)
        return pa.array([fragment.keys[place] for fragment in fragments], self.folders.field(place).type)

    def _made_ids(self, fragments: Sequence[Fragment]) -> pa.ChunkedArray:
        return pa.chunked_array([made_ids(self.root, fragment) for fragment in fragments], pa.large_string())

    def _schema_in_frames(self, columns: Sequence[str]) -> pa.Schema:
        """Return the schema of those columns that come from the files, with the types that they have in frames."""
        types = in_cudf if self.backend == "cudf" else in_frames
        wanted = [self.schema.field(name) for name in columns if name in self.schema.names]
        return pa.schema([pa.field(field.name, types(field.type)) for field in wanted])

    def to_pandas(self, table: pa.Table, fragments: Sequence[Fragment], columns: Sequence[str]) -> pd.DataFrame:
        """Return the frame of a table that was read from fragments, with the columns that their names and rows make."""
        table = conform(table, self._schema_in_frames(table.column_names))
        for name, column in zip(table.column_names, table.columns, strict=True):
            if column.null_count and is_integer(column.type) and name not in self.nullable:
                raise DataReadError(
                    f"Column {name!r}: {have(column.null_count, 'row')} no value, and the footers say that every row "
                    f"has one, in {some([fragment.path for fragment in fragments])}. Write the files again.",
                    columns=[name],
                )
        series = {name: self._to_series(table[name], name) for name in table.column_names}
        for name in self.folders.names:
            if name in columns:
                rows = np.array([fragment.rows for fragment in fragments], dtype=np.int64)
                keys = self._keys(fragments, name).take(pa.array(np.repeat(np.arange(len(rows)), rows)))
                series[name] = self._to_series(pa.chunked_array([keys]), name)
        if self.make_ids in columns:
            series[str(self.make_ids)] = self._to_series(self._made_ids(fragments), str(self.make_ids))
        index = pd.RangeIndex(sum(fragment.rows for fragment in fragments))
        return pd.DataFrame({name: series[name] for name in columns}, index, copy=False)

    def _to_series(self, column: pa.ChunkedArray, name: str) -> pd.Series:
        dtype = _extension_dtype(column.type, name in self.nullable, self.string_dtype)
        return column.to_pandas(types_mapper=None if dtype is None else lambda _: dtype)


def taken_for_ids(name: str | None, present: Collection[str]) -> list[str]:
    """Return the column of ids that is to be made, if any. Raise if it is present."""
    if name in present:
        raise InvalidArgumentError(
            f"The files have a column {name!r}, and ids are to be made of that name. Name another as id_field.",
            parameters=["id_field"],
            columns=[name],
        )
    return [] if name is None else [name]


def made_ids(root: str, fragment: Fragment) -> pa.Array:
    """Return ids of a fragment's rows: the file's name below a folder, and the row's number in the file."""
    name = pa.scalar(fragment.path.removeprefix(root).lstrip("/"), pa.large_string())
    rows = pa.array(np.arange(fragment.first_row, fragment.first_row + fragment.rows)).cast(pa.large_string())
    return pc.binary_join_element_wise(name, rows, pa.scalar(":", pa.large_string()))


def configured_string_dtype() -> pd.StringDtype[Any] | None:
    """Return the pandas dtype that Dask is configured to use for strings, or None to leave it to pandas."""
    return pd.StringDtype("pyarrow") if pyarrow_strings_enabled() else None


def _extension_dtype(
    type_: pa.DataType, nullable: bool, string_dtype: pd.StringDtype[Any] | None
) -> pd.api.extensions.ExtensionDtype | None:
    """Return the pandas extension dtype for an Arrow type, or None if NumPy or pandas itself holds the type."""
    types = pa.types
    if types.is_string(type_) or types.is_large_string(type_):
        return string_dtype
    if is_integer(type_) or types.is_floating(type_):
        return pd.ArrowDtype(type_) if nullable else None
    if types.is_timestamp(type_) or types.is_duration(type_):
        return None
    return pd.ArrowDtype(type_)
