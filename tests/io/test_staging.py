"""An output folder appears whole under its name, or not at all, and what is finished of it is used again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dask_semdedup import read_table
from dask_semdedup.errors import DataReadError, EmbeddingError, OutputError, OutputExistsError
from dask_semdedup.io.listing import UNFINISHED
from dask_semdedup.io.staging import differences, restore, staged_folder
from dask_semdedup.io.targets import MANIFESTS, Contents
from dask_semdedup.io.write import finished_parts, write_part
from tests.data import ObjectStore

ANYTHING = Contents("anything", lambda fs, folder, names: [])
NEW = Contents("new files", lambda fs, folder, names: [name for name in names if not name.startswith("new")])
LOCAL = fsspec.filesystem("file")
WORK = {"files": "1", "--eps": 0.1}


def write(fs: fsspec.AbstractFileSystem, folder: str, *names: str) -> None:
    for name in names:
        fs.makedirs(os.path.dirname(path := f"{folder.partition('://')[2]}/{name}"), exist_ok=True)
        fs.pipe_file(path, name.encode())


def staged(output: object, *, overwrite: bool = False, **options: Any) -> Any:
    contents = options.pop("contents", ANYTHING)
    return staged_folder(str(output), contents=contents, overwrite=overwrite, storage_options=None, **options)


def make(output: object, *files: str, then: Callable[[], object] = lambda: None, **options: Any) -> None:
    """Write files to an output, and do something else before they take its place."""
    with staged(output, **options) as folder:
        write(fsspec.url_to_fs(folder)[0], folder, *files)
        then()


def fail(error: BaseException) -> None:
    raise error


def left_by(output: Path) -> Path:
    """The folder with what a run has written that did not come to its end."""
    (folder,) = (path for path in Path(f"{output}.partial").iterdir() if path.is_dir())
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- The new takes the place of the old -------------------------------------------------------------------------------


def test_the_old_folder_gives_way_to_the_new(tmp_path: Path) -> None:
    write(LOCAL, f"file://{tmp_path}/out", "old")
    with staged(tmp_path / "out", overwrite=True) as folder:
        write(LOCAL, folder, "a/new")
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


def test_what_a_link_stands_for_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with staged(tmp_path / "out") as folder:
        write(LOCAL, folder, "new")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk") == ["new"]


@pytest.mark.parametrize(("before", "overwrite"), [([], False), ([], True), (["new-1"], True)])
def test_what_came_meanwhile_is_never_replaced(tmp_path: Path, before: list[str], overwrite: bool) -> None:
    out, url = tmp_path / "out", f"file://{tmp_path}/out"
    out.mkdir()
    write(LOCAL, url, *before)
    with pytest.raises(
        OutputError, match=r"All is written, but cannot take the place of '.*out' \(.*move it"
    ) as refused:
        make(out, "new", then=lambda: write(LOCAL, url, "notes.txt"), overwrite=overwrite)
    assert names(out) == sorted(["notes.txt", *before])
    assert str(left_by(out)) in str(refused.value)
    # It is not taken for what may be removed.
    with pytest.raises(OutputExistsError, match=r"notes.txt|not empty"):
        make(out, contents=NEW)
    assert names(left_by(out)) == ["new"]


def test_what_changed_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(LOCAL, f"file://{out}", "old")
    with pytest.raises(OutputError, match=r"it has changed since the run began, and stays as it is: old"):
        make(out, "new", then=lambda: (out / "old").write_text("more than before"), overwrite=True)
    assert (out / "old").read_text() == "more than before"


def test_the_old_folder_stays_where_the_new_one_cannot_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(LOCAL, f"file://{tmp_path}/out", "old")
    rename = os.rename

    def busy(source: str, target: str) -> None:
        if source.endswith("/old") or not target.endswith("/out"):
            return rename(source, target)
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(OutputError, match="Device or resource busy"):
        make(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path / "out") == ["old"]


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))))
    monkeypatch.setattr(os, "rename", lambda one, other: [rename(one, other), done.append("renamed")])
    with staged(tmp_path / "out") as folder:
        write(LOCAL, folder, "a/new")
    token = os.path.basename(folder)
    assert set(done[: done.index("renamed")]) == {"new", "a", token}
    assert done[-1] == tmp_path.name


@pytest.mark.parametrize("moment", ["moved aside", "renamed"])
def test_a_kill_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The old folder is there again, or the new one is there and the old one gone; and the same work has its parts."""
    write(LOCAL, f"file://{tmp_path}/out", "new-old")

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch, suppress(Killed):
        rename = os.rename

        def killed(source: str, target: str) -> None:
            if moment == "renamed" or target.endswith("/old"):
                rename(source, target)
            if (moment == "moved aside") == target.endswith("/old"):
                # Nothing can be done any more, neither here nor in what leads here.
                patch.setattr(os, "rename", lambda *_: None)
                patch.setattr(LOCAL, "rm", lambda *_, **__: None)
                raise Killed

        patch.setattr(os, "rename", killed)
        with staged(tmp_path / "out", overwrite=True, work=WORK) as folder:
            write(LOCAL, folder, "new")
    if moment == "renamed":
        assert names(tmp_path / "out") == ["new"]
        with pytest.raises(OutputExistsError, match="not empty"):
            make(tmp_path / "out", work=WORK)
    else:
        assert not (tmp_path / "out").exists()

        def look() -> None:
            assert names(tmp_path / "out") == ["new-old"]
            assert LOCAL.exists(f"{folder}/new")

        with pytest.warns(UserWarning, match="killed while it replaced .*: the old files are there again"):
            make(tmp_path / "out", then=look, overwrite=True, work=WORK)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_old_files_stay_aside_where_others_have_their_name(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    write(LOCAL, f"file://{partial}", "work.json", "old/scores", "0123/new")
    write(LOCAL, f"file://{tmp_path}/out", "theirs")
    with pytest.raises(OutputExistsError, match=r"moved to '.*partial/old' by a run that was killed.*Move one of"):
        restore(LOCAL, f"{tmp_path}/out")
    assert names(partial / "old") == ["scores"]
    assert names(tmp_path / "out") == ["theirs"]


# --- What a stopped run has left --------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["", "work.json", "0123/"])
def test_nothing_stays_of_what_no_run_can_use(tmp_path: Path, left: str) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    if left.endswith("/"):
        (partial / left).mkdir()
    elif left:
        (partial / left).write_text("{}")
    restore(LOCAL, f"{tmp_path}/out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_the_same_work_goes_on(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        make(tmp_path / "out", "part.0.parquet", then=lambda: fail(error()), work=WORK)
    assert names(tmp_path) == ["out.partial"]
    left = left_by(tmp_path / "out")
    with staged(tmp_path / "out", work=WORK) as again:
        assert again == f"file://{left}"
        assert names(left) == ["part.0.parquet"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["part.0.parquet"]


@pytest.mark.parametrize("case", ["nothing is written", "other input is needed", "the work is not described"])
def test_nothing_is_left_that_no_run_can_use(tmp_path: Path, case: str) -> None:
    error = EmbeddingError if case == "other input is needed" else OSError
    work = None if case == "the work is not described" else WORK
    files = [] if case == "nothing is written" else ["part.0.parquet"]
    with pytest.raises(error):
        make(tmp_path / "out", *files, then=lambda: fail(error("bad")), work=work)
    assert not names(tmp_path)


def test_other_work_is_refused_or_begins_anew(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt):
        make(tmp_path / "out", "part.0.parquet", then=lambda: fail(KeyboardInterrupt()), work=WORK)
    left = left_by(tmp_path / "out")
    other = {"files": "2", "--eps": 0.2}
    message = r"finished for '.*out', but INPUT has other files, .*, --eps 0.1 → 0.2\. Repeat .* overwrite=True"
    with pytest.raises(OutputExistsError, match=message):
        make(tmp_path / "out", work=other)
    assert names(left) == ["part.0.parquet"]
    with staged(tmp_path / "out", work=other, anew=True) as anew:
        # Another name: writers of the run that was killed may still be at it.
        assert anew != f"file://{left}"
        assert not left.exists()
        write(LOCAL, anew, "new")
    assert names(tmp_path / "out") == ["new"]


def test_leftovers_that_no_run_can_use_are_removed(tmp_path: Path) -> None:
    write(LOCAL, f"file://{tmp_path}/out.partial", "0123/part.0.parquet", "0123.part.1.parquet.abc.tmp", "old/x")
    with staged(tmp_path / "out", work=WORK) as folder:
        assert not LOCAL.find(folder)
        write(LOCAL, folder, "new")
    assert names(tmp_path) == ["out"]


def test_differences_are_in_words() -> None:
    assert differences({"files": "1", "a": 1, "b": 2}, {"files": "2", "a": 1, "c": None}) == [
        "INPUT has other files, or its files have changed", "b 2 → None",
    ]  # fmt: skip
    (words,) = differences({"partitions": "a"}, {"partitions": "b"})
    assert words.startswith("partitions are planned otherwise")
    assert differences({"partitions": "a", "b": 2}, {"partitions": "b", "b": 3}) == ["b 2 → 3"]


def test_parts_are_found_with_their_rows(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    assert finished_parts(folder, {}) == {}
    for number in (0, 7):
        write_part(pd.DataFrame({"id": range(number)}), number, folder, {})
    assert finished_parts(folder, {}) == {0: 0, 7: 7}
    assert names(tmp_path / "out") == ["part.000000.parquet", "part.000007.parquet"]


def test_a_part_that_fails_leaves_nothing_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"Cannot write .*/out/part\.000003\.parquet: .*No space left"):
        write_part(pd.DataFrame({"id": [1]}), 3, str(tmp_path / "out"), {})
    assert names(tmp_path) == ["out"]
    assert not names(tmp_path / "out")


# --- Object storage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_object_stores_get_the_manifest_last(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, manifest: str
) -> None:
    copied: list[str] = []
    copy = MemoryFileSystem.cp_file
    monkeypatch.setattr(
        MemoryFileSystem, "cp_file", lambda fs, one, other: [copied.append(other), copy(fs, one, other)]
    )
    with staged("store://out") as folder:
        write(store, folder, manifest, "a/x", "z")
    assert sorted(copied[:-1]) == ["/out/a/x", "/out/z"]
    assert copied[-1] == f"/out/{manifest}"
    assert store.find("/") == sorted(["/out/a/x", "/out/z", f"/out/{manifest}"])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_half_a_copy_says_so_and_is_finished_by_the_same_work(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    frame = pd.DataFrame({"id": [1], "max_id": [1], "cosine_sim_score": [0.5]})
    for number in range(2):
        write_part(frame, number, "store://out", {})
    copy = MemoryFileSystem.cp_file

    def slow(fs: MemoryFileSystem, source: str, target: str) -> None:
        if target.endswith("2.parquet"):
            raise error("slow down")
        copy(fs, source, target)

    folders = []

    def run() -> None:
        with staged("store://out", overwrite=True, work=WORK) as folder:
            folders.append(folder)
            for number in (1, 2, 3):
                write_part(frame, number, folder, {})

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cp_file", slow)
        with pytest.raises(OutputError if error is OSError else error):
            run()
    # None of the old is gone before all of the new is there.
    assert store.exists("/out/part.000000.parquet")
    with pytest.raises(DataReadError, match=r"/out is not all there: what wrote it was stopped. Run the same command"):
        read_table("store://out")
    # It may be replaced without being asked, but for files of others.
    write(store, "store://out", "notes.txt")
    with pytest.raises(OutputExistsError, match=r"would be lost: notes.txt"):
        make("store://out", work=WORK)
    store.rm("/out/notes.txt")
    with staged("store://out", work=WORK) as again:
        assert [again] == folders
        assert len(store.find(again)) == 3
    assert store.find("/") == [f"/out/part.00000{number}.parquet" for number in (1, 2, 3)]
    assert len(read_table("store://out")) == 3


def test_what_came_meanwhile_stays_in_object_storage(store: ObjectStore) -> None:
    with pytest.raises(OutputError, match=r"it has changed .*: notes.txt"):
        make("store://out", "new", then=lambda: write(store, "store://out", "notes.txt"))
    assert store.find("/out") == ["/out/notes.txt"]
    assert not store.exists(f"/out/{UNFINISHED}")


def test_the_lock_of_an_object_store_names_the_process(store: ObjectStore) -> None:
    with staged("store://out") as folder:
        write(store, folder, "new")
        held = json.loads(store.cat_file("/out.partial/lock.json"))
        assert held["pid"] == os.getpid()
        with pytest.raises(OutputExistsError, match=rf"being written by process {os.getpid()} on .* since"):
            staged("store://out").__enter__()
    assert store.find("/") == ["/out/new"]
