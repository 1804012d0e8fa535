"""Footers of many files: read side by side as Arrow reads each, fetched as the file system likes, damage named."""

from __future__ import annotations

import base64
import io
import math
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup import read_clusters, read_table
from dask_semdedup.errors import DataReadError
from dask_semdedup.io import footers, scan
from dask_semdedup.io import thrift as thrift_reader
from dask_semdedup.io.footers import read_schema
from dask_semdedup.io.fragments import FileStats
from dask_semdedup.io.listing import list_files
from dask_semdedup.io.scan import scan_files
from dask_semdedup.io.thrift import MAX_NUMBER, Bounded, FooterError, read_alike, read_footer

VALUES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint8(): st.integers(0, 255),
    pa.bool_(): st.booleans(),
    pa.float32(): st.floats(width=32),
    pa.string(): st.text(max_size=200),
    pa.list_(pa.float32()): st.lists(st.floats(width=32), max_size=3),
    pa.list_(pa.list_(pa.string())): st.lists(st.lists(st.text(max_size=3), max_size=2), max_size=2),
    pa.struct({"a": pa.int32(), "b": pa.string()}): st.fixed_dictionaries({"a": st.integers(0, 9), "b": st.text()}),
    pa.decimal128(5): st.decimals(-99999, 99999, places=0),
}
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "store_schema": st.booleans(),
        "write_statistics": st.booleans(),
        "use_dictionary": st.booleans(),
        "write_page_index": st.booleans(),
        "write_page_checksum": st.booleans(),
        "compression": st.sampled_from(["none", "snappy", "zstd"]),
        "version": st.sampled_from(["1.0", "2.6"]),
        "data_page_version": st.sampled_from(["1.0", "2.0"]),
        "row_group_size": st.integers(1, 3),
        "dictionary_pagesize_limit": st.integers(1, 20),
    },
)


@st.composite
def tables(draw: st.DrawFn) -> list[pa.Table]:
    """Some tables of one schema, with nulls or without."""
    types = draw(st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=4))
    schema = pa.schema([pa.field(f"c{index}", type_) for index, type_ in enumerate(types)])
    row = st.tuples(*(st.none() | VALUES[type_] for type_ in types))
    drawn = draw(st.lists(st.lists(row, max_size=5), min_size=1, max_size=8))
    return [
        pa.table([pa.array([row[index] for row in rows], type_) for index, type_ in enumerate(types)], schema=schema)
        for rows in drawn
    ]


def file_of(table: pa.Table, **options: Any) -> bytes:
    pq.write_table(table, file := io.BytesIO(), **options)
    return file.getvalue()


def footer_of(file: bytes) -> bytes:
    return file[-8 - int.from_bytes(file[-8:-4], "little") :]


def of_arrow(footer: bytes) -> list[tuple[int, list[tuple[int, int, int | None]]]]:
    """Rows of each row group, and what is read of each of its columns."""
    metadata = pq.read_metadata(pa.BufferReader(footer))
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [
        (
            group.num_rows,
            [
                (chunk.num_values, chunk.total_uncompressed_size, chunk.statistics and chunk.statistics.null_count)
                for chunk in map(group.column, range(group.num_columns))
            ],
        )
        for group in groups
    ]


def of_ours(groups: list[Any], file: int) -> list[tuple[int, list[tuple[int, int, int | None]]]]:
    return [
        (
            group.rows[file],
            [
                (chunk.values[file], chunk.nbytes[file], None if chunk.nulls is None else chunk.nulls[file])
                for chunk in group.chunks
            ],
        )
        for group in groups
    ]


INTEGERS = {
    f"{sign}int{bits}": (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
}


@st.composite
def bounded_columns(draw: st.DrawFn) -> list[pa.Array]:
    """Some columns of one type whose bounds are read: integers of all widths and text, with nulls or without."""
    name = draw(st.sampled_from([*INTEGERS, "string", "large_string"]))
    values = st.integers(*INTEGERS[name]) if name in INTEGERS else st.text(max_size=100)
    columns = draw(st.lists(st.lists(st.none() | values, max_size=6), min_size=1, max_size=5))
    return [pa.array(column, getattr(pa, name)()) for column in columns]


def bounds_of_arrow(footer: bytes) -> list[tuple[Any, Any]]:
    metadata = pq.read_metadata(pa.BufferReader(footer))
    statistics = [metadata.row_group(index).column(0).statistics for index in range(metadata.num_row_groups)]
    return [(each.min, each.max) if each and each.has_min_max else (None, None) for each in statistics]


def bounds_of_ours(groups: list[Any], file: int = 0) -> list[tuple[Any, Any]]:
    return [group.chunks[0].bounds[file] if group.chunks[0].bounds else (None, None) for group in groups]


def bounded_of(footer: bytes) -> Bounded | None:
    return Bounded.of(pq.read_metadata(pa.BufferReader(footer)).schema.column(0), 0)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def thrift(fields: dict[int, Any]) -> bytes:
    """A struct of numbers, bytes, structs and lists of structs; the fields' numbers are written out."""
    written = b""
    for number, value in fields.items():
        if isinstance(value, int):
            kind, content = 6, varint(value << 1 if value >= 0 else (-value << 1) - 1)
        elif isinstance(value, bytes):
            kind, content = 8, varint(len(value)) + value
        elif isinstance(value, dict):
            kind, content = 12, thrift(value)
        else:
            kind, content = 9, b"\xfc" + varint(len(value)) + b"".join(map(thrift, value))
        written += bytes([kind]) + varint(number << 1) + content
    return written + b"\0"


def built(chunk: dict[int, Any], *, rows: int = 3, **file: Any) -> bytes:
    """A footer of one row group of three rows with one column."""
    chunk = {5: 3, 6: 30, **chunk}
    return thrift({2: [], 3: rows, 4: [{1: [{3: chunk}], 3: 3}], **file.get("more", {})}) + bytes(8)


class TestReadFooter:
    @given(tables(), OPTIONS)
    def test_numbers_are_those_of_arrow(self, tables: list[pa.Table], options: dict[str, Any]) -> None:
        for table in tables:
            footer = footer_of(file_of(table, **options))
            expected, metadata = of_arrow(footer), pq.read_metadata(pa.BufferReader(footer))
            groups = read_footer(footer, len(metadata.schema))
            assert [(group.rows, [chunk[:3] for chunk in group.chunks]) for group in groups] == expected
            assert [[chunk.has_dictionary for chunk in group.chunks] for group in groups] == [
                [metadata.row_group(group).column(index).has_dictionary_page for index in range(len(metadata.schema))]
                for group in range(metadata.num_row_groups)
            ]

    @given(bounded_columns(), OPTIONS)
    def test_bounds_are_those_of_arrow(self, columns: list[pa.Array], options: dict[str, Any]) -> None:
        footers = [footer_of(file_of(pa.table({"k": column}), **options)) for column in columns]
        bounded = bounded_of(footers[0])
        assert bounded
        for footer in footers:
            assert bounds_of_ours(read_footer(footer, 1, bounded)) == bounds_of_arrow(footer)
        alike, groups = read_alike(footers, bounded)
        for position, file in enumerate(alike.tolist()):
            assert bounds_of_ours(groups, position) == bounds_of_arrow(footers[file])

    @pytest.mark.parametrize(
        "column",
        [
            pa.array([1.5]),
            pa.array([1.5], pa.float16()),
            pa.array([True]),
            pa.array([b"a"]),
            pa.array([1], pa.date32()),
            pa.array([1], pa.timestamp("ns")),
            pa.array([1], pa.time32("ms")),
            pa.array([1], pa.decimal128(5)),
            pa.array([1], pa.decimal32(5)),
            pa.array([b"a" * 16], pa.uuid()),
        ],
        ids=lambda column: str(column.type),
    )
    @pytest.mark.parametrize("as_integer", [False, True])
    def test_bounds_of_other_types_are_not_read(self, column: pa.Array, as_integer: bool) -> None:
        footer = footer_of(file_of(pa.table({"k": column}), store_decimal_as_integer=as_integer))
        assert bounded_of(footer) is None

    def test_of_what_lies_between_columns_and_bounds_only_those_of_the_column_are_read(self) -> None:
        footer = footer_of(file_of(pa.table({"x": [[1, 2]], "k": [7], "y": [8]})))
        (group,) = read_footer(footer, 3, Bounded(1, 8, is_signed=True))
        assert [chunk.bounds for chunk in group.chunks] == [[], [(7, 7)], []]

    def test_bounds_by_the_rules_of_the_column(self) -> None:
        """Those by the new rules count if the column says that it follows them; those by the old only if signed."""
        one, two, three = (value.to_bytes(4, "little") for value in (1, 2, 3))
        ordered = {"more": {7: [{1: {}}]}}
        signed, unsigned, text = Bounded(0, 4, is_signed=True), Bounded(0, 4), Bounded(0, 0)

        def bounds(statistics: dict[int, bytes], bounded: Bounded, **file: Any) -> Any:
            footer = built({12: statistics}, **file)
            found = bounds_of_ours(read_footer(footer, 1, bounded))
            assert [bounds_of_ours(read_alike([footer] * 2, bounded)[1], position) for position in (0, 1)] == [
                found
            ] * 2
            return found[0]

        both = {1: three, 2: two, 5: two, 6: one}
        assert bounds(both, signed, **ordered) == (1, 2)
        assert bounds(both, signed) == (2, 3)
        assert bounds(both, unsigned, **ordered) == (1, 2)
        assert bounds(both, unsigned) == bounds(both, text) == (None, None)
        assert bounds({1: three, 2: two}, signed, **ordered) == (2, 3)
        assert bounds({1: three, 2: two}, unsigned, **ordered) == (None, None)
        assert bounds({5: two}, signed, **ordered) == bounds({}, signed, **ordered) == (None, None)
        # What is cut is a bound; what is no text or number, or the wrong way round, is none.
        assert bounds({5: b"b", 6: b"aa"}, text, **ordered) == ("aa", "b")
        assert bounds({5: b"b\xff", 6: b"aa"}, text, **ordered) == (None, None)
        assert bounds({5: two + b"\0", 6: one}, signed, **ordered) == (None, None)
        assert bounds({5: one, 6: two}, signed, **ordered) == (None, None)

    @pytest.mark.parametrize(
        ("footer", "message"),
        [
            (built({}, rows=4), "its row groups have other rows than the file"),
            (built({5: -1}), "a column has an impossible number of values"),
            (built({6: MAX_NUMBER}), "a column has an impossible number of values, bytes"),
            (built({12: {3: -1}}), "a column has an impossible number of values, bytes or nulls"),
            (built({12: {3: 2**64}}), "a column has an impossible number of values, bytes or nulls"),
            (built({12: {3: 2**80}}), "a number is too long"),
            (thrift({2: [], 3: 0, 4: [{1: [{3: {5: 0, 6: 0}}], 3: n} for n in (-1, 1)]}) + bytes(8), "number of rows"),
            (thrift({2: [], 3: 3, 4: [{1: [{}], 3: 3}]}) + bytes(8), "one of its structs has no field 3"),
            (thrift({2: [], 3: 3, 4: [{1: [{3: {5: 3}}], 3: 3}]}) + bytes(8), "one of its structs has no field 6"),
            (thrift({2: [], 3: 3, 4: [{3: 3}]}) + bytes(8), "one of its structs has no field 1"),
            (thrift({2: [], 3: 0}) + bytes(8), "one of its structs has no field 4"),
            (thrift({2: [], 4: []}) + bytes(8), "one of its structs has no field 3"),
            (
                thrift({2: [], 3: 3, 4: [{1: [{3: {5: 3, 6: 3}}] * 2, 3: 3}]}) + bytes(8),
                "has 2 columns, and the schema 1",
            ),
            (thrift({2: [], 3: 3, 4: [{1: [], 3: 3}]}) + bytes(8), "row group 0 has 0 columns, and the schema 1"),
            (b"", "ends too early"),
            (built({})[:-12] + bytes(8), "ends too early"),
            (b"\x18\xff\xff\xff\x7f" + bytes(8), "a length is more than what is left"),
            # A list of 2**60 doubles, or of 2**60 structs.
            (b"\x19\xf7" + varint(2**60) + bytes(9), "a length is more than what is left"),
            (b"\x49\xfc" + varint(2**60) + bytes(9), "a length is more than what is left"),
            (b"\x49\x25" + bytes(9), "a list of structs is one of type 5"),
            (b"\x1c" * 1000 + bytes(8), "structs and lists lie in one another"),
            (b"\x19\x19" * 1000 + bytes(8), "structs and lists lie in one another"),
            (b"\x1b" + bytes(9), "a value is of type 11, which Parquet does not use"),
            (b"\xff" * 100, "a value is of type 15"),
            (b"\x06" + b"\xff" * 100, "a number is too long"),
        ],
    )
    def test_damage_is_told(self, footer: bytes, message: str) -> None:
        with pytest.raises(FooterError, match=message):
            read_footer(footer, 1)

    @given(st.binary(max_size=300))
    def test_any_bytes_are_read_or_refused(self, data: bytes) -> None:
        try:
            read_footer(data, 1, Bounded(0, 8))
        except FooterError:
            return
        assert data  # it has at least an end


class TestReadAlike:
    @given(tables(), OPTIONS)
    def test_numbers_are_those_of_arrow(self, tables: list[pa.Table], options: dict[str, Any]) -> None:
        footers = [footer_of(file_of(table, **options)) for table in tables]
        alike, groups = read_alike(footers)
        assert alike[0] == 0
        for position, file in enumerate(alike.tolist()):
            assert of_ours(groups, position) == of_arrow(footers[file])

    def test_files_of_one_writer_are_alike_whatever_their_sizes(self) -> None:
        rng = np.random.default_rng(0)
        sizes = [1, 3, 150, 20_000, 2]
        footers = []
        for size in sizes:
            ids = pa.array([f"document {number}" for number in rng.integers(0, 10**9, size)])
            table = pa.table({"id": ids, "x": rng.random(size), "label": rng.integers(0, 10 ** min(size, 9), size)})
            footers.append(footer_of(file_of(table, use_dictionary=False)))
        assert len(set(map(len, footers))) > 1
        alike, (group,) = read_alike(footers)
        assert alike.tolist() == list(range(len(sizes)))
        assert group.rows.tolist() == sizes

    def test_other_schemas_and_shapes_are_not_alike(self) -> None:
        table = pa.table({"id": [1, 2], "x": [1.0, None]})
        others = [
            (table.rename_columns(["id", "y"]), {}),
            (table.select(["id"]), {}),
            (table.cast(pa.schema({"id": pa.int64(), "x": pa.float32()})), {}),
            (table, {"row_group_size": 1}),
            (table, {"write_statistics": False}),
            (table.slice(0, 0), {}),
            (table.slice(1), {}),  # has no least nor largest x
        ]
        files = [file_of(table), *(file_of(other, **options) for other, options in others), file_of(table.slice(0, 1))]
        alike, (group,) = read_alike([footer_of(file) for file in files])
        assert alike.tolist() == [0, len(files) - 1]
        assert group.rows.tolist() == [2, 1]

    def test_only_values_may_differ(self) -> None:
        """Structs that are as long and could be read over by the same steps, but say something else."""

        def struct(*fields: int) -> bytes:
            # The schema, as if it were text; no rows, in no row groups.
            return b"\x28\x01s\x16\0\x19\x0c" + bytes(fields) + bytes(8)

        number = [(0x16, 4, 0), (0x16, 6, 0), (0x16, 0x80, 9, 0)]  # field 5, a long integer
        assert read_alike([struct(*fields) for fields in [*number, (0x15, 6, 0), (0x26, 6, 0)]])[0].tolist() == [
            0,
            1,
            2,
        ]
        items = [(0x19, 0x25, 2, 4, 0), (0x19, 0x25, 6, 8, 0)]  # field 5, a list of two integers
        others = [(0x19, 0x15, 2, 4, 0), (0x19, 0x26, 2, 4, 0), (0x19, 0x25, 2, 4, 1)]
        assert read_alike([struct(*fields) for fields in items + others])[0].tolist() == [0, 1]

    @given(st.data())
    def test_damage_does_no_harm(self, data: st.DataObject) -> None:
        footer = footer_of(file_of(pa.table({"id": [1, 2], "x": ["a", None]})))
        damaged = bytearray(footer)
        for _ in range(data.draw(st.integers(1, 5))):
            damaged[data.draw(st.integers(0, len(footer) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(footer) - 1))
        footers = [footer, bytes(damaged), footer[:cut], footer[cut:] if cut else b"", data.draw(st.binary()), footer]
        alike, groups = read_alike(footers)
        assert set(alike.tolist()) in ({0, 5}, {0, 1, 5})
        assert of_ours(groups, -1) == of_arrow(footer)

    def test_each_has_to_have_as_many_rows_as_its_row_groups(self) -> None:
        footers = [built({}), built({}, rows=5), built({5: -1}), built({12: {3: 1}}), built({6: 31})]
        assert read_alike(footers)[0].tolist() == [0, 4]

    def test_a_length_may_not_lead_back(self) -> None:
        """Arithmetic of 64 bits could go on before the length, to where another footer has the same."""
        sound = thrift({2: [], 3: 0, 4: [], 5: b"a"})
        back = sound[:-3] + varint(2**64 - 1) + sound[-2:]
        assert read_alike([footer + bytes(8) for footer in (sound, back, sound)])[0].tolist() == [0, 2]

    def test_of_types_unknown_to_parquet_nothing_is_read(self) -> None:
        a_map = bytes([0x1B, 0])
        assert read_alike([a_map + bytes(9)] * 2)[0].tolist() == []


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def many_shapes() -> dict[str, bytes]:
    """Files of one schema, and one more whose wanted columns are the same: with nulls, without statistics, empty."""
    rng = np.random.default_rng(0)
    files = {}
    for number in range(40):
        ids = [None if number % 7 == 0 and row == 1 else row for row in range(number % 5)]
        lists = pa.array([rng.random(number % 4).tolist() for _ in ids], pa.list_(pa.float64()))
        table = pa.table({"id": pa.array(ids, pa.int64()), "x": lists, "text": pa.array(map(str, ids), pa.string())})
        if number % 11 == 0:
            table = table.append_column("extra", table["id"])
        files[f"{number:02}.parquet"] = file_of(
            table, write_statistics=number % 3 > 0, row_group_size=2 if number % 13 == 0 else 100
        )
    return files


def stats_of(path: Path | str, **options: Any) -> list[FileStats]:
    return scan_files(*list_files(path), ["id", "x", "text"], **options).files


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MANY", 2)


class TestReadFooters:
    @pytest.mark.parametrize("block", [1, 7, 4096])
    def test_side_by_side_gives_what_one_by_one_gives(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
    ) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        monkeypatch.setattr(scan, "MANY", math.inf)
        expected = stats_of(path)
        assert [file.path for file in expected] == sorted(map(str, path.iterdir()))
        assert {file.nullable for file in expected} == {frozenset(), frozenset({"id"})}
        assert {len(file.row_groups) for file in expected} >= {1, 2}
        monkeypatch.setattr(scan, "MANY", 2)
        monkeypatch.setattr(scan, "FIRST_BLOCK", block)
        monkeypatch.setattr(scan, "BLOCK", block)
        assert stats_of(path) == expected

    def test_few_long_footers_are_held_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        expected = stats_of(path)
        fetch, held = footers.fetch_footers, []

        def noted(fs: Any, sizes: dict[str, int]) -> list[bytes]:
            footers = fetch(fs, sizes)
            held.append(sum(map(len, footers)))
            return footers

        monkeypatch.setattr(scan, "FIRST_BLOCK", 2)
        monkeypatch.setattr(scan, "BLOCK_BYTES", 6000)
        monkeypatch.setattr(scan, "fetch_footers", noted)
        assert stats_of(path) == expected
        assert len(held) > 3
        assert max(held) < 3 * 6000

    @pytest.mark.usefixtures("side_by_side")
    def test_most_files_never_see_arrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = file_of(pa.table({"id": [1], "x": [1.0], "text": ["a"]}))
        path = write_files(tmp_path / "in", {f"{number}.parquet": file for number in range(100)})
        read, calls = footers.read_metadata, []

        def counted(*args: Any) -> pq.FileMetaData:
            calls.append(args)
            return read(*args)

        monkeypatch.setattr(scan, "read_metadata", counted)
        assert sum(file.rows for file in stats_of(path)) == 100
        assert len(calls) == 2  # the schema of the first file of each of two blocks

    @pytest.mark.usefixtures("side_by_side")
    def test_what_is_read_differently_by_itself_is_not_believed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        expected = stats_of(path)

        def wrong(footers: list[bytes], bounded: Any) -> Any:
            alike, groups = read_alike(footers, bounded)
            return alike, [group._replace(rows=group.rows + 1) for group in groups]

        monkeypatch.setattr(scan, "read_alike", wrong)
        assert stats_of(path) == expected

    def test_bounds_and_nulls_of_a_column_side_by_side(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        expected = stats_of(path, cluster_column="id")
        assert {(group.low, group.high) for file in expected for group in file.row_groups} >= {(0, 3), (None, None)}
        assert {file.null_clusters for file in expected} == {0, 1}
        monkeypatch.setattr(scan, "MANY", 2)
        assert stats_of(path, cluster_column="id") == expected

    @pytest.mark.usefixtures("side_by_side")
    def test_each_file_has_to_have_as_many_rows_as_its_row_groups(self, tmp_path: Path) -> None:
        file = file_of(pa.table({"id": [1, 2], "x": [[1.0], [2.0]], "text": ["a", "b"]}))
        rows = file.rindex(b"\x16\x04\x19\x1c")  # two rows, in a list of one row group
        files = {f"{number}.parquet": file for number in range(8)}
        files["6.parquet"] = file[: rows + 1] + b"\x06" + file[rows + 2 :]
        with pytest.raises(DataReadError, match=r"Cannot read .*6.parquet as Parquet .*other rows than the file"):
            stats_of(write_files(tmp_path / "in", files))

    @pytest.mark.usefixtures("side_by_side")
    def test_nulls_need_not_be_counted(self, tmp_path: Path) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        expected = [file._replace(nullable=frozenset()) for file in stats_of(path)]
        assert stats_of(path, nulls=False) == expected

    @pytest.mark.usefixtures("side_by_side")
    def test_another_schema_is_named(self, tmp_path: Path) -> None:
        files = many_shapes() | {"99.parquet": file_of(pa.table({"id": [1.0], "x": [[1.0]], "text": ["a"]}))}
        scan = scan_files(*list_files(write_files(tmp_path / "in", files)), ["id", "x", "text"])
        assert scan.schema.field("id").type == pa.float64()
        assert scan.odd == {file.path for file in scan.files if not file.path.endswith("99.parquet")}
        files |= {"98.parquet": file_of(pa.table({"id": ["b"], "x": [[1.0]], "text": ["a"]}))}
        scan = scan_files(*list_files(write_files(tmp_path / "in", files)), ["id", "x", "text"])
        assert re.search(r"Column 'id' is string in .*98.parquet but int64 in .*00.parquet", scan.problems["id"])

    def test_a_footer_longer_than_the_first_guess(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        expected = stats_of(path)
        monkeypatch.setattr(footers, "LOCAL_GUESS", 16)
        assert stats_of(path) == expected


class TestFetching:
    """A slow file system is one whose reads meet at a barrier: it lets them pass only if they come at once."""

    def meet(self, read: Callable[..., bytes], parties: int, first: int) -> Callable[..., bytes]:
        barrier, lock, count = threading.Barrier(parties, timeout=30), threading.Lock(), iter(range(10**6))

        def met(*args: Any, **kwargs: Any) -> bytes:
            with lock:
                number = next(count)
            if number >= first:
                barrier.wait()
            return read(*args, **kwargs)

        return met

    def test_slow_local_files_are_read_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        expected = stats_of(path)
        monkeypatch.setattr(footers, "SLOW", 0)
        monkeypatch.setattr(footers, "_read_range", self.meet(footers._read_range, 16, first=footers.PROBES))
        assert stats_of(path) == expected

    def test_fast_local_files_are_read_by_this_thread(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        read, threads = footers._read_range, set()

        def noted(*args: Any, **kwargs: Any) -> bytes:
            threads.add(threading.current_thread())
            return read(*args, **kwargs)

        monkeypatch.setattr(footers, "SLOW", math.inf)
        monkeypatch.setattr(footers, "_read_range", noted)
        stats_of(path)
        assert threads == {threading.current_thread()}

    def test_remote_files_are_read_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fs = fsspec.filesystem("memory")
        for name, content in many_shapes().items():
            fs.pipe(f"/fetching/{name}", content)
        expected = stats_of("memory://fetching")
        monkeypatch.setattr(type(fs), "cat_file", self.meet(type(fs).cat_file, 20, first=0))
        assert stats_of("memory://fetching") == expected
        fs.rm("/fetching", recursive=True)


def with_length(file: bytes, length: int) -> bytes:
    return file[:-8] + length.to_bytes(4, "little") + file[-4:]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda file: b"", "file size is 0 bytes"),
    "too short": (lambda file: b"PAR1", "file size is 4 bytes"),
    "cut": (lambda file: file[:-10], "magic bytes not found in footer"),
    "other magic": (lambda file: file[:-4] + b"PAR2", "magic bytes not found in footer"),
    "encrypted": (lambda file: file[:-4] + b"PARE", "encrypted"),
    "length beyond the file": (lambda file: with_length(file, len(file)), r"file size is \d{3,} bytes, smaller than"),
    "no length": (lambda file: with_length(file, 0), ""),
    "shorter length": (lambda file: with_length(file, 40), ""),
    "zeros": (lambda file: file[: -len(footer_of(file))] + bytes(len(footer_of(file)) - 8) + file[-8:], ""),
    "ones": (lambda file: file[: -len(footer_of(file))] + b"\xff" * (len(footer_of(file)) - 8) + file[-8:], ""),
    "half": (lambda file: file[:-100] + bytes(92) + file[-8:], ""),
}


class TestDamage:
    @pytest.mark.parametrize("kind", DAMAGE)
    @pytest.mark.parametrize("many", [2, math.inf], ids=["side by side", "one by one"])
    @pytest.mark.parametrize("root", ["local", "memory://damage"])
    @pytest.mark.parametrize("position", [0, 5, 11])
    def test_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, many: float, root: str, position: int
    ) -> None:
        monkeypatch.setattr(scan, "MANY", many)
        root = str(tmp_path) if root == "local" else root
        fs, folder = fsspec.core.url_to_fs(root)
        damage, message = DAMAGE[kind]
        for number in range(12):
            file = file_of(pa.table({"id": [number], "x": [[1.0, 2.0]]}))
            path = f"{folder}/centroid={number:02}/a.parquet"
            fs.makedirs(fs._parent(path), exist_ok=True)
            fs.pipe_file(path, damage(file) if number == position else file)
        with pytest.raises(
            DataReadError, match=f"Cannot read .*centroid={position:02}/a.parquet as Parquet .truncated.*{message}"
        ):
            read_clusters(root)
        fs.rm(folder, recursive=True)

    @pytest.mark.parametrize("content", [b"/", b"!"], ids=["no schema", "no text"])
    def test_of_the_schema_is_named(self, tmp_path: Path, content: bytes) -> None:
        file = file_of(pa.table({"id": [1]}))
        start = file.index(b"ARROW:schema") + 20
        damaged = file[:start] + content * 40 + file[start + 40 :]
        path = write_files(tmp_path / "centroid=0", {"a.parquet": damaged})
        for read in (read_clusters, lambda path: scan_files(*list_files(path), ["id"])):
            with pytest.raises(DataReadError, match=r"Cannot read .*a.parquet as Parquet .truncated"):
                read(path)

    @pytest.mark.parametrize("size", [0, -1, -5])
    def test_lists_of_no_or_negative_size(self, tmp_path: Path, size: int) -> None:
        told = (0x01020304).to_bytes(4, "little")
        table = pa.table({"id": [1], "x": pa.nulls(1, pa.list_(pa.float32(), 0x01020304))})
        schema = table.schema.serialize().to_pybytes()
        assert schema.count(told) == 1
        damaged = schema.replace(told, size.to_bytes(4, "little", signed=True))
        file = file_of(table).replace(base64.b64encode(schema), base64.b64encode(damaged))
        path = write_files(tmp_path, {"a.parquet": file})
        with nullcontext() if not size else pytest.raises(DataReadError, match=r"Cannot read .*a.parquet as Parquet"):
            assert read_table(path, ["id"])["id"].compute().tolist() == [1]
            assert read_table(path)["x"].isna().all().compute()

    def test_a_file_gone_since_the_listing_is_named(self, tmp_path: Path) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        fs, files = list_files(path)
        (path / "07.parquet").unlink()
        with pytest.raises(DataReadError, match=r"Cannot read .*07.parquet: No such file"):
            scan_files(fs, files, ["id"])

    def test_a_file_replaced_since_the_listing_is_read_anew(self, tmp_path: Path) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        fs, files = list_files(path)
        write_files(path, {"07.parquet": file_of(pa.table({"id": range(1000)}))})
        assert scan_files(fs, files, ["id"]).files[7].rows == 1000


def sound_footer() -> bytes:
    """Of a column of each kind that is read, with nulls and with bounds, in two row groups."""
    clusters, lists = pa.array([1, 2, 3], pa.uint16()), pa.array([[1.0, 2.0], [0.5], []], pa.list_(pa.float32()))
    table = pa.table({"id": pa.array([7, None, 9]), "k": clusters, "x": lists, "text": ["a", "b", None]})
    return footer_of(file_of(table, row_group_size=2))


def some_bytes_wrong(footer: bytes, n: int) -> Iterator[bytes]:
    """The footer, n times, with one or a few of its bytes replaced by random ones."""
    rng = random.Random(0)
    for _ in range(n):
        damaged = bytearray(footer)
        for _ in range(rng.choice([1, 1, 2, 4])):
            damaged[rng.randrange(len(footer) - 8)] = rng.randrange(256)
        yield bytes(damaged)


class Noting(thrift_reader._One):
    """Notes where the integers are, and the lengths."""

    struct = thrift_reader._Thrift.struct

    def unsigned(self) -> int:
        start, value = self.at, super().unsigned()
        self.places.append((start, self.at))
        return value


def one_integer_wrong(footer: bytes) -> Iterator[bytes]:
    """The footer with each of its integers, lengths among them, replaced by some others."""
    noting = Noting(footer)
    noting.places: list[tuple[int, int]] = []
    noting.struct({})
    assert len(noting.places) > 200
    for start, stop in noting.places:
        for value in (0, 5, 2**31, 2**41, 2**64 - 1):
            body = footer[:start] + varint(value) + footer[stop:-8]
            yield body + len(body).to_bytes(4, "little") + b"PAR1"


def read_damaged() -> None:
    """Read damaged footers, alone and among sound ones; print how many were refused and how many were read."""
    fs, sound = fsspec.filesystem("memory"), sound_footer()
    scan.MANY = 2
    fs.pipe({f"/damaged/{number}.parquet": sound for number in range(6)})

    def read(*numbers: int) -> list[FileStats]:
        files = {f"/damaged/{number}.parquet": fs.info(f"/damaged/{number}.parquet") for number in numbers}
        path, info = next(iter(files.items()))
        names = read_schema(fs, path, info["size"]).names
        return scan_files(fs, files, names, "k" if "k" in names else None).files

    expected = read(*range(6))
    refused = total = 0
    for total, footer in enumerate([*some_bytes_wrong(sound, 2000), *one_integer_wrong(sound)], 1):
        print(total, footer.hex(), file=sys.stderr)
        fs.pipe_file("/damaged/3.parquet", footer)
        for numbers in [(3,), range(6)] if total % 16 == 0 else [(3,)]:
            try:
                stats = read(*numbers)
            except DataReadError as error:
                if "/damaged/3.parquet" not in str(error):
                    raise
                refused += numbers == (3,)
            else:
                assert all(file.rows == sum(group.rows for group in file.row_groups) for file in stats)
                assert all(stats[number] == expected[number] for number in numbers if number != 3)
    print(refused, total)


def test_no_damage_ends_the_process() -> None:
    """In a process of its own, since a C++ exception that nobody catches ends it."""
    command = [sys.executable, "-c", "from tests.io.test_thrift import read_damaged; read_damaged()"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr[-3000:]
    refused, total = map(int, run.stdout.split())
    assert total > 3000
    assert total / 2 < refused < total
