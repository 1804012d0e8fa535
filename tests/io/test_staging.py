"""An output folder appears whole under its name, or not at all, and nothing that was there is lost for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dask_semdedup.errors import InvalidArgumentError, OutputError, OutputExistsError
from dask_semdedup.io.staging import MANIFEST, Contents, refuse_overlap, replaced_when_done, staged_folder

ANYTHING = Contents("anything", lambda fs, folder, names: [])
LOCAL = fsspec.filesystem("file")


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def write(fs: fsspec.AbstractFileSystem, folder: str, *names: str) -> None:
    for name in names:
        fs.makedirs(os.path.dirname(path := f"{folder.partition('://')[2]}/{name}"), exist_ok=True)
        fs.pipe_file(path, name.encode())


def test_the_old_folder_gives_way_to_the_new(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with replaced_when_done(LOCAL, f"{tmp_path}/out") as staged:
        write(LOCAL, staged, "a/new")
        assert (tmp_path / "out" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_another_run_that_was_faster_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder is taken again between its removal and the renaming."""
    rename, taken = os.rename, f"{tmp_path}/out"

    def late(source: str, target: str) -> None:
        if target == taken:
            write(LOCAL, f"file://{taken}", "theirs")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with (
        pytest.raises(OutputError, match=r"All is written, but cannot .*It is in '.*out\.partial-"),
        replaced_when_done(LOCAL, taken) as staged,
    ):
        write(LOCAL, staged, "ours")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    (kept,) = tmp_path.glob("out.partial-*")
    assert [path.name for path in kept.iterdir()] == ["ours"]


def test_the_old_folder_stays_where_the_new_one_cannot_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(LOCAL, f"file://{tmp_path}/out", "old")
    rename = os.rename

    def busy(source: str, target: str) -> None:
        if source.endswith(".old") or not target.endswith("/out"):
            return rename(source, target)
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "rename", busy)
    with (
        pytest.raises(OutputError, match="Device or resource busy"),
        replaced_when_done(LOCAL, f"{tmp_path}/out") as staged,
    ):
        write(LOCAL, staged, "new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]


def test_what_a_link_stands_for_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with staged_folder(f"{tmp_path}/out", contents=ANYTHING, overwrite=False, storage_options=None) as staged:
        write(LOCAL, staged, "new")
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["new"]


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(LOCAL, f"file://{tmp_path}/out", "old")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with (
        pytest.warns(UserWarning, match=r"could not all be removed: it is in .*\.old"),
        replaced_when_done(LOCAL, f"{tmp_path}/out") as staged,
    ):
        write(LOCAL, staged, "new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


@pytest.mark.parametrize("output", [".", "..", "/proc"])
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
    write(LOCAL, f"file://{tmp_path}/out", *map(str, range(count)))
    with (
        pytest.raises(OutputExistsError, match=rf"is not empty: {words}\."),
        staged_folder(f"{tmp_path}/out", contents=ANYTHING, overwrite=False, storage_options=None),
    ):
        pytest.fail("it was begun")


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


def test_the_root_is_a_folder_too(memory: MemoryFileSystem) -> None:
    with pytest.raises(InvalidArgumentError, match="overlap"):
        refuse_overlap(LOCAL, "/data", "/", {})
    with pytest.raises(InvalidArgumentError, match="overlap"):
        refuse_overlap(memory, "/data", "memory://", {})


def test_object_stores_get_the_manifest_last(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    copy = MemoryFileSystem.cp_file
    monkeypatch.setattr(
        MemoryFileSystem, "cp_file", lambda fs, one, other: [copied.append(other), copy(fs, one, other)]
    )
    with replaced_when_done(memory, "/out") as staged:
        write(memory, staged, MANIFEST, "a/x", "z")
    assert sorted(copied[:-1]) == ["/out/a/x", "/out/z"]
    assert copied[-1] == f"/out/{MANIFEST}"
    assert memory.find("/") == sorted(["/out/a/x", "/out/z", f"/out/{MANIFEST}"])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_half_a_copy_does_not_stay(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    copy = MemoryFileSystem.cp_file

    def fail(fs: MemoryFileSystem, source: str, target: str) -> None:
        if target.endswith("/b"):
            raise error("slow down")
        copy(fs, source, target)

    monkeypatch.setattr(MemoryFileSystem, "cp_file", fail)
    with (
        pytest.raises(OutputError if error is OSError else error),
        replaced_when_done(memory, "/out") as staged,
    ):
        write(memory, staged, "a", "b", "c")
    assert not memory.exists("/out")
    assert [path.rsplit("/", 1)[-1] for path in memory.find("/")] == ["a", "b", "c"]
