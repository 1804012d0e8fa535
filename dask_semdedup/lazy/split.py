"""Frames whose partitions are cut into parts of few rows, for work that takes long for each row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import dask.dataframe as dd
from dask.dataframe.api import new_collection
from dask.typing import Key

from dask_semdedup._dask import AnyExpr, Expr, OwnExpr, PartitionsFiltered, Projection, Task, TaskRef

__all__ = ["split_rows"]


def split_rows(ddf: dd.DataFrame, lengths: Sequence[int], rows: int) -> dd.DataFrame:
    """Cut the partitions of a frame into parts.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
    lengths : sequence of int
        The number of rows of each partition.
    rows : int
        The largest number of rows of a part. The parts depend on nothing else: not on cores, workers or the backend.

    Returns
    -------
    dask.dataframe.DataFrame
        The same rows in the same order, with a partition for each part. A partition is read once for all of its parts.
    """
    if max(lengths, default=0) <= rows:
        return ddf
    # A partition without rows is a part, too.
    cuts = [(number, start) for number, length in enumerate(lengths) for start in range(0, max(1, length), rows)]
    return new_collection(SplitRows(ddf.expr, cuts, rows))


class SplitRows(OwnExpr, PartitionsFiltered, Expr):
    """Parts of partitions: each is the number of a partition and its first row there.

    It is not `Blockwise`: Dask would fuse it with the task that reads, which would run again for each part.
    """

    _parameters = ["frame", "cuts", "rows", "_partitions"]  # noqa: RUF012
    _defaults = {"_partitions": None}  # noqa: RUF012

    @functools.cached_property
    def _name(self) -> str:
        return f"split-rows-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return self.frame._meta

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (len(self.cuts) + 1)

    def _filtered_task(self, name: Key, index: int) -> Task:
        number, start = self.cuts[index]
        return Task(name, take_rows, TaskRef((self.frame._name, number)), start, start + self.rows)

    def _simplify_up(self, parent: Expr, dependents: Any) -> AnyExpr | None:
        """Read only the columns that are needed."""
        if not isinstance(parent, Projection):
            return None
        frame = type(parent)(self.frame, *parent.operands[1:])
        return type(self)(frame, *self.operands[1:])


def take_rows(frame: Any, start: int, stop: int) -> Any:
    """Return some rows of a partition."""
    return frame.iloc[start:stop]
