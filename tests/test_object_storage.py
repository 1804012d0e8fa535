"""Object storage over HTTP: all that reads or writes gives on ``s3://`` what it gives on a local disk."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from dask_semdedup import cli, read_clusters, read_table
from dask_semdedup.errors import DataNotFoundError, DataReadError
from dask_semdedup.stages import PairwiseStage

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")

CLUSTERS, FILES, ROWS = 40, 10, 4
BUCKET = "s3://semdedup"


class Troubled:
    """A server that now and then, where told to, answers that it is busy, or breaks off in the middle of a body."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app, self.every, self.trouble = app, 0, "busy"
        self.lock, self.requests, self.troubles = threading.Lock(), 0, 0

    def begin(self, trouble: str, every: int) -> None:
        self.trouble, self.every, self.requests, self.troubles = trouble, every, 0, 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        # Only what reads can be broken off.
        counts = self.trouble == "busy" or (environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ)
        with self.lock:
            self.requests += counts
            is_due = bool(counts and self.every and self.requests % self.every == 0)
            self.troubles += is_due
        if not is_due:
            return self.app(environ, start_response)
        if self.trouble == "busy":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Connection", "close")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        body = b"".join(self.app(environ, start_response))
        return [body[: len(body) // 2]]


class Store:
    """A bucket that is reached over HTTP."""

    def __init__(self, options: dict[str, Any], troubled: Troubled) -> None:
        self.options, self.troubled = options, troubled
        self.fs = fsspec.filesystem("s3", **options)

    def invoke(self, *arguments: object) -> Result:
        """Run a command whose paths are all in the store."""
        options = [part for option in self.options.items() for part in ("--storage-option", "=".join(option))]
        return CliRunner().invoke(cli.main, [*map(str, arguments), *options])

    def read(self, folder: str, by: str = "id") -> pd.DataFrame:
        """All that is in the Parquet files of a folder, read without this package."""
        files = sorted(path for path in self.fs.find(folder) if path.endswith(".parquet"))
        frame = pd.concat([pd.read_parquet(io.BytesIO(self.fs.cat_file(path))) for path in files])
        return frame.sort_values(by, ignore_index=True)

    def names(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()
        return sorted(path.rsplit("/", 1)[1] for path in self.fs.ls(folder, detail=False))


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    running._server.app = Troubled(running._server.app)
    options = {"endpoint_url": f"http://{host}:{port}", "key": "any", "secret": "any"}
    store = Store(options, running._server.app)
    store.fs.mkdir(BUCKET)
    yield store
    running.stop()


@pytest.fixture
def troubled(store: Store) -> Iterator[Troubled]:
    yield store.troubled
    store.troubled.every = 0


def rows(seed: int, n: int) -> pa.Table:
    """Random rows, of which the last quarter repeats the first, all but exactly."""
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(n, 8)).astype(np.float32)
    embeddings[-(n // 4) :] = embeddings[: n // 4] + 1e-4
    return pa.table(
        {
            "id": [f"{seed}-{number}" for number in range(n)],
            "embeddings": pa.array(list(embeddings)),
            "text": [f"text {number}" for number in range(n)],
            "cosine_dist_to_cent": rng.random(n),
        }
    )


def encoded(table: pa.Table, **options: Any) -> bytes:
    pq.write_table(table, file := io.BytesIO(), **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clusters of many small files, and of few; and a raw table, as Parquet and as JSON lines."""
    folder = tmp_path_factory.mktemp("local")
    for name, clusters, files in (("clusters", CLUSTERS, FILES), ("few", 4, 2)):
        for cluster in range(clusters):
            table = rows(cluster, files * ROWS)
            (path := folder / f"{name}/centroid={cluster}").mkdir(parents=True)
            for number in range(files):
                (path / f"{number}.parquet").write_bytes(encoded(table.slice(number * ROWS, ROWS)))
    (folder / "raw").mkdir()
    (folder / "raw/0.parquet").write_bytes(encoded(rows(99, 200), row_group_size=50))
    (folder / "lines").mkdir()
    (folder / "lines/0.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(99, 200).to_pylist()))
    return folder


@pytest.fixture(scope="module")
def remote(store: Store, local: Path) -> str:
    """The same in the store."""
    files = [path for path in local.rglob("*") if path.is_file()]
    store.fs.pipe({f"{BUCKET}/{path.relative_to(local)}": path.read_bytes() for path in files})
    return BUCKET


def sorted_frame(frame: Any) -> pd.DataFrame:
    return frame.compute().sort_values("id", ignore_index=True)


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_scores_of_many_small_files(store: Store, local: Path, remote: str) -> None:
    there = read_clusters(f"{remote}/clusters", storage_options=store.options)
    here = read_clusters(local / "clusters")
    assert there.npartitions == here.npartitions
    scores = sorted_frame(there.semdedup.pairwise())
    assert len(scores) == CLUSTERS * FILES * ROWS
    pd.testing.assert_frame_equal(scores, sorted_frame(here.semdedup.pairwise()))


@pytest.mark.parametrize("folder", ["raw", "lines"])
def test_tables_are_read_and_deduplicated(store: Store, local: Path, remote: str, folder: str) -> None:
    there = read_table(f"{remote}/{folder}", storage_options=store.options)
    here = read_table(local / folder)
    pd.testing.assert_frame_equal(there.compute(), here.compute())
    kept = there.semdedup.deduplicate(eps=0.001).compute()
    assert len(kept) == 150
    pd.testing.assert_frame_equal(kept, here.semdedup.deduplicate(eps=0.001).compute())


def test_a_footer_longer_than_the_first_guess(
    store: Store, local: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dask_semdedup.io.footers.FOOTER_GUESS", 16)
    there = read_table(f"{remote}/raw/0.parquet", storage_options=store.options)
    pd.testing.assert_frame_equal(there.compute(), read_table(local / "raw").compute())


@pytest.mark.parametrize("path", ["nothing", "few/nothing.parquet"])
def test_what_is_not_there_is_named(store: Store, remote: str, path: str) -> None:
    with pytest.raises(DataNotFoundError, match=f"No Parquet files found at {remote}/{path}"):
        read_clusters(f"{remote}/{path}", storage_options=store.options)


def test_damage_is_named(store: Store, local: Path, remote: str) -> None:
    sound = (local / "raw/0.parquet").read_bytes()
    store.fs.pipe({f"{remote}/damaged/0.parquet": sound, f"{remote}/damaged/1.parquet": sound[:-20] + bytes(20)})
    with pytest.raises(DataReadError, match=r"Cannot read semdedup/damaged/1.parquet as Parquet"):
        read_table(f"{remote}/damaged", storage_options=store.options)


@pytest.mark.parametrize("is_same_process", [True, False])
@pytest.mark.parametrize("name", ["0.parquet", "0.jsonl"])
def test_another_file_of_the_same_length_is_noticed(
    store: Store, remote: str, name: str, is_same_process: bool
) -> None:
    first, second = (
        encoded(table)
        if name.endswith("parquet")
        else "".join(f"{json.dumps(row)}\n" for row in table.to_pylist()).encode()
        for table in (pa.table({"id": [number, 1], "embeddings": [[1.0, 2.0], [3.0, 4.0]]}) for number in (2, 3))
    )
    assert len(first) == len(second)
    path = f"{remote}/replaced/{name}"
    store.fs.pipe_file(path, first)
    frame = read_table(path, storage_options=store.options)
    assert frame["id"].compute().tolist() == [2, 1]
    # Another client, whose writes the cache of this one does not see.
    fsspec.filesystem("s3", skip_instance_cache=True, **store.options).pipe_file(path, second)
    if not is_same_process:
        store.fs.invalidate_cache()
    with pytest.raises(DataReadError, match=r"changed since the .* were read|Cannot read .*/replaced/0"):
        frame.compute()


# --- Writing ---------------------------------------------------------------------------------------------------------


def test_clusters_are_written_and_read_again(store: Store, local: Path, remote: str) -> None:
    frame = read_clusters(f"{remote}/few", storage_options=store.options)
    written = frame.semdedup.to_clusters(f"{remote}/written", storage_options=store.options)
    assert {cluster: len(files) for cluster, files in written.items()} == dict.fromkeys(range(4), 1)
    assert store.names(f"{remote}/written") == [f"centroid={cluster}" for cluster in range(4)]
    assert not [path for path in store.fs.find(BUCKET) if ".partial" in path]
    again = read_clusters(f"{remote}/written", storage_options=store.options)
    pd.testing.assert_frame_equal(sorted_frame(again), sorted_frame(frame))


def test_the_stages(store: Store, local: Path, remote: str) -> None:
    options = {"storage_options": store.options}
    names = ("id", "embeddings", f"{remote}/few", f"{remote}/stages")
    tasks = PairwiseStage(*names, read_kwargs=options, write_kwargs=options).run()
    assert [task.data for task in tasks] == [[f"{remote}/stages/cluster_{cluster}.parquet"] for cluster in range(4)]
    assert store.names(f"{remote}/stages") == [f"cluster_{cluster}.parquet" for cluster in range(4)]
    expected = sorted_frame(read_clusters(local / "few").semdedup.pairwise()).drop(columns="centroid")
    pd.testing.assert_frame_equal(store.read(f"{remote}/stages"), expected, check_dtype=False)


def test_the_commands_pairwise_and_report(store: Store, local: Path, remote: str) -> None:
    assert_done(store.invoke("pairwise", f"{remote}/few", f"{remote}/scores"))
    expected = sorted_frame(read_clusters(local / "few").semdedup.pairwise())
    pd.testing.assert_frame_equal(store.read(f"{remote}/scores"), expected, check_dtype=False)
    # A second time it is replaced, whole.
    assert_done(store.invoke("pairwise", f"{remote}/few", f"{remote}/scores", "--overwrite"))
    pd.testing.assert_frame_equal(store.read(f"{remote}/scores"), expected, check_dtype=False)
    assert_done(
        store.invoke(
            "report", f"{remote}/scores", f"{remote}/report", "--data", f"{remote}/few", "--text-field", "text"
        )
    )
    assert store.names(f"{remote}/report") == ["clusters.png", "duplicates.png", "histogram.png", "index.html"]
    page = store.fs.cat_file(f"{remote}/report/index.html").decode()
    assert "text <mark>7</mark>" in page


def test_the_command_run_and_again(store: Store, remote: str) -> None:
    arguments = ("run", f"{remote}/raw", f"{remote}/run", "--n-clusters", 4, "--eps", 0.001, "--text-field", "text")
    assert_done(store.invoke(*arguments))
    assert store.names(f"{remote}/run") == ["clusters", "deduplicated", "duplicates", "report", "scores"]
    kept = store.read(f"{remote}/run/deduplicated")
    assert len(kept) == 150
    assert len(store.read(f"{remote}/run/duplicates")) == 50
    tokens = {path: store.fs.cat_file(path) for path in store.fs.find(f"{remote}/run") if "manifest" in path}
    assert len(tokens) == 5
    assert_done(store.invoke(*arguments))
    assert tokens == {path: store.fs.cat_file(path) for path in tokens}


# --- Trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["busy", "broken off"])
def test_a_server_in_trouble(store: Store, local: Path, remote: str, troubled: Troubled, trouble: str) -> None:
    troubled.begin(trouble, every=7)
    assert_done(store.invoke("pairwise", f"{remote}/few", f"{remote}/{trouble}"))
    assert troubled.troubles
    troubled.every = 0
    expected = sorted_frame(read_clusters(local / "few").semdedup.pairwise())
    pd.testing.assert_frame_equal(store.read(f"{remote}/{trouble}"), expected, check_dtype=False)


def assert_done(result: Result) -> None:
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("which", ["INPUT", "OUTPUT"])
def test_a_bucket_that_is_not_there_is_named(store: Store, remote: str, which: str) -> None:
    paths = {"INPUT": f"{remote}/raw", "OUTPUT": f"{remote}/never"} | {which: "s3://nowhere/at-all"}
    result = store.invoke("run", *paths.values())
    assert result.exit_code == 2
    assert f"bucket does not exist (INPUT {paths['INPUT']}, OUTPUT {paths['OUTPUT']})" in " ".join(
        result.stderr.split()
    )
