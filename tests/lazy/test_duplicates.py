"""Scores to duplicates."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask._task_spec import convert_legacy_graph
from dask.dataframe.dask_expr.io.parquet import ReadParquet
from dask.dataframe.utils import assert_eq
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup import InvalidArgumentError, MissingColumnsError
from dask_semdedup.lazy.duplicates import EPS_GRID
from dask_semdedup.report.plots import duplicates_curve
from dask_semdedup.steps.duplicates import find_duplicates, is_duplicate, threshold
from tests.strategies import score_lists

SEVERAL = [lambda ddf, eps: ddf.semdedup.duplicates(eps), lambda ddf, eps: ddf.semdedup.eps_curve(eps)]


@pytest.fixture
def scores() -> pd.DataFrame:
    values = np.array([0.0, 1.0, 0.99, 0.9899, 0.5, -0.25], dtype=np.float32)
    return pd.DataFrame(
        {"id": range(6), "max_id": [0, 0, 1, 2, 0, 1], "cosine_sim_score": values, "centroid": [0, 0, 0, 0, 1, 1]}
    )


@pytest.mark.parametrize(
    ("eps", "ids"),
    [(0, [1]), (0.01, [1, 2]), (0.0102, [1, 2, 3]), (0.5, [1, 2, 3, 4]), (1, [0, 1, 2, 3, 4]), (2.0, list(range(6)))],
)
def test_rows_at_or_above_the_threshold(scores: pd.DataFrame, eps: float, ids: list[int]) -> None:
    assert find_duplicates(scores, eps).id.to_list() == ids
    lazy = dd.from_pandas(scores, npartitions=2).semdedup.duplicates(eps=eps)
    assert isinstance(lazy, dd.DataFrame)
    pd.testing.assert_frame_equal(lazy.compute(), scores[scores.id.isin(ids)])


def test_default_eps(scores: pd.DataFrame) -> None:
    assert dd.from_pandas(scores, npartitions=1).semdedup.duplicates().id.compute().to_list() == [1, 2]


@pytest.mark.parametrize("eps", [-0.01, 2.01, float("nan"), "0.1", True])
def test_eps_out_of_range(scores: pd.DataFrame, eps: object) -> None:
    with pytest.raises(InvalidArgumentError, match="eps must be a number from 0 to 2"):
        dd.from_pandas(scores, npartitions=1).semdedup.duplicates(eps=eps)


@pytest.mark.parametrize("method", ["duplicates", "eps_curve", "groups"])
def test_no_scores(method: str) -> None:
    ddf = dd.from_pandas(pd.DataFrame({"id": [1], "max_id": [1]}), npartitions=1)
    with pytest.raises(MissingColumnsError, match=r"'cosine_sim_score'\] not found.*\['id', 'max_id'\].*pairwise"):
        getattr(ddf.semdedup, method)()


class TestThreshold:
    """A float32, so that nobody compares in float64 where another compares in float32."""

    @given(st.floats(0, 2), st.sampled_from(["float32", "Float32", "float32[pyarrow]", "float64", "double[pyarrow]"]))
    def test_a_score_of_just_that_is_a_duplicate_in_any_dtype(self, eps: float, dtype: str) -> None:
        at = np.float32(1 - eps)
        scores = pd.Series(np.array([np.nextafter(at, -2), at, np.nextafter(at, 2)], np.float32), dtype=dtype)
        assert is_duplicate(scores, eps).tolist() == [False, True, True]
        assert is_duplicate(scores, np.float64(eps)).dtype == bool or dtype == "Float32"
        assert threshold(eps) == threshold(np.array([eps]))[0] == at

    def test_missing_scores_are_no_duplicates(self) -> None:
        for dtype in ("float32", "Float32", "float32[pyarrow]"):
            assert is_duplicate(pd.Series([1.0, None], dtype=dtype), 0).tolist() == [True, False]

    @pytest.mark.parametrize("filesystem", ["fsspec", "arrow"])
    @pytest.mark.parametrize("eps", [0.05, np.float64(0.05), Fraction(1, 20)])
    def test_a_parquet_reader_that_filters_finds_the_same(self, tmp_path: Path, filesystem: str, eps: float) -> None:
        scores = pd.DataFrame({"cosine_sim_score": np.array([0.94, 0.95, 0.96], np.float32)})
        scores.to_parquet(tmp_path / "scores.parquet")
        lazy = dd.read_parquet(tmp_path, filesystem=filesystem).semdedup
        assert len(lazy.duplicates(eps).compute()) == len(find_duplicates(scores, eps)) == 2
        assert lazy.duplicates([eps])["eps=0.05"].compute().tolist() == [False, True, True]
        assert lazy.eps_curve([eps]).duplicates.compute().tolist() == [2]


class TestSeveral:
    def test_one_column_each(self, scores: pd.DataFrame) -> None:
        lazy = dd.from_pandas(scores, npartitions=3).semdedup.duplicates(eps=[0, 0.010, 0.5])
        expected = scores.assign(
            **{
                "eps=0": [False, True, False, False, False, False],
                "eps=0.01": [False, True, True, False, False, False],
                "eps=0.5": [False, True, True, True, True, False],
            }
        )
        assert_eq(lazy, expected)

    @pytest.mark.parametrize("eps", [(0.1, 0.2), np.array([0.1, 0.2]), pd.Index([0.1, 0.2]), [0.1, np.float32(0.2)]])
    def test_any_sequence(self, scores: pd.DataFrame, eps: object) -> None:
        lazy = dd.from_pandas(scores, npartitions=2)
        assert list(lazy.semdedup.duplicates(eps).columns[-2:]) == ["eps=0.1", "eps=0.2"]
        assert lazy.semdedup.eps_curve(eps).eps.compute().tolist() == pytest.approx([0.1, 0.2])

    @given(score_lists(), st.lists(st.floats(0, 2), min_size=1, unique_by=lambda eps: f"{eps:g}"))
    def test_each_column_is_what_that_eps_alone_selects(self, values: list[float], eps: list[float]) -> None:
        scores = pd.DataFrame({"cosine_sim_score": np.array(values, np.float32)})
        table = find_duplicates(scores, eps)
        for value in eps:
            assert table.index[table[f"eps={value:g}"]].equals(find_duplicates(scores, value).index)

    @pytest.mark.parametrize("method", SEVERAL)
    @pytest.mark.parametrize(
        ("eps", "message"),
        [
            ([], "not an empty sequence"),
            ([0.1, 0.2, 0.1, 0.2], "may not repeat a value, to six digits, as eps=0.1, eps=0.2 does"),
            ([0.1, 0.1000000001], "may not repeat a value"),
            ([0.1, 3], "from 0 to 2, a cosine distance, not 3"),
            (["0.1"], "not '0.1'"),
            ([True], "not True"),
            ([None], "not None"),
            (np.array(0.1), "eps must be a number"),
        ],
    )
    def test_bad_sequences(self, scores: pd.DataFrame, method: Callable, eps: object, message: str) -> None:
        with pytest.raises(InvalidArgumentError, match=message):
            method(dd.from_pandas(scores, npartitions=1), eps)


class TestCurve:
    @given(score_lists(), st.integers(1, 20), st.data())
    def test_it_counts_what_duplicates_selects(
        self, values: list[float], npartitions: int, data: st.DataObject
    ) -> None:
        near = st.sampled_from(values).map(lambda score: 1 - score) if values else st.floats(0, 2)
        eps = data.draw(st.lists(near | st.floats(0, 2), min_size=1, unique_by=lambda eps: f"{eps:g}"))
        scores = pd.DataFrame({"cosine_sim_score": np.array(values, np.float32)})
        ddf = dd.from_pandas(scores, npartitions=npartitions, sort=False)
        curve = ddf.semdedup.eps_curve(eps)
        counts = [len(find_duplicates(scores, value)) for value in eps]
        # Without a score of 0 these are not the scores of all rows.
        rows = max(1, len(values)) if min(values, default=0) <= 0 else np.nan
        expected = pd.DataFrame({"eps": eps, "duplicates": counts, "share": np.array(counts) / rows})
        assert_eq(curve, expected, scheduler="threads")
        assert curve.npartitions == 1

    def test_default_grid(self, scores: pd.DataFrame) -> None:
        curve = dd.from_pandas(scores, npartitions=2).semdedup.eps_curve().compute()
        assert curve.eps.tolist() == list(EPS_GRID) == sorted(EPS_GRID)
        assert curve.duplicates.is_monotonic_increasing

    def test_many_partitions_are_summed_in_a_tree(self) -> None:
        scores = pd.DataFrame({"cosine_sim_score": np.linspace(0, 1, 500, dtype=np.float32)})
        curve = dd.from_pandas(scores, npartitions=100).semdedup.eps_curve([0.5])
        assert curve.compute().duplicates.tolist() == [250]
        graph = convert_legacy_graph(curve.optimize().__dask_graph__())
        assert max(len(task.dependencies) for task in graph.values()) <= 8

    def test_only_the_scores_are_read(self, scores: pd.DataFrame, tmp_path: Path) -> None:
        scores.to_parquet(tmp_path / "scores.parquet")
        curve = dd.read_parquet(tmp_path).semdedup.eps_curve().simplify()
        assert [read.columns for read in curve.expr.find_operations(ReadParquet)] == [["cosine_sim_score"]]

    def test_the_picture_has_the_same_counts(self, scores: pd.DataFrame) -> None:
        line, _ = duplicates_curve(scores, 0.01, largest_eps=0.4).axes[0].lines
        curve = dd.from_pandas(scores, npartitions=2).semdedup.eps_curve(line.get_xdata()).compute()
        assert curve.share.tolist() == line.get_ydata().tolist()


def test_the_curve_can_be_selected_from():
    rows = {"id": [1, 2], "max_id": [1, 1], "cosine_sim_score": [0.0, 0.995]}
    scores = dd.from_pandas(pd.DataFrame(rows), npartitions=1)
    curve = scores.semdedup.eps_curve([0.001, 0.1])
    assert len(curve._meta) == 0
    assert curve[curve.eps.isin([0.1])].compute()["duplicates"].tolist() == [1]
