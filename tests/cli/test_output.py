"""Standard output that nobody reads, or that is full, once all is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data import write_random_layout

ROOT = Path(__file__).parents[2]


def command(kind: str, tmp_path: Path) -> list[str]:
    """A command that reads what another one has written, or clusters."""
    clusters, scores = tmp_path / "clusters", tmp_path / "scores"
    write_random_layout(clusters, {0: [20], 1: [20]})
    if kind == "report":
        invoke("pairwise", clusters, scores, "-q")
    arguments: dict[str, list[Any]] = {
        "run": ["run", clusters, tmp_path / "out"],
        "dry run": ["run", clusters, tmp_path / "out", "--dry-run"],
        "pairwise": ["pairwise", clusters, tmp_path / "out"],
        "report": ["report", scores, tmp_path / "out"],
    }
    return list(map(str, arguments[kind]))


def invoke(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "dask_semdedup", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, text=True, stderr=subprocess.PIPE, check=False, **options)


KINDS = ["run", "dry run", "pairwise", "report"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_pipe_is_no_error(tmp_path: Path, kind: str) -> None:
    words = command(kind, tmp_path)
    reads, writes = os.pipe()
    os.close(reads)
    done = invoke(*words, stdout=writes)
    os.close(writes)
    assert done.returncode == 0, done.stderr
    assert "pipe" not in done.stderr
    assert (tmp_path / "out").exists() == (kind != "dry run")


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_output_is_named_and_what_is_written(tmp_path: Path, kind: str) -> None:
    words = command(kind, tmp_path)
    with open("/dev/full", "w") as full:
        done = invoke(*words, stdout=full)
    assert done.returncode == 2
    *_, error = done.stderr.splitlines()
    assert error.startswith("Error: Cannot write to standard output: [Errno 28] No space left on device. ")
    assert error.endswith("nothing is written." if kind == "dry run" else f"{tmp_path}/out.")
