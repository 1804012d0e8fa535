from __future__ import annotations

import re
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup.errors import EmbeddingError, ZeroEmbeddingWarning
from dask_semdedup.frames import embeddings
from dask_semdedup.frames.backend import array_like, tensor_like
from dask_semdedup.frames.embeddings import check_embedding_dtype, to_tensor
from tests.data import LAYOUTS, ORDER, ROWS, arrow_lists, arrow_series, fixed_size, objects
from tests.strategies import STR


@pytest.mark.parametrize("column", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_matrix(column):
    check_embedding_dtype(column.iloc[:0], "embeddings")
    for order in (None, ORDER):
        matrix = to_tensor(column, name="embeddings", order=order)
        assert matrix.dtype == torch.float32
        assert matrix.is_contiguous()
        np.testing.assert_array_equal(matrix, ROWS if order is None else ROWS[order])


@pytest.mark.parametrize("block", [1, 4, 7])
def test_blocks_of_any_size_give_the_same_matrix(monkeypatch, block):
    monkeypatch.setitem(embeddings.BLOCK_ELEMENTS, "cpu", block)
    for column in LAYOUTS.values():
        np.testing.assert_array_equal(to_tensor(column, name="x"), ROWS)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 4), st.data())
def test_any_chunks_slice_and_order_give_the_rows(sizes, width, data):
    rows = np.arange(sum(sizes) * width, dtype=np.float32).reshape(-1, width)
    column = arrow_series([chunk.tolist() for chunk in np.split(rows, np.cumsum(sizes)[:-1])], pa.list_(pa.float32()))
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    order = np.array(data.draw(st.permutations(range(stop - start))), dtype=np.int64)
    matrix = to_tensor(column.iloc[start:stop], name="x", order=order, embedding_dim=width)
    np.testing.assert_array_equal(matrix, rows[start:stop][order])


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, fixed_size])
def test_arrow_float32_is_not_copied(kind):
    column = arrow_lists(ROWS, pa.float32(), kind).iloc[1:]
    leaves = column.array.__arrow_array__().chunk(0).flatten()
    address = leaves.buffers()[1].address + leaves.offset * 4
    assert to_tensor(column, name="x").data_ptr() == address


@pytest.mark.parametrize("embedding_dim", [None, 3])
@pytest.mark.parametrize("column", [LAYOUTS["lists"], LAYOUTS["list_<float>"]], ids=["objects", "arrow"])
def test_an_empty_column_gives_an_empty_matrix(column, embedding_dim):
    assert to_tensor(column.iloc[:0], name="x", embedding_dim=embedding_dim).shape == (0, embedding_dim or 0)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 5e-324, 1e20, 1e-20])
def test_float64_rows_beyond_float32_keep_their_direction(scale):
    rows = np.array([[3.0, 4.0], [3.0 * scale, 4.0 * scale], [1.0, 1e-300]])
    expected = rows / np.abs(rows).max(axis=1, keepdims=True)
    for column in (objects(list(rows)), arrow_lists(rows, pa.float64())):
        matrix = to_tensor(column, name="x").numpy()
        np.testing.assert_array_equal(matrix[0], rows[0])
        assert np.square(matrix).sum(axis=1) == pytest.approx(np.square(matrix.astype(float)).sum(axis=1), rel=1e-6)
        np.testing.assert_allclose(matrix / np.abs(matrix).max(axis=1, keepdims=True), expected, rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("order", [None, np.array([3, 2, 1, 0])])
def test_zero_rows_are_counted_and_named(order):
    rows = arrow_lists(np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), pa.float32())
    with pytest.warns(ZeroEmbeddingWarning, match=r"2 rows have an all-zero embedding .* \(ids a, d\)"):
        to_tensor(rows, name="x", ids=pd.Series(list("abcd")), order=order)


def test_finite_rows_whose_sum_overflows_are_accepted():
    rows = np.full((4, 3), 3e38, np.float32)
    np.testing.assert_array_equal(to_tensor(arrow_lists(rows, pa.float32()), name="x"), rows)


def test_rows_that_cancel_out_infinities_are_found():
    rows = [[np.inf, 1.0], [-np.inf, 1.0], [1.0, 2.0]]
    with pytest.raises(EmbeddingError, match="2 rows with NaN or infinite values"):
        to_tensor(objects(rows), name="x")


@pytest.mark.parametrize("layout", ["objects", "arrow"])
def test_integers_that_are_read_as_bits_are_told_to_become_wider(layout):
    numbers = np.array([[1, 2], [3, 65000], [4, 5]], np.uint16)
    arrow = arrow_series([numbers.tolist()], pa.list_(pa.uint16()))
    column = arrow if layout == "arrow" else objects(list(numbers))
    with pytest.raises(EmbeddingError, match=r"1 row with NaN .*uint16 are read as the bits of float16") as error:
        to_tensor(column, name="x")
    (cast,) = re.findall(r"cast them to int32, with (\S+)\.$", str(error.value))
    wider = eval(f"column{cast}", {"column": column, "pd": pd, "pa": pa})
    np.testing.assert_array_equal(to_tensor(wider, name="x"), numbers)


def test_only_integers_that_are_read_as_bits_are_told_to_become_wider():
    for column in (objects([[np.nan]]), arrow_lists(np.array([[np.nan]]), pa.float16())):
        with pytest.raises(EmbeddingError, match=r"labels 0\)\. Drop these rows, or embed them again\.$"):
            to_tensor(column, name="x")


def as_objects(rows):
    return objects(rows)


def as_arrow(rows):
    return arrow_series([rows[:2], rows[2:]], pa.list_(pa.float32()))


def as_arrow_float64(rows):
    return arrow_series([rows[:2], rows[2:]], pa.large_list(pa.float64()))


BAD_ROWS = {
    "null": ([[1.0, 2.0], None, [3.0, 4.0], None], "2 rows with a null embedding", "11, 13"),
    "NaN": ([[1.0, 2.0], [np.nan, 1.0], [3.0, 4.0]], "1 row with NaN or infinite values", "11"),
    "infinite": ([[1.0, 2.0], [3.0, 4.0], [1.0, -np.inf]], "1 row with NaN or infinite values", "12"),
    "width": (
        [[1.0, 2.0], [1.0], [1.0, 2.0, 3.0], [3.0, 4.0]],
        "2 rows with width 1, 3, where 2 is expected",
        "11, 12",
    ),
    "empty": ([[1.0, 2.0], [3.0, 4.0], []], "1 row with an empty embedding", "12"),
    "all empty": ([[], [], []], "3 rows with an empty embedding", "10, 11, 12"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("rows", "problem", "ids"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_named(rows, problem, ids):
    numbers = pd.Series(range(10, 10 + len(rows)), index=range(5, 5 + len(rows)))
    expected = f"Column 'vectors', cluster 7: {problem} (ids {ids}). "
    for as_column in (as_objects, as_arrow, as_arrow_float64):
        with pytest.raises(EmbeddingError) as error:
            to_tensor(as_column(rows), name="vectors", ids=numbers, clusters=pd.Series([7] * len(rows)))
        assert str(error.value).startswith(expected)
        assert len(str(error.value)) > len(expected) + 10


def test_bad_rows_are_named_in_the_order_of_the_column():
    rows = [[np.nan], [1.0], [np.inf], [2.0]]
    with pytest.raises(EmbeddingError, match=r"2 rows with NaN or infinite values \(ids a, c\)"):
        to_tensor(objects(rows), name="x", ids=pd.Series(list("abcd")), order=np.array([3, 2, 1, 0]))


def test_many_bad_rows_of_several_clusters_are_counted():
    column = objects([None] * 100 + [[1.0]])
    with pytest.raises(
        EmbeddingError,
        match=r"cluster 0, 1: 100 rows with a null embedding \(index labels 0, 1, 2, 3, 4, ... \(100 in all\)\)",
    ):
        to_tensor(column, name="x", clusters=pd.Series(np.arange(101) // 50))


@pytest.mark.parametrize("element", [pa.float32(), pa.float64(), pa.float16(), pa.uint16()])
def test_null_elements_of_arrow_lists_are_named(element):
    one = element.to_pandas_dtype()(1)
    column = arrow_series([[[one, one]], [[one, None], [None, None], [one, one]]], pa.list_(element))
    with pytest.raises(EmbeddingError, match=r"2 rows with null or NaN elements \(ids b, c\)"):
        to_tensor(column, name="x", ids=pd.Series(list("abcd")))


@pytest.mark.parametrize("as_column", [as_objects, as_arrow])
def test_embedding_dim_is_checked(as_column):
    with pytest.raises(EmbeddingError, match=r"2 rows with width 2, where 3 is expected .*one model"):
        to_tensor(as_column([[1.0, 2.0], [3.0, 4.0]]), name="x", embedding_dim=3)


@pytest.mark.parametrize(
    ("odd", "problem"),
    [
        ("[1.0, 2.0]", "1 row of type str"),
        (1.5, "1 row of type float"),
        (np.array(1.5), "1 row that is a single number"),
        (["a", "b"], "1 row with something other than a flat list of numbers"),
        ([1.0, None], "1 row with something other than a flat list of numbers"),
        ([[1.0], [2.0]], "1 row with something other than a flat list of numbers"),
        (np.ones((2, 1)), "1 row with something other than a flat list of numbers"),
        ([1.0, [2.0]], "1 row with something other than a flat list of numbers"),
        (np.array([1 + 2j, 3]), "1 row with something other than a flat list of numbers"),
    ],
    ids=str,
)
def test_objects_that_are_no_vectors_are_named(odd, problem):
    rows = objects([[1.0, 2.0], [3.0, 4.0]])
    rows[1] = odd
    with pytest.raises(EmbeddingError) as error:
        to_tensor(rows, name="x", ids=pd.Series(["a", "b"]))
    assert f"Column 'x': {problem} (ids b). The column must hold lists of float16" in str(error.value)


@pytest.mark.parametrize(
    "dtype", [STR, "string", "string[python]", pd.ArrowDtype(pa.string()), pd.ArrowDtype(pa.large_string())]
)
def test_strings_get_the_advice_about_dask(dtype):
    column = pd.Series(["[1.0, 2.0]"], dtype=dtype)
    for check in (check_embedding_dtype, lambda column, name: to_tensor(column, name=name)):
        with pytest.raises(
            EmbeddingError, match=r"Column 'vectors' has dtype .*strings.*dask_semdedup.from_pandas.*JSON"
        ):
            check(column, "vectors")


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "Int64",
        "category",
        pd.ArrowDtype(pa.float32()),
        pd.ArrowDtype(pa.list_(pa.string())),
        pd.ArrowDtype(pa.list_(pa.uint32())),
        pd.ArrowDtype(pa.list_(pa.list_(pa.float32()))),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(EmbeddingError, match=r"Column 'x' has dtype .*, not embeddings: it must hold lists of float16"):
        check_embedding_dtype(pd.Series([], dtype=dtype), "x")


def test_signed_integers_are_numbers():
    np.testing.assert_array_equal(to_tensor(objects([[1, 2], [3, -4]]), name="x"), [[1.0, 2.0], [3.0, -4.0]])
    np.testing.assert_array_equal(to_tensor(arrow_lists(ROWS[3:], pa.int8()), name="x"), ROWS[3:])


def test_tensors_and_arrays_share_their_memory():
    tensor = torch.arange(3)
    array = array_like(tensor, pd.DataFrame())
    assert array.ctypes.data == tensor.data_ptr()
    assert tensor_like(array).data_ptr() == tensor.data_ptr()


def test_warnings_of_zeros_show_no_code() -> None:
    with pytest.warns(ZeroEmbeddingWarning) as record:
        to_tensor(objects([[0.0, 0.0], [1.0, 0.0]]), name="x")
    shown = warnings.formatwarning(
        record[0].message,
        record[0].category,
        record[0].filename,
        record[0].lineno,  # type: ignore[arg-type]
    )
    assert shown.startswith("dask_semdedup:1: ZeroEmbeddingWarning: Column 'x': 1 row")
    assert len(shown.splitlines()) == 1
