"""Embeddings of texts, made lazily."""

from __future__ import annotations

import os
from typing import Any

import dask
import dask.dataframe as dd

from dask_semdedup._validate import check_choice
from dask_semdedup.device.devices import DEVICES
from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError
from dask_semdedup.steps.embed import check_embed_arguments, embed_meta, embed_partition

__all__ = ["embed_texts"]


def embed_texts(
    ddf: dd.DataFrame,
    text_field: str,
    name: str,
    model: Any,
    **options: Any,
) -> dd.DataFrame:
    """Add the embeddings of a column of texts: see `SemDedupAccessor.embed`."""
    check_choice("device", options["device"], DEVICES)
    columns = list(ddf.columns)
    if text_field not in columns:
        raise MissingColumnsError.build(
            [text_field], columns, "Name the column of texts as text_field.", parameters=["text_field"]
        )
    if name in columns:
        raise InvalidArgumentError(
            f"The frame has a column {name!r} already. Drop it, or choose another embedding_field.",
            parameters=["embedding_field"],
            columns=[name],
        )
    texts = ddf[text_field]
    check_embed_arguments(texts._meta, model, options["batch_size"], options["encode_kwargs"])
    embeddings = texts.map_partitions(
        embed_partition,
        # A loaded model goes into the graph once, and is not pickled to name its tasks.
        os.fspath(model) if isinstance(model, str | os.PathLike) else dask.delayed(model, pure=False),
        **options,
        meta=embed_meta(texts._meta),
    )
    return ddf.assign(**{name: embeddings})
