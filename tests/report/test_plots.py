"""The pictures show the numbers they are given."""

from __future__ import annotations

import io
from dataclasses import replace

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.report.plots import VERMILION, cluster_sizes, duplicates_curve, pair_gallery, score_histogram
from dask_semdedup.report.summary import summarize


@pytest.fixture
def scores() -> pd.DataFrame:
    """Two clusters: six rows that were compared, of which three are duplicates at eps = 0.02."""
    return pd.DataFrame(
        {
            "id": [0, 1, 2, 3, 10, 11, 12, 13],
            "max_id": [0, 0, 0, 2, 10, 10, 10, 12],
            "cosine_sim_score": np.array([0.0, 0.3, 0.98, 0.999, 0.0, 1.0, -0.2, 0.5], dtype=np.float32),
            "centroid": [0, 0, 0, 0, 1, 1, 1, 1],
        }
    )


def bar_counts(figure: Figure) -> tuple[int, int]:
    """Rows in bars of the duplicates' colour, and in the others."""
    bars = figure.axes[0].patches
    marked = sum(bar.get_height() for bar in bars if bar.get_facecolor() == pytest.approx(rgba(VERMILION)))
    return int(marked), int(sum(bar.get_height() for bar in bars) - marked)


def rgba(colour: str) -> tuple[float, ...]:
    return (*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)


@pytest.mark.parametrize(("eps", "duplicates"), [(0.0, 1), (0.001, 2), (0.02, 3), (0.7, 5), (2.0, 6)])
def test_histogram_colours_the_duplicates_and_only_them(scores: pd.DataFrame, eps: float, duplicates: int) -> None:
    figure = score_histogram(scores, eps)
    assert figure.axes[0].get_title(loc="left").startswith(f"{duplicates} duplicate")
    assert sum(bar_counts(figure)) == 6
    if eps:
        assert bar_counts(figure) == (duplicates, 6 - duplicates)


def test_histogram_without_eps_marks_none(scores: pd.DataFrame) -> None:
    figure = score_histogram(scores, None)
    assert bar_counts(figure) == (0, 6)
    assert not figure.axes[0].lines


def test_histogram_of_scores_all_the_same_or_absent(scores: pd.DataFrame) -> None:
    assert sum(bar_counts(score_histogram(scores.iloc[[3, 3]], 0.01))) == 2
    assert sum(bar_counts(score_histogram(scores.iloc[[0]], 0.01))) == 0


def test_curve_gives_the_share_of_all_rows(scores: pd.DataFrame) -> None:
    figure = duplicates_curve(scores, 0.02, largest_eps=0.1)
    curve, mark = figure.axes[0].lines
    assert curve.get_ydata()[[0, -1]] == pytest.approx([1 / 8, 3 / 8])
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == pytest.approx((0.02, 3 / 8))
    assert figure.axes[0].get_title(loc="left") == "Duplicates at eps = 0.02: 3 of 8 rows (37.5%)"


def test_pictures_tell_near_duplicates_from_dropped_rows(scores: pd.DataFrame) -> None:
    summary = replace(summarize(scores, 0.02), dropped=2)
    curve, histogram = duplicates_curve(summary, 0.02).axes[0], score_histogram(summary, 0.02).axes[0]
    assert curve.get_title(loc="left") == "Near-duplicates at eps = 0.02: 3 of 8 rows (37.5%)"
    assert curve.get_ylabel() == "Near-duplicates"
    assert histogram.get_title(loc="left") == "3 near-duplicates among 6 compared rows"
    (legend,) = cluster_sizes(summary, 0.02).axes[0].get_legend().get_texts()[1:]
    assert legend.get_text() == "near-duplicates"


def test_dask_frames_are_drawn_as_pandas_frames_are(scores: pd.DataFrame) -> None:
    lazy = dd.from_pandas(scores, npartitions=2)
    assert bar_counts(score_histogram(lazy, 0.02)) == bar_counts(score_histogram(scores, 0.02))
    title = duplicates_curve(lazy, 0.02).axes[0].get_title(loc="left")
    assert title == duplicates_curve(scores, 0.02).axes[0].get_title(loc="left")


@pytest.mark.parametrize(
    ("rows", "title"),
    [([3], "1 cluster of 3 rows"), ([1, 1], "2 clusters of 1 row"), ([1, 3], "2 clusters of 1 to 3 rows")],
)
def test_sizes_leave_the_legend_room(rows: list[int], title: str) -> None:
    n = sum(rows)
    scores = pd.DataFrame(
        {"id": range(n), "max_id": 0, "cosine_sim_score": 0.5, "centroid": np.repeat(range(len(rows)), rows)}
    )
    figure = cluster_sizes(scores)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == title
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1
    assert axes._left_title.get_window_extent().y0 >= axes.get_legend().get_window_extent().y1
    assert all(float(label.get_text().replace(",", "")).is_integer() for label in axes.get_yticklabels())


@pytest.mark.parametrize(("lowest", "side"), [(0.996, "left"), (0.2, "right")])
def test_the_threshold_is_named_where_there_is_room(lowest: float, side: str) -> None:
    scores = pd.DataFrame({"id": range(1, 51), "max_id": 0, "cosine_sim_score": np.linspace(lowest, 1, 50)})
    figure = score_histogram(scores, 0.01)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (label,) = axes.texts
    assert label.get_ha() == side
    assert label.get_window_extent().x0 >= axes.get_window_extent().x0
    assert label.get_window_extent().x1 <= axes.get_window_extent().x1


def test_gallery_shows_both_images_and_the_score() -> None:
    images = np.arange(5 * 4 * 4).reshape(5, 4, 4)
    figure = pair_gallery(images, images[::-1], [0.99, 0.98, 0.97, 0.96, 0.5], columns=2, title="Pairs")
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 10
    assert np.array_equal(shown[2], images[1])
    assert np.array_equal(shown[3], images[3])
    assert [axes.texts[0].get_text() for axes in figure.axes[::2]] == ["0.9900", "0.9800", "0.9700", "0.9600", "0.5000"]


def test_gallery_refuses_what_does_not_make_pairs() -> None:
    with pytest.raises(ValueError, match="3 queries, 2 matches and 3 scores"):
        pair_gallery(np.zeros((3, 4, 4)), np.zeros((2, 4, 4)), [1, 1, 1])


def test_pictures_go_into_subfigures(scores: pd.DataFrame) -> None:
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    assert score_histogram(scores, figure=left) is left
    assert pair_gallery(np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 4, 3)), [1.0], figure=right) is right
    figure.savefig(picture := io.BytesIO(), format="png")
    assert picture.getvalue().startswith(b"\x89PNG")


def test_notebooks_show_figures_without_being_told_to() -> None:
    scores = pd.DataFrame({"id": [1, 2], "max_id": [1, 1], "cosine_sim_score": np.array([0, 0.99], np.float32)})
    for figure in (score_histogram(scores), pair_gallery(np.ones((1, 8, 8)), np.ones((1, 8, 8)), [0.9])):
        assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("scores", [[0.9], pd.Series([0.9]), {"id": [1]}])
def test_what_is_no_frame_of_scores(scores: object) -> None:
    with pytest.raises(InvalidArgumentError, match=r"scores must be a DataFrame, not .*They come from ddf.semdedup"):
        score_histogram(scores)
