"""Frames in which no cluster spans two partitions: which they are, and how others become so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import dask.dataframe as dd
import pandas as pd
from dask.dataframe.api import new_collection

from dask_semdedup._dask import AnyExpr, Filter, Merge, Projection, RearrangeByColumn, claims_of
from dask_semdedup.errors import ClusterError, InvalidArgumentError
from dask_semdedup.lazy.expressions import ReadClusters, ShuffleByCluster

__all__ = ["align", "align_both", "is_aligned"]


CLUSTER_ADVICE = (
    "To compare all rows, pass cluster_field=None to `pairwise`. To compare rows within clusters, name the column of "
    "clusters as cluster_field, or make clusters with ddf.semdedup.kmeans()."
)


def no_cluster_column(name: str, where: str, columns: Iterable[object]) -> ClusterError:
    """Return the error for a missing cluster column, which says how to get one."""
    return ClusterError(
        f"No cluster column {name!r} in {where}, only columns {list(columns)}. {CLUSTER_ADVICE}",
        parameters=["cluster_field"],
        columns=[name],
    )


def align(ddf: dd.DataFrame, on: str) -> dd.DataFrame:
    """Bring every cluster into one partition.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        Any frame with the cluster column.
    on : str
        The cluster column.

    Returns
    -------
    dask.dataframe.DataFrame
        The frame itself where it is aligned already (see `is_aligned`), else the frame shuffled by cluster, lazily.

    Raises
    ------
    ClusterError
        If the frame has no such column.
    """
    if on not in ddf.columns:
        raise no_cluster_column(on, "the frame", ddf.columns)
    if is_aligned(ddf, on):
        return ddf
    return new_collection(ShuffleByCluster(ddf.expr, [on], ddf.npartitions))


def align_both(left: dd.DataFrame, right: dd.DataFrame, on: str) -> tuple[dd.DataFrame, dd.DataFrame]:
    """Partition two frames alike: the rows of a cluster stand in the same partition of both.

    Parameters
    ----------
    left, right : dask.dataframe.DataFrame
        Any frames with the cluster column.
    on : str
        The cluster column, of integers in both or of one dtype.

    Returns
    -------
    tuple of dask.dataframe.DataFrame
        The frames as they are where each has one partition, else both shuffled by cluster, lazily.

    Raises
    ------
    InvalidArgumentError
        If clusters are of different kinds.
    """
    ours, theirs = left._meta[on].dtype, right._meta[on].dtype
    if ours != theirs:
        if not (pd.api.types.is_integer_dtype(ours) and pd.api.types.is_integer_dtype(theirs)):
            raise InvalidArgumentError(
                f"Column {on!r} is {ours} in one frame and {theirs} in the other: clusters must be of one "
                "clustering. If they are, convert one of the columns with astype.",
                parameters=["cluster_field"],
                columns=[on],
            )
        # Numbers of different widths may be sent to different partitions. Nulls are left to be named by their ids.
        may_be_null = any(pd.api.types.is_extension_array_dtype(dtype) for dtype in (ours, theirs))
        to = "Int64" if may_be_null else "int64"
        left, right = (frame.assign(**{on: frame[on].astype(to)}) for frame in (left, right))
    n = max(left.npartitions, right.npartitions)
    if n == 1:
        return left, right
    shuffled = [new_collection(ShuffleByCluster(frame.expr, [on], n)) for frame in (left, right)]
    return shuffled[0], shuffled[1]


def is_aligned(ddf: dd.DataFrame, on: str) -> bool:
    """Return whether the frame is known to have no cluster in two partitions.

    It is when there is one partition, or when Dask knows that it came from a shuffle by cluster or from
    `read_clusters`. Not all that Dask says of the result of a merge is believed. Of a broadcast merge it says that both
    sides were shuffled, and neither need be; of others, that the columns of both sides are distinct, whichever of them
    now has the name; and it goes on to say so of a name by itself, not in a tuple, when a column has been assigned or
    renamed.
    """
    if ddf.npartitions == 1:
        return True
    known: set[Any] = {(on,)}
    above = ddf.expr
    while isinstance(above, (Projection, Filter)):
        above = above.frame
    if isinstance(above, Merge):
        known.add(on)
    return not known.isdisjoint(claims_of(ddf.expr)) and all(
        _is_hashed_by(merge, on) for merge in _last_merges(ddf.expr)
    )


def _last_merges(expr: AnyExpr) -> Iterator[Merge]:
    """Yield the merges that are not followed by a shuffle."""
    if isinstance(expr, Merge):
        yield expr
    elif not isinstance(expr, (RearrangeByColumn, ReadClusters)):
        for dependency in expr.dependencies():
            yield from _last_merges(dependency)


def _is_hashed_by(merge: Merge, column: str) -> bool:
    """Return whether a merge brings rows of equal values in a column of both sides into one partition."""
    broadcast = merge.is_broadcast_join or merge._is_single_partition_broadcast
    return not broadcast and all(column == on or on == [column] for on in (merge.left_on, merge.right_on))
