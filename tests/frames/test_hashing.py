from __future__ import annotations

import uuid
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup import IdError
from dask_semdedup.frames import hashing
from dask_semdedup.frames.hashing import checksum, hash_ids
from dask_semdedup.frames.ids import ids_to_arrow
from tests.strategies import STR

BITS = (1 << 64) - 1
STRING_DTYPES = [
    object,
    "str",
    "string[python]",
    "string[pyarrow]",
    "category",
    pd.ArrowDtype(pa.string()),
    pd.ArrowDtype(pa.large_string()),
    pd.ArrowDtype(pa.string_view()),
]


def mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & BITS
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & BITS
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & BITS
    return value ^ (value >> 31)


def expected(value: int | str, seed: int) -> int:
    """The hash of a single id, in Python's own integers."""
    if isinstance(value, str):
        value = int(pd.util.hash_array(np.array([value], dtype=object), categorize=False)[0])
    return mix((value ^ mix(seed & BITS)) & BITS)


def hashes(ids: pd.Series, seed: int) -> list[int]:
    return hash_ids(ids, seed).tolist()


def test_the_mixer_is_splitmix64():
    # The generator's first outputs from the state 0, as its authors publish them.
    assert [mix(0), mix(0x9E3779B97F4A7C15)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(st.lists(st.text()), st.integers(), st.integers(1, 20))
def test_strings_hash_one_by_one_as_in_blocks(strings, seed, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "BLOCK_ROWS", block)
        ids = pd.Series(strings, dtype="str")
        assert hashes(ids, seed) == [expected(value, seed) for value in strings]


@given(st.lists(st.integers(-(2**63), 2**64 - 1)), st.integers())
def test_integers_hash_as_their_bits_do(values, seed):
    for dtype in (np.int64, np.uint64):
        fitting = [value for value in values if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max]
        assert hashes(pd.Series(fitting, dtype=dtype), seed) == [expected(value, seed) for value in fitting]


@pytest.mark.parametrize("dtype", STRING_DTYPES, ids=str)
def test_the_dtype_of_strings_does_not_matter(dtype):
    strings = ["", "a", "ä", "ab", "ba", "a\0", "zebra" * 20]

    def column(values):
        # To pandas 2 objects are of the same category with and without "\0".
        return pd.Series(values, dtype=STR).astype(dtype) if dtype == "category" else pd.Series(values, dtype=dtype)

    assert hashes(column(strings), 3) == [expected(value, 3) for value in strings]
    assert hashes(column(["x", *strings])[1:], 3) == [expected(value, 3) for value in strings]


@pytest.mark.parametrize(
    "dtype", ["int8", "uint64", "Int32", "UInt8", "category", object, pd.ArrowDtype(pa.int16())], ids=str
)
def test_the_width_of_integers_does_not_matter(dtype):
    assert hashes(pd.Series([7, 0, 127], dtype=dtype), 42) == [expected(value, 42) for value in (7, 0, 127)]


def test_objects_hash_as_their_strings():
    ids = [uuid.UUID(int=1), uuid.UUID(int=2)]
    assert hashes(pd.Series(ids, dtype=object), 0) == hashes(pd.Series(map(str, ids), dtype="str"), 0)
    dates = pd.Series(pd.to_datetime(["2026-01-01", "2026-01-02"]))
    assert len(set(hashes(dates, 0))) == 2


def test_bytes_hash_as_strings_of_the_same_bytes():
    assert hashes(pd.Series([b"ab", b"\xff"], dtype=object), 1)[0] == expected("ab", 1)


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        ([1, None], "Int64"),
        (["a", None], "str"),
        (["a", None], object),
        (["a", None], "category"),
        ([1, None], "category"),
        ([2**60, None], pd.CategoricalDtype(np.array([2**60], np.uint64))),
    ],
)
def test_missing_ids_hash_to_something(ids, dtype):
    assert hashes(pd.Series(ids, dtype=dtype), 42)[0] == expected(ids[0], 42)


def test_the_seed_decides_the_order():
    for ids in (pd.Series(range(100)), pd.Series([f"document-{number}" for number in range(100)])):
        orders = {tuple(hash_ids(ids, seed).argsort().tolist()) for seed in (0, 1, 42, -1)}
        assert len(orders) == 4


def test_hashes_do_not_collide_and_have_all_bits_in_use():
    for ids in (pd.Series(range(20_000)), pd.Series([f"document-{number}" for number in range(20_000)])):
        values = hash_ids(ids, 42)
        assert len(np.unique(values)) == len(values)
        shares = (values[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(axis=0)
        np.testing.assert_allclose(shares, 0.5, atol=0.02)


@pytest.mark.parametrize("type_", [pa.uuid(), pa.binary(16), pa.binary()], ids=str)
def test_uuids_hash_as_their_bytes_do(type_):
    raw = [uuid.UUID(int=number).bytes for number in range(5)]
    array = pa.array(raw, pa.binary(16)).cast(type_)
    ids = pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([array])))
    assert hashes(ids, 1) == hashes(pd.Series(raw, dtype=object), 1)
    assert len(set(hashes(ids, 1))) == 5


def test_missing_ids_of_python_objects_stay_missing():
    assert ids_to_arrow(pd.Series([Decimal(1), None], dtype=object)).null_count == 1


def test_objects_that_are_large_integers():
    ids = pd.Series([2**63 + 1, 2**63 + 2, None], dtype=object)
    assert ids_to_arrow(ids).to_pylist() == [2**63 + 1, 2**63 + 2, None]
    with pytest.raises(IdError, match=r"Column 'doc' holds integers that fit neither int64 nor uint64.*astype\(str\)"):
        ids_to_arrow(pd.Series([2**63, -1], dtype=object, name="doc"))


def test_a_checksum_tells_ids_and_their_order() -> None:
    series = [
        pd.Series([1, 2, 3]),
        pd.Series([2, 1, 3]),
        pd.Series([1, 2]),
        pd.Series([1, 2, 4]),
        pd.Series(["1", "2", "3"]),
    ]
    assert len({checksum(ids) for ids in series}) == len(series)
    assert checksum(series[0]) == checksum(pd.Series([1, 2, 3], index=[5, 5, 0]))
    assert checksum(series[0][:0]) == 0
