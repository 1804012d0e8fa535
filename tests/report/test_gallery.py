"""The pairs that are chosen, and how texts and images are shown."""

from __future__ import annotations

import base64
import io
import re

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.report.gallery import THUMBNAIL, Piece, compare_texts, pairs_around, text_gallery, thumbnail
from dask_semdedup.report.gallery import text_gallery as gallery_of_plots


def frame_of(values: list[float]) -> pd.DataFrame:
    ids = [f"doc-{number}" for number in range(len(values) + 1)]
    scores = np.array([0.0, *values], dtype=np.float32)
    return pd.DataFrame({"id": ids, "max_id": "doc-0", "cosine_sim_score": scores})


# --- Which pairs -----------------------------------------------------------------------------------------------------


def test_pairs_are_the_nearest_on_both_sides() -> None:
    pairs = pairs_around(frame_of([0.1, 0.99, 0.97, 0.96, 0.94, 0.93, 0.2]), eps=0.05, count=2)
    assert pairs["cosine_sim_score"].tolist() == pytest.approx([0.97, 0.96, 0.94, 0.93])
    assert pairs["duplicate"].tolist() == [True, True, False, False]


@given(
    values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30, unique=True),
    eps=st.floats(0, 1),
    npartitions=st.integers(1, 20),
)
def test_partitions_do_not_change_the_pairs(values: list[float], eps: float, npartitions: int) -> None:
    scores = frame_of(values)
    parted = pairs_around(dd.from_pandas(scores, npartitions=npartitions, sort=False), eps, count=3)
    assert parted.to_dict("list") == pairs_around(scores, eps, count=3).to_dict("list")


def test_the_first_row_of_a_cluster_is_in_no_pair() -> None:
    assert pairs_around(frame_of([]), eps=1.0).empty


# --- Texts -----------------------------------------------------------------------------------------------------------


@given(one=st.text(max_size=200), other=st.text(max_size=200))
def test_pieces_make_the_texts_again(one: str, other: str) -> None:
    left, right = compare_texts(one, other)
    assert "".join(piece.text for piece in left) == one
    assert "".join(piece.text for piece in right) == other


def test_words_that_differ_are_marked() -> None:
    left, right = compare_texts("the quick brown fox", "the quick red fox")
    assert [piece for piece in left if piece.differs] == [Piece("brown", True)]
    assert [piece for piece in right if piece.differs] == [Piece("red", True)]


def test_texts_with_little_in_common_are_not_marked() -> None:
    left, _ = compare_texts("one two three four", "five six seven eight")
    assert left == [Piece("one two three four")]


def test_long_texts_are_cut_around_the_first_difference() -> None:
    shared = "the same words " * 100
    left, right = compare_texts(f"{shared}here {shared}", f"{shared}there {shared}")
    assert left[0].text == "… "
    assert left[-1].text == " …"
    assert Piece("here", True) in left
    assert Piece("there", True) in right
    assert sum(len(piece.text) for piece in left) < 600


def test_what_is_only_cut_off_is_not_marked() -> None:
    """A word at the beginning of one text moves all others, and other words are cut off."""
    text = " ".join(f"word{number}" for number in range(200))
    one, other = compare_texts(text, f"new {text}")
    assert [piece.text for piece in (*one, *other) if piece.differs] == ["new "]
    assert one[-1].text == other[-1].text == " …"
    for side in (one, other):
        assert text.startswith("".join(piece.text for piece in side[:-1]).removeprefix("new "))


def test_a_single_long_word_is_cut() -> None:
    one, other = compare_texts("a" * 2000, "b" * 2000)
    assert [len(piece.text) for piece in (*one, *other)] == [500, 2, 500, 2]


def test_gallery_escapes_texts() -> None:
    attack = "<script>alert(1)</script>"
    page = text_gallery([attack], [attack + "!"], [0.99], eps=0.05)._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page.replace("<mark>", "").replace("</mark>", "")
    assert "dropped" in page


def test_gallery_is_text_where_there_is_no_html() -> None:
    assert str(text_gallery(["a b c d"], ["a b c e"], [0.5], title="T")) == "T\n0.5000\n  a b c [d]\n  a b c [e]"
    assert gallery_of_plots is text_gallery


@pytest.mark.parametrize(
    ("scores", "eps", "shown"),
    [
        ([0.991, 0.98], 0.01, ["0.9910", "0.9800"]),
        ([0.99002, 0.98998], 0.01, ["0.99002", "0.98998"]),
        ([float(np.float32(0.99)), 0.9899994], 0.01, ["0.990000", "0.989999"]),
        ([float(np.float32(0.95)), 0.94], 0.05, ["0.9500", "0.9400"]),
        ([0.999962, 0.999948], 0.00005, ["1.0000", "0.9999"]),
    ],
)
def test_scores_read_as_on_their_side_of_the_threshold(scores: list[float], eps: float, shown: list[str]) -> None:
    gallery = text_gallery(["a", "b"], ["a", "c"], scores, eps=eps)
    assert re.findall(r"\d\.\d+ \w+", repr(gallery)) == [f"{shown[0]} dropped", f"{shown[1]} kept"]
    assert re.findall(r"<b>(.*?)</b>", gallery._repr_html_()) == shown


@pytest.mark.parametrize("absent", [None, float("nan"), pd.NA])
def test_missing_texts_are_said_to_be_missing(absent: object) -> None:
    assert "No text." in text_gallery([absent], ["there"], [0.5])._repr_html_()


def test_gallery_refuses_what_does_not_make_pairs() -> None:
    with pytest.raises(InvalidArgumentError, match="2 queries, 1 matches and 2 scores do not"):
        text_gallery(["a", "b"], ["a"], [1, 1])


# --- Images ----------------------------------------------------------------------------------------------------------


def encoded(size: tuple[int, int], mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 90).convert(mode).save(file, kind)
    return file.getvalue()


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_large_images_become_small(kind: str) -> None:
    image = decoded(thumbnail(encoded((1200, 600), kind=kind), open))
    assert image.size == (THUMBNAIL, THUMBNAIL // 2)


def test_small_images_are_kept_exactly() -> None:
    original = encoded((8, 8))
    assert decoded(thumbnail(original, open)).tobytes() == Image.open(io.BytesIO(original)).tobytes()


def test_transparency_is_kept() -> None:
    assert decoded(thumbnail(encoded((400, 400), "RGBA"), open)).mode == "RGBA"


@pytest.mark.parametrize("broken", [b"no image", b"", encoded((50, 50))[:100], None, "nowhere.png"])
def test_broken_images_are_said_to_be_broken(broken: object) -> None:
    assert thumbnail(broken, open).startswith("The image cannot be read")
