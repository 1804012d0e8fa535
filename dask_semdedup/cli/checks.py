"""Checks of input whose advice is for a shell, where that of the library is for Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dask_semdedup.cli.steps import is_output_of_run
from dask_semdedup.errors import (
    ClusterError,
    DataNotFoundError,
    EmbeddingError,
    InvalidArgumentError,
    MissingColumnsError,
)
from dask_semdedup.frames.backend import is_string
from dask_semdedup.frames.embeddings import dimensions_advice
from dask_semdedup.io.jsonlines import JSON_SUFFIXES
from dask_semdedup.lazy.sources import readers_of

if TYPE_CHECKING:
    import dask.dataframe as dd


def refuse_run(path: str, storage_options: dict[str, Any], folder: str) -> None:
    """Raise if INPUT is the output of ``run``, all folders of which would be read as one table."""
    if is_output_of_run(path, storage_options):
        raise InvalidArgumentError(
            f"INPUT {path} is the output of 'run', whose folders hold different tables. Name one of them, such as "
            f"{path.rstrip('/')}/{folder}."
        )


def refuse_strings(ddf: dd.DataFrame, embedding_field: str, path: str) -> None:
    """Raise `EmbeddingError` if a column of embeddings, where there is one, holds strings."""
    if embedding_field not in ddf.columns or not is_string(ddf._meta[embedding_field]):
        return
    name = repr(embedding_field)
    conversion = (
        f"import json, pathlib, pandas as pd; frame = {_reading(ddf, path)}; "
        f"frame[{name}] = frame[{name}].map(json.loads); frame.to_parquet('parsed.parquet')"
    )
    raise EmbeddingError(
        f"Column {name} holds strings, not embeddings. Name the column of embeddings as --embedding-field."
        f' If the strings are JSON lists, parse them first: python -c "{conversion}"',
        columns=[embedding_field],
    )


def refuse_dimensions(ddf: dd.DataFrame, embedding_field: str, path: str) -> None:
    """Raise `MissingColumnsError` if a column for each dimension stands in place of that of embeddings."""
    if embedding_field not in ddf.columns and (advice := joining_advice(ddf, embedding_field, path)):
        advice = f"Name the column of embeddings as --embedding-field.{advice}"
        raise MissingColumnsError.build([embedding_field], ddf.columns, advice)


def joining_advice(ddf: dd.DataFrame, embedding_field: str, path: str) -> str:
    """Return advice on joining columns that look like the dimensions of embeddings; an empty string if none do."""
    # Names that are numbers are strings in files, but integers once pandas has read them.
    conversion = (
        f"import pathlib, pandas as pd; frame = {_reading(ddf, path)}.rename(columns=str); "
        "frame[{name}] = list(frame[{columns}].to_numpy('float32')); frame.to_parquet('joined.parquet')"
    )
    return dimensions_advice(ddf.columns, embedding_field, f'join them first: python -c "{conversion}"')


def _reading(ddf: dd.DataFrame, path: str) -> str:
    """Return an expression that reads in pandas what a frame is read from."""
    if next(readers_of(ddf), None) is not None:
        return f"pd.read_parquet({path!r})"
    if path.endswith(JSON_SUFFIXES):
        return f"pd.read_json({path!r}, lines=True)"
    files = f"sorted(pathlib.Path({path!r}).rglob('*.jsonl*'))"
    return f"pd.concat(pd.read_json(path, lines=True) for path in {files})"


@contextmanager
def clusters_needed() -> Iterator[None]:
    """Give errors that there are no clusters advice for a shell."""
    from dask_semdedup.lazy.alignment import CLUSTER_ADVICE

    try:
        yield
    except ClusterError as error:
        found = str(error).removesuffix(CLUSTER_ADVICE)
        if found == str(error):
            raise
        raise ClusterError(
            f"{found}For embeddings without clusters use 'dask-semdedup run'. If a column of another name holds "
            "clusters, pass --cluster-field.",
            columns=error.columns,
        ) from error
    except DataNotFoundError as error:
        raise DataNotFoundError(
            f"{error} INPUT must hold clusters in Parquet files. 'dask-semdedup run' reads embeddings without clusters."
        ) from error
