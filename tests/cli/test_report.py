"""``dask-semdedup report``: a folder of a page and its pictures, or one line on why there is none."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from distributed import LocalCluster

from dask_semdedup import cli
from dask_semdedup.io.scores import COMPARED, Compared, write_compared
from dask_semdedup.steps.duplicates import find_duplicates
from tests.data import assert_one_line

FILES = ["clusters.png", "duplicates.png", "histogram.png", "index.html"]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Two files of 20 rows each: what the command writes."""
    folder = tmp_path / "scores"
    folder.mkdir()
    for part in range(2):
        rows = np.arange(20) + 100 * part
        values = np.linspace(0.905, 1, 20, dtype=np.float32)
        values[0] = 0
        frame = pd.DataFrame({"id": rows, "max_id": 100 * part, "cosine_sim_score": values, "centroid": part})
        frame.to_parquet(folder / f"part.{part}.parquet", index=False)
    return folder


@pytest.fixture
def invoke() -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(cli.main, ["report", *map(str, arguments)])

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_report_is_written_beside_the_scores(scores: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    result = invoke(scores, "--eps", "0.02")
    assert result.exit_code == 0, result.stderr
    assert "Near-duplicates at eps = 0.02: 10 of 40 rows (25.00%)" in result.stdout
    assert "report/index.html" in result.stdout
    assert names(tmp_path / "report") == FILES
    assert names(tmp_path) == ["report", "scores"]


def test_shares_are_of_all_rows_where_only_duplicates_were_written(
    scores: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    rows = pd.Series([20, 20, 7], index=[0, 1, 2])
    for file in scores.iterdir():
        find_duplicates(pd.read_parquet(file), 0.05).to_parquet(file, index=False)
    write_compared(Compared(0.05, rows), str(scores))
    result = invoke(scores, "--eps", "0.02")
    assert result.exit_code == 0, result.stderr
    assert "Near-duplicates at eps = 0.02: 10 of 47 rows (21.28%)" in result.stdout
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<dt>Clusters</dt><dd>3</dd>" in page
    assert '<th scope="row">0</th><td>20</td><td>5</td><td>25.00%</td>' in page
    assert "Scores were stored up to eps = 0.05" in page
    assert "10 duplicates among 47 rows" in page
    assert_one_line(invoke(scores, tmp_path / "other", "--eps", "0.1").stderr, "0.1", "0.05", "(--eps)")
    (scores / COMPARED).write_bytes(b"no table")
    assert_one_line(invoke(scores, tmp_path / "other", "--eps", "0.02").stderr, COMPARED)


def test_files_of_the_stages_need_no_cluster_column(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "scores").mkdir()
    for cluster in (3, 12):
        frame = pd.DataFrame({"id": ["a", "b"], "max_id": ["a", "a"], "cosine_sim_score": np.float32([0, 1])})
        frame.to_parquet(tmp_path / "scores" / f"cluster_{cluster}.parquet")
    result = invoke(tmp_path / "scores", tmp_path / "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert '<th scope="row">12</th>' in (tmp_path / "out" / "index.html").read_text()


def test_documents_are_shown(scores: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    rows = [*range(20), *range(100, 120)]
    pd.DataFrame({"key": rows, "words": [f"text {row}" for row in rows]}).to_parquet(tmp_path / "texts.parquet")
    options = ["--data", tmp_path / "texts.parquet", "--text-field", "words", "--id-field", "key"]
    result = invoke(scores, tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    assert "text <mark>119</mark>" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--text-field", "body"],
            [
                "['body'] not found in the frame, which has ['id', 'words']. Name the columns of ids, texts and images",
                "texts.parquet as --id-field, --text-field and --image-field.",
            ],
        ),
        (["--text-field", "words"], ["None of", "column of ids as --id-field."]),
    ],
)
def test_wrong_columns_of_documents_name_options(
    scores: Path, tmp_path: Path, invoke: Callable[..., Result], options: list[str], words: list[str]
) -> None:
    pd.DataFrame({"id": [1000], "words": ["text"]}).to_parquet(tmp_path / "texts.parquet")
    assert_one_line(invoke(scores, tmp_path / "out", "--data", tmp_path / "texts.parquet", *options).stderr, *words)


def test_report_runs_on_a_cluster(scores: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    with LocalCluster(n_workers=1, processes=False, protocol="tcp://", dashboard_address=":0") as cluster:
        result = invoke(scores, tmp_path / "one", "--scheduler", cluster.scheduler_address)
    assert result.exit_code == 0, result.stderr
    invoke(scores, tmp_path / "other")
    assert (tmp_path / "one" / "index.html").read_text() == (tmp_path / "other" / "index.html").read_text()


def test_occupied_output_is_replaced_on_request_only(
    scores: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    invoke(scores, tmp_path / "out")
    before = (tmp_path / "out" / "index.html").read_text()
    assert_one_line(
        invoke(scores, tmp_path / "out", "--eps", "0.05").stderr, "not empty", "--overwrite", "the second argument"
    )
    assert (tmp_path / "out" / "index.html").read_text() == before
    assert invoke(scores, tmp_path / "out", "--eps", "0.05", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "index.html").read_text() != before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert_one_line(invoke(scores, tmp_path / "out", "--overwrite").stderr, "notes.txt")
    assert (tmp_path / "out" / "notes.txt").exists()


def test_pages_of_others_are_not_replaced(scores: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("<title>my own</title>")
    (tmp_path / "out" / "histogram.png").write_text("mine")
    assert_one_line(invoke(scores, tmp_path / "out", "--overwrite").stderr, "not a report", "histogram.png")
    assert names(tmp_path / "out") == ["histogram.png", "index.html"]


def test_scores_are_looked_for_before_the_output(scores: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    invoke(scores)
    result = invoke(tmp_path / "nothere")
    assert_one_line(result.stderr, "nothere: there is no such file or folder")
    assert "overwrite" not in result.stderr


def test_output_stays_apart_from_the_scores(scores: Path, invoke: Callable[..., Result]) -> None:
    assert_one_line(invoke(scores, scores / "report").stderr, "overlap")
    assert_one_line(invoke(scores, scores, "--overwrite").stderr, "overlap")
    assert len(names(scores)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text-field", "text"], ["--text-field", "--data"]),
        (["--data", "nowhere.parquet"], ["as --text-field or --image-field."]),
        (["--data", "nowhere.parquet", "--text-field", "text"], ["nowhere.parquet"]),
        (["--eps", "3"], ["--eps"]),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    scores: Path, tmp_path: Path, invoke: Callable[..., Result], options: list[str], words: list[str]
) -> None:
    result = invoke(scores, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert_one_line(result.stderr, *words)
    assert names(tmp_path) == ["scores"]


def test_truncated_files_are_named(scores: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    bad = scores / "part.1.parquet"
    bad.write_bytes(bad.read_bytes()[:-50])
    result = invoke(scores, tmp_path / "out")
    assert result.exit_code == 2
    assert_one_line(result.stderr, "part.1.parquet", "truncated")
    assert names(tmp_path) == ["scores"]


def test_files_without_scores_are_named(scores: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    first = scores / "part.0.parquet"
    pd.read_parquet(first).drop(columns="max_id").to_parquet(first)
    assert_one_line(invoke(scores, tmp_path / "out").stderr, "max_id", "part.0.parquet")
    assert names(tmp_path) == ["scores"]


def test_no_scores_are_one_line(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    assert_one_line(invoke(tmp_path / "nowhere").stderr, "nowhere")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """The output of a run over 60 rows, of which chains of near-duplicates are dropped."""

    def make(*options: str) -> Path:
        angles = np.deg2rad(np.arange(60) * 4)
        rows = list(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
        pd.DataFrame({"doc": [f"d{n}" for n in range(60)], "embeddings": rows}).to_parquet(tmp_path / "in.parquet")
        arguments = ["run", tmp_path / "in.parquet", tmp_path / "out", "--id-field", "doc", "--eps", 0.01, *options]
        assert CliRunner().invoke(cli.main, list(map(str, arguments))).exit_code == 0
        return tmp_path / "out"

    return make


def words(page: Path) -> str:
    text = re.sub("<style.*?</style>|<script.*?</script>|<[^>]*>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(text.split())


def test_the_page_of_a_run_tells_what_the_run_drops(
    run: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    output = run()
    dropped = len(pd.read_parquet(output / "duplicates"))
    assert dropped < 58, "or both rules drop the same"
    assert invoke(output, tmp_path / "page").exit_code == 0
    assert f"This run drops {dropped} of 60 documents at eps = 0.01" in words(tmp_path / "page" / "index.html")
    assert f"This run drops {dropped} of 60 documents at eps = 0.01" in words(output / "report" / "index.html")
    result = invoke(output, tmp_path / "other", "--eps", 0.02)
    assert_one_line(result.stderr, "at eps = 0.01, and not at 0.02", "Repeat the run with --eps 0.02", "out/scores")
    assert invoke(output / "scores", tmp_path / "other", "--eps", 0.02).exit_code == 0


def test_the_page_of_a_run_by_the_rule_any_has_any_eps(
    run: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    output = run("--duplicate-of", "any", "--max-eps", "0.05")
    assert "at eps = 0.01" in invoke(output, tmp_path / "page").stdout
    assert "at eps = 0.02" in invoke(output, tmp_path / "other", "--eps", 0.02).stdout
    assert "id_field='doc'" in html.unescape(words(tmp_path / "page" / "index.html"))


def test_a_run_without_scores_yet_is_named(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "out" / "scores.partial").mkdir(parents=True)
    (tmp_path / "out" / "scores.partial" / "part.000000.parquet").write_bytes(b"")
    assert_one_line(invoke(tmp_path / "out").stderr, "out is the OUTPUT of a run that has no scores yet", "resume")


def test_images_that_cannot_be_read_are_a_warning(scores: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    frame = pd.DataFrame({"id": [*range(20), *range(100, 120)], "image": "no image"})
    frame.to_parquet(tmp_path / "documents.parquet")
    result = invoke(scores, "--data", tmp_path / "documents.parquet", "--image-field", "image")
    assert result.exit_code == 0
    assert "Column 'image': none of 40 images can be read" in result.stderr
