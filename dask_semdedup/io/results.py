"""Results of tasks that stay in files until all work is done: a run that resumes does not repeat these tasks."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np

from dask_semdedup.errors import DataReadError
from dask_semdedup.io.write import whole_file, writing

__all__ = ["Results"]

SUFFIX = ".npz"


@dataclass(frozen=True)
class Results:
    """A folder with a file of arrays for each result.

    Parameters
    ----------
    folder : str
        A path or URL. It is created with the first file.
    storage_options : mapping
        Arguments of the fsspec file system.
    """

    folder: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def within(self, name: str) -> Results:
        """Return the results of a folder in this one."""
        return Results(f"{self.folder}/{name}", self.storage_options)

    def names(self) -> frozenset[str]:
        """Return the names of all results that are there."""
        fs, root = self._root()
        fs.invalidate_cache()
        files = (path.rpartition("/")[2] for path in fs.find(root))
        return frozenset(name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX))

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a result, completely or not at all.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        fs, root = self._root()
        final = f"{root}/{name}{SUFFIX}"
        with writing(final):
            fs.makedirs(root, exist_ok=True)
        with whole_file(fs, final, final) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # One of the names could be that of an option.

    def load(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays of a result.

        Raises
        ------
        DataReadError
            If the file cannot be read.
        """
        fs, root = self._root()
        path = f"{root}/{name}{SUFFIX}"
        try:
            with fs.open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataReadError(f"Cannot read {path}, which a stopped run has left: {error}. Remove it.") from error

    def _root(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, root = fsspec.url_to_fs(self.folder, **self.storage_options)
        return fs, root
