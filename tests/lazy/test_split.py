"""Partitions that are cut into parts of few rows."""

from __future__ import annotations

from pathlib import Path

import dask.dataframe as dd
import pandas as pd
import pytest

import dask_semdedup
from dask_semdedup.lazy.split import split_rows

LENGTHS = [5, 0, 3, 1]


@pytest.fixture
def ddf(tmp_path: Path) -> dd.DataFrame:
    start = 0
    for number, length in enumerate(LENGTHS):
        rows = range(start, start := start + length)
        frame = pd.DataFrame({"id": rows, "text": [f"text {row}" for row in rows]}).astype({"text": "string"})
        frame.to_parquet(tmp_path / f"{number}.parquet")
    return dask_semdedup.read_table(tmp_path, partition_size=1)


@pytest.mark.parametrize(("rows", "parts"), [(1, [1] * 5 + [0] + [1] * 4), (2, [2, 2, 1, 0, 2, 1, 1]), (5, LENGTHS)])
def test_parts_have_the_same_rows_in_the_same_order(ddf: dd.DataFrame, rows: int, parts: list[int]) -> None:
    assert ddf.map_partitions(len).compute().tolist() == LENGTHS
    split = split_rows(ddf, LENGTHS, rows)
    assert split.map_partitions(len).compute().tolist() == parts
    pd.testing.assert_frame_equal(split.compute(), ddf.compute())
    assert split_rows(ddf, LENGTHS, rows)._name == split._name


def test_only_the_partitions_of_chosen_parts_are_read_and_each_once() -> None:
    read = []

    def rows_from(start: int) -> pd.DataFrame:
        read.append(start)
        return pd.DataFrame({"id": range(start, start + 4)})

    ddf = dd.from_map(rows_from, [0, 10, 20, 30], meta=pd.DataFrame({"id": pd.Series(dtype="int64")}))
    split = split_rows(ddf, [4] * 4, 2).partitions[[2, 3, 7]]
    assert split["id"].compute(scheduler="threads").tolist() == [10, 11, 12, 13, 32, 33]
    assert sorted(read) == [10, 30]


def test_columns_that_nobody_wants_are_not_read(ddf: dd.DataFrame) -> None:
    split = split_rows(ddf, LENGTHS, 2)
    assert list(split["id"].compute()) == list(range(9))
    reads = list(split["id"].expr.optimize(fuse=False).find_operations(type(ddf.expr)))
    assert [list(read.columns) for read in reads] == [["id"]]
