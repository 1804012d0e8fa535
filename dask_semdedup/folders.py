"""Output folders that appear whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec

from dask_semdedup.errors import InvalidArgumentError, some

__all__ = ["refuse_overlap", "replaced_when_done", "staged_folder"]


@contextmanager
def staged_folder(
    output_path: str,
    input_path: str | None = None,
    *,
    overwrite: bool,
    storage_options: Mapping[str, Any] | None,
    suffixes: tuple[str, ...] = (".parquet",),
) -> Iterator[str]:
    """Yield the URL of a sibling of ``output_path`` that takes its place when the block succeeds.

    When the block fails, the sibling is removed and ``output_path`` stays as it was.

    Parameters
    ----------
    output_path : str
        The folder: local, or a URL that fsspec understands.
    input_path : str, optional
        What is read meanwhile; it must not overlap.
    overwrite : bool
        Whether to replace a folder that holds nothing but files of these suffixes.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    suffixes : tuple of str
        How the names of files end that may be replaced.

    Raises
    ------
    InvalidArgumentError
        If ``output_path`` is a file, is not free, or overlaps ``input_path``.

    Examples
    --------
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "out")
    >>> with staged_folder(path, overwrite=False, storage_options=None) as staged:
    ...     os.mkdir(staged.removeprefix("file://"))
    ...     os.path.exists(path)
    False
    >>> os.path.exists(path)
    True
    """
    options = dict(storage_options or {})
    fs, final = fsspec.url_to_fs(output_path.rstrip("/"), **options)
    if input_path is not None:
        refuse_overlap(final, fsspec.url_to_fs(input_path.rstrip("/"), **options)[1])
    _refuse_occupied(fs, final, overwrite=overwrite, suffixes=suffixes)
    with replaced_when_done(fs, final) as staged:
        yield staged


@contextmanager
def replaced_when_done(fs: fsspec.AbstractFileSystem, final: str) -> Iterator[str]:
    """Yield the URL of a sibling of a folder that takes its place when the block succeeds, whatever it holds."""
    staged = f"{final}.partial-{secrets.token_hex(4)}"
    try:
        # A URL of an absolute path: workers may have other working directories.
        yield fs.unstrip_protocol(staged)
    except BaseException:
        if fs.exists(staged):
            fs.rm(staged, recursive=True)
        raise
    # Should one of these fail, the finished files stay where they are.
    if fs.exists(final):
        fs.rm(final, recursive=True)
    fs.mv(staged, final, recursive=True)


def refuse_overlap(output: str, source: str) -> None:
    """Keep overwriting from removing the input, and the input from swallowing the output."""
    if f"{output}/".startswith(f"{source}/") or f"{source}/".startswith(f"{output}/"):
        raise InvalidArgumentError(f"Output {output!r} and input {source!r} overlap. Name a folder apart.")


def _refuse_occupied(fs: fsspec.AbstractFileSystem, output: str, *, overwrite: bool, suffixes: tuple[str, ...]) -> None:
    """Refuse an output that is not free; with ``overwrite``, one that holds files of other suffixes."""
    if fs.isfile(output):
        raise InvalidArgumentError(f"Output {output!r} is a file. Name a folder.")
    files = fs.find(output)
    if files and not overwrite:
        raise InvalidArgumentError(
            f"Output {output!r} is not empty: {len(files):,} files. Pass overwrite=True, or --overwrite to the "
            "command, to replace it, or name another folder."
        )
    others = [file.removeprefix(f"{output}/") for file in files if not file.endswith(suffixes)]
    if others:
        raise InvalidArgumentError(
            f"Output {output!r} holds files that are not {' or '.join(suffixes)} and would be lost: {some(others)}. "
            "Remove it yourself."
        )
