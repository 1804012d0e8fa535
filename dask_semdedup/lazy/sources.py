"""Sources of lazy frames: the readers and the tasks that make their partitions, and what these know about columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dask.dataframe as dd
import pyarrow as pa
from dask.dataframe.api import new_collection
from dask.typing import Key

from dask_semdedup._dask import AnyExpr, Expr, FromMap, GraphNode, Lengths, Projection, Task
from dask_semdedup.errors import DataReadError, MissingColumnsError
from dask_semdedup.io.fragments import Fragment
from dask_semdedup.io.reader import Reader
from dask_semdedup.io.scan import COLUMNS_ADVICE
from dask_semdedup.io.schemas import range_index_of, refuse
from dask_semdedup.lazy.expressions import ReadClusters
from dask_semdedup.lazy.tables import ReadPart
from dask_semdedup.steps.ranking import RankingStrategy

__all__ = [
    "by_itself",
    "bytes_in_footers",
    "chains_of",
    "check_sources",
    "is_one_folder",
    "lengths_in_footers",
    "paths_of",
    "reader_of",
    "readers_of",
    "refuse_lacking",
    "refuse_range_index",
    "stored_schema",
]


def readers_of(ddf: dd.DataFrame) -> Iterator[Reader]:
    """Yield the readers of Parquet files that a frame comes from."""
    for kind in (ReadClusters, FromMap):
        found = map(reader_of, ddf.expr.find_operations(kind))
        yield from (reader for reader in found if reader is not None)


def reader_of(expr: AnyExpr) -> Reader | None:
    """Return the reader of Parquet files of an expression that reads them, and None of any other."""
    if isinstance(expr, ReadClusters):
        return expr.source.reader
    reader = expr.func.reader if isinstance(expr, FromMap) and isinstance(expr.func, ReadPart) else None
    return reader if isinstance(reader, Reader) else None


def is_one_folder(expr: AnyExpr) -> bool:
    """Return whether an expression that reads Parquet files reads all files of one folder, as one call writes them."""
    if isinstance(expr, ReadClusters):
        return True
    partitions = expr.iterables[0]
    folders = {piece.path.rpartition("/")[0] for pieces in partitions for piece in pieces}
    # Files without rows are in no partition.
    return folders <= {expr.func.reader.root} and len(expr._partitions) == len(partitions)


def paths_of(ddf: dd.DataFrame) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the paths that a frame of `read_table` comes from, each with its storage options."""
    functions = (read.func for read in ddf.expr.find_operations(FromMap))
    for read in functions:
        if isinstance(read, ReadPart):
            yield from ((path, read.storage_options) for path in read.paths)


def lengths_in_footers(ddf: dd.DataFrame) -> list[int] | None:
    """Return the rows of each partition, if they are those of Parquet files as `read_table` reads them."""
    partitions = _fragments(ddf)
    return None if partitions is None else [sum(piece.rows for piece in pieces) for pieces in partitions]


def bytes_in_footers(ddf: dd.DataFrame) -> int | None:
    """Return the uncompressed bytes of all columns of those files, even if the frame has fewer columns."""
    partitions = _fragments(ddf)
    return None if partitions is None else sum(piece.nbytes for pieces in partitions for piece in pieces)


def _fragments(ddf: dd.DataFrame) -> list[Sequence[Fragment]] | None:
    """Return what each partition is read from, if its rows are those of Parquet files as `read_table` reads them."""
    expr: AnyExpr = Lengths(ddf.expr).simplify()
    # Dask sees through what keeps the rows.
    while isinstance(expr, (Lengths, Projection)):
        expr = expr.frame
    if not isinstance(expr, FromMap) or not isinstance(expr.func, ReadPart) or not isinstance(expr.func.reader, Reader):
        return None
    return [expr.iterables[0][number] for number in expr._partitions]


def stored_schema(ddf: dd.DataFrame) -> pa.Schema:
    """Return the schema of the files that most columns of a frame come from, or an empty one without files."""
    schemas = [pa.schema([]), *(reader.schema for reader in readers_of(ddf))]
    return max(schemas, key=lambda schema: len(set(schema.names).intersection(ddf.columns)))


def check_sources(ddf: dd.DataFrame, columns: Sequence[str], ranking: RankingStrategy | None = None) -> None:
    """Raise, before anything runs, if the files of a frame do not allow to read or rank by these columns.

    A column with the name and dtype of a column in the files is assumed to be that column.

    Raises
    ------
    DataReadError
        If files disagree about a column.
    InvalidArgumentError
        If the order of categories to rank by is lost.
    """
    for reader in readers_of(ddf):
        doubtful = [name for name in reader.schema.names if name in reader.problems or name in reader.unordered]
        dtypes = reader.meta(doubtful).dtypes
        same = {name for name in doubtful if name in ddf.columns and ddf._meta.dtypes[name] == dtypes[name]}
        refuse(reader.problems, same.intersection(columns), COLUMNS_ADVICE)
        if ranking is not None:
            ranking.check_order(reader.unordered & same)


def refuse_range_index(ddf: dd.DataFrame, id_field: str) -> None:
    """Raise if files of a frame hold ids, which are no column, only as a range that pandas makes its index.

    Raises
    ------
    MissingColumnsError
        With how to write them as a column.
    """
    if any(range_index_of(reader.schema) == id_field for reader in readers_of(ddf)):
        raise MissingColumnsError(
            f"{id_field!r} is no column of the files: pandas has written it as an index, a range of numbers in their "
            "metadata. Make it a column of each file: "
            "pandas.read_parquet(path).reset_index().to_parquet(path, index=False).",
            parameters=["id_field"],
            columns=[id_field],
        )


def refuse_lacking(ddf: dd.DataFrame, columns: Sequence[str]) -> None:
    """Raise, before anything runs, if some files of a frame lack a column that every row needs.

    Raises
    ------
    DataReadError
        With the column and a file.
    """
    for reader in readers_of(ddf):
        for name in set(columns).intersection(ddf.columns, reader.lacking):
            raise DataReadError(
                f"{reader.lacking[name]} has no values in column {name!r}, which other files have. If the column has "
                "another name there, rename it; or leave the file out.",
                columns=[name],
            )


def by_itself(ddf: dd.DataFrame) -> dd.DataFrame:
    """Return a frame whose projections are pushed down now, as if nothing else needed its source.

    Otherwise Dask reads the columns of all who need the source, once, and holds them in memory until the last is done.
    And where it optimises a graph a second time, as `itertuples` does, it would push them down then, under new names.
    """
    return new_collection(ddf.expr.simplify())


def chains_of(frame: Expr) -> list[list[Any]]:
    """Return for each partition the tasks that make it from nothing; none if it is there already, or made with others.

    Partitions are read twice by these, and need not be held in between.
    """
    graph = frame.__dask_graph__()
    chains = []
    for number in range(frame.npartitions):
        chain: dict[Key, Any] = {}
        stack: list[Key] = [(frame._name, number)]
        while stack:
            key = stack.pop()
            if key not in chain:
                chain[key] = node = graph[key]
                # What is persisted stands there as it is.
                stack.extend(node.dependencies if isinstance(node, GraphNode) else ())
        chains.append(chain)
    uses = Counter(key for chain in chains for key in chain)
    are_own = [all(uses[key] == 1 and isinstance(node, Task) for key, node in chain.items()) for chain in chains]
    return [list(chain.values()) if is_own else [] for chain, is_own in zip(chains, are_own, strict=True)]
