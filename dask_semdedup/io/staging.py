"""Output folders that appear completely or not at all, and resume from where a stopped run has left them.

Until all of ``OUTPUT`` is written, ``OUTPUT.partial`` exists. It holds

- a lock, which names the process that works there and is void once that process is dead;
- a folder of the written files, which is renamed to ``OUTPUT`` once it is complete;
- a folder of results of tasks, from which such files are made: see `results_beside`;
- a description of the work, if these folders are worth keeping: the same work resumes with their files;
- the old files, while the new ones replace them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import fsspec

from dask_semdedup.errors import OutputError, OutputExistsError, SemDedupError
from dask_semdedup.io.locks import only_run
from dask_semdedup.io.publish import listing, publish, put_back, remove
from dask_semdedup.io.targets import Contents, real_path, refuse_occupied, refuse_overlap, refuse_place
from dask_semdedup.io.write import writing

__all__ = ["differences", "restore", "results_beside", "staged_folder"]

# Differences whose values would tell a reader nothing.
IN_WORDS = {
    "files": "INPUT has other files, or its files have changed",
    "partitions": "partitions are planned otherwise, for other cores, memory or GPUs, or by another version of Dask",
}

LOCK, WORK, OLD = "lock.json", "work.json", "old"


@contextmanager
def staged_folder(
    output_path: str,
    input_path: str | None = None,
    *,
    contents: Contents,
    overwrite: bool,
    storage_options: Mapping[str, Any] | None,
    work: Mapping[str, Any] | None = None,
    anew: bool | None = None,
) -> Iterator[str]:
    """Yield the URL of a folder that replaces ``output_path`` if the block succeeds.

    If the block fails, ``output_path`` stays the same. The written files are removed, unless the same work can resume
    with them: after an interrupt or a failure of the machine, but not after errors that only another input or other
    parameters would fix.

    Parameters
    ----------
    output_path : str
        The folder: a local path or an fsspec URL. If it is a link, its target is replaced.
    input_path : str, optional
        Path of the data that is read meanwhile. It must not overlap the output.
    contents : Contents
        The kind of files that are written.
    overwrite : bool
        Whether to replace a folder that holds only such files.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    work : mapping, optional
        Everything that the files depend on, as JSON, by the names used in messages. If it is the same, the folder holds
        the files that a stopped run has left. By default the folder is empty.
    anew : bool, optional
        Whether to remove the files of different work. Otherwise they are an error. By default as `overwrite`.

    Raises
    ------
    OutputExistsError
        If ``output_path`` is a file, or holds files that may not be replaced; if another run writes there, or a run of
        different work has left files.
    OutputError
        If ``output_path`` cannot be replaced. The written files stay.
    InvalidArgumentError
        If ``output_path`` and ``input_path`` overlap.
    """
    options = dict(storage_options or {})
    fs, final = fsspec.url_to_fs(output_path, **options)
    final = real_path(fs, final)
    refuse_place(fs, final)
    if input_path is not None:
        refuse_overlap(fs, final, input_path, options)
    partial = _partial(final)
    with _partial_folder(fs, final):
        restore(fs, final)
        seen = listing(fs, final)
        refuse_occupied(fs, final, contents, overwrite=overwrite)
        folder = _begin(fs, final, work, anew=overwrite if anew is None else anew)
        try:
            # A URL of an absolute path: workers may have other working directories.
            yield fs.unstrip_protocol(folder)
        except BaseException as error:
            if work is None or not _is_passing(error) or not _are_kept(fs, partial):
                _clear(fs, partial)
            raise
        try:
            if work is None:
                # From here on the folder is worth to be kept.
                _write_work(fs, partial, {"written": folder})
            publish(fs, folder, final, f"{partial}/{OLD}", seen)
        except Exception as error:
            raise OutputError(
                f"All is written, but cannot take the place of {final!r} ({error}). It is in {folder!r}: move it "
                "yourself."
            ) from error
        _clear(fs, partial)


def restore(fs: fsspec.AbstractFileSystem, final: str) -> None:
    """Restore what a killed run had moved aside, and remove what no run can reuse.

    The lock of `final`, or of the folder that it is in, must be held.
    """
    partial = _partial(final)
    if fs.exists(f"{partial}/{WORK}") and _are_kept(fs, partial):
        put_back(fs, final, f"{partial}/{OLD}")
    else:
        # The new files have their name, or were never to be kept.
        _clear(fs, partial)


def results_beside(folder: str) -> str:
    """Return the folder for results of tasks beside a folder of `staged_folder`. The two are kept and removed alike."""
    return f"{folder}.results"


def _are_kept(fs: fsspec.AbstractFileSystem, partial: str) -> bool:
    """Return whether there are files that a run of the same work can use."""
    fs.invalidate_cache()
    names = (path.removeprefix(f"{partial}/") for path in fs.find(partial))
    return any("/" in name and not name.startswith(f"{OLD}/") for name in names)


def _partial(final: str) -> str:
    return f"{final.rstrip('/')}.partial"


@contextmanager
def _partial_folder(fs: fsspec.AbstractFileSystem, final: str) -> Iterator[None]:
    """Hold the lock, and remove its folder if nothing else is left in it."""
    partial = _partial(final)
    try:
        with only_run(fs, f"{partial}/{LOCK}", final):
            yield
    finally:
        _remove_empty(fs, partial)


def _begin(fs: fsspec.AbstractFileSystem, final: str, work: Mapping[str, Any] | None, *, anew: bool) -> str:
    """Return the folder to write to, after removing that of different work. It exists only if it holds a file."""
    partial = _partial(final)
    # Writers of a run that was killed may still be at it: those of other work have another folder.
    token = secrets.token_hex(8) if work is None else hashlib.sha256(_encoded(work)).hexdigest()[:16]
    try:
        before = json.loads(fs.cat_file(f"{partial}/{WORK}"))
    except FileNotFoundError:
        before = None
    except ValueError:
        before = {}
    if before is not None and before != (work and json.loads(_encoded(work))):
        if not anew:
            differ = ", ".join(differences(before, work)) if work else "of other work"
            raise OutputExistsError(
                f"{partial!r} holds files that a stopped run has finished for {final!r}, but {differ}. Repeat the "
                "command of that run to go on, pass overwrite=True to begin anew, or name another folder.",
                parameters=["overwrite"],
            )
        _clear(fs, partial)
    if work is not None:
        _write_work(fs, partial, work)
    return f"{partial}/{token}"


def _encoded(work: Mapping[str, Any]) -> bytes:
    return json.dumps(work, indent=2).encode()


def _write_work(fs: fsspec.AbstractFileSystem, partial: str, work: Mapping[str, Any]) -> None:
    with writing(path := f"{partial}/{WORK}"):
        fs.pipe_file(path, _encoded(work))


def _clear(fs: fsspec.AbstractFileSystem, partial: str) -> None:
    """Remove everything except the lock, first the description, without which the rest is useless."""
    if not fs.exists(partial):
        return
    paths = {path.rstrip("/") for path in fs.ls(partial, detail=False)} - {f"{partial}/{LOCK}"}
    for path in sorted(paths, key=lambda path: (path != f"{partial}/{WORK}", path)):
        remove(fs, path)
    _remove_empty(fs, partial)


def _remove_empty(fs: fsspec.AbstractFileSystem, folder: str) -> None:
    """Remove a folder with nothing in it, not even a lock, where the file system has folders."""
    with suppress(OSError):
        fs.rmdir(folder)


def _is_passing(error: BaseException) -> bool:
    """Return whether the same work may succeed later: files reappear, and disks get space."""
    return isinstance(error, OSError) or not isinstance(error, SemDedupError)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two descriptions, in words."""
    changed = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    # What follows from other changes needs no words of its own.
    changed = [name for name in changed if name != "partitions"] or changed
    return [IN_WORDS.get(name) or f"{name} {before.get(name)} → {now.get(name)}" for name in changed]
