"""Two runs are told apart, and a dead one is in nobody's way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest

from dask_semdedup.errors import OutputExistsError
from dask_semdedup.io.locks import only_run
from tests.data import ObjectStore

LOCAL = fsspec.filesystem("file")


def holder(**changes: Any) -> bytes:
    now = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time(), "since": "now"}
    return json.dumps(now | changes).encode()


def test_a_second_run_is_told_of_the_first(tmp_path: Path) -> None:
    path = f"{tmp_path}/out.partial/lock.json"
    words = rf"'out' is being written by process {os.getpid()} on {socket.gethostname()}, since 20.* remove .*lock.json"
    with only_run(LOCAL, path, "out"), pytest.raises(OutputExistsError, match=words), only_run(LOCAL, path, "out"):
        pytest.fail("both hold it")
    assert not os.path.exists(path)
    with only_run(LOCAL, path, "out"):
        pass


def test_of_many_processes_one_holds_it(tmp_path: Path) -> None:
    program = (
        "import fsspec, sys; from dask_semdedup.io.locks import only_run\n"
        "sys.stdin.readline()\n"
        "with only_run(fsspec.filesystem('file'), sys.argv[1], 'out'): print('held', flush=True); sys.stdin.readline()"
    )
    (tmp_path / "lock.json").write_bytes(holder(pid=2**22 - 1))
    with ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        runs: list[Any] = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", program, tmp_path / "lock.json"], **pipes))
            for _ in range(4)
        ]
        for run in runs:
            run.stdin.write("\n")
            run.stdin.flush()
        said = []
        for run in runs:
            # Those that do not hold it end.
            said.append(run.stdout.readline())
        assert sorted(said) == ["", "", "", "held\n"]
        runs[said.index("held\n")].kill()
    with only_run(LOCAL, f"{tmp_path}/lock.json", "out"):
        pass


@pytest.mark.parametrize(
    ("changes", "is_held"),
    [({}, True), ({"pid": 2**22 - 1}, False), ({"started": 0}, False), ({"host": "elsewhere"}, True)],
    ids=["alive", "no such process", "another process of that number", "another host"],
)
def test_the_dead_hold_nothing(store: ObjectStore, changes: dict[str, Any], is_held: bool) -> None:
    store.pipe_file("/lock.json", holder(**changes))
    if is_held:
        with pytest.raises(OutputExistsError, match="being written"), only_run(store, "/lock.json", "out"):
            pytest.fail("both hold it")
    else:
        with only_run(store, "/lock.json", "out"):
            assert json.loads(store.cat_file("/lock.json"))["pid"] == os.getpid()


def test_a_zombie_is_dead(store: ObjectStore) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    started = psutil.Process(child.pid).create_time()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    store.pipe_file("/lock.json", holder(pid=child.pid, started=started))
    with only_run(store, "/lock.json", "out"):
        pass
    child.wait()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"host": 1}'])
def test_a_lock_that_was_cut_off_is_void(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "lock.json").write_bytes(text)
    with only_run(LOCAL, f"{tmp_path}/lock.json", "out"):
        pass
