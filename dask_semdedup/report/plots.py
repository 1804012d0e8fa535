"""Matplotlib figures of scores, duplicates, clusters and pairs of images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError, counted
from dask_semdedup.lazy.held import check_held
from dask_semdedup.report.gallery import check_pairs
from dask_semdedup.report.summary import summarize
from dask_semdedup.steps.duplicates import threshold as duplicate_threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["cluster_sizes", "duplicates_curve", "pair_gallery", "score_histogram"]

AnyFigure: TypeAlias = Figure | SubFigure


class NotebookFigure(Figure):
    """A figure that a notebook shows as a picture, also without ``%matplotlib inline``."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


# A figure that is passed is the one that is returned.
Given = TypeVar("Given", Figure, SubFigure)

# Okabe and Ito's palette, whose colours colour-blind readers can tell apart.
BLUE, VERMILION, INK, PALE = "#0072B2", "#D55E00", "#333333", "#C8CDD2"

# More steps than this cannot be told apart in a figure.
MAX_STEPS = 1000

THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")


@overload
def score_histogram(scores: Any, eps: float | None = 0.01, *, bins: int = 60, figure: None = None) -> Figure: ...


@overload
def score_histogram(scores: Any, eps: float | None = 0.01, *, bins: int = 60, figure: Given) -> Given: ...


def score_histogram(
    scores: Any, eps: float | None = 0.01, *, bins: int = 60, figure: AnyFigure | None = None
) -> AnyFigure:
    """Plot a histogram of the scores, with the duplicates at ``eps`` in another colour.

    The first row of each cluster, which is compared with no other, is left out. Counts are on a logarithmic axis, since
    duplicates are usually few.

    Parameters
    ----------
    scores : pandas, cuDF or Dask DataFrame, or ScoreSummary
        The result of ``pairwise``: ``id``, ``max_id`` and ``cosine_sim_score``. Dask frames are read partition by
        partition.
    eps : float, optional
        Rows with a score of at least ``1 - eps`` are drawn as duplicates; with None, no row is.
    bins : int
        Approximate number of bars.
    figure : Figure or SubFigure, optional
        Figure to draw on, instead of a new one.

    Returns
    -------
    Figure or SubFigure

    Examples
    --------
    >>> import pandas as pd
    >>> scores = pd.DataFrame({"id": [1, 2, 3], "max_id": [1, 1, 2], "cosine_sim_score": [0.0, 0.3, 0.995]})
    >>> score_histogram(scores, eps=0.01).axes[0].get_title(loc="left")
    '1 duplicate among 2 compared rows'
    """
    summary = summarize(scores, eps)
    threshold = 1.0 if eps is None else float(duplicate_threshold(eps))
    figure, axes = _axes(figure, "Score: cosine similarity to the row max_id", "Rows")
    edges, counts = summary.histogram(bins)
    colours = [VERMILION if left >= threshold else BLUE for left in edges[:-1]]
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, edgecolor=colours, linewidth=0.4)
    if counts.any():
        axes.set_yscale("log")
        axes.set_ylim(0.8, 3 * counts.max())
    else:
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 1])
    axes.yaxis.set_major_formatter(THOUSANDS)
    axes.yaxis.set_minor_locator(NullLocator())
    if eps is None:
        _title(axes, f"Scores of {counted(summary.compared, 'compared row')}")
        return figure
    duplicates = int(summary.duplicates(eps))
    found = counted(duplicates, summary.noun)
    if summary.rows is None:
        _title(axes, found)
    elif summary.kept_eps is None:
        _title(axes, f"{found} among {counted(summary.compared, 'compared row')}")
    else:
        _title(axes, f"{found} among {counted(summary.rows, 'row')}")
    _mark_threshold(axes, threshold, f"1 − eps = {1 - eps:.6g}")
    return figure


@overload
def duplicates_curve(
    scores: Any, eps: float | None = None, *, largest_eps: float = 0.2, figure: None = None
) -> Figure: ...


@overload
def duplicates_curve(scores: Any, eps: float | None = None, *, largest_eps: float = 0.2, figure: Given) -> Given: ...


def duplicates_curve(
    scores: Any, eps: float | None = None, *, largest_eps: float = 0.2, figure: AnyFigure | None = None
) -> AnyFigure:
    """Plot the share of rows that are duplicates, against eps.

    A duplicate is near any preferred row, kept or not, so `deduplicate` may drop fewer. If the scores do not tell how
    many rows were compared, counts are plotted.

    Parameters
    ----------
    scores : pandas, cuDF or Dask DataFrame, or ScoreSummary
        The result of ``pairwise``: ``id``, ``max_id`` and ``cosine_sim_score``. Dask frames are read partition by
        partition.
    eps : float, optional
        Value of eps to mark on the curve.
    largest_eps : float
        Right end of the axis.
    figure : Figure or SubFigure, optional
        Figure to draw on, instead of a new one.

    Returns
    -------
    Figure or SubFigure

    Raises
    ------
    InvalidArgumentError
        If the scores are known to be those of ``duplicate_of="kept"``, which hold for one eps.

    Examples
    --------
    >>> import pandas as pd
    >>> scores = pd.DataFrame({"id": [1, 2, 3], "max_id": [1, 1, 2], "cosine_sim_score": [0.0, 0.3, 0.995]})
    >>> duplicates_curve(scores, eps=0.01).axes[0].get_title(loc="left")
    'Duplicates at eps = 0.01: 1 of 3 rows (33.3%)'
    """
    check_held(scores, [0])  # Where the curve begins.
    summary = summarize(scores, eps, largest_eps=largest_eps)
    rows = max(summary.rows or 0, 1)
    label = f"{summary.noun.capitalize()}s"
    figure, axes = _axes(figure, "eps (cosine distance)", label)
    grid = summary.grid
    dropped = summary.duplicates(grid)
    axes.fill_between(grid, dropped / rows, color=BLUE, alpha=0.12, linewidth=0)
    axes.plot(grid, dropped / rows, color=BLUE, linewidth=2)
    axes.set_xlim(0, grid[-1])
    axes.set_ylim(bottom=0)
    is_share = summary.rows is not None
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1) if is_share else THOUSANDS)
    whole = counted(summary.rows or 0, "row")
    _title(axes, f"{label} among {whole}" if is_share else f"{label} of the scores given")
    if eps is not None:
        count = int(summary.duplicates(eps))
        axes.plot([eps], [count / rows], "o", color=VERMILION, markersize=9, clip_on=False, zorder=3)
        of_all = f"{count:,} of {whole} ({count / rows:.1%})" if is_share else f"{count:,}"
        _title(axes, f"{label} at eps = {eps:g}: {of_all}")
    return figure


@overload
def cluster_sizes(
    scores: Any, eps: float = 0.01, *, cluster_field: str = "centroid", figure: None = None
) -> Figure: ...


@overload
def cluster_sizes(scores: Any, eps: float = 0.01, *, cluster_field: str = "centroid", figure: Given) -> Given: ...


def cluster_sizes(
    scores: Any, eps: float = 0.01, *, cluster_field: str = "centroid", figure: AnyFigure | None = None
) -> AnyFigure:
    """Plot the rows and duplicates of each cluster, from the largest cluster to the smallest.

    Parameters
    ----------
    scores : pandas, cuDF or Dask DataFrame, or ScoreSummary
        The result of ``pairwise``. Dask frames are read partition by partition.
    eps : float
        Rows with a score of at least ``1 - eps`` are duplicates.
    cluster_field : str
        Cluster column.
    figure : Figure or SubFigure, optional
        Figure to draw on, instead of a new one.

    Returns
    -------
    Figure or SubFigure

    Raises
    ------
    MissingColumnsError
        If the scores have no cluster column.
    InvalidArgumentError
        If the scores hold duplicates alone.

    Examples
    --------
    >>> import pandas as pd
    >>> scores = pd.DataFrame({"id": [1, 2, 3], "max_id": [1, 1, 3], "cosine_sim_score": [0.0, 0.995, 0.0]})
    >>> cluster_sizes(scores.assign(centroid=[0, 0, 1])).axes[0].get_title(loc="left")
    '2 clusters of 1 to 2 rows'
    """
    summary = summarize(scores, eps, cluster_field=cluster_field)
    if summary.clusters is None and cluster_field in scores.columns:
        raise InvalidArgumentError(
            "These scores hold duplicates alone, not the rows of each cluster. Pass scores of all rows: pairwise() "
            "without eps.",
            parameters=["scores"],
        )
    if summary.clusters is None:
        raise MissingColumnsError.build([cluster_field], scores.columns, "Name the cluster column as cluster_field.")
    counts = summary.clusters.sort_values(["rows", "duplicates"], ascending=False)
    figure, axes = _axes(figure, "Clusters, from the largest to the smallest", "Rows")
    shown = np.unique(np.linspace(0, max(len(counts) - 1, 0), MAX_STEPS).astype(int))[: len(counts)]
    edges = np.append(shown, len(counts))
    for name, colour, label in [("rows", BLUE, "all rows"), ("duplicates", VERMILION, f"{summary.noun}s")]:
        axes.stairs(counts[name].to_numpy()[shown], edges, fill=True, color=colour, label=label)
    axes.set_xlim(0, max(len(counts), 1))
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
        axis.set_major_formatter(THOUSANDS)
    # The legend stands between the title and the axes, since bars may fill the axes.
    axes.legend(
        frameon=False, labelcolor=INK, fontsize=10, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2
    )
    least, most = (counts["rows"].min(), counts["rows"].max()) if len(counts) else (0, 0)
    sizes = f"{least:,} to {most:,} rows" if least < most else counted(most, "row")
    _title(axes, f"{counted(len(counts), 'cluster')} of {sizes}", pad=34)
    return figure


@overload
def pair_gallery(
    queries: np.ndarray,
    matches: np.ndarray,
    scores: Sequence[float] | np.ndarray,
    *,
    title: str = "Pairs",
    columns: int = 4,
    cmap: str = "gray_r",
    interpolation: str = "auto",
    figure: None = None,
) -> Figure: ...


@overload
def pair_gallery(
    queries: np.ndarray,
    matches: np.ndarray,
    scores: Sequence[float] | np.ndarray,
    *,
    title: str = "Pairs",
    columns: int = 4,
    cmap: str = "gray_r",
    interpolation: str = "auto",
    figure: Given,
) -> Given: ...


def pair_gallery(
    queries: np.ndarray,
    matches: np.ndarray,
    scores: Sequence[float] | np.ndarray,
    *,
    title: str = "Pairs",
    columns: int = 4,
    cmap: str = "gray_r",
    interpolation: str = "auto",
    figure: AnyFigure | None = None,
) -> AnyFigure:
    """Show pairs of images side by side: each row and its most similar preferred row, with the score below.

    Parameters
    ----------
    queries, matches : ndarray of shape (n, height, width) or (n, height, width, 3)
        Images of the rows and of their most similar preferred rows.
    scores : array of shape (n,)
        Their cosine similarities.
    title : str
        Title of the figure.
    columns : int
        Number of pairs in a row.
    cmap : str
        Matplotlib colormap for images of one channel.
    interpolation : str
        Matplotlib interpolation method.
    figure : Figure or SubFigure, optional
        Figure to draw on, instead of a new one.

    Returns
    -------
    Figure or SubFigure

    Examples
    --------
    >>> import numpy as np
    >>> images = np.zeros((3, 8, 8))
    >>> len(pair_gallery(images, images, [1.0, 0.99, 0.98], columns=2).axes)
    6
    """
    check_pairs(queries, matches, scores)
    lines = max(1, -(-len(scores) // columns))
    if figure is None:
        figure = NotebookFigure(figsize=(2.1 * columns, 1.35 * lines + 0.7), facecolor="white")
    height = figure.bbox.height / figure.dpi  # In inches, as are the margins for text.
    figure.suptitle(title, x=0.02, y=1 - 0.12 / height, ha="left", va="top", fontsize=13, fontweight="bold", color=INK)
    # A pair takes two columns of images and a narrow empty one.
    grid = figure.add_gridspec(
        lines,
        3 * columns,
        width_ratios=[1, 1, 0.35] * columns,
        wspace=0.08,
        hspace=0.4,
        left=0.02,
        right=0.99,
        top=1 - 0.5 / height,
        bottom=0.3 / height,
    )
    for number, (query, match, score) in enumerate(zip(queries, matches, scores, strict=True)):
        line, column = divmod(number, columns)
        left = _image(figure.add_subplot(grid[line, 3 * column]), query, cmap, interpolation)
        _image(figure.add_subplot(grid[line, 3 * column + 1]), match, cmap, interpolation)
        # The score is centred below the pair.
        left.text(1.04, -0.1, f"{score:.4f}", transform=left.transAxes, ha="center", va="top", fontsize=10, color=INK)
    return figure


def _axes(figure: AnyFigure | None, x_label: str, y_label: str) -> tuple[AnyFigure, Axes]:
    """Axes without chart junk, in the given figure or in a new one."""
    if figure is None:
        figure = NotebookFigure(figsize=(7.2, 4.2), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=INK, labelsize=10, color=PALE)
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y", color=PALE, alpha=0.5, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, fontsize=11, color=INK, labelpad=8)
    axes.set_ylabel(y_label, fontsize=11, color=INK, labelpad=8)
    return figure, axes


def _title(axes: Axes, text: str, pad: float = 14) -> None:
    axes.set_title(text, loc="left", fontsize=13, fontweight="bold", color=INK, pad=pad)


def _mark_threshold(axes: Axes, position: float, label: str) -> None:
    """Draw a thin vertical line with a label at its upper end, on the side that has room for it."""
    axes.axvline(position, color=VERMILION, linewidth=1.2, linestyle=(0, (4, 2)))
    left, right = axes.get_xlim()
    is_left = position < left + 0.3 * (right - left)
    axes.annotate(
        label,
        (position, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6 if is_left else -6, -2),
        textcoords="offset points",
        ha="left" if is_left else "right",
        va="top",
        fontsize=10,
        color=VERMILION,
    )


def _image(axes: Axes, pixels: np.ndarray, cmap: str, interpolation: str) -> Axes:
    axes.imshow(pixels, cmap=cmap, interpolation=interpolation)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(PALE)
    return axes
