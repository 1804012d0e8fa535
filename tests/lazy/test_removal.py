"""Removal takes out the rows of the duplicates' ids, and changes nothing else."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from dask.dataframe.dask_expr._shuffle import ShuffleBase
from dask.dataframe.dask_expr.io.parquet import ReadParquet
from dask.dataframe.utils import assert_eq
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_semdedup import IdError, InvalidArgumentError, MissingColumnsError, from_pandas, read_table
from tests.data import arrow_lists
from tests.strategies import STR, id_columns

BOTH = pytest.mark.parametrize("broadcast", [True, False])
UUIDS = [uuid.UUID(int=7 * number) for number in range(12)]
INTEGERS = ["int8", "int32", "int64", "uint64", "Int16", "Int64", "UInt64", "int32[pyarrow]", "uint64[pyarrow]"]
STRINGS = ["str", "object", "string[python]", "category", "string[pyarrow]", "large_string[pyarrow]"]


@pytest.fixture
def documents() -> pd.DataFrame:
    """Twelve documents; the index repeats, as it does where files have been put together."""
    frame = pd.DataFrame(
        {
            "id": pd.Series(range(12), dtype="int64"),
            "text": pd.Series([f"text {number}" for number in range(12)], dtype="str"),
            "kind": pd.Categorical(list("abcabcabcabc")),
            "embeddings": pd.Series([[float(n), 1.0] for n in range(12)], dtype=pd.ArrowDtype(pa.list_(pa.float32()))),
            "size": pd.Series([1, None] * 6, dtype="Int8"),
        }
    )
    return frame.set_index(pd.Index([0, 1, 2, 3] * 3, name="row"))


def lazily(frame: pd.DataFrame, npartitions: int = 3) -> dd.DataFrame:
    """Without making strings of objects."""
    with dask.config.set({"dataframe.convert-string": False}):
        return dd.from_pandas(frame, npartitions=npartitions, sort=False)


def ids(*values: Any, dtype: Any = None, name: str = "id") -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(list(values), dtype=dtype)})


class TestRowsLeft:
    @pytest.mark.parametrize("as_dask", [True, False])
    def test_everything_else_stays_as_it_was(self, documents: pd.DataFrame, as_dask: bool) -> None:
        duplicates = ids(1, 5, 6, 99)
        ddf = lazily(documents)
        left = ddf.semdedup.remove(lazily(duplicates, 2) if as_dask else duplicates)
        expected = documents[~documents.id.isin([1, 5, 6])]
        assert_eq(left, expected, check_divisions=False, sort_results=False)
        pd.testing.assert_frame_equal(left.compute(), expected)
        assert left.npartitions == ddf.npartitions
        assert [len(part) for part in dask.compute(*left.to_delayed())] == [3, 2, 4]

    def test_shuffled_rows_are_the_same_in_another_order(self, documents: pd.DataFrame) -> None:
        left = lazily(documents).semdedup.remove(lazily(ids(1, 5, 6, 99), 2), broadcast=False)
        expected = documents[~documents.id.isin([1, 5, 6])]
        pd.testing.assert_frame_equal(left.compute().sort_values("id"), expected)
        assert left.npartitions == 3
        assert list(left.columns) == list(documents)

    @BOTH
    @pytest.mark.parametrize(("removed", "count"), [((), 12), (range(12), 0), ((-1, 12), 12)])
    def test_none_and_all(self, documents: pd.DataFrame, broadcast: bool, removed: Any, count: int) -> None:
        left = lazily(documents).semdedup.remove(ids(*removed, dtype="int64"), broadcast=broadcast)
        expected = documents[documents.id.isin(removed) == (count == 0)].iloc[:count]
        pd.testing.assert_frame_equal(left.compute().sort_values("id"), expected)
        pd.testing.assert_frame_equal(left._meta, documents[:0])
        assert len(left) == count

    @BOTH
    def test_empty_partitions(self, documents: pd.DataFrame, broadcast: bool) -> None:
        ddf = lazily(documents)
        some = ddf[(ddf.id < 4) | (ddf.id > 7)]
        duplicates = lazily(ids(1, 2, 9), 3)
        left = some.semdedup.remove(duplicates[duplicates.id != 2], broadcast=broadcast)
        assert sorted(left.id.compute()) == [0, 2, 3, 8, 10, 11]
        nothing = ddf[ddf.id < 0].semdedup.remove(duplicates, broadcast=broadcast)
        assert_eq(nothing, documents[:0], check_divisions=False, sort_results=False)

    def test_known_divisions_stay(self) -> None:
        ddf = dd.from_pandas(pd.DataFrame({"id": range(10)}), npartitions=3)
        left = ddf.semdedup.remove(ids(3, 4))
        assert left.divisions == ddf.divisions
        assert_eq(left, pd.DataFrame({"id": [0, 1, 2, 5, 6, 7, 8, 9]}, index=[0, 1, 2, 5, 6, 7, 8, 9]))

    def test_columns_of_other_names(self, documents: pd.DataFrame) -> None:
        ddf = lazily(documents.rename(columns={"id": "document"}))
        left = ddf.semdedup.remove(ids(3, name="which"), id_field="document", duplicates_id_field="which")
        assert 3 not in left.document.compute().tolist()
        assert len(left) == 11

    @settings(max_examples=40)
    @given(st.data(), st.integers(1, 4), st.integers(1, 3), st.booleans())
    def test_what_is_left_is_what_python_leaves(
        self, data: st.DataObject, npartitions: int, parts: int, broadcast: bool
    ) -> None:
        values, dtype = data.draw(id_columns(20))
        removed = data.draw(st.lists(st.sampled_from(values)))
        other_dtype = data.draw(st.sampled_from(INTEGERS[1:] if isinstance(values[0], int) else STRINGS))
        if other_dtype == "Int16":
            other_dtype = "Int64"
        documents = pd.DataFrame({"id": pd.Series(values[:15], dtype=dtype), "row": range(15)})
        duplicates = ids(*removed, dtype=other_dtype)
        left = lazily(documents, npartitions).semdedup.remove(lazily(duplicates, parts), broadcast=broadcast)
        expected = [row for row, value in enumerate(values[:15]) if value not in removed]
        assert sorted(left.row.compute(scheduler="sync")) == expected


class TestIds:
    @BOTH
    @pytest.mark.parametrize("left", INTEGERS)
    def test_integers_of_any_width(self, left: str, broadcast: bool) -> None:
        ddf = lazily(pd.DataFrame({"id": pd.Series(range(6), dtype=left)}))
        for right in ("int32", "uint64", "Int64", "int16[pyarrow]"):
            kept = ddf.semdedup.remove(ids(1, 4, dtype=right), broadcast=broadcast).id.compute()
            assert sorted(kept) == [0, 2, 3, 5], right
            assert kept.dtype == ddf.id.dtype, right

    @BOTH
    def test_integers_that_only_one_of_the_dtypes_can_hold(self, broadcast: bool) -> None:
        ddf = lazily(ids(2**64 - 1, 2**63, 2**53, 5, dtype="uint64"))
        kept = ddf.semdedup.remove(ids(-1, -(2**63), 2**53 + 1, 5, dtype="int64"), broadcast=broadcast)
        assert set(kept.id.compute()) == {2**64 - 1, 2**63, 2**53}

    @BOTH
    @pytest.mark.parametrize("left", STRINGS)
    def test_strings_of_any_dtype(self, left: str, broadcast: bool) -> None:
        texts = list(map(str, UUIDS))
        ddf = lazily(ids(*texts, dtype=left))
        for right in STRINGS:
            kept = ddf.semdedup.remove(ids(*texts[3:6], "?", dtype=right), broadcast=broadcast)
            assert sorted(kept.id.compute()) == texts[:3] + texts[6:], right

    @BOTH
    @pytest.mark.parametrize("kind", ["objects", "bytes", "arrow uuid", "arrow bytes", "arrow dictionary"])
    def test_uuids_and_bytes(self, kind: str, broadcast: bool) -> None:
        raw = [value.bytes for value in UUIDS]
        make: dict[str, Callable[[slice], pd.Series]] = {
            "objects": lambda part: pd.Series(UUIDS[part], dtype=object),
            "bytes": lambda part: pd.Series(raw[part], dtype=object),
            "arrow uuid": lambda part: of_arrow(pa.array(raw[part], pa.binary(16)).cast(pa.uuid())),
            "arrow bytes": lambda part: of_arrow(pa.array(raw[part], pa.binary())),
            "arrow dictionary": lambda part: of_arrow(pa.array(list(map(str, UUIDS[part]))).dictionary_encode()),
        }
        documents = pd.DataFrame({"id": make[kind](slice(None)), "row": range(12)})
        duplicates = pd.DataFrame({"id": make[kind](slice(3, 6))})
        kept = lazily(documents).semdedup.remove(duplicates, broadcast=broadcast)
        assert sorted(kept.row.compute()) == [0, 1, 2, *range(6, 12)]

    @BOTH
    @pytest.mark.parametrize("dtype", ["Int64", "float64", "str", "object", "int64[pyarrow]", "string[pyarrow]"])
    def test_null_ids_are_kept(self, dtype: str, broadcast: bool) -> None:
        values = [1, None, 2, None, 3] if dtype.lower().startswith(("int", "float")) else ["1", None, "2", None, "3"]
        ddf = lazily(ids(*values, dtype=dtype).assign(row=range(5)))
        kept = ddf.semdedup.remove(ids(values[2], None, dtype=dtype), broadcast=broadcast)
        assert sorted(kept.row.compute()) == [0, 1, 3, 4]

    @BOTH
    def test_columns_without_any_id(self, broadcast: bool) -> None:
        ddf = lazily(ids(None, None, dtype=object).assign(row=range(2)))
        assert len(ddf.semdedup.remove(ids(1, 2), broadcast=broadcast).compute()) == 2


def of_arrow(array: pa.Array) -> pd.Series:
    return pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([array])))


class TestRepeatedIds:
    @BOTH
    @pytest.mark.parametrize("npartitions", [1, 2, 5])
    def test_they_are_counted_and_named(self, npartitions: int, broadcast: bool) -> None:
        ddf = lazily(ids("a", "b", "c", "d", "b", "c", "b", "e", "e"), npartitions)
        left = ddf.semdedup.remove(ids("a", "b", "c"), broadcast=broadcast)
        with pytest.raises(IdError, match=r"Column 'id': 2 ids of the duplicates occur in several rows .*b.*c.*Give"):
            left.compute()

    def test_one_of_them(self) -> None:
        ddf = lazily(ids(7, 7, 8), 2)
        with pytest.raises(IdError, match=r"1 id of the duplicates occurs in several rows of the data \(ids 7\)"):
            ddf.semdedup.remove(ids(7)).compute()

    @BOTH
    def test_no_partition_is_given_out_before(self, broadcast: bool) -> None:
        ddf = lazily(ids(*range(10), 9, 9), 6)
        left = ddf.semdedup.remove(ids(9), broadcast=broadcast)
        for part in left.to_delayed(optimize_graph=False):
            with pytest.raises(IdError):
                part.compute()
        with pytest.raises(IdError):
            left.partitions[0].compute()
        with pytest.raises(IdError):
            left.head(1)

    @BOTH
    def test_those_that_are_not_removed_may_repeat(self, broadcast: bool) -> None:
        ddf = lazily(ids(1, 1, 2, None, None, dtype="Int64"))
        assert len(ddf.semdedup.remove(ids(2, 2, 2), broadcast=broadcast).compute()) == 4


class TestDuplicates:
    @pytest.fixture
    def scores(self) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "id": [0, 1, 2, 3],
                "max_id": [0, 0, 1, 2],
                "cosine_sim_score": np.array([0, 1, 0.95, 0.5], np.float32),
                "centroid": 0,
            }
        )

    def left(self, documents: pd.DataFrame, *args: Any, **kwargs: Any) -> list[int]:
        left = lazily(documents).semdedup.remove(*args, **kwargs).id.compute().tolist()
        assert left[-8:] == list(range(4, 12))
        return left[:-8]

    def test_of_one_eps(self, documents: pd.DataFrame, scores: pd.DataFrame) -> None:
        lazy = dd.from_pandas(scores, npartitions=2).semdedup
        assert self.left(documents, lazy.duplicates(0.01)) == [0, 2, 3]
        assert self.left(documents, lazy.groups(0.05)) == [0, 3]

    def test_the_first_row_of_a_cluster_is_kept(self, documents: pd.DataFrame, scores: pd.DataFrame) -> None:
        duplicates = dd.from_pandas(scores, npartitions=2).semdedup.duplicates(eps=2)
        assert self.left(documents, duplicates, eps=2) == [0]

    def test_rows_found_in_another_frame_may_have_its_ids(self) -> None:
        rows = arrow_lists(np.eye(8, dtype=np.float32), pa.float32())
        reference, new = (
            dd.from_pandas(pd.DataFrame({"id": ids, "embeddings": rows}), npartitions=2)
            for ids in (range(8), [0, 1, 12, 13, 14, 15, 16, 17])
        )
        found = new[new["id"] < 13].semdedup.against(reference, centroids=np.ones((1, 8)))
        assert found["id"].compute().tolist() == [0, 1, 12]
        assert new.semdedup.remove(found)["id"].compute().tolist() == [13, 14, 15, 16, 17]

    def test_scores_without_eps_are_no_duplicates(self, documents: pd.DataFrame, scores: pd.DataFrame) -> None:
        left = lazily(documents).semdedup.remove(scores)
        with pytest.raises(
            InvalidArgumentError,
            match=r"1 row has no preferred row \(ids .*0.*\).*remove\(\.\.\., eps=",
        ):
            left.compute()

    def test_all_scores_by_eps(self, documents: pd.DataFrame, scores: pd.DataFrame) -> None:
        assert self.left(documents, scores, eps=0.05) == [0, 3]

    def test_of_several_eps_one_must_be_chosen(self, documents: pd.DataFrame, scores: pd.DataFrame) -> None:
        several = dd.from_pandas(scores, npartitions=2).semdedup.duplicates([0.01, 0.05])
        with pytest.raises(
            InvalidArgumentError, match=r"all rows .* eps=0\.01, eps=0\.05: .* remove\(\.\.\., eps=0\.01\)"
        ):
            lazily(documents).semdedup.remove(several)
        with pytest.raises(InvalidArgumentError, match=r"found at eps=0\.01, eps=0\.05, not at eps=0\.02"):
            lazily(documents).semdedup.remove(several, eps=0.02)
        assert self.left(documents, several, eps=0.01) == [0, 2, 3]
        assert self.left(documents, several[several["eps=0.05"]], eps=0.05) == [0, 3]

    def test_found_in_the_same_frame(self, documents: pd.DataFrame) -> None:
        documents = documents.assign(centroid=documents.id % 2, cosine_dist_to_cent=documents.id / 16)
        ddf = lazily(documents)
        duplicates = ddf.semdedup.pairwise(which_to_keep="easy").semdedup.duplicates(eps=0.001)
        removed = duplicates.id.compute()
        assert 0 < len(removed) < 12
        left = ddf.semdedup.remove(duplicates)
        assert left.id.compute().tolist() == documents.id[~documents.id.isin(removed)].tolist()


class TestBadInput:
    """All of these are errors when the graph is built, but for that which only the data tell."""

    @pytest.mark.parametrize("broadcast", [True, False])
    def test_ids_of_different_types(self, documents: pd.DataFrame, broadcast: bool) -> None:
        ddf = lazily(documents.rename(columns={"id": "document"}))
        message = r"'document' has dtype int64, column 'id' of the duplicates has dtype str.*astype"
        with pytest.raises(InvalidArgumentError, match=message):
            ddf.semdedup.remove(ids("1", dtype=STR), "document", broadcast=broadcast)
        with pytest.raises(InvalidArgumentError, match="different types"):
            ddf.semdedup.remove(ids(1.0), "document", broadcast=broadcast)
        with pytest.raises(InvalidArgumentError, match="different types"):
            ddf.semdedup.remove(ids("a", dtype=STR).astype("category"), "document", broadcast=broadcast)

    @BOTH
    def test_objects_that_turn_out_to_be_of_another_type(self, broadcast: bool) -> None:
        ddf = lazily(ids("1", "2", dtype=object), 1)
        with pytest.raises(InvalidArgumentError, match=r"'id' has dtype object, .* has dtype int64"):
            ddf.semdedup.remove(ids(1, 2), broadcast=broadcast).compute()

    def test_no_column_of_ids(self, documents: pd.DataFrame) -> None:
        ddf = lazily(documents)
        with pytest.raises(MissingColumnsError, match=r"\['doc'\] not found.*column of ids of the data as id_field"):
            ddf.semdedup.remove(ids(1), "doc")
        with pytest.raises(MissingColumnsError, match=r"\['id'\] not found.*\['x'\].*as duplicates_id_field"):
            ddf.semdedup.remove(ids(1, name="x"))

    def test_no_scores_to_compare_with_eps(self, documents: pd.DataFrame) -> None:
        with pytest.raises(MissingColumnsError, match="cosine_sim_score"):
            lazily(documents).semdedup.remove(ids(1), eps=0.1)
        with pytest.raises(InvalidArgumentError, match="eps must be a number"):
            lazily(documents).semdedup.remove(ids(1), eps=7)

    @pytest.mark.parametrize("duplicates", [[1, 2], pd.Series([1]), {"id": [1]}, None])
    def test_no_frame(self, documents: pd.DataFrame, duplicates: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="duplicates must be a DataFrame of Dask, pandas or cuDF, not"):
            lazily(documents).semdedup.remove(duplicates)

    def test_lists_are_no_ids(self, documents: pd.DataFrame) -> None:
        with pytest.raises(InvalidArgumentError, match=r"Column 'embeddings' has dtype list.*as id_field"):
            lazily(documents).semdedup.remove(ids(1), "embeddings")


class TestPlan:
    @pytest.fixture
    def on_disk(self, documents: pd.DataFrame, tmp_path: Path) -> Path:
        for part in range(4):
            documents[["id", "text", "size"]].iloc[3 * part : 3 * part + 3].to_parquet(tmp_path / f"{part}.parquet")
        return tmp_path

    def columns_read(self, ddf: dd.DataFrame) -> list[list[str]]:
        return sorted((read.columns for read in ddf.simplify().expr.find_operations(ReadParquet)), key=len)

    @BOTH
    def test_nothing_is_computed(self, broadcast: bool) -> None:
        def part(number: int) -> pd.DataFrame:
            made.append(number)
            return ids(number, dtype="int64")

        made: list[int] = []
        meta = ids(dtype="int64")
        ddf, duplicates = (dd.from_map(part, numbers, meta=meta) for numbers in ([1, 2, 3], [2, 7]))
        left = ddf.semdedup.remove(duplicates, broadcast=broadcast)
        assert not made
        assert sorted(left.id.compute()) == [1, 3]

    @BOTH
    @pytest.mark.parametrize("filesystem", ["fsspec", "arrow"])
    def test_the_check_reads_the_ids_alone(self, on_disk: Path, filesystem: str, broadcast: bool) -> None:
        ddf = dd.read_parquet(on_disk, filesystem=filesystem)
        left = ddf.semdedup.remove(ids(3, 4), broadcast=broadcast)
        assert self.columns_read(left) == [["id"], list(ddf.columns)]
        assert self.columns_read(left[["text"]]) == [["id"], ["id", "text"]]
        assert self.columns_read(left["text"]) == [["id"], ["id", "text"]]
        assert self.columns_read(left.index) == [["id"]]
        assert len(left["text"].compute()) == len(left) == len(left.index.compute()) == 10

    @pytest.mark.parametrize("filesystem", ["fsspec", "arrow"])
    def test_rows_left_can_be_worked_on_without_a_shuffle(self, on_disk: Path, filesystem: str) -> None:
        ddf = dd.read_parquet(on_disk, filesystem=filesystem)
        left = ddf.semdedup.remove(lazily(ids(3, 4), 2))
        some = left[left["size"] == 1]
        some = some.assign(double=some.id * 2)
        assert not list(some.optimize(fuse=False).expr.find_operations(ShuffleBase))
        assert sorted(some.double.compute()) == [0, 4, 12, 16, 20]
        of_one = ddf.partitions[1].id.compute()
        assert left.partitions[1].id.compute().tolist() == of_one[~of_one.isin([3, 4])].tolist()

    def test_duplicates_are_collapsed_and_checked_once(self, documents: pd.DataFrame) -> None:
        left = lazily(documents, 6).semdedup.remove(lazily(ids(3, 4, 5), 3))
        keys = [str(key) for key in left.optimize().__dask_graph__()]
        assert sum("checked-ids" in key for key in keys) == 1
        assert sum("'remove-" in key for key in keys) == 6

    def test_a_chain_of_removals(self, documents: pd.DataFrame) -> None:
        left = lazily(documents).semdedup.remove(ids(1, 2)).semdedup.remove(ids(2, 3))
        assert left.id.compute().tolist() == [0, *range(4, 12)]

    def test_names_depend_on_the_arguments(self, documents: pd.DataFrame) -> None:
        ddf = lazily(documents)
        assert ddf.semdedup.remove(ids(1))._name == ddf.semdedup.remove(ids(1))._name
        assert ddf.semdedup.remove(ids(1))._name != ddf.semdedup.remove(ids(2))._name

    def test_alignment_by_cluster_stays_known(self, documents: pd.DataFrame) -> None:
        from dask_semdedup.lazy.alignment import align, is_aligned

        aligned = align(lazily(documents[["id", "text"]].assign(centroid=documents.id % 3)), "centroid")
        assert is_aligned(aligned.semdedup.remove(ids(1)), "centroid")


def test_frames_of_pandas_leave_dasks_configuration_alone() -> None:
    """Also where several threads come at once."""
    ddf, duplicates = dd.from_pandas(pd.DataFrame({"id": range(9)}), npartitions=2), pd.DataFrame({"id": [1, 2]})
    together = threading.Barrier(4)

    def remove(_: int) -> None:
        together.wait()
        ddf.semdedup.remove(duplicates)

    with dask.config.set({"dataframe.convert-string": True}), ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            list(pool.map(remove, range(4)))
            assert dask.config.get("dataframe.convert-string") is True


def test_the_rows_that_are_kept_are_not_taken_for_duplicates(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": range(20), "embeddings": [[1.0, i % 5] for i in range(20)]})
    ddf = from_pandas(frame)
    kept = ddf.semdedup.deduplicate(eps=0.001)
    kept.semdedup.to_parquet(tmp_path / "kept")
    for rows in (kept, kept.persist(), kept.compute(), read_table(tmp_path / "kept"), ddf):
        with pytest.raises(InvalidArgumentError, match=r"duplicates .*keeps"):
            ddf.semdedup.remove(rows)
        ids = rows[["id"]].persist() if isinstance(rows, dd.DataFrame) else rows[["id"]]
        assert len(ddf.semdedup.remove(ids)) == 20 - len(rows)
