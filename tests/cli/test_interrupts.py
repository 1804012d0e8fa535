"""Ctrl-C ends the command with a line and exit status 130, whenever it comes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import write_random_layout

ROOT = Path(__file__).parents[2]

# As a terminal does it, which interrupts the workers too: some time after an import of a module begins.
INTERRUPTED = """
import os, signal, sys, threading

def interrupt(event, arguments):
    global module
    if event == "import" and arguments[0] == module:
        module = None
        if delay:
            threading.Timer(delay, os.killpg, [0, signal.SIGINT]).start()
        else:
            os.killpg(0, signal.SIGINT)

module, delay = sys.argv.pop(1), float(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(interrupt)
if __name__ == "__main__":
    from _dask_semdedup import main
    main()
"""

STOPPING = ["Stopping: waiting for running tasks. Press Ctrl-C again to stop at once."]
STOPPED = ["Stopped. Run the same command again: it reuses the parts that are finished, if there are any."]


@pytest.mark.parametrize(
    ("module", "delay", "said"),
    [
        pytest.param("dask.dataframe", 0, ["Stopped."], id="while the package is loading"),
        pytest.param("distributed.deploy.local", 0, STOPPING + STOPPED, id="while distributed is loading"),
        pytest.param("multiprocessing.popen_spawn_posix", 0, STOPPING + STOPPED, id="before a worker starts"),
        pytest.param("multiprocessing.popen_spawn_posix", 0.2, STOPPING + STOPPED, id="while workers start"),
    ],
)
def test_interrupts(tmp_path: Path, module: str, delay: float, said: list[str]) -> None:
    write_random_layout(tmp_path / "in", {0: [60]})
    finished = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, str(delay), "pairwise", "in", "out", "--workers", "1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=60,
    )
    assert [line for line in finished.stderr.splitlines() if line] == said
    assert (finished.returncode, finished.stdout) == (130, "")
