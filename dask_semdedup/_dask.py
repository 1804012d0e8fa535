"""Dask's private names: the one file that imports them.

Dask DataFrame has no public way to write an expression. What each name is for, and what would be without it:

`Blockwise`, `PartitionsFiltered`, `BlockwiseIO`, `Expr`
    What our expressions derive from. Blockwise ones are fused with their neighbours; projections and
    ``ddf.partitions[...]`` reach the files. With ``map_partitions`` alone every column of every file would be read.
`Lengths`, `Len`, `Literal`, `Projection`, `Index`, `Filter`, `determine_column_projection`
    Expressions above ours, which are answered from footers or pushed down. Counting rows would read files, and
    removal would read all columns twice.
`ResetIndex`, `Repartition`, `ArrowStringConversion`
    What leaves scores as they are. What they hold would be forgotten.
`GE`, `GT`, `And`, `Binop`, `Unaryop`, `Isin`, `AsType`
    What filters of scores are made of. Scores of all rows would be searched for where only duplicates are wanted, and
    duplicates would be asked for that are no longer there.
`Merge`, `RearrangeByColumn`, `claims_of`
    What is known of how rows are partitioned: who must shuffle, and how. Every search would shuffle, and the
    peer-to-peer shuffle fails on Arrow lists.
`DelayedOperand`
    A delayed value as an operand. The centroids would be in the graph once a task.
`MapPartitions`
    What makes embeddings of texts: who reads them several times is warned.
`FromMap`
    What ``dd.from_map`` makes of `read_table`'s files, whose schemas and metadata are written back.
`FromPandas`, `BackendData`
    What ``dd.from_pandas`` makes: columns of objects stay objects in one frame. The public way is a setting of the
    whole process, which other threads would see.
`Task`, `TaskRef`, `TaskList`, `DataNode`, `GraphNode`, `AnyExpr`
    Graphs made by hand: `ReadClusters` reads only the chosen partitions, in `CheckedIds` all wait for one check, and
    `CompleteScores` and `Blocks` compare blocks of rows with each other.

The tests of ``lazy/`` run against the oldest and the newest Dask that are claimed: ``make test-dask``.
"""

from __future__ import annotations

from typing import Any

from dask._expr import Expr as AnyExpr
from dask._task_spec import DataNode, GraphNode, Task, TaskRef
from dask._task_spec import List as TaskList
from dask.dataframe.dask_expr._expr import (
    GE,
    GT,
    And,
    ArrowStringConversion,
    AsType,
    Binop,
    Blockwise,
    Expr,
    Filter,
    Index,
    Isin,
    Lengths,
    Literal,
    MapPartitions,
    PartitionsFiltered,
    Projection,
    ResetIndex,
    Unaryop,
    determine_column_projection,
)
from dask.dataframe.dask_expr._expr import _DelayedExpr as DelayedOperand
from dask.dataframe.dask_expr._merge import Merge
from dask.dataframe.dask_expr._reductions import Len
from dask.dataframe.dask_expr._repartition import Repartition
from dask.dataframe.dask_expr._shuffle import RearrangeByColumn
from dask.dataframe.dask_expr._util import _BackendData as BackendData
from dask.dataframe.dask_expr.io.io import BlockwiseIO, FromMap, FromPandas

__all__ = [
    "GE",
    "GT",
    "And",
    "AnyExpr",
    "ArrowStringConversion",
    "AsType",
    "BackendData",
    "Binop",
    "Blockwise",
    "BlockwiseIO",
    "DataNode",
    "DelayedOperand",
    "Expr",
    "Filter",
    "FromMap",
    "FromPandas",
    "GraphNode",
    "Index",
    "Isin",
    "Len",
    "Lengths",
    "Literal",
    "MapPartitions",
    "Merge",
    "OwnExpr",
    "PartitionsFiltered",
    "Projection",
    "RearrangeByColumn",
    "Repartition",
    "ResetIndex",
    "Task",
    "TaskList",
    "TaskRef",
    "Unaryop",
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
