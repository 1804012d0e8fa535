"""Rows of files, a few at a time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_semdedup import read_clusters
from dask_semdedup.errors import DataReadError
from dask_semdedup.io import fragments
from tests.data import arrow_lists


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A partition of files with row groups of several sizes, and without rows."""
    folder = tmp_path_factory.mktemp("in") / "centroid=3"
    folder.mkdir()
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "id": [f"document {number}" for number in range(44)],
            "embeddings": arrow_lists(rng.standard_normal((44, 3)).astype(np.float32)),
            "quality": pd.Categorical.from_codes(rng.integers(2, size=44), ["low", "high"], ordered=True),
            "number": pd.array(rng.integers(9, size=44), "Int64"),
        }
    )
    table, start = pa.Table.from_pandas(frame, preserve_index=False), 0
    for name, (rows, group) in {"a": (20, 7), "b": (0, 1), "c": (9, 20), "d": (15, 1)}.items():
        pq.write_table(table.slice(start, rows), folder / f"{name}.parquet", row_group_size=group)
        start += rows
    return read_clusters(folder.parent).expr.source


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 44), max_size=8, unique=True).map(sorted), step=st.integers(1, 50))
def test_slices_are_rows_of_the_partition(source: Any, cuts: list[int], step: int) -> None:
    reader, (partition,) = source.reader, source.partitions
    whole = reader.read(partition, reader.columns)
    slices = [slice(*ends) for ends in pairwise(cuts)][::2]
    found = list(reader.read_slices(partition, reader.columns, slices, step))
    assert all(0 < len(frame) <= step for frame in found)
    rows = [row for rows in slices for row in range(rows.start, rows.stop)]
    frames = [reader.meta(reader.columns), *found]
    pd.testing.assert_frame_equal(pd.concat(frames, ignore_index=True), whole.iloc[rows].reset_index(drop=True))


def test_row_groups_without_these_rows_are_not_read(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Noted(pq.ParquetFile):
        def iter_batches(self, step: int, groups: list[int], *arguments: Any, **options: Any) -> Any:
            read.extend(groups)
            return super().iter_batches(step, groups, *arguments, **options)

    monkeypatch.setattr(fragments.pq, "ParquetFile", Noted)
    frames = source.reader.read_slices(source.partitions[0], ["embeddings"], [slice(8, 10), slice(15, 30)], 100)
    assert sum(map(len, frames)) == 17
    assert read == [1, 2, 0, 0]


def test_a_file_that_has_changed_is_refused(source: Any, tmp_path: Path) -> None:
    folder = tmp_path / "centroid=0"
    folder.mkdir()
    table = pa.table({"id": range(9), "embeddings": [[1.0]] * 9})
    pq.write_table(table, folder / "a.parquet")
    changed = read_clusters(tmp_path).expr.source
    pq.write_table(table.slice(1), folder / "a.parquet")
    with pytest.raises(DataReadError, match="changed since"):
        list(changed.reader.read_slices(changed.partitions[0], ["embeddings"], [slice(0, 9)], 3))
    (folder / "a.parquet").unlink()
    with pytest.raises(DataReadError, match="Cannot read"):
        list(changed.reader.read_slices(changed.partitions[0], ["embeddings"], [slice(0, 9)], 3))
