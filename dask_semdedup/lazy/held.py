"""What scores hold: duplicates up to which eps, by which rule, and of how many rows. No other code decides this.

It is read off the graph: where scores are searched for, filtered, or read from files that say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import dask.dataframe as dd
import numpy as np
import pyarrow as pa

from dask_semdedup._dask import GE, GT, And, AnyExpr, AsType, Filter, Len, Literal, Projection
from dask_semdedup.errors import DataReadError, InvalidArgumentError, some
from dask_semdedup.frames.columns import SCORE_COLUMN
from dask_semdedup.lazy.join import Plan
from dask_semdedup.lazy.pushdown import Searched
from dask_semdedup.lazy.sources import reader_of
from dask_semdedup.steps.duplicates import check_eps, threshold

__all__ = ["Held", "check_held", "held", "with_note"]

# The key of the note in a Parquet schema's metadata.
NOTE = b"dask_semdedup.scores"


@dataclass(frozen=True)
class Held:
    """What scores hold that are not those of all rows.

    Parameters
    ----------
    eps : float
        The eps up to which they hold all duplicates.
    duplicate_of : {"any", "kept"}
        The rule. By "kept", they hold for this eps only.
    rows : int or None
        The number of rows that were compared, if it is known.
    """

    eps: float
    duplicate_of: str = "any"
    rows: int | None = None

    def holds(self, eps: float) -> bool:
        """Return whether the duplicates at an eps are known."""
        asked, known = threshold(eps), threshold(self.eps)
        return bool(asked == known if self.duplicate_of == "kept" else asked >= known)


def held(scores: Any) -> Held | None:
    """Return what a frame of scores holds, or None if it is those of all rows, or in memory, where it does not tell."""
    if not isinstance(scores, dd.DataFrame):
        return None
    limits: list[float] = []
    rules: set[str] = set()
    rows: list[int | None] = []
    seen: set[str] = set()
    stack: list[AnyExpr] = [scores.expr]
    while stack:
        expr = stack.pop()
        if expr._name in seen or not _has_scores(expr):
            continue
        seen.add(expr._name)
        if isinstance(expr, Searched):  # What is below are the rows, which may be left of another search.
            rows.append(_rows_of(expr))
            if expr.options.at_least is not None:
                limits.append(expr.options.at_least)
                rules.add(expr.options.duplicate_of)
            continue
        if (reader := reader_of(expr)) is not None and NOTE in (reader.schema.metadata or {}):
            stored = _stored(reader.schema.metadata[NOTE], reader.root)
            limits.append(threshold(stored.eps))
            rules.add(stored.duplicate_of)
            rows.append(stored.rows)
        if isinstance(expr, Filter):
            limits += _lowest(expr.predicate)
        stack += expr.dependencies()
    if not limits:
        return None
    return Held(_eps_of(max(limits)), "kept" if "kept" in rules else "any", rows[0] if len(rows) == 1 else None)


def check_held(scores: Any, eps: Iterable[float]) -> None:
    """Raise `InvalidArgumentError` if scores are known not to hold all duplicates at one of these eps."""
    known = held(scores)
    if known is None or not (lacking := [value for value in eps if not known.holds(value)]):
        return
    if known.duplicate_of == "kept":
        what, advice = f"Scores of duplicate_of='kept' hold for eps = {known.eps} only", "the other eps"
    else:
        what, advice = f"Scores hold duplicates up to eps = {known.eps} only", "a larger eps"
    raise InvalidArgumentError(f"{what}, not at {some(lacking)}. Search again with {advice}.", parameters=["eps"])


def with_note(schema: pa.Schema, ddf: dd.DataFrame) -> pa.Schema:
    """Return the schema of files of a frame with a note in its metadata of what scores it holds."""
    metadata = {key: value for key, value in (schema.metadata or {}).items() if key != NOTE}
    if (known := held(ddf)) is not None:
        metadata[NOTE] = json.dumps(vars(known)).encode()
    return schema.with_metadata(metadata or None)


def _stored(note: bytes, path: str) -> Held:
    """Return what files say of their scores."""
    try:
        stored = Held(**json.loads(note))
        check_eps(stored.eps)
        return stored
    except (TypeError, ValueError) as error:
        raise DataReadError(
            f"The schema of files in {path} says in {NOTE.decode()!r} which scores they hold, and is damaged: "
            f"{note[:80]!r}. Write the scores again.",
            parameters=["path"],
        ) from error


def _has_scores(expr: AnyExpr) -> bool:
    try:
        meta = expr._meta
    except (AttributeError, NotImplementedError):  # It is no frame's.
        return False
    return SCORE_COLUMN in getattr(meta, "columns", [getattr(meta, "name", None)])


def _rows_of(scores: Searched) -> int | None:
    """Return how many rows were compared, if that is known without reading them."""
    if isinstance(plan := getattr(scores, "plan", None), Plan):
        return plan.rows - plan.other_rows or None
    frame = getattr(scores, "frame", None)  # None once Dask has optimised what reads files and searches.
    counted = None if frame is None else Len(frame).simplify()
    return int(counted.value) if isinstance(counted, Literal) else None


def _lowest(predicate: Any) -> list[float]:
    """Return the scores that a filter demands at least."""
    if isinstance(predicate, And):
        return [*_lowest(predicate.left), *_lowest(predicate.right)]
    if not isinstance(predicate, (GE, GT)) or not isinstance(predicate.right, Real):
        return []
    column = predicate.left.frame if isinstance(predicate.left, AsType) else predicate.left
    is_score = isinstance(column, Projection) and column.operand("columns") == SCORE_COLUMN
    return [float(predicate.right)] if is_score else []


def _eps_of(score: float) -> float:
    """Return the shortest eps with a threshold, which is the one that was asked for."""
    rounded = np.float32(score)
    tried = (float(f"{1 - float(rounded):.{digits}g}") for digits in range(1, 18))
    return next(eps for eps in tried if threshold(eps) == rounded)
