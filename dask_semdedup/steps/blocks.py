"""One partition in blocks of rows: scores of clusters whose rows memory does not hold at once.

The rows are ranked by their metadata alone. Each block is then held in memory while half of the others are read, a few
rows at a time, and compared with it: every pair of blocks, and so every pair of rows, meets once. Of two rows, the one
that is preferred is a candidate of the other. Where a similarity is asked for, sketches tell which rows may reach it
with any of the block, so that hardly more than one block is in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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

    from dask_semdedup.search.filter import NearFilter
    from dask_semdedup.search.merging import Answers

__all__ = ["BlockScores", "Ranked", "kept_in_blocks", "rank_rows", "score_block", "scores_of_blocks"]

Reads = Callable[[Sequence[slice]], Iterator[Any]]
"""Reads some rows of a partition, in ascending slices: yields frames, each of rows of one of these."""

# Rows that are compared with as many others at once, as a share of a block: fewer take less memory, and longer.
TOGETHER = 0.25

# Rows that are copied at once.
COPIED = 4096


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
    """Answers of some rows.

    Attributes
    ----------
    ranks, nearest : numpy.ndarray
        (b,) int64: the rows, each once, and the rows nearest to them.
    scores : numpy.ndarray
        (b,) float32.
    exact : numpy.ndarray
        (b,) float64 similarities, which decide between several answers of one row.
    """

    ranks: np.ndarray
    nearest: np.ndarray
    scores: np.ndarray
    exact: np.ndarray


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
) -> list[BlockScores]:
    """Compare a block with itself and with half of the others: of each row, find the most similar preferred row.

    Each pair of blocks is compared by one of the two. So a row has answers here and in the lists of other blocks.

    Parameters
    ----------
    read : callable
        Reads embeddings of the partition: given ascending slices, it yields frames, each of rows of one of them.
    ranked : Ranked
        All rows.
    block : slice
        The rows to compare, in the order in which they are read.
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
    # Rows are read again for other blocks.
    search = _Search(read, ranked, np.sort(ranked.ranks[block]), [block], columns, options, warn_of_zeros=True)
    search.among_themselves()
    of_others = [search.with_block(other) for other in _met_by(block, blocks)]
    return [_found(search.best), *of_others]


def _met_by(block: slice, blocks: Sequence[slice]) -> list[slice]:
    """Return the blocks that one is compared with, such that each pair of blocks meets once."""
    number, count = blocks.index(block), len(blocks)
    half = count // 2
    # Of an even number of blocks, one of two that are opposite meets the other.
    steps = range(1, half + (count % 2 or number < half))
    return [blocks[(number + step) % count] for step in steps]


def _found(best: Answers) -> BlockScores:
    """Return the answers of rows that have any, and are known by their ranks."""
    found = (best.where != best.own).nonzero().flatten()
    return BlockScores(*(values[found].numpy() for values in (best.own, best.where, best.scores, best.exact)))


def kept_in_blocks(
    read: Reads,
    ranked: Ranked,
    blocks: Sequence[slice],
    answers: Sequence[Sequence[BlockScores]],
    columns: Columns,
    options: SearchOptions,
) -> BlockScores:
    """Find the nearest kept rows of those rows whose nearest row of all may be dropped.

    A row is kept if no row that is preferred over it is near. Which of the others are kept, only those decide whose
    nearest row is one of them: they are held in memory together, and compared with what is kept. See `search.kept`.

    Parameters
    ----------
    answers : sequence of sequences of BlockScores
        What `score_block` returned of all blocks.
    read, ranked, blocks, columns, options
        As of `score_block`.
    """
    nearest = _best(ranked, answers).where.numpy()
    is_kept = nearest == np.arange(len(nearest))
    queries = np.flatnonzero(~is_kept & ~is_kept[nearest])
    if not len(queries):
        return BlockScores(queries, queries, np.empty(0, np.float32), np.empty(0))
    search = _Search(read, ranked, queries, blocks, columns, options)
    search.among(blocks, is_kept)
    search.among_kept()
    best = search.best
    return BlockScores(queries, best.where.numpy(), best.scores.numpy(), best.exact.numpy())


def scores_of_blocks(ranked: Ranked, answers: Sequence[Sequence[BlockScores]], kept: BlockScores | None = None) -> Any:
    """Return the frame of scores of a partition, as `steps.pairwise.pairwise_partition` does.

    Parameters
    ----------
    ranked : Ranked
    answers : sequence of sequences of BlockScores
        What `score_block` returned of all blocks.
    kept : BlockScores, optional
        What `kept_in_blocks` returned: these answers hold.
    """
    best = _best(ranked, answers)
    nearest, scores = best.where.numpy(), best.scores.numpy()
    if kept is not None:
        nearest[kept.ranks], scores[kept.ranks] = kept.nearest, kept.scores
    return score_frame(ranked.ids, take(ranked.ids, nearest), scores, ranked.clusters)


def _best(ranked: Ranked, answers: Sequence[Sequence[BlockScores]]) -> Answers:
    """Return the best answers of all rows."""
    from dask_semdedup.search.merging import Answers

    best = Answers(tensor_like(np.arange(len(ranked.ranks))))
    for found in itertools.chain.from_iterable(answers):
        ranks, nearest, scores, exact = map(tensor_like, found)
        best.add(ranks, scores, nearest, exact.__getitem__)
    return best


@dataclass(frozen=True)
class _Some:
    """Some rows.

    Attributes
    ----------
    ranks : numpy.ndarray
        (m,) int64, ascending.
    embeddings : torch.Tensor
        (n, d) float32, of these and maybe of other rows.
    places : numpy.ndarray
        (m,) int64: where those of these rows are.
    """

    ranks: np.ndarray
    embeddings: torch.Tensor
    places: np.ndarray

    def copy_to(self, matrix: torch.Tensor, rows: np.ndarray) -> None:
        """Write the embeddings to rows of a matrix, a few at a time: they are not in memory a third time."""
        for start in range(0, len(rows), COPIED):
            some = slice(start, start + COPIED)
            matrix[tensor_like(rows[some])] = self.embeddings[tensor_like(self.places[some])]


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
        stops[place] = offsets[cluster] + np.searchsorted(candidates, queries) - of_candidates[cluster]
        stops[before] = offsets[of_cluster]
        return cls(ranks, place, before, offsets, stops)


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
        self.ranks, self.places, self.width = ranks, np.arange(len(ranks)), options.embedding_dim
        # Of each cluster.
        self.segments = np.searchsorted(ranks, ranked.segments)
        self.embeddings = self._hold(blocks, warn_of_zeros=warn_of_zeros)
        self.best = Answers(tensor_like(ranks))

    def among_themselves(self) -> None:
        """Compare the rows with each other."""
        self._compare(_Rows.of_one(self.ranks, self.ranked.segments), self.embeddings, self.best)

    def with_block(self, block: slice) -> BlockScores:
        """Compare the rows with those of another block, and return the answers of these."""
        from dask_semdedup.search.merging import Answers

        best = Answers(tensor_like(np.sort(self.ranked.ranks[block])))
        for own, others in self._meeting([block], np.ones(len(self.ranked.ranks), bool)):
            self._compare_with(own, others, self.best)
            self._compare_with(others, own, best)
        return _found(best)

    def among(self, blocks: Sequence[slice], is_candidate: np.ndarray) -> None:
        """Compare the rows with candidates.

        Parameters
        ----------
        blocks : sequence of slice
            They are read one after the other.
        is_candidate : numpy.ndarray
            (n,) bool: which of all rows are candidates, by rank.
        """
        for own, others in self._meeting(blocks, is_candidate):
            self._compare_with(own, others, self.best)

    def among_kept(self) -> None:
        """Compare the rows with those of them that are kept, as far as no answer has been found for them."""
        undecided = np.flatnonzero(self.best.where.numpy() == self.ranks)
        rows = _Rows.of_one(self.ranks[undecided], self.ranked.segments)
        _, index = _search(self.embeddings[tensor_like(undecided)], rows, self.options)
        kept = undecided[index.numpy() == rows.queries]
        queries, candidates = (_Some(self.ranks[some], self.embeddings, some) for some in (self.places, kept))
        self._compare_with(queries, candidates, self.best)

    def _meeting(self, blocks: Sequence[slice], is_wanted: np.ndarray) -> Iterator[tuple[_Some, _Some]]:
        """Yield some of the rows and some wanted ones of blocks, so that all that may be near to each other meet."""
        needed = [block for block in blocks if self._met(self.ranked.ranks[block], is_wanted).any()]
        most = max(1, int(TOGETHER * len(self.ranks)))
        held: list[tuple[np.ndarray, torch.Tensor]] = []
        is_met = np.zeros(len(self.ranks), bool)
        for ranks, batch in self._batches(needed, is_wanted):
            is_near, is_met_by_these = self._near(ranks, batch)
            held.append((ranks[is_near], batch[tensor_like(is_near)]))
            is_met |= is_met_by_these
            if sum(len(some) for some, _ in held) >= most:
                yield from self._groups(held, is_met, most)
                held, is_met = [], np.zeros(len(self.ranks), bool)
        yield from self._groups(held, is_met, most)

    def _groups(
        self, held: Sequence[tuple[np.ndarray, torch.Tensor]], is_met: np.ndarray, most: int
    ) -> Iterator[tuple[_Some, _Some]]:
        """Yield groups of the rows that are met, and with each all rows that are held."""
        import torch

        if not held:
            return
        ranks, embeddings = np.concatenate([some for some, _ in held]), torch.cat([some for _, some in held])
        order = np.argsort(ranks)
        others, met = _Some(ranks[order], embeddings, order), np.flatnonzero(is_met)
        for start in range(0, len(met), most):
            own = met[start : start + most]
            yield _Some(self.ranks[own], self.embeddings, own), others

    def _met(self, ranks: np.ndarray, is_wanted: np.ndarray) -> np.ndarray:
        """Return which of some ranks are wanted and of a cluster of the rows."""
        first, last = self._of_cluster(ranks)
        return is_wanted[ranks] & (first < last)

    def _of_cluster(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first of the rows that are of the same cluster, and the end, for each rank."""
        cluster = np.searchsorted(self.ranked.segments, ranks, side="right") - 1
        return self.segments[cluster], self.segments[cluster + 1]

    def _near(self, ranks: np.ndarray, batch: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows of a batch may be near to any of the rows, and which of the rows to any of the batch."""
        if self._filter is None:
            return np.ones(len(ranks), bool), np.ones(len(self.ranks), bool)
        with cores_for("cpu", ONE_CORE):
            is_near, is_met = self._filter.near(batch, *self._of_cluster(ranks))
        return is_near.numpy(), is_met.numpy()

    @cached_property
    def _filter(self) -> NearFilter | None:
        """What tells which rows may be near to others, if that pays."""
        from dask_semdedup.search.filter import NearFilter

        at_least = self.options.at_least
        is_exact = self.options.compute_dtype == "auto"
        if at_least is None or not is_exact or choose_device(self.options.device, "cpu", self.ranked.segments) != "cpu":
            return None
        # Each row is compared with all that are preferred over it, or with as many others.
        cluster = np.searchsorted(self.ranked.segments, self.ranks, side="right") - 1
        stops = self.segments[cluster] + self.ranks - self.ranked.segments[cluster]
        with cores_for("cpu", ONE_CORE):
            return NearFilter.of(self.embeddings, tensor_like(self.segments), tensor_like(stops), at_least)

    def _compare_with(self, queries: _Some, candidates: _Some, best: Answers) -> None:
        """Search the nearest candidates of some rows."""
        if not len(queries.ranks) or not len(candidates.ranks):
            return
        rows = _Rows.of_both(queries.ranks, candidates.ranks, self.ranked.segments)
        both = self.embeddings.new_empty((len(rows.ranks), self.embeddings.shape[1]))
        queries.copy_to(both, rows.queries)
        candidates.copy_to(both, rows.candidates)
        self._compare(rows, both, best)

    def _compare(self, rows: _Rows, embeddings: torch.Tensor, best: Answers) -> None:
        """Search the nearest candidates of the queries, and keep the answers that are better than those before."""
        from dask_semdedup.search.merging import cosines

        scores, index = _search(embeddings, rows, replace(self.options, duplicate_of="any"))
        query, ranks = tensor_like(rows.queries), tensor_like(rows.ranks)
        nearest = index[query]

        def exactly(row: torch.Tensor) -> torch.Tensor:
            return cosines(embeddings, query[row], nearest[row])

        is_exact = self.options.compute_dtype == "auto"
        places = np.searchsorted(best.own.numpy(), rows.ranks[rows.queries])
        best.add(tensor_like(places), scores[query], ranks[nearest], exactly if is_exact else None)

    def _hold(self, blocks: Sequence[slice], *, warn_of_zeros: bool) -> torch.Tensor:
        """Return the embeddings of the rows, in rank order."""
        import torch

        into = None
        is_own = np.zeros(len(self.ranked.ranks), bool)
        is_own[self.ranks] = True
        for ranks, batch in self._batches(blocks, is_own, warn_of_zeros=warn_of_zeros):
            if into is None:
                into = torch.empty((len(self.ranks), batch.shape[1]))
            into[tensor_like(np.searchsorted(self.ranks, ranks))] = batch
        assert into is not None
        return into

    def _batches(
        self, blocks: Sequence[slice], is_wanted: np.ndarray, *, warn_of_zeros: bool = False
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Read blocks, and yield the ranks and embeddings of wanted rows, ascending: of one frame at a time."""
        frames = self.read(blocks)
        for block in blocks:
            start = block.start
            while start < block.stop:
                frame = next(frames)
                ranks = self.ranked.ranks[start : start + len(frame)]
                with cores_for("cpu", ONE_CORE):
                    batch = to_tensor(
                        frame[self.columns.embedding],
                        name=self.columns.embedding,
                        ids=self.ranked.ids.iloc[ranks],
                        clusters=self.ranked.clusters.iloc[ranks],
                        embedding_dim=self.width,
                        warn_of_zeros=warn_of_zeros,
                    )
                self.width = batch.shape[1]
                order = np.argsort(ranks)
                order = order[self._met(ranks[order], is_wanted)]
                if len(order):
                    yield ranks[order], batch[tensor_like(order)]
                start += len(frame)
            # Arrow keeps what it has read with, and a worker that is full does not go on.
            pa.default_memory_pool().release_unused()


def _search(embeddings: torch.Tensor, rows: _Rows, options: SearchOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Search on the device of `options`."""
    device = choose_device(options.device, "cpu", rows.segments)
    with cores_for(device, rows.segments):
        return search_segments(embeddings, rows.segments, rows.stops, replace(options, device=device))
