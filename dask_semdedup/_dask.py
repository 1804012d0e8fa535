"""Dask's private names: the one file that imports them.

Dask DataFrame has no public way to write an expression. Each name says what it is for, and what would be lost without
it. The tests of ``lazy/`` run against the oldest and the newest Dask that are claimed (``make test-dask``).
"""

from __future__ import annotations

from typing import Any

# Expressions of other kinds than frames', which optimisation hands to ours. Types only.
from dask._expr import Expr as AnyExpr

# A task of the graph, and its reference to another one. `ReadClusters` and `CheckedIds` make their graphs by hand: the
# first to read only the chosen partitions, the second to let all partitions wait for one check.
from dask._task_spec import Task, TaskRef

# What expressions derive from: `Blockwise` is fused with its neighbours, `PartitionsFiltered` and `BlockwiseIO` let
# ``ddf.partitions[...]`` and projections reach the files. With ``map_partitions`` every column would be read.
# Expressions above ours that `_simplify_up` answers from footers (`Lengths`, `Len`, by a `Literal`), or pushes down
# (`Projection`, `Index`). Without them counting rows would read files, and removal all columns.
from dask.dataframe.dask_expr._expr import (
    Blockwise,
    Expr,
    Filter,
    Index,
    Lengths,
    Literal,
    PartitionsFiltered,
    Projection,
    determine_column_projection,
)

# A delayed value as the operand of an expression: the centroids are in the graph once, not in each task.
from dask.dataframe.dask_expr._expr import _DelayedExpr as DelayedOperand

# Merges, whose claims of alignment are looked through: believed, some would leave a cluster in two partitions.
from dask.dataframe.dask_expr._merge import Merge
from dask.dataframe.dask_expr._reductions import Len

# The shuffle: by its name frames can be asked for in so many partitions, and its method be changed for list columns.
from dask.dataframe.dask_expr._shuffle import RearrangeByColumn

# What ``dd.from_map`` makes: `read_table`'s files are found by it, for schemas and metadata that are written back.
from dask.dataframe.dask_expr.io.io import BlockwiseIO, FromMap

__all__ = [
    "AnyExpr",
    "BackendData",
    "Blockwise",
    "BlockwiseIO",
    "DelayedOperand",
    "Expr",
    "Filter",
    "FromMap",
    "FromPandas",
    "Index",
    "Len",
    "Lengths",
    "Literal",
    "Merge",
    "OwnExpr",
    "PartitionsFiltered",
    "Projection",
    "RearrangeByColumn",
    "Task",
    "TaskRef",
    "claims_of",
    "determine_column_projection",
]


class OwnExpr(AnyExpr):
    """An expression of this package, which Dask before 2026.7 takes for a collection's too.

    Where it is a frame's, as in ``map_partitions``, these versions ask whether it has a graph.
    """

    def __dask_graph__(self) -> Any:
        """Return the graph, which is empty before the expression is lowered."""
        try:
            return super().__dask_graph__()
        except NotImplementedError:
            return {}


def claims_of(expr: Expr) -> set[Any]:
    """Return the columns in whose values Dask takes partitions to be distinct; none where its own answer fails.

    It fails for a frame whose ``columns`` were set, and where the column was dropped. There is no public way to ask,
    nor to say: `unique_partition_mapping_columns_from_shuffle` is what merges and shuffles go by. Its meaning is
    tested, since it could change without an error.
    """
    try:
        return expr.unique_partition_mapping_columns_from_shuffle
    except (KeyError, TypeError):
        return set()
