"""The report: a page of numbers, figures and pairs of documents, to look at before choosing eps.

The page is one file that fetches nothing: figures, style and script are in it, and its content security policy forbids
anything else. Scores are summarized partition by partition; of the documents only those of the pairs are held.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pandas as pd
from markupsafe import Markup

from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError, counted, some
from dask_semdedup.frames.columns import SCORE_COLUMN
from dask_semdedup.io.scores import Compared
from dask_semdedup.io.targets import MANIFEST, Contents
from dask_semdedup.io.write import writing
from dask_semdedup.lazy.duplicates import EPS_GRID
from dask_semdedup.lazy.held import Held, held
from dask_semdedup.lazy.tables import find_rows
from dask_semdedup.report.gallery import (
    Pair,
    compare_texts,
    decimals_of,
    document_text,
    load_asset,
    near_pairs,
    templates,
    thumbnail,
)
from dask_semdedup.report.summary import Reduction, ScoreSummary, reduce_partitions, score_summary
from dask_semdedup.steps.duplicates import check_eps, threshold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["REPORT", "Documents", "write_report"]

PAGE = "index.html"

PICTURES = ("histogram", "duplicates", "clusters")

REPORT_FILES = {PAGE, *(f"{name}.png" for name in PICTURES), MANIFEST}

# The tag by which a page of this package is told from others.
GENERATOR = b'<meta name="generator" content="dask-semdedup '

# Where the curve and the slider end, if there are scores of all rows and eps is not large; others end where scores do.
# At the smallest, 1 - eps is 1 in float32, as at 0, where no curve could be drawn.
LARGEST_EPS, SMALLEST_EPS = 0.2, 1e-8

# Pairs on either side of the threshold; other values of eps that the slider may reach and that have pairs, and pairs
# on either side of each of these.
SHOWN, STOPS, SHOWN_ELSEWHERE = 4, 40, 2

CLUSTERS_LISTED = 10


def _not_of_report(fs: fsspec.AbstractFileSystem, folder: str, names: Sequence[str]) -> list[str]:
    """The files in a folder that are not a report's.

    If the page is not of this package, all are; but next to a manifest, which is a file of `run`, only other names and
    the page.
    """
    others = set(names) - REPORT_FILES
    if PAGE in names and GENERATOR in fs.cat_file(f"{folder}/{PAGE}"):
        return sorted(others)
    return sorted(others | {PAGE}.intersection(names)) if MANIFEST in names else list(names)


REPORT = Contents("a report", _not_of_report)


@dataclass(frozen=True)
class Documents:
    """The source of the documents that were scored.

    Parameters
    ----------
    path : str
        Parquet or JSON lines.
    text_field, image_field : str, optional
        Columns to show. An image is encoded bytes, such as PNG or JPEG, the path of a file relative to `path`, or a
        struct of ``bytes`` and ``path``.
    id_field : str, default "id"
        Id column.
    storage_options : mapping, optional
        Arguments of the fsspec file system.
    make_ids : bool, default False
        True if `read_table` made the ids.
    """

    path: str
    text_field: str | None = None
    image_field: str | None = None
    id_field: str = "id"
    storage_options: Mapping[str, Any] | None = None
    make_ids: bool = False

    def __post_init__(self) -> None:
        if not self.columns:
            raise InvalidArgumentError(
                "Name the column to show of the documents as text_field or image_field.",
                parameters=["text_field", "image_field"],
            )

    @property
    def columns(self) -> list[str]:
        """The columns to show."""
        return [name for name in (self.text_field, self.image_field) if name is not None]

    def find(self, ids: pd.Index) -> pd.DataFrame:
        """The documents with these ids, indexed by id."""
        try:
            found = find_rows(
                self.path,
                ids,
                self.columns,
                id_field=self.id_field,
                make_ids=self.make_ids,
                storage_options=self.storage_options,
            )
        except MissingColumnsError as error:
            raise MissingColumnsError(
                f"{str(error).removesuffix(error.advice)}Name the columns of ids, texts and images of {self.path} as "
                "id_field, text_field and image_field.",
                parameters=["id_field", "text_field", "image_field"],
                columns=error.columns,
            ) from error
        if len(ids) and not len(found):
            raise InvalidArgumentError(
                f"None of {len(ids):,} ids of the scores, such as {some(ids, 3)}, is in column {self.id_field!r} of "
                f"{self.path}. Name the documents that were scored, and their column of ids as id_field.",
                parameters=["id_field"],
                columns=[self.id_field],
            )
        return found

    def open(self, path: str) -> Any:
        """Open a file whose path is in a document."""
        fs, root = fsspec.url_to_fs(self.path, **(self.storage_options or {}))
        folder = root if fs.isdir(root) else os.path.dirname(root)
        return fs.open(path if path.startswith("/") else f"{folder}/{path}")


def write_report(
    scores: Any,
    folder: str | os.PathLike[str],
    eps: float = 0.01,
    *,
    documents: Documents | None = None,
    cluster_field: str = "centroid",
    source: str = "",
    storage_options: Mapping[str, Any] | None = None,
    compared: Compared | None = None,
    dropped: int | None = None,
    id_field: str = "id",
    command: str | None = None,
) -> ScoreSummary:
    """Write a page on scores, ``index.html``, and its figures as PNG files.

    Parameters
    ----------
    scores : pandas, cuDF or Dask DataFrame
        What ``pairwise`` returns, with or without the cluster column. Dask frames are read partition by partition.
    folder : str or path-like
        Folder to write to, created if it is missing; local, or a URL that fsspec understands.
    eps : float, default 0.01
        The eps that the page shows first.
    documents : Documents, optional
        The source of texts or images; without it the page shows ids.
    cluster_field : str, default "centroid"
        Cluster column.
    source : str
        Path of the scores, to be named on the page.
    storage_options : mapping, optional
        Arguments of the folder's fsspec file system.
    compared : Compared, optional
        The rows that were compared, if the scores are not those of all rows: shares are of these, and the page ends
        at the eps up to which scores were kept.
    dropped : int, optional
        The number of rows that are dropped at `eps` under the rule of ``duplicate_of="kept"``, if that is the rule: the
        page then tells them from all rows that are near a preferred one, which it calls near-duplicates. By default
        all of these are dropped.
    id_field : str, default "id"
        Id column of the documents, for the call at the end of the page that removes duplicates from them.
    command : str, optional
        The command to deduplicate, without its option ``--eps``, to show at the end of the page in place of that call.

    Returns
    -------
    ScoreSummary
        The numbers that the page shows.

    Raises
    ------
    MissingColumnsError
        If the scores, or the documents, lack a column.
    InvalidArgumentError
        If `eps` is not a number from 0 to 2, or more than that up to which scores were kept, or no document has an id
        of the scores.
    """
    check_eps(eps)
    known = held(scores)
    largest_eps = _end_of_curve(eps, known if compared is None else compared)
    summarizing = score_summary(scores, eps, largest_eps, cluster_field)
    summary, pairs = reduce_partitions(scores, summarizing, _pairs_to_show(eps, largest_eps))
    summary = summary.of(known) if compared is None else summary.among(compared)
    if summary.rows is None:
        raise InvalidArgumentError(
            f"{source or 'These scores'}: nothing tells how many rows were compared, since there are scores of "
            "duplicates alone. Pass scores of all rows, or write these with ddf.semdedup.to_parquet or the command "
            "'pairwise', which note the number."
        )
    summary = replace(summary, dropped=dropped)
    cards = _cards(pairs, documents)
    figures = _draw(summary, eps)
    page = _render(summary, eps, cards, figures, documents=documents, source=source, id_field=id_field, command=command)
    fs, root = fsspec.url_to_fs(os.fspath(folder), **(storage_options or {}))
    with writing(root):
        fs.makedirs(root, exist_ok=True)
        for name, picture in figures.items():
            fs.pipe_file(f"{root}/{name}.png", picture.png)
        fs.pipe_file(f"{root}/{PAGE}", page.encode())
    return summary


def _end_of_curve(eps: float, compared: Compared | Held | None) -> float:
    """Return the largest eps of the page, or raise if eps is larger than what was compared."""
    if compared is None or (isinstance(compared, Held) and compared.is_all):
        return max(LARGEST_EPS, min(1.0, 1.5 * eps))
    if eps > compared.eps:
        raise InvalidArgumentError(
            f"eps is {eps:g}, and scores were kept up to {compared.eps:g} only: choose an eps up to that, or make the "
            "scores again up to a larger one.",
            parameters=["eps"],
        )
    return max(min(1.0, compared.eps), SMALLEST_EPS)


def _pairs_to_show(eps: float, largest_eps: float) -> Reduction[pd.DataFrame]:
    counts = dict.fromkeys(threshold(largest_eps * np.linspace(0, 1, STOPS) ** 2).tolist(), SHOWN_ELSEWHERE)
    counts[float(threshold(eps))] = SHOWN
    return near_pairs(counts, most_similar=SHOWN)


def _cards(pairs: pd.DataFrame, documents: Documents | None) -> list[Pair]:
    """The pairs with the texts and images of their documents."""
    scored = zip(pairs["id"], pairs["max_id"], pairs[SCORE_COLUMN].astype(float), strict=True)
    if documents is None:
        return [Pair(str(one), str(other), score) for one, other, score in scored]
    found = documents.find(pd.Index(list(dict.fromkeys([*pairs["id"], *pairs["max_id"]]))))
    texts = found[documents.text_field].to_dict() if documents.text_field else None
    images = _thumbnails(found[documents.image_field], documents) if documents.image_field else None
    return [_card(one, other, score, texts, images) for one, other, score in scored]


def _card(one: Any, other: Any, score: float, texts: dict[Any, Any] | None, images: dict[Any, str] | None) -> Pair:
    sides = pictures = None
    same = False
    if texts is not None:
        shown = document_text(texts.get(one)), document_text(texts.get(other))
        sides, same = compare_texts(*shown), shown[0] == shown[1] != ""
    if images is not None:
        pictures = images.get(one, "No such document."), images.get(other, "No such document.")
    return Pair(str(one), str(other), score, sides, pictures, same)


def _thumbnails(column: pd.Series, documents: Documents) -> dict[Any, str]:
    pictures = {key: thumbnail(_encoded(value), documents.open) for key, value in column.items()}
    if pictures and not any(picture.startswith("data:") for picture in pictures.values()):
        reason = next(iter(pictures.values()))
        warnings.warn(
            f"Column {documents.image_field!r}: none of {counted(len(pictures), 'image')} can be read. {reason} Name a "
            "column of encoded images, or of their paths.",
            stacklevel=2,
        )
    return pictures


def _encoded(value: Any) -> Any:
    """The bytes or the path of an image, which may be a struct of both."""
    return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG file and as SVG.

    `x` and `y` are the offset and the slope from data to units of the SVG; `width` is in those units.
    """

    png: bytes
    svg: Markup
    x: tuple[float, float]
    y: tuple[float, float]
    width: float


def _draw(summary: ScoreSummary, eps: float) -> dict[str, Picture]:
    from dask_semdedup.report import plots

    drawings: dict[str, Any] = {
        "histogram": partial(plots.score_histogram, summary, eps),
        "duplicates": partial(plots.duplicates_curve, summary, eps, largest_eps=summary.largest_eps),
    }
    # A bar for a single cluster would say nothing.
    if summary.clusters is not None and len(summary.clusters) > 1:
        drawings["clusters"] = partial(plots.cluster_sizes, summary, eps)
    return {name: _picture(name, draw) for name, draw in drawings.items()}


def _picture(name: str, draw: Any) -> Picture:
    from matplotlib.figure import Figure

    encoded = io.BytesIO()
    draw().savefig(encoded, format="png", dpi=160)
    # Narrower on the page, so that its letters can be read on a phone.
    figure = draw(figure=Figure(figsize=(5.6, 3.6), layout="constrained"))
    axes = figure.axes[0]
    label = axes.get_title(loc="left")
    axes.set_title("", loc="left")
    for text in list(axes.texts):
        text.remove()
    bars = [bar for container in axes.containers for bar in container]
    for number, bar in enumerate(bars):
        bar.set_gid(f"{name}-bar-{number}")
    if axes.lines:
        axes.lines[-1].set_gid(f"{name}-mark")
    svg = _svg(figure, label)
    x, y = _scales(figure)
    return Picture(encoded.getvalue(), svg, x, y, 72 * figure.get_size_inches()[0])


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an SVG element, in the page's colours and fonts."""
    import matplotlib as mpl

    from dask_semdedup.report import plots

    encoded = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dask-semdedup"}):
        figure.savefig(encoded, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", encoded.getvalue(), flags=re.DOTALL)
    width, height = figure.get_size_inches() * 72
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{Markup.escape(label)}">'
    svg = re.sub(r".*?<svg[^>]*>", lambda _: head, svg, count=1, flags=re.DOTALL)
    variables = {plots.BLUE: "blue", plots.VERMILION: "vermilion", plots.INK: "soft", plots.PALE: "line"}
    for colour, name in variables.items():
        svg = svg.replace(colour.lower(), f"var(--{name})")
    return Markup(svg.replace("xlink:href", "href"))


def _scales(figure: Figure) -> tuple[tuple[float, float], tuple[float, float]]:
    """Offset and slope from data on linear axes to units of the SVG, in which y points down."""
    axes = figure.axes[0]
    width, height = figure.get_size_inches() * 72
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    corners = figure.transFigure.inverted().transform(axes.transData.transform([(left, bottom), (right, top)]))
    (x0, y0), (x1, y1) = corners * [width, height]
    x_slope, y_slope = (x1 - x0) / (right - left), -(y1 - y0) / (top - bottom)
    return (x0 - x_slope * left, x_slope), (height - y0 - y_slope * bottom, y_slope)


def _render(
    summary: ScoreSummary,
    eps: float,
    cards: Sequence[Pair],
    figures: Mapping[str, Picture],
    *,
    documents: Documents | None,
    source: str,
    id_field: str,
    command: str | None,
) -> str:
    from dask_semdedup import __version__

    border = float(threshold(eps))
    above = [card for card in cards if card.score >= border]
    below = cards[len(above) :]
    script = load_asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rows = [value for value in summary.grid if value in EPS_GRID or value == eps]
    return str(
        templates()
        .get_template("report.html")
        .render(
            eps=f"{eps:g}",
            similarity=f"{1 - eps:g}",
            rows=summary.rows,
            compared=summary.compared,
            kept_eps=None if summary.kept_eps is None else f"{summary.kept_eps:g}",
            lowest=None if summary.kept_eps is None else f"{1 - summary.kept_eps:g}",
            duplicates=int(summary.duplicates(eps)),
            table=[{"eps": f"{value:g}", "duplicates": int(summary.duplicates(value))} for value in rows],
            clusters=_listed(summary),
            cluster_count=None if summary.clusters is None else len(summary.clusters),
            figures=figures,
            dropped=summary.dropped,
            noun=f"{summary.noun}s",
            before=above[:-SHOWN],
            above=above[-SHOWN:],
            below=below[:SHOWN],
            after=below[SHOWN:],
            most_similar=cards[:SHOWN],
            decimals=decimals_of(cards, border),
            has_documents=documents is not None,
            images=bool(documents and documents.image_field),
            id_argument="" if id_field == "id" else f", id_field={id_field!r}",
            data=_script_data(summary, eps, figures),
            style=load_asset("pairs.css") + load_asset("report.css"),
            script=script,
            digest=digest,
            source=source,
            command=command,
            version=__version__,
        )
    )


def _listed(summary: ScoreSummary) -> list[dict[str, Any]]:
    """The clusters with the most duplicates."""
    if summary.clusters is None or len(summary.clusters) < 2:
        return []
    most = summary.clusters.sort_values(["duplicates", "rows"], ascending=False).head(CLUSTERS_LISTED)
    counted = zip(most.index, most["rows"], most["duplicates"], strict=True)
    return [{"name": str(name), "rows": int(rows), "duplicates": int(count)} for name, rows, count in counted if count]


def _script_data(summary: ScoreSummary, eps: float, figures: Mapping[str, Picture]) -> dict[str, Any]:
    """Data with which the page's script follows the slider."""
    return {
        "rows": summary.rows,
        "shown": SHOWN,
        "start": int(np.searchsorted(summary.grid, eps)),
        "eps": summary.grid.tolist(),
        "thresholds": threshold(summary.grid).astype(float).tolist(),
        "duplicates": summary.duplicates(summary.grid).tolist(),
        "histogram": {"x": figures["histogram"].x, "width": figures["histogram"].width},
        "curve": {"x": figures["duplicates"].x, "y": figures["duplicates"].y},
    }
