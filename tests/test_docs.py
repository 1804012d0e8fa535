"""The README: its links lead somewhere, its snippets and commands run, and its lines fit."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from dask_semdedup.cli import main

ROOT = Path(__file__).parent.parent

BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target


def test_readme_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 8))
    vectors[:20] = vectors[100:120]
    documents = pd.DataFrame({"id": range(200), "text": "a text", "quality": rng.random(200)})
    documents = documents.assign(embeddings=list(vectors))
    documents.to_parquet("documents.parquet")
    documents.head(30).assign(id=range(1000, 1030)).to_parquet("new.parquet")

    names: dict[str, Any] = {}
    for language, block in BLOCK.findall((ROOT / "README.md").read_text()):
        if language == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            result = CliRunner().invoke(main, shlex.split(line)[2:])
            assert result.exit_code == 0, f"{line}\n{result.output}"

    assert len(pd.read_parquet("kept")) == len(pd.read_parquet("out/deduplicated")) == 180
    assert Path("out/report/index.html").exists()
    assert len(names["fresh"]) == 0


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/getting-started.md"])
def test_code_on_first_pages_is_not_cut_off(name: str) -> None:
    """A block of the documentation shows 88 columns in a window of 1,400 pixels."""
    blocks = re.findall(r"^```.*?^```$", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 88


def test_readme_is_short_and_has_no_picture_that_breaks_elsewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 150
    assert "![" not in readme
