"""What an output folder may not be, and what it may not overlap."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import fsspec
import pytest

from dask_semdedup.errors import InvalidArgumentError, OutputError, OutputExistsError
from dask_semdedup.io.staging import staged_folder
from dask_semdedup.io.targets import Contents, refuse_occupied, refuse_overlap

ANYTHING = Contents("anything", lambda fs, folder, names: [])
NOTHING = Contents("nothing", lambda fs, folder, names: list(names))
LOCAL = fsspec.filesystem("file")


@pytest.mark.parametrize("output", [".", "..", "/proc", "/"])
def test_what_cannot_be_replaced_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with (
        pytest.raises(OutputError, match="mount point or the current folder"),
        staged_folder(output, contents=ANYTHING, overwrite=True, storage_options=None),
    ):
        pytest.fail("it was begun")


@pytest.mark.parametrize(("count", "words"), [(1, "1 file"), (2, "2 files")])
def test_files_in_the_way_are_counted(tmp_path: Path, count: int, words: str) -> None:
    for number in range(count):
        (tmp_path / str(number)).touch()
    with pytest.raises(OutputExistsError, match=rf"is not empty: {words}\."):
        refuse_occupied(LOCAL, str(tmp_path), ANYTHING, overwrite=False)


def test_what_systems_leave_in_folders_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    refuse_occupied(LOCAL, str(tmp_path), NOTHING, overwrite=True)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputExistsError, match=r"would be lost: notes.txt\."):
        refuse_occupied(LOCAL, str(tmp_path), NOTHING, overwrite=True)


@pytest.mark.parametrize("source", ["{}", "file://{}/", "simplecache::file://{}", "{}/x", "{}/.."])
def test_overlap_is_seen_through_any_name(tmp_path: Path, source: str) -> None:
    with pytest.raises(InvalidArgumentError, match="overlap"):
        refuse_overlap(LOCAL, str(tmp_path), source.format(tmp_path), {})


@pytest.mark.parametrize(
    ("pattern", "overlaps"), [("*", True), ("**", True), ("o?t", True), ("*/*.parquet", True), ("*.parquet", False)]
)
def test_overlap_is_seen_through_patterns(tmp_path: Path, pattern: str, overlaps: bool) -> None:
    with pytest.raises(InvalidArgumentError, match="overlap") if overlaps else nullcontext():
        refuse_overlap(LOCAL, f"{tmp_path}/out", f"{tmp_path}/{pattern}", {})


@pytest.mark.parametrize("source", ["memory://{}", "{}2", "simplecache::memory://{}"])
def test_other_folders_do_not_overlap(tmp_path: Path, source: str) -> None:
    refuse_overlap(LOCAL, str(tmp_path), source.format(tmp_path), {})


def test_the_root_is_a_folder_too() -> None:
    with pytest.raises(InvalidArgumentError, match="overlap"):
        refuse_overlap(LOCAL, "/data", "/", {})
    with pytest.raises(InvalidArgumentError, match="overlap"):
        refuse_overlap(fsspec.filesystem("memory"), "/data", "memory://", {})
