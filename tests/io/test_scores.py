"""The record of what was compared, with clusters and without."""

from __future__ import annotations

import base64
import io
from datetime import date
from pathlib import Path

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_semdedup.errors import DataReadError
from dask_semdedup.io.notes import write_note
from dask_semdedup.io.scores import COMPARED, Compared, read_compared, write_compared


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file of scores."""
    pd.DataFrame({"id": [1], "max_id": [0], "cosine_sim_score": [1.0]}).to_parquet(tmp_path / "part.0.parquet")
    return tmp_path


@pytest.mark.parametrize("clusters", [[3, 12], ["a", "b/c"], [date(2024, 1, 1), date(2024, 2, 1)]])
def test_rows_of_clusters_are_read_back(folder: Path, clusters: list) -> None:
    rows = pd.Series([20, 7], index=clusters)
    write_compared(Compared(0.05, rows), str(folder))
    found = read_compared(str(folder))
    assert found is not None
    assert (found.eps, found.total) == (0.05, 27)
    pd.testing.assert_series_equal(found.clusters, rows, check_names=False, check_index_type=False)


@pytest.mark.parametrize("rows", [0, 7, 2**40])
def test_without_clusters_the_number_of_rows_is_read_back(folder: Path, rows: int) -> None:
    write_compared(Compared(0.1, rows), str(folder))
    found = read_compared(str(folder))
    assert found == Compared(0.1, rows)
    assert (found.total, found.clusters) == (rows, None)


def test_scores_of_all_rows_have_no_record(folder: Path) -> None:
    assert read_compared(str(folder)) is None


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"rows": [1]}),
        pa.table({"rows": [1, 2]}).replace_schema_metadata({"eps": "0.1"}),
        pa.table({"rows": [None]}).replace_schema_metadata({"eps": "0.1"}),
        pa.table({"rows": [1]}).replace_schema_metadata({"eps": "much"}),
        pa.table({"cluster": [1]}).replace_schema_metadata({"eps": "0.1"}),
    ],
    ids=["no eps", "two numbers", "no number", "no eps that is one", "no rows"],
)
def test_a_record_that_says_nothing_is_an_error(folder: Path, table: pa.Table) -> None:
    file = io.BytesIO()
    pq.write_table(table, file)
    write_note(fsspec.filesystem("file"), str(folder / COMPARED), base64.b64encode(file.getvalue()).decode())
    with pytest.raises(DataReadError, match="does not say which rows were compared"):
        read_compared(str(folder))
