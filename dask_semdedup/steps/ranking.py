"""The order of preference within a cluster: every row is compared with the rows ranked before it."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dask_semdedup._validate import check_choice, check_seed
from dask_semdedup.device.streams import current_stream, default_stream, finish
from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError
from dask_semdedup.frames.backend import is_cudf
from dask_semdedup.frames.categories import is_ordered, one_order
from dask_semdedup.frames.columns import DISTANCE_COLUMNS
from dask_semdedup.frames.hashing import hash_ids
from dask_semdedup.frames.ids import as_stored

__all__ = ["RankingStrategy", "check_strategy", "choose_strategy", "make_strategy"]

WHICH_TO_KEEP = ("hard", "easy", "random")

STRATEGIES = ("sort", "random")


@dataclass
class RankingStrategy:
    """The order of preference of rows that are compared.

    Parameters
    ----------
    metadata_cols : list of str
        Columns to sort by, the most important first. ``strategy="random"`` ignores them.
    ascending : bool or list of bool, default True
        Whether small values are preferred, for all columns or for each.
    strategy : {"sort", "random"}, default "sort"
        Sort by columns, or shuffle.
    random_seed : int, default 42
        Seed of ``strategy="random"``. The shuffle depends only on the seed and the ids, not on the order of rows, the
        partitions or the backend.

    Raises
    ------
    InvalidArgumentError
        If there are no columns to sort by, or `ascending` has another length; if an unknown strategy is used.

    Notes
    -----
    Missing values rank last, regardless of `ascending`. Rows that tie in all columns rank by ascending id. Ids should
    be unique among the rows that are compared. Rows that tie in the id too keep the order of the input.

    Examples
    --------
    >>> frame = pd.DataFrame({"id": [1, 2, 3], "score": [0.5, 0.9, 0.5]})
    >>> RankingStrategy(["score"], ascending=False).rank_cluster(frame)["id"].tolist()
    [2, 1, 3]
    """

    metadata_cols: list[str]
    ascending: bool | list[bool] = True
    strategy: str = "sort"
    random_seed: int = 42

    def __post_init__(self) -> None:
        self.metadata_cols = [self.metadata_cols] if isinstance(self.metadata_cols, str) else list(self.metadata_cols)
        one = self.ascending
        given = list(one) if isinstance(one, Iterable) else [one] * len(self.metadata_cols)
        if not all(isinstance(value, bool | np.bool_) for value in given):
            raise InvalidArgumentError(
                f"ascending must be True or False, or a list of them, one for each column, not {one!r}.",
                parameters=["ascending"],
            )
        self.ascending = [bool(value) for value in given]
        if len(self.ascending) != len(self.metadata_cols):
            raise InvalidArgumentError(
                f"Length of ascending ({len(self.ascending)}) must match that of metadata_cols "
                f"({len(self.metadata_cols)}: {self.metadata_cols}).",
                parameters=["ascending"],
            )
        if self.strategy == "sort" and not self.metadata_cols:
            raise InvalidArgumentError(
                "metadata_cols is empty: name a column to sort by, or use strategy='random'.",
                parameters=["metadata_cols"],
            )

    @classmethod
    def metadata_based(
        cls, metadata_cols: list[str], ascending: bool | list[bool] = True, random_seed: int = 42
    ) -> RankingStrategy:
        """Rank by columns of metadata: rows with small values are preferred, or with large ones if not `ascending`.

        Examples
        --------
        >>> RankingStrategy.metadata_based(["quality", "length"], ascending=[False, True]).required_columns
        ['quality', 'length']
        """
        return cls(metadata_cols, ascending, "sort", random_seed)

    @classmethod
    def random(cls, random_seed: int = 42) -> RankingStrategy:
        """Rank by a shuffle that depends only on the seed and the ids.

        Examples
        --------
        >>> frame = pd.DataFrame({"id": ["a", "b", "c", "d"]})
        >>> shuffled = RankingStrategy.random(7).rank_cluster(frame)
        >>> shuffled.equals(RankingStrategy.random(7).rank_cluster(frame[::-1]))
        True
        """
        return cls([], True, "random", random_seed)

    @property
    def required_columns(self) -> list[str]:
        """Columns that ranking reads besides the ids."""
        return list(dict.fromkeys(self.metadata_cols)) if self.strategy == "sort" else []

    def check_columns(self, present: Iterable[str], embedding_field: str | None = None) -> None:
        """Raise unless the columns to rank by are among `present`.

        Parameters
        ----------
        present : iterable of str
            The columns of the frame.
        embedding_field : str, optional
            Column of embeddings, which have no order.

        Raises
        ------
        MissingColumnsError
            With the missing columns, the present ones, and what to do.
        InvalidArgumentError
            If the column of embeddings is one to rank by.

        Examples
        --------
        >>> RankingStrategy(["score"]).check_columns(["id", "score"])
        """
        if embedding_field in self.required_columns:
            raise InvalidArgumentError(
                f"Rows cannot be ranked by {embedding_field!r}, the column of embeddings. Rank by columns of numbers, "
                "texts or times.",
                parameters=["ranking_strategy"],
                columns=[embedding_field],
            )
        present = list(present)
        if set(self.required_columns) <= set(present):
            return
        advice, parameters = "Use existing columns in the ranking strategy.", ["ranking_strategy"]
        if set(self.required_columns) & set(DISTANCE_COLUMNS.values()):
            advice = (
                "Distances to the centroid come from k-means. Without them, rank by a column, with "
                "ranking_strategy=RankingStrategy([column]), or with which_to_keep='random'."
            )
            parameters.append("which_to_keep")
        raise MissingColumnsError.build(self.required_columns, present, advice, parameters=parameters)

    def check_order(self, unordered: Iterable[str]) -> None:
        """Raise if a column to rank by holds ordered categories whose order the files do not define.

        Raises
        ------
        InvalidArgumentError
            With the column, and what to do.

        Examples
        --------
        >>> RankingStrategy(["quality"]).check_order([])
        """
        if lost := sorted(set(self.required_columns).intersection(unordered)):
            raise _no_order(lost[0], "files hold them in different orders, or without one, or not all of them together")

    def rank_cluster(self, frame: Any, id_field: str | None = None) -> Any:
        """Put the rows of one cluster in rank order.

        Parameters
        ----------
        frame : pandas.DataFrame or cudf.DataFrame
            The rows of one cluster.
        id_field : str, optional
            Column of ids, which break ties. By default ``id``. If there is no such column, rows that tie keep their
            order.

        Returns
        -------
        DataFrame
            The same rows with a new index, the most preferred first.

        Raises
        ------
        MissingColumnsError
            If a column to rank by or the column of ids is missing.
        InvalidArgumentError
            If the strategy is unknown, or the values of a column cannot be compared with each other.

        Examples
        --------
        >>> frame = pd.DataFrame({"id": [1, 2, 3], "quality": [0.2, 0.9, 0.2]})
        >>> RankingStrategy(["quality"], ascending=False).rank_cluster(frame)
           id  quality
        0   2      0.9
        1   1      0.2
        2   3      0.2
        """
        if id_field is None and (self.strategy == "random" or "id" in frame.columns):
            id_field = "id"
        return frame.iloc[self.order(frame, cluster_field=None, id_field=id_field)].reset_index(drop=True)

    def order(self, frame: Any, *, cluster_field: str | None, id_field: str | None) -> Any:
        """Return positions that sort a frame by cluster, and each cluster by rank, in one sort.

        Parameters
        ----------
        frame : pandas.DataFrame or cudf.DataFrame
        cluster_field : str or None
            Column of clusters, which ascends in the result. None if all rows are one cluster.
        id_field : str or None
            Column of ids, which break ties. With None, rows that tie keep their order.

        Returns
        -------
        (n,) int64 array
            A NumPy or CuPy array.

        Raises
        ------
        MissingColumnsError
            If a column to rank by or the column of ids is missing.
        InvalidArgumentError
            If the strategy is unknown, or the values of a column cannot be compared with each other.

        Examples
        --------
        >>> frame = pd.DataFrame({"id": [1, 2, 3, 4], "centroid": [1, 0, 1, 0], "score": [0.5, 0.2, 0.6, 0.1]})
        >>> RankingStrategy(["score"]).order(frame, cluster_field="centroid", id_field="id")
        array([3, 1, 0, 2])
        """
        self._check_kind()
        self.check_columns(frame.columns)
        if id_field is not None and id_field not in frame.columns:
            raise MissingColumnsError.build(
                [id_field], frame.columns, "Pass the column of ids as id_field.", parameters=["id_field"]
            )
        clusters = [] if cluster_field is None else [(frame[cluster_field], True)]
        ids = [] if id_field is None else [(frame[id_field], True)]
        keys = [*clusters, *(self._keys(frame) if self.strategy == "sort" else self._shuffled(ids)), *ids]
        return _cudf_order(keys) if is_cudf(frame) else _pandas_order(keys)

    def _check_kind(self) -> None:
        """Raise if `strategy` is unknown: like NeMo Curator, not before it is used."""
        if self.strategy not in STRATEGIES:
            raise InvalidArgumentError(
                f"Invalid strategy: strategy must be one of {', '.join(map(repr, STRATEGIES))}, not {self.strategy!r}.",
                parameters=["ranking_strategy"],
            )

    def _shuffled(self, ids: list[tuple[Any, bool]]) -> list[tuple[Any, bool]]:
        """Return hashes of the ids to sort by."""
        return [(type(column)(hash_ids(column, self.random_seed)), True) for column, _ in ids]

    def _keys(self, frame: Any) -> list[tuple[Any, bool]]:
        """Return the columns to sort by, with their directions."""
        assert isinstance(self.ascending, list)
        return [(frame[name], ascending) for name, ascending in zip(self.metadata_cols, self.ascending, strict=True)]


def make_strategy(
    which_to_keep: str = "hard", sim_metric: str = "cosine", id_field: str = "id", random_seed: int = 42
) -> RankingStrategy:
    """Return the strategy for a value of ``which_to_keep``.

    Parameters
    ----------
    which_to_keep : {"hard", "easy", "random"}
        "hard" prefers rows far from their centroid: descending distance, then descending id. "easy" prefers rows near
        it: ascending distance, then ascending id. "random" shuffles.
    sim_metric : {"cosine", "l2"}
        Whether distances are in the column ``cosine_dist_to_cent`` or ``l2_dist_to_cent``.
    id_field : str
        Column of ids.
    random_seed : int
        Seed of "random".

    Raises
    ------
    InvalidArgumentError
        If `which_to_keep` or `sim_metric` has another value.
    """
    check_choice("which_to_keep", which_to_keep, WHICH_TO_KEEP)
    check_choice("sim_metric", sim_metric, tuple(DISTANCE_COLUMNS))
    if which_to_keep == "random":
        return RankingStrategy.random(random_seed)
    return RankingStrategy([DISTANCE_COLUMNS[sim_metric], id_field], which_to_keep == "easy", random_seed=random_seed)


def choose_strategy(
    strategy: RankingStrategy | None, which_to_keep: str, sim_metric: str, id_field: str, random_seed: int
) -> RankingStrategy:
    """Return the given strategy, or else the one that the other arguments describe.

    Raises
    ------
    InvalidArgumentError
        As for `check_strategy` and `make_strategy`, and if the seed is not an integer.
    """
    check_seed(random_seed)
    if strategy is None:
        return make_strategy(which_to_keep, sim_metric, id_field, random_seed)
    check_strategy(strategy)
    # The caller's may change later, and what is lazy must not.
    return deepcopy(strategy)


def check_strategy(strategy: object) -> None:
    """Raise unless `ranking_strategy` is a strategy of a known kind.

    Raises
    ------
    InvalidArgumentError
        With how to make one, or the known kinds.
    """
    if not isinstance(strategy, RankingStrategy):
        raise InvalidArgumentError(
            f"ranking_strategy must be a RankingStrategy, such as RankingStrategy(['score']), not {strategy!r}.",
            parameters=["ranking_strategy"],
        )
    strategy._check_kind()


def _cudf_order(keys: list[tuple[Any, bool]]) -> Any:
    """Sort stably by all columns in libcudf. A frame of the keys would take the host several times as long."""
    import cudf
    import pylibcudf as plc
    from pylibcudf.types import NullOrder, Order

    table = plc.Table([_with_nulls(column) for column, _ in keys])
    orders = [Order.ASCENDING if ascending else Order.DESCENDING for _, ascending in keys]
    # What is missing comes last: a descending order turns it round with the rest.
    nulls = [NullOrder.AFTER if ascending else NullOrder.BEFORE for _, ascending in keys]
    positions = plc.sorting.stable_sorted_order(table, orders, nulls, current_stream())
    finish()  # Keys that were made outside are released here.
    return cudf.Series.from_pylibcudf(positions).values.astype(np.int64)


def _with_nulls(column: Any) -> Any:
    """Return a column of libcudf for sorting, in which all missing values are null."""
    import pylibcudf as plc

    is_categorical = type(column.dtype).__name__ == "CategoricalDtype"
    with default_stream("cuda" if is_categorical else "cpu"):
        if is_categorical and not column.cat.ordered:
            column = column.astype(column.cat.categories.dtype)  # whose order does not depend on the partition
        data, _ = column.to_pylibcudf()
        return plc.transform.column_nans_to_nulls(data, current_stream()) if column.dtype.kind == "f" else data


def _pandas_order(keys: list[tuple[pd.Series, bool]]) -> np.ndarray:
    """Sort by the first column, then only the rows that tie by the second, and so on.

    Distances seldom tie, so ids, which may be long strings, are seldom compared.
    """
    order = np.arange(len(keys[0][0]))
    starts = np.zeros(len(order), bool)  # whether a place in the order opens a run of rows that tie so far
    starts[:1] = True
    for column, ascending in keys:
        tied = _tied(starts)
        if len(tied) == 0:
            break
        codes = _sort_codes(column.iloc[order[tied]], ascending)
        within = np.lexsort([*reversed(codes), np.cumsum(starts)[tied]])
        order[tied] = order[tied][within]
        for code in codes:
            code = code[within]
            starts[tied[1:]] |= code[1:] != code[:-1]
    return order


def _tied(starts: np.ndarray) -> np.ndarray:
    """Return the places in the order that tie with others."""
    ends = np.append(starts[1:], True)
    return np.flatnonzero(~(starts & ends))


def _sort_codes(column: pd.Series, ascending: bool) -> list[np.ndarray]:
    """Return arrays of numbers, the most significant first, that ascend in the order of preference."""
    missing, codes = _codes(column)
    if not ascending:
        codes = -codes if codes.dtype.kind == "f" else ~codes
    return [missing, codes] if missing.any() else [codes]


def _codes(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return which values are missing, and numbers in the order of the values."""
    dtype: Any = getattr(column.dtype, "numpy_dtype", column.dtype)
    kind = dtype.kind if isinstance(dtype, np.dtype) else "O"
    if kind == "f":
        values = column.to_numpy(dtype, na_value=np.nan)
        missing = np.isnan(values)
        return missing, np.where(missing, 0, values)
    if kind in "iub":
        missing = column.isna().to_numpy(dtype=bool)
        values = column.to_numpy(dtype, na_value=dtype.type(0)) if missing.any() else column.to_numpy(dtype)
        return missing, values.astype(np.uint8) if kind == "b" else values
    if is_ordered(getattr(column.dtype, "pyarrow_dtype", pa.null())):
        codes = _codes_of_dictionaries(column)
    elif not isinstance(column.dtype, pd.CategoricalDtype):
        codes = _factorized(column, column.name)
    elif column.cat.ordered:
        codes = column.cat.codes.to_numpy()
    else:
        # As the values they are, whose order does not depend on the partition.
        codes = np.append(_factorized(column.cat.categories, column.name), -1)[column.cat.codes]
    return codes < 0, codes


def _codes_of_dictionaries(column: pd.Series) -> np.ndarray:
    """Return the places of Arrow's ordered categories, whose chunks may have different dictionaries; -1 for null."""
    dictionaries = column.array.__arrow_array__()
    order = one_order(chunk.dictionary for chunk in dictionaries.chunks)
    if order is None:
        raise _no_order(column.name, "they stand in different orders, or none holds all of them")
    categories = pa.array(order, dictionaries.type.value_type)
    codes = [
        pc.index_in(chunk.dictionary, categories).take(chunk.indices).fill_null(-1).to_numpy(zero_copy_only=False)
        for chunk in dictionaries.chunks
    ]
    return np.concatenate([np.empty(0, np.int32), *codes])


def _no_order(name: object, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"Column {name!r} holds ordered categories whose order is lost: {why}. Rank by numbers that stand for them, "
        "or write all files with the same categories.",
        parameters=["ranking_strategy"],
        columns=[name],
    )


def _factorized(values: pd.Series | pd.Index, name: object) -> np.ndarray:
    values = as_stored(values)
    try:
        return pd.factorize(values, sort=True)[0]
    except (TypeError, pa.ArrowException) as error:
        raise InvalidArgumentError(
            f"Column {name!r} of dtype {values.dtype} cannot be ranked by: its values have no order. Rank by a column "
            "of numbers, strings or times, all of one type.",
            parameters=["ranking_strategy"],
            columns=[name],
        ) from error
