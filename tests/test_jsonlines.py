"""JSON lines come out as they went in, whatever their types, files and partitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dask_semdedup import jsonlines
from dask_semdedup.errors import ClusterError, InvalidArgumentError
from dask_semdedup.tables import read_table
from tests.test_tables import ROWS, write_json


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("partition_size", ["1MiB", "300B", "7B"])
def test_json_lines_are_read_once_each(tmp_path: Path, name: str, partition_size: str) -> None:
    write_json(tmp_path / name, ROWS, compress=name.endswith(".gz"))
    frame = read_table(tmp_path, partition_size=partition_size).compute()
    assert frame["id"].tolist() == [row["id"] for row in ROWS]
    assert frame["text"].tolist() == [row["text"] for row in ROWS]
    assert frame["embeddings"].dtype == pd.ArrowDtype(pa.list_(pa.float32()))
    assert np.stack(frame["embeddings"].tolist()).tolist() == [row["embeddings"] for row in ROWS]


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
    with pytest.raises(ClusterError, match=r"bad\.jsonl"):
        read_table(tmp_path, partition_size="10B").compute()


def test_truncated_gzip_names_the_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "bad.jsonl.gz", ROWS, compress=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ClusterError, match=r"bad\.jsonl\.gz"):
        read_table(tmp_path)


def test_null_ids_are_counted(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": 1}, {"id": None}, {"id": None}])
    with pytest.raises(InvalidArgumentError, match=r"2 rows have no 'id' in .*a\.jsonl"):
        read_table(tmp_path).compute()


@pytest.mark.parametrize("checked_first", [False, True])
def test_the_column_that_may_not_be_null_is_part_of_the_frame(tmp_path: Path, checked_first: bool) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": 1, "doc": 7}, {"id": 2, "doc": None}])
    for id_field in ("doc", "id") if checked_first else ("id", "doc"):
        frame = read_table(tmp_path, id_field=id_field)
        if id_field == "id":
            assert len(frame.compute()) == 2
        else:
            with pytest.raises(InvalidArgumentError, match="1 row has no 'doc'"):
                frame.compute()


@pytest.mark.parametrize("ids", [[2**63 + 1, 2**63 + 2, -5], [2**65 + 1, 2**65 + 2]])
def test_ids_that_floats_cannot_tell_apart_are_refused(tmp_path: Path, ids: list[int]) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": id_} for id_ in ids])
    with pytest.raises(InvalidArgumentError, match=r"Column 'id' of .*a.jsonl: 2 ids have .*Write ids as text"):
        read_table(tmp_path)


def test_ids_may_be_floats(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": 0.5}, {"id": 1.5}])
    assert read_table(tmp_path)["id"].compute().tolist() == [0.5, 1.5]


def test_ids_that_are_not_wanted_may_be_anything(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", [{"id": 1e20, "text": "a"}])
    assert read_table(tmp_path, columns=["text"])["text"].compute().tolist() == ["a"]
