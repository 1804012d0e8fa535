"""Pairs of rows that may be as similar as is asked for, found by their sketches alone.

Rows come in *parts*, such as the partitions of a frame, of which only the sketches are at hand. The pairs that are left
hold all pairs of rows that are similar enough, and some more: whoever has the rows can tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dask_semdedup.search import certify, has_triton, ieee_products
from dask_semdedup.search.cells import Visits
from dask_semdedup.search.crowded import first_copies
from dask_semdedup.search.index import Index

__all__ = ["PART_ROWS", "Links", "Part", "components", "listed_or_bundled", "near_pairs", "sketch_parts"]

PART_ROWS = {"cpu": 1 << 15, "cuda": 1 << 32}
"""Rows of a part at most. On a CPU they are few, so that little else is in memory, and two bytes hold a visit."""

VISITS = "visitors", "offsets"
"""Names of the two arrays of visits."""

MANY = 8
"""Pairs of a row in a batch that are listed, on average. Of more, it is kept which rows they connect."""


@dataclass(frozen=True)
class Part:
    """Sketches of some rows, in the order of their cells. Zero rows, and copies of other rows, are not among them.

    Attributes
    ----------
    first : int
        The first row, as `Links` names rows.
    coordinates : array
        (m, h - 1) float16 coordinates of the longer sketches: the first of them are those of the shorter ones.
    left : array
        (m, 2) float32 last numbers of the shorter and of the longer sketches: the lengths of what is left.
    residual : array
        (m, 2) float32 bounds on the lengths of what float16 lost of either.
    rows : array
        (m,) int64 places in the part.
    members : numpy.ndarray
        (k + 1,) int64 offsets of the cells.
    visits : tuple of (v,) and (k + 1,) integer arrays, optional
        Sketches that visit cells, in the order of these, and offsets of the cells among them. A GPU finds them anew
        when it compares sketches: that takes less than to copy them.
    copies : numpy.ndarray
        (c, 2) int64 places of rows that are equal bit by bit to an earlier one, and of that.

    Notes
    -----
    Arrays are of NumPy, or tensors where the part stays on a GPU. Other processes get it in NumPy's.
    """

    first: int
    coordinates: Any
    left: Any
    residual: Any
    rows: Any
    members: np.ndarray
    visits: tuple[np.ndarray, np.ndarray] | None
    copies: np.ndarray

    def __sizeof__(self) -> int:
        """Return the bytes of the arrays, by which Dask decides what to write to disk."""
        visits = self.visits or ()
        return sum(each.nbytes for each in (*vars(self).values(), *visits) if hasattr(each, "nbytes"))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that `of_arrays` needs; arrays must be of NumPy."""
        values = vars(self) | dict(zip(VISITS, self.visits or (), strict=False))
        return {name: np.asarray(value) for name, value in values.items() if name != "visits"}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Part:
        """Return the part of some `arrays`."""
        values: dict[str, Any] = {name: values for name, values in arrays.items() if name not in VISITS}
        visits = (arrays[VISITS[0]], arrays[VISITS[1]]) if VISITS[0] in arrays else None
        return cls(**values | {"first": int(arrays["first"]), "visits": visits})

    def __getstate__(self) -> dict[str, Any]:
        values = vars(self).items()
        return {name: _host(value) if isinstance(value, torch.Tensor) else value for name, value in values}


@dataclass(frozen=True)
class Links:
    """Pairs of rows, each row as the number of its partition times 2**32, plus its place there.

    Attributes
    ----------
    pairs : numpy.ndarray
        (p, 2) int64 rows that may be as similar as is asked for.
    bundles : numpy.ndarray
        (b, 2) int64 rows of crowded regions, and one row of each: the pairs there are too many to be listed.
    """

    pairs: np.ndarray
    bundles: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that `of_arrays` needs."""
        return vars(self)

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Links:
        """Return the links of some `arrays`."""
        return cls(**arrays)


def sketch_parts(number: int, rows: torch.Tensor, index: Index, *, stays: bool = False) -> list[Part]:
    """Return the sketches of a partition, in one part or more.

    Parameters
    ----------
    number : int
        The number of the partition.
    rows : torch.Tensor
        (n, d) float32, finite. Sketches are computed on their device.
    index : Index
    stays : bool, default False
        Whether sketches stay on that device.
    """
    index, where = index.to(rows.device), rows.device if stays else torch.device("cpu")
    chunks = certify.chunks(max(1, len(rows)), 1, PART_ROWS[rows.device.type])
    return [_sketched((number << 32) + chunk.start, rows[chunk], index, where) for chunk in chunks]


def _sketched(first: int, rows: torch.Tensor, index: Index, where: torch.device) -> Part:
    """Return the sketches of one part, which are kept on a device."""
    original = first_copies(rows, torch.tensor([0, len(rows)]))
    unit = certify.measure(rows)
    is_copy = original != torch.arange(len(rows), device=rows.device)
    places = (~is_copy & ~unit.is_zero).nonzero().flatten()
    copies = (is_copy & ~unit.is_zero).nonzero().flatten()
    n, device = len(places), rows.device
    short = torch.empty(n, index.sketcher.size, device=device)
    coordinates = torch.empty(n, index.longer.size - 1, dtype=torch.float16, device=device)
    left, residual = torch.empty(2, n, 2, device=device)
    with ieee_products:
        # Longer sketches are never all there in float32.
        for chunk in certify.pieces(places, 4 * rows.shape[1] if rows.is_cuda else 128):
            which = places[chunk]
            unit_rows = unit.rows[which] * unit.inverse_norm[which, None]
            short[chunk], longer = (made_by.sketches(unit_rows) for made_by in (index.sketcher, index.longer))
            coordinates[chunk] = longer[:, :-1]
            # The coordinates that both have were computed apart, and may differ in their last bits.
            for kind, exact in enumerate((short[chunk], longer)):
                lost = coordinates[chunk, : exact.shape[1] - 1].float() - exact[:, :-1]
                left[chunk, kind] = exact[:, -1]
                residual[chunk, kind] = torch.linalg.vector_norm(lost, dim=1) * (1 + 2.0**-16)
        if rows.is_cuda:
            cell, visits = index.cells.nearest(short), None
            order = torch.argsort(cell, stable=True)
        else:
            found = index.cells.visits(short)
            order = torch.from_numpy(np.argsort(found.cell, kind="stable"))
            cell, visits = torch.from_numpy(found.cell), _in_order(found, order.numpy(), len(index.cells))
    members = torch.bincount(cell, minlength=len(index.cells)).cumsum(0)
    return Part(
        first,
        _kept(coordinates[order], where),
        _kept(left[order], where),
        _kept(residual[order], where),
        _kept(places[order], where),
        np.concatenate([[0], _host(members)]),
        visits,
        _host(torch.stack([copies, original[copies]], dim=1)),
    )


def _kept(values: torch.Tensor, where: torch.device) -> Any:
    return _host(values) if where.type == "cpu" else values


def _in_order(found: Visits, order: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return visits by cell, and the cells' offsets, of sketches that are put in another order."""
    from scipy.sparse import csr_array

    n = len(order)
    place = np.empty(n, np.min_scalar_type(n))
    place[order] = np.arange(n)
    ones = np.ones(len(found.visited), bool)
    by_cell = csr_array((ones, found.visited, found.offsets), shape=(n, k)).tocsc()
    return place[by_cell.indices], by_cell.indptr


def _host(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy()


def near_pairs(
    parts: Sequence[Part], others: Sequence[Part] | None, cells: slice, index: Index, device: str = "cpu"
) -> Links:
    """Return the pairs of rows of some parts that meet in some cells, and may be similar enough.

    Parameters
    ----------
    parts : sequence of Part
    others : sequence of Part, optional
        Parts whose rows are paired with those of `parts`. By default the rows of `parts` are paired with each other.
    cells : slice
        A range of cells: each pair is found in the cell that both are members of, or that one of them visits.
    index : Index
        That of the sketches.
    device : {"cpu", "cuda"}, default "cpu"
        Where sketches are multiplied.

    Returns
    -------
    Links
        A pair may be there twice.
    """
    pairs, bundles = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
    with ieee_products:
        for some, connected in _comparison(parts, others, index, torch.device(device)).pairs(cells):
            pairs.append(some)
            bundles.append(connected)
    return Links(np.concatenate(pairs), np.concatenate(bundles))


class Comparison(Protocol):
    """Products of sketches of some parts on one kind of device."""

    def pairs(self, cells: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield pairs that meet in some cells, and bundles of others: see `Links`."""
        ...


def _comparison(parts: Sequence[Part], others: Sequence[Part] | None, index: Index, device: torch.device) -> Comparison:
    if has_triton(device):
        from dask_semdedup.search import triton_near

        # Kernels are loaded for each GPU.
        here = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
        return triton_near.Comparison(parts, others, index, here)
    from dask_semdedup.search import torch_near

    return torch_near.Comparison(parts, others, index)


def components(n: int, pairs: np.ndarray) -> np.ndarray:
    """Return the (n,) number of the component that each row is in: rows that (p, 2) pairs connect are in one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def listed_or_bundled(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs and no bundles; or no pairs, if there are many for these rows, and bundles that connect the same."""
    none = np.empty((0, 2), np.int64)
    rows, position = np.unique(pairs, return_inverse=True)
    if len(pairs) <= MANY * len(rows):
        return pairs, none
    _, leader, label = np.unique(components(len(rows), position.reshape(-1, 2)), return_index=True, return_inverse=True)
    return none, np.stack([rows, rows[leader[label]]], axis=1)
