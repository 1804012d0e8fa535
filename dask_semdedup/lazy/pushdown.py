"""The lowest score that a graph needs: if scores are only filtered, lower ones need not be searched for.

A search with `at_least` gives rows that reach it the same scores and neighbours, bit for bit, and all others the score
0 and their own id. Ids, clusters, and the number and order of rows stay the same. So any filter by a threshold of
`at_least` or more selects the same rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from dask_semdedup._dask import (
    GE,
    GT,
    And,
    AnyExpr,
    Binop,
    Blockwise,
    Expr,
    Filter,
    Index,
    Isin,
    OwnExpr,
    Projection,
    Unaryop,
)
from dask_semdedup.frames.columns import SCORE_COLUMN

__all__ = ["OfDuplicates", "Searched", "lowest_score"]

# The columns of scores whose values a search with `at_least` changes, where they do not reach it.
CHANGED = {"max_id", SCORE_COLUMN}


class OfDuplicates(OwnExpr, Blockwise):
    """A function of each partition of scores that needs only the ids of rows with a score below `at_least`."""

    _parameters = ["frame", "function", "argument", "at_least"]  # noqa: RUF012

    @staticmethod
    def operation(frame: Any, function: Any, argument: Any, _at_least: float) -> Any:
        return function(frame, argument)

    @functools.cached_property
    def _name(self) -> str:
        return f"{self.function.__name__.strip('_')}-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return self.function(self.frame._meta, self.argument)

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (self.frame.npartitions + 1)


class Searched(OwnExpr):
    """Scores of a search with `SearchOptions`, only as low as the graph needs them."""

    def _simplify_up(self, parent: Expr, dependents: dict[str, Any]) -> AnyExpr | None:
        at_least = None if self.options.at_least else lowest_score(self, parent, dependents)
        if at_least is None:
            return super()._simplify_up(parent, dependents)
        return parent.substitute(self, self.with_at_least(at_least))

    def with_at_least(self, at_least: float | None) -> AnyExpr:
        """Return these scores as another search finds them."""
        return self.substitute_parameters({"options": replace(self.options, at_least=at_least)})


def lowest_score(scores: Searched, parent: AnyExpr, dependents: Mapping[str, Any]) -> float | None:
    """Return the lowest score that the expressions above scores need.

    Parameters
    ----------
    scores : Searched
        Scores of all rows.
    parent : Expr
        Expression whose scores are to be replaced. If Dask has just made it, its purpose may not be known yet; then it
        waits for Dask's next pass.
    dependents : mapping
        Dependents of each expression, by its name.

    Returns
    -------
    float or None
        A float32 above 0 and up to 1, or None if the scores of all rows are needed.
    """
    lowest = []
    seen: set[str] = set()
    stack: list[AnyExpr] = [scores]
    while stack:
        above = [expr for ref in dependents.get(stack.pop()._name, ()) if (expr := ref()) is not None]
        if not above:
            return None  # It is what is asked for.
        for expr in above:
            if expr._name in seen:
                continue
            seen.add(expr._name)
            if (score := _score_needed(expr, scores)) is not None:
                lowest.append(score)
            elif not _is_unchanged(expr):
                if not isinstance(expr, (Projection, Binop, Unaryop, Isin)):
                    return None  # It may need any row.
                stack.append(expr)
    found = _as_float32(min(lowest, default=0))
    return found if 0 < found <= 1 and (parent._name in seen or _is_unchanged(parent)) else None


def _is_unchanged(expr: AnyExpr) -> bool:
    """Return whether an expression selects only what does not depend on the search: ids, clusters or the index."""
    return isinstance(expr, Index) or (isinstance(expr, Projection) and CHANGED.isdisjoint(expr.columns))


def _score_needed(expr: AnyExpr, scores: Searched) -> float | None:
    """Return the lowest score whose rows an expression needs, or None if it needs more of lower ones."""
    if isinstance(expr, OfDuplicates):
        return float(expr.at_least)
    if isinstance(expr, Filter):
        return _score_needed(expr.predicate, scores)
    if isinstance(expr, And):
        # Where one side is False, the other side does not matter.
        sides = [_score_needed(side, scores) for side in (expr.left, expr.right) if isinstance(side, AnyExpr)]
        return min((score for score in sides if score is not None), default=None)
    if not isinstance(expr, (GE, GT)) or not isinstance(expr.right, Real):
        return None
    searched = _searched(expr.left)
    if searched is None or searched.with_at_least(None)._name != scores._name:
        return None
    # What has been found of the same scores for this column is enough for all.
    return float(searched.options.at_least or expr.right)


def _searched(column: Any) -> Searched | None:
    """Return the scores of which this is the score column, or None for any other expression."""
    if not isinstance(column, Projection) or column.operand("columns") != SCORE_COLUMN:
        return None
    while isinstance(column, Projection):
        column = column.frame
    return column if isinstance(column, Searched) else None


def _as_float32(score: float) -> float:
    """Return the float32 next to a score that is not above it: to pandas either of the two may be the threshold."""
    rounded = np.float32(score)
    return float(rounded if float(rounded) <= score else np.nextafter(rounded, np.float32(-1)))
