"""What scores hold: duplicates up to which eps, by which rule, and of how many rows.

It is read off the graph: where scores are searched for, filtered by scores, or read from one folder whose files say so.
Where anything else has been done to scores, as where they were persisted, their frames still tell the eps and the rule,
in what pandas and cuDF pass on as `attrs`. Scores of all rows show by themselves that they are: the row that ranks
first, of all rows or of a cluster, is compared with none and has the score 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import dask.dataframe as dd
import numpy as np
import pyarrow as pa
from dask.dataframe.api import new_collection

from dask_semdedup._dask import (
    GE,
    GT,
    And,
    AnyExpr,
    ArrowStringConversion,
    AsType,
    Blockwise,
    Filter,
    Len,
    Literal,
    OwnExpr,
    Projection,
    Repartition,
    ResetIndex,
)
from dask_semdedup.errors import DataReadError, InvalidArgumentError, some
from dask_semdedup.frames.columns import DUPLICATE_OF, SCORE_COLUMN
from dask_semdedup.lazy.join import Plan
from dask_semdedup.lazy.pushdown import Searched
from dask_semdedup.lazy.sources import is_one_folder, reader_of
from dask_semdedup.steps.duplicates import DEFAULT_EPS, check_eps, threshold

__all__ = ["Held", "check_held", "eps_of", "held", "noted", "with_note"]

# The key of the note in a Parquet schema's metadata.
NOTE = b"dask_semdedup.scores"

# That of the note in the `attrs` of frames.
IN_ATTRS = "dask_semdedup.scores"

# The largest cosine distance, and the least score of files that do not tell theirs.
MAX_EPS, UNKNOWN = 2.0, -math.inf


@dataclass(frozen=True)
class Held:
    """What scores hold.

    Parameters
    ----------
    eps : float
        The eps up to which they hold all duplicates; 2 if they are those of all rows.
    duplicate_of : {"any", "kept"}
        The rule. By "kept", they hold for this eps only.
    rows : int or None
        The number of rows that were compared, if it is known and there are scores of some of them only.
    """

    eps: float
    duplicate_of: str = "any"
    rows: int | None = None

    @property
    def is_all(self) -> bool:
        """Whether there is a score of each row."""
        return self.eps == MAX_EPS

    def holds(self, eps: float) -> bool:
        """Return whether the duplicates at an eps are known."""
        asked, known = threshold(eps), threshold(self.eps)
        return bool(asked == known if self.duplicate_of == "kept" else asked >= known)


def held(scores: Any) -> Held | None:
    """Return what a frame of scores holds, or None if that is not known."""
    if not isinstance(scores, dd.DataFrame):
        return _in_attrs(scores)
    expr: AnyExpr = scores.expr
    limits: list[float] = []
    is_whole = True
    while (known := _origin(expr)) is None:
        if isinstance(expr, Filter):
            lowest = _lowest(expr.predicate)
            limits += [limit for limit in lowest if limit is not None]
            is_whole &= None not in lowest
        elif not isinstance(expr, (Noted, Projection, ResetIndex, Repartition, ArrowStringConversion)):
            known = _limits(_in_attrs(expr._meta))
            break
        expr = expr.frame
    limit, duplicate_of, rows = known
    if duplicate_of == "any":  # Rows that another rule would keep are not told by a filter.
        limit = max([limit, *limits])
    if limit <= -1:
        return None if limit == UNKNOWN else Held(MAX_EPS)
    return Held(_eps_of(limit), duplicate_of, rows if is_whole else None)


def scores_up_to(frame: Any, eps: float, duplicate_of: str) -> Any:
    """Return a frame or column of scores whose `attrs` tell what they hold."""
    told = frame.copy(deep=False)
    told.attrs[IN_ATTRS] = {"eps": eps, "duplicate_of": duplicate_of}
    return told


class Noted(OwnExpr, Blockwise):
    """Scores up to an eps, whose frames tell it in their `attrs`."""

    _parameters = ["frame", "eps", "duplicate_of"]  # noqa: RUF012
    _projection_passthrough = True
    _preserves_partitioning_information = True

    operation = staticmethod(scores_up_to)


def noted(scores: dd.DataFrame) -> dd.DataFrame:
    """Return scores whose frames tell what they hold, unless they are those of all rows."""
    known = held(scores)
    if known is None or known.is_all:
        return scores
    return new_collection(Noted(scores.expr, known.eps, known.duplicate_of))


def _in_attrs(frame: Any) -> Held | None:
    """Return what a frame of pandas or cuDF tells of its scores."""
    note = getattr(frame, "attrs", {}).get(IN_ATTRS)
    return None if note is None else Held(**note)


def eps_of(scores: Any) -> float:
    """Return the eps of scores that were searched for up to one, or the default one for all others."""
    known = held(scores)
    return DEFAULT_EPS if known is None or known.is_all else known.eps


def _origin(expr: AnyExpr) -> tuple[float, str, int | None] | None:
    """Return the least score, the rule and the number of rows where scores come from; None of any other expression."""
    if isinstance(expr, Searched):
        at_least = expr.options.at_least
        return -1 if at_least is None else at_least, expr.options.duplicate_of, _rows_of(expr)
    if (reader := reader_of(expr)) is None:
        return None
    note = (reader.schema.metadata or {}).get(NOTE)
    return _limits(None if note is None or not is_one_folder(expr) else _stored(note, reader.root))


def _limits(noted: Held | None) -> tuple[float, str, int | None]:
    """Return the least score, the rule and the number of rows of a note."""
    return (UNKNOWN, "any", None) if noted is None else (threshold(noted.eps), noted.duplicate_of, noted.rows)


def check_held(scores: Any, eps: Iterable[float]) -> None:
    """Raise `InvalidArgumentError` if scores are known not to hold all duplicates at one of these eps."""
    known = held(scores)
    if known is None or not (lacking := [value for value in eps if not known.holds(value)]):
        return
    if known.duplicate_of == "kept":
        what = f"Scores of duplicate_of='kept' hold for eps = {known.eps} only"
        advice = "Pass that eps, or search with duplicate_of='any', whose scores hold for all smaller eps."
    else:
        what = f"These scores hold duplicates only up to eps = {known.eps}"
        advice = "Search again with a larger eps."
    raise InvalidArgumentError(f"{what}, not at {some(lacking)}. {advice}", parameters=["eps"])


def with_note(schema: pa.Schema, ddf: dd.DataFrame) -> pa.Schema:
    """Return the schema of files of a frame with a note in its metadata of what scores it holds."""
    metadata = {key: value for key, value in (schema.metadata or {}).items() if key != NOTE}
    if (known := held(ddf)) is not None:
        metadata[NOTE] = json.dumps(vars(known)).encode()
    return schema.with_metadata(metadata or None)


def _stored(note: bytes, path: str) -> Held:
    """Return what files say of their scores."""
    try:
        said = json.loads(note)
        stored = Held(said["eps"], said["duplicate_of"], said["rows"])
        check_eps(stored.eps)
        if stored.duplicate_of in DUPLICATE_OF and isinstance(stored.rows, int | None):
            return stored
    except (TypeError, KeyError, ValueError):
        pass
    raise DataReadError(
        f"The schema of files in {path} says in {NOTE.decode()!r} which scores they hold, and is damaged: "
        f"{note[:80]!r}. Write the scores again.",
        parameters=["path"],
    )


def _rows_of(scores: Searched) -> int | None:
    """Return how many rows were compared, if that is known without reading them."""
    if isinstance(plan := getattr(scores, "plan", None), Plan):
        return plan.rows - plan.other_rows or None  # Where all rows are searched in any case, they are not counted.
    frame = getattr(scores, "frame", None)  # None once Dask has optimised what reads files and searches.
    counted = None if frame is None else Len(frame).simplify()
    return int(counted.value) if isinstance(counted, Literal) else None


def _lowest(predicate: Any) -> list[float | None]:
    """Return the scores that a filter demands at least, and None for what it demands otherwise."""
    if isinstance(predicate, And):
        return [*_lowest(predicate.left), *_lowest(predicate.right)]
    if not isinstance(predicate, (GE, GT)) or not isinstance(predicate.right, Real):
        return [None]
    column = predicate.left.frame if isinstance(predicate.left, AsType) else predicate.left
    is_score = isinstance(column, Projection) and column.operand("columns") == SCORE_COLUMN
    # No score is beyond 1, or not a number.
    return [min(float(predicate.right), 1.0)] if is_score and not math.isnan(predicate.right) else [None]


def _eps_of(score: float) -> float:
    """Return the shortest eps with a threshold, which is the one that was asked for."""
    rounded = np.float32(score)
    tried = (float(f"{1 - float(rounded):.{digits}g}") for digits in range(1, 18))
    return next(eps for eps in tried if threshold(eps) == rounded)
