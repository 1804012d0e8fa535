"""Results that tasks save for a run that resumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pytest

from dask_semdedup.errors import DataReadError, OutputError
from dask_semdedup.io.results import Results

ARRAYS = {"pairs": np.arange(6).reshape(3, 2), "left": np.array([0.5, -0.0], np.float32), "first": np.asarray(7)}


@pytest.fixture(params=["local", "memory"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Results]:
    if request.param == "local":
        yield Results(str(tmp_path / "results"))
        return
    folder = f"memory://{uuid4().hex}"
    yield Results(folder)
    fsspec.filesystem("memory").rm(folder, recursive=True)


def test_results_are_read_as_they_were_saved(results: Results) -> None:
    assert results.names() == frozenset()
    own = results.within("a")
    own.save("compare-3", ARRAYS)
    assert own.names() == {"compare-3"}
    found = own.load("compare-3")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_unfinished_and_damaged_files_are_no_results(results: Results) -> None:
    results.save("a", ARRAYS)
    fs, root = fsspec.url_to_fs(results.folder)
    whole = fs.cat_file(f"{root}/a.npz")
    fs.pipe_file(f"{root}/b.npz.123.tmp", whole[:10])
    assert results.names() == {"a"}
    for content in (b"", whole[:40], b"x" * 100):
        fs.pipe_file(f"{root}/a.npz", content)
        with pytest.raises(DataReadError, match=r"Cannot read .*a.npz, which a stopped run has left: .* Remove it"):
            results.load("a")


def test_objects_are_not_unpickled(results: Results) -> None:
    fs, root = fsspec.url_to_fs(results.folder)
    fs.makedirs(root, exist_ok=True)
    with fs.open(f"{root}/a.npz", "wb") as file:
        np.savez(file, pairs=np.array([object()]))
    with pytest.raises(DataReadError, match=r"a\.npz"):
        results.load("a")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").touch()
    with pytest.raises(OutputError, match=str(tmp_path / "results" / "a.npz")):
        Results(str(tmp_path / "results")).save("a", ARRAYS)
