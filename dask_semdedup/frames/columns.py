"""Columns: names given by users, which are checked once, and names that the package makes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dask_semdedup._validate import check_choice, check_name, check_positive
from dask_semdedup.device.devices import DEVICES
from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError, some
from dask_semdedup.frames.backend import check_plain_dtype
from dask_semdedup.frames.embeddings import JOINED_IN_DASK, check_embedding_dtype, dimensions_advice

__all__ = [
    "DISTANCE_COLUMNS",
    "SCORE_COLUMN",
    "SCORE_COLUMNS",
    "Columns",
    "SearchOptions",
    "unique_columns",
]

SCORE_COLUMN = "cosine_sim_score"
SCORE_COLUMNS = ("id", "max_id", SCORE_COLUMN)
# Distances to the centroid, by metric.
DISTANCE_COLUMNS = {"cosine": "cosine_dist_to_cent", "l2": "l2_dist_to_cent"}
# As in `dask_semdedup.search`, which needs torch: that takes seconds to import.
COMPUTE_DTYPES = ("auto", "float32", "float16", "bfloat16")
DUPLICATE_OF = ("any", "kept")
# What columns hold, by the attribute of `Columns`.
HELD = {"id": "ids", "embedding": "embeddings", "cluster": "clusters"}
MAKE_IDS = (
    " If the rows have no ids, make some: read_table(..., make_ids=True), or in pandas frame.reset_index(names='id')."
)


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold ids, embeddings and clusters.

    Parameters
    ----------
    id, embedding, cluster : str
        Values of the parameters `id_field`, `embedding_field` and `cluster_field`.
    """

    id: str = "id"
    embedding: str = "embeddings"
    cluster: str = "centroid"

    def __post_init__(self) -> None:
        for attribute in HELD:
            check_name(f"{attribute}_field", getattr(self, attribute))

    def require(
        self,
        present: Iterable[Any],
        *held: str,
        where: str = "",
        parameter: str | None = None,
        joined: str = JOINED_IN_DASK,
    ) -> None:
        """Raise unless columns are present.

        Parameters
        ----------
        present : iterable of str
            Columns that are present.
        *held : {"id", "embedding", "cluster"}
            Columns that are needed.
        where : str
            Place of the columns for the message, such as " in a.parquet".
        parameter : str, optional
            The parameter that names a single column, if it is another.
        joined : str
            How to join columns that look like the dimensions of embeddings: see `dimensions_advice`.

        Raises
        ------
        MissingColumnsError
            If one is missing.
        InvalidArgumentError
            If two columns of scores would have the same name.
        """
        present, names = list(present), [getattr(self, attribute) for attribute in held]
        if not set(names) <= set(present):
            missing = [attribute for attribute in held if getattr(self, attribute) not in present]
            parameters = [parameter or f"{attribute}_field" for attribute in missing]
            contents = _listed(HELD[attribute] for attribute in missing)
            advice = f"Name the column{'s' * (len(missing) > 1)} of {contents}{where} as {_listed(parameters)}."
            if "embedding" in missing and set(SCORE_COLUMNS) <= set(present):
                advice = "These are scores: call the method on the frame of the embeddings."
            if "id" in missing:
                advice += MAKE_IDS
            if "embedding" in missing:
                advice += dimensions_advice(present, self.embedding, joined)
            raise MissingColumnsError.build(names, present, advice, parameters=parameters)
        if "cluster" in held and self.cluster in SCORE_COLUMNS:
            raise InvalidArgumentError(
                f"cluster_field may not be {self.cluster!r}: scores have a column of that name.",
                parameters=["cluster_field"],
                columns=[self.cluster],
            )

    def check_dtypes(self, meta: Any, *held: str, embedding_dim: int | None = None) -> None:
        """Raise unless the dtypes of columns can hold ids, embeddings and clusters.

        Parameters
        ----------
        meta : pandas.DataFrame or cudf.DataFrame
            A frame of these dtypes, which may be empty.
        *held : {"id", "embedding", "cluster"}
            Columns to check.
        embedding_dim : int, optional
            Length of the embeddings.

        Raises
        ------
        EmbeddingError, InvalidArgumentError
            With the column and its dtype.
        """
        for attribute in held:
            column = meta[getattr(self, attribute)]
            if attribute == "embedding":
                check_embedding_dtype(column, self.embedding, embedding_dim)
            else:
                check_plain_dtype(column, f"{attribute}_field")


@dataclass(frozen=True)
class SearchOptions:
    """Options of a comparison of rows.

    Parameters
    ----------
    compute_dtype, batch_size, at_least
        As in `dask_semdedup.search.nearest_earlier`.
    embedding_dim : int, optional
        The length that every embedding must have.
    device : {"auto", "cpu", "cuda"}
        Device that does the work. "auto" is the device of the frame, or a GPU if there is one and enough work for it.
    duplicate_of : {"any", "kept"}
        Whether rows are compared with all rows that are preferred over them, or only with kept ones: with `at_least`,
        rows that are not that similar to a kept row.

    Raises
    ------
    InvalidArgumentError
        If an option is invalid.
    """

    compute_dtype: str = "auto"
    batch_size: int | None = None
    embedding_dim: int | None = None
    device: str = "auto"
    at_least: float | None = None
    duplicate_of: str = "any"

    def __post_init__(self) -> None:
        check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        check_choice("device", self.device, DEVICES)
        check_choice("duplicate_of", self.duplicate_of, DUPLICATE_OF)
        check_positive("embedding_dim", self.embedding_dim)
        check_positive("pairwise_batch_size", self.batch_size)


def unique_columns(frame: Any) -> list[Any]:
    """Return the names of a frame's columns, or raise if two columns have the same name."""
    columns = frame.columns
    if not columns.is_unique:
        repeated = list(columns[columns.duplicated()].unique())
        raise InvalidArgumentError(
            f"Several columns have one name: {some(map(repr, repeated))}. Rename them.", columns=repeated
        )
    return list(columns)


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
