"""Commands that are killed at random moments and run again lose, double and change nothing, and repeat little."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from dask_semdedup.io.targets import MANIFESTS
from tests.data import write_random_layout

if TYPE_CHECKING:
    from dask_semdedup.io.fragments import Fragment

# Of each test here, and how often a command is killed in one at most: 'make test-kills' asks for more.
ROUNDS = int(os.environ.get("KILL_ROUNDS", "1"))
KILLS = 5
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
THREADS = 2
CLUSTERS = 40


def command(arguments: list[str], log: str) -> None:
    """The command in a process of its own, as its script does it. It notes the files of each part that it begins."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    import dask
    import torch

    from dask_semdedup import cli
    from dask_semdedup.io.reader import Reader

    read = Reader.read

    def noted(reader: Reader, fragments: Sequence[Fragment], columns: Sequence[str]) -> Any:
        with open(f"{log}.begun", "a") as file:
            file.write("".join(f"{fragment.path}\n" for fragment in fragments))
        return read(reader, fragments, columns)

    Reader.read = noted
    torch.set_num_threads(1)
    dask.config.set(num_workers=THREADS)
    cli.main(arguments)


def stuck_command(arguments: list[str], log: str) -> None:
    """The same, whose tasks take a minute once ten parts are begun."""
    from dask_semdedup.io.reader import Reader

    read = Reader.read

    def stuck(*arguments: Any) -> Any:
        if len(Path(f"{log}.begun").read_text().splitlines()) > 10:
            time.sleep(60)
        return read(*arguments)

    Reader.read = stuck
    command(arguments, log)


class Runs:
    """Runs of one command in processes of their own."""

    def __init__(self, processes: Any, folder: Path, *arguments: object) -> None:
        self.processes, self.log, self.arguments = processes, folder / "log", list(map(str, arguments))
        self.seconds = 0.0

    def run(self, kill_after: float = 60, number: signal.Signals = signal.SIGKILL) -> int:
        """Run it, killed after some seconds if it takes longer, and return its exit status."""
        start = time.monotonic()
        process = self.processes.Process(target=command, args=(self.arguments, str(self.log)))
        process.start()
        process.join(kill_after)
        if process.is_alive():
            os.kill(process.pid, number)
            process.join(60)
        assert process.exitcode is not None, f"it hangs\n{self.said()}"
        self.seconds = time.monotonic() - start
        return process.exitcode

    def finish(self) -> None:
        assert self.run() == 0, self.said()

    def kill(self, rng: random.Random, first: float, last: float) -> Iterator[None]:
        """Kill it at random seconds, until it finishes before that or was killed `KILLS` times."""
        for _ in range(KILLS):
            if self.run(rng.uniform(first, last), rng.choice(SIGNALS)) == 0:
                return
            yield

    def said(self) -> str:
        return self.log.read_text()


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files but those that say when they were made."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in MANIFESTS)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def finished_parts(folder: Path) -> dict[Path, tuple[int, int]]:
    """What tells a part from one that was written again, for those that a run has finished."""
    stats = {path: path.stat() for path in folder.glob("out.partial/*/part.*.parquet")}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_scores(loaded_processes: Any, tmp_path: Path, seed: int) -> None:
    frame = write_random_layout(tmp_path / "in", {cluster: [60] for cluster in range(CLUSTERS)})
    options = ["--partition-size", "1kB", "--quiet"]
    whole = Runs(loaded_processes, tmp_path, "pairwise", tmp_path / "in", tmp_path / "whole", *options)
    whole.finish()
    expected = contents(tmp_path / "whole")
    assert len(expected) == CLUSTERS
    killed = Runs(loaded_processes, tmp_path, "pairwise", tmp_path / "in", tmp_path / "out", *options)
    (tmp_path / "log.begun").unlink()
    found: dict[Path, tuple[int, int]] = {}
    kills = 0
    for _ in killed.kill(random.Random(seed), whole.seconds / 4, whole.seconds):
        # Whatever has the final name is whole, and no part is made twice.
        assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == expected, killed.said()
        now = finished_parts(tmp_path)
        assert found.items() <= now.items() or (tmp_path / "out").exists(), killed.said()
        found = now
        kills += 1
    if not (tmp_path / "out").exists():
        killed.finish()
    begun = [path for path in (tmp_path / "log.begun").read_text().split() if "/in/" in path]
    assert len(set(begun)) == CLUSTERS
    assert len(begun) <= CLUSTERS + kills * THREADS, "a kill repeats more than one part of each thread"
    assert contents(tmp_path / "out") == expected
    scores = pd.concat(pd.read_parquet(path) for path in (tmp_path / "out").iterdir())
    assert sorted(scores["id"]) == sorted(frame["id"])


def test_a_second_interrupt_ends_it_at_once(loaded_processes: Any, tmp_path: Path) -> None:
    write_random_layout(tmp_path / "in", {cluster: [60] for cluster in range(CLUSTERS)})
    arguments = ["pairwise", tmp_path / "in", tmp_path / "out", "--partition-size", "1kB"]
    runs = Runs(loaded_processes, tmp_path, *arguments)
    process = loaded_processes.Process(target=stuck_command, args=(runs.arguments, str(runs.log)))
    process.start()
    begun = Path(f"{runs.log}.begun")
    while not begun.exists() or len(begun.read_text().splitlines()) < 10 + THREADS:
        assert process.is_alive(), runs.said()
        time.sleep(0.05)
    # Two at once are one, as of a program that passes on what the terminal has sent already.
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
    process.join(2)
    assert process.is_alive(), runs.said()
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 130, runs.said()
    assert "Stopping: waiting for running tasks. Press Ctrl-C again" in runs.said()
    assert "Stopped at once." in runs.said()
    runs.finish()
    assert f"of {CLUSTERS} parts were there already" in runs.said()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "log", "log.begun", "out"]


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_old_scores(loaded_processes: Any, tmp_path: Path, seed: int) -> None:
    """Until the new scores have their name, the old ones are whole: there, or aside and put back by the next run."""
    write_random_layout(tmp_path / "in", {cluster: [30] for cluster in range(10)})
    arguments = ["pairwise", tmp_path / "in", tmp_path / "out", "--partition-size", "1kB", "--quiet", "--overwrite"]
    runs = Runs(loaded_processes, tmp_path, *arguments, "--eps", 0.5)
    runs.finish()
    old, seconds = contents(tmp_path / "out"), runs.seconds
    runs = Runs(loaded_processes, tmp_path, *arguments)
    runs.finish()
    new = contents(tmp_path / "out")
    Runs(loaded_processes, tmp_path, *arguments, "--eps", 0.5).finish()
    for _ in runs.kill(random.Random(seed), seconds / 2, 1.2 * seconds):
        there = [path for path in (tmp_path / "out", tmp_path / "out.partial" / "old") if path.exists()]
        assert contents(there[0]) in (old, new), runs.said()
    runs.finish()
    assert contents(tmp_path / "out") == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "log", "log.begun", "out"]


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_all_steps(loaded_processes: Any, tmp_path: Path, seed: int) -> None:
    embeddings = np.random.default_rng(seed).normal(size=(600, 8)).astype(np.float32)
    embeddings[300:] = embeddings[:300] + 1e-4
    (tmp_path / "in").mkdir()
    for part in range(6):
        rows = slice(100 * part, 100 * (part + 1))
        frame = pd.DataFrame({"id": np.arange(600)[rows], "embeddings": list(embeddings[rows])})
        frame.to_parquet(tmp_path / "in" / f"{part}.parquet")
    options = ["--n-clusters", 5, "--eps", 0.001, "--partition-size", "1kB", "--quiet"]
    whole = Runs(loaded_processes, tmp_path, "run", tmp_path / "in", tmp_path / "whole", *options)
    whole.finish()
    killed = Runs(loaded_processes, tmp_path, "run", tmp_path / "in", tmp_path / "out", *options)
    for _ in killed.kill(random.Random(seed), whole.seconds / 4, whole.seconds):
        pass
    killed.finish()
    expected, found = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name in expected:
        # A shuffle does not keep the order of rows, and the page names the folder that it is about.
        if name.startswith("clusters/"):
            one, other = (pd.read_parquet(tmp_path / made / name).sort_values("id") for made in ("whole", "out"))
            assert one["id"].tolist() == other["id"].tolist()
        elif name != "report/index.html":
            assert found[name] == expected[name], name
    assert len(pd.concat(map(pd.read_parquet, (tmp_path / "out" / "deduplicated").glob("*.parquet")))) == 300
