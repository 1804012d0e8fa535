"""Pairs of documents to look at, with their texts and images.

Texts and images are not trusted. Texts reach a page only through templates that escape them, images only after they
have been decoded and encoded again.
"""

from __future__ import annotations

import base64
import difflib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup

from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.frames.columns import SCORE_COLUMN, SCORE_COLUMNS
from dask_semdedup.lazy.held import check_held
from dask_semdedup.report.summary import Reduction, compared_rows, reduce_partitions, to_pandas
from dask_semdedup.steps.duplicates import check_eps, check_score_columns, is_duplicate, threshold

__all__ = [
    "Pair",
    "TextGallery",
    "compare_texts",
    "decimals_of",
    "document_text",
    "load_asset",
    "near_pairs",
    "pairs_around",
    "text_gallery",
]

# Decimals of scores: with the most of them, two neighbours in float32 differ.
LEAST_DECIMALS, MOST_DECIMALS = 4, 8

# Characters of a text that are shown and compared.
MAX_CHARACTERS = 500

# Texts that share fewer of their words are not marked at all: marks everywhere say nothing.
MIN_SHARED = 0.4

WORDS = re.compile(r"\w+|\s+|[^\w\s]")

# Pixels of an image's longer side.
THUMBNAIL = 256


class Piece(NamedTuple):
    """A run of text; `differs` if the other text lacks it."""

    text: str
    differs: bool = False


@dataclass(frozen=True)
class Pair:
    """A row and its most similar preferred row.

    Parameters
    ----------
    id, max_id : str
        Their ids.
    score : float
        Their cosine similarity.
    texts : tuple of list of Piece, optional
        Both texts.
    images : tuple of str, optional
        Both images as ``data:`` URLs, or the reason why one cannot be shown.
    same : bool
        True if both texts are the same.
    """

    id: str
    max_id: str
    score: float
    texts: tuple[list[Piece], list[Piece]] | None = None
    images: tuple[str, str] | None = None
    same: bool = False


def pairs_around(scores: Any, eps: float = 0.01, *, count: int = 4) -> pd.DataFrame:
    """Select the pairs nearest to the threshold, on both sides of it.

    Parameters
    ----------
    scores : pandas, cuDF or Dask DataFrame
        The result of ``pairwise``. Dask frames are read partition by partition.
    eps : float, default 0.01
        Rows with a score of at least ``1 - eps`` are duplicates.
    count : int, default 4
        Maximum number of pairs on each side.

    Returns
    -------
    pandas.DataFrame
        ``id``, ``max_id``, ``cosine_sim_score`` and ``duplicate``, the most similar first.

    Raises
    ------
    MissingColumnsError
        If the scores lack a column.
    InvalidArgumentError
        If `eps` is not a number from 0 to 2, or the scores are known not to hold all duplicates at it.

    Examples
    --------
    >>> scores = pd.DataFrame({"id": [1, 2, 3], "max_id": [1, 1, 2], "cosine_sim_score": [0.0, 0.995, 0.9]})
    >>> pairs_around(scores, eps=0.01)
       id  max_id  cosine_sim_score  duplicate
    0   2       1             0.995       True
    1   3       2             0.900      False
    """
    check_eps(eps)
    check_score_columns(scores, SCORE_COLUMNS)
    check_held(scores, [eps])
    [pairs] = reduce_partitions(scores, near_pairs({float(threshold(eps)): count}))
    return pairs.assign(duplicate=is_duplicate(pairs[SCORE_COLUMN], eps))


def near_pairs(counts: Mapping[float, int], most_similar: int = 0) -> Reduction[pd.DataFrame]:
    """The reduction of scores to the pairs nearest to thresholds, and the most similar, best first.

    `counts` says how many pairs on each side of each threshold.
    """
    select = partial(_select_pairs, counts=counts, most_similar=most_similar)
    return Reduction(list(SCORE_COLUMNS), select, partial(_merge_pairs, select))


def _select_pairs(scores: Any, counts: Mapping[float, int], most_similar: int) -> pd.DataFrame:
    compared = to_pandas(compared_rows(scores[list(SCORE_COLUMNS)]))
    values = compared[SCORE_COLUMN].to_numpy()
    order = np.argsort(values, kind="stable")
    middles = np.searchsorted(values[order], np.array(list(counts), dtype=values.dtype))
    near = [middle + np.arange(-count, count) for middle, count in zip(middles, counts.values(), strict=True)]
    wanted = np.unique(np.concatenate([*near, len(order) - 1 - np.arange(most_similar)]))
    wanted = wanted[(wanted >= 0) & (wanted < len(order))]
    return compared.take(order[wanted[::-1]]).reset_index(drop=True)


def _merge_pairs(
    select: Callable[[pd.DataFrame], pd.DataFrame], one: pd.DataFrame, other: pd.DataFrame
) -> pd.DataFrame:
    return select(pd.concat([one, other], ignore_index=True))


def compare_texts(one: str, other: str, most: int = MAX_CHARACTERS) -> tuple[list[Piece], list[Piece]]:
    """Split two texts, word by word, into what they share and what they do not.

    Long texts are cut, at both ends if they begin alike, so that the first difference is seen.

    Parameters
    ----------
    one, other : str
        The texts.
    most : int
        Maximum number of characters of each that are shown.

    Returns
    -------
    tuple of list of Piece
    """
    start = 0
    if one != other and max(len(one), len(other)) > most:
        shorter = min(len(one), len(other))
        alike = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), shorter)
        start = max(0, alike - most // 3) if alike > most // 2 else 0
    # Twice of what is shown is compared: a word whose counterpart is only cut off does not differ.
    left, right = (WORDS.findall(text[start : start + 2 * most]) for text in (one, other))
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    differ: tuple[list[bool], list[bool]] = ([], [])
    for tag, a, b, c, d in matcher.get_opcodes():
        for flags, count in zip(differ, (b - a, d - c), strict=True):
            flags += [tag != "equal"] * count
    shown = [_fitting(words, most) for words in (left, right)]
    marked = [list(zip(words, flags, strict=False)) for words, flags in zip(shown, differ, strict=True)]
    if _shared([*marked[0], *marked[1]]) < MIN_SHARED:
        marked = [[(word, False) for word in words] for words in shown]
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    for side, words, text in zip(pieces, marked, (one, other), strict=True):
        side += [Piece("… ")] * bool(start)
        side += [Piece("".join(word for word, _ in run), flag) for flag, run in groupby(words, itemgetter(1))]
        if len(text) > start + sum(len(word) for word, _ in words):
            side.append(Piece(" …"))
    return pieces


def _fitting(words: list[str], most: int) -> list[str]:
    """Return the first words, of at most so many characters in all; a single longer word is cut."""
    ends = np.cumsum([len(word) for word in words])
    fitting = words[: int(np.searchsorted(ends, most, side="right"))]
    return fitting or [word[:most] for word in words[:1]]


def _shared(words: list[tuple[str, bool]]) -> float:
    """Return the share of words that do not differ; white space does not count."""
    flags = [differs for word, differs in words if not word.isspace()]
    return flags.count(False) / max(len(flags), 1)


def text_gallery(
    queries: Iterable[Any],
    matches: Iterable[Any],
    scores: Iterable[float],
    *,
    eps: float | None = None,
    title: str = "Pairs of texts",
) -> TextGallery:
    """Show pairs of texts side by side, with the words that differ marked.

    Parameters
    ----------
    queries, matches : iterable of str
        Texts of the rows and of their most similar preferred rows.
    scores : iterable of float
        Their cosine similarities.
    eps : float, optional
        Mark each pair as dropped or kept at this eps.
    title : str
        Heading of the gallery.

    Returns
    -------
    TextGallery
        Notebooks show it as HTML in which the texts are escaped.

    Examples
    --------
    >>> print(text_gallery(["a red car"], ["a blue car"], [0.98], eps=0.05))
    Pairs of texts
    0.9800 dropped
      a [red] car
      a [blue] car
    """
    queries, matches = (list(map(document_text, texts)) for texts in (queries, matches))
    scores = list(scores)
    check_pairs(queries, matches, scores)
    pairs = [
        Pair("", "", float(score), compare_texts(query, match), same=query == match)
        for query, match, score in zip(queries, matches, scores, strict=True)
    ]
    return TextGallery(pairs, title, None if eps is None else float(threshold(eps)))


def check_pairs(queries: Sized, matches: Sized, scores: Sized) -> None:
    """Raise `InvalidArgumentError` unless all three have the same length."""
    if not len(queries) == len(matches) == len(scores):
        raise InvalidArgumentError(
            f"{len(queries)} queries, {len(matches)} matches and {len(scores)} scores do not make pairs."
        )


@dataclass(frozen=True)
class TextGallery:
    """Pairs of texts, as HTML in notebooks and as plain text elsewhere."""

    pairs: list[Pair]
    title: str
    threshold: float | None

    def _repr_html_(self) -> str:
        page = templates().get_template("gallery.html")
        return page.render(gallery=self, style=load_asset("pairs.css"))

    def __repr__(self) -> str:
        lines = [self.title]
        for pair in self.pairs:
            lines.append(f"{pair.score:.{self.decimals}f}{self.verdict(pair.score)}")
            for side in pair.texts or ():
                lines.append("  " + "".join(f"[{piece.text}]" if piece.differs else piece.text for piece in side))
        return "\n".join(lines)

    @property
    def decimals(self) -> int:
        """Decimals of the scores that are shown."""
        return decimals_of(self.pairs, self.threshold)

    def verdict(self, score: float) -> str:
        """``dropped`` or ``kept``, after a space, for a pair of that score; empty without a threshold."""
        if self.threshold is None:
            return ""
        return " dropped" if score >= self.threshold else " kept"


def decimals_of(pairs: Sequence[Pair], threshold: float | None) -> int:
    """Decimals, four at least, with which the score of each pair reads as on its side of the threshold."""
    if threshold is None:
        return LEAST_DECIMALS
    # As it is read: in float32, 0.95 is 0.949999988.
    border = round(threshold, MOST_DECIMALS - 1)
    sides = [(pair.score, pair.score >= threshold) for pair in pairs]
    for decimals in range(LEAST_DECIMALS, MOST_DECIMALS):
        if all((round(score, decimals) >= border) == side for score, side in sides):
            return decimals
    return MOST_DECIMALS


def document_text(value: Any) -> str:
    """A text as it is shown; a missing one is empty."""
    return "" if value is None or value is pd.NA or value != value else str(value)


def thumbnail(value: Any, open_path: Callable[[str], Any]) -> str:
    """A small copy of an image as a ``data:`` URL, or a sentence that says why there is none.

    Parameters
    ----------
    value : bytes, str or dict
        An encoded image, such as PNG or JPEG; the path of one; or either, as ``bytes`` and ``path`` of a dict.
    open_path : callable
        Opens a path for reading.
    """
    from PIL import Image, ImageOps

    try:
        with io.BytesIO(value) if isinstance(value, bytes) else open_path(value) as file, Image.open(file) as image:
            # Large JPEGs are decoded at about the size of the thumbnail.
            image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            upright = ImageOps.exif_transpose(image)
            upright.thumbnail((THUMBNAIL, THUMBNAIL))
            return _encode(upright)
    # A broken file may make Pillow's decoders raise anything.
    except Exception as error:
        return f"The image cannot be read: {type(error).__name__}."


def _encode(image: Any) -> str:
    """An image as a ``data:`` URL: lossless if that is small or parts are transparent, else JPEG."""
    lossless = image.has_transparency_data or max(image.size) <= THUMBNAIL // 4 or image.mode in ("1", "L", "P")
    encoded = io.BytesIO()
    if lossless:
        image.convert("RGBA" if image.has_transparency_data else "RGB").save(encoded, "PNG", optimize=True)
    else:
        image.convert("RGB").save(encoded, "JPEG", quality=82)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"


@lru_cache(maxsize=1)
def templates() -> Any:
    """The package's templates, which escape all values."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dask_semdedup.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = "{:,}".format
    environment.filters["percent"] = "{:.2%}".format
    return environment


def load_asset(name: str) -> Markup:
    """A style sheet or script of the package, to stand in a page unescaped."""
    return Markup(files("dask_semdedup.report").joinpath("templates", name).read_text(encoding="utf-8"))
