"""Embeddings of texts, made lazily."""

from __future__ import annotations

import os
import warnings
from typing import Any

import dask
import dask.dataframe as dd

from dask_semdedup._dask import MapPartitions
from dask_semdedup._validate import check_choice, stack_level
from dask_semdedup.device.devices import DEVICES
from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError
from dask_semdedup.lazy.sources import lengths_in_footers
from dask_semdedup.lazy.split import split_rows
from dask_semdedup.steps.embed import check_embed_arguments, embed_meta, embed_partition

__all__ = ["TEXTS_OF_PART", "embed_texts", "warn_of_passes"]

# Texts of a task: a minute or two on two cores. Progress, interrupts and workers go by tasks.
TEXTS_OF_PART = 2048


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
    if (lengths := lengths_in_footers(ddf)) is not None:
        ddf = split_rows(ddf, lengths, TEXTS_OF_PART)
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


def warn_of_passes(ddf: dd.DataFrame) -> None:
    """Warn if embeddings are to be read more than once, and are made from texts each time."""
    if any(node.func is embed_partition for node in ddf.expr.find_operations(MapPartitions)):
        warnings.warn(
            "The texts of this frame are embedded again each time that their embeddings are read, which is several "
            "times here. Write them with .semdedup.to_parquet(path) and continue with dask_semdedup.read_table(path), "
            "or persist() them, if they fit into memory.",
            stacklevel=stack_level(),
        )
