"""Checks of output folders before they are written: what they may hold, and what they may not overlap."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.cached import CachingFileSystem
from fsspec.utils import glob_translate

from dask_semdedup.errors import InvalidArgumentError, OutputError, OutputExistsError, some
from dask_semdedup.io.listing import UNFINISHED, above_pattern, is_local

__all__ = [
    "LITTER",
    "MANIFEST",
    "MANIFESTS",
    "TABLE_MANIFEST",
    "Contents",
    "count_files",
    "is_within",
    "real_path",
    "refuse_file",
    "refuse_occupied",
    "refuse_overlap",
    "refuse_place",
    "refuse_strangers",
]

# The note that describes a folder's files, and is written when all of them are there. Next to tables it is a table
# without rows. Above folders such as ``centroid=0`` it is JSON, since their readers want the same keys for all tables.
TABLE_MANIFEST, MANIFEST = MANIFESTS = ("_manifest.parquet", "_manifest.json")

# Files that file systems, their viewers and notebooks leave in any folder.
LITTER = re.compile(r"(.*/)?(\.DS_Store|\._[^/]*|\.nfs[^/]*|\.ipynb_checkpoints(/.*)?)")


class Contents(NamedTuple):
    """A kind of files. A folder that holds nothing else may be replaced.

    `strangers` takes a file system, a folder and the names of its files, and returns the names of other kinds.
    """

    name: str
    strangers: Callable[[fsspec.AbstractFileSystem, str, Sequence[str]], list[str]]


def real_path(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Return a path with its links resolved, if the file system is local."""
    return os.path.realpath(path) if is_local(fs) else path


def is_within(fs: fsspec.AbstractFileSystem, path: str, folder: str) -> bool:
    """Return whether a path is a folder or inside it, under any name."""
    return f"{real_path(fs, path)}/".startswith(f"{real_path(fs, folder).rstrip('/')}/")


def _is_matched(fs: fsspec.AbstractFileSystem, output: str, pattern: str) -> bool:
    """Return whether a pattern matches an output folder, its parents, or the files that will be in it."""
    if above_pattern(fs, pattern) == pattern:
        return False
    matches = re.compile(glob_translate(pattern)).match
    parts = f"{output}/part.0.parquet".split("/")
    return any(matches("/".join(parts[:length])) for length in range(1, len(parts) + 1))


def _without_caches(fs: fsspec.AbstractFileSystem) -> fsspec.AbstractFileSystem:
    """Return the file system below any caches."""
    return _without_caches(fs.fs) if isinstance(fs, CachingFileSystem) else fs


def refuse_overlap(
    fs: fsspec.AbstractFileSystem,
    output: str,
    input_path: str,
    storage_options: Mapping[str, Any],
    parameters: Sequence[str] = ("output_path", "input_path"),
) -> None:
    """Raise if output and input overlap under any names. Otherwise the input could be removed, or the output read.

    Raises
    ------
    InvalidArgumentError
        If one of them is the other or inside it.
    """
    source_fs, source = fsspec.url_to_fs(input_path, **storage_options)
    fs, source_fs = _without_caches(fs), _without_caches(source_fs)
    if type(source_fs) is not type(fs):
        return
    if is_within(fs, output, source) or is_within(fs, source, output) or _is_matched(fs, output, source):
        message = f"Output {output!r} and input {source!r} overlap. Choose a folder outside the input."
        raise InvalidArgumentError(message, parameters=parameters)


def refuse_file(fs: fsspec.AbstractFileSystem, output: str) -> None:
    """Raise if a path for an output folder is a file."""
    if fs.isfile(output):
        raise OutputExistsError(f"Output {output!r} is a file. Name a folder.", parameters=["output_path"])


def refuse_place(fs: fsspec.AbstractFileSystem, output: str) -> None:
    """Raise if a path cannot be an output folder, regardless of its contents."""
    refuse_file(fs, output)
    if is_local(fs) and (os.path.ismount(output) or is_within(fs, os.getcwd(), output)):
        raise OutputError(
            f"Output {output!r} is a mount point or the current folder, which cannot be replaced as a whole. Name a "
            "folder in it.",
            parameters=["output_path"],
        )


def refuse_occupied(fs: fsspec.AbstractFileSystem, output: str, contents: Contents, *, overwrite: bool) -> None:
    """Raise if an output folder is not empty; with ``overwrite``, if it holds files of another kind.

    Files that one of our runs has left unfinished may be replaced.
    """
    names = [file.removeprefix(f"{output}/") for file in fs.find(output)]
    if names and not overwrite and UNFINISHED not in names:
        raise OutputExistsError(
            f"Output {output!r} is not empty: {count_files(len(names))}. Pass overwrite=True to replace it, or "
            "name another folder.",
            parameters=["overwrite"],
        )
    refuse_strangers(fs, output, contents, names)


def refuse_strangers(fs: fsspec.AbstractFileSystem, folder: str, contents: Contents, names: Sequence[str]) -> None:
    """Raise if a folder to be replaced holds files of another kind.

    Raises
    ------
    OutputExistsError
        With a few of these files.
    """
    own = [name for name in names if name != UNFINISHED and not LITTER.fullmatch(name)]
    if UNFINISHED in names:
        strangers = sorted(set(own) - set(json.loads(fs.cat_file(f"{folder}/{UNFINISHED}"))))
    else:
        strangers = contents.strangers(fs, folder, own)
    if strangers:
        raise OutputExistsError(
            f"Output {folder!r} holds files that are not {contents.name} and would be lost: {some(strangers)}. "
            "Move them elsewhere, or name another folder."
        )


def count_files(count: int) -> str:
    """Return a number of files as text."""
    return "1 file" if count == 1 else f"{count:,} files"
