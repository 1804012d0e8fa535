"""Connections of the command to a cluster: encrypted, lost, and refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click
import dask
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster, Security

from dask_semdedup.cli.execution import connect
from dask_semdedup.cli.options import execution_options
from dask_semdedup.errors import ClusterUnavailableError

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


def test_no_scheduler() -> None:
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(ClusterUnavailableError, match="Cannot connect to the scheduler at tcp://127"),
    ):
        run(lambda _: None, "tcp://127.0.0.1:1")


def test_own_workers_keep_no_profiles() -> None:
    with connect(None, 1) as client:
        assert client is not None
        kept = client.run(lambda: dask.config.get("distributed.worker.profile.enabled"))
    assert list(kept.values()) == [False]
    assert dask.config.get("distributed.worker.profile.enabled")
