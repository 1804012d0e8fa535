"""Chains of duplicates end at the document that is kept for all of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.dataframe.dask_expr.io.parquet import ReadParquet
from dask.dataframe.utils import assert_eq
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup import IdError, InvalidArgumentError, MissingColumnsError
from dask_semdedup.lazy.groups import find_groups
from dask_semdedup.steps.groups import resolve_groups
from tests.strategies import id_columns


def make_scores(pairs: dict[Any, Any], dtype: str | None = None) -> pd.DataFrame:
    """Duplicates, each with its max_id."""
    frame = pd.DataFrame({"id": pd.Series(list(pairs), dtype=dtype), "max_id": pd.Series(pairs.values(), dtype=dtype)})
    return frame.assign(cosine_sim_score=np.float32(1))


def find(scores: pd.DataFrame, npartitions: int = 2, eps: float = 0.01) -> pd.DataFrame:
    return dd.from_pandas(scores, npartitions=npartitions, sort=False).semdedup.groups(eps).compute()


def test_ids_of_both_signs_are_the_same_ids() -> None:
    base = 2**62
    scores = make_scores({base + 1: base + 3, base + 2: base + 1}).astype({"id": "int64", "max_id": "uint64"})
    assert find(scores)["kept_id"].tolist() == [base + 3] * 2


def test_categories_are_the_strings_that_they_stand_for() -> None:
    scores = make_scores({"b": "a", "c": "b"})
    assert find(scores.astype({"id": "category"}), 1)["kept_id"].tolist() == ["a", "a"]


def test_scores_against_a_reference_have_no_chains() -> None:
    with dask.config.set({"dataframe.convert-string": False}):
        frame = dd.from_pandas(pd.DataFrame({"id": [1, 2], "embeddings": [[1.0, 0.0], [0.0, 1.0]]}), npartitions=1)
    found = frame.semdedup.against(frame, centroids=[[1.0, 1.0]])
    with pytest.raises(InvalidArgumentError, match=r"scores of `against`.*Use `duplicates`"):
        found.semdedup.groups()
    with pytest.raises(InvalidArgumentError, match="scores of `against`"):
        found[found["cosine_sim_score"] > 0.5].semdedup.groups()


def walked(pairs: dict[Any, Any]) -> dict[Any, Any]:
    """The oracle: from each duplicate, step by step, to what is no duplicate."""
    ends = {}
    for start in pairs:
        end = start
        while end in pairs:
            end = pairs[end]
        ends[start] = end
    return ends


@st.composite
def forests(draw: st.DrawFn) -> tuple[dict[Any, Any], str]:
    """Some of the documents are duplicates of an earlier one each; they come in any order."""
    size = draw(st.integers(0, 40))
    ids, dtype = draw(id_columns(size))
    reach = draw(st.sampled_from([1, 3, 40]))
    earlier = [draw(st.integers(-1 if reach > 1 else 0, reach - 1)) for _ in ids]
    pairs = {ids[row]: ids[max(0, row - 1 - back)] for row, back in enumerate(earlier) if row and back >= 0}
    order = draw(st.permutations(list(pairs)))
    return {name: pairs[name] for name in order}, dtype


@given(forests(), st.integers(1, 5))
def test_every_duplicate_gets_the_document_at_the_end_of_its_chain(forest: tuple[dict, str], npartitions: int) -> None:
    pairs, dtype = forest
    ddf = dd.from_pandas(make_scores(pairs, dtype), npartitions=npartitions, sort=False)
    ends = walked(pairs)
    counts = Counter(ends.values())
    lazy = ddf.semdedup.groups(0.01)
    found = lazy.compute(scheduler="sync")
    assert found.id.tolist() == list(pairs)
    assert found.kept_id.tolist() == list(ends.values())
    assert found.n_duplicates.tolist() == [counts[end] for end in ends.values()]
    assert found.n_duplicates.dtype == np.int64
    if dtype != "category":  # whose categories Dask does not tell beforehand
        assert found.dtypes.tolist() == lazy.dtypes.tolist() == [*ddf.dtypes[["id", "max_id"]], np.int64]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 1000, 2**17])
def test_long_chains_take_few_passes(length: int) -> None:
    rng = np.random.default_rng(length)
    ids = rng.permutation(length + 1)
    chain = pd.DataFrame({"id": ids[1:], "max_id": ids[:-1]}).sample(frac=1, random_state=0, ignore_index=True)
    found = resolve_groups(chain)
    assert (found.kept_id == ids[0]).all()
    assert (found.n_duplicates == length).all()


def test_rows_that_are_no_duplicates_do_not_count() -> None:
    scores = pd.DataFrame(
        {"id": [1, 2, 3, 4], "max_id": [1, 1, 2, 3], "cosine_sim_score": np.array([0, 1, 0.5, 1], np.float32)}
    )
    lazy = dd.from_pandas(scores, npartitions=4).semdedup.groups(0.01)
    assert_eq(lazy, pd.DataFrame({"id": [2, 4], "kept_id": [1, 3], "n_duplicates": [1, 1]}))
    assert_eq(lazy, find(scores, npartitions=1))


@pytest.mark.parametrize("eps", [1, 2])
def test_the_first_row_of_a_cluster_is_kept_whatever_eps_is(eps: float) -> None:
    scores = make_scores({1: 1, 2: 1, 3: 2, 9: 9}).assign(cosine_sim_score=np.float32([0, 0.1, -0.3, 0]))
    expected = {1: [2], 2: [2, 3]}[eps]
    found = find(scores, eps=eps)
    assert found.id.tolist() == expected
    assert found.kept_id.tolist() == [1] * len(expected)


def test_no_duplicates_and_empty_partitions() -> None:
    scores = make_scores({"b": "a", "c": "b"})
    lazy = dd.from_pandas(scores, npartitions=2)
    empty = lazy[lazy.id == "z"].semdedup.groups()
    assert_eq(empty, pd.DataFrame({"id": [], "kept_id": [], "n_duplicates": []}).astype(empty.dtypes.to_dict()))
    assert lazy[lazy.id == "b"].semdedup.groups().compute().kept_id.tolist() == ["a"]


def test_groups_can_be_worked_on() -> None:
    found = dd.from_pandas(make_scores({2: 1, 3: 2, 5: 4}), npartitions=3).semdedup.groups()
    assert found[found.n_duplicates > 1].id.compute().tolist() == [2, 3]
    assert not found.known_divisions


def test_only_ids_and_scores_are_read(tmp_path: Path) -> None:
    scores = make_scores({2: 1, 3: 2}).assign(centroid=0)
    scores.to_parquet(tmp_path / "scores.parquet")
    plan = dd.read_parquet(tmp_path).semdedup.groups().simplify()
    assert [set(read.columns) for read in plan.expr.find_operations(ReadParquet)] == [set(scores) - {"centroid"}]


@pytest.mark.parametrize(
    ("pairs", "lost"), [({1: 2, 2: 1}, "1, 2"), ({1: 2, 2: 3, 3: 1, 4: 0}, "1, 2, 3"), ({1: 2, 2: 3, 3: 2}, "1, 2, 3")]
)
def test_circles_are_errors(pairs: dict[int, int], lost: str) -> None:
    count = len(lost.split(", "))
    with pytest.raises(IdError, match=rf"{count} duplicates have no document kept.*cycle \(ids {lost}\)"):
        find(make_scores(pairs))


@given(st.integers(2, 70), st.integers(0, 70))
def test_circles_of_every_length_are_found(length: int, tail: int) -> None:
    pairs = {row: (row + 1) % length for row in range(length)}
    pairs |= {length + row: length + row - 1 if row else 0 for row in range(tail)}
    with pytest.raises(IdError, match=rf"{length + tail} duplicates"):
        resolve_groups(make_scores(pairs))


def test_repeated_ids_are_counted_and_named() -> None:
    scores = pd.concat([make_scores({"b": "a", "c": "a", "d": "a"}), make_scores({"b": "a", "d": "c"})])
    with pytest.raises(IdError, match=r"2 of 3 ids repeat among the duplicates \(ids b, d\)"):
        find(scores)


@pytest.mark.parametrize("column", ["id", "max_id"])
def test_null_ids(column: str) -> None:
    scores = make_scores({"b": "a", "c": "a"})
    scores[column] = scores[column].where(scores.index == 0)
    with pytest.raises(IdError, match=rf"Column '{column}': 1 duplicate has a null id"):
        find(scores)


def test_bad_arguments() -> None:
    ddf = dd.from_pandas(make_scores({2: 1}), npartitions=1)
    with pytest.raises(InvalidArgumentError, match="eps must be a number from 0 to 2"):
        ddf.semdedup.groups([0.1, 0.2])
    with pytest.raises(MissingColumnsError, match=r"\['max_id'\] not found"):
        ddf[["id", "cosine_sim_score"]].semdedup.groups()


def test_duplicates_of_their_own_id_are_counted_and_named() -> None:
    scores = pd.DataFrame({"id": [1, 2, 2, 3], "max_id": [1, 1, 2, 3], "cosine_sim_score": [0.0, 0.5, 1.0, 1.0]})
    with pytest.raises(IdError, match=r"Column 'id': ids repeat, so that 2 rows would be dropped .* \(ids 2, 3\)"):
        dd.from_pandas(scores, npartitions=1).semdedup.groups(0.1).compute()


@pytest.mark.parametrize("npartitions", [1, 2])
def test_an_id_of_a_duplicate_and_of_a_row_that_is_kept_elsewhere(npartitions: int) -> None:
    """Rows 5 are a duplicate of 1, and the row kept for 6, which is nothing like 1."""
    scores = pd.DataFrame({"id": [1, 5, 5, 6], "max_id": [1, 1, 5, 5], "cosine_sim_score": [0.0, 0.999, 0.0, 0.999]})
    with pytest.raises(IdError, match=r"1 row has duplicates and the id of another row, .*\(ids 5\)"):
        find_groups(dd.from_pandas(scores, npartitions=npartitions), eps=0.01).compute()


def test_a_row_that_is_kept_may_stand_there_twice() -> None:
    """As after a merge with several rows for one."""
    scores = pd.DataFrame({"id": [1, 1, 5, 6], "max_id": [1, 1, 1, 5], "cosine_sim_score": [0.0, 0.0, 0.999, 0.999]})
    found = find_groups(dd.from_pandas(scores, npartitions=1), eps=0.01).compute()
    assert found.to_numpy().tolist() == [[5, 1, 2], [6, 1, 2]]
