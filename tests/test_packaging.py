"""What installing and importing the package promises."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from configparser import ConfigParser
from importlib.metadata import EntryPoint, distribution, entry_points, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import dask_semdedup
from _dask_semdedup import main

ROOT = Path(__file__).parent.parent
GPU_MODULES = ["cudf", "cuml", "cupy", "dask_cuda", "dask_cudf", "numba", "pylibcudf", "rmm", "triton"]


def run_python(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    return finished.stdout.strip()


def test_imports_where_there_is_no_gpu_software() -> None:
    # None in sys.modules makes an import fail as if the module were not installed.
    code = f"""
        import sys
        sys.modules.update(dict.fromkeys({GPU_MODULES!r}))
        import dask_semdedup, dask_semdedup.cli, dask_semdedup.plots, dask_semdedup.search, dask_semdedup.stages
        print("imported")
    """
    assert run_python(code) == "imported"


def test_the_package_lists_its_public_names_alone() -> None:
    assert dir(dask_semdedup) == sorted(dask_semdedup.__all__)


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """The modules that are there after one import after the other, in one process."""
    code = """
        import json, sys, threading
        import psutil
        loaded = {}
        import dask_semdedup
        loaded["package"] = list(sys.modules)
        assert threading.active_count() == 1, threading.enumerate()
        assert not psutil.Process().children(recursive=True)
        import dask_semdedup.cli
        loaded["command"] = list(sys.modules)
        import dask_semdedup.plots
        loaded["plots"] = list(sys.modules)
        print(json.dumps(loaded))
    """
    return json.loads(run_python(code))


@pytest.mark.parametrize(
    ("imported", "slow"),
    [
        ("package", [*GPU_MODULES, "click", "distributed", "matplotlib", "rich", "torch"]),
        ("command", ["distributed", "matplotlib", "PIL", "pyarrow.json", "sentence_transformers", "sklearn", "torch"]),
        ("plots", ["matplotlib.pyplot"]),
    ],
)
def test_importing_leaves_alone_what_is_slow_to_load(
    loaded: dict[str, list[str]], imported: str, slow: list[str]
) -> None:
    assert not set(slow).intersection(loaded[imported])


def test_version_is_the_distributions() -> None:
    assert dask_semdedup.__version__ == distribution("dask-semdedup").version


def test_command_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="dask-semdedup")
    assert callable(script.load())
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = config["options.entry_points"]["console_scripts"].split("=")[-1].strip()
    assert EntryPoint(script.name, named, script.group).load() is main


def test_package_is_marked_as_typed() -> None:
    assert Path(dask_semdedup.__file__).with_name("py.typed").exists()


@pytest.mark.parametrize("extra", ["cu12", "cu13"])
def test_gpu_extras_have_lower_bounds(extra: str) -> None:
    """Without them pip may fall back to an old stub that does not build."""
    gpu = [r for r in map(Requirement, requires("dask-semdedup") or []) if f'extra == "{extra}"' in str(r.marker)]
    assert {f"cudf-{extra}", f"dask-cudf-{extra}", "dask-cuda", "torch"} <= {requirement.name for requirement in gpu}
    assert all(any(bound.operator in (">=", "==") for bound in requirement.specifier) for requirement in gpu)


def test_constraints_pin_what_ci_installs() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {name.lower().replace("_", "-"): Version(version) for name, version in (line.split("==") for line in lines)}
    assert str(pins["torch"]) == "2.13.0"
    for requirement in map(Requirement, requires("dask-semdedup") or []):
        extras = [{"extra": extra} for extra in ("", "test", "docs", "notebooks", "readers")]
        if requirement.marker is None or any(requirement.marker.evaluate(extra) for extra in extras):
            assert pins[requirement.name] in requirement.specifier
