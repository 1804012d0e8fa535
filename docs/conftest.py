"""The pages' examples are tests: each block of Python runs, in the order of its page, in a folder of its own.

So do the commands of the page that has all the files that they name.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser

from dask_semdedup.cli import main

# Settings, pictures and what was built hold no examples.
collect_ignore = ["_build", "_ext", "conf.py", "images"]
# The extra `readers` brings the libraries of this page.
if not all(map(find_spec, ("datasets", "duckdb", "polars"))):
    collect_ignore.append("how-to/other-tools.md")


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder, for a page's relative paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("page"))
        yield folder


def run_commands(example: Example) -> None:
    """Run the commands of a block, each of which must succeed."""
    if Path(example.path).name != "getting-started.md":
        return
    for line in example.parsed.splitlines():
        if line.startswith("$ dask-semdedup "):
            result = CliRunner().invoke(main, shlex.split(line)[2:])
            assert result.exit_code == 0, f"{line}\n{result.output}"


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE),
        CodeBlockParser("console", run_commands),
    ],
    pattern="*.md",
    fixtures=["working_folder"],
).pytest()
