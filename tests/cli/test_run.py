"""``dask-semdedup run``: from raw files to kept rows, and again with what is there."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import dask_semdedup
from dask_semdedup import cli
from dask_semdedup.accessor import SemDedupAccessor
from dask_semdedup.cli.run import Run
from dask_semdedup.errors import DataReadError
from dask_semdedup.io.notes import read_note
from dask_semdedup.io.scores import COMPARED
from dask_semdedup.io.targets import MANIFEST, TABLE_MANIFEST
from dask_semdedup.lazy import join
from dask_semdedup.steps.duplicates import find_duplicates
from tests.data import ObjectStore, assert_one_line
from tests.lazy.test_join import indexed

pytestmark = pytest.mark.usefixtures("drawn_once")

ROWS, COPIES = 200, 20
STEPS = ["deduplicated", "duplicates", "report", "scores"]
STEPS_WITH_CLUSTERS = ["clusters", *STEPS]
OPTIONS = ["--eps", 0.001]
CLUSTERS = ["--n-clusters", 4]
EITHER_WAY = pytest.mark.parametrize("way", [[], CLUSTERS], ids=["complete", "clusters"])


def table(ids: str = "doc-{}") -> pa.Table:
    """Random rows of which the last twenty repeat the first twenty, but for a little noise."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(ROWS, 8)).astype(np.float32)
    embeddings[-COPIES:] = embeddings[:COPIES] + 1e-4
    return pa.table(
        {
            "id": [ids.format(number) for number in range(ROWS)],
            "text": [f"text {number % (ROWS - COPIES)}" for number in range(ROWS)],
            "embeddings": pa.array(list(embeddings)),
            "quality": np.arange(ROWS),
        }
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "raw.parquet"
    pq.write_table(table(), path, row_group_size=50)
    return path


def finish(folder: Path, *options: object) -> Path:
    """Write a raw file to a folder, and what a run makes of it."""
    pq.write_table(table(), folder / "raw.parquet", row_group_size=50)
    arguments = ["run", folder / "raw.parquet", folder / "out", *OPTIONS, *options]
    result = CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def clustered_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("clustered"), *CLUSTERS)


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """The raw file of a run whose output is there, for this test to change."""
    shutil.copytree(finished_run / "out", tmp_path / "out")
    return finished_run / "raw.parquet"


@pytest.fixture
def clustered(clustered_run: Path, tmp_path: Path) -> Path:
    """The same of a run with clusters."""
    shutil.copytree(clustered_run / "out", tmp_path / "out")
    return clustered_run / "raw.parquet"


@pytest.fixture
def invoke(tmp_path: Path) -> Callable[..., Result]:
    def run(source: Path | str, *options: object) -> Result:
        arguments = ["run", source, tmp_path / "out", *OPTIONS, *options]
        return CliRunner().invoke(cli.main, list(map(str, arguments)))

    return run


def kept(tmp_path: Path) -> pd.DataFrame:
    return pd.read_parquet(tmp_path / "out" / "deduplicated")


def tokens(tmp_path: Path) -> dict[str, str]:
    """What tells one making of a step from another."""
    fs, folders = fsspec.filesystem("file"), (tmp_path / "out").iterdir()
    manifests = {folder.name: next(folder.glob("_manifest.*")) for folder in folders}
    return {name: read_note(fs, str(path))["token"] for name, path in manifests.items()}


def redone(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in after if before.get(name) != after[name])


# --- Input that is not as it should be ---


@pytest.mark.parametrize("name", ["strings.parquet", "strings.jsonl", "strings", "strings_in_json"])
def test_strings_get_advice_for_a_shell(
    tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The advice works as it stands."""
    frame, path = table().to_pandas(), tmp_path / name
    frame["embeddings"] = [json.dumps(row.tolist()) for row in frame["embeddings"]]
    if name.endswith(".jsonl"):
        frame.to_json(path, orient="records", lines=True)
    elif name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name == "strings":
        path.mkdir()
        frame.to_parquet(path / "part.0.parquet")
    else:
        path.mkdir()
        frame.to_json(path / "0.jsonl", orient="records", lines=True)
    result = invoke(path)
    assert result.exit_code == 2
    assert_one_line(result.stderr, "'embeddings' holds strings", "--embedding-field", "python -c")
    assert "ddf" not in result.stderr
    (program,) = re.findall(r'python -c "(.*)"', result.stderr)
    monkeypatch.chdir(tmp_path)
    exec(program)
    assert invoke(tmp_path / "parsed.parquet").exit_code == 0


@pytest.mark.parametrize("way", ["parquet", "jsonl", "pairwise"])
@pytest.mark.parametrize("prefix", ["", "dim_"])
def test_columns_of_dimensions_get_advice_for_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, prefix: str
) -> None:
    """The advice works as it stands."""
    frame, path = table().to_pandas(), tmp_path / f"{{wide}}.{way}"
    dimensions = pd.DataFrame(np.stack(list(frame.pop("embeddings")))).add_prefix(prefix)
    frame = pd.concat([frame, dimensions], axis=1)
    if way == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.assign(centroid=0).to_parquet(path)
    command = ["pairwise", "--which-to-keep", "random"] if way == "pairwise" else ["run"]

    def invoke(source: Path) -> Result:
        return CliRunner().invoke(cli.main, [*command, str(source), str(tmp_path / "out")])

    result = invoke(path)
    assert result.exit_code != 0
    assert_one_line(result.stderr, f"If {prefix}0 to {prefix}7 are the dimensions", "--embedding-field", "python -c")
    assert "ddf" not in result.stderr
    (program,) = re.findall(r'python -c "(.*)"', result.stderr)
    monkeypatch.chdir(tmp_path)
    exec(program)
    result = invoke(tmp_path / "joined.parquet")
    assert result.exit_code == 0, result.stderr


@EITHER_WAY
def test_zero_embeddings_are_counted_in_one_line(
    tmp_path: Path, invoke: Callable[..., Result], way: list[object]
) -> None:
    frame = table().to_pandas()
    frame["embeddings"] = [row * (30 <= number < 90) for number, row in enumerate(frame["embeddings"])]
    frame.to_parquet(tmp_path / "zeros.parquet")
    result = invoke(tmp_path / "zeros.parquet", *way)
    assert result.exit_code == 0, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if "all-zero" in line)
    assert line.startswith("Warning: Column 'embeddings': ")
    assert "rows have an all-zero embedding in one partition (ids doc-" in line


def test_one_row_is_a_row(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    pq.write_table(table().slice(0, 1), tmp_path / "one.parquet")
    result = invoke(tmp_path / "one.parquet")
    assert result.exit_code == 0, result.stderr
    assert "0 of 1 score ≥ 0.9 " in result.stdout
    assert "1 row kept" in result.stdout


def test_a_line_tells_of_each_step_that_is_done(source: Path, invoke: Callable[..., Result]) -> None:
    """Where no bar does."""
    assert not invoke(source, "--quiet").stderr
    lines = invoke(source, "--eps", 0.002).stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["duplicates", "deduplicated", "report"]
    assert re.fullmatch(r"deduplicated: 180 rows kept, \d\.\d s", lines[1])


# --- From raw to kept ------------------------------------------------------------------------------------------------


@EITHER_WAY
def test_copies_are_dropped_and_the_rest_is_kept_whole(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], way: list[object]
) -> None:
    result = invoke(source, "--text-field", "text", *way)
    assert result.exit_code == 0, result.stderr
    raw, rows = table().to_pandas(), kept(tmp_path)
    assert len(rows) == ROWS - COPIES
    assert list(rows.columns) == list(raw.columns)
    assert rows["text"].nunique() == ROWS - COPIES
    dropped = pd.read_parquet(tmp_path / "out" / "duplicates")
    assert sorted([*rows["id"], *dropped["id"]]) == sorted(raw["id"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == (STEPS_WITH_CLUSTERS if way else STEPS)
    words = result.stdout.split()
    for expected in ["4" if way else "scores", "200", "20", "0.001,", "10.00%", "180"]:
        assert expected in words
    assert "text" in (tmp_path / "out" / "report" / "index.html").read_text()


@EITHER_WAY
def test_scores_are_those_of_the_library(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], way: list[object]
) -> None:
    assert invoke(source, "--which-to-keep", "easy", *way).exit_code == 0
    clusters, cluster_field = tmp_path / "out" / "clusters", "centroid" if way else None
    rows = dask_semdedup.read_clusters(str(clusters)) if way else dask_semdedup.read_table(source)
    expected = rows.semdedup.pairwise(eps=0.1, which_to_keep="easy", cluster_field=cluster_field)
    scores = pd.read_parquet(tmp_path / "out" / "scores")
    pd.testing.assert_frame_equal(
        scores.sort_values("id", ignore_index=True),
        expected.compute().sort_values("id", ignore_index=True),
        check_dtype=False,
        rtol=1e-6,
    )


@EITHER_WAY
def test_rank_by_decides_which_copies_stay(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], way: list[object]
) -> None:
    assert invoke(source, "--rank-by", "quality:desc", *way).exit_code == 0
    assert kept(tmp_path)["quality"].min() == COPIES


@pytest.mark.parametrize("name", ["raw.jsonl", "raw.jsonl.gz"])
@pytest.mark.parametrize("numbers", [False, True])
def test_json_lines_are_read_as_parquet_is(
    tmp_path: Path, invoke: Callable[..., Result], name: str, numbers: bool
) -> None:
    rows = table().to_pandas()
    if numbers:
        rows["id"] = range(ROWS)
    rows.to_json(tmp_path / name, orient="records", lines=True)
    result = invoke(tmp_path / name)
    assert result.exit_code == 0, result.stderr
    assert len(kept(tmp_path)) == ROWS - COPIES
    assert kept(tmp_path)["id"].dtype == (np.int64 if numbers else kept(tmp_path)["text"].dtype)


# --- Complete, and by either rule -------------------------------------------------------------------------------------


def chains(folder: Path) -> pd.DataFrame:
    """Rows in chains of such as are near their neighbours only, in three files; the ids do not follow the rows."""
    rng = np.random.default_rng(3)
    starts, steps = rng.normal(size=(2, 40, 16))
    rows = np.concatenate([starts + 0.25 * number * steps for number in range(6)]).astype(np.float32)
    ids = [f"doc-{number}" for number in rng.permutation(len(rows))]
    whole = pa.table({"id": ids, "embeddings": pa.array(list(rows)), "quality": rng.permutation(len(rows))})
    folder.mkdir()
    for number, start in enumerate(range(0, len(rows), 100)):
        pq.write_table(whole.slice(start, 100), folder / f"{number}.parquet", row_group_size=30)
    return whole.to_pandas()


def brute_force(rows: pd.DataFrame, order: np.ndarray, eps: float, rule: str) -> pd.DataFrame:
    """The duplicates of rows in rank order, one row after the other, in float64."""
    ranked, found, kept = rows.iloc[order], [], []
    unit = np.stack(ranked["embeddings"]).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for number in range(len(unit)):
        others = kept if rule == "kept" else list(range(number))
        similar = unit[others] @ unit[number]
        if similar.max(initial=-1) >= 1 - eps:
            found.append((number, others[similar.argmax()], similar.max()))
        else:
            kept.append(number)
    own, nearest, scores = map(list, zip(*found, strict=True))
    ids = ranked["id"].to_numpy()
    return pd.DataFrame({"id": ids[own], "max_id": ids[nearest], "cosine_sim_score": np.float32(scores)})


def by_distance(rows: pd.DataFrame) -> np.ndarray:
    """The order of 'hard': the farthest from the mean of all unit rows first."""
    unit = np.stack(rows["embeddings"]).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    mean = unit.mean(axis=0)
    return np.argsort(unit @ (mean / np.linalg.norm(mean)), kind="stable")


@pytest.mark.parametrize("rule", ["any", "kept"])
@pytest.mark.parametrize("ranking", [[], ["--rank-by", "quality:desc"]])
def test_a_complete_run_is_brute_force(
    tmp_path: Path, invoke: Callable[..., Result], rule: str, ranking: list[object]
) -> None:
    rows = chains(tmp_path / "raw")
    order = np.argsort(-rows["quality"].to_numpy()) if ranking else by_distance(rows)
    result = invoke(tmp_path / "raw", "--eps", 0.05, "--duplicate-of", rule, *ranking)
    assert result.exit_code == 0, result.stderr
    expected, other = (brute_force(rows, order, 0.05, name) for name in (rule, {"any": "kept", "kept": "any"}[rule]))
    assert len(expected) != len(other)
    scores, page, (duplicates, left) = read_run(tmp_path)
    pd.testing.assert_frame_equal(duplicates, expected, check_dtype=False, rtol=0, atol=2e-6)
    assert left["id"].tolist() == rows["id"][~rows["id"].isin(expected["id"])].tolist()
    all_scores = brute_force(rows, order, 0.1, "any")
    pd.testing.assert_frame_equal(scores, all_scores, check_dtype=False, rtol=0, atol=2e-6)
    assert title_of(page).startswith(f"{len(expected)} {'duplicates' if rule == 'any' else 'dropped'} at eps")


def test_of_clusters_too_each_row_is_dropped_for_one_that_is_kept(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    chains(tmp_path / "raw")
    result = invoke(tmp_path / "raw", "--eps", 0.05, "--n-clusters", 2)
    assert result.exit_code == 0, result.stderr
    _, _, (duplicates, left) = read_run(tmp_path)
    clusters = dask_semdedup.read_clusters(str(tmp_path / "out" / "clusters"))
    expected = clusters.semdedup.pairwise(eps=0.05, duplicate_of="kept").compute()
    pd.testing.assert_frame_equal(
        duplicates.sort_values("id", ignore_index=True),
        expected.sort_values("id", ignore_index=True),
        check_dtype=False,
        rtol=1e-6,
    )
    assert set(duplicates["max_id"]) <= set(left["id"])


def test_the_command_on_the_page_can_be_pasted(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has all options that decide on the scores, and none of what may be secret."""
    options = ["--rank-by", "quality:desc", "--rank-by", "id", "--text-field=text", "--column", "text", "--make-ids"]
    secret = ["--storage-option", "auto_mkdir=true", "--max-eps", 0.3, "-q"]
    assert invoke(source, *options, "--id-field", "made id", *secret).exit_code == 0
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    (line,) = re.findall("To deduplicate at this eps: <code>(.*?)</code>", page)
    words = shlex.split(html.unescape(re.sub("<.*?>", "", line)))
    assert not {"--max-eps", "auto_mkdir=true"} & set(words)
    result = CliRunner().invoke(cli.main, words[words.index("run") :])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("reused") == len(STEPS)


@EITHER_WAY
def test_rows_are_searched_again_only_if_a_row_that_is_near_has_such_a_preferred_row(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, way: list[object]
) -> None:
    """The copies have no copies: what the rule "kept" drops follows from the scores, bit for bit."""
    rules, compare = [], Run._compare

    def noted(run: Run, rows: dd.DataFrame, eps: float | None, duplicate_of: str = "any") -> dd.DataFrame:
        rules.append(duplicate_of)
        return compare(run, rows, eps, duplicate_of)

    monkeypatch.setattr(Run, "_compare", noted)
    assert invoke(source, *way).exit_code == 0
    (found, left), searched = read_run(tmp_path)[2], rules.copy()
    monkeypatch.setattr(Run, "_has_chains", lambda *_: True)
    assert invoke(source, "--from", "duplicates", *way).exit_code == 0
    assert [*searched, *rules[len(searched) :]] == ["any", "kept"]
    for frame, expected in zip((found, left), read_run(tmp_path)[2], strict=True):
        pd.testing.assert_frame_equal(frame, expected, check_exact=True)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out")
    chains(tmp_path / "raw")
    monkeypatch.setattr(Run, "_compare", noted)
    assert invoke(tmp_path / "raw", "--eps", 0.05, *way).exit_code == 0
    assert rules[2:] == ["any", "kept"]


def test_the_report_says_what_is_dropped_and_what_is_near(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    rows = chains(tmp_path / "raw")
    assert invoke(tmp_path / "raw", "--eps", 0.05).exit_code == 0
    _, page, (duplicates, left) = read_run(tmp_path)
    near = len(brute_force(rows, by_distance(rows), 0.05, "any"))
    text = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert f"This run drops {len(duplicates)} of {len(rows)} documents at eps = 0.05" in text
    assert f"Dropped by this run, at eps = 0.05 {len(duplicates)} " in text
    assert f"Kept by this run, at eps = 0.05 {len(left)} " in text
    assert f"Near-duplicates at eps = 0.05 {near} " in text
    assert json_of(page)["duplicates"][json_of(page)["start"]] == near
    assert "Cluster" not in text
    assert not (tmp_path / "out" / "report" / "clusters.png").exists()


def test_every_row_but_the_first_of_each_cluster_may_be_a_duplicate(
    source: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    options = ["--eps", 2, "--max-eps", 2, "--duplicate-of", "any"]
    assert invoke(source, *options, *CLUSTERS).exit_code == 0
    assert len(kept(tmp_path)) == 4
    shutil.rmtree(tmp_path / "out")
    assert invoke(source, *options).exit_code == 0
    assert len(kept(tmp_path)) == 1


# --- Scores up to an eps ----------------------------------------------------------------------------------------------


@EITHER_WAY
@pytest.mark.parametrize("rule", ["any", "kept"])
def test_scores_are_kept_up_to_an_eps(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], way: list[object], rule: str
) -> None:
    """What is kept, dropped and reported is what it is with the scores of all rows."""
    options = ["--eps", 0.05, "--max-eps", 0.2, "--duplicate-of", rule, *way]
    result = invoke(source, *options)
    assert result.exit_code == 0, result.stderr
    some, page, rest = read_run(tmp_path)
    result = invoke(source, *options, "--max-eps", 2, "--from", "scores")
    assert result.exit_code == 0, result.stderr
    scores, page_of_all, rest_of_all = read_run(tmp_path)
    assert len(scores) == ROWS
    pd.testing.assert_frame_equal(some, find_duplicates(scores, 0.2).reset_index(drop=True))
    for found, expected in zip(rest, rest_of_all, strict=True):
        pd.testing.assert_frame_equal(found, expected)
    assert json_of(page)["duplicates"] == json_of(page_of_all)["duplicates"]
    assert json_of(page)["rows"] == json_of(page_of_all)["rows"] == ROWS
    rows_of_clusters = re.compile("<dt>Rows.*?</dl>|<h2>Clusters with the most duplicates.*?</table>", re.DOTALL)
    assert rows_of_clusters.findall(page) == rows_of_clusters.findall(page_of_all)
    assert "Scores were stored up to eps = 0.2" in page
    assert "Scores were stored up to" not in page_of_all


def read_run(tmp_path: Path) -> tuple[pd.DataFrame, str, list[pd.DataFrame]]:
    """The scores, the page, and the tables of duplicates and of rows kept."""
    out = tmp_path / "out"
    tables = [pd.read_parquet(out / name) for name in ("scores", "duplicates", "deduplicated")]
    return tables[0], (out / "report" / "index.html").read_text(), tables[1:]


def title_of(page: str) -> str:
    return re.findall("<title>(.*?)</title>", page)[0]


def json_of(page: str) -> dict[str, Any]:
    return json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])


def test_scores_are_kept_as_far_as_the_report_goes(finished: Path, tmp_path: Path) -> None:
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert json_of(page)["eps"][-1] == 0.1


def test_scores_reach_as_far_as_those_that_are_there_or_as_eps(
    source: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    assert invoke(source, "--eps", 0.2).exit_code == 0
    before = tokens(tmp_path)
    assert invoke(source, "--eps", 0.05).exit_code == 0
    assert redone(before, tokens(tmp_path)) == ["deduplicated", "duplicates", "report"]
    refused = invoke(source, "--eps", 0.3).stderr
    assert_one_line(refused, "--max-eps 0.2 → 0.3", "'--from scores' to compute scores")
    assert invoke(source, "--eps", 0.3, "--from", "scores").exit_code == 0
    assert json_of(read_run(tmp_path)[1])["eps"][-1] == 0.3
    assert invoke(source, "--from", "scores").exit_code == 0
    assert json_of(read_run(tmp_path)[1])["eps"][-1] == 0.3
    assert invoke(source, "--overwrite").exit_code == 0
    assert json_of(read_run(tmp_path)[1])["eps"][-1] == 0.1


@pytest.mark.parametrize("max_eps", [0.07, 0.3])
def test_the_report_ends_where_scores_do(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], max_eps: float
) -> None:
    assert invoke(source, "--max-eps", max_eps).exit_code == 0
    assert json_of((tmp_path / "out" / "report" / "index.html").read_text())["eps"][-1] == max_eps


def test_exact_copies_alone_can_be_asked_for(source: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    result = invoke(source, "--eps", 0, "--max-eps", 0)
    assert result.exit_code == 0, result.stderr
    assert len(kept(tmp_path)) + len(pd.read_parquet(tmp_path / "out" / "scores")) == ROWS


@pytest.mark.parametrize("options", [["--n-clusters", 1], []])
@pytest.mark.parametrize(
    ("rule", "words"), [("any", "of 8 documents are duplicates"), ("kept", "This run drops 0 of 8 documents")]
)
def test_no_duplicates_at_all(
    tmp_path: Path, invoke: Callable[..., Result], options: list[object], rule: str, words: str
) -> None:
    rows = table().slice(0, 8).set_column(2, "embeddings", pa.array(list(np.eye(8, dtype=np.float32))))
    pq.write_table(rows, tmp_path / "raw.parquet")
    result = invoke(tmp_path / "raw.parquet", "--duplicate-of", rule, *options)
    assert result.exit_code == 0, result.stderr
    assert len(kept(tmp_path)) == 8
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert words in page
    assert "No row has a duplicate up to eps = 0.1" in page


def test_eps_is_within_the_scores_that_are_kept(
    finished: Path, source: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    before = tokens(tmp_path)
    assert_one_line(invoke(finished, "--eps", 0.3).stderr, "--max-eps 0.1 → 0.3, for --eps 0.3.", "--from scores")
    assert "for --eps" not in invoke(finished, "--eps", 0.3, "--max-eps", 0.3).stderr
    assert tokens(tmp_path) == before


def test_scores_whose_number_of_rows_is_lost_are_not_reported(
    finished: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    (tmp_path / "out" / "scores" / COMPARED).unlink()
    assert_one_line(invoke(finished, "--eps", 0.01).stderr, COMPARED, "--from scores")


def test_a_summary_for_programs(finished: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    path = tmp_path / "summary.json"
    assert invoke(finished, "--eps", 0.02, "--report-json", path).exit_code == 0
    summary = json.loads(path.read_text())
    assert list(summary["steps"]) == ["scores", "duplicates", "deduplicated", "report"]
    assert summary["steps"]["scores"]["reused"]
    assert summary["steps"]["scores"]["stored"] == len(pd.read_parquet(tmp_path / "out" / "scores"))
    assert summary["steps"]["report"]["near_duplicates"] == COPIES
    assert "--eps" in summary["steps"]["duplicates"]["reason"]
    assert summary["steps"]["deduplicated"]["rows"] == len(kept(tmp_path))
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "deduplicated").glob("part.*"))
    assert summary["steps"]["deduplicated"]["bytes"] == size
    assert summary["versions"]["dask-semdedup"] == dask_semdedup.__version__


@EITHER_WAY
def test_processes_write_the_bytes_that_threads_write(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], way: list[object]
) -> None:
    rows = table()
    sized = pa.FixedSizeListArray.from_arrays(rows["embeddings"].combine_chunks().flatten(), 8)
    pq.write_table(rows.append_column("sized", sized), source, row_group_size=50)
    written = []
    for where in (["--workers", 2], []):
        result = invoke(source, "--quiet", "--overwrite", "--partition-size", "4kB", *where, *way)
        assert result.exit_code == 0, result.stderr
        assert result.output == ""
        files = sorted(set((tmp_path / "out").rglob("*.parquet")) - set((tmp_path / "out").glob(f"*/{TABLE_MANIFEST}")))
        written.append({str(path): path.read_bytes() for path in files})
    assert len(written[0]) > 3
    assert written[0] == written[1]
    assert len(kept(tmp_path)) == ROWS - COPIES


@EITHER_WAY
def test_texts_are_embedded_first(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, way: list[object]
) -> None:
    asked = {}

    def embed(accessor: SemDedupAccessor, text_field: str, *, embedding_field: str, **options: Any) -> dd.DataFrame:
        asked.update(options, text_field=text_field)
        texts = accessor._ddf[text_field]
        return accessor._ddf.assign(**{embedding_field: texts.map_partitions(look_up, meta=vectors.iloc[:0])})

    def look_up(texts: pd.Series) -> pd.Series:
        return vectors.loc[texts].set_axis(texts.index)

    monkeypatch.setattr(SemDedupAccessor, "embed", embed, raising=False)
    raw = pq.read_table(source)
    lists = pd.array(raw["embeddings"], dtype=pd.ArrowDtype(raw["embeddings"].type))
    vectors = pd.Series(lists, raw["text"].to_pylist(), name="embeddings")
    vectors = vectors[~vectors.index.duplicated()]
    pq.write_table(raw.drop_columns("embeddings"), source)
    assert_one_line(invoke(source).stderr, "embeddings", "--embed")
    assert_one_line(invoke(source, "--embed").stderr, "--text-field")
    result = invoke(source, "--embed", "--text-field", "text", "--model", "a/model", *way)
    assert result.exit_code == 0, result.stderr
    assert asked == {"text_field": "text", "model": "a/model", "device": "auto"}
    assert list(kept(tmp_path).columns) == ["id", "text", "quality"]
    assert len(kept(tmp_path)) == ROWS - COPIES
    assert sorted(tokens(tmp_path)) == sorted(["embeddings", *(STEPS_WITH_CLUSTERS if way else STEPS)])


# --- Steps that are reused --------------------------------------------------------------------------------------------


def test_the_same_run_makes_nothing(finished: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    before = tokens(tmp_path)
    result = invoke(finished)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("reused") == len(STEPS)
    assert "Why" not in result.stdout
    assert tokens(tmp_path) == before


@pytest.mark.parametrize(("run", "reused"), [("finished", 1), ("clustered", 2)])
def test_another_eps_uses_clusters_and_scores_again(
    request: pytest.FixtureRequest, tmp_path: Path, invoke: Callable[..., Result], run: str, reused: int
) -> None:
    raw = request.getfixturevalue(run)
    before = tokens(tmp_path)
    result = invoke(raw, "--eps", "0.1", *(CLUSTERS if run == "clustered" else []))
    assert result.exit_code == 0, result.stderr
    assert redone(before, tokens(tmp_path)) == ["deduplicated", "duplicates", "report"]
    assert result.stdout.count("reused") == reused
    assert "Why" in result.stdout
    assert "eps 0.001 → 0.1" in result.stdout
    assert len(kept(tmp_path)) < ROWS - COPIES


@pytest.mark.parametrize(
    ("options", "step", "words"),
    [
        (["--n-clusters", 5], "clusters", ["--n-clusters 4 → 5", "--from clusters"]),
        (["--max-eps", 0.3], "scores", ["--max-eps 0.1 → 0.3", "--from scores"]),
        (["--which-to-keep", "easy"], "scores", ["--which-to-keep hard → easy", "--from scores"]),
        # Clusters hold no other columns than those that rows are ranked by.
        (["--rank-by", "quality"], "clusters", ["--rank-by not given → quality", "--from clusters"]),
    ],
)
def test_costly_steps_are_redone_on_request_only(
    clustered: Path, tmp_path: Path, invoke: Callable[..., Result], options: list[object], step: str, words: list[str]
) -> None:
    before = tokens(tmp_path)
    options = [*CLUSTERS, *options]
    result = invoke(clustered, *options)
    assert result.exit_code == 2
    assert_one_line(result.stderr, f"{step}/", *words)
    assert tokens(tmp_path) == before
    result = invoke(clustered, *options, "--from", step)
    assert result.exit_code == 0, result.stderr
    assert redone(before, tokens(tmp_path)) == (STEPS_WITH_CLUSTERS if step == "clusters" else STEPS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-eps", 0.3], "--max-eps 0.1 → 0.3"),
        (["--which-to-keep", "easy"], "--which-to-keep hard → easy"),
        (["--rank-by", "quality:desc", "--rank-by", "id"], "--rank-by not given → quality:desc, id:asc"),
        (["--embedding-dim", 8], "--embedding-dim not given → 8"),
    ],
)
def test_scores_of_all_rows_are_redone_on_request_only(
    finished: Path, tmp_path: Path, invoke: Callable[..., Result], options: list[object], words: str
) -> None:
    before = tokens(tmp_path)
    result = invoke(finished, *options)
    assert result.exit_code == 2
    assert_one_line(result.stderr, "scores/", words, "--from scores")
    assert tokens(tmp_path) == before
    result = invoke(finished, *options, "--from", "scores")
    assert result.exit_code == 0, result.stderr
    assert redone(before, tokens(tmp_path)) == STEPS


@pytest.mark.parametrize(("run", "others"), [("finished", CLUSTERS), ("clustered", [])])
def test_scores_with_and_without_clusters_are_not_mixed(
    request: pytest.FixtureRequest, tmp_path: Path, invoke: Callable[..., Result], run: str, others: list[object]
) -> None:
    raw = request.getfixturevalue(run)
    before, sources = tokens(tmp_path), ["INPUT", "clusters/"] if others else ["clusters/", "INPUT"]
    result = invoke(raw, *others)
    assert result.exit_code == 2
    changes = "scores/ cannot be reused: it was made from {}, and would now be made from {}. Pass '--from scores'"
    assert_one_line(result.stderr, changes.format(*sources))
    assert tokens(tmp_path) == before
    result = invoke(raw, *others, "--from", "scores")
    assert result.exit_code == 0, result.stderr
    assert redone(before, tokens(tmp_path)) == (STEPS_WITH_CLUSTERS if others else STEPS)
    assert ("centroid" in pd.read_parquet(tmp_path / "out" / "scores").columns) == bool(others)
    assert invoke(raw, *others).stdout.count("reused") == (5 if others else 4)


@pytest.mark.parametrize("run", ["finished", "clustered"])
def test_the_other_rule_changes_duplicates_and_what_follows(
    request: pytest.FixtureRequest, tmp_path: Path, invoke: Callable[..., Result], run: str
) -> None:
    raw, way = request.getfixturevalue(run), CLUSTERS if run == "clustered" else []
    before = tokens(tmp_path)
    for rule, other in (("any", "kept"), ("kept", "any")):
        result = invoke(raw, "--duplicate-of", rule, *way)
        assert result.exit_code == 0, result.stderr
        after = tokens(tmp_path)
        assert redone(before, after) == ["deduplicated", "duplicates", "report"]
        assert f"--duplicate-of {other} → {rule}" in " ".join(result.stdout.split())
        before = after


def test_overwrite_makes_all_anew(finished: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    before = tokens(tmp_path)
    assert invoke(finished, "--overwrite").exit_code == 0
    assert redone(before, tokens(tmp_path)) == STEPS


@pytest.mark.parametrize(("step", "way"), [("scores", []), ("clusters", CLUSTERS)])
def test_changed_input_is_noticed(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], step: str, way: list[object]
) -> None:
    invoke(source, *way)
    pq.write_table(table("other-{}"), source)
    assert_one_line(invoke(source, *way).stderr, "INPUT has other files, or its files have changed", f"--from {step}")
    assert invoke(source, *way, "--from", step).exit_code == 0
    assert kept(tmp_path)["id"].str.startswith("other").all()


def test_another_input_is_told_from_one_that_changed(
    finished: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    pq.write_table(table("other-{}"), tmp_path / "other.parquet")
    changed = f"it was made from INPUT {finished}, and would now be made from {tmp_path}/other.parquet."
    words = f"scores/ cannot be reused: {changed}"
    assert_one_line(invoke(tmp_path / "other.parquet").stderr, words)


def test_a_failed_step_leaves_those_before_it(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(SemDedupAccessor, "remove", fail)
        assert_one_line(invoke(source).stderr, "the disk is full")
    assert sorted(tokens(tmp_path)) == ["duplicates", "scores"]
    result = invoke(source)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("reused") == 2


def test_what_follows_a_step_made_anew_is_made_anew_later(
    clustered: Path, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tokens(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(SemDedupAccessor, "pairwise", fail)
        assert_one_line(invoke(clustered, *CLUSTERS, "--from", "clusters").stderr, "the disk is full")
    assert redone(before, tokens(tmp_path)) == ["clusters"]
    assert invoke(clustered, *CLUSTERS).exit_code == 0
    assert redone(before, tokens(tmp_path)) == STEPS_WITH_CLUSTERS


def test_input_is_known_by_any_name(
    finished: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parent)
    for name in (finished, "./raw.parquet", f"file://{finished}"):
        result = invoke(name)
        assert result.stdout.count("reused") == len(STEPS), result.output


@EITHER_WAY
@pytest.mark.parametrize("step", ["scores", "duplicates"])
def test_steps_that_lost_files_are_not_used_again(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], step: str, way: list[object]
) -> None:
    options = ["--partition-size", "1kB", *way]
    invoke(source, *options)
    before, rows = tokens(tmp_path), len(kept(tmp_path))
    next((tmp_path / "out" / step).glob("part.*")).unlink()
    result = invoke(source, *options)
    if step == "scores":
        assert_one_line(result.stderr, "scores/", "were written", "--from scores")
        assert tokens(tmp_path) == before
        result = invoke(source, *way, "--from", "scores")
    assert result.exit_code == 0, result.stderr
    assert len(kept(tmp_path)) == rows
    assert step in redone(before, tokens(tmp_path))


def test_an_interrupted_move_to_an_object_store_is_made_again(
    source: Path, monkeypatch: pytest.MonkeyPatch, store: ObjectStore
) -> None:
    def run() -> Result:
        return CliRunner().invoke(
            cli.main, ["run", str(source), "store://out", *map(str, OPTIONS + CLUSTERS), "--partition-size", "1kB"]
        )

    def interrupt(fs: ObjectStore, one: str, other: str) -> None:
        if other.startswith("/out/scores/") and len(store.find("/out/scores")) == 2:
            raise KeyboardInterrupt
        copy(fs, one, other)

    copy = ObjectStore.cp_file
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "cp_file", interrupt)
        assert run().exit_code == 130
    # Half of it is there, and says so.
    with pytest.raises(DataReadError, match=r"/out/scores is not all there.*Run the same command again"):
        dask_semdedup.read_table("store://out/scores")
    made = store.info("/out/clusters/_manifest.json")
    result = run()
    assert result.exit_code == 0, result.stderr
    assert re.search(r"Comparing: (\d+) of \1 parts were there already", result.stderr)
    assert store.info("/out/clusters/_manifest.json") == made
    assert not [path for path in store.find("/out") if "partial" in path or "unfinished" in path or "lock" in path]
    assert (
        len(pd.concat([pd.read_parquet(f"store://{path}") for path in store.glob("/out/deduplicated/part.*")]))
        == ROWS - COPIES
    )


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_resumes_within_a_comparison_of_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 64))
    rows[200:] = rows[:100] + 0.01 * rng.standard_normal((100, 64))
    (tmp_path / "in").mkdir()
    for number in range(3):
        some = pd.DataFrame({"id": range(100 * number, 100 * number + 100)})
        some["embeddings"] = list(rows[some["id"]].astype(np.float32))
        some.to_parquet(tmp_path / "in" / f"{number}.parquet", index=False)
    find, found = join.find_near_pairs, []

    def run(folder: str, most: int) -> Result:
        """Run until so many comparisons are made."""
        found.clear()

        def finding(*args: Any, **kwargs: Any) -> Any:
            if len(found) >= most:
                raise error("stopped")
            found.append(args)
            return find(*args, **kwargs)

        monkeypatch.setattr(join, "find_near_pairs", finding)
        arguments = ["run", tmp_path / "in", tmp_path / folder, "--eps", 0.05, "--partition-size", 1]
        with dask.config.set(num_workers=1), indexed(6, BLOCK_BYTES=1, SAVED_SECONDS=0):
            return CliRunner().invoke(cli.main, list(map(str, arguments)))

    assert run("whole", 1000).exit_code == 0
    assert len(found) > 8, "scores, and once more which rows are kept"
    assert run("out", 4).exit_code == (130 if error is KeyboardInterrupt else 2)
    assert not (tmp_path / "out" / "scores").exists()
    n_all = len(found)
    result = run("out", 1000)
    assert result.exit_code == 0
    assert re.search(rf"Comparing: {n_all} of \d+ comparisons were there already", result.stderr)
    for folder in ("scores", "duplicates", "deduplicated"):
        whole, out = (
            {path.name: path.read_bytes() for path in (tmp_path / way / folder).glob("part.*")}
            for way in ("whole", "out")
        )
        assert whole == out
    assert not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("steps", [["scores", "duplicates", "deduplicated"], ["clusters"]])
def test_manifests_are_tables_next_to_tables(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], steps: list[str]
) -> None:
    assert invoke(source, *([] if "scores" in steps else CLUSTERS)).exit_code == 0
    expected = TABLE_MANIFEST if "scores" in steps else MANIFEST
    for step in steps:
        (found,) = (tmp_path / "out" / step).glob("_manifest.*")
        assert found.name == expected
        assert read_note(fsspec.filesystem("file"), str(found))["step"] == step


@pytest.mark.parametrize("damage", [b"", b"{", b"PAR1PAR1", b"{}"])
def test_a_damaged_manifest_is_named(
    finished: Path, tmp_path: Path, invoke: Callable[..., Result], damage: bytes
) -> None:
    (tmp_path / "out" / "scores" / TABLE_MANIFEST).write_bytes(damage)
    said = invoke(finished).stderr
    assert_one_line(said, "out/scores' was not made by 'run', or not by this version", TABLE_MANIFEST, "another OUTPUT")


def test_a_table_without_a_manifest_in_it_is_none(
    finished: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    scores = tmp_path / "out" / "scores"
    shutil.copy(next(scores.glob("part.*")), scores / TABLE_MANIFEST)
    assert_one_line(invoke(finished).stderr, "not by this version", TABLE_MANIFEST)


def test_folders_of_others_are_left_alone(source: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    mine = tmp_path / "out" / "scores" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("the only copy")
    for option in ([], ["--overwrite"]):
        said = invoke(source, *CLUSTERS, *option).stderr
        assert_one_line(said, "out/scores' was not made by 'run': it holds 1 file, as mine.txt. Name another OUTPUT.")
    assert mine.read_text() == "the only copy"
    assert not (tmp_path / "out" / "clusters").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--embedding-field", "vectors"], ["vectors", "as --embedding-field", "pass --embed and --text-field"]),
        (["--id-field", "key"], ["key", "as --id-field; or if it has no ids pass --make-ids."]),
        (["--text-field", "body"], ["body"]),
        (["--embed", "--text-field", "text"], ["embeddings", "already"]),
        (["--n-clusters", 1000], ["n_clusters is 1000", "(--n-clusters)"]),
        (["--random-seed", -1, *CLUSTERS], ["random_state must be", "(--random-seed)"]),
        (["--from", "embeddings", *CLUSTERS], ["embeddings", "clusters", "(--from)"]),
        (["c.parquet", "d.parquet"], ["2 unexpected arguments: c.parquet", "quote the pattern"]),
        (["--from", "clusters"], ["no step 'clusters'", "only scores", "(--from)"]),
        (["--cluster-field", "topic"], ["--cluster-field has no effect without --n-clusters"]),
        (["--backend", "cudf"], ["partitions are pandas", "(--backend)"]),
        (["--rank-by", "cosine_dist_to_cent"], ["cosine_dist_to_cent", "Rank by columns of INPUT"]),
        (["--rank-by", "embeddings"], ["cannot be ranked by 'embeddings'", "(--rank-by)"]),
        (["--rank-by", "embeddings", *CLUSTERS], ["cannot be ranked by 'embeddings'", "(--rank-by)"]),
        (["--duplicate-of", "all"], ["--duplicate-of"]),
        (
            ["--eps", 1, "--max-eps", 2],
            ["--duplicate-of kept", "Pass an eps below 1 or --duplicate-of any. (--eps)"],
        ),
        (["--eps", 1, "--max-eps", 2, *CLUSTERS], ["--duplicate-of kept needs an eps below 1", "--duplicate-of any"]),
        (["--from", "scores", "--overwrite"], ["--from", "--overwrite"]),
        (["--eps", 3], ["--eps"]),
        (["--eps", "0,05"], ["'005' is not a valid number"]),
        (["--max-eps", 3], ["--max-eps"]),
        (["--eps", 0.1, "--max-eps", 0.05], ["--eps 0.1 is larger than --max-eps 0.05"]),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], options: list[object], words: list[str]
) -> None:
    result = invoke(source, *options)
    assert result.exit_code == 2
    assert_one_line(result.stderr.replace(",", ""), *words)
    assert not (tmp_path / "out").exists()


def test_truncated_input_is_named(source: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    source.write_bytes(source.read_bytes()[:-100])
    assert_one_line(invoke(source).stderr, "raw.parquet", "truncated")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("step", "way"), [("pairwise", []), ("kmeans", CLUSTERS)])
def test_a_failed_first_step_leaves_no_folder(
    source: Path,
    tmp_path: Path,
    invoke: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    way: list[object],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(SemDedupAccessor, step, fail)
    assert_one_line(invoke(source, *way).stderr, "the disk is full")
    assert not (tmp_path / "out").exists()


def test_input_inside_the_output_is_refused(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, ["run", str(source), str(tmp_path)])
    assert_one_line(result.stderr, "overlap")


@pytest.mark.parametrize(("step", "way"), [("scores", []), ("scores", ["--max-eps", 2]), ("clusters", CLUSTERS)])
def test_rows_that_were_not_scored_are_noticed(
    source: Path,
    tmp_path: Path,
    invoke: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    way: list[object],
) -> None:
    monkeypatch.setattr(SemDedupAccessor, "remove", lambda accessor, *_: accessor._ddf.partitions[:1])
    result = invoke(source, "--partition-size", "1kB", *way)
    assert_one_line(result.stderr, "of which 20 are duplicates, but 200 were scored", f"--from {step}")
    assert not (tmp_path / "out" / "deduplicated").exists()


def test_output_that_is_a_file_is_refused(source: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "out").write_text("mine")
    assert_one_line(invoke(source).stderr, "is a file")
    assert (tmp_path / "out").read_text() == "mine"


def test_null_ids_are_seen_before_any_work(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table().to_pandas().drop(columns="embeddings").assign(other=range(ROWS))
    rows.loc[5, "id"] = None
    rows.to_parquet(source)
    monkeypatch.setattr(SemDedupAccessor, "embed", lambda *_, **__: pytest.fail("embedded"))
    assert_one_line(invoke(source, "--embed", "--text-field", "text").stderr, "'id': 1 row has a null")


def test_the_output_of_a_run_is_no_input(finished: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    for command, folder in (("run", "deduplicated"), ("pairwise", "clusters")):
        result = CliRunner().invoke(cli.main, [command, str(tmp_path / "out"), str(tmp_path / "other")])
        assert result.exit_code == 2
        assert_one_line(result.stderr, "is the output of 'run'", str(tmp_path / "out" / folder))
    assert not (tmp_path / "other").exists()


def test_only_scores_are_reported(finished: Path, tmp_path: Path) -> None:
    """Shares of what another folder holds would be false."""
    for name in ("duplicates", "deduplicated"):
        result = CliRunner().invoke(cli.main, ["report", str(tmp_path / "out" / name), str(tmp_path / "other")])
        assert result.exit_code == 2
        assert_one_line(result.stderr, f"is the folder '{name}' of a run", f"{tmp_path}/out/scores.")
    result = CliRunner().invoke(cli.main, ["report", str(tmp_path / "out" / "scores"), str(tmp_path / "other")])
    assert f"of {ROWS} rows" in result.output


def test_other_ids_are_looked_at_too(source: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    rows = table().to_pandas().assign(other=range(ROWS))
    rows.loc[5, "id"] = None
    rows.to_parquet(source)
    assert invoke(source, "--id-field", "other", *CLUSTERS).exit_code == 0
    assert_one_line(invoke(source, *CLUSTERS, "--from", "clusters").stderr, "'id': 1 row has a null id")
    assert_one_line(invoke(source, "--from", "scores").stderr, "'id': 1 row has a null id")


def test_output_may_be_a_link(source: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert invoke(source).exit_code == 0
    (tmp_path / "disk" / "scores").rename(tmp_path / "elsewhere")
    (tmp_path / "disk" / "scores").symlink_to(tmp_path / "elsewhere")
    before = tokens(tmp_path)
    assert invoke(source, "--from", "scores").exit_code == 0
    assert (tmp_path / "disk" / "scores").is_symlink()
    assert "scores" in redone(before, tokens(tmp_path))


def test_files_of_others_are_no_loss(finished: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "out" / "report" / "notes.txt").write_text("mine")
    assert invoke(finished).stdout.count("reused") == len(STEPS)
    assert (tmp_path / "out" / "report" / "notes.txt").exists()


def test_what_systems_leave_in_folders_is_no_reason_to_stop(
    finished: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    for name in ("report/.DS_Store", "scores/.ipynb_checkpoints/a-checkpoint.parquet", ".DS_Store"):
        litter = tmp_path / "out" / name
        litter.parent.mkdir(exist_ok=True)
        litter.touch()
    assert invoke(finished, "--overwrite").exit_code == 0


def test_a_log_may_be_where_the_run_works(source: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.log").write_text("begun")
    assert invoke(source).exit_code == 0


@pytest.mark.parametrize("options", [["--eps", 0.1], ["--overwrite"]])
def test_files_of_others_are_not_lost(
    finished: Path, tmp_path: Path, invoke: Callable[..., Result], options: list[object]
) -> None:
    before = tokens(tmp_path)
    for name in (
        "report/notes.txt",
        "deduplicated/joined.parquet",
        "duplicates/.notes",
        "duplicates/mine/part.0.parquet",
    ):
        mine = tmp_path / "out" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("the only copy")
        result = invoke(finished, *options)
        assert result.exit_code == 2
        assert_one_line(result.stderr, mine.name, "would be lost")
        assert "_manifest" not in result.stderr
        assert mine.read_text() == "the only copy"
        assert tokens(tmp_path) == before
        mine.unlink()
    assert invoke(finished, *options).exit_code == 0


@pytest.mark.parametrize("name", ["notes.txt", "centroid=0/mine.parquet", "scores.parquet"])
def test_files_of_others_among_clusters_are_not_lost(
    clustered: Path, tmp_path: Path, invoke: Callable[..., Result], name: str
) -> None:
    (tmp_path / "out" / "clusters" / name).write_text("the only copy")
    assert_one_line(invoke(clustered, *CLUSTERS, "--overwrite").stderr, "not of this step", name)
    assert (tmp_path / "out" / "clusters" / name).exists()


def test_no_file_of_a_step_is_in_its_way(finished: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "out" / "report" / "index.html").unlink()
    assert invoke(finished).exit_code == 0
    assert (tmp_path / "out" / "report" / "index.html").exists()
    (tmp_path / "out" / "report" / "index.html").write_text("my own page")
    result = invoke(finished, "--overwrite")
    assert_one_line(result.stderr, "not a report", "index.html")
    assert "png" not in result.stderr


@pytest.mark.parametrize("scores", ["out", "out/scores"])
def test_a_report_of_its_own_makes_way(
    finished: Path, tmp_path: Path, invoke: Callable[..., Result], scores: str
) -> None:
    """`report` takes the place of a run's page, and the next run that of `report`'s."""
    page, arguments = tmp_path / "out" / "report" / "index.html", ["report", str(tmp_path / scores)]
    arguments += ["--data", str(finished), "--text-field", "text"]
    assert_one_line(CliRunner().invoke(cli.main, arguments).stderr, "Pass --overwrite to replace it")
    result = CliRunner().invoke(cli.main, [*arguments, "--overwrite"])
    assert result.exit_code == 0, result.stderr
    assert not (page.parent / MANIFEST).exists()
    assert "text 1" in page.read_text()
    result = invoke(finished)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("reused") == len(STEPS) - 1
    assert "text 1" not in page.read_text()
    assert sorted(tokens(tmp_path)) == STEPS


def test_output_of_others_is_refused(source: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    dd.from_pandas(pd.DataFrame({"id": [1]}), npartitions=1).to_parquet(tmp_path / "out")
    for option in ([], ["--overwrite"]):
        result = invoke(source, *option)
        assert result.exit_code == 2
        assert_one_line(result.stderr, "not made by 'run'", "1 file, as part.0.parquet", "another folder")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part.0.parquet"]


@pytest.mark.parametrize(
    "name", [".gitignore", "mine/.git/config", "clusters.partial/0123/part.0.parquet", "scores.partial/"]
)
def test_output_of_killed_runs_or_of_hidden_files_is_taken(
    source: Path, tmp_path: Path, invoke: Callable[..., Result], name: str
) -> None:
    path = tmp_path / "out" / name
    (path if name.endswith("/") else path.parent).mkdir(parents=True)
    if not name.endswith("/"):
        path.touch()
    if "partial" in name:
        (tmp_path / "out" / "notes.txt").touch()
    assert invoke(source).exit_code == 0


def test_null_ids_are_refused(source: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    rows = table().to_pandas()
    rows.loc[[5, 185], "id"] = None
    rows.to_parquet(source)
    assert_one_line(invoke(source).stderr, "'id': 2 rows have a null id")
    assert not (tmp_path / "out").exists()


def test_repeated_ids_are_counted(source: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    rows = table().to_pandas()
    # Of the copies 5 and 185 the second is dropped, but which of two rows is it?
    rows.loc[100, "id"] = rows.loc[185, "id"]
    rows.to_parquet(source)
    result = invoke(source, "--rank-by", "quality")
    assert result.exit_code == 2
    assert_one_line(result.stderr, "doc-185")
    assert not (tmp_path / "out" / "deduplicated").exists()


def test_a_dry_run_says_what_would_be_done_and_makes_nothing(
    source: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    output = tmp_path / "out"
    said = invoke(source, "--dry-run").output
    assert re.search(r"scores +new", said)
    assert "Rows are compared for scores up to eps = 0.1 (--max-eps):\nrows " in said
    assert re.search(r"rows +200", said)
    assert not output.exists()
    assert "rows again at eps = 0.02 (--eps)" in invoke(source, "--dry-run", "--eps", 0.02).output
    clustered = invoke(source, "--dry-run", "--n-clusters", "3", "--duplicate-of", "any").output
    assert clustered.endswith(
        "\nRows are compared within 3 clusters of k-means, for scores up to eps = 0.1 (--max-eps).\n"
    )
    assert invoke(source, "--quiet").exit_code == 0
    again = invoke(source, "--dry-run", "--from", "duplicates").output
    assert re.search(r"scores +reused\nduplicates +asked for", again)
    assert "Rows are compared" not in again
    assert "The step duplicates may take as long as scores, or longer" in again
    assert "may take" not in invoke(source, "--dry-run").output
