"""Output folders that appear completely or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.cached import CachingFileSystem
from fsspec.utils import glob_translate

from dask_semdedup._validate import stack_level
from dask_semdedup.errors import InvalidArgumentError, OutputError, OutputExistsError, some
from dask_semdedup.io.listing import above_pattern, is_local

__all__ = [
    "MANIFEST",
    "Contents",
    "count_files",
    "is_within",
    "real_path",
    "refuse_overlap",
    "refuse_strangers",
    "replaced_when_done",
    "staged_folder",
]

# The file that describes a folder's files, and is written when all of them are there.
MANIFEST = "_manifest.json"


class Contents(NamedTuple):
    """A kind of files, which may be replaced if a folder holds nothing else.

    `strangers` takes a file system, a folder and the names of its files, and returns those that are of another kind.
    """

    name: str
    strangers: Callable[[fsspec.AbstractFileSystem, str, Sequence[str]], list[str]]


@contextmanager
def staged_folder(
    output_path: str,
    input_path: str | None = None,
    *,
    contents: Contents,
    overwrite: bool,
    storage_options: Mapping[str, Any] | None,
) -> Iterator[str]:
    """Yield the URL of a sibling of ``output_path`` that takes its place if the block succeeds.

    If the block fails, the sibling is removed and ``output_path`` stays as it was.

    Parameters
    ----------
    output_path : str
        The folder: local, or a URL that fsspec understands.
    input_path : str, optional
        Path of the data that is read meanwhile. It must not overlap.
    contents : Contents
        The kind of files that are written.
    overwrite : bool
        Whether to replace a folder that holds only such files.
    storage_options : mapping, optional
        Arguments of the fsspec file system.

    Raises
    ------
    OutputExistsError
        If ``output_path`` is a file, or holds files that may not be replaced.
    OutputError
        If ``output_path`` cannot be replaced.
    InvalidArgumentError
        If ``output_path`` and ``input_path`` overlap.
    """
    options = dict(storage_options or {})
    fs, final = fsspec.url_to_fs(output_path, **options)
    final = real_path(fs, final)
    if input_path is not None:
        refuse_overlap(fs, final, input_path, options)
    _refuse_occupied(fs, final, contents, overwrite=overwrite)
    with replaced_when_done(fs, final) as staged:
        yield staged


@contextmanager
def replaced_when_done(fs: fsspec.AbstractFileSystem, final: str) -> Iterator[str]:
    """Yield the URL of a sibling of a folder that replaces it if the block succeeds, whatever it holds.

    If the folder is a link, its target is replaced.

    Raises
    ------
    OutputError
        If it cannot take that place. Everything that was written stays in the sibling, which the message names.
    """
    final = real_path(fs, final)
    staged = f"{final}.partial-{secrets.token_hex(4)}"
    try:
        # A URL of an absolute path: workers may have other working directories.
        yield fs.unstrip_protocol(staged)
    except BaseException:
        _discard(fs, staged)
        raise
    try:
        _replace(fs, staged, final)
    except Exception as error:
        raise OutputError(
            f"All is written, but cannot take the place of {final!r} ({error}). It is in {staged!r}: move it yourself."
        ) from error


def _discard(fs: fsspec.AbstractFileSystem, staged: str) -> None:
    """Remove a folder after an error, without hiding that error."""
    try:
        if fs.exists(staged):
            fs.rm(staged, recursive=True)
    except OSError as error:
        warnings.warn(f"What is half written in {staged} could not be removed: {error}.", stacklevel=stack_level())


def _replace(fs: fsspec.AbstractFileSystem, staged: str, final: str) -> None:
    """Move a finished folder to the place of another one."""
    if is_local(fs):
        aside = f"{staged}.old"
        _swap(staged, final, aside)
        shutil.rmtree(aside, ignore_errors=True)
        if os.path.lexists(aside):
            warnings.warn(f"What was in {final} could not all be removed: it is in {aside}.", stacklevel=stack_level())
        return
    if fs.exists(final):
        fs.rm(final, recursive=True)
    if type(fs).mv is not fsspec.AbstractFileSystem.mv:
        fs.mv(staged, final, recursive=True)
        return
    # Object stores copy file by file. The manifest comes last, since it says that all files are there.
    manifest = f"{staged}/{MANIFEST}"
    files = set(fs.find(staged))
    try:
        for part in (sorted(files - {manifest}), sorted(files & {manifest})):
            fs.copy(part, [f"{final}{file.removeprefix(staged)}" for file in part])
    except BaseException:
        if fs.exists(final):
            fs.rm(final, recursive=True)
        raise
    fs.rm(staged, recursive=True)


def _swap(staged: str, final: str, aside: str) -> None:
    """Rename a folder to the name of another one, which is first moved aside."""
    is_taken = os.path.lexists(final)
    if is_taken:
        os.rename(final, aside)
    try:
        # Unlike a move, it fails if another run has put its files there meanwhile.
        os.rename(staged, final)
    except BaseException:
        if is_taken:
            os.rename(aside, final)
        raise


def real_path(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Return a path with its links resolved, if the file system is local."""
    return os.path.realpath(path) if is_local(fs) else path


def is_within(fs: fsspec.AbstractFileSystem, path: str, folder: str) -> bool:
    """Return whether a path is a folder or lies in it, by whatever name."""
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
    fs: fsspec.AbstractFileSystem, output: str, input_path: str, storage_options: Mapping[str, Any]
) -> None:
    """Raise if output and input overlap, by whatever names: the input could be removed, or the output be read.

    Raises
    ------
    InvalidArgumentError
        If one of them is the other, or lies in it.
    """
    source_fs, source = fsspec.url_to_fs(input_path, **storage_options)
    fs, source_fs = _without_caches(fs), _without_caches(source_fs)
    if type(source_fs) is not type(fs):
        return
    if is_within(fs, output, source) or is_within(fs, source, output) or _is_matched(fs, output, source):
        message = f"Output {output!r} and input {source!r} overlap. Name a folder apart."
        raise InvalidArgumentError(message, parameters=["output_path", "input_path"])


def _refuse_occupied(fs: fsspec.AbstractFileSystem, output: str, contents: Contents, *, overwrite: bool) -> None:
    """Raise if an output folder is not free; with ``overwrite``, if it holds any other files."""
    if fs.isfile(output):
        raise OutputExistsError(f"Output {output!r} is a file. Name a folder.", parameters=["output_path"])
    if is_local(fs) and (os.path.ismount(output) or is_within(fs, os.getcwd(), output)):
        raise OutputError(
            f"Output {output!r} is a mount point or the current folder, which cannot be replaced as a whole. Name a "
            "folder in it.",
            parameters=["output_path"],
        )
    files = fs.find(output)
    if files and not overwrite:
        raise OutputExistsError(
            f"Output {output!r} is not empty: {count_files(len(files))}. Pass overwrite=True to replace it, or "
            "name another folder.",
            parameters=["overwrite"],
        )
    refuse_strangers(fs, output, contents, [file.removeprefix(f"{output}/") for file in files])


def refuse_strangers(fs: fsspec.AbstractFileSystem, folder: str, contents: Contents, names: Sequence[str]) -> None:
    """Raise if a folder that is to be replaced holds files of any other kind.

    Raises
    ------
    OutputExistsError
        Naming a few of the other files.
    """
    strangers = contents.strangers(fs, folder, names)
    if strangers:
        raise OutputExistsError(
            f"Output {folder!r} holds files that are not {contents.name} and would be lost: {some(strangers)}. "
            "Move them elsewhere, or name another folder."
        )


def count_files(count: int) -> str:
    """Return a number of files as text."""
    return "1 file" if count == 1 else f"{count:,} files"
