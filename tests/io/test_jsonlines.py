"""JSON lines come out as they went in, whatever their types, files and partitions."""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_semdedup.errors import DataReadError, IdError, MissingColumnsError
from dask_semdedup.io import jsonlines
from dask_semdedup.io.folder_keys import keys_below
from dask_semdedup.io.jsonlines import Block, read_json, rows_before
from dask_semdedup.lazy.tables import read_table
from tests.data import RECORDS, write_json


def zstd(text: bytes) -> bytes:
    return pa.compress(text, "zstd", asbytes=True)


def values(path: Any, column: str, **options: Any) -> list[Any]:
    """A column as Python's values, null as None."""
    frame = read_table(path, **options).compute(scheduler="sync")
    return pa.array(frame[column], from_pandas=True).to_pylist()


@pytest.fixture
def first_line_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first file and the second only the first lines are sampled, and nothing of others."""
    for name in ("INFERRED_BYTES", "PIECE_BYTES", "SPREAD_BYTES", "REQUEST_BYTES"):
        monkeypatch.setattr(jsonlines, name, 1)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("partition_size", ["1MiB", "300B", "7B"])
def test_json_lines_are_read_once_each(tmp_path: Path, name: str, partition_size: str) -> None:
    write_json(tmp_path / name, RECORDS, compress=name.endswith(".gz"))
    frame = read_table(tmp_path, partition_size=partition_size).compute()
    assert frame["id"].tolist() == [row["id"] for row in RECORDS]
    assert frame["text"].tolist() == [row["text"] for row in RECORDS]
    assert frame["embeddings"].dtype == pd.ArrowDtype(pa.list_(pa.float32()))
    assert np.stack(frame["embeddings"].tolist()).tolist() == [row["embeddings"] for row in RECORDS]


def test_meta_is_what_partitions_are(tmp_path: Path) -> None:
    write_json(
        tmp_path / "a.jsonl", [{"id": 1, "n": None, "x": 1.5, "t": None}, {"id": 2, "n": 3, "x": None, "t": "s"}]
    )
    frame = read_table(tmp_path)
    assert frame.dtypes.to_dict() == frame.compute().dtypes.to_dict()
    assert frame["id"].dtype == np.int64


def test_text_stays_as_it_is_written(tmp_path: Path) -> None:
    titles = ["2020-01-01", "2020-01-01T10:00:00.5Z", "2020-01-01 10:00:00"]
    write_json(tmp_path / "a.jsonl", [{"id": number, "title": title} for number, title in enumerate(titles)])
    assert read_table(tmp_path, partition_size="20B").compute()["title"].tolist() == titles


def test_text_in_lists_stays_as_it_is_written(tmp_path: Path) -> None:
    rows = [{"id": 1, "tags": ["2020-01-01"], "by": {"on": "2020-01-01", "n": 1}}, {"id": 2, "tags": ["x"], "by": None}]
    write_json(tmp_path / "a.jsonl", rows)
    frame = read_table(tmp_path, partition_size="50B").compute()
    assert [list(tags) for tags in frame["tags"]] == [["2020-01-01"], ["x"]]
    assert frame["by"].iloc[0] == {"on": "2020-01-01", "n": 1}


def test_ids_that_are_no_integers_stay_numbers(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": 1.5}, {"id": 2}])
    assert read_table(tmp_path).compute()["id"].tolist() == [1.5, 2.0]


@pytest.mark.parametrize("field", ["id", "doc"])
def test_ids_of_64_bits_stay_apart(tmp_path: Path, field: str) -> None:
    ids = [11400714819323198485 + number for number in range(4)] + [7]
    write_json(tmp_path / "a.jsonl", [{field: number, "x": 0.5} for number in ids])
    frame = read_table(tmp_path, id_field=field).compute()
    assert frame[field].dtype == np.uint64
    assert frame[field].tolist() == ids


@pytest.mark.parametrize(
    "text", ['{"id": 1}\n{"id": ', '{"id": 1}\n{"id": "two"}', '{"id": 1}\n{"id": 2, "more": 3}', "[1, 2]", "plain"]
)
def test_lines_that_are_not_of_a_kind_name_the_file(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonlines, "INFERRED_BYTES", 5)
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(DataReadError, match=r"bad\.jsonl"):
        read_table(tmp_path, partition_size="10B").compute()


def test_truncated_gzip_names_the_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "bad.jsonl.gz", RECORDS, compress=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataReadError, match=r"bad\.jsonl\.gz"):
        read_table(tmp_path)


def test_null_ids_are_counted(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": 1}, {"id": None}, {"id": None}])
    with pytest.raises(IdError, match=r"2 rows have no 'id' in .*a\.jsonl"):
        read_table(tmp_path).compute()


@pytest.mark.parametrize("checked_first", [False, True])
def test_the_column_that_may_not_be_null_is_part_of_the_frame(tmp_path: Path, checked_first: bool) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": 1, "doc": 7}, {"id": 2, "doc": None}])
    for id_field in ("doc", "id") if checked_first else ("id", "doc"):
        frame = read_table(tmp_path, id_field=id_field)
        if id_field == "id":
            assert len(frame.compute()) == 2
        else:
            with pytest.raises(IdError, match="1 row has no 'doc'"):
                frame.compute()


@pytest.mark.parametrize("ids", [[2**63 + 1, 2**63 + 2, -5], [2**65 + 1, 2**65 + 2]])
def test_ids_that_no_type_of_64_bits_holds_are_text(tmp_path: Path, ids: list[int]) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": id_} for id_ in ids])
    assert values(tmp_path, "id") == [str(id_) for id_ in ids]


def test_ids_may_be_floats(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": 0.5}, {"id": 1.5}])
    assert read_table(tmp_path)["id"].compute().tolist() == [0.5, 1.5]


def test_ids_that_are_not_wanted_may_be_anything(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": 1e20, "text": "a"}])
    assert read_table(tmp_path, columns=["text"])["text"].compute().tolist() == ["a"]


# --- Files -----------------------------------------------------------------------------------------------------------

LINES = b'{"id": 1, "n": 5}\n{"id": 2, "n": 6}\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("0.jsonl", b""),
        ("0.jsonl", b"\n \r\n\n"),
        ("0.jsonl", b"\xef\xbb\xbf"),
        ("0.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("0.jsonl.gz", b""),
        ("0.jsonl.zst", zstd(b"")),
        ("b.jsonl", b""),
        ("z.jsonl", b""),
    ],
)
def test_files_without_rows_are_no_reason_to_lose_others(tmp_path: Path, name: str, text: bytes) -> None:
    for other in ("a.jsonl", "c.jsonl"):
        (tmp_path / other).write_bytes(LINES)
    (tmp_path / name).write_bytes(text)
    frame = read_table(tmp_path)
    assert frame.dtypes.to_dict() == frame.compute().dtypes.to_dict()
    assert frame["id"].dtype == np.int64
    assert frame["id"].compute().tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("text", [b"", b" \n\n"])
def test_nothing_but_files_without_rows_is_an_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text, mtime=0))
    with pytest.raises(DataReadError, match=r"No rows in .*a\.jsonl, .*b\.jsonl\.gz: nothing but empty files"):
        read_table(tmp_path)


@pytest.mark.parametrize("text", [LINES.replace(b"\n", b"\r\n"), b"\n\n" + LINES.replace(b"\n", b"\n \n"), LINES[:-1]])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("partition_size", ["1MiB", "5B"])
def test_blank_lines_and_marks_are_no_rows(tmp_path: Path, text: bytes, mark: bytes, partition_size: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(mark + text)
    frame = read_table(tmp_path, partition_size=partition_size)
    assert frame.compute()["n"].tolist() == [5, 6]
    assert len(frame[[]].compute()) == len(frame) == 2


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".ndjson.zst", ".json.zst"])
@pytest.mark.parametrize("root", ["", "memory:/", "simplecache::memory:/"])
def test_zstandard_is_read_by_arrow(tmp_path: Path, suffix: str, root: str) -> None:
    path = f"{root}{tmp_path}/a{suffix}"
    fs, name = fsspec.url_to_fs(path)
    # As `cat` or a parallel compressor leaves it: in several frames.
    getattr(fs, "fs", fs).pipe(name, zstd(LINES) + zstd(LINES))
    assert values(path, "id") == [1, 2, 1, 2]


def test_truncated_zstandard_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl.zst").write_bytes(zstd(LINES * 1000)[:-5])
    with pytest.raises(DataReadError, match=r"Cannot read .*bad\.jsonl\.zst \(truncated"):
        read_table(tmp_path).compute()


def test_json_in_zstandard_beside_parquet_is_about_the_data(tmp_path: Path) -> None:
    pd.DataFrame({"id": [1]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "info.json.zst").write_bytes(zstd(b"{}"))
    assert len(read_table(tmp_path)) == 1


@pytest.mark.parametrize("root", ["memory:/", "simplecache::memory:/"])
def test_remote_files_are_sampled_and_read(tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonlines, "PIECE_BYTES", 4)
    memory = fsspec.filesystem("memory")
    for name, field in (("a", "x"), ("b", "y"), ("c", "z")):
        memory.pipe(f"{tmp_path}/{name}.jsonl", json.dumps({"id": 1, field: "long " * 20}).encode())
    frame = read_table([f"{root}{tmp_path}/{name}.jsonl" for name in "abc"], partition_size="30B").compute()
    assert list(frame.columns) == ["id", "x", "y", "z"]
    assert frame.count().tolist() == [3, 1, 1, 1]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", ["json", "json.gz"])
@pytest.mark.parametrize("is_array", [True, False])
def test_json_of_other_forms_can_be_converted(tmp_path: Path, indent: int | None, suffix: str, is_array: bool) -> None:
    rows = [{"id": 2**64 + number, "t": "[{"} for number in range(2)] if is_array else {"id": 1, "t": {"x": "}"}}
    text = json.dumps(rows, indent=indent).encode()
    path = tmp_path / f"it's a.{suffix}"
    path.write_bytes(gzip.compress(text, mtime=0) if suffix.endswith("gz") else text)
    if not is_array and not indent:
        assert values(path, "id") == [1]
        return
    with pytest.raises(DataReadError, match=r"line 1 of .*it's a\.json.* convert it: ") as caught:
        read_table(path)
    command = str(caught.value).split("convert it: ")[1].replace("| python ", f"| {sys.executable} ")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert values(tmp_path / "rows.jsonl", "t") == ([row["t"] for row in rows] if is_array else [rows["t"]])


@pytest.mark.parametrize("line", ["null", "5", '"text"', "[1]", "{'id': 1}", '{"id": NaN', '{"id": 01}'])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_lines_that_are_no_objects_are_named(tmp_path: Path, line: str, position: int, first_line_only: None) -> None:
    lines = ['{"id": 7}', '{"id": 8}']
    lines.insert(position, line)
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataReadError, match=rf"line {position + 1} of .*bad\.jsonl"):
        read_table(tmp_path).compute()


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        ("1 9223372036854775807 -9223372036854775808", "int64"),
        ("1 9223372036854775808 18446744073709551615", "uint64"),
        ("-1 9223372036854775808", "text"),
        ("1 18446744073709551616", "text"),
        ("1 " + "9" * 5000, "text"),
        ("1 0.5 9007199254740992", "float64"),
        ("1 0.5 9007199254740993", "text"),
        ("1.5 0.30000000000000004 -0.0 5e-324 1.7976931348623157e308", "float64"),
        # Float64 is what these are, to the last of their digits.
        ("0.1000000000000000055511 0.50000000000000000000 100000000000000000000.0 0e400", "float64"),
        ("0.5 0.1000000000000000055512", "text"),
        ("0.5 1.000000000000000001", "text"),
        ("0.5 1E+400", "text"),
        ("0.5 1e-400", "text"),
        ("0.5 1e9999999999999999999999", "text"),
    ],
)
@pytest.mark.parametrize("nest", [lambda item: item, lambda item: [item], lambda item: {"x": [{"y": item}]}])
def test_numbers_come_out_as_they_went_in(tmp_path: Path, numbers: str, dtype: str, nest: Callable[[Any], Any]) -> None:
    written = numbers.split()
    kind = {"int64": int, "uint64": int, "float64": float, "text": str}[dtype]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"n": nest("#")}).replace('"#"', number) for number in written)
    )
    assert repr(values(tmp_path, "n", partition_size="40B")) == repr([nest(kind(number)) for number in written])


def test_text_is_what_its_escapes_stand_for(tmp_path: Path) -> None:
    line = r'{"id": 1, "t": "\ud83d\ude00 \u0000 \/ \" \\ \n", "\u006e\/": {"\ud83d\ude00": "é"}}'
    (tmp_path / "a.jsonl").write_text(line + "\n")
    assert values(tmp_path, "t") == ['😀 \0 / " \\ \n']
    assert values(tmp_path, "n/") == [{"😀": "é"}]


def test_literals_of_python_are_floats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "x": NaN}\n{"id": 2, "x": -Infinity}\n{"id": 3, "x": 0.5}')
    for size in ("1MiB", "20B"):
        found = read_table(tmp_path, partition_size=size)["x"].compute().astype(float)
        assert found.tolist()[1:] == [-np.inf, 0.5]
        assert np.isnan(found.iloc[0])


@pytest.mark.parametrize(
    ("later", "why"),
    [
        ('"n": 9223372036854775808', r"'n' is int64 .* but 9223372036854775808 in line 31 .*int64 does not give"),
        ('"n": 1.5', "'n' is int64 .* but 1.5 in line 31"),
        ('"n": "5"', "'n' is int64 .* but '5' in line 31 .*text is no int64"),
        ('"n": true', "'n' is int64 .* but True in line 31 .*true or false is no int64"),
        ('"x": 0.1234567890123456789', "'x' is double .* but 0.1234567890123456789 in line 31"),
        ('"x": 9007199254740993', "'x' is double .* but 9007199254740993 in line 31"),
        ('"x": 1e999', "'x' is double .* but 1e999 in line 31"),
        (r'"\u0078": 0.1234567890123456789', "'x' is double"),
        (r'"gr\u00F6\/e": [0, 0.1234567890123456789]', "'grö/e' is list"),
        ('"grö/e": [0.1234567890123456789]', "'grö/e' is list"),
        ('"h": "5"', "'h' is large_string .*text is no number"),
        ('"t": 5', "'t' is string .* but 5 in line 31 .*string does not give 5 back"),
        ('"t": "\xff"', r"'t' is not UTF-8 in line 31 .*invalid start byte\. .*cat .*b\.jsonl \| iconv"),
        (r'"t": "\ud800"', "'t' is string .*surrogates not allowed"),
        ('"m": {"a": 1, "b": 2}', r"'m' is struct<a: int64> .* but .* in line 31 .*'b' is a new key"),
        ('"m": [1]', "'m' is struct<a: int64> .*a list is no struct"),
        ('"new": 1', r"'new' of line 31 of .*b\.jsonl is new"),
    ],
)
@pytest.mark.parametrize("keyed", [0, 200])
def test_what_the_types_do_not_hold_is_an_error_that_says_where(
    tmp_path: Path, later: str, why: str, keyed: int, first_line_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = '{"id": 1, "n": 1, "x": 0.5, "grö/e": [0.5], "h": 18446744073709551616, "t": "a", "m": {"a": 1}}\n'
    (tmp_path / "a.jsonl").write_text(first)
    line = f'{{"id": 2, {later}}}\n'.encode().replace("\xff".encode(), b"\xff")
    (tmp_path / "b.jsonl").write_bytes(first.encode() * 30 + line)
    # However many columns there are.
    monkeypatch.setattr(jsonlines, "KEYED", keyed)
    frame = read_table(tmp_path)
    with pytest.raises(DataReadError, match=f"Column {why}.*[,;] or name the columns to read") as caught:
        frame.compute()
    assert f"{tmp_path}/b.jsonl" in str(caught.value)
    # What nobody needs is no reason to fail.
    assert frame["id"].compute().tolist() == [1] * 31 + [2]


@pytest.mark.parametrize(
    "later",
    [
        '"x": 1',
        '"x": 1e2',
        '"x": null',
        '"new": null',
        '"m": {"a": 2, "b": null}',
        '"m": {}',
        '"h": 5',
        '"h": 0.50',
        '"x": NaN',
        '"n": 3, "n": 4',
    ],
)
def test_what_the_types_hold_is_read(tmp_path: Path, later: str, first_line_only: None) -> None:
    first = '{"id": 1, "n": 1, "x": 0.5, "h": 18446744073709551616, "t": "a", "m": {"a": 1}}\n'
    (tmp_path / "a.jsonl").write_text(first * 30 + f'{{"id": 2, {later}}}\n')
    row = json.loads(f"{{{later}}}", parse_float=str if '"h"' in later else float)
    for name in ("n", "x", "h", "m"):
        expected = row.get(name)
        expected = {"a": expected.get("a")} if name == "m" and expected is not None else expected
        found = values(tmp_path, name)[30]
        assert found == (str(expected) if name == "h" and expected is not None else expected) or expected != expected


@pytest.mark.parametrize("compressed", [False, True])
def test_what_only_later_files_hold_is_known(tmp_path: Path, compressed: bool) -> None:
    rows = [
        {"id": 1, "n": 1, "m": {"a": 1}, "z": None},
        {"id": 2, "n": 0.5, "m": {"b": [2**63]}, "z": None},
        {"id": 3, "new": True, "m": None, "z": 3},
    ]
    for number, row in enumerate(rows):
        write_json(tmp_path / f"{number}.jsonl{'.gz' if compressed else ''}", [row], compress=compressed)
    assert values(tmp_path, "n") == [1, 0.5, None]
    assert values(tmp_path, "m") == [{"a": 1, "b": None}, {"a": None, "b": [2**63]}, None]
    assert values(tmp_path, "z") == [None, None, 3]
    assert values(tmp_path, "new") == [None, None, True]


def test_what_later_lines_of_a_large_file_hold_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonlines, "INFERRED_BYTES", 100)
    write_json(
        tmp_path / "a.jsonl", [{"id": number, "t": "a" * 100} for number in range(50)] + [{"id": 50, "x": 0.5}] * 9
    )
    assert values(tmp_path, "x", partition_size="500B")[-9:] == [0.5] * 9


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        ('"a"', "1", r"'id' is 'a' in line 1 of .*a\.jsonl but 1 in line 2 of .*b\.jsonl: a number and text"),
        (
            "1",
            "true",
            r"'id' is 1 in line 1 of .*a\.jsonl but True in line 2 of .*b\.jsonl: a number and true or false",
        ),
        (
            '{"x": [1]}',
            '{"x": ["b"]}',
            r"'id' is \{'x': \[1\]\} in line 1 of .*a\.jsonl but .* in line 2 of .*b\.jsonl",
        ),
        ("1", '[1, "b"]', r"'id' is \[1, 'b'\] in line 2 of .*b\.jsonl: a number and text"),
        ("null", '[1, "b"]', r"'id' is \[1, 'b'\] in line 2 of .*b\.jsonl: a number and text"),
    ],
)
def test_what_disagrees_is_named_with_both_files(tmp_path: Path, one: str, other: str, why: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"id": {one}, "t": "a"}}\n')
    (tmp_path / "b.jsonl").write_text(f'{{"id": null, "t": "b"}}\n{{"id": {other}, "t": "c"}}\n')
    with pytest.raises(DataReadError, match=f"Column {why}.*Write the column with one type in all files"):
        read_table(tmp_path)
    assert values(tmp_path, "t", columns=["t"]) == ["a", "b", "c"]


@pytest.mark.parametrize("other", ['"\xff"', r'"\ud800"', "[" * 300 + "]" * 300, "1e999", '{"a": 1, "a": 2}', "NaN"])
def test_what_is_not_wanted_may_be_anything(tmp_path: Path, other: str) -> None:
    line = b'{"id": 1, "m": {"a": 0.5}, "other": %s}\n' % other.encode().replace("\xff".encode(), b"\xff")
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 0, "other": "text"}\n' + line)
    assert values(tmp_path, "m", columns=["m"]) == [None, {"a": 0.5}]
    assert values(tmp_path, "id", columns=["id"]) == [0, 1]


@pytest.mark.parametrize("key", ["\xff", r"\ud800"])
@pytest.mark.parametrize("line", ['{"id": 0, "%s": 1}', '{"id": 0, "m": {"%s": 1}}'])
def test_keys_that_are_no_text_are_named(tmp_path: Path, key: str, line: str, first_line_only: None) -> None:
    bad = (line % key).encode().replace("\xff".encode(), b"\xff") + b"\n"
    good = b'{"id": 0, "m": {"a": 1}}\n'
    for text in (bad, good * 30 + bad):
        (tmp_path / "bad.jsonl").write_bytes(text)
        with pytest.raises(DataReadError, match=r"line \d+ of .*bad\.jsonl"):
            read_table(tmp_path).compute()
        assert set(values(tmp_path, "id", columns=["id"])) == {0}


def test_nesting_too_deep_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"id": {"[" * 900}{"]" * 900}}}\n')
    (tmp_path / "b.jsonl").write_text(f'{{"id": {"[" * 99999}{"]" * 99999}}}\n')
    for name in "ab":
        with pytest.raises(DataReadError, match=rf"{name}\.jsonl.*(recursion|Stack overflow|members of members)"):
            read_table(tmp_path / f"{name}.jsonl")


# --- Numbers of rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
def test_rows_are_numbered_in_their_files(tmp_path: Path, size: int) -> None:
    fs = fsspec.filesystem("file")
    files = {}
    for name, count in (("a.jsonl", 9), ("b.jsonl.gz", 4), ("c.jsonl", 6)):
        lines = [json.dumps({"id": number}) + "\n\n" * (number % 3) for number in range(count)]
        text = "\n".join(lines).encode()
        (tmp_path / name).write_bytes(gzip.compress(text, mtime=0) if name.endswith(".gz") else text)
        files[f"{tmp_path}/{name}"] = {"size": (tmp_path / name).stat().st_size}
    keys, made = keys_below([str(tmp_path)], files), {"make_ids": "row", "root": str(tmp_path)}
    reader, blocks = read_json(fs, files, None, keys, "id", "embeddings", size, **made)
    assert [block.first_row for block in blocks] == rows_before(fs, blocks)
    frames = [reader.read(block, ["row", "id"]) for block in blocks]
    assert sum(map(len, frames)) == 19
    for block, frame in zip(blocks, frames, strict=True):
        name = block.path.rpartition("/")[2]
        assert frame["row"].tolist() == [f"{name}:{number}" for number in frame["id"]]
    assert all(block.start < after.start for block, after in pairwise(blocks) if block.path == after.path)


def test_lines_of_several_objects_are_not_numbered(tmp_path: Path, first_line_only: None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}{"id": 3}\n')
    files = {str(path): {"size": 31}}
    reader, _ = read_json(fsspec.filesystem("file"), files, None, keys_below([], files), "id", "embeddings", 100)
    with pytest.raises(DataReadError, match=r"a\.jsonl has 2 lines of 3 objects"):
        reader.read(Block(str(path)), ["id"])


# --- Any lines -------------------------------------------------------------------------------------------------------

KEYS = st.text(max_size=3) | st.sampled_from(["a", "b", 'é/\\"', "\n😀"])
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False).map(str).filter(lambda text: "E" not in text)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


class Raw(str):
    """A number as it is written."""


LEAVES = [
    st.integers().map(repr),
    st.integers(-(2**64), 2**65).map(repr),
    st.integers(2**63 - 2, 2**64 + 1).map(repr),
    st.one_of(FLOATS, st.integers(-(2**54), 2**54)).map(repr),
    st.one_of(FLOATS.map(repr), DECIMALS),
    st.tuples(st.text(), st.booleans()).map(lambda pair: json.dumps(pair[0], ensure_ascii=pair[1])),
    st.booleans().map(json.dumps),
]


def _optional(texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.just("null") | texts


def _lists(texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(_optional(texts), max_size=4).map(lambda parts: f"[{', '.join(parts)}]")


@st.composite
def _objects(draw: st.DrawFn, members: dict[str, st.SearchStrategy[str]]) -> str:
    """An object of some of the members, with keys escaped or not."""
    names = draw(st.lists(st.sampled_from(sorted(members)), unique=True)) if members else []
    ascii_ = draw(st.booleans())
    parts = [
        f"{json.dumps(name, ensure_ascii=ascii_)}:{draw(st.sampled_from(['', ' ']))}{draw(members[name])}"
        for name in names
    ]
    return f"{{{', '.join(parts)}}}"


def _kinds() -> st.SearchStrategy[st.SearchStrategy[str]]:
    """Strategies, each of which draws JSON of one type."""
    return st.recursive(
        st.sampled_from(LEAVES).map(_optional),
        lambda kinds: kinds.map(_lists) | st.dictionaries(KEYS, kinds, max_size=3).map(_objects),
        max_leaves=6,
    )


@st.composite
def _files(draw: st.DrawFn) -> list[list[str]]:
    members = draw(st.dictionaries(KEYS, _kinds(), min_size=1, max_size=4))
    return draw(st.lists(st.lists(_objects(members), max_size=8), min_size=1, max_size=3))


def _is_same(found: Any, wanted: Any) -> bool:
    """Whether what was read is what was written; what is missing is null, and floats are equal to the last bit."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return all(_is_same(found.get(name), wanted.get(name)) for name in found | wanted)
    if isinstance(wanted, list) and isinstance(found, list):
        return len(found) == len(wanted) and all(map(_is_same, found, wanted))
    if isinstance(wanted, Raw) and type(found) in (int, float):
        number = json.loads(wanted)
        return found == number and repr(type(found)(number)) == repr(found)
    return bool(found == wanted)


def _check(files: list[list[str]], size: int, choose: Any) -> None:
    """All files are read as Python reads them, whichever of the columns are wanted, and however."""
    rows = [json.loads(line, parse_int=Raw, parse_float=Raw) for lines in files for line in lines]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with tempfile.TemporaryDirectory() as folder, dask.config.set(scheduler="sync"):
        for number, lines in enumerate(files):
            Path(f"{folder}/{number}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        if not rows:
            with pytest.raises(DataReadError, match="No rows"):
                read_table(folder)
            return
        chosen = choose(names)
        for frame in (read_table(folder, partition_size=size), read_table(folder, chosen, partition_size=size)):
            for computed in (frame.compute(), frame[chosen].compute()):
                assert len(computed) == len(rows)
                for name in computed.columns:
                    found = pa.array(computed[name], from_pandas=True).to_pylist()
                    assert all(_is_same(value, row.get(name)) for value, row in zip(found, rows, strict=True)), name


@settings(max_examples=30)
@given(_files(), st.sampled_from([10, 30, 1000]), st.data())
def test_any_objects_are_read_as_python_reads_them(files: list[list[str]], size: int, data: st.DataObject) -> None:
    _check(files, size, lambda names: data.draw(st.lists(st.sampled_from(names), unique=True)) if names else [])


@settings(max_examples=30)
@given(_files(), st.sampled_from([10, 30, 1000]), st.data())
def test_any_objects_beyond_the_sample_are_read_or_named(
    files: list[list[str]], size: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("INFERRED_BYTES", "PIECE_BYTES", "SPREAD_BYTES", "REQUEST_BYTES"):
            patch.setattr(jsonlines, name, 1)
        # Either is right; a wrong value fails.
        with contextlib.suppress(DataReadError, MissingColumnsError):
            _check(files, size, lambda names: data.draw(st.lists(st.sampled_from(names), unique=True)) if names else [])
