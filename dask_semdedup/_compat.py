"""What older versions of the libraries below need."""

from __future__ import annotations

from typing import Any

from dask._expr import Expr

__all__ = ["OwnExpr"]


class OwnExpr(Expr):
    """An expression that is not Dask's own, and that Dask before 2026.7 knows for an expression all the same.

    Where it is a frame's, as in ``map_partitions``, these versions ask whether it has a graph.
    """

    def __dask_graph__(self) -> Any:
        """The graph, which is empty before the expression is lowered."""
        try:
            return super().__dask_graph__()
        except NotImplementedError:
            return {}
