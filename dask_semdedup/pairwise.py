"""One partition: rank all its clusters at once, search, assemble the frame of scores."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from dask.system import CPU_COUNT
from threadpoolctl import ThreadpoolController

from dask_semdedup._validate import check_choice
from dask_semdedup.embeddings import array_like, is_cudf, tensor_like, to_list, to_numpy, to_tensor
from dask_semdedup.errors import ClusterError, InvalidArgumentError, MissingColumnsError, have, some
from dask_semdedup.memory import share_memory_pool
from dask_semdedup.ranking import RankingStrategy

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICES", "SCORE_COLUMNS", "pairwise_meta", "pairwise_partition"]

SCORE_COLUMNS = ("id", "max_id", "cosine_sim_score")
DEVICES = ("auto", "cpu", "cuda")
# Pairs of rows from which on a GPU repays the way to it: 2,000 rows of 384 took an H200 half as long as 16 cores.
PAIRS_WORTH_A_GPU = 2_000_000
# Rows of a cluster from which on torch's threads, all at one product, waste less time on waiting for each other than a
# search to each of Dask's threads saves.
ROWS_WORTH_ALL_THREADS = 8192


def pairwise_partition(
    frame: Any,
    *,
    id_field: str,
    embedding_field: str,
    cluster_field: str,
    ranking: RankingStrategy,
    compute_dtype: str = "auto",
    batch_size: int | None = None,
    embedding_dim: int | None = None,
    device: str = "auto",
) -> Any:
    """Find for every row its most similar row among those of its cluster that are preferred over it.

    Parameters
    ----------
    frame : pandas.DataFrame or cudf.DataFrame
        Whole clusters, in any order.
    id_field, embedding_field, cluster_field : str
        Its columns of ids, embeddings and clusters.
    ranking : RankingStrategy
        Which rows are preferred.
    compute_dtype, batch_size
        Of the search: see `dask_semdedup.search.nearest_earlier`.
    embedding_dim : int, optional
        The width that every embedding must have.
    device : {"auto", "cpu", "cuda"}
        Where to search. "auto" is where the frame is, or a GPU where there is one and enough work for it.

    Returns
    -------
    DataFrame
        Of the same backend: ``id``, ``max_id`` (both of the ids' dtype), ``cosine_sim_score`` (float32) and the
        clusters, which ascend; the rows of each stand in rank order. The first of each has score 0 and its own id.

    Raises
    ------
    MissingColumnsError
        If a column is not there.
    ClusterError
        If rows have no cluster.
    EmbeddingError
        If embeddings cannot be compared.
    InvalidArgumentError
        If `device` is none of these, or is "cuda" and torch sees none.

    Examples
    --------
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"id": [7, 8, 9], "centroid": 0, "score": [0.1, 0.2, 0.3]})
    >>> frame["embeddings"] = pd.Series([[1.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    >>> pairwise_partition(
    ...     frame, id_field="id", embedding_field="embeddings", cluster_field="centroid",
    ...     ranking=RankingStrategy(["score"]),
    ... )
       id  max_id  cosine_sim_score  centroid
    0   7       7               0.0         0
    1   8       7               0.6         0
    2   9       8               0.8         0
    """
    _check_columns(frame.columns, id_field, embedding_field, cluster_field, ranking)
    _check_device(device)
    if is_cudf(frame):
        share_memory_pool()
    ids, clusters = frame[id_field], frame[cluster_field]
    if len(frame) == 0:
        return pairwise_meta(frame, id_field=id_field, cluster_field=cluster_field)
    codes = _cluster_codes(clusters, ids)
    order = ranking.order(frame, cluster_field=cluster_field, id_field=id_field)
    segments = _segments(codes[order])
    home = "cuda" if is_cudf(frame) else "cpu"
    device = _search_device(device, home, segments)
    with _cores().take(_threads(segments)) if device == "cpu" else nullcontext():
        rows = to_tensor(
            frame[embedding_field],
            name=embedding_field,
            ids=ids,
            clusters=clusters,
            embedding_dim=embedding_dim,
            order=order,
            device=device if home == "cuda" else "cpu",
        )
        scores, index = _search(rows, segments, device, compute_dtype, batch_size)
    return _score_frame(ids, clusters, order, order[array_like(index, frame)], array_like(scores, frame))


def pairwise_meta(meta: Any, *, id_field: str, cluster_field: str) -> Any:
    """Build the empty frame that has exactly the dtypes of `pairwise_partition`'s.

    Parameters
    ----------
    meta : pandas.DataFrame or cudf.DataFrame
        A frame with the dtypes of the partitions.
    id_field, cluster_field : str
        Its columns of ids and clusters.

    Returns
    -------
    DataFrame
        Without rows.

    Examples
    --------
    >>> import pandas as pd
    >>> pairwise_meta(pd.DataFrame({"doc": ["a"], "cluster": [0]}), id_field="doc", cluster_field="cluster").dtypes
    id                      str
    max_id                  str
    cosine_sim_score    float32
    cluster               int64
    dtype: object
    """
    nothing = np.empty(0, np.int64)
    return _score_frame(meta[id_field], meta[cluster_field], nothing, nothing, np.empty(0, np.float32))


def _score_frame(ids: Any, clusters: Any, order: Any, nearest: Any, scores: Any) -> Any:
    result = ids.iloc[order].reset_index(drop=True).to_frame("id")
    result["max_id"] = ids.iloc[nearest].reset_index(drop=True)
    result["cosine_sim_score"] = scores
    result[clusters.name] = clusters.iloc[order].reset_index(drop=True)
    return result


def _check_columns(
    present: Iterable[str], id_field: str, embedding_field: str, cluster_field: str, ranking: RankingStrategy
) -> None:
    present = list(present)
    if not {id_field, embedding_field, cluster_field} <= set(present):
        advice = "Name the columns of ids, embeddings and clusters as id_field, embedding_field and cluster_field."
        raise MissingColumnsError.build([id_field, embedding_field, cluster_field], present, advice)
    if cluster_field in SCORE_COLUMNS:
        raise InvalidArgumentError(f"cluster_field may not be {cluster_field!r}: scores have a column of that name.")
    ranking.check_columns(present)


def _check_device(device: str) -> None:
    check_choice("device", device, DEVICES)
    if device == "cuda" and not _has_cuda():
        raise InvalidArgumentError(
            "device is 'cuda', but torch sees no CUDA device. Use device='cpu' or 'auto', or install a torch with CUDA."
        )


def _search_device(device: str, home: str, segments: np.ndarray) -> str:
    """Where to search: as told, else where the frame is, or on a GPU that is there if the work repays the way to it."""
    if device != "auto":
        return device
    pairs = np.square(np.diff(segments), dtype=np.float64).sum() / 2
    return "cuda" if pairs >= PAIRS_WORTH_A_GPU and _has_cuda() else home


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _cluster_codes(clusters: Any, ids: Any) -> Any:
    """A number for each row's cluster; raise for rows that have none."""
    codes, _ = clusters.factorize()
    if (codes < 0).any():
        lost = ids.iloc[(codes < 0).nonzero()[0]]
        raise ClusterError(
            f"Column {clusters.name!r}: {have(len(lost), 'row')} no cluster (ids {some(to_list(lost))}). "
            "Drop them, or assign them to clusters."
        )
    return codes


def _segments(codes: Any) -> np.ndarray:
    """Offsets of the runs of equal codes, from 0 to their number."""
    starts = (codes[1:] != codes[:-1]).nonzero()[0] + 1
    return np.concatenate([[0], to_numpy(starts), [len(codes)]])


def _search(
    rows: torch.Tensor, segments: np.ndarray, device: str, compute_dtype: str, batch_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search where `rows` are, or send them to a GPU as its memory permits."""
    from dask_semdedup.search import nearest_earlier
    from dask_semdedup.search.streaming import nearest_earlier_from_host

    find = partial(nearest_earlier_from_host, device=device) if rows.device.type != device else nearest_earlier
    return find(rows, tensor_like(segments), compute_dtype=compute_dtype, batch_size=batch_size)


def _threads(segments: np.ndarray) -> int:
    """Threads that a search on the CPU is worth: one beside other searches, unless a cluster's products fill them all.

    Dask's threaded tasks never run in the main thread: what does has nothing beside it.
    """
    import torch

    # To ask comes first: a thread that has not asked sets its number anew at its first product.
    available = torch.get_num_threads()
    is_alone = threading.current_thread() is threading.main_thread()
    return available if is_alone or np.diff(segments).max() >= ROWS_WORTH_ALL_THREADS else 1


class _Cores:
    """Shares the process's cores out to the searches of its threads, so that Dask's and torch's do not multiply.

    OpenMP's threads wait for each other by spinning: where there are more of them than cores, they wait for long.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._changed = threading.Condition()
        self._pools = ThreadpoolController()

    @contextmanager
    def take(self, threads: int) -> Iterator[None]:
        """Wait for so many cores, and let torch use no more in this thread."""
        threads = min(threads, self._count)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= threads)
            self._free -= threads
        try:
            # OpenMP's limit is the calling thread's alone, which that of `torch.set_num_threads` is not.
            with self._pools.limit(limits=threads, user_api="openmp"):
                yield
        finally:
            with self._changed:
                self._free += threads
                self._changed.notify_all()


@cache
def _cores() -> _Cores:
    """Made at the first search, when torch and with it OpenMP are loaded."""
    import torch  # noqa: F401

    return _Cores(CPU_COUNT)


# A forked process has none of the threads that hold cores.
os.register_at_fork(after_in_child=_cores.cache_clear)
