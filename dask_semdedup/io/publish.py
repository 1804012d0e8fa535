"""Give a finished folder the name of its output, which is replaced only if it has not changed since it was checked."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import fsspec

from dask_semdedup._validate import stack_level
from dask_semdedup.errors import OutputExistsError, some
from dask_semdedup.io.listing import STATE_KEYS, UNFINISHED, is_local
from dask_semdedup.io.targets import LITTER, MANIFESTS

__all__ = ["listing", "publish", "put_back", "remove"]


def listing(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, dict[str, Any]]:
    """Return the state of each file and folder below a folder, by its name there."""
    fs.invalidate_cache()
    found = fs.find(folder, withdirs=True, detail=True)
    names = {path: path.removeprefix(folder).lstrip("/") for path in found}
    return {
        name: {key: info[key] for key in STATE_KEYS & info.keys()} if info["type"] == "file" else {}
        for path, info in found.items()
        if (name := names[path]) and not LITTER.fullmatch(name)
    }


def publish(
    fs: fsspec.AbstractFileSystem, new: str, final: str, aside: str, seen: Mapping[str, Mapping[str, Any]]
) -> None:
    """Replace a folder by a finished one.

    Parameters
    ----------
    fs : fsspec file system
    new, final : str
        The two folders.
    aside : str
        Place of the old folder until the new one has its name. It stays there if the process is killed in between: see
        `put_back`.
    seen : mapping
        The `listing` of the old folder when it was checked.

    Raises
    ------
    OutputExistsError
        If the old folder has changed. It stays.
    """
    if is_local(fs) or type(fs).mv is not fsspec.AbstractFileSystem.mv:
        _swap(fs, new, final, aside, seen)
    else:
        _copy(fs, new, final, seen)


def _rename(fs: fsspec.AbstractFileSystem, source: str, target: str) -> None:
    """Rename a folder. Locally it replaces an empty one, and fails if there is a file in it."""
    if is_local(fs):
        os.rename(source, target)
        _sync(os.path.dirname(target))
        return
    if fs.exists(target) and not fs.ls(target, detail=False):
        fs.rmdir(target)
    fs.mv(source, target, recursive=True)


def _swap(
    fs: fsspec.AbstractFileSystem, new: str, final: str, aside: str, seen: Mapping[str, Mapping[str, Any]]
) -> None:
    """Rename a folder to the name of another one, which is first moved aside and then checked once more."""
    if is_local(fs):
        for path, _, names in os.walk(new):
            for name in [*names, "."]:
                _sync(os.path.join(path, name))
    if seen:
        _rename(fs, final, aside)
        try:
            _refuse_others(final, listing(fs, aside), seen)
        except OutputExistsError:
            _rename(fs, aside, final)
            raise
    try:
        _rename(fs, new, final)
    except OSError:
        if seen:
            _rename(fs, aside, final)
        raise


def _copy(fs: fsspec.AbstractFileSystem, new: str, final: str, seen: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy a folder file by file, as object stores require.

    A marker file, which our readers check, stays until the end. The new folder stays until then, so that the copy can
    be repeated. The manifest comes last.
    """
    before = listing(fs, final)
    _refuse_others(final, before, seen)
    names = {path.removeprefix(f"{new}/") for path in fs.find(new)}
    old = {name for name in before if before[name]} - {UNFINISHED}
    fs.pipe_file(f"{final}/{UNFINISHED}", json.dumps(sorted(names | old)).encode())
    for part in (sorted(names.difference(MANIFESTS)), sorted(names.intersection(MANIFESTS))):
        fs.copy([f"{new}/{name}" for name in part], [f"{final}/{name}" for name in part])
    if old - names:
        fs.rm([f"{final}/{name}" for name in sorted(old - names)])
    fs.rm_file(f"{final}/{UNFINISHED}")
    fs.invalidate_cache()


def _refuse_others(final: str, now: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    others = sorted(name for name in now.keys() | seen.keys() if now.get(name) != seen.get(name))
    if others:
        raise OutputExistsError(f"it has changed since the run began, and stays as it is: {some(others)}")


def put_back(fs: fsspec.AbstractFileSystem, final: str, aside: str) -> None:
    """Give the old folder its name again, if a run was killed before the new one had it.

    Raises
    ------
    OutputExistsError
        If other files have the name by now.
    """
    if not fs.exists(aside):
        return
    try:
        _rename(fs, aside, final)
    except OSError as error:
        raise OutputExistsError(
            f"Output {final!r} was moved to {aside!r} by a run that was killed, and cannot be moved back ({error}). "
            "Move one of the two elsewhere."
        ) from error
    warnings.warn(
        f"A run was killed while it replaced {final}: the old files are there again.", stacklevel=stack_level()
    )


def _sync(path: str) -> None:
    """Wait until a file or folder is on disk. It must be before a name declares it complete."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Remove a file or folder. Failures are warnings, so that they do not hide another error."""
    try:
        if fs.exists(path):
            fs.rm(path, recursive=True)
    except OSError as error:
        warnings.warn(f"What is left in {path} could not be removed: {error}.", stacklevel=stack_level())
