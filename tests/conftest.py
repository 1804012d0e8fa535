"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import fsspec
import pandas as pd
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import settings

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from tests.data import ObjectStore

# Their assertions say what they compared, as those of tests do.
pytest.register_assert_rewrite("tests.data", "tests.oracle")

# A deadline measures the machine, not the code; in CI the same examples are drawn every time.
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


# Models come from packages: nothing may ask the Hugging Face hub for one.
os.environ["HF_HUB_OFFLINE"] = "1"

# Without a GPU, kernels run in Triton's interpreter: it wants to know before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(scope="session")
def loaded_processes() -> Iterator[BaseContext]:
    """New processes, those of clusters among them, have the libraries loaded already: seconds are saved for each."""
    from distributed.utils import get_mp_context

    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        context = get_mp_context()
        packages = ["cli.run", "search", "report.page", "report.plots"]
        libraries = ["distributed", "matplotlib.backends.backend_svg", "pyarrow.parquet", "sklearn.cluster"]
        context.set_forkserver_preload([*(f"dask_semdedup.{name}" for name in packages), *libraries])
        # It waits until they are loaded, so that no test does.
        (first := context.Process(target=int)).start()
        first.join()
        yield context


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the file system of ``memory://`` is asked for, as method and path: on others, each takes a request."""
    made: list[tuple[str, str]] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(MemoryFileSystem, name)

        def call(self: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
            made.append((name, path))
            return original(self, path, *args, **kwargs)

        return call

    for name in (
        "cat_file",
        "cp_file",
        "exists",
        "find",
        "info",
        "isdir",
        "ls",
        "makedirs",
        "pipe_file",
        "rm",
        "rm_file",
    ):
        monkeypatch.setattr(MemoryFileSystem, name, counted(name))
    return made


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    """What ``store://`` is, and nothing in it."""
    from tests.data import ObjectStore

    fsspec.register_implementation("store", ObjectStore, clobber=True)
    fs = ObjectStore()
    yield fs
    fs.rm("/", recursive=True)


@pytest.fixture
def device_memory() -> Callable[[Callable[[], object]], tuple[int, int]]:
    """Bytes of a GPU that a call takes at most, and those that are taken after it, from whatever torch allocates."""

    def of_torch(call: Callable[[], object]) -> tuple[int, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before

    def of_rmm(call: Callable[[], object]) -> tuple[int, int]:
        import rmm.statistics

        with rmm.statistics.statistics():
            call()
            taken = rmm.statistics.get_statistics()
        return taken.peak_bytes, taken.current_bytes

    return of_rmm if torch.cuda.memory.get_allocator_backend() == "pluggable" else of_torch


@pytest.fixture
def layout(tmp_path: Path) -> tuple[Path, pd.DataFrame]:
    """Five clusters in nine files, and what these hold."""
    from tests.data import write_random_layout

    frame = write_random_layout(tmp_path / "in", {10: [3], 2: [4, 5], 0: [1], 7: [2, 1, 6], 1: [8]})
    return tmp_path / "in", frame
