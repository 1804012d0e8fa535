"""The page shows the numbers and the pairs, whatever the scores are, and runs nothing of what documents hold."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError
from dask_semdedup.io.scores import Compared
from dask_semdedup.report.page import Documents, write_report
from dask_semdedup.steps.duplicates import find_duplicates

ATTACK = "</script><script>alert('document')</script><img src=x onerror=alert(1)>"


@pytest.fixture
def scores() -> pd.DataFrame:
    """Two clusters of 40 rows, whose similarities go from 0.5 to 0.99."""
    values = np.linspace(0.5, 0.99, 39).astype(np.float32)
    return pd.DataFrame(
        {
            "id": [f"doc-{number}" for number in range(80)],
            "max_id": ["doc-0"] * 40 + ["doc-40"] * 40,
            "cosine_sim_score": np.concatenate([[np.float32(0)], values, [np.float32(0)], values]),
            "centroid": np.repeat([7, 8], 40),
        }
    )


def read(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def script_data(page: str) -> dict[str, Any]:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(data)


def visible(page: str, name: str, following: str) -> list[float]:
    """Scores of the pairs in a list of the page, which ends where another element follows."""
    part = page[page.index(name) : page.index(following)]
    return [float(score) for score in re.findall(r'data-score="([^"]+)"', part)]


# --- What it shows ---------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_scores(scores: pd.DataFrame, tmp_path: Path) -> None:
    summary = write_report(scores, tmp_path, eps=0.05)
    expected = int((scores["cosine_sim_score"] >= np.float32(0.95)).sum())
    assert summary.duplicates(0.05) == expected
    page = read(tmp_path)
    assert f'<span data-value="duplicates">{expected}</span> of 80 documents are duplicates' in page
    data = script_data(page)
    assert data["duplicates"][data["start"]] == expected
    assert data["eps"][data["start"]] == 0.05
    assert "Add --text-field or --image-field to see the documents." in page
    for eps, threshold, count in zip(data["eps"], data["thresholds"], data["duplicates"], strict=True):
        assert count == (scores["cosine_sim_score"] >= threshold).sum(), eps


def test_scores_read_as_on_their_side_of_the_threshold(scores: pd.DataFrame, tmp_path: Path) -> None:
    scores.loc[[38, 39], "cosine_sim_score"] = np.array([0.94998, 0.95003], np.float32)
    write_report(scores, tmp_path, eps=0.05)
    assert {"0.94998", "0.95003"} <= set(re.findall(r'"score"><b>(.*?)</b>', read(tmp_path)))


def test_pairs_stand_on_their_side_of_the_threshold(scores: pd.DataFrame, tmp_path: Path) -> None:
    write_report(scores, tmp_path, eps=0.05)
    values = scores["cosine_sim_score"].to_numpy()
    page = read(tmp_path)
    assert visible(page, 'id="dropped"', 'class="divider"') == sorted(values[values >= np.float32(0.95)])[:4][::-1]
    assert visible(page, 'id="kept"', 'id="before"') == sorted(values[values < np.float32(0.95)])[-4:][::-1]


def test_the_page_says_how_to_drop_duplicates(scores: pd.DataFrame, tmp_path: Path) -> None:
    write_report(scores, tmp_path, eps=0.05)
    (line,) = re.findall("To drop the duplicates.*?<code>(.*?)</code>", read(tmp_path))
    documents = dd.from_pandas(scores[["id"]], npartitions=2)
    names = {"ddf": documents, "scores": dd.from_pandas(scores, npartitions=2)}
    kept = eval(re.sub("<.*?>", "", line), names)
    assert len(kept) == 80 - (scores["cosine_sim_score"] >= np.float32(0.95)).sum()


def test_the_call_that_drops_duplicates_names_the_column_of_ids(scores: pd.DataFrame, tmp_path: Path) -> None:
    write_report(scores, tmp_path, eps=0.02, id_field="doc")
    text = html.unescape(re.sub(r"<[^>]+>", "", read(tmp_path)))
    assert "ddf.semdedup.remove(scores, eps=0.02, id_field='doc')" in text


def test_a_single_cluster_is_not_drawn(scores: pd.DataFrame, tmp_path: Path) -> None:
    write_report(scores.head(40), tmp_path)
    assert "Cluster sizes" not in read(tmp_path)
    assert not (tmp_path / "clusters.png").exists()


def test_partitions_do_not_change_the_page(scores: pd.DataFrame, tmp_path: Path) -> None:
    distinct = scores.assign(cosine_sim_score=scores["cosine_sim_score"] - np.arange(80, dtype=np.float32) * 1e-5)
    write_report(distinct, tmp_path / "one")
    write_report(dd.from_pandas(distinct, npartitions=9, sort=False), tmp_path / "many")
    assert read(tmp_path / "one") == read(tmp_path / "many")


def test_pictures_lie_beside_the_page(scores: pd.DataFrame, tmp_path: Path) -> None:
    write_report(scores, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["clusters.png", "duplicates.png", "histogram.png", "index.html"]
    assert all(Image.open(path).width > 800 for path in tmp_path.glob("*.png"))


def test_clusters_are_left_out_where_they_are_unknown(scores: pd.DataFrame, tmp_path: Path) -> None:
    write_report(scores.drop(columns="centroid"), tmp_path)
    assert "Cluster" not in re.sub(r"<style>.*?</style>", "", read(tmp_path), flags=re.DOTALL)
    assert not (tmp_path / "clusters.png").exists()


@pytest.mark.parametrize(
    "chosen",
    [slice(0, 0), slice(0, 1), slice(0, 40), slice(0, 10)],
    ids=["no rows", "one row", "one cluster", "no duplicates"],
)
@pytest.mark.parametrize("eps", [0.0, 0.01, 1.0, 2.0])
def test_any_scores_make_a_page(scores: pd.DataFrame, tmp_path: Path, chosen: slice, eps: float) -> None:
    write_report(scores.iloc[chosen], tmp_path, eps)
    data = script_data(read(tmp_path))
    assert data["rows"] == len(scores.iloc[chosen])
    assert data["eps"][data["start"]] == eps


@pytest.mark.parametrize(("kept", "end"), [(0.05, 0.05), (0.5, 0.5), (1.5, 1.0), (0.0, 1e-8)])
def test_the_page_ends_where_rows_were_compared(scores: pd.DataFrame, tmp_path: Path, kept: float, end: float) -> None:
    write_report(find_duplicates(scores, kept), tmp_path, min(kept, 0.02), compared=Compared(kept, 80))
    data = script_data(read(tmp_path))
    assert data["eps"][-1] == end
    assert data["rows"] == 80


def test_clusters_are_left_out_where_rows_were_compared_without(scores: pd.DataFrame, tmp_path: Path) -> None:
    summary = write_report(find_duplicates(scores, 0.1), tmp_path, 0.05, compared=Compared(0.1, 100))
    assert summary.clusters is None
    assert summary.rows == 100
    assert not (tmp_path / "clusters.png").exists()


def test_rows_that_are_dropped_for_kept_ones_are_told_from_near_ones(scores: pd.DataFrame, tmp_path: Path) -> None:
    near = int((scores["cosine_sim_score"] >= np.float32(0.95)).sum())
    command = "dask-semdedup run in.parquet 'my out' --rank-by 'quality:desc'"
    summary = write_report(scores, tmp_path, eps=0.05, dropped=5, command=command)
    assert summary.duplicates(0.05) == near
    page = read(tmp_path)
    text = " ".join(re.sub("<style.*?</style>|<script.*?</script>|<[^>]*>", " ", page, flags=re.DOTALL).split())
    assert "<title>5 dropped at eps = 0.05</title>" in page
    assert "This run drops 5 of 80 documents at eps = 0.05" in text
    assert "Dropped by this run, at eps = 0.05 5 6.25% Kept by this run, at eps = 0.05 75 93.75%" in text
    assert f"any preferred document, kept or not: {near} at eps = 0.05. Only these can be dropped." in text
    assert "Clusters with the most near-duplicates" in text
    assert "semdedup.remove" not in text, "it drops all near-duplicates"
    assert f"To deduplicate at this eps: {command} --eps 0.05 ." in html.unescape(text)


def test_the_page_of_scores_says_by_which_rule_duplicates_are_dropped(scores: pd.DataFrame, tmp_path: Path) -> None:
    write_report(scores, tmp_path, eps=0.05)
    text = read(tmp_path)
    assert "Under the rule “any”, all duplicates are dropped. Under the rule “kept”" in text


@pytest.mark.parametrize("dropped", [None, 5])
def test_pairs_say_which_row_is_which(scores: pd.DataFrame, tmp_path: Path, dropped: int | None) -> None:
    write_report(scores, tmp_path, eps=0.05, dropped=dropped)
    page = read(tmp_path)
    above, below = re.findall(r"""id="(?:dropped|kept)" style="--role: '(.*?)'""", page)
    assert (above, below) == (("dropped", "kept") if dropped is None else ("near-duplicate", "row"))
    assert '<span class="role"></span> <code>doc-79</code>' in page
    assert '<span class="preferred"></span> <code>doc-40</code>' in page


@pytest.mark.parametrize(("eps", "is_hidden"), [(0.05, True), (0.5, False)])
def test_an_empty_side_of_the_threshold_says_so(
    scores: pd.DataFrame, tmp_path: Path, eps: float, is_hidden: bool
) -> None:
    write_report(find_duplicates(scores, 0.5), tmp_path, eps, compared=Compared(0.5, 80))
    (hidden,) = re.findall(r'id="none-below"(.*?)>No stored pair is below this threshold', read(tmp_path))
    assert bool(hidden) == is_hidden


def test_numbers_are_ids_too(scores: pd.DataFrame, tmp_path: Path) -> None:
    number = scores["id"].str.removeprefix("doc-").astype(int)
    write_report(scores.assign(id=number, max_id=scores["max_id"].str.removeprefix("doc-").astype(int)), tmp_path)
    assert "<code>39</code>" in read(tmp_path)


# --- Documents -------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(scores: pd.DataFrame, tmp_path: Path) -> str:
    path = tmp_path / "texts.parquet"
    rows = [f"Document {number} & its words" for number in range(80)]
    rows[39] = f"Document {ATTACK}"
    pq.write_table(pa.table({"id": scores["id"].tolist(), "text": rows}), path, row_group_size=7)
    return str(path)


def test_texts_stand_side_by_side_with_their_differences(scores: pd.DataFrame, texts: str, tmp_path: Path) -> None:
    write_report(scores, tmp_path / "page", documents=Documents(texts, text_field="text"))
    page = html.unescape(read(tmp_path / "page"))
    assert "Add --text-field" not in page
    assert "Document <mark>38</mark> & its words" in page
    assert "Document <mark>0</mark> & its words" in page


def test_texts_are_shown_and_never_run(scores: pd.DataFrame, texts: str, tmp_path: Path) -> None:
    hostile = scores.replace({"id": {"doc-39": ATTACK}})
    table = pq.read_table(texts).to_pandas().replace({"id": {"doc-39": ATTACK}})
    pq.write_table(pa.Table.from_pandas(table), texts)
    write_report(hostile, tmp_path / "page", documents=Documents(texts, text_field="text"), source=ATTACK)
    page = read(tmp_path / "page")
    assert page.count("<script") == 2, "the page's own data and script"
    assert "<img" not in page
    assert ATTACK in html.unescape(re.sub("</?mark>", "", page))


def test_clusters_with_hostile_names_are_escaped(scores: pd.DataFrame, tmp_path: Path) -> None:
    write_report(scores.assign(centroid=ATTACK), tmp_path, eps=0.05)
    assert read(tmp_path).count("<script") == 2


def test_page_fetches_nothing_and_runs_its_own_script_only(scores: pd.DataFrame, texts: str, tmp_path: Path) -> None:
    write_report(scores, tmp_path / "page", documents=Documents(texts, text_field="text"))
    page = read(tmp_path / "page")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in policy
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\((?!#)|@import', page)


def image_bytes(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_images_may_be_bytes_or_paths(scores: pd.DataFrame, tmp_path: Path, kind: str) -> None:
    images = [image_bytes(number) for number in range(80)]
    (tmp_path / "files").mkdir()
    for number, image in enumerate(images):
        (tmp_path / "files" / f"{number}.png").write_bytes(image)
    column = {
        "bytes": images,
        "struct": [{"bytes": image, "path": None} for image in images],
        "path": [f"files/{number}.png" for number in range(80)],
    }[kind]
    pq.write_table(pa.table({"name": scores["id"].tolist(), "image": column}), tmp_path / "images.parquet")
    documents = Documents(str(tmp_path / "images.parquet"), image_field="image", id_field="name")
    write_report(scores, tmp_path / "page", documents=documents)
    page = read(tmp_path / "page")
    url = re.search(r'<img src="data:image/png;base64,([^"]+)" alt="Image of document doc-79">', page)
    assert url is not None
    assert Image.open(io.BytesIO(base64.b64decode(url[1]))).getpixel((0, 0)) == (79, 0, 0)


def test_a_broken_image_is_said_to_be_broken(scores: pd.DataFrame, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": scores["id"].tolist(), "image": [b"no image"] * 80}), tmp_path / "images.parquet")
    write_report(scores, tmp_path / "page", documents=Documents(str(tmp_path / "images.parquet"), image_field="image"))
    assert "The image cannot be read" in read(tmp_path / "page")


def test_documents_of_other_ids_are_refused(scores: pd.DataFrame, texts: str, tmp_path: Path) -> None:
    others = scores.assign(id=range(80), max_id=0)
    with pytest.raises(InvalidArgumentError, match=r"None of .* ids"):
        write_report(others, tmp_path / "page", documents=Documents(texts, text_field="text"))
    with pytest.raises(MissingColumnsError, match="body"):
        write_report(scores, tmp_path / "page", documents=Documents(texts, text_field="body"))
    assert not (tmp_path / "page").exists()


def test_documents_need_a_column_to_show(texts: str) -> None:
    with pytest.raises(InvalidArgumentError, match="text_field or image_field"):
        Documents(texts)
