"""List the files of paths, folders and patterns, with their states."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import fsspec
from dask.tokenize import tokenize
from fsspec.implementations.local import LocalFileSystem

from dask_semdedup._validate import type_name
from dask_semdedup.errors import DataNotFoundError, DataReadError, InvalidArgumentError

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")

# The file in a folder to which a run copies its output: it lists the files that may be there, and not all are yet.
UNFINISHED = "_unfinished.json"

# Threads that wait for a file system together.
THREADS = 32

# What identifies the state of a file, under the names that fsspec's file systems give it.
STATE_KEYS = {
    *("size", "mtime", "created", "LastModified", "last_modified", "updated", "ETag", "etag", "md5Hash"),
    *("CRC", "date_time", "sha"),
}


class State(NamedTuple):
    """The size of a file when it was listed; the time of its last change in ns if it is local, else its ETag.

    What is unknown is 0 or empty.
    """

    size: int = 0
    mtime: int = 0
    etag: str = ""

    @classmethod
    def of(cls, fs: fsspec.AbstractFileSystem, info: Mapping[str, Any]) -> State:
        """Return the state in the info that a listing or an open file gives."""
        size = info.get("size") or 0
        if is_local(fs):
            return cls(size, info.get("mtime", 0))
        # Some servers quote it in one answer, and not in another.
        return cls(size, etag=str(info.get("ETag") or info.get("etag") or "").strip('"'))


def list_files(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    storage_options: Mapping[str, Any] | None = None,
    suffixes: tuple[str, ...] = PARQUET_SUFFIXES,
    kind: str = "Parquet",
) -> tuple[fsspec.AbstractFileSystem, dict[str, dict[str, Any]]]:
    """Return the file system, and the info of each file under a path, a pattern or a list of them.

    In folders, only files with one of the suffixes are data. Files and folders whose names begin with a dot or an
    underscore are left out, even if a pattern matches them. An existing path is not treated as a pattern.

    Raises
    ------
    DataNotFoundError
        If there are no files, or one of the paths does not exist. The message calls files by their `kind`.
    InvalidArgumentError
        If an entry is not a path, or they are on several file systems.
    """
    paths = as_paths(path)
    if not paths:
        raise DataNotFoundError(f"No {kind} files: the list of paths is empty.", parameters=["path"])
    located = [fsspec.url_to_fs(entry, **(storage_options or {})) for entry in paths]
    fs = located[0][0]
    for entry, (other, _) in zip(paths, located, strict=True):
        if (type(other), other.storage_options) != (type(fs), fs.storage_options):
            message = f"{entry} is on another file system than {paths[0]}. Read them one by one."
            raise InvalidArgumentError(message, parameters=["path"])
    files: dict[str, dict[str, Any]] = {}
    gone: list[Any] = []
    for entry, (_, root) in zip(paths, located, strict=True):
        above = above_pattern(fs, root)
        found = _find_data(fs, root, root, suffixes) if above == root else _match(fs, root, above, suffixes)
        if not found and not fs.exists(root):
            gone.append(entry)
        files |= found
    if gone or not files:
        why = ": there is no such file or folder" if gone else ""
        where = ", ".join(map(str, (gone or paths)[:5]))
        raise DataNotFoundError(f"No {kind} files found at {where}{why}.", parameters=["path"])
    return fs, {name: files[name] for name in sorted(files)}


def as_paths(path: Any) -> list[str]:
    """Return a path, or several, as strings; raise `InvalidArgumentError` for anything else."""
    if isinstance(path, (str, os.PathLike)):
        return [os.fspath(path)]
    is_frame = hasattr(path, "columns")
    paths = [path] if is_frame or isinstance(path, bytes) or not isinstance(path, Iterable) else list(path)
    for entry in paths:
        if not isinstance(entry, (str, os.PathLike)):
            advice = " Pass a pandas DataFrame to dask_semdedup.from_pandas." if is_frame else ""
            listed = "" if entry is path else "a list of "
            raise InvalidArgumentError(
                f"path must be a path, a URL or a list of them, not {listed}{type_name(entry)}.{advice}",
                parameters=["path"],
            )
    return list(map(os.fspath, paths))


def above_pattern(fs: fsspec.AbstractFileSystem, root: str) -> str:
    """Return the folder in which all matches of a pattern lie, or the path itself if it is not a pattern."""
    start = re.split(r"[*?\[]", root, maxsplit=1)[0]
    return root if start == root or fs.exists(root) else start[: start.rfind("/")]


def _match(
    fs: fsspec.AbstractFileSystem, pattern: str, above: str, suffixes: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Return the files that match a pattern, and the data in folders that match it."""
    files: dict[str, dict[str, Any]] = {}
    local = is_local(fs)
    parts = pattern[len(above) :].lstrip("/").split("/")
    matches: dict[str, Any] = dict.fromkeys(_glob_locally(above, parts)) if local else fs.glob(pattern, detail=True)
    for name, info in matches.items():
        if is_hidden(name, above):
            continue
        # Local names may be of files, folders, or links to nothing.
        is_file = not local and info["type"] == "file"
        files |= {name: info} if is_file else _find_data(fs, name, above, suffixes)
    return files


def _glob_locally(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """Yield the paths below a folder that match a pattern's parts. Raise if a folder cannot be listed."""
    head, *rest = parts
    if head == "**":
        if not rest:
            yield folder
            return
        yield from _glob_locally(folder, rest)
    matches = re.compile(fnmatch.translate("*" if head == "**" else head)).match
    with os.scandir(folder or "/") as entries:
        found = sorted(entry.path for entry in entries if matches(entry.name) and not is_hidden(entry.name, ""))
    for path in found:
        if head != "**" and not rest:
            yield path
        elif os.path.isdir(path) and not _is_above(path, folder):
            yield from _glob_locally(path, parts if head == "**" else rest)


def _is_above(path: str, folder: str) -> bool:
    """Return whether a path is a link to a folder or to a parent of it."""
    return os.path.islink(path) and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(path)}/")


def _find_data(
    fs: fsspec.AbstractFileSystem, root: str, above: str, suffixes: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Return the file at a path, whatever its name, or the data in a folder."""
    found = _find_locally(root) if is_local(fs) else fs.find(root, detail=True)
    if set(found) == {root}:
        return {root: found[root] or fs.info(root)}
    if unfinished := [name for name in found if name.endswith(f"/{UNFINISHED}")]:
        raise DataReadError(
            f"{unfinished[0].rpartition('/')[0]} is not all there: what wrote it was stopped. Run the same command "
            "again, which finishes it."
        )
    return {name: info for name, info in found.items() if is_data_file(name, above, suffixes)}


def _find_locally(root: str) -> dict[str, dict[str, Any]]:
    """Return what `fs.find` tells about local files. Links back to a folder on the way there are not followed."""
    if os.path.isfile(root):
        return {root: _info(os.stat(root))}
    files = {}
    # Folders to list, each with the real folders in which links to it were followed.
    folders: list[tuple[str, tuple[str, ...]]] = [(root, ())] if os.path.isdir(root) else []
    while folders:
        folder, left = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    here = (*left, os.path.realpath(folder))
                    if os.path.isdir(entry.path) and not any(_is_above(entry.path, place) for place in here):
                        folders.append((entry.path, here))
                    elif os.path.isfile(entry.path):
                        files[entry.path] = _info(os.stat(entry.path))
                elif entry.is_dir():
                    folders.append((entry.path, left))
                elif entry.is_file():
                    with suppress(FileNotFoundError):  # another process may move its files meanwhile
                        files[entry.path] = _info(entry.stat())
    return files


def _info(stat: os.stat_result) -> dict[str, Any]:
    return {"size": stat.st_size, "mtime": stat.st_mtime_ns}


def is_data_file(path: str, root: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file below a root is data: it has such a suffix and is not hidden, nor in a hidden folder."""
    return path.endswith(suffixes) and not is_hidden(path, root)


def is_hidden(path: str, root: str) -> bool:
    """Return whether a file below a root, or a folder that it is in, has a name with a leading dot or underscore."""
    below = f"/{path.removeprefix(root)}"
    # The first two tests settle most names. The key of a folder may begin with an underscore.
    return ("/_" in below or "/." in below) and any(
        part.startswith(("_", ".")) and "=" not in part for part in below.split("/")
    )


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether Arrow itself can open paths of this file system."""
    return isinstance(fs, LocalFileSystem)


def checksum(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a token of the files' names and states, which changes when one of them does."""
    keys = sorted(set[str]().union(*files.values()) & STATE_KEYS)
    states = [[info.get(key) for info in files.values()] for key in keys]
    return tokenize(repr([keys, list(files), *states]))
