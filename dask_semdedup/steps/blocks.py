"""One partition in blocks of rows: scores of clusters whose rows memory does not hold at once.

The rows are ranked by their metadata alone. Each block is then searched against all the others, one after the other:
its rows are the queries, and those of another block that are preferred over them the candidates. So every pair of rows
is multiplied once, and no more than two blocks are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from dask_semdedup.device.devices import check_device, choose_device
from dask_semdedup.device.queues import ONE_CORE, cores_for
from dask_semdedup.frames.backend import take, tensor_like
from dask_semdedup.frames.columns import Columns, SearchOptions
from dask_semdedup.frames.embeddings import to_tensor
from dask_semdedup.steps.pairwise import check_clusters, cluster_codes, score_frame, search_segments, segments_of
from dask_semdedup.steps.ranking import RankingStrategy

if TYPE_CHECKING:
    import torch

__all__ = ["BlockScores", "Ranked", "kept_in_blocks", "rank_rows", "score_block", "scores_of_blocks"]

Reads = Callable[[Sequence[slice]], Iterator[Any]]
"""Reads some rows of a partition, in ascending slices: yields frames, each of rows of one of these."""


class Ranked(NamedTuple):
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


class BlockScores(NamedTuple):
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
        Reads embeddings of the partition: given ascending slices, it yields frames, each of rows of one of them.
    ranked : Ranked
        All rows.
    block : slice
        The rows to answer, in the order in which they are read.
    blocks : sequence of slice
        All blocks, among them this one.
    columns, options
        As of `steps.pairwise.pairwise_partition`. Whether rows are kept is not asked: see `kept_in_blocks`.

    Raises
    ------
    EmbeddingError
        If embeddings cannot be compared.
    """
    check_device(options.device)
    ranks = np.sort(ranked.ranks[block])
    # Every block is read again for each of the others.
    search = _Search(read, ranked, ranks, [block], columns, options, warn_of_zeros=True)
    search.among_themselves()
    others = [other for other in blocks if other != block]
    search.among(others, [np.sort(ranked.ranks[other]) for other in others])
    return search.answers()


def kept_in_blocks(
    read: Reads,
    ranked: Ranked,
    blocks: Sequence[slice],
    answers: Sequence[BlockScores],
    columns: Columns,
    options: SearchOptions,
) -> BlockScores:
    """Find the nearest kept rows of those rows whose nearest row of all may be dropped.

    A row is kept if no row that is preferred over it is near. Which of the others are kept, only those decide whose
    nearest row is one of them: they are held in memory together, and compared with what is kept. See `search.kept`.

    Parameters
    ----------
    answers : sequence of BlockScores
        Of all blocks.
    read, ranked, blocks, columns, options
        As of `score_block`.
    """
    nearest, _ = _joined(ranked, answers)
    is_kept = nearest == np.arange(len(nearest))
    queries = np.flatnonzero(~is_kept & ~is_kept[nearest])
    if not len(queries):
        return BlockScores(queries, queries, np.empty(0, np.float32))
    search = _Search(read, ranked, queries, blocks, columns, options)
    ranks = [np.sort(ranked.ranks[block]) for block in blocks]
    search.among(blocks, [candidates[is_kept[candidates]] for candidates in ranks])
    search.among_kept()
    return search.answers()


def scores_of_blocks(ranked: Ranked, answers: Sequence[BlockScores]) -> Any:
    """Return the frame of scores of a partition, as `steps.pairwise.pairwise_partition` does, from the blocks' answers.

    Of several answers of a row the last one holds.
    """
    nearest, scores = _joined(ranked, answers)
    return score_frame(ranked.ids, take(ranked.ids, nearest), scores, ranked.clusters)


def _joined(ranked: Ranked, answers: Sequence[BlockScores]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows nearest to all rows, and their scores."""
    nearest, scores = np.empty(len(ranked.ranks), np.int64), np.empty(len(ranked.ranks), np.float32)
    for found in answers:
        nearest[found.ranks], scores[found.ranks] = found.nearest, found.scores
    return nearest, scores


@dataclass(frozen=True)
class _Rows:
    """The rows of one search: queries, and before them in each cluster their candidates, if these are other rows.

    Attributes
    ----------
    ranks : numpy.ndarray
        (n,) int64.
    queries, candidates : numpy.ndarray
        Places of the queries and of the candidates, each in the order of their ranks.
    segments : numpy.ndarray
        (k + 1,) int64 offsets of the clusters.
    stops : numpy.ndarray or None
        (n,) int64 ends of the candidates of each row; None where these are all that are preferred over it.
    """

    ranks: np.ndarray
    queries: np.ndarray
    candidates: np.ndarray
    segments: np.ndarray
    stops: np.ndarray | None

    @classmethod
    def of_one(cls, ranks: np.ndarray, segments: np.ndarray) -> _Rows:
        """Return rows, by ascending ranks, that are compared with each other."""
        every = np.arange(len(ranks))
        return cls(ranks, every, every[:0], np.searchsorted(ranks, segments), None)

    @classmethod
    def of_both(cls, queries: np.ndarray, candidates: np.ndarray, segments: np.ndarray) -> _Rows:
        """Return rows, by ascending ranks, that are compared with candidates."""
        of_queries, of_candidates = (np.searchsorted(ranks, segments) for ranks in (queries, candidates))
        offsets, clusters = of_queries + of_candidates, np.arange(len(segments) - 1)
        cluster, of_cluster = (np.repeat(clusters, np.diff(cuts)) for cuts in (of_queries, of_candidates))
        place = np.arange(len(queries)) + of_candidates[cluster + 1]
        before = np.arange(len(candidates)) + of_queries[of_cluster]
        ranks, stops = np.empty((2, offsets[-1]), np.int64)
        ranks[place], ranks[before] = queries, candidates
        stops[place] = offsets[cluster] + _preferred(queries, candidates, segments)
        stops[before] = offsets[of_cluster]
        return cls(ranks, place, before, offsets, stops)


def _preferred(queries: np.ndarray, candidates: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Return how many candidates are preferred over each query of their cluster, all by ascending ranks."""
    starts = segments[np.searchsorted(segments, queries, side="right") - 1]
    return np.searchsorted(candidates, queries) - np.searchsorted(candidates, starts)


class _Search:
    """Some rows, and the best of the answers that have been found for them.

    Parameters
    ----------
    read, ranked, columns, options
        As of `score_block`.
    ranks : numpy.ndarray
        The rows, ascending.
    blocks : sequence of slice
        Where they are.
    """

    def __init__(
        self,
        read: Reads,
        ranked: Ranked,
        ranks: np.ndarray,
        blocks: Sequence[slice],
        columns: Columns,
        options: SearchOptions,
        *,
        warn_of_zeros: bool = False,
    ) -> None:
        from dask_semdedup.search.merging import Answers

        self.read, self.ranked, self.columns, self.options = read, ranked, columns, options
        self.ranks = ranks
        self.embeddings = self._load(read(blocks), blocks, ranks, warn_of_zeros=warn_of_zeros)
        self.best = Answers(tensor_like(ranks))

    def answers(self) -> BlockScores:
        return BlockScores(self.ranks, self.best.where.numpy(), self.best.scores.numpy())

    def among_themselves(self) -> None:
        """Compare the rows with each other."""
        self._compare(_Rows.of_one(self.ranks, self.ranked.segments), self.embeddings)

    def among(self, blocks: Sequence[slice], candidates: Sequence[np.ndarray]) -> None:
        """Compare the rows with candidates, by their ascending ranks, of blocks that are read one after the other."""
        segments = self.ranked.segments
        pairs = zip(blocks, candidates, strict=True)
        needed = [(block, ranks) for block, ranks in pairs if _preferred(self.ranks, ranks, segments).any()]
        frames = self.read([block for block, _ in needed])
        for block, ranks in needed:
            rows = _Rows.of_both(self.ranks, ranks, segments)
            # Not held here: those of the next block take as much memory.
            self._compare(rows, self._load(frames, [block], ranks, rows))

    def among_kept(self) -> None:
        """Compare the rows with those of them that are kept, as far as no answer has been found for them."""
        undecided = np.flatnonzero(self.best.where.numpy() == self.ranks)
        rows = _Rows.of_one(self.ranks[undecided], self.ranked.segments)
        _, index = _search(self.embeddings[tensor_like(undecided)], rows, self.options)
        kept = undecided[index.numpy() == rows.queries]
        rows = _Rows.of_both(self.ranks, self.ranks[kept], self.ranked.segments)
        both = self._beside(rows)
        both[tensor_like(rows.candidates)] = self.embeddings[tensor_like(kept)]
        self._compare(rows, both)

    def _compare(self, rows: _Rows, embeddings: torch.Tensor) -> None:
        """Search the rows' nearest candidates, and keep the answers that are better than those before."""
        from dask_semdedup.search.merging import cosines

        scores, index = _search(embeddings, rows, replace(self.options, duplicate_of="any"))
        query = tensor_like(rows.queries)
        nearest = index[query]

        def exactly(row: torch.Tensor) -> torch.Tensor:
            return cosines(embeddings, query[row], nearest[row])

        is_exact = self.options.compute_dtype == "auto"
        self.best.add(scores[query], tensor_like(rows.ranks)[nearest], exactly if is_exact else None)

    def _beside(self, rows: _Rows) -> torch.Tensor:
        """Return the matrix of a search, in which those of the candidates are still missing."""
        both = self.embeddings.new_empty((len(rows.ranks), self.embeddings.shape[1]))
        both[tensor_like(rows.queries)] = self.embeddings
        return both

    def _load(
        self,
        frames: Iterator[Any],
        blocks: Sequence[slice],
        wanted: np.ndarray,
        rows: _Rows | None = None,
        *,
        warn_of_zeros: bool = False,
    ) -> torch.Tensor:
        """Take the frames of some blocks, and return the wanted rows, in rank order or as the candidates of `rows`.

        Frames are converted one by one, so that hardly more than the matrix is in memory.
        """
        import torch

        into = None if rows is None else self._beside(rows)
        width = self.options.embedding_dim if into is None else into.shape[1]
        ranks = np.concatenate([self.ranked.ranks[block] for block in blocks])
        places = np.full(len(ranks), -1)
        is_wanted = np.isin(ranks, wanted)
        places[is_wanted] = np.searchsorted(wanted, ranks[is_wanted])
        if rows is not None:
            places[is_wanted] = rows.candidates[places[is_wanted]]
        start = 0
        while start < len(ranks):
            frame = next(frames)
            of_frame = slice(start, start + len(frame))
            with cores_for("cpu", ONE_CORE):
                batch = to_tensor(
                    frame[self.columns.embedding],
                    name=self.columns.embedding,
                    ids=self.ranked.ids.iloc[ranks[of_frame]],
                    clusters=self.ranked.clusters.iloc[ranks[of_frame]],
                    embedding_dim=width,
                    warn_of_zeros=warn_of_zeros,
                )
            if into is None:
                width = batch.shape[1]
                into = torch.empty((len(wanted), width))
            into[tensor_like(places[of_frame][is_wanted[of_frame]])] = batch[tensor_like(is_wanted[of_frame])]
            start = of_frame.stop
        assert into is not None
        # Arrow keeps what it has read with, as much as a block takes, and a worker that is full does not go on.
        pa.default_memory_pool().release_unused()
        return into


def _search(embeddings: torch.Tensor, rows: _Rows, options: SearchOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Search on the device of `options`."""
    device = choose_device(options.device, "cpu", rows.segments)
    with cores_for(device, rows.segments):
        return search_segments(embeddings, rows.segments, rows.stops, replace(options, device=device))
