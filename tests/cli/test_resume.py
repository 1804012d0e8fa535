"""Commands that go on where a run was stopped, and what they refuse to replace."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result

from dask_semdedup import cli
from dask_semdedup.cli import pairwise
from dask_semdedup.cli.files import work_of
from dask_semdedup.io import notes, write
from dask_semdedup.io.scores import COMPARED
from dask_semdedup.io.targets import MANIFESTS
from dask_semdedup.lazy import embed as lazy_embed
from dask_semdedup.lazy import writing
from dask_semdedup.steps import embed
from tests.data import assert_one_line, write_random_layout

pytestmark = pytest.mark.usefixtures("drawn_once")

CLUSTERS = 6
SMALL = ["--partition-size", "1kB"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_random_layout(tmp_path / "in", {cluster: [30] for cluster in range(CLUSTERS)})
    return tmp_path / "in"


class Writer:
    """Writes the parts of commands, one after the other, and can be told to stop."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.stop_after, self.error = 10**9, KeyboardInterrupt()

    def stop(self, after: int, error: BaseException | None = None) -> None:
        """Stop when so many more parts are written."""
        self.stop_after, self.error = len(self.numbers) + after, error or KeyboardInterrupt()

    def go_on(self) -> None:
        self.numbers, self.stop_after = [], 10**9

    def __call__(self, rows: Any, number: int, *arguments: Any) -> pd.DataFrame:
        if len(self.numbers) >= self.stop_after:
            raise self.error
        self.numbers.append(number)
        return write.write_part(rows, number, *arguments)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    writer = Writer()
    monkeypatch.setattr(writing, "write_part", lambda *arguments: writer(*arguments))
    with dask.config.set(num_workers=1):
        yield writer


def stopped(source: Path, writer: Writer, *options: object) -> None:
    """A run that was stopped after four of six parts."""
    writer.stop(4)
    assert invoke("pairwise", source, source.parent / "out", *SMALL, *options).exit_code == 130
    assert not (source.parent / "out").exists()
    writer.go_on()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in MANIFESTS}


def tree(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Model:
    """Stands in for a model of texts: says how many it has embedded, and can be told to stop."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.stop_after = 10**9

    def encode(self, texts: list[str], **_: Any) -> np.ndarray:
        if len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(len(texts))
        return np.stack([np.random.default_rng(list(text.encode())).normal(size=8) for text in texts])


# --- The same command goes on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.parquet"])
def test_texts_are_embedded_once_though_the_run_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    texts = pd.DataFrame({"id": range(50), "text": [f"text {number}" for number in range(50)]})
    if name.endswith(".jsonl"):
        texts.to_json(tmp_path / name, orient="records", lines=True)
    else:
        texts.to_parquet(tmp_path / name)
    monkeypatch.setattr(lazy_embed, "TEXTS_OF_PART", 8)
    command = "run", tmp_path / name, tmp_path / "out", "--embed", "--text-field", "text"
    monkeypatch.setattr(embed, "_load", lambda *_: model)
    with dask.config.set(num_workers=1):
        model = Model()
        model.stop_after = 3
        assert invoke(*command).exit_code == 130
        before = model.calls
        model = Model()
        assert "Embedding: 3 of 7 parts were there already." in done(invoke(*command)).stderr
    assert (len(before), sorted(before + model.calls)) == (3, [2] + [8] * 6)
    stored = pd.read_parquet(tmp_path / "out" / "embeddings")
    assert stored["id"].tolist() == list(range(50))
    np.testing.assert_array_equal(np.stack(stored["embeddings"]), Model().encode(list(texts["text"])).astype("float32"))


@pytest.mark.parametrize("options", [[], ["--eps", 0.5]])
def test_only_what_is_missing_is_made(source: Path, writer: Writer, options: list[object]) -> None:
    done(invoke("pairwise", source, source.parent / "whole", *SMALL, *options))
    stopped(source, writer, *options)
    result = done(invoke("pairwise", f"file://{source}", source.parent / "out", *SMALL, *options))
    assert "Comparing: 4 of 6 parts were there already." in result.stderr
    assert len(writer.numbers) == 2
    assert contents(source.parent / "out") == contents(source.parent / "whole")
    assert tree(source.parent) == ["in", "out", "whole"]
    rows = result.stdout.split()
    assert rows[rows.index("Rows") + 1] == "180"


def test_workers_go_on_with_what_threads_have_made(
    source: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(invoke("pairwise", source, source.parent / "whole", *SMALL))
    stopped(source, writer)
    monkeypatch.undo()  # What was put there is of this process.
    result = done(invoke("pairwise", source, source.parent / "out", *SMALL, "--workers", 1))
    assert "4 of 6 parts were there already" in result.stderr
    assert contents(source.parent / "out") == contents(source.parent / "whole")


def test_a_quiet_command_says_nothing_of_it(source: Path, writer: Writer) -> None:
    stopped(source, writer)
    assert done(invoke("pairwise", source, source.parent / "out", *SMALL, "--quiet")).output == ""


def test_a_run_goes_on_after_the_disk_was_full(source: Path, writer: Writer) -> None:
    writer.stop(3, OSError(errno.ENOSPC, "No space left on device"))
    result = invoke("pairwise", source, source.parent / "out", *SMALL)
    assert_one_line(result.stderr, "No space left on device")
    writer.go_on()
    assert "3 of 6 parts" in done(invoke("pairwise", source, source.parent / "out", *SMALL)).stderr


def test_a_full_disk_is_named_by_path(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(notes, "_without_rows", full)
        result = invoke("pairwise", source, source.parent / "out", "--eps", 0.1)
    assert_one_line(result.stderr, f"Cannot write {source.parent}/out.partial/", COMPARED, "No space left")
    done(invoke("pairwise", source, source.parent / "out", "--eps", 0.1))


# --- Other work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--eps", 0.5], "--eps None → 0.5"),
        (["--which-to-keep", "easy", "--random-seed", 7], "--which-to-keep hard → easy, --random-seed 42 → 7"),
        (["--rank-by", "id:desc"], "--rank-by None → RankingStrategy("),
        (["--partition-size", "64MiB"], "--partition-size 1kB → 64MiB"),
    ],
)
def test_other_options_are_named_or_begin_anew(source: Path, writer: Writer, options: list[object], words: str) -> None:
    stopped(source, writer)
    out = source.parent / "out"
    result = invoke("pairwise", source, out, *SMALL, *options)
    assert result.exit_code == 2
    assert_one_line(result.stderr, "a stopped run has finished", words, "pass --overwrite to begin anew")
    assert not writer.numbers
    assert "already" not in done(invoke("pairwise", source, out, *SMALL, *options, "--overwrite")).stderr
    assert len(writer.numbers) == (1 if "64MiB" in options else CLUSTERS)


def test_other_input_is_noticed(source: Path, writer: Writer) -> None:
    stopped(source, writer)
    file = next(source.rglob("*.parquet"))
    os.utime(file, (1, 1))
    result = invoke("pairwise", source, source.parent / "out", *SMALL)
    assert_one_line(result.stderr, "INPUT has other files, or its files have changed")


def test_other_partitions_are_named_or_begin_anew(
    source: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, so that workers that are still at the old ones do not meddle."""
    stopped(source, writer)
    out, old = source.parent / "out", set((source.parent / "out.partial").iterdir())
    monkeypatch.setattr(pairwise, "work_of", lambda frame: work_of(frame) | {"partitions": "of twice as many cores"})
    result = invoke("pairwise", source, out, *SMALL)
    assert result.exit_code == 2
    assert_one_line(result.stderr, "but partitions are planned otherwise", "pass --overwrite")
    assert set((source.parent / "out.partial").iterdir()) == old
    writer.stop(2)
    assert invoke("pairwise", source, out, *SMALL, "--overwrite").exit_code == 130
    (folder,) = (path for path in (source.parent / "out.partial").iterdir() if path.is_dir())
    assert folder not in old
    writer.go_on()
    assert "2 of 6 parts" in done(invoke("pairwise", source, out, *SMALL, "--overwrite")).stderr


# --- What is in the way -----------------------------------------------------------------------------------------------


def test_a_note_in_a_folder_that_came_meanwhile_stays(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, summarise = source.parent / "out", pairwise.summarise

    def note(*arguments: Any, **options: Any) -> Any:
        out.mkdir()
        (out / "notes.txt").write_text("the only copy")
        return summarise(*arguments, **options)

    monkeypatch.setattr(pairwise, "summarise", note)
    result = invoke("pairwise", source, out)
    assert result.exit_code == 2
    assert_one_line(result.stderr, "All is written, but cannot take the place of", "out.partial")
    assert tree(out) == ["notes.txt"]
    # When it is out of the way, the finished result takes its place.
    monkeypatch.undo()
    shutil.rmtree(out)
    assert "1 of 1 parts" in done(invoke("pairwise", source, out)).stderr


def test_of_two_runs_the_second_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, summarise, refused = source.parent / "out", pairwise.summarise, []

    def second(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(pairwise, "summarise", summarise)
        refused.append(invoke("pairwise", source, out, "--overwrite"))
        return summarise(*arguments, **options)

    monkeypatch.setattr(pairwise, "summarise", second)
    done(invoke("pairwise", source, out))
    assert_one_line(refused[0].stderr, f"being written by process {os.getpid()} on")
    assert tree(source.parent) == ["in", "out"]


# --- The steps of a run -----------------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    embeddings = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    embeddings[-20:] = embeddings[:20] + 1e-4
    table = pa.table({"id": np.arange(200), "embeddings": pa.array(list(embeddings))})
    pq.write_table(table, tmp_path / "raw.parquet", row_group_size=20)
    return tmp_path / "raw.parquet"


@pytest.mark.parametrize("way", [[], ["--n-clusters", 4]], ids=["complete", "clusters"])
def test_each_step_goes_on(raw: Path, writer: Writer, way: list[object]) -> None:
    """Stopped again and again, after three more parts each time."""
    options = ["--eps", 0.001, *SMALL, *way]
    done(invoke("run", raw, raw.parent / "whole", *options))
    out, said = raw.parent / "out", []
    for _ in range(30):
        writer.stop(3)
        result = invoke("run", raw, out, *options)
        said += [line for line in result.stderr.splitlines() if "already" in line]
        if result.exit_code == 0:
            break
        assert result.exit_code == 130, result.stderr
    else:
        pytest.fail("it never ends")
    assert "Removing: 7 of 10 parts were there already." in said
    assert ("Comparing: 3 of 4 parts were there already." in said) == bool(way)
    assert tree(out) == tree(raw.parent / "whole")
    for step in ("scores", "duplicates", "deduplicated"):
        made, expected = (
            pd.concat(map(pd.read_parquet, (raw.parent / name / step).glob("part.*"))) for name in ("out", "whole")
        )
        assert sorted(made["id"]) == sorted(expected["id"])


def test_a_costly_step_with_other_options_is_refused_and_others_begin_anew(raw: Path, writer: Writer) -> None:
    out, options = raw.parent / "out", ["--eps", 0.001, *SMALL, "--n-clusters", 4]
    writer.stop(2)
    assert invoke("run", raw, out, *options).exit_code == 130
    writer.go_on()
    result = invoke("run", raw, out, *options, "--max-eps", 0.3)
    assert_one_line(result.stderr, "scores", "--max-eps 0.1 → 0.3", "pass --overwrite")
    done(invoke("run", raw, out, *options, "--max-eps", 0.3, "--overwrite"))
    writer.stop(2)
    assert invoke("run", raw, out, *options, "--max-eps", 0.3, "--eps", 0.2, "--duplicate-of", "any").exit_code == 130
    writer.go_on()
    result = done(invoke("run", raw, out, *options, "--max-eps", 0.3, "--eps", 0.01, "--duplicate-of", "any"))
    assert "already" not in result.stderr
    assert "partial" not in " ".join(tree(out))


def test_a_note_in_a_step_that_came_meanwhile_stays(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write_part = raw.parent / "out", write.write_part

    def note(*arguments: Any) -> pd.DataFrame:
        (out / "scores").mkdir(exist_ok=True)
        (out / "scores" / "notes.txt").write_text("the only copy")
        return write_part(*arguments)

    monkeypatch.setattr(writing, "write_part", note)
    result = invoke("run", raw, out)
    assert_one_line(result.stderr, "All is written, but cannot take the place of", "scores.partial")
    assert tree(out / "scores") == ["notes.txt"]


def test_of_two_runs_of_all_steps_the_second_is_refused(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write_part, refused = raw.parent / "out", write.write_part, []

    def second(*arguments: Any) -> pd.DataFrame:
        monkeypatch.setattr(writing, "write_part", write_part)
        refused.append(invoke("run", raw, out, "--overwrite"))
        return write_part(*arguments)

    monkeypatch.setattr(writing, "write_part", second)
    done(invoke("run", raw, out))
    assert_one_line(refused[0].stderr, f"{str(out)!r} is being written by process {os.getpid()} on", "_lock.json")
    assert tree(out) == ["deduplicated", "duplicates", "report", "scores"]
