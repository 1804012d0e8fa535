"""Sketches: short rows whose products are never less than the similarities of the rows.

Let ``B`` be an orthonormal basis of some directions, ``c = B'u`` the coordinates of a unit row ``u`` in it, and ``t``
the length of the remainder of the row. By Cauchy-Schwarz ::

    u.v  =  c(u).c(v) + (u - Bc(u)).(v - Bc(v))  <=  c(u).c(v) + t(u) t(v)

The sketch of a row is ``(c, t)``. Two rows can reach a threshold only if the product of their sketches does. This holds
for any basis: a poor one costs time, never an answer. The leading principal axes of a sample leave few pairs. The
errors of rounding are bounded, or measured row by row, and subtracted from the threshold.

References
----------
Teflioudi, Gemulla, Mykytiuk, "LEMP: Fast retrieval of large entries in a matrix product", SIGMOD 2015.
Li, Chan, Yiu, Mamoulis, "FEXIPRO: Fast and exact inner product retrieval in recommender systems", SIGMOD 2017.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from dask_semdedup.search import certify

SIZES = (32, 64, 128, 192)
"""Numbers in a sketch that are considered."""

SAMPLE = 2048
"""Rows all over the segments that the basis is fitted to. It fits these best, so that others tell what it leaves."""

GROUPED, MAX_GROUP = 1024, 4096
"""Rows in all groups, unless one group has more: pairs of rows of one segment tell how many a sketch leaves."""

HITS = 0.2
"""Pairs a row that a sketch may leave on average beyond those of the largest sketch: some rows have many more."""

MAX_HITS = 4
"""Pairs a row that a sketch may leave on average."""

FEW = 3
"""A row with at least so many hits in its group is taken to be crowded: it is searched without sketches."""

SHARES_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Bytes of products of rows of the sample at a time."""

ITERATIONS = 2
"""Steps of subspace iteration: the axes need not be exact."""

SHIFT = 0.1
"""Added to the sample's moments, in units of their mean: few distinct rows then still give a whole basis."""

SCALE = 127
"""Sketches in int8 are multiples of ``1 / SCALE``."""

GAIN = 0.75
"""Share of the time without sketches that a search with them may take at most, by what the sample says."""

LEAST = 0.25
"""Below this similarity, what rounding loses would leave nothing of it, and sketches leave too many pairs anyway."""

REACH = 2.0**-23
"""What rounding adds to a cosine at most: to float32, and to a multiple of `certify.TIE`."""


@dataclass(frozen=True)
class Costs:
    """What an engine takes, in picoseconds, by which the number of numbers in a sketch is chosen.

    Attributes
    ----------
    fit : float
        To fit a basis and to look at the sample.
    value : float
        To rotate one number of one row.
    pair, pair_value : float
        To multiply two sketches, and for each of their numbers.
    hit, hit_value : float
        To verify a pair that is left, and for each number of the rows.
    exact_row_value, exact_pair, exact_value : float
        Without sketches: to prepare one number of one row, to multiply two rows, and for each of their numbers.
    rows : int
        Rows of a typical segment below which sketches are not considered.
    """

    fit: float
    value: float
    pair: float
    pair_value: float
    hit: float
    hit_value: float
    exact_row_value: float
    exact_pair: float
    exact_value: float
    rows: int = 0


@dataclass(frozen=True)
class Sketcher:
    """Axes that rows are rotated to, and what that may add to or take from the product of two sketches.

    Attributes
    ----------
    axes : torch.Tensor
        (d, h - 1) float32, nearly orthonormal columns.
    tail : float
        Added to the square of the length of what is left of a row, so that it is not underestimated.
    floor : float
        The product of two float32 sketches is at least this if the rows are as similar as is asked for.
    crowded : float
        The share of the rows that are expected to be crowded.
    """

    axes: torch.Tensor
    tail: float
    floor: float
    crowded: float = 0.0

    @property
    def size(self) -> int:
        """Numbers in a sketch, h."""
        return self.axes.shape[1] + 1

    def sketches(self, unit_rows: torch.Tensor) -> torch.Tensor:
        """Return (n, h) float32 sketches of (n, d) unit rows: coordinates, and last the length of what is left."""
        coordinates = unit_rows @ self.axes
        left = (1 - coordinates.square().sum(dim=1)).clamp_(min=0).add_(self.tail).sqrt_()
        return torch.cat([coordinates, left[:, None]], dim=1)


def choose(
    rows: torch.Tensor,
    segments: torch.Tensor,
    stops: torch.Tensor | None,
    at_least: float,
    costs: Costs,
    *,
    rejected: Sketcher | None = None,
) -> Sketcher | None:
    """Return the sketcher with which the search takes least, or None if it takes less without.

    Partitions of one frame are alike, and any basis is right: a sketcher is used again for a search of the same kind.

    Parameters
    ----------
    rows : torch.Tensor
        (n, d) float32.
    segments, stops : torch.Tensor
        As of `dask_semdedup.search.nearest_earlier`, on the CPU.
    at_least : float
        The similarity that is asked for.
    costs : Costs
        Of the engine.
    rejected : Sketcher, optional
        One that left too much: searches of this kind take a larger one from now on, or none for some time.
    """
    n, width = rows.shape
    n_pairs = _pairs(segments, stops)
    exact = n * width * costs.exact_row_value + n_pairs * (costs.exact_pair + width * costs.exact_value)
    # What is looked at must cost less than can be noticed, should it be in vain.
    if width < 2 * SIZES[0] or at_least < LEAST or exact < 20 * costs.fit or n_pairs < costs.rows * n / 2:
        return None
    kind = rows.device, width, at_least, n.bit_length(), int(n_pairs / n).bit_length()
    known, searches = _known.get(kind, (None, 0))
    above = 0 if rejected is None else rejected.size
    if searches == 0 or (known is not None and known.size <= above):
        known, searches = _fitted(rows, segments, at_least, n_pairs, exact, costs, above), RETRY
    elif known is None:
        searches -= 1
    if len(_known) >= KINDS:
        _known.clear()
    _known[kind] = known, searches
    return known


RETRY = 32
"""Searches of a kind without sketches until they are looked at again."""

KINDS = 64
"""Kinds of which sketchers are kept: each holds memory of the device."""

_known: dict[tuple[object, ...], tuple[Sketcher | None, int]] = {}


def _fitted(
    rows: torch.Tensor, segments: torch.Tensor, at_least: float, n_pairs: float, exact: float, costs: Costs, above: int
) -> Sketcher | None:
    """Fit a basis to a sample, and choose the size of the sketches, above another, that costs least there."""
    n, width = rows.shape
    sizes = [size for size in SIZES if above < size <= width // 2]
    if not sizes:
        return None
    met = n_pairs / n
    # A pair of the sample stands for at most a sixteenth of a pair a row.
    group_rows = min(MAX_GROUP, max(128, 1 << math.isqrt(int(16 * met)).bit_length()))
    groups = max(1, GROUPED // group_rows)
    spread, grouped = _sample(segments.numpy(), groups, group_rows)
    sample = unit_rows(rows[torch.from_numpy(np.concatenate([spread, grouped])).to(rows.device)])
    axes, defect = fit_axes(sample[: len(spread)], sizes[-1] - 1, tf32=rows.is_cuda)
    shares = _shares((sample[len(spread) :] @ axes).view(groups, group_rows, -1), sizes, at_least)
    off, *values = torch.cat([defect[None], *shares]).tolist()
    left, crowded, involved = (values[start : start + len(sizes)] for start in range(0, len(values), len(sizes)))
    taken = [
        n * width * costs.value
        + n_pairs * (costs.pair + size * costs.pair_value + share * (costs.hit + width * costs.hit_value))
        + (exact * among**2 if share * met <= MAX_HITS and (share - left[-1]) * met <= HITS else math.inf)
        for size, share, among in zip(sizes, left, involved, strict=True)
    ]
    best = min(range(len(sizes)), key=taken.__getitem__)
    # The host has waited for these axes: searches of other threads, on other streams, take them as they are.
    found = sketcher(axes[:, : sizes[best] - 1], off, at_least, tf32=rows.is_cuda)
    # Products are compared where they are positive. Rounding to int8 loses the most: a half of each number's unit.
    if not taken[best] < GAIN * exact or not found.floor > 1.5 * sizes[best] ** 0.5 / SCALE:
        return None
    return replace(found, crowded=crowded[best])


def sketcher(axes: torch.Tensor, defect: float, at_least: float, *, tf32: bool = True) -> Sketcher:
    """Return the sketcher for axes ``B`` with ``|B'B - 1| <= defect`` in the spectral norm.

    Let ``G = B'B`` and ``Q = B G^(-1/2)``, which is orthonormal. A row's coordinates in ``Q`` differ from ``B'u`` by at
    most ``|G^(1/2) - 1| <= defect``. The computed ones differ from these by what products of float32 lose, and by what
    rounding the row to TF32 loses where a GPU does. The sum, ``off``, enters the product of two rows twice, and so it
    does the square of what is left of a row.
    """
    width, count = axes.shape
    accumulation = count**0.5 * certify.accumulation_bound(width) + (TF32 if tf32 else 0.0)
    off = defect + (1 + defect) * accumulation + 2 * certify.UNIT_TOLERANCE
    both = 2 * off * (1 + off) + certify.accumulation_bound(count)
    return Sketcher(axes, tail=both + 4 * certify.UNIT_TOLERANCE, floor=at_least - REACH - both)


TF32 = 2.0**-10
"""What is lost of a row that is rounded to TF32, relative to its length. The axes are rounded before they are used."""


def _pairs(segments: torch.Tensor, stops: torch.Tensor | None) -> float:
    lengths = segments.diff()
    if stops is None:
        return float((lengths.double() * (lengths - 1)).sum() / 2)
    return float((stops - segments[:-1].repeat_interleave(lengths)).sum())


def _sample(segments: np.ndarray, groups: int, group_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows at equal distances, and groups of other rows, of one segment each."""
    n = segments[-1]
    middle = ((np.arange(groups) + 0.5) / groups * n).astype(np.int64)
    segment = np.searchsorted(segments, middle, side="right") - 1
    start, length = segments[segment][:, None], np.diff(segments)[segment][:, None]
    position = np.arange(group_rows) + (np.arange(groups)[:, None] + 0.5) / groups
    grouped = (start + (position * length / group_rows).astype(np.int64)).ravel()
    return np.setdiff1d(np.arange(SAMPLE) * n // SAMPLE, grouped), grouped


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of unit length; zero rows stay as they are."""
    rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.nn.functional.normalize(rows, dim=1)


def fit_axes(sample: torch.Tensor, count: int, *, tf32: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leading principal axes of unit rows, roughly, by subspace iteration.

    Parameters
    ----------
    sample : torch.Tensor
        (s, d) float32.
    count : int
        Number of axes, less than d.
    tf32 : bool
        Whether rows will be rotated in TF32: the axes are then rounded to it.

    Returns
    -------
    axes : torch.Tensor
        (d, count) float32.
    defect : torch.Tensor
        () float64: the Frobenius norm of ``axes' axes - 1``.
    """
    width = sample.shape[1]
    generator = torch.Generator(sample.device).manual_seed(0)
    axes = torch.randn(width, count, device=sample.device, generator=generator)
    shift = SHIFT * sample.square().sum() / width
    for _ in range(ITERATIONS):
        axes = torch.addmm(axes * shift, sample.T, sample @ axes)
    # QR by Cholesky: the columns span nested subspaces, as the principal axes do. On the CPU, since a GPU's library for
    # it takes longer to load than a search.
    exact = axes.double()
    factor, _ = torch.linalg.cholesky_ex((exact.T @ exact).cpu())
    inverse = torch.linalg.solve_triangular(factor.mT, torch.eye(count, dtype=torch.float64), upper=True)
    axes = (exact @ inverse.to(axes.device)).float()
    axes = _to_tf32(axes) if tf32 else axes
    exact = axes.double()
    moments = exact.T @ exact
    moments.diagonal().sub_(1)
    return axes, torch.linalg.matrix_norm(moments)


def _to_tf32(values: torch.Tensor) -> torch.Tensor:
    """Round float32 to the 10 bits after the point that TF32 keeps."""
    return ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _shares(grouped: torch.Tensor, sizes: list[int], at_least: float) -> tuple[torch.Tensor, ...]:
    """Return what sketches in int8 leave of the pairs within groups, by the size of the sketch.

    Parameters
    ----------
    grouped : torch.Tensor
        (groups, r, axes) float32 coordinates of unit rows.
    sizes : list of int
        Of sketches.
    at_least : float
        The similarity that is asked for.

    Returns
    -------
    left : torch.Tensor
        (sizes,) float64 share of the pairs of rows that are not crowded, with each other and with those that are. As if
        one more pair were left: what the sample does not show may be there.
    crowded, involved : torch.Tensor
        (sizes,) float64 share of the rows that are crowded, and of those and all that have hits among them.
    """
    cuts = [0, *(size - 1 for size in sizes)]
    blocks = [grouped[..., first:last] for first, last in pairwise(cuts)]
    rest = torch.stack([block.square().sum(dim=2) for block in blocks]).cumsum_(dim=0)
    rest = (1 - rest).clamp_(min=0).sqrt_()
    rounding = torch.tensor([2.2 * (size / 12) ** 0.5 / SCALE for size in sizes]).to(grouped.device)
    least = (at_least - rounding)[:, None, None, None]
    groups, rows, _ = grouped.shape
    # Products of all rows at once would take the memory of many rows.
    chunks = certify.chunks(rows, 4 * len(sizes) * groups * rows, SHARES_BYTES[grouped.device.type])

    def reached(some: slice, others: slice | torch.Tensor) -> torch.Tensor:
        product = torch.stack([torch.bmm(block[:, some], block[:, others].mT) for block in blocks]).cumsum_(dim=0)
        return product.addcmul_(rest[:, :, some, None], rest[:, :, None, others]) >= least

    # A row meets itself, too.
    hits = torch.cat([reached(chunk, slice(None)).sum(dim=3) for chunk in chunks], dim=2) - 1
    is_crowded = hits >= FEW
    left = (hits.masked_fill(is_crowded, 0).sum(dim=(1, 2)) + 2).double() / (groups * rows * (rows - 1))
    which = is_crowded.any(dim=1).any(dim=0).nonzero().flatten()
    crowded = is_crowded[:, :, None, which]
    is_involved = torch.cat([(reached(chunk, which) & crowded).any(dim=3) for chunk in chunks], dim=2)
    return left, is_crowded.double().mean(dim=(1, 2)), is_involved.double().mean(dim=(1, 2))
