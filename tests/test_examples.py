"""The demonstration and the notebooks run from top to bottom."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The demonstration as a program, which returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(argument: object) -> str:
        monkeypatch.setattr(sys, "argv", ["digits.py", str(argument)])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / "examples" / "digits.py"), run_name="__main__")
        return capfd.readouterr().out

    return run


def test_demo_drops_digits_and_draws_them(demo, tmp_path: Path) -> None:
    assert "of 1,797 scores" in demo(tmp_path)
    kept, dropped = (pd.read_parquet(tmp_path / "out" / step) for step in ("deduplicated", "duplicates"))
    assert len(kept) + len(dropped) == 1797
    assert set(dropped["max_id"]) <= set(kept["id"])
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_demo_has_help_and_makes_no_folder_for_it(demo, tmp_path: Path) -> None:
    assert "[FOLDER]" in demo("--help")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_is_kept_with_its_outputs(path: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert any(output.get("data", {}).get("image/png") for cell in code for output in cell.outputs)
    # A third of the texts, where the notebook looks for them first: a model takes long for all.
    (tmp_path / "examples" / "data").mkdir(parents=True)
    texts = pd.read_parquet(ROOT / "examples" / "data" / "debian.parquet")
    texts[::3].to_parquet(tmp_path / "examples" / "data" / "debian.parquet")
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
