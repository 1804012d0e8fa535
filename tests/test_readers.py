"""What is written opens in other programs: pandas, Arrow, Dask, Polars, DuckDB and Hugging Face Datasets.

The last three come with the extra ``readers``. A reader that is not installed is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import dask_semdedup
from dask_semdedup.cli import main

ROWS, COPIES = 60, 10


def in_pandas(folder: Path) -> dict[str, list[Any]]:
    return pd.read_parquet(folder).to_dict("list")


def in_arrow(folder: Path) -> dict[str, list[Any]]:
    return pq.read_table(folder).to_pydict()


def in_dask(folder: Path) -> dict[str, list[Any]]:
    return dd.read_parquet(folder).compute().to_dict("list")


def files_in_dask(folder: Path) -> dict[str, list[Any]]:
    return dd.read_parquet(folder / "*.parquet").compute().to_dict("list")


def in_polars(folder: Path) -> dict[str, list[Any]]:
    return pytest.importorskip("polars").read_parquet(folder).to_dict(as_series=False)


def files_in_polars(folder: Path) -> dict[str, list[Any]]:
    return in_polars(folder / "*.parquet")


def in_duckdb(folder: Path, pattern: str = "**") -> dict[str, list[Any]]:
    found = pytest.importorskip("duckdb").sql(f"select * from read_parquet('{folder}/{pattern}')")
    return dict(zip(found.columns, map(list, zip(*found.fetchall(), strict=True)), strict=True))


def files_in_duckdb(folder: Path) -> dict[str, list[Any]]:
    return in_duckdb(folder, "*.parquet")


def in_datasets(folder: Path, **source: str) -> dict[str, list[Any]]:
    load_dataset = pytest.importorskip("datasets").load_dataset
    source = source or {"data_dir": str(folder)}
    return load_dataset("parquet", **source, split="train", cache_dir=f"{folder}.cache")[:]


def files_in_datasets(folder: Path) -> dict[str, list[Any]]:
    return in_datasets(folder, data_files=f"{folder}/*.parquet")


READERS = [in_pandas, in_arrow, in_dask, in_polars, in_duckdb, in_datasets]
READERS += [files_in_dask, files_in_polars, files_in_duckdb, files_in_datasets]


def rows() -> pd.DataFrame:
    """Random rows of which the last ten are copies of the first ten."""
    vectors = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
    vectors[-COPIES:] = vectors[:COPIES]
    texts = [f"text {number}" for number in range(ROWS)]
    return pd.DataFrame({"id": range(ROWS), "text": texts, "embeddings": list(vectors)})


@pytest.fixture(params=["accessor", "command"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of the kept rows, of which the first file has none: the preferred copies are in the second."""
    source = tmp_path / "source"
    source.mkdir()
    rows()[:COPIES].to_parquet(source / "0.parquet")
    rows()[COPIES:].to_parquet(source / "1.parquet")
    if request.param == "command":
        result = CliRunner().invoke(main, ["run", str(source), str(tmp_path / "out"), "--partition-size", "1kB"])
        assert result.exit_code == 0, result.stderr
        return tmp_path / "out" / "deduplicated"
    ddf = dask_semdedup.read_table(source, partition_size="1kB")
    ddf.semdedup.deduplicate().semdedup.to_parquet(tmp_path / "kept")
    return tmp_path / "kept"


@pytest.mark.parametrize("read", READERS)
def test_kept_rows_open_in(kept: Path, read: Callable[[Path], dict[str, list[Any]]]) -> None:
    counts = [pq.read_metadata(path).num_rows for path in sorted(kept.glob("part.*.parquet"))]
    assert min(counts) == 0 < max(counts)
    found = read(kept)
    assert list(found) == ["id", "text", "embeddings"]
    assert len(found["id"]) == ROWS - COPIES
    assert found["text"] == [f"text {number}" for number in found["id"]]
    assert np.array(list(found["embeddings"])).shape == (ROWS - COPIES, 8)


@pytest.fixture(params=["run", "pairwise"])
def scores(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of the scores of duplicates."""
    rows().assign(centroid=0, cosine_dist_to_cent=0.5).to_parquet(tmp_path / "source.parquet")
    arguments = [request.param, str(tmp_path / "source.parquet"), str(tmp_path / "out"), "--eps", "0.01"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    return tmp_path / "out" / "scores" if request.param == "run" else tmp_path / "out"


@pytest.mark.parametrize("read", READERS)
def test_scores_open_in(scores: Path, read: Callable[[Path], dict[str, list[Any]]]) -> None:
    """The note of how many rows were compared holds none of them."""
    found = read(scores)
    assert set(found) >= {"id", "max_id", "cosine_sim_score"}
    assert len(found["id"]) == COPIES
