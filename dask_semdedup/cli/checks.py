"""Checks of input whose advice is for a shell, where that of the library is for Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask_semdedup.errors import EmbeddingError
from dask_semdedup.frames.backend import is_string

if TYPE_CHECKING:
    import dask.dataframe as dd

CONVERSION = (
    "import json, pandas as pd; frame = pd.read_parquet('INPUT'); "
    "frame['{name}'] = frame['{name}'].map(json.loads); frame.to_parquet('parsed.parquet')"
)


def refuse_strings(ddf: dd.DataFrame, embedding_field: str) -> None:
    """Raise `EmbeddingError` if a column of embeddings, where there is one, holds strings."""
    if embedding_field not in ddf.columns or not is_string(ddf._meta[embedding_field]):
        return
    raise EmbeddingError(
        f"Column {embedding_field!r} holds strings, not embeddings. Name the column of embeddings as --embedding-field."
        f' If the strings are JSON lists, parse them first: python -c "{CONVERSION.format(name=embedding_field)}"',
        columns=[embedding_field],
    )
