"""The command, through its real entry point and in this process."""

from __future__ import annotations

import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import dask
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from distributed import LocalCluster
from rich.progress import Progress

import dask_semdedup
from dask_semdedup import cli
from dask_semdedup.cli import application, execution, files, options, pairwise
from dask_semdedup.errors import InvalidArgumentError, OutputError
from dask_semdedup.io import publish, write
from dask_semdedup.io.scores import read_compared
from dask_semdedup.lazy import writing
from tests.data import ObjectStore, assert_one_line, write_layout

CLUSTERS, ROWS, DUPLICATES = 3, 20, 4


def cluster_table(cluster: int) -> pa.Table:
    """Random rows of which the last four repeat the first four, and a quality that prefers the repeats."""
    rng = np.random.default_rng(cluster)
    embeddings = rng.normal(size=(ROWS, 8)).astype(np.float32)
    embeddings[-DUPLICATES:] = embeddings[:DUPLICATES]
    return pa.table(
        {
            "id": np.arange(ROWS) + 100 * cluster,
            "embeddings": pa.array(list(embeddings)),
            "cosine_dist_to_cent": rng.random(ROWS),
            "l2_dist_to_cent": rng.random(ROWS),
            "quality": np.arange(ROWS),
        }
    )


@pytest.fixture
def clusters(tmp_path: Path) -> str:
    return write_layout(str(tmp_path / "clusters"), {k: [cluster_table(k)] for k in range(CLUSTERS)})


@pytest.fixture
def poisoned(tmp_path: Path) -> str:
    """Clusters of which the last has a row that is not a number."""
    tables = {k: [cluster_table(k)] for k in range(CLUSTERS)}
    rows = [np.full(8, np.nan, np.float32) if i == 7 else np.ones(8, np.float32) for i in range(ROWS)]
    tables[2] = [tables[2][0].set_column(1, "embeddings", pa.array(rows))]
    return write_layout(str(tmp_path / "poisoned"), tables)


@pytest.fixture
def invoke() -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(cli.main, ["pairwise", *map(str, arguments)])

    return run


def read(folder: str | Path) -> pd.DataFrame:
    return pd.read_parquet(folder).sort_values("id", ignore_index=True)


# --- The entry point -------------------------------------------------------------------------------------------------


def test_command_writes_the_scores_and_sums_them_up(clusters: str, tmp_path: Path) -> None:
    script = [Path(sys.executable).with_name("dask-semdedup"), "pairwise", clusters, tmp_path / "scores"]
    # Python prints what it loads to the standard error.
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", *script], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    loaded = [line for line in finished.stderr.splitlines() if line.startswith("import time:")]
    assert len(loaded) == len(finished.stderr.splitlines())
    assert not any(line.endswith("| distributed") for line in loaded), "threads do not need it, and it takes a second"
    words = finished.stdout.split()
    assert words[words.index("Clusters") + 1] == "3"
    assert words[words.index("Rows") + 1] == "60"
    assert words[words.index("Duplicates") + 1 : words.index("Time")] == ["12", "20.00%", "at", "eps", "=", "0.01"]
    scores = read(tmp_path / "scores")
    assert set(scores.columns) == {"id", "max_id", "cosine_sim_score", "centroid"}
    assert len(scores) == CLUSTERS * ROWS
    twins = scores[scores["cosine_sim_score"] > 0.999]
    assert set(twins["id"] - twins["max_id"]) <= {ROWS - DUPLICATES, DUPLICATES - ROWS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters", "scores"]


@pytest.mark.parametrize("eps", [0, 0.001, 0.3, 1.5])
def test_only_duplicates_are_written_at_an_eps(
    clusters: str, tmp_path: Path, invoke: Callable[..., Result], eps: float
) -> None:
    result = invoke(clusters, tmp_path / "found", "--eps", eps)
    assert result.exit_code == 0, result.stderr
    expected = dask_semdedup.read_clusters(clusters).semdedup.pairwise(eps=eps).compute()
    pd.testing.assert_frame_equal(
        read(tmp_path / "found"), expected.sort_values("id", ignore_index=True), check_dtype=False
    )
    words = result.stdout.split()
    assert words[words.index("Clusters") + 1] == "3"
    assert words[words.index("Rows") + 1] == "60"
    assert words[words.index("Duplicates") + 1 : words.index("Time")] == [
        str(len(expected)), f"{len(expected) / 60:.2%}", "at", "eps", "=", f"{eps:g}",
    ]  # fmt: skip


def test_rows_in_no_folders_are_counted_too(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    """Clusters in a column, which span files: the frame is shuffled."""
    (tmp_path / "in").mkdir()
    for part in range(2):
        rows = [cluster_table(k).append_column("centroid", pa.array([k] * ROWS)) for k in range(CLUSTERS)]
        pq.write_table(pa.concat_tables(rows).slice(30 * part, 30), tmp_path / "in" / f"{part}.parquet")
    result = invoke(tmp_path / "in", tmp_path / "found", "--eps", "0.001")
    assert result.exit_code == 0, result.stderr
    assert len(read(tmp_path / "found")) == 12
    words = result.stdout.split()
    assert words[words.index("Rows") + 1] == "60"


def test_input_is_listed_once(
    clusters: str, tmp_path: Path, invoke: Callable[..., Result], calls: list[tuple[str, str]]
) -> None:
    """Where there are many files, that takes long."""
    fs = fsspec.filesystem("memory")
    fs.put(clusters, "/in", recursive=True)
    calls.clear()
    assert invoke("memory://in", tmp_path / "scores").exit_code == 0
    assert [name for name, _ in calls].count("find") == 1
    fs.rm("/in", recursive=True)
    assert len(read(tmp_path / "scores")) == CLUSTERS * ROWS


def test_duplicates_are_replaced_by_scores(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    assert invoke(clusters, tmp_path / "found", "--eps", "0.001").exit_code == 0
    assert invoke(clusters, tmp_path / "found", "--overwrite").exit_code == 0
    assert read_compared(str(tmp_path / "found")) is None
    assert len(read(tmp_path / "found")) == CLUSTERS * ROWS


def test_command_fails_in_one_line(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    result = invoke(clusters, tmp_path / "scores", "--embedding-field", "vectors")
    assert result.exit_code == 2
    assert_one_line(result.stderr, "vectors", "embeddings")
    assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters"]


def test_module_runs_as_the_command_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dask_semdedup", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("dask_semdedup", run_name="__main__")
    assert capsys.readouterr().out == f"dask-semdedup {dask_semdedup.__version__}\n"


def test_help_names_every_parameter_of_the_library() -> None:
    text = CliRunner().invoke(cli.main, ["pairwise", "--help"]).output
    for option in [
        "--id-field", "--embedding-field", "--cluster-field", "--which-to-keep", "--sim-metric", "--rank-by",
        "--random-seed", "--pairwise-batch-size", "--embedding-dim", "--compute-dtype", "--device", "--backend",
        "--partition-size", "--eps", "--storage-option", "--scheduler", "--workers", "--overwrite", "--traceback",
    ]:  # fmt: skip
        assert option in text


@pytest.mark.parametrize(
    ("command", "words"),
    [("pairwise", "Seed of '--which-to-keep random'."), ("run", "Seed of k-means, and of '--which-to-keep random'.")],
)
def test_help_says_what_the_seed_is_of(command: str, words: str) -> None:
    text = CliRunner().invoke(cli.main, [command, "--help"]).output
    assert words in " ".join(text.split())


# --- Options reach the library ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--which-to-keep", "easy"], {"which_to_keep": "easy"}),
        (["--sim-metric", "l2"], {"sim_metric": "l2"}),
        (["--which-to-keep", "random", "--random-seed", "7"], {"which_to_keep": "random", "random_seed": 7}),
        (["--compute-dtype", "float32", "--pairwise-batch-size", "3"], {"compute_dtype": "float32"}),
        (["--embedding-dim", "8", "--device", "cpu", "--backend", "pandas", "--partition-size", "1kB"], {}),
        (
            ["--rank-by", "quality:desc"],
            {"ranking_strategy": dask_semdedup.RankingStrategy.metadata_based(["quality"], ascending=False)},
        ),
    ],
)
def test_scores_are_the_librarys(
    clusters: str, tmp_path: Path, invoke: Callable[..., Result], options: list[str], arguments: dict
) -> None:
    assert invoke(clusters, tmp_path / "scores", *options).exit_code == 0
    expected = dask_semdedup.read_clusters(clusters).semdedup.pairwise(**arguments).compute()
    pd.testing.assert_frame_equal(
        read(tmp_path / "scores"), expected.sort_values("id", ignore_index=True), check_dtype=False, rtol=1e-6
    )


def test_rank_by_descending_keeps_the_last_rows(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    invoke(clusters, tmp_path / "scores", "--rank-by", "quality:desc")
    scores = read(tmp_path / "scores")
    dropped = scores[scores["cosine_sim_score"] > 0.999]
    assert sorted(dropped["id"] % 100) == sorted([*range(DUPLICATES)] * CLUSTERS)


def test_clusters_of_others_need_an_option_that_is_named(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    table = cluster_table(0).drop_columns(["cosine_dist_to_cent", "l2_dist_to_cent"])
    folder = write_layout(str(tmp_path / "clusters"), {0: [table]})
    said = invoke(folder, tmp_path / "scores").stderr
    assert_one_line(said, "with --rank-by COLUMN, or with --which-to-keep random.")
    assert "ranking_strategy" not in said
    for option, value in (("--rank-by", "quality"), ("--which-to-keep", "random")):
        assert invoke(folder, tmp_path / value, option, value).exit_code == 0
    words = " ".join(invoke("--help").stdout.split())
    assert "which need its column from k-means: cosine_dist_to_cent or l2_dist_to_cent." in words
    assert "Log each search within clusters." in words


def test_columns_may_have_other_names(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    table = cluster_table(0).rename_columns(["doc", "vector", "cosine_dist_to_cent", "l2_dist_to_cent", "quality"])
    folder = tmp_path / "clusters"
    (folder / "topic=0").mkdir(parents=True)
    pq.write_table(table, folder / "topic=0" / "part.parquet")
    names = ["--id-field", "doc", "--embedding-field", "vector", "--cluster-field", "topic"]
    result = invoke(folder, tmp_path / "scores", *names)
    assert result.exit_code == 0, result.stderr
    assert len(read(tmp_path / "scores")) == ROWS


def test_reads_and_writes_urls(invoke: Callable[..., Result], store: ObjectStore) -> None:
    write_layout("store://cli-test/clusters", {0: [cluster_table(0)]})
    result = invoke(
        "store://cli-test/clusters", "store://cli-test/scores", "--storage-option", "use_listings_cache=true"
    )
    assert result.exit_code == 0, result.stderr
    assert [path.rsplit("/", 1)[-1] for path in store.ls("/cli-test", detail=False)] == ["clusters", "scores"]
    assert sum(len(pd.read_parquet(f"store://{path}")) for path in store.find("/cli-test/scores")) == ROWS


def test_options_of_a_remote_input_do_not_disturb_a_local_output(
    tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout("memory://cli-mixed/clusters", {0: [cluster_table(0)]})
    monkeypatch.chdir(tmp_path)
    result = invoke("memory://cli-mixed/clusters", "scores", "--storage-option", "anon=true")
    assert result.exit_code == 0, result.stderr
    assert len(read("scores")) == ROWS
    fsspec.filesystem("memory").rm("/cli-mixed", recursive=True)


def test_quiet_prints_nothing(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    result = invoke(clusters, tmp_path / "scores", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


# --- Where it runs ---------------------------------------------------------------------------------------------------


def test_processes_give_the_same_scores_as_threads(
    clusters: str, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    invoke(clusters, tmp_path / "threads", "--partition-size", "1kB")
    result = invoke(clusters, tmp_path / "processes", "--partition-size", "1kB", "--workers", "2")
    assert result.exit_code == 0, result.stderr
    pd.testing.assert_frame_equal(read(tmp_path / "processes"), read(tmp_path / "threads"))


def test_failure_on_a_cluster_is_one_line_and_leaves_nothing(
    poisoned: str, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    with LocalCluster(n_workers=1, processes=False, protocol="tcp://", dashboard_address=":0") as cluster:
        result = invoke(poisoned, tmp_path / "scores", "--scheduler", cluster.scheduler_address)
    assert result.exit_code == 2
    assert_one_line(result.stderr, "embeddings", "207")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poisoned"]


def test_progress_ends_at_the_number_of_tasks(clusters: str, tmp_path: Path) -> None:
    scores = dask_semdedup.read_clusters(clusters, partition_size="1kB").semdedup.pairwise()
    progress = Progress(disable=True)
    files.write_frame(scores, str(tmp_path / "scores"), {}, client=None, progress=progress, title="Comparing")
    (task,) = progress.tasks
    assert task.finished
    assert task.total is not None
    assert task.total == scores.npartitions, "a task for each partition"


# --- Output that is there already ------------------------------------------------------------------------------------


def test_occupied_output_is_refused(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    invoke(clusters, tmp_path / "scores")
    before = read(tmp_path / "scores")
    result = invoke(clusters, tmp_path / "scores", "--rank-by", "quality:desc")
    assert result.exit_code == 2
    assert_one_line(result.stderr, "not empty", "--overwrite")
    pd.testing.assert_frame_equal(read(tmp_path / "scores"), before)


def test_overwrite_replaces_all_of_it(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    invoke(clusters, tmp_path / "scores", "--partition-size", "1kB")
    (tmp_path / "scores" / "part.000099.parquet").write_bytes(b"left from an earlier run")
    assert invoke(clusters, tmp_path / "scores", "--overwrite").exit_code == 0
    assert len(read(tmp_path / "scores")) == CLUSTERS * ROWS


def test_empty_folder_is_taken(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "scores").mkdir()
    assert invoke(clusters, tmp_path / "scores").exit_code == 0
    assert len(read(tmp_path / "scores")) == CLUSTERS * ROWS


def test_overwrite_spares_what_is_not_scores(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("the only copy")
    result = invoke(clusters, tmp_path / "home", "--overwrite")
    assert result.exit_code == 2
    assert_one_line(result.stderr, "thesis.tex")
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["embeddings.parquet", "part.0.parquet", "centroid=3/part.0.parquet"])
def test_overwrite_spares_parquet_of_other_kinds(
    clusters: str, tmp_path: Path, invoke: Callable[..., Result], name: str
) -> None:
    path = tmp_path / "precious" / name
    path.parent.mkdir(parents=True)
    pd.DataFrame({"id": [1], "embeddings": [[1.0, 0.0]]}).to_parquet(path)
    result = invoke(clusters, tmp_path / "precious", "--overwrite")
    assert result.exit_code == 2
    assert_one_line(result.stderr, name, "not scores", "would be lost")
    assert len(pd.read_parquet(path)) == 1


def test_overwrite_spares_what_is_damaged(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "part.0.parquet").touch()
    assert_one_line(invoke(clusters, tmp_path / "scores", "--overwrite").stderr, "not scores", "part.0.parquet")


def test_overwrite_replaces_the_files_of_stages(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "scores").mkdir()
    scores = pd.DataFrame({"id": [1], "max_id": [1], "cosine_sim_score": [0.0]})
    scores.to_parquet(tmp_path / "scores" / "cluster_0.parquet")
    assert invoke(clusters, tmp_path / "scores", "--overwrite").exit_code == 0
    assert len(read(tmp_path / "scores")) == CLUSTERS * ROWS


@pytest.mark.parametrize("output", ["clusters", "clusters/scores", "."])
def test_output_apart_from_input(clusters: str, tmp_path: Path, invoke: Callable[..., Result], output: str) -> None:
    result = invoke(clusters, tmp_path / output, "--overwrite")
    assert result.exit_code == 2
    assert_one_line(result.stderr, "overlap")
    assert len(dask_semdedup.read_clusters(clusters)) == CLUSTERS * ROWS


@pytest.mark.parametrize("alias", ["link", "x/../clusters"])
def test_output_apart_from_input_by_any_name(
    clusters: str, tmp_path: Path, invoke: Callable[..., Result], alias: str
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(clusters)
    for source, output in ((clusters, tmp_path / alias), (f"{tmp_path}/{alias}", clusters)):
        result = invoke(source, output, "--overwrite")
        assert result.exit_code == 2
        assert_one_line(result.stderr, "overlap")
    assert len(dask_semdedup.read_clusters(clusters)) == CLUSTERS * ROWS


def test_output_may_look_like_a_pattern(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    assert invoke(clusters, tmp_path / "scores[1]").exit_code == 0
    assert len(read(tmp_path / "scores[1]")) == CLUSTERS * ROWS


def test_output_that_is_a_file_is_refused(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    (tmp_path / "scores").write_text("mine")
    assert_one_line(invoke(clusters, tmp_path / "scores", "--overwrite").stderr, "is a file")
    assert (tmp_path / "scores").read_text() == "mine"


# --- Failures --------------------------------------------------------------------------------------------------------


def test_failed_run_leaves_the_old_scores(
    clusters: str, poisoned: str, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    invoke(clusters, tmp_path / "scores")
    before = read(tmp_path / "scores")
    result = invoke(poisoned, tmp_path / "scores", "--overwrite", "--partition-size", "1kB")
    assert result.exit_code == 2
    assert_one_line(result.stderr, "embeddings", "207")
    pd.testing.assert_frame_equal(read(tmp_path / "scores"), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters", "poisoned", "scores"]


@pytest.mark.parametrize("on_cluster", [False, True])
def test_failed_run_waits_for_its_writers(
    poisoned: str, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, on_cluster: bool
) -> None:
    write, late = writing.write_part, tmp_path / "late"

    def write_slowly(*arguments: Any) -> pd.DataFrame:
        time.sleep(1)
        late.touch()
        return write(*arguments)

    monkeypatch.setattr(writing, "write_part", write_slowly)
    options = ["--partition-size", "1kB"]
    with dask.config.set(num_workers=CLUSTERS), ExitStack() as stack:
        if on_cluster:
            cluster = LocalCluster(
                n_workers=1, processes=False, threads_per_worker=3, protocol="tcp://", dashboard_address=":0"
            )
            options += ["--scheduler", stack.enter_context(cluster).scheduler_address]
        result = invoke(poisoned, tmp_path / "scores", *options)
        assert_one_line(result.stderr, "embeddings", "207")
        assert late.exists(), "a writer was still at it when the command ended"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "poisoned"]


def test_late_writers_do_not_make_the_folder_anew(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"Cannot write .*/gone/part\.000000\.parquet: .*No such file"):
        write.write_part(pd.DataFrame({"id": [1]}), 0, str(tmp_path / "gone"), {})
    assert not list(tmp_path.iterdir())


def test_finished_scores_survive_a_failed_rename(
    clusters: str, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(publish, "_swap", fail)
    result = invoke(clusters, tmp_path / "scores")
    (staged,) = (path for path in (tmp_path / "scores.partial").iterdir() if path.is_dir())
    assert_one_line(result.stderr, "the disk went away", str(staged))
    assert len(read(staged)) == CLUSTERS * ROWS


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["interrupted", "terminated"])
def test_a_run_that_is_stopped_leaves_what_is_finished(
    clusters: str,
    tmp_path: Path,
    invoke: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    stop: signal.Signals,
) -> None:
    def stopped(folder: str, *_: object, **__: object) -> None:
        assert (tmp_path / "scores.partial").is_dir()
        try:
            signal.raise_signal(stop)
        finally:  # Here running tasks are waited for, which no other may interrupt.
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    # A shell's background jobs ignore interrupts.
    originals = {
        number: signal.signal(number, handler)
        for number, handler in [(signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)]
    }
    before = signal.getsignal(stop)
    monkeypatch.setattr(pairwise, "summarise", stopped)
    try:
        result = invoke(clusters, tmp_path / "scores")
        assert result.exit_code == 130
        assert [line for line in result.stderr.splitlines() if line] == [
            "Stopping: waiting for running tasks. Press Ctrl-C again to stop at once.",
            "Stopped. Run the same command again: it reuses the parts that are finished, if there are any.",
        ]
        assert signal.getsignal(stop) is before
    finally:
        for number, handler in originals.items():
            signal.signal(number, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters", "scores.partial"]
    monkeypatch.undo()
    result = invoke(clusters, tmp_path / "scores")
    assert result.exit_code == 0, result.stderr
    assert "1 of 1 parts were there already" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters", "scores"]


def test_warnings_are_a_line_and_shown_once(
    clusters: str, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: object, **__: object) -> None:
        for text in ("few rows", "few rows", "other rows"):
            warnings.warn(text, stacklevel=1)
        raise InvalidArgumentError("enough")

    monkeypatch.setattr(pairwise, "summarise", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = invoke(clusters, tmp_path / "scores")
    lines = result.stderr.splitlines()
    assert lines[-3:] == ["Warning: few rows", "Warning: other rows", "Error: enough"]


def test_interrupts_that_are_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with application._stopped_by_signals():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_python_drops_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one ends the process at once."""
    ended = []
    monkeypatch.setattr(application, "ONE_INTERRUPT", 0.1)
    monkeypatch.setattr(application.os, "_exit", ended.append)
    with application._stopped_by_signals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert not ended
        time.sleep(0.2)
        signal.raise_signal(signal.SIGTERM)
    assert ended == [130]


def test_what_is_no_scheduler_is_named(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    result = invoke(clusters, tmp_path / "scores", "--scheduler", "somewhere")
    assert_one_line(result.stderr, "'somewhere' is not the address of a scheduler", "tcp://")


@pytest.mark.parametrize("option", [["--workers", "1"], ["--scheduler", "tcp://10.0.0.1:8786"]])
@pytest.mark.parametrize(
    ("command", "remote"),
    [("pairwise", "input"), ("run", "input"), ("report", "input")],
)
def test_memory_is_not_shared_between_processes(
    clusters: str, tmp_path: Path, command: str, remote: str, option: list[str]
) -> None:
    scores = pd.DataFrame({"id": [1, 2], "max_id": [1, 1], "cosine_sim_score": np.float32([0, 1]), "centroid": 0})
    source = {"pairwise": clusters, "run": f"{clusters}/centroid=0/part.0.parquet", "report": str(tmp_path / "scores")}
    scores.to_parquet(tmp_path / "scores")
    paths = {"input": source[command], "output": str(tmp_path / "out")}
    fsspec.filesystem("memory").put(paths[remote], "/cli-shared/input", recursive=True)
    paths[remote] = f"memory://cli-shared/{remote}"
    result = CliRunner().invoke(cli.main, [command, *paths.values(), *option])
    assert_one_line(result.stderr, f"{paths[remote]} is in the memory of this process", f"leave {option[0]} out")
    assert not (tmp_path / "out").exists()
    fsspec.filesystem("memory").rm("/cli-shared", recursive=True)


@pytest.mark.parametrize("command", ["pairwise", "run", "report"])
def test_output_in_memory_would_not_outlast_the_command(clusters: str, command: str) -> None:
    result = CliRunner().invoke(cli.main, [command, clusters, "memory://cli-lost/output"])
    assert_one_line(result.stderr, "memory://cli-lost/output is in the memory of this process", "on a disk")
    assert not fsspec.filesystem("memory").exists("/cli-lost")


def test_traceback_is_shown_on_request(poisoned: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    result = invoke(poisoned, tmp_path / "scores", "--traceback")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_unexpected_error_says_its_type(
    clusters: str, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("over\nnothing")

    monkeypatch.setattr(pairwise, "summarise", fail)
    result = invoke(clusters, tmp_path / "scores")
    assert_one_line(result.stderr, "ZeroDivisionError: over nothing", "--traceback")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--eps", "3"], ["--eps", "3"]),
        (["--which-to-keep", "best"], ["best", "hard", "easy", "random"]),
        (["--storage-option", "anon"], ["'anon'", "KEY=VALUE"]),
        (["--rank-by", "quality", "--which-to-keep", "hard"], ["--rank-by", "--which-to-keep"]),
        (["--scheduler", "tcp://x:1", "--workers", "2"], ["--scheduler", "--workers"]),
        (["--rank-by", "stars"], ["stars", "quality"]),
        (["--rank-by", "quality:down"], ["'quality:down'", "COLUMN:desc"]),
        (["--rank-by", ":desc"], ["':desc'", "COLUMN:desc"]),
        (["--embedding-dim", "9"], ["9", "8", "embeddings"]),
        (["--no-such-option"], ["--no-such-option", "--help"]),
    ],
)
def test_bad_options_are_one_line(
    clusters: str, tmp_path: Path, invoke: Callable[..., Result], options: list[str], words: list[str]
) -> None:
    result = invoke(clusters, tmp_path / "scores", *options)
    assert result.exit_code == 2
    assert_one_line(result.stderr, *words)
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--partition-size", "foo"], ["partition_size must be bytes", "(--partition-size)"]),
        (
            ["--id-field", "doc"],
            ["['doc'] not found in the frame, which has ['id'", "as --id-field."],
        ),
        (["--cluster-field", "cl"], ["No cluster column 'cl'", "use 'dask-semdedup run'", "pass --cluster-field."]),
        (["--rank-by", "qualty"], ["['qualty']", "(--rank-by)"]),
        (["--embedding-dim", "9"], ["where 9 is expected", "(--embedding-dim)"]),
        (["--device", "cuda"], ["Use --device cpu or 'auto'"]),
    ],
)
def test_errors_name_options(
    clusters: str,
    tmp_path: Path,
    invoke: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_one_line(invoke(clusters, tmp_path / "scores", *options).stderr, *words)


def test_an_occupied_output_names_the_option(clusters: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    invoke(clusters, tmp_path / "scores")
    result = invoke(clusters, tmp_path / "scores")
    assert_one_line(result.stderr, "1 file. Pass --overwrite to replace it, or name another OUTPUT,")


@pytest.mark.parametrize(
    ("parameters", "options"),
    [
        ([], ""),
        (["path", "n_clusters"], ""),
        (["id_field", "path"], " (--id-field)"),
        (["ranking_strategy", "random_state"], " (--rank-by, --random-seed)"),
    ],
)
def test_errors_name_options_that_the_command_has(
    clusters: str,
    tmp_path: Path,
    invoke: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    parameters: list[str],
    options: str,
) -> None:
    message = "Column 'id_field' of eps='a'.parquet: random_state."
    error = InvalidArgumentError(message, parameters=parameters)
    monkeypatch.setattr(pairwise, "summarise", Mock(side_effect=error))
    assert invoke(clusters, tmp_path / "scores").stderr == f"Error: {message}{options}\n"


def test_missing_input_is_named(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    result = invoke(tmp_path / "nowhere", tmp_path / "scores")
    assert result.exit_code == 2
    assert_one_line(result.stderr, "nowhere")


def test_missing_input_starts_no_cluster(
    tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "connect", lambda *_: pytest.fail("connected"))
    result = invoke(tmp_path / "nowhere", tmp_path / "scores", "--workers", "1")
    assert_one_line(result.stderr, "nowhere")


def test_storage_options_know_true_from_false() -> None:
    parsed = options._parse_storage_options(None, None, ("anon=False", "ssl=true", "key=a=b", "token="))
    assert parsed == {"anon": False, "ssl": True, "key": "a=b", "token": ""}


def test_nothing_to_do_shows_the_help() -> None:
    result = CliRunner().invoke(cli.main, [])
    assert result.exit_code == 2
    assert "pairwise" in result.output
