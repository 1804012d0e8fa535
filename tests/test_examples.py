"""The demonstration and the notebook run from top to bottom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_demo_scores_the_digits_and_draws_them(tmp_path: Path) -> None:
    demo = [sys.executable, ROOT / "examples" / "digits.py", tmp_path]
    finished = subprocess.run(demo, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "1,797" in finished.stdout
    assert len(pd.read_parquet(tmp_path / "scores")) == 1797
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_demo_has_help_and_makes_no_folder_for_it(tmp_path: Path) -> None:
    demo = [sys.executable, ROOT / "examples" / "digits.py", "--help"]
    finished = subprocess.run(demo, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "[FOLDER]" in finished.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_is_kept_with_its_outputs(path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert any(output.get("data", {}).get("image/png") for cell in code for output in cell.outputs)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
