"""The rooms of the package stand on one another: an import stays in its room or goes down, never up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dask_semdedup

PACKAGE = Path(dask_semdedup.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# From top to bottom. Rooms of one floor do not know each other.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["plots"],  # Public names of report.
    ["report"],
    ["__init__"],
    ["curator"],
    ["accessor", "stages"],
    ["lazy"],
    ["io", "steps"],
    ["frames"],
    ["device"],
    ["search"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Used by all rooms but search, which knows tensors and errors only. They know each other and no room.
SHARED = {"errors", "_validate", "_dask"}

# Libraries that are not there on a machine without a GPU, and those of extras.
GPU_LIBRARIES = {"cudf", "cuml", "cupy", "dask_cuda", "dask_cudf", "numba", "pylibcudf", "rmm", "triton"}
EXTRAS = {"nemo_curator", "sentence_transformers"}
MAY_IMPORT = {"search/triton_*.py": {"triton"}, "curator.py": {"nemo_curator"}}


class Import(NamedTuple):
    """A module that another one imports, and whether it does so when it is imported itself."""

    path: Path
    line: int
    name: str
    is_first: bool

    def __str__(self) -> str:
        return f"dask_semdedup/{self.path.relative_to(PACKAGE)}:{self.line} imports {self.name}"


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(), str(path))
    later = {
        node
        for parent in ast.walk(tree)
        if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_for_types(parent)
        for node in ast.walk(parent)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports by a relative name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(path, node.lineno, name, node not in later) for name in names)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def room_of_name(name: str) -> str:
    """The room that a name of the package stands in; names of the package itself are in ``__init__``."""
    first = name.removeprefix("dask_semdedup").lstrip(".").split(".")[0]
    return first if first in FLOOR or first in SHARED else "__init__"


def may_know(here: str, there: str) -> bool:
    if here in SHARED:
        return there in SHARED
    if there in SHARED:
        return here != "search" or there == "errors"
    return here == there or FLOOR[here] < FLOOR[there]


def test_every_module_has_a_room() -> None:
    rooms = {room_of(path) for path in MODULES}
    assert rooms - SHARED <= set(FLOOR), "say in FLOORS where these stand"


def test_imports_go_down() -> None:
    wrong = []
    for path in MODULES:
        here = room_of(path)
        for found in imports_of(path):
            if not f"{found.name}.".startswith("dask_semdedup."):
                continue
            there = room_of_name(found.name)
            if not may_know(here, there):
                wrong.append(f"{found}: {here} may not know {there}")
    assert not wrong, "\n".join(["", *wrong])


def test_nothing_of_a_gpu_or_an_extra_is_imported_with_the_package() -> None:
    wrong = []
    for path in MODULES:
        relative = path.relative_to(PACKAGE)
        allowed = {name for pattern, names in MAY_IMPORT.items() if relative.match(pattern) for name in names}
        for found in imports_of(path):
            library = found.name.split(".")[0]
            if found.is_first and library in (GPU_LIBRARIES | EXTRAS) - allowed:
                wrong.append(f"{found} at its top: import it where it is used")
    assert not wrong, "\n".join(["", *wrong])
