"""Rows compared wherever they stand: sketches of partitions, the rows that may have a near one, and their scores.

The sketches of all rows are compared with each other, and leave the *involved* rows, in pairs. These are read again,
in full, and grouped into components: sets of rows that pairs connect. Each row's nearest rows are in its component, so
that components are searched as clusters are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from dask.dataframe.dispatch import concat

from dask_semdedup.device.devices import check_device, choose_device
from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.device.queues import ONE_CORE, cores_for, gpu_turn
from dask_semdedup.device.streams import reading_stream, search_stream
from dask_semdedup.errors import DataReadError
from dask_semdedup.frames.backend import (
    array_like,
    device_of,
    is_cudf,
    positions_like,
    release_unused,
    take,
    tensor_like,
    to_numpy,
)
from dask_semdedup.frames.columns import Columns, SearchOptions
from dask_semdedup.frames.embeddings import gather_rows, to_tensor
from dask_semdedup.frames.hashing import checksum
from dask_semdedup.steps.against import COMPONENT, against_partition
from dask_semdedup.steps.mean import mean_of, total_of, with_distances
from dask_semdedup.steps.pairwise import score_frame, search_segments, segments_of
from dask_semdedup.steps.ranking import RankingStrategy
from dask_semdedup.steps.removal import null_ids

if TYPE_CHECKING:
    import torch

    from dask_semdedup.search.index import Index
    from dask_semdedup.search.near import Links, Part

__all__ = [
    "Involved",
    "Sketched",
    "find_involved",
    "find_near_pairs",
    "join_meta",
    "mean_of_all",
    "pairs_of_bin",
    "places_of",
    "score_rows",
    "score_rows_against",
    "sketch_partition",
    "summary_of",
    "take_involved",
]


@dataclass(frozen=True)
class Sketched:
    """What is known of a partition once it has been read.

    Attributes
    ----------
    parts : list of Part
        Sketches of the rows.
    total : numpy.ndarray or None
        (d,) int64: the sum of the unit rows, in fixed point.
    count : int
        Number of rows.
    checksum : int
        Of the ids: see `frames.hashing.checksum`.
    """

    parts: list[Part]
    total: np.ndarray | None
    count: int
    checksum: int

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that `of_arrays` needs; sketches must not be on a GPU."""
        parts = {f"{number}.{name}": a for number, part in enumerate(self.parts) for name, a in part.arrays().items()}
        known = {"count": np.asarray(self.count), "checksum": np.asarray(self.checksum, np.uint64)}
        return parts | known | ({} if self.total is None else {"total": self.total})

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Sketched:
        """Return the sketches of some `arrays`."""
        from dask_semdedup.search.near import Part

        parts: dict[str, dict[str, np.ndarray]] = {}
        for key in arrays:
            number, _, name = key.partition(".")
            if name:
                parts.setdefault(number, {})[name] = arrays[key]
        whole = [Part.of_arrays(part) for part in parts.values()]
        return cls(whole, arrays.get("total"), int(arrays["count"]), int(arrays["checksum"]))

    def __sizeof__(self) -> int:
        """Return the bytes of the sketches, by which Dask decides what to write to disk."""
        return sum(part.__sizeof__() for part in self.parts)


def sketch_partition(
    frame: Any,
    number: int,
    columns: Columns,
    options: SearchOptions,
    index: Index,
    device: str,
    *,
    stays: bool = False,
    with_total: bool,
    width_of: str = "",
) -> Sketched:
    """Return the sketches of a partition's rows, and with them the sum of these if rows are ranked by their mean.

    Parameters
    ----------
    frame, number, columns, options, index
        The partition, its number, and how it is searched.
    device : {"cpu", "cuda"}
        Where sketches are computed, and will be compared.
    stays : bool
        Whether they stay on the device.
    with_total : bool
        Whether rows are ranked by their mean.
    width_of : str
        What has the width that rows must have, for messages.
    """
    from dask_semdedup.search.near import sketch_parts

    if is_cudf(frame):
        share_memory_pool()
    with reading_stream(device), cores_for(device, ONE_CORE):
        rows = _to_tensor(frame, columns, options, device=device, width_of=width_of)
        parts = sketch_parts(number, rows, index, stays=stays)
        total = total_of(rows, device) if with_total else None
    release_unused()
    return Sketched(parts, total, len(frame), checksum(frame[columns.id]))


@dataclass(frozen=True)
class Summary:
    """What is known of a partition besides its sketches.

    Attributes
    ----------
    copies : numpy.ndarray
        (c, 2) int64 copies and what they are copies of, as `Links` names rows.
    checksum, total, count
        As of `Sketched`.
    """

    copies: np.ndarray
    checksum: int
    total: np.ndarray | None
    count: int


def summary_of(sketched: Sketched) -> Summary:
    """Return what is known of a partition besides its sketches."""
    copies = np.concatenate([part.first + part.copies for part in sketched.parts])
    return Summary(copies, sketched.checksum, sketched.total, sketched.count)


def mean_of_all(summaries: Sequence[Summary]) -> np.ndarray | None:
    """Return the mean of all unit rows: see `mean_of`."""
    return mean_of([(one.total, one.count) for one in summaries if one.total is not None])


def find_near_pairs(
    sketched: Sequence[Sketched],
    others: Sequence[Sketched] | None,
    cells: slice,
    index: Index,
    device: str,
    after: Sequence[Any] = (),
) -> Links:
    """Return the pairs of rows of some partitions that meet in some cells and may be similar enough.

    Sketches are multiplied on `device`, "cpu" or "cuda". Nothing is done with `after`: it lets a task wait for others.
    """
    from dask_semdedup.search.near import near_pairs

    parts, theirs = ([part for one in some for part in one.parts] for some in (sketched, others or []))
    with cores_for(device, ONE_CORE), gpu_turn(device), search_stream(device):
        return near_pairs(parts, theirs if others is not None else None, cells, index, device)


@dataclass(frozen=True)
class Involved:
    """Rows that may have a near one, shared out over bins of whole components.

    Attributes
    ----------
    places : list of list of numpy.ndarray
        For each partition and each bin, the ascending int64 places of the partition's rows.
    checksums : sequence of int
        For each partition, that of its ids.
    pairs, bundles : list of numpy.ndarray
        For each bin, (p, 2) int64 rows, counted in the order of partitions and places.
    """

    places: list[list[np.ndarray]]
    checksums: Sequence[int]
    pairs: list[np.ndarray]
    bundles: list[np.ndarray]


def find_involved(links: Sequence[Links], summaries: Sequence[Summary], n_bins: int) -> Involved:
    """Return the rows that are in a pair, by partition.

    Parameters
    ----------
    links : sequence of Links
        From all comparisons.
    summaries : sequence of Summary
        Of all partitions.
    n_bins : int
        Number of bins.
    """
    from dask_semdedup.search.near import components

    copies = [one.copies for one in summaries]
    pairs = np.concatenate([np.empty((0, 2), np.int64), *(found.pairs for found in links)])
    bundles = np.concatenate([np.empty((0, 2), np.int64), *(found.bundles for found in links), *copies])
    keys, position = np.unique(np.concatenate([pairs, bundles]), return_inverse=True)
    position = position.reshape(-1, 2)
    label = components(len(keys), position)
    sizes = np.bincount(label)
    bin_of_label = (np.cumsum(sizes) - sizes) * n_bins // max(1, len(keys))
    in_bin = bin_of_label[label] if len(keys) else label
    within = np.empty(len(keys), np.int64)
    for number in range(n_bins):
        members = in_bin == number
        within[members] = np.arange(members.sum())
    partition, place = keys >> 32, keys & 0xFFFFFFFF
    cuts = np.searchsorted(partition, np.arange(len(copies) + 1))
    places = [
        [place[first:last][in_bin[first:last] == number] for number in range(n_bins)] for first, last in pairwise(cuts)
    ]
    of_pairs, of_bundles = within[position[: len(pairs)]], within[position[len(pairs) :]]
    bins = in_bin[position[:, 0]]
    return Involved(
        places,
        [one.checksum for one in summaries],
        [of_pairs[bins[: len(pairs)] == number] for number in range(n_bins)],
        [of_bundles[bins[len(pairs) :] == number] for number in range(n_bins)],
    )


def places_of(involved: Involved, partition: int) -> tuple[list[np.ndarray], int]:
    """Return the places of a partition's involved rows, by bin, and the checksum of its ids."""
    return involved.places[partition], involved.checksums[partition]


def pairs_of_bin(involved: Involved, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of a bin, and the bundles."""
    return involved.pairs[number], involved.bundles[number]


def take_involved(frame: Any, known: tuple[Sequence[np.ndarray], int], columns: Columns) -> list[Any]:
    """Return the involved rows of a partition, a frame for each bin; raise if it is not as it was when sketched."""
    places, before = known
    if checksum(frame[columns.id]) != before:
        raise DataReadError(
            f"A partition, now of {len(frame):,} rows, was computed twice, and its rows or their order differ. Persist "
            "the frame before it is compared, or write it with .semdedup.to_parquet(path) and read that."
        )
    return [frame.iloc[positions_like(which, frame)] for which in places]


def score_rows(
    frames: Sequence[Any],
    links: tuple[np.ndarray, np.ndarray] | None,
    columns: Columns,
    ranking: RankingStrategy,
    options: SearchOptions,
    mean: np.ndarray | None,
    *,
    by_mean: bool,
) -> Any:
    """Find for every row its most similar row among those that are preferred over it.

    Parameters
    ----------
    frames : sequence of DataFrame
        The rows, which are taken together.
    links : tuple of (p, 2) int64 arrays, optional
        Pairs of rows that may be as similar as `options.at_least`, and bundles of rows that are compared whatever they
        are. By default every row is compared with every other.
    columns : Columns
        The columns of ids and embeddings.
    ranking : RankingStrategy
        Which rows are preferred.
    options : SearchOptions
        How to search.
    mean : (d,) float64 array, optional
        Of all unit rows. By default that of these.
    by_mean : bool
        Whether rows are ranked by their distances to the mean.

    Returns
    -------
    DataFrame
        ``id``, ``max_id`` and ``cosine_sim_score``, in rank order. Rows that no pair connects with another are left
        out.
    """
    check_device(options.device)
    release_unused()
    if is_cudf(frames[0]):
        share_memory_pool()
    # Embeddings stay apart: those of many rows are more than a list column of cuDF can hold.
    parts = _to_tensors(frames, columns, options)
    frame = _concat([part.drop(columns=columns.embedding) for part in frames])
    if len(frame) == 0:
        return join_meta(frame, columns)
    frame_device, whole = device_of(frame), np.array([0, len(frame)])
    if by_mean:
        device = choose_device(options.device, frame_device, whole)
        if mean is None:
            mean = mean_of([(total_of(part, device), len(part)) for part in parts])
        frame = with_distances(frame, parts, mean, device)
    order = to_numpy(ranking.order(frame, cluster_field=None, id_field=columns.id))
    label = np.zeros(len(frame), np.int64)
    if links is not None:
        import torch

        from dask_semdedup.search.near import components

        pairs, bundles = links
        parts = [torch.cat(parts)]
        label = components(len(frame), np.concatenate([_similar(parts[0], pairs, options), bundles]))
        order = order[np.bincount(label)[label[order]] > 1]
        if not len(order):
            return join_meta(frame, columns)
    by_label = np.argsort(label[order], kind="stable")
    position, segments = order[by_label], segments_of(label[order[by_label]])
    device = choose_device(options.device, frame_device, segments)
    with cores_for(device, segments):
        rows = gather_rows(parts, position)
        rows = rows.to(device) if frame_device == "cuda" else rows
        scores, index = search_segments(rows, segments, None, replace(options, device=device))
    ids = take(frame[columns.id], positions_like(position, frame))
    in_rank_order = tensor_like(np.argsort(by_label, kind="stable")).to(index.device)
    own, nearest = (array_like(positions, frame) for positions in (in_rank_order, index[in_rank_order]))
    return score_frame(take(ids, own), take(ids, nearest), array_like(scores[in_rank_order], frame))


def score_rows_against(
    frames: Sequence[Any],
    references: Sequence[Any],
    links: tuple[np.ndarray, np.ndarray] | None,
    columns: Columns,
    reference_id_field: str,
    options: SearchOptions,
) -> Any:
    """Find for every row its most similar reference row.

    Parameters
    ----------
    frames, references : sequence of DataFrame
        The rows, and the reference rows, each taken together.
    links
        As of `score_rows`: rows are counted first, and reference rows after them.
    columns, reference_id_field, options
        As of `steps.against.against_partition`.

    Returns
    -------
    DataFrame
        ``id``, ``max_id`` and ``cosine_sim_score``, by ascending id.
    """
    check_device(options.device)
    if is_cudf(frames[0]):
        share_memory_pool()
    sides = [_concat(side) for side in (frames, references)]
    n = len(sides[0])
    label = np.zeros(n + len(sides[1]), np.int64)
    if links is not None and len(label):
        import torch

        from dask_semdedup.search.near import components

        pairs, bundles = links
        names = columns, replace(columns, id=reference_id_field)
        rows = torch.cat([_to_tensor(side, of_side, options) for side, of_side in zip(sides, names, strict=True)])
        label = components(len(label), np.concatenate([_similar(rows, pairs, options), bundles]))
        del rows
    columns = replace(columns, cluster=COMPONENT)
    numbered = [
        side.reset_index(drop=True).assign(**{COMPONENT: positions_like(numbers, side)})
        for side, numbers in zip(sides, (label[:n], label[n:]), strict=True)
    ]
    scores = against_partition(numbered[0], numbered[1], columns, reference_id_field, options).drop(columns=COMPONENT)
    order = RankingStrategy(["id"]).order(scores, cluster_field=None, id_field="id")
    return scores.iloc[order].reset_index(drop=True)


def join_meta(meta: Any, columns: Columns, nearest: Any = None) -> Any:
    """Build the empty frame that has exactly the dtypes of `score_rows`, or of `score_rows_against` given their ids."""
    ids = meta.iloc[:0][columns.id]
    return score_frame(ids, ids if nearest is None else nearest.iloc[:0], np.empty(0, np.float32))


def _concat(frames: Sequence[Any]) -> Any:
    return concat(list(frames)) if len(frames) > 1 else frames[0]


def _to_tensors(frames: Sequence[Any], columns: Columns, options: SearchOptions) -> list[torch.Tensor]:
    """Return the embeddings of frames, all as wide as the first ones."""
    parts: list[torch.Tensor] = []
    for frame in frames:
        part = _to_tensor(frame, columns, options)
        if len(part):
            parts.append(part)
            options = replace(options, embedding_dim=part.shape[1])
    return parts


def _to_tensor(frame: Any, columns: Columns, options: SearchOptions, **on: Any) -> torch.Tensor:
    """Return the embeddings of a frame, or raise if rows cannot be compared or, without ids, not be named."""
    if null := int(frame[columns.id].isna().sum()):
        raise null_ids(columns.id, null)
    named = {"name": columns.embedding, "ids": frame[columns.id]}
    return to_tensor(frame[columns.embedding], **named, embedding_dim=options.embedding_dim, **on)


def _similar(rows: torch.Tensor, pairs: np.ndarray, options: SearchOptions) -> np.ndarray:
    """Return the pairs that are as similar as is asked for."""
    from dask_semdedup.search import certify

    query, candidate = tensor_like(pairs).to(rows.device).unbind(dim=1)
    cosine = certify.snap(certify.cosines64(certify.measure(rows).rows, query, candidate)).float()
    assert options.at_least is not None
    return pairs[(cosine >= options.at_least).cpu().numpy()]
