"""One partition in blocks of rows: scores of clusters whose rows memory does not hold at once.

The rows are ranked by their metadata alone. Each block is then searched against all the others, one after the other:
its rows are the queries, and those of another block that are preferred over them the candidates. So every pair of rows
is multiplied once, and no more than two blocks are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_semdedup.device.devices import check_device, choose_device
from dask_semdedup.device.queues import cores_for
from dask_semdedup.frames.backend import take, tensor_like
from dask_semdedup.frames.columns import Columns, SearchOptions
from dask_semdedup.frames.embeddings import to_tensor
from dask_semdedup.steps.pairwise import cluster_codes, check_clusters, score_frame, search_segments, segments_of
from dask_semdedup.steps.ranking import RankingStrategy

if TYPE_CHECKING:
    import torch

    from dask_semdedup.search.merging import Answers

__all__ = ["BlockScores", "Ranked", "rank_rows", "score_block", "scores_of_blocks"]

Reads = Callable[[Sequence[slice]], Iterator[Any]]
"""Reads some rows of a partition, in ascending slices: yields frames, each of rows of one of these."""


@dataclass(frozen=True)
class Ranked:
    """What is known of the rows of a partition without their embeddings.

    Attributes
    ----------
    ids, clusters : pandas.Series
        In rank order within each cluster, and clusters ascend.
    ranks : numpy.ndarray
        (n,) int64: where the rows stand in this order, in the order in which they are read.
    segments : numpy.ndarray
        (k + 1,) int64 offsets of the clusters.
    """

    ids: Any
    clusters: Any
    ranks: np.ndarray
    segments: np.ndarray


@dataclass(frozen=True)
class BlockScores:
    """Answers of the rows of a block.

    Attributes
    ----------
    ranks, nearest : numpy.ndarray
        (b,) int64: the rows, ascending, and the rows nearest to them.
    scores : numpy.ndarray
        (b,) float32.
    """

    ranks: np.ndarray
    nearest: np.ndarray
    scores: np.ndarray


def rank_rows(frame: Any, columns: Columns, ranking: RankingStrategy) -> Ranked:
    """Rank the rows of whole clusters, given a pandas frame of ids, clusters and what they are ranked by."""
    ids, clusters = frame[columns.id], frame[columns.cluster]
    check_clusters(clusters, ids)
    order = ranking.order(frame, cluster_field=columns.cluster, id_field=columns.id)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return Ranked(take(ids, order), take(clusters, order), ranks, segments_of(cluster_codes(clusters, order)))


def score_block(
    read: Reads, ranked: Ranked, block: slice, blocks: Sequence[slice], columns: Columns, options: SearchOptions
) -> BlockScores:
    """Find for every row of a block its most similar row among those of its cluster that are preferred over it.

    Parameters
    ----------
    read : callable
        Reads rows of the partition with their embeddings: given ascending slices, it yields frames, each of rows of one.
    ranked : Ranked
        All rows.
    block : slice
        The rows to answer, in the order in which they are read.
    blocks : sequence of slice
        All blocks, among them this one.
    columns, options
        As of `steps.pairwise.pairwise_partition`.

    Raises
    ------
    EmbeddingError
        If embeddings cannot be compared.
    """
    from dask_semdedup.search.merging import Answers

    check_device(options.device)
    ranks = np.sort(ranked.ranks[block])
    answers = Answers(tensor_like(ranks))
    place = np.searchsorted(ranks, ranked.ranks[block])
    own = _load(read([block]), ranked, block, place, columns, options)
    options = replace(options, embedding_dim=own.shape[1])
    _search(own, _Rows.of_block(ranks, ranked.segments), options, answers)
    pairs = {
        number: _Rows.of_both(np.sort(ranked.ranks[other]), ranks, ranked.segments)
        for number, other in enumerate(blocks)
        if other != block
    }
    pairs = {number: rows for number, rows in pairs.items() if rows.have_pairs}
    frames = read([blocks[number] for number in pairs])
    for number, rows in pairs.items():
        # Not held here: the next ones take as much memory.
        _search(_beside(own, frames, ranked, blocks[number], rows, columns, options), rows, options, answers)
    return BlockScores(ranks, answers.where.numpy(), answers.scores.numpy())


def scores_of_blocks(ranked: Ranked, answers: Sequence[BlockScores]) -> Any:
    """Return the frame of scores of a partition, as `steps.pairwise.pairwise_partition` does, from those of blocks."""
    nearest, scores = np.empty(len(ranked.ranks), np.int64), np.empty(len(ranked.ranks), np.float32)
    for found in answers:
        nearest[found.ranks], scores[found.ranks] = found.nearest, found.scores
    return score_frame(ranked.ids, take(ranked.ids, nearest), scores, ranked.clusters)


@dataclass(frozen=True)
class _Rows:
    """The rows of one search: those of a block, or those of another one too, before them in each cluster.

    Attributes
    ----------
    ranks : numpy.ndarray
        (n,) int64.
    queries, candidates : numpy.ndarray
        Places of the rows of the block, and of those of the other one, each in the order of their ranks.
    segments : numpy.ndarray
        (k + 1,) int64 offsets of the clusters.
    stops : numpy.ndarray or None
        (n,) int64 ends of the candidates of each row; None where these are all that are preferred over it.
    have_pairs : bool
        Whether any row is to be compared with another one.
    """

    ranks: np.ndarray
    queries: np.ndarray
    candidates: np.ndarray
    segments: np.ndarray
    stops: np.ndarray | None
    have_pairs: bool

    @classmethod
    def of_block(cls, ranks: np.ndarray, segments: np.ndarray) -> _Rows:
        every = np.arange(len(ranks))
        return cls(ranks, every, every[:0], np.searchsorted(ranks, segments), None, True)

    @classmethod
    def of_both(cls, candidates: np.ndarray, queries: np.ndarray, segments: np.ndarray) -> _Rows:
        of_candidates, of_queries = (np.searchsorted(ranks, segments) for ranks in (candidates, queries))
        offsets = of_candidates + of_queries
        numbers = np.arange(len(segments) - 1)
        cluster = np.repeat(numbers, np.diff(of_queries))
        of_cluster = np.repeat(numbers, np.diff(of_candidates))
        place = np.arange(len(queries)) + of_candidates[cluster + 1]
        before = np.arange(len(candidates)) + of_queries[of_cluster]
        preferred = np.searchsorted(candidates, queries) - of_candidates[cluster]
        ranks, stops = np.empty((2, offsets[-1]), np.int64)
        ranks[place], ranks[before] = queries, candidates
        stops[place], stops[before] = offsets[cluster] + preferred, offsets[of_cluster]
        return cls(ranks, place, before, offsets, stops, bool(preferred.any()))


def _load(
    frames: Iterator[Any],
    ranked: Ranked,
    block: slice,
    place: np.ndarray,
    columns: Columns,
    options: SearchOptions,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read the embeddings of a block to some places of a matrix, by default of a new one.

    Batches are converted one by one, so that hardly more than the matrix is in memory.
    """
    import torch

    width, start, is_first = options.embedding_dim, 0, rows is None
    while start < len(place):
        frame = next(frames)
        where = slice(start, start + len(frame))
        ranks = ranked.ranks[block][where]
        batch = to_tensor(
            frame[columns.embedding],
            name=columns.embedding,
            ids=ranked.ids.iloc[ranks],
            clusters=ranked.clusters.iloc[ranks],
            embedding_dim=width,
            # Every block is read again for each of the others.
            warn_of_zeros=is_first,
        )
        if rows is None:
            width = batch.shape[1]
            rows = torch.empty((len(place), width))
        rows[tensor_like(place[where])] = batch
        start += len(frame)
    assert rows is not None
    return rows


def _beside(
    own: torch.Tensor,
    frames: Iterator[Any],
    ranked: Ranked,
    other: slice,
    rows: _Rows,
    columns: Columns,
    options: SearchOptions,
) -> torch.Tensor:
    """Return the rows of a block and those of another one, which are read."""
    both = own.new_empty((len(rows.ranks), own.shape[1]))
    both[tensor_like(rows.queries)] = own
    ranks = ranked.ranks[other]
    place = rows.candidates[np.searchsorted(np.sort(ranks), ranks)]
    return _load(frames, ranked, other, place, columns, options, both)


def _search(embeddings: torch.Tensor, rows: _Rows, options: SearchOptions, answers: Answers) -> None:
    """Search rows for their nearest candidates, and keep the answers that are better than those so far."""
    from dask_semdedup.search.merging import cosines

    device = choose_device(options.device, "cpu", rows.segments)
    with cores_for(device, rows.segments):
        scores, index = search_segments(embeddings, rows.segments, rows.stops, replace(options, device=device))
        query = tensor_like(rows.queries)
        nearest = index[query]

        def exactly(row: torch.Tensor) -> torch.Tensor:
            return cosines(embeddings, query[row], nearest[row])

        is_exact = options.compute_dtype == "auto"
        answers.add(scores[query], tensor_like(rows.ranks)[nearest], exactly if is_exact else None)
