"""Output folders that appear whole or not at all."""

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
from dask_semdedup.errors import InvalidArgumentError, some
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

# What tells of a folder's files, and that all of them are there.
MANIFEST = "_manifest.json"


class Contents(NamedTuple):
    """What a folder may hold to be replaced.

    `strangers` is given a file system, a folder, and the names of the files within; it returns those that are not of
    this kind, and would be lost.
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
    """Yield the URL of a sibling of ``output_path`` that takes its place when the block succeeds.

    When the block fails, the sibling is removed and ``output_path`` stays as it was.

    Parameters
    ----------
    output_path : str
        The folder: local, or a URL that fsspec understands.
    input_path : str, optional
        What is read meanwhile; it must not overlap.
    contents : Contents
        What is written.
    overwrite : bool
        Whether to replace a folder that holds nothing else.
    storage_options : mapping, optional
        Arguments of the fsspec file system.

    Raises
    ------
    InvalidArgumentError
        If ``output_path`` is a file, is not free, or overlaps ``input_path``.
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
    """Yield the URL of a sibling of a folder that takes its place when the block succeeds, whatever it holds.

    Where the folder is a link, what it stands for is replaced.

    Raises
    ------
    InvalidArgumentError
        If it cannot take that place. All that was written stays in the sibling, which the message names.
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
        raise InvalidArgumentError(
            f"All is written, but cannot take the place of {final!r} ({error}). It is in {staged!r}: move it yourself."
        ) from error


def _discard(fs: fsspec.AbstractFileSystem, staged: str) -> None:
    """Remove what is of no use, without hiding the error that made it so."""
    try:
        if fs.exists(staged):
            fs.rm(staged, recursive=True)
    except OSError as error:
        warnings.warn(f"What is half written in {staged} could not be removed: {error}.", stacklevel=stack_level())


def _replace(fs: fsspec.AbstractFileSystem, staged: str, final: str) -> None:
    """Put a finished folder in the place of another one."""
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
    # Object stores copy file by file: what says that all are there comes last.
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
    """Rename a folder to the name of another, which is renamed before."""
    is_taken = os.path.lexists(final)
    if is_taken:
        os.rename(final, aside)
    try:
        # Unlike a move, it fails where another run has put its files meanwhile.
        os.rename(staged, final)
    except BaseException:
        if is_taken:
            os.rename(aside, final)
        raise


def real_path(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """A path without links, where the file system is the local one."""
    return os.path.realpath(path) if is_local(fs) else path


def is_within(fs: fsspec.AbstractFileSystem, path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it, by whatever name."""
    return f"{real_path(fs, path)}/".startswith(f"{real_path(fs, folder).rstrip('/')}/")


def _is_matched(fs: fsspec.AbstractFileSystem, output: str, pattern: str) -> bool:
    """Whether a pattern stands for a folder, or what will be in it, or one that it is in."""
    if above_pattern(fs, pattern) == pattern:
        return False
    matches = re.compile(glob_translate(pattern)).match
    parts = f"{output}/part.0.parquet".split("/")
    return any(matches("/".join(parts[:length])) for length in range(1, len(parts) + 1))


def _beneath(fs: fsspec.AbstractFileSystem) -> fsspec.AbstractFileSystem:
    """The file system that a cache stands before; itself if it is none."""
    return _beneath(fs.fs) if isinstance(fs, CachingFileSystem) else fs


def refuse_overlap(
    fs: fsspec.AbstractFileSystem, output: str, input_path: str, storage_options: Mapping[str, Any]
) -> None:
    """Keep overwriting from removing the input, and the input from swallowing the output, by whatever name.

    Raises
    ------
    InvalidArgumentError
        If one of the two is, or lies in, the other.
    """
    source_fs, source = fsspec.url_to_fs(input_path, **storage_options)
    fs, source_fs = _beneath(fs), _beneath(source_fs)
    if type(source_fs) is not type(fs):
        return
    if is_within(fs, output, source) or is_within(fs, source, output) or _is_matched(fs, output, source):
        raise InvalidArgumentError(f"Output {output!r} and input {source!r} overlap. Name a folder apart.")


def _refuse_occupied(fs: fsspec.AbstractFileSystem, output: str, contents: Contents, *, overwrite: bool) -> None:
    """Refuse an output that is not free; with ``overwrite``, one that holds anything else."""
    if fs.isfile(output):
        raise InvalidArgumentError(f"Output {output!r} is a file. Name a folder.")
    if is_local(fs) and (os.path.ismount(output) or is_within(fs, os.getcwd(), output)):
        raise InvalidArgumentError(
            f"Output {output!r} is a mount point or the current folder, which cannot be replaced as a whole. Name a "
            "folder in it."
        )
    files = fs.find(output)
    if files and not overwrite:
        raise InvalidArgumentError(
            f"Output {output!r} is not empty: {count_files(len(files))}. Pass overwrite=True to replace it, or "
            "name another folder."
        )
    refuse_strangers(fs, output, contents, [file.removeprefix(f"{output}/") for file in files])


def refuse_strangers(fs: fsspec.AbstractFileSystem, folder: str, contents: Contents, names: Sequence[str]) -> None:
    """Keep a folder from being replaced that holds anything but contents of this kind.

    Raises
    ------
    InvalidArgumentError
        Naming a few of the other files.
    """
    strangers = contents.strangers(fs, folder, names)
    if strangers:
        raise InvalidArgumentError(
            f"Output {folder!r} holds files that are not {contents.name} and would be lost: {some(strangers)}. "
            "Move them elsewhere, or name another folder."
        )


def count_files(count: int) -> str:
    """Say how many files there are."""
    return "1 file" if count == 1 else f"{count:,} files"
