"""Ids are the same ids in whatever dtype."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from dask.dataframe.utils import clear_known_categories
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup import InvalidArgumentError
from dask_semdedup.frames.ids import are_equal, check_same_kind, factorize, is_in, repeats
from tests.strategies import STR, id_columns


@given(st.data())
def test_they_are_compared_as_python_values(data: st.DataObject) -> None:
    values, dtype = data.draw(id_columns(12))
    left = data.draw(st.lists(st.sampled_from(values)))
    right = data.draw(st.lists(st.sampled_from(values), min_size=len(left), max_size=len(left)))
    ids, others = pd.Series(left, dtype=dtype), pd.Series(right, dtype=dtype)
    assert is_in(ids, others).tolist() == [value in right for value in left]
    assert are_equal(ids, others).tolist() == [a == b for a, b in zip(left, right, strict=True)]
    assert repeats(ids).tolist() == [value in left[:row] for row, value in enumerate(left)]
    codes, both = factorize(ids, others).tolist(), left + right
    assert [both[codes.index(code)] for code in codes] == both
    assert len(set(codes)) == len(set(both))


def test_nulls_equal_nothing() -> None:
    ids = pd.Series([1, None, 3], dtype="Int64")
    assert is_in(ids, ids).tolist() == [True, False, True]
    assert are_equal(ids, ids).tolist() == [True, False, True]
    assert factorize(ids, ids).tolist() == [0, -1, 1, 0, -1, 1]


@pytest.mark.parametrize(
    ("left", "right"), [("int64", STR), ("int64", "float64"), ("string[pyarrow]", "int8[pyarrow]"), ("Int8", "bool")]
)
def test_other_kinds_cannot_be_compared(left: str, right: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be compared"):
        check_same_kind(pd.Series([], dtype=left), pd.Series([], dtype=right))


def test_objects_and_unknown_categories_may_be_anything() -> None:
    check_same_kind(pd.Series([1], dtype=object), pd.Series(["a"]))
    unknown = clear_known_categories(pd.Series(["a"], dtype="category"))
    check_same_kind(pd.Series([1]), unknown)
    with pytest.raises(InvalidArgumentError, match="cannot be compared"):
        check_same_kind(pd.Series([1]), pd.Series(["a"], dtype="category"))
