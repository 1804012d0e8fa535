"""Footers of many files: read side by side as Arrow reads each, fetched as the file system likes, damage named."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup import ClusterError, _parquet, read_clusters
from dask_semdedup._footers import read_alike
from dask_semdedup._parquet import FileStats, list_files, read_footers

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
            return b"\x28\x01s" + bytes(fields) + bytes(8)  # the schema, as if it were text

        number = [(0x16, 4, 0), (0x16, 6, 0), (0x16, 0x80, 9, 0)]  # field 3, a long integer
        assert read_alike([struct(*fields) for fields in [*number, (0x15, 6, 0), (0x26, 6, 0)]])[0].tolist() == [
            0,
            1,
            2,
        ]
        items = [(0x39, 0x25, 2, 4, 0), (0x39, 0x25, 6, 8, 0)]  # field 5, a list of two integers
        others = [(0x39, 0x15, 2, 4, 0), (0x39, 0x26, 2, 4, 0), (0x39, 0x25, 2, 4, 1)]
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
    return read_footers(*list_files(path), ["id", "x", "text"], **options)


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parquet, "MANY", 2)


class TestReadFooters:
    @pytest.mark.parametrize("block", [1, 7, 4096])
    def test_side_by_side_gives_what_one_by_one_gives(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
    ) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        monkeypatch.setattr(_parquet, "MANY", math.inf)
        expected = stats_of(path)
        assert [file.path for file in expected] == sorted(map(str, path.iterdir()))
        assert {file.nullable for file in expected} == {frozenset(), frozenset({"id"})}
        assert {len(file.row_groups) for file in expected} >= {1, 2}
        monkeypatch.setattr(_parquet, "MANY", 2)
        monkeypatch.setattr(_parquet, "FIRST_BLOCK", block)
        monkeypatch.setattr(_parquet, "BLOCK", block)
        assert stats_of(path) == expected

    def test_few_long_footers_are_held_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        expected = stats_of(path)
        fetch, held = _parquet._fetch_footers, []

        def noted(fs: Any, sizes: dict[str, int]) -> list[bytes]:
            footers = fetch(fs, sizes)
            held.append(sum(map(len, footers)))
            return footers

        monkeypatch.setattr(_parquet, "FIRST_BLOCK", 2)
        monkeypatch.setattr(_parquet, "BLOCK_BYTES", 6000)
        monkeypatch.setattr(_parquet, "_fetch_footers", noted)
        assert stats_of(path) == expected
        assert len(held) > 3
        assert max(held) < 3 * 6000

    @pytest.mark.usefixtures("side_by_side")
    def test_most_files_never_see_arrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = file_of(pa.table({"id": [1], "x": [1.0], "text": ["a"]}))
        path = write_files(tmp_path / "in", {f"{number}.parquet": file for number in range(100)})
        read, calls = _parquet._read_metadata, []

        def counted(*args: Any) -> pq.FileMetaData:
            calls.append(args)
            return read(*args)

        monkeypatch.setattr(_parquet, "_read_metadata", counted)
        assert sum(file.rows for file in stats_of(path)) == 100
        assert len(calls) == 3  # the first file's schema, and the first numbers of each of two blocks

    @pytest.mark.usefixtures("side_by_side")
    def test_what_arrow_reads_differently_is_not_believed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        expected = stats_of(path)

        def wrong(footers: list[bytes]) -> Any:
            alike, groups = read_alike(footers)
            return alike, [group._replace(rows=group.rows + 1) for group in groups]

        monkeypatch.setattr(_parquet, "read_alike", wrong)
        assert stats_of(path) == expected

    @pytest.mark.usefixtures("side_by_side")
    def test_nulls_need_not_be_counted(self, tmp_path: Path) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        expected = [file._replace(nullable=frozenset()) for file in stats_of(path)]
        assert stats_of(path, nulls=False) == expected

    @pytest.mark.usefixtures("side_by_side")
    def test_another_schema_is_named(self, tmp_path: Path) -> None:
        files = many_shapes() | {"99.parquet": file_of(pa.table({"id": [1.0], "x": [[1.0]], "text": ["a"]}))}
        with pytest.raises(ClusterError, match=r"Column 'id' is double in .*99.parquet but int64 in .*00.parquet"):
            stats_of(write_files(tmp_path / "in", files))

    def test_a_footer_longer_than_the_first_guess(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        expected = stats_of(path)
        monkeypatch.setattr(_parquet, "LOCAL_GUESS", 16)
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
        monkeypatch.setattr(_parquet, "SLOW", 0)
        monkeypatch.setattr(_parquet, "_read_range", self.meet(_parquet._read_range, 16, first=_parquet.PROBES))
        assert stats_of(path) == expected

    def test_fast_local_files_are_read_by_this_thread(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        read, threads = _parquet._read_range, set()

        def noted(*args: Any) -> bytes:
            threads.add(threading.current_thread())
            return read(*args)

        monkeypatch.setattr(_parquet, "SLOW", math.inf)
        monkeypatch.setattr(_parquet, "_read_range", noted)
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
        monkeypatch.setattr(_parquet, "MANY", many)
        root = str(tmp_path) if root == "local" else root
        fs, folder = fsspec.core.url_to_fs(root)
        damage, message = DAMAGE[kind]
        for number in range(12):
            file = file_of(pa.table({"id": [number], "x": [[1.0, 2.0]]}))
            path = f"{folder}/centroid={number:02}/a.parquet"
            fs.makedirs(fs._parent(path), exist_ok=True)
            fs.pipe_file(path, damage(file) if number == position else file)
        with pytest.raises(
            ClusterError, match=f"Cannot read .*centroid={position:02}/a.parquet as Parquet .truncated.*{message}"
        ):
            read_clusters(root)
        fs.rm(folder, recursive=True)

    @pytest.mark.parametrize("content", [b"/", b"!"], ids=["no schema", "no text"])
    def test_of_the_schema_is_named(self, tmp_path: Path, content: bytes) -> None:
        file = file_of(pa.table({"id": [1]}))
        start = file.index(b"ARROW:schema") + 20
        damaged = file[:start] + content * 40 + file[start + 40 :]
        path = write_files(tmp_path / "centroid=0", {"a.parquet": damaged})
        for read in (read_clusters, lambda path: read_footers(*list_files(path), ["id"])):
            with pytest.raises(ClusterError, match=r"Cannot read .*a.parquet as Parquet .truncated"):
                read(path)

    def test_a_file_gone_since_the_listing_is_named(self, tmp_path: Path) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        fs, files = list_files(path)
        (path / "07.parquet").unlink()
        with pytest.raises(ClusterError, match=r"Cannot read .*07.parquet as Parquet .truncated.*No such file"):
            read_footers(fs, files, ["id"])

    def test_a_file_replaced_since_the_listing_is_read_anew(self, tmp_path: Path) -> None:
        path = write_files(tmp_path / "in", many_shapes())
        fs, files = list_files(path)
        write_files(path, {"07.parquet": file_of(pa.table({"id": range(1000)}))})
        assert read_footers(fs, files, ["id"])[7].rows == 1000
