from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError
from dask_semdedup.steps.ranking import RankingStrategy, check_strategy, make_strategy

GOLDEN = pd.DataFrame(
    {
        "id": range(6),
        "cosine_dist_to_cent": [0.0, 0.025369, 0.040588, 0.048090, 0.0, 0.0],
        "custom_score": [0.1, 0.8, 0.3, 0.9, 0.2, 0.15],
        "priority": [3, 1, 2, 1, 3, 2],
    }
)


def ranked(strategy: RankingStrategy, frame: pd.DataFrame) -> list:
    return strategy.rank_cluster(frame)["id"].tolist()


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 0, 3, 1, 4]], ids=str)
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (make_strategy("hard"), [3, 2, 1, 5, 4, 0]),
        (make_strategy("easy"), [0, 4, 5, 1, 2, 3]),
        (RankingStrategy.metadata_based(["custom_score"], ascending=False), [3, 1, 2, 4, 5, 0]),
        (RankingStrategy(["priority", "custom_score"], ascending=[True, False]), [3, 1, 2, 5, 4, 0]),
    ],
    ids=["hard", "easy", "custom_score", "priority, custom_score"],
)
def test_golden_orders(strategy, expected, rows):
    result = strategy.rank_cluster(GOLDEN.iloc[rows])
    assert result["id"].tolist() == expected
    pd.testing.assert_frame_equal(result, GOLDEN.iloc[expected].reset_index(drop=True))


@pytest.mark.parametrize("ascending", ["desc", "n", ["False"], [1], 0, None])
def test_ascending_is_true_or_false(ascending):
    with pytest.raises(InvalidArgumentError, match="ascending must be True or False, or a list of them"):
        RankingStrategy(["score"], ascending)


def test_ascending_may_be_of_numpy():
    assert RankingStrategy(["a", "b"], np.array([True, False])) == RankingStrategy(["a", "b"], [True, False])


@pytest.mark.parametrize(("metric", "column"), [("cosine", "cosine_dist_to_cent"), ("l2", "l2_dist_to_cent")])
@pytest.mark.parametrize(("word", "ascending"), [("hard", [False, False]), ("easy", [True, True])])
def test_words_stand_for_strategies(word, ascending, metric, column):
    assert make_strategy(word, metric, "doc_id") == RankingStrategy([column, "doc_id"], ascending)
    assert make_strategy("random", random_seed=5) == RankingStrategy([], strategy="random", random_seed=5)


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        pd.Series([2.0, np.nan, 1.0, np.nan, np.inf, -np.inf]),
        pd.Series([2, None, 1, None, 9, -9], dtype="Int64"),
        pd.Series([2, None, 1, None, 255, 0], dtype="UInt8"),
        pd.Series([2, None, 1, None, 9, -9], dtype=pd.ArrowDtype(pa.int64())),
        pd.Series([2, None, 1, None, 9, -9], dtype=pd.ArrowDtype(pa.float32())),
        pd.Series(["m", None, "b", None, "z", "a"], dtype="str"),
        pd.Series(["m", None, "b", None, "z", "a"], dtype=object),
        pd.Series(["m", None, "b", None, "z", "a"], dtype="category").cat.set_categories(["z", "m", "b", "a"]),
        pd.Series([2, None, 1, None, 9, -9], dtype="Int64").astype("category"),
        pd.Series(pd.Categorical([2, None, 1, None, 9, -9], categories=[9, 2, 1, -9])),
        pd.Series([2.0, None, 1.0, None, 9.0, -9.0]).astype("category"),
        pd.Series(["good", None, "fair", None, "best", "bad"]).astype(
            pd.CategoricalDtype(["bad", "fair", "good", "best"], ordered=True)
        ),
        pd.to_datetime(pd.Series(["2026-01-02", None, "2026-01-01", None, "2027-01-01", "2025-01-01"])),
    ],
    ids=lambda values: str(values.dtype)[:20],
)
def test_missing_values_rank_last_and_ties_go_by_id(values, ascending):
    frame = pd.DataFrame({"id": [0, 9, 2, 3, 4, 5], "score": values})
    present = [5, 2, 0, 4] if ascending else [4, 0, 2, 5]
    assert ranked(RankingStrategy(["score"], ascending), frame) == [*present, 3, 9]


def test_arrow_nan_is_missing():
    score = pd.Series(pd.arrays.ArrowExtensionArray(pa.array([np.nan, 1.0, None, 2.0])))
    assert ranked(RankingStrategy(["score"], False), pd.DataFrame({"id": range(4), "score": score})) == [3, 1, 0, 2]


def test_infinite_values_tie_with_each_other():
    frame = pd.DataFrame({"id": [3, 1, 2], "score": [np.inf, np.inf, -np.inf]})
    assert ranked(RankingStrategy(["score"], False), frame) == [1, 3, 2]


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_the_ends_of_integers_keep_their_order(dtype, ascending):
    limits = np.iinfo(dtype)
    frame = pd.DataFrame({"id": range(3), "score": np.array([limits.max, limits.min, limits.max - 1], dtype)})
    assert ranked(RankingStrategy(["score"], ascending), frame) == ([1, 2, 0] if ascending else [0, 2, 1])


def test_booleans_rank():
    frame = pd.DataFrame({"id": range(3), "score": [False, True, False]})
    assert ranked(RankingStrategy(["score"], ascending=False), frame) == [1, 0, 2]


@pytest.mark.parametrize("dtype", ["boolean", pd.ArrowDtype(pa.bool_()), object], ids=str)
def test_missing_booleans_rank_last(dtype):
    frame = pd.DataFrame({"id": range(4), "score": pd.Series([None, False, True, None], dtype=dtype)})
    assert ranked(RankingStrategy(["score"], ascending=False), frame) == [2, 1, 0, 3]


def test_uuids_settle_ties():
    uuids = pa.array([bytes([number]) * 16 for number in (3, 1, 2)], pa.binary(16)).cast(pa.uuid())
    ids = pd.Series(pd.arrays.ArrowExtensionArray(uuids))
    order = make_strategy("easy").order(
        pd.DataFrame({"id": ids, "centroid": 0, "cosine_dist_to_cent": 0.5}), cluster_field="centroid", id_field="id"
    )
    assert order.tolist() == [1, 2, 0]


NO_ORDER = r"Column 'score' of dtype .* cannot be ranked by: its values have no order\. Rank by a column of numbers"


def test_lists_cannot_be_ranked_by():
    lists = pd.Series([[1], [2]], dtype=pd.ArrowDtype(pa.list_(pa.int64())))
    with pytest.raises(InvalidArgumentError, match=NO_ORDER):
        ranked(RankingStrategy(["score"]), pd.DataFrame({"id": [1, 2], "score": lists}))


def test_values_that_cannot_be_compared_are_refused():
    frame = pd.DataFrame({"id": [1, 2], "score": [{"a": 1}, {"b": 2}]})
    with pytest.raises(InvalidArgumentError, match=NO_ORDER):
        RankingStrategy(["score"]).rank_cluster(frame)


cells = st.sampled_from([None, -1.0, 0.0, 0.5, 2.0])
tables = st.lists(st.tuples(st.sampled_from("abc"), cells, st.sampled_from(["x", "y", None])), max_size=30)


@given(tables, st.booleans(), st.booleans(), st.randoms())
def test_order_is_that_of_sorting_python_tuples_whatever_the_order_of_rows(table, first, second, random):
    frame = pd.DataFrame(table, columns=["centroid", "score", "source"]).astype({"score": "float64"})
    frame["id"] = [f"{number:02d}" for number in range(len(frame))]
    random.shuffle(shuffled := list(range(len(frame))))
    frame = frame.iloc[shuffled]

    strategy = RankingStrategy(["score", "source"], [first, second])
    order = strategy.order(frame, cluster_field="centroid", id_field="id")
    assert order.dtype == np.int64

    def key(row):
        score = np.nan_to_num(row.score) * (1 if first else -1)
        source = 0 if pd.isna(row.source) else ord(row.source) * (1 if second else -1)
        return row.centroid, pd.isna(row.score), score, pd.isna(row.source), source, row.id

    expected = sorted(frame.itertuples(), key=key)
    assert frame["id"].iloc[order].tolist() == [row.id for row in expected]


@pytest.mark.parametrize("dtype", ["int64", "str", "category", "Int64", pd.ArrowDtype(pa.string())], ids=str)
@pytest.mark.parametrize("strategy", [make_strategy("hard"), RankingStrategy.random()], ids=["hard", "random"])
def test_order_of_many_clusters_is_that_of_each(strategy, dtype):
    rng = np.random.default_rng(0)
    clusters = pd.Series(rng.integers(4, size=60)).astype(str if dtype not in ("int64", "Int64") else int).astype(dtype)
    frame = pd.DataFrame(
        {"id": rng.permutation(60), "centroid": clusters, "cosine_dist_to_cent": rng.random(60).round(1)}
    )
    result = frame.iloc[strategy.order(frame, cluster_field="centroid", id_field="id")]
    for _, cluster in frame.groupby("centroid", observed=True):
        part = result[result["centroid"] == cluster["centroid"].iloc[0]]
        assert part["id"].tolist() == ranked(strategy, cluster)
    assert result["centroid"].astype(str).is_monotonic_increasing


def test_random_depends_on_nothing_but_the_seed_and_the_ids():
    frame = pd.DataFrame({"id": range(100), "other": 1.0})
    order = ranked(RankingStrategy.random(1), frame)
    assert ranked(RankingStrategy.random(1), frame.sample(frac=1, random_state=0)) == order
    assert ranked(RankingStrategy.random(1), frame.astype({"id": "int16"})[["id"]]) == order
    assert sorted(order) == list(range(100)) != order
    assert ranked(RankingStrategy.random(2), frame) != order
    # A shuffle of some of the ids is the shuffle of all without the rest.
    assert ranked(RankingStrategy.random(1), frame[::3]) == [value for value in order if value % 3 == 0]


def test_random_puts_every_id_first_equally_often():
    frame = pd.DataFrame({"id": ["a", "b", "c", "d"]})
    firsts = [ranked(RankingStrategy.random(seed), frame)[0] for seed in range(400)]
    assert all(70 < firsts.count(value) < 130 for value in "abcd")


@pytest.mark.parametrize("strategy", [make_strategy("easy"), RankingStrategy.random()], ids=["easy", "random"])
def test_duplicate_ids_and_odd_indices_are_allowed(strategy):
    frame = pd.DataFrame({"id": [5, 5, 1], "cosine_dist_to_cent": 0.5}, index=[7, 7, 7])
    assert sorted(ranked(strategy, frame)) == [1, 5, 5]


@pytest.mark.parametrize("strategy", [make_strategy("easy"), RankingStrategy.random()], ids=["easy", "random"])
def test_nothing_ranks_as_nothing(strategy):
    assert ranked(strategy, GOLDEN.iloc[:0]) == []


def test_missing_ranking_columns_are_named():
    with pytest.raises(
        KeyError, match=r"Required columns \['score'\] not found .* \['id', 'quality'\].*strategy"
    ) as error:
        RankingStrategy(["id", "score"]).rank_cluster(pd.DataFrame({"id": [1], "quality": [2]}))
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, MissingColumnsError)


def test_missing_distances_get_advice():
    with pytest.raises(MissingColumnsError, match=r"\['l2_dist_to_cent'\] not found .*k-means.*which_to_keep='random'"):
        make_strategy("hard", "l2").check_columns(["id", "cosine_dist_to_cent"])


def test_missing_ids_are_named():
    with pytest.raises(MissingColumnsError, match=r"\['id'\] not found in the frame, which has \['doc'\].*id_field"):
        RankingStrategy.random().rank_cluster(pd.DataFrame({"doc": [1]}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RankingStrategy(["a", "b"], [True]), r"Length of ascending \(1\) must match .*metadata_cols \(2"),
        (lambda: RankingStrategy([]), "metadata_cols is empty"),
        (lambda: make_strategy("soft"), "which_to_keep must be one of 'hard', 'easy', 'random', not 'soft'"),
        (lambda: make_strategy("hard", "dot"), "sim_metric must be one of 'cosine', 'l2', not 'dot'"),
        (lambda: make_strategy("random", "dot"), "sim_metric must be one of 'cosine', 'l2', not 'dot'"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(InvalidArgumentError, match=message):
        build()
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("use", [lambda strategy: strategy.rank_cluster(GOLDEN), check_strategy])
def test_an_unknown_strategy_is_refused_when_it_is_used(use):
    strategy = RankingStrategy(["id"], strategy="best")
    with pytest.raises(
        InvalidArgumentError, match=r"Invalid strategy: strategy must be one of 'sort', 'random', not 'best'"
    ):
        use(strategy)


def test_attributes_are_as_given():
    strategy = RankingStrategy("score", random_seed=3)
    assert (strategy.metadata_cols, strategy.ascending, strategy.strategy, strategy.random_seed) == (
        ["score"],
        [True],
        "sort",
        3,
    )
    assert RankingStrategy(["a", "b", "a"]).required_columns == ["a", "b"]
    assert RankingStrategy.random().required_columns == []
    assert pickle.loads(pickle.dumps(strategy)) == strategy


def test_rows_of_equal_ids_and_values_keep_their_order():
    frame = pd.DataFrame({"id": [1] * 100 + [0] * 100, "score": 0.5, "row": np.arange(200)})
    rows = RankingStrategy(["score"], ascending=False).rank_cluster(frame)["row"]
    assert rows.tolist() == [*range(100, 200), *range(100)]


def test_where_nothing_is_named_id_ties_stay_in_the_rows_order():
    frame = pd.DataFrame({"doc": [9, 8, 7], "score": [0.5, 0.1, 0.5]})
    assert RankingStrategy(["score"]).rank_cluster(frame)["doc"].tolist() == [8, 9, 7]
    assert RankingStrategy(["score"]).rank_cluster(frame, id_field="doc")["doc"].tolist() == [8, 7, 9]
    with pytest.raises(MissingColumnsError, match="'id'"):
        RankingStrategy(["score"]).rank_cluster(frame, id_field="id")
