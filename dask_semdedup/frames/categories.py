"""Ordered categories: the types that hold them, and the order that dictionaries define."""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import pyarrow as pa

__all__ = ["is_ordered", "one_order"]


def is_ordered(type_: pa.DataType) -> bool:
    """Return whether values of a type are ordered categories."""
    return bool(pa.types.is_dictionary(type_) and type_.ordered)


def one_order(dictionaries: Iterable[pa.Array]) -> list[Any] | None:
    """Return the only order of categories that agrees with all dictionaries, or None if there is not exactly one."""
    orders = list(dict.fromkeys(tuple(dictionary.to_pylist()) for dictionary in dictionaries))
    sorter = TopologicalSorter[Any]({category: [] for order in orders for category in order})
    pairs = {pair for order in orders for pair in pairwise(order)}
    for low, high in pairs:
        sorter.add(high, low)
    try:
        merged = list(sorter.static_order())
    except CycleError:
        return None
    return merged if pairs.issuperset(pairwise(merged)) else None
