"""Files that lie, ask for much memory, or change while they are read; names that are paths. See `tests.fuzz` too."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_semdedup import ClusterError, read_clusters
from dask_semdedup.errors import DataReadError, SemDedupError
from dask_semdedup.io import cudf_reader, fragments, jsonlines, listing, scan
from dask_semdedup.io.fragments import Fragment
from dask_semdedup.lazy.tables import read_table
from tests.data import in_partitions
from tests.fuzz import Noting, varint

ROWS = 77


def with_numbers(file: bytes, old: int, new: int, which: int | None = None) -> bytes:
    """Return a file whose footer has another number in one of the places of the old one, or in all."""
    start = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    noting = Noting(file[start:-8])
    noting.struct({})
    places = [place[:2] for place in noting.places if place[2] == 2 * old]
    body = file[start:-8]
    for first, last in reversed(places if which is None else places[which : which + 1]):
        body = body[:first] + varint(2 * new) + body[last:]
    return file[:start] + body + len(body).to_bytes(4, "little") + b"PAR1"


def file_of(table: pa.Table, **options: Any) -> bytes:
    pq.write_table(table, file := io.BytesIO(), **options)
    return file.getvalue()


def resident(which: str) -> int:
    """Return bytes of memory of this process: those that it has, or the most that it had."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


class TestMemory:
    def test_rows_that_a_file_has_not_bytes_for_are_refused(self, tmp_path: Path) -> None:
        file = file_of(pa.table({"id": range(ROWS), "x": [[1.0]] * ROWS}), write_statistics=False)
        (tmp_path / "a.parquet").write_bytes(with_numbers(file, ROWS, 10**9))
        with pytest.raises(DataReadError, match=r"a\.parquet has \d{3,4} bytes, and asks for 16000000000 or more"):
            read_table(tmp_path)

    @pytest.mark.parametrize("which", [0, 1, 3, 6], ids=["rows", "values", "values of lists", "rows of the group"])
    @pytest.mark.parametrize("number", [0, 5, ROWS - 1, 10**9])
    def test_one_number_that_is_another_is_noticed(self, tmp_path: Path, which: int, number: int) -> None:
        file = file_of(pa.table({"id": range(ROWS), "x": [[1.0]] * ROWS}), write_statistics=False)
        (tmp_path / "a.parquet").write_bytes(with_numbers(file, ROWS, number, which))
        with pytest.raises(DataReadError, match=r"a\.parquet"):
            read_table(tmp_path).compute()

    def test_a_page_that_asks_for_much_gets_no_more_than_the_file_has(self, tmp_path: Path) -> None:
        file = file_of(pa.table({"id": range(ROWS)}), use_dictionary=False, compression="none")
        # Behind the magic: the kind of page, its size, and its compressed size. There are 7 bytes of levels.
        size = varint(2 * (8 * ROWS + 7))
        start = b"PAR1\x15\x00\x15" + size + b"\x15"
        assert file.startswith(start + size)
        (tmp_path / "a.parquet").write_bytes(start + varint(2 * (2**31 - 1)) + file[len(start + size) :])
        table = read_table(tmp_path)
        Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from here.
        before = resident("VmRSS")
        with pytest.raises(DataReadError, match=r"a\.parquet .*expected \(2147483647\)"):
            table.compute(scheduler="sync")
        assert resident("VmHWM") - before < 2**28

    def test_what_is_sound_and_compresses_well_is_read(self, tmp_path: Path) -> None:
        rows = pa.table(
            {"id": range(50_000), "x": pa.array([[0.0] * 768]).take([0] * 50_000), "text": ["t" * 99] * 50_000}
        )
        pq.write_table(rows, tmp_path / "a.parquet", compression="zstd")
        assert rows.nbytes > fragments.UNSUSPECTED > 1000 * os.path.getsize(tmp_path / "a.parquet")
        assert len(read_table(tmp_path, ["x", "text"]).compute()) == 50_000

    @pytest.mark.parametrize("kind", ["plain", "coded", "in a list", "in a struct", "in a map"])
    def test_a_long_text_in_every_row_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), ["x" * 20_000])
        starts = pa.array(range(3001), pa.int32())
        column = {
            "plain": texts,
            "coded": texts,
            "in a list": pa.ListArray.from_arrays(starts, texts),
            "in a struct": pa.StructArray.from_arrays([pa.array(range(3000)), texts], ["n", "y"]),
            "in a map": pa.MapArray.from_arrays(starts, pa.array(map(str, range(3000))), texts.cast(pa.string())),
        }[kind]
        table = pa.table({"id": range(3000), "a.b": column})
        pq.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=kind != "plain")
        monkeypatch.setattr(fragments, "UNSUSPECTED", 2**21)
        monkeypatch.setattr(fragments, "BATCH_BYTES", 2**19)
        monkeypatch.setattr(fragments, "EXPANSION", 2)
        monkeypatch.setattr(scan, "EXPANSION", 2**20)
        peak = pa.total_allocated_bytes()
        with pytest.raises(DataReadError, match=r"a\.parquet has \d+ bytes, and asks for \d{7} or more in memory"):
            read_table(tmp_path, backend="pandas").compute(scheduler="sync")
        assert pa.total_allocated_bytes() - peak < 2**24

    def test_texts_read_in_pieces_are_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = ["x" * 5000, None, "", *map(str, range(997))]
        table = pa.table({"id": range(1000), "text": texts, "all": [[text, "y"] for text in texts]})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
        whole = read_table(tmp_path, backend="pandas").compute()
        monkeypatch.setattr(fragments, "UNSUSPECTED", 2**12)
        monkeypatch.setattr(fragments, "BATCH_BYTES", 2**12)
        monkeypatch.setattr(fragments, "EXPANSION", 5)
        pd.testing.assert_frame_equal(read_table(tmp_path, backend="pandas").compute(), whole)

    @pytest.mark.parametrize("suffix", ["gz", "zst"])
    @pytest.mark.parametrize("end", ["\n", ""], ids=["lines", "one endless line"])
    def test_lines_that_unpack_to_far_more_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, end: str
    ) -> None:
        monkeypatch.setattr(jsonlines, "UNPACKED_BYTES", 2**16)
        monkeypatch.setattr(jsonlines, "STEP_BYTES", 2**12)
        monkeypatch.setattr(jsonlines, "INFERRED_BYTES", 2**10)
        text = ('{"id": "' + "x" * 90 + f'"}}{end}').encode() * 100_000
        packed = gzip.compress(text) if suffix == "gz" else pa.compress(text, "zstd", asbytes=True)
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed)
        with pytest.raises(DataReadError, match=rf"a\.jsonl\.{suffix} has \d+ bytes, .*unpack it first.*> rows.jsonl"):
            read_table(tmp_path).compute()


@pytest.mark.parametrize(
    "value", ["[" * 10**6 + "]" * 10**6, '{"a":' * 10**6 + "1" + "}" * 10**6], ids=["lists", "objects"]
)
@pytest.mark.parametrize("columns", [None, ["id"]])
def test_lines_that_are_too_deep_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, columns: list[str] | None
) -> None:
    monkeypatch.setattr(jsonlines, "INFERRED_BYTES", 5)
    # Brackets in texts do not count.
    sound = json.dumps({"id": 1, "text": "[{" * 5000 + '"]' * 9})
    (tmp_path / "a.jsonl").write_text(f'{sound}\n{sound}\n{{"id": 2, "text": {value}}}\n')
    with pytest.raises(DataReadError, match=r"Cannot read line 3 of .*a\.jsonl"):
        read_table(tmp_path, columns).compute(scheduler="sync")
    assert not jsonlines._is_deep(f"{sound}\n{sound}\n".encode())


def test_nulls_that_the_footer_denies_are_named(tmp_path: Path) -> None:
    file = file_of(pa.table({"id": range(9), "n": pa.array([2**60 + 1, *[None] * 5, 1, 2, 3])}))
    (tmp_path / "a.parquet").write_bytes(with_numbers(file, 5, 0))
    with pytest.raises(DataReadError, match=r"Column 'n': 5 rows have no value, .*in .*a\.parquet"):
        read_table(tmp_path).compute()


def test_a_byte_that_flips_in_what_is_written_is_noticed(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    frame = pd.DataFrame({"id": range(100), "embeddings": list(rows), "centroid": 0})
    in_partitions(frame).semdedup.to_clusters(tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("*.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataReadError, match=r"Cannot read .*parquet.*CRC"):
        read_clusters(tmp_path / "out", backend="pandas").compute()


class TestChanges:
    """Files that change between planning and reading."""

    @pytest.fixture(params=["a.parquet", "a.jsonl"])
    def file(self, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Path]:
        def write(first: int) -> Path:
            frame = pd.DataFrame({"id": range(first, first + 9)})
            path = tmp_path / request.param
            if path.suffix == ".jsonl":
                frame.to_json(path, orient="records", lines=True)
            else:
                frame.to_parquet(path)
            return path

        return write

    def test_a_file_replaced_by_one_of_the_same_length(self, file: Callable[[int], Path]) -> None:
        path = file(10)
        table = read_table(path)
        before = path.stat()
        file(20)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**6))
        assert path.stat().st_size == before.st_size
        with pytest.raises(DataReadError, match=rf"{path.name} changed since the .* were read: .*Read the files again"):
            table.compute()

    @pytest.mark.parametrize("groups", [None, (0,)])
    def test_a_replaced_file_is_noticed_before_cudf_reads_it(
        self, tmp_path: Path, groups: tuple[int, ...] | None
    ) -> None:
        (path := tmp_path / "a.parquet").write_bytes(file_of(pa.table({"id": [1]})))
        _, files = listing.list_files(path)
        (state,) = (listing.State.of(LocalFileSystem(), info) for info in files.values())
        os.utime(path, ns=(0, state.mtime + 10**6))
        with pytest.raises(DataReadError, match=r"a.parquet changed since"):
            cudf_reader._read_with_cudf(LocalFileSystem(), [Fragment(str(path), 1, groups, state=state)], ["id"])

    def test_a_file_that_shrinks(self, file: Callable[[int], Path]) -> None:
        path = file(10)
        table = read_table(path)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(DataReadError, match=rf"{path.name} changed since"):
            table.compute()

    def test_a_file_that_vanishes(self, file: Callable[[int], Path]) -> None:
        path = file(10)
        table = read_table(path)
        path.unlink()
        with pytest.raises(DataReadError, match=rf"Cannot read .*{path.name}.*No such file"):
            table.compute()


class TestNames:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("x", "y"):
            (tmp_path / "in" / name).mkdir(parents=True)
            pd.DataFrame({"id": [1, 2]}).to_parquet(tmp_path / "in" / name / "a.parquet")
        return tmp_path / "in"

    @pytest.mark.parametrize(
        ("link", "target"), [("loop", "."), ("x/up", ".."), ("x/self", "self"), ("over", ".."), ("none", "nowhere")]
    )
    def test_links_in_a_circle_are_not_followed(self, folder: Path, link: str, target: str) -> None:
        (folder / link).symlink_to(target)
        (folder / "other").symlink_to(folder)
        assert len(read_table(folder)) == 4

    def test_links_to_each_other_end(self, folder: Path) -> None:
        (folder / "x" / "y").symlink_to("../y")
        (folder / "y" / "x").symlink_to("../x")
        names = sorted(path.removeprefix(str(folder)) for path in listing.list_files(folder)[1])
        assert names == ["/x/a.parquet", "/x/y/a.parquet", "/y/a.parquet", "/y/x/a.parquet"]

    def test_pipes_are_no_files(self, folder: Path) -> None:
        os.mkfifo(folder / "pipe.parquet")
        assert len(read_table(folder)) == 4

    def test_clusters_that_are_paths_stay_in_the_folder(self, tmp_path: Path) -> None:
        names = ["..", ".", "../x", "/etc", "a/../../b", "\0", "~", "<b>", "a=b", "%2e%2e", "\n", "*", " "]
        frame = pd.DataFrame({"id": range(len(names)), "embeddings": [[1.0]] * len(names), "centroid": names})
        in_partitions(frame).semdedup.to_clusters(tmp_path / "out" / "clusters")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["clusters"]
        assert len(list((tmp_path / "out" / "clusters").iterdir())) == len(names)
        found = read_clusters(tmp_path / "out" / "clusters", backend="pandas").compute()
        assert dict(zip(found["id"], found["centroid"], strict=True)) == dict(enumerate(names))

    @pytest.mark.parametrize("name", ["x" * 247, "é" * 42], ids=["long", "long once it is quoted"])
    def test_clusters_of_long_names_are_refused(self, tmp_path: Path, name: str) -> None:
        frame = pd.DataFrame({"id": range(3), "embeddings": [[1.0]] * 3, "centroid": ["a", name, name[:-1]]})
        in_partitions(frame[frame.centroid != name]).semdedup.to_clusters(tmp_path / "shorter")
        with pytest.raises(
            ClusterError, match=rf"'centroid': 1 cluster has a folder's name of .* \('{name[:40]}'\.\.\.\)"
        ):
            in_partitions(frame).semdedup.to_clusters(tmp_path / "out")
        assert issubclass(ClusterError, SemDedupError)
        assert not (tmp_path / "out").exists()
