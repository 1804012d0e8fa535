"""Connections of the command to a cluster: encrypted, lost, and refused."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import click
import dask
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from distributed import Client, Future, LocalCluster, Security

from dask_semdedup import cli
from dask_semdedup.cli import execution
from dask_semdedup.cli.execution import connect, show_progress, show_tasks
from dask_semdedup.cli.options import execution_options
from dask_semdedup.errors import ClusterUnavailableError
from dask_semdedup.lazy.tasks import results_of
from dask_semdedup.lazy.workers import is_connected
from tests.data import write_random_layout

pytest.importorskip("cryptography")


def run(body: Callable[[Client], None], address: str, *options: str) -> None:
    """Call a function with the client of a command that has these options."""

    @click.command
    @execution_options
    def command(scheduler: str | None, workers: int | None, storage_options: object) -> None:
        with connect(scheduler, workers) as client:
            assert client is not None
            body(client)

    CliRunner().invoke(command, ["--scheduler", address, *options], catch_exceptions=False)


def test_an_encrypted_connection(tmp_path: Path) -> None:
    security = Security.temporary()
    names = {"--tls-ca-file": "tls_ca_file", "--tls-cert": "tls_client_cert", "--tls-key": "tls_client_key"}
    options = []
    for option, name in names.items():
        path = tmp_path / f"{name}.pem"
        path.write_text(getattr(security, name))
        options += [option, str(path)]
    found = []
    with LocalCluster(
        n_workers=1, processes=False, protocol="tls://", security=security, dashboard_address=":0"
    ) as cluster:
        assert cluster.scheduler_address.startswith("tls://")
        run(lambda client: found.append(client.submit(sum, [1, 2]).result()), cluster.scheduler_address, *options)
    assert found == [3]


def test_a_scheduler_that_stops_is_named_at_once() -> None:
    cluster = LocalCluster(n_workers=1, processes=False, protocol="tcp://", dashboard_address=":0")
    address = cluster.scheduler_address

    def lose(client: Client) -> None:
        future = client.submit(time.sleep, 5)
        cluster.scheduler.loop.add_callback(cluster.scheduler.close)
        future.result()

    start = time.perf_counter()
    with pytest.raises(ClusterUnavailableError, match=rf"scheduler at {address} is lost"):
        run(lose, address)
    assert time.perf_counter() - start < 15
    # It would wait for the scheduler, too.
    with suppress(TimeoutError):
        cluster.close(timeout=1)


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Stop the next schedulers of ``--workers``, each after so many parts."""
    clusters: list[LocalCluster] = []
    start = LocalCluster.__init__

    def started(cluster: LocalCluster, *arguments: object, **options: object) -> None:
        clusters.append(cluster)
        start(cluster, *arguments, **options)

    def lose(*after: int) -> None:
        def results(client: Client, futures: Iterable[Future], advance: Callable[[], None]) -> list[object]:
            cluster, parts = clusters[-1], 0
            last = after[len(clusters) - 1] if len(clusters) <= len(after) else None

            def count() -> None:
                nonlocal parts
                advance()
                parts += 1
                stop()

            def stop() -> None:
                if parts == last:
                    cluster.scheduler.loop.add_callback(cluster.scheduler.close)
                    while is_connected(client):
                        time.sleep(0.01)

            stop()
            return results_of(client, futures, count)

        monkeypatch.setattr(execution, "results_of", results)

    monkeypatch.setattr(LocalCluster, "__init__", started)
    return lose


def pairwise(folder: Path, name: str, *options: str) -> Result:
    arguments = ["pairwise", str(folder / "in"), str(folder / name), "--partition-size", "1kB", *options]
    return CliRunner().invoke(cli.main, arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_scheduler_of_workers_is_started_again_while_parts_are_finished(
    lose: Callable[..., None], tmp_path: Path
) -> None:
    write_random_layout(tmp_path / "in", {cluster: [30] for cluster in range(20)})
    assert pairwise(tmp_path, "whole").exit_code == 0
    lose(3, 2)
    result = pairwise(tmp_path, "out", "--workers", "1")
    assert result.exit_code == 0, result.stderr
    for parts in (3, 2):
        assert f"The scheduler of --workers has stopped after {parts} tasks: starting it again." in result.stderr
    assert result.stderr.count("of 20 parts were there already") == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_steps_of_a_run_go_on_with_a_new_scheduler(lose: Callable[..., None], tmp_path: Path) -> None:
    frame = write_random_layout(tmp_path / "in", {cluster: [30] for cluster in range(4)})
    lose(1)
    arguments = ["run", str(tmp_path / "in"), str(tmp_path / "out"), "--partition-size", "1kB", "--n-clusters", "3"]
    result = CliRunner().invoke(cli.main, [*arguments, "--cluster-field", "cell", "--workers", "1"])
    assert result.exit_code == 0, result.stderr
    assert "has stopped after 1 task:" in result.stderr
    kept, dropped = (pd.read_parquet(tmp_path / "out" / name)["id"] for name in ("deduplicated", "duplicates"))
    assert sorted([*kept, *dropped]) == sorted(frame["id"])


def test_a_scheduler_of_workers_that_finishes_nothing_is_an_error(lose: Callable[..., None], tmp_path: Path) -> None:
    write_random_layout(tmp_path / "in", {cluster: [30] for cluster in range(20)})
    lose(1, 0)
    result = pairwise(tmp_path, "out", "--workers", "1")
    assert result.exit_code == 2
    assert "has stopped after 1 task:" in result.stderr
    assert re.search(r"Error: The connection to the scheduler at tcp://\S+ is lost", result.stderr)
    assert pairwise(tmp_path, "out").exit_code == 0


def test_no_scheduler() -> None:
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(ClusterUnavailableError, match="Cannot connect to the scheduler at tcp://127"),
    ):
        run(lambda _: None, "tcp://127.0.0.1:1")


@pytest.mark.parametrize("enabled", [True, False], ids=["told", "quiet"])
def test_a_long_task_is_told_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], enabled: bool
) -> None:
    monkeypatch.setattr(execution, "SECONDS_PER_LINE", 0.05)
    with show_progress(enabled=enabled) as progress:
        with show_tasks(progress, "Comparing", client=None):
            dask.delayed(time.sleep)(0.3).compute(scheduler="threads")
        with show_tasks(progress, "Removing", client=None):
            time.sleep(0.2)
    said = capsys.readouterr().err
    assert ("Comparing: 0 of 1 task, 0 s\n" in said) == ("Removing: 0 s\n" in said) == enabled


def test_no_callback_of_the_garbage_collector_drops_an_interrupt() -> None:
    before = list(gc.callbacks)
    with connect(None, 1):
        assert gc.callbacks == before


def test_own_workers_keep_no_profiles() -> None:
    with connect(None, 1) as client:
        assert client is not None
        kept = client.run(lambda: dask.config.get("distributed.worker.profile.enabled"))
    assert list(kept.values()) == [False]
    assert dask.config.get("distributed.worker.profile.enabled")
