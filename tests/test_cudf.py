"""cuDF frames give what pandas frames give."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dask_semdedup import read_clusters, read_table
from dask_semdedup.device import streams
from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.device.streams import current_stream, reading_stream
from dask_semdedup.errors import ClusterError, EmbeddingError
from dask_semdedup.frames import backend
from dask_semdedup.frames.backend import is_cudf, to_arrow
from dask_semdedup.frames.columns import Columns
from dask_semdedup.frames.embeddings import check_embedding_dtype, to_tensor
from dask_semdedup.frames.hashing import hash_ids
from dask_semdedup.io import cudf_reader
from dask_semdedup.lazy.held import Held, held
from dask_semdedup.stages import PairwiseStage
from dask_semdedup.steps.kmeans import check_centroids, kmeans_meta, kmeans_partition
from dask_semdedup.steps.pairwise import pairwise_meta
from dask_semdedup.steps.ranking import RankingStrategy, make_strategy
from tests.data import GOLDEN, ORDER, ROWS, check_hard, run, write_layout

pytestmark = pytest.mark.gpu
ELEMENTS = [pa.float32(), pa.float64(), pa.uint16(), pa.int16()]


@pytest.fixture(scope="module")
def cudf():
    return pytest.importorskip("cudf")


def lists(cudf, rows, element: pa.DataType | None = None):
    element = element or pa.float32()
    if element == pa.uint16():
        rows = np.asarray(rows, np.float16).view(np.uint16)
    rows = [None if row is None else [None if x is None else element.to_pandas_dtype()(x) for x in row] for row in rows]
    return cudf.Series.from_arrow(pa.array(rows, pa.list_(element)))


def on_gpu(cudf, frame: pd.DataFrame):
    return cudf.DataFrame.from_arrow(pa.Table.from_pandas(frame, preserve_index=False))


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("order", [None, ORDER], ids=["as it is", "ordered"])
def test_every_layout_gives_the_same_matrix(cudf, element, device, order):
    cupy = pytest.importorskip("cupy")
    rows = np.trunc(ROWS)
    column = lists(cudf, rows, element)
    check_embedding_dtype(column.iloc[:0], "embeddings")
    matrix = to_tensor(column, name="x", order=None if order is None else cupy.asarray(order), device=device)
    assert matrix.device.type == (device or "cuda")
    assert matrix.dtype == torch.float32
    np.testing.assert_array_equal(matrix.cpu(), rows if order is None else rows[order])


def test_float32_is_not_copied(cudf):
    column = lists(cudf, ROWS)
    assert to_tensor(column, name="x").data_ptr() == column.list.leaves.values.data.ptr


def test_slices(cudf):
    column = lists(cudf, np.tile(ROWS, (3, 1)))
    np.testing.assert_array_equal(to_tensor(column.iloc[4:8], name="x").cpu(), ROWS)
    np.testing.assert_array_equal(to_tensor(column.iloc[1::2], name="x").cpu(), np.tile(ROWS, (3, 1))[1::2])


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_float64_rows_beyond_float32_keep_their_direction(cudf, scale):
    matrix = to_tensor(lists(cudf, np.array([[3.0, 4.0], [3.0 * scale, 4.0 * scale]]), pa.float64()), name="x")
    np.testing.assert_allclose(matrix.cpu(), [[3, 4], [0.75, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([[1.0, 2.0], None, [3.0, 4.0], None], r"2 rows with a null embedding \(ids b, d\)"),
        ([[1.0, 2.0], [np.nan, 1.0], [3.0, np.inf]], r"2 rows with NaN or infinite values \(ids b, c\)"),
        ([[1.0, 2.0], [1.0, None], [3.0, 4.0]], r"1 row with null or NaN elements \(ids b\)"),
        ([[1.0, 2.0], [1.0], [1.0, 2.0, 3.0]], r"2 rows with width 1, 3, where 2 is expected \(ids b, c\)"),
        ([[1.0, 2.0], [3.0, 4.0], []], r"1 row with an empty embedding \(ids c\)"),
    ],
)
def test_bad_rows_are_named(cudf, rows, problem):
    ids, clusters = cudf.Series(list("abcd")[: len(rows)]), cudf.Series([7] * len(rows))
    with pytest.raises(EmbeddingError, match=f"Column 'x', cluster 7: {problem}"):
        to_tensor(lists(cudf, rows), name="x", ids=ids, clusters=clusters)


@pytest.mark.parametrize("values", [["[1.0]"], [1.0], [["a"]], [[[1.0]]]], ids=str)
def test_other_dtypes_are_refused(cudf, values):
    with pytest.raises(EmbeddingError, match="Column 'x' has dtype"):
        check_embedding_dtype(cudf.Series(values), "x")


@pytest.mark.parametrize(
    "ids",
    [
        pd.Series([3, -1, 2**62]),
        pd.Series([3, 1, 2], dtype="int8"),
        pd.Series([3, 2**64 - 1], dtype="uint64"),
        pd.Series([3, None, 1], dtype="Int64"),
        pd.Series(["b", "", "ä" * 40, None]),
        pd.Series(["b", "a", "b"], dtype="category"),
    ],
    ids=lambda ids: str(ids.dtype),
)
def test_hashes_are_those_of_pandas(cudf, ids):
    hashes = hash_ids(on_gpu(cudf, ids.to_frame("id"))["id"], 42)
    np.testing.assert_array_equal(hashes.get(), hash_ids(ids, 42))


@pytest.mark.parametrize(
    "strategy",
    [
        make_strategy("hard"),
        make_strategy("easy"),
        make_strategy("random"),
        RankingStrategy(["source", "cosine_dist_to_cent"], [False, True]),
        RankingStrategy(["grade", "source"], [True, False]),
    ],
    ids=["hard", "easy", "random", "source", "grade"],
)
def test_order_is_that_of_pandas(cudf, strategy):
    rng = np.random.default_rng(0)
    distance = rng.random(500).round(2)
    distance[rng.random(500) < 0.1] = np.nan
    frame = pd.DataFrame(
        {
            "id": [f"{number:03d}" for number in rng.permutation(500)],
            "centroid": rng.integers(7, size=500),
            "cosine_dist_to_cent": distance,
            "source": pd.Series(rng.choice(["web", "book", "talk"], 500)).where(rng.random(500) < 0.9),
            "grade": pd.Series(rng.integers(3, size=500), dtype="Int64").where(rng.random(500) < 0.9),
        }
    )
    order = strategy.order(on_gpu(cudf, frame), cluster_field="centroid", id_field="id")
    assert order.dtype == np.int64
    np.testing.assert_array_equal(order.get(), strategy.order(frame, cluster_field="centroid", id_field="id"))
    one = frame[frame["centroid"] == 3]
    ranked = strategy.rank_cluster(on_gpu(cudf, one))["id"].to_pandas()
    assert ranked.tolist() == strategy.rank_cluster(one)["id"].tolist()


@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
@pytest.mark.parametrize("ids", [range(6), list("abcdef")], ids=["integers", "strings"])
def test_scores_are_those_of_pandas(cudf, ids, keep, device):
    frame = GOLDEN.assign(id=list(ids), centroid=[0, 0, 0, 0, 1, 0])
    scores = run(on_gpu(cudf, frame), make_strategy(keep), device=device)
    assert is_cudf(scores)
    pd.testing.assert_frame_equal(
        scores.to_pandas(), run(frame, make_strategy(keep)), atol=2e-6, check_dtype=False, check_column_type=False
    )
    assert scores["cosine_sim_score"].dtype == np.float32


def test_meta_foretells_the_dtypes(cudf):
    frame = on_gpu(cudf, GOLDEN.assign(id=list("abcdef")))
    meta = pairwise_meta(frame.iloc[:0], Columns())
    scores = run(frame)
    assert list(meta.columns) == list(scores.columns)
    assert meta.dtypes.tolist() == scores.dtypes.tolist() == run(frame.iloc[:0]).dtypes.tolist()


def test_rows_without_a_cluster_are_named(cudf):
    frame = on_gpu(cudf, GOLDEN.assign(centroid=pd.Series([0, 0, None, 0, None, 1], dtype="Int64")))
    with pytest.raises(ClusterError, match=r"Column 'centroid': 2 rows have no cluster \(ids 2, 4\)"):
        run(frame)


@pytest.mark.parametrize("eps", [0.1, 0.0])
def test_scores_tell_what_they_hold(cudf, tmp_path, eps):
    rows = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    rows[150:] = rows[:50] + np.float32(0.01)
    pd.DataFrame({"id": range(200), "embeddings": list(rows)}).to_parquet(tmp_path / "rows.parquet")
    ddf = read_table(tmp_path / "rows.parquet", backend="cudf")
    scores = ddf.semdedup.pairwise(eps=eps, cluster_field=None)
    assert held(scores) == Held(eps, rows=200)
    assert held(scores.persist()) == held(scores.compute()) == Held(eps)
    scores.semdedup.to_parquet(tmp_path / "scores")
    for name in ("cudf", "pandas"):
        read = read_table(tmp_path / "scores", backend=name)
        assert len(read) == len(scores)
        assert held(read) == held(scores)


def test_pandas_frames_on_a_gpu(cudf):
    on_cpu = run(GOLDEN, device="cpu")
    assert not is_cudf(run(GOLDEN, device="cuda"))
    pd.testing.assert_frame_equal(run(GOLDEN, device="cuda"), on_cpu, atol=2e-6)
    halves = GOLDEN.assign(embeddings=GOLDEN["embeddings"].map(lambda row: np.asarray(row, np.float16)))
    pd.testing.assert_frame_equal(run(halves, device="cuda"), run(halves, device="cpu"), atol=2e-6)


@pytest.mark.parametrize("read_kwargs", [None, {"use_pandas_metadata": False}], ids=["plain", "with read_kwargs"])
def test_stages(cudf, tmp_path, read_kwargs):
    root = write_layout(tmp_path / "in", {0: [GOLDEN[:2], GOLDEN[2:]], 10: [GOLDEN], 9: [GOLDEN[:0]]})
    with dask.config.set({"dataframe.backend": "cudf"}):
        stage = PairwiseStage("id", "embeddings", str(root), str(tmp_path / "out"), read_kwargs=read_kwargs)
        first, empty, second = stage.run()
    check_hard(first.data[0])
    check_hard(second.data[0])
    assert pd.read_parquet(empty.data[0]).empty


@pytest.mark.parametrize("strategy", [RankingStrategy(["score"]), RankingStrategy.random(7)], ids=["sort", "random"])
def test_rows_of_equal_ids_stay_in_the_input_order(cudf, strategy):
    """50,000 rows of 7 ids and one value: an unstable sort would not leave them alone."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"id": rng.integers(7, size=50_000), "score": 1.0, "centroid": rng.integers(3, size=50_000)})
    arguments = {"cluster_field": "centroid", "id_field": "id"}
    order = strategy.order(on_gpu(cudf, frame), **arguments)
    np.testing.assert_array_equal(order.get(), strategy.order(frame, **arguments))


def test_kmeans_gives_cudf_what_it_gives_pandas(cudf):
    rng = np.random.default_rng(0)
    rows, centroids = rng.standard_normal((500, 16)).astype(np.float32), rng.standard_normal((7, 16))
    frame = cudf.DataFrame({"id": range(500)})
    frame["embeddings"] = lists(cudf, rows)
    result = kmeans_partition(frame, check_centroids(centroids), Columns())
    meta = kmeans_meta(frame.iloc[:0], Columns())
    assert result.dtypes.to_dict() == meta.dtypes.to_dict()
    expected = kmeans_partition(frame.to_pandas(), check_centroids(centroids), Columns())
    embeddings = np.array(result.pop("embeddings").to_arrow().to_pylist())
    np.testing.assert_allclose(embeddings, np.array(expected.pop("embeddings").tolist()), rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(result.to_pandas(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ids", [[1, 2], [1, None], ["a", "b"], ["a", None]], ids=str)
def test_scores_are_read_back_as_if_pandas_had_written_them(cudf, tmp_path, ids):
    frame = cudf.DataFrame.from_arrow(pa.table({"id": ids, "score": pa.array([0, 0.5], pa.float32())}))
    pq.write_table(to_arrow(frame), tmp_path / "ours.parquet")
    frame.to_pandas(nullable=ids == [1, None]).to_parquet(tmp_path / "expected.parquet", index=False)
    ours, expected = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("ours", "expected"))
    pd.testing.assert_frame_equal(ours, expected)


class FreshMemory:
    """Device memory that nobody has used before, instead of the pool's, which makes streams wait for each other.

    What is released is overwritten in the order of its stream. It stays installed, for what is released after a test.
    """

    def __init__(self, nbytes: int = 8 << 30):
        import cupy
        import rmm

        self.pool, self.fill = rmm.mr.get_current_device_resource(), cupy.cuda.runtime.memsetAsync
        self.is_used, self.lock = False, threading.Lock()
        self.next = self.start = self.pool.allocate(nbytes)
        self.stop = self.start + nbytes
        self.fill(self.start, 255, nbytes, 0)
        torch.cuda.synchronize()
        rmm.mr.set_current_device_resource(rmm.mr.CallbackMemoryResource(self.allocate, self.release))

    def allocate(self, nbytes, stream):
        if not self.is_used:
            return self.pool.allocate(nbytes, stream)
        with self.lock:
            pointer, self.next = self.next, self.next + -(-max(nbytes, 1) // 256) * 256
        assert self.next <= self.stop, "The memory that nobody has used is used up."
        return pointer

    def release(self, pointer, nbytes, stream):
        self.fill(pointer, 255, nbytes, stream.__cuda_stream__()[1])
        if not self.start <= pointer < self.stop:
            self.pool.deallocate(pointer, nbytes, stream)


@pytest.fixture(scope="module")
def fresh_memory(cudf):
    assert share_memory_pool(), "Torch used CUDA before it could share the pool: run `make test-gpu`."
    return FreshMemory()


class TestLaggingStreams:
    """What streams are given is done late, and no memory is used twice."""

    @pytest.fixture(autouse=True)
    def late_default(self, cudf):
        """What the default stream is given has a sleep before it: who does not wait for it reads too early."""
        is_over = threading.Event()

        def sleep_on():
            before = torch.cuda.Event()
            while not is_over.is_set():
                torch.cuda._sleep(3_000_000)
                after = torch.cuda.Event()
                after.record()
                before.synchronize()  # The one before the last: there always is one to come.
                before = after

        with ThreadPoolExecutor(1) as pool:
            sleeping = pool.submit(sleep_on)
            yield
            is_over.set()
            sleeping.result()

    @pytest.fixture(autouse=True)
    def late_current(self, monkeypatch):
        """What is gathered, and what uses what cuDF made by itself, begins late."""
        default_stream = streams._default_stream

        def late():
            stream = current_stream()
            if stream is not None:
                torch.cuda._sleep(6_000_000)
            return stream

        @contextmanager
        def lagging():
            with default_stream():
                yield
            late()

        monkeypatch.setattr(streams, "_default_stream", lagging)
        monkeypatch.setattr(backend, "current_stream", late)

    @pytest.fixture(autouse=True)
    def use_fresh_memory(self, fresh_memory):
        fresh_memory.is_used = True
        yield
        fresh_memory.is_used = False

    @pytest.fixture
    def frame(self):
        rng = np.random.default_rng(0)
        n = 3000
        return pd.DataFrame(
            {
                "id": rng.permutation(n),
                "embeddings": list(rng.standard_normal((n, 16), dtype=np.float32)),
                "centroid": rng.integers(7, size=n),
                "cosine_dist_to_cent": rng.random(n),
                "source": pd.Categorical(rng.choice(["web", "book", "talk"], n)),
                "grade": pd.Categorical(rng.choice([0.5, 1.5, np.nan], n)),
                "date": rng.choice(pd.date_range("2026-01-01", periods=90).date, n),
            }
        )

    @pytest.mark.parametrize("keep", ["hard", "random", "source", "grade"])
    @pytest.mark.parametrize("kind", [np.int64, np.float64, str], ids=["integers", "floats", "strings"])
    def test_scores(self, cudf, frame, kind, keep):
        strategy = RankingStrategy([keep]) if keep in frame else make_strategy(keep)
        frame["centroid"] = frame["centroid"].astype(kind)
        if kind is str:
            frame["id"] = frame["id"].astype(str)
        expected = run(frame, strategy, device="cpu")
        for _ in range(2):
            scores = run(on_gpu(cudf, frame), strategy).to_pandas()
            pd.testing.assert_frame_equal(
                scores, expected, atol=2e-6, check_dtype=False, check_column_type=False, check_index_type=False
            )

    @pytest.mark.parametrize("keep", ["random", "source"])
    def test_a_long_sort(self, cudf, keep):
        rng = np.random.default_rng(0)
        n = 1_000_000
        frame = pd.DataFrame({"id": rng.permutation(n), "centroid": rng.integers(7, size=n)})
        frame["source"] = pd.Categorical(rng.choice(["web", "book", "talk"], n))
        strategy = RankingStrategy([keep]) if keep in frame else make_strategy(keep)
        with reading_stream("cuda"):
            order = strategy.order(on_gpu(cudf, frame), cluster_field="centroid", id_field="id")
            found = order.get()
        np.testing.assert_array_equal(found, strategy.order(frame, cluster_field="centroid", id_field="id"))

    def test_a_slice(self, cudf):
        rows = np.random.default_rng(0).standard_normal((3000, 16), dtype=np.float32)
        with reading_stream("cuda"):
            found = to_tensor(lists(cudf, rows).iloc[100:2000], name="x").cpu().numpy()
        np.testing.assert_array_equal(found, rows[100:2000])

    @pytest.mark.parametrize("clusters", [range(6), [f"c{number}" for number in range(6)]], ids=["integers", "strings"])
    @pytest.mark.parametrize("files", [2, 1000], ids=["several calls", "one call"])
    @pytest.mark.parametrize("keep", ["cosine_dist_to_cent", "date"])
    def test_files(self, cudf, frame, tmp_path, monkeypatch, clusters, files, keep):
        monkeypatch.setattr(cudf_reader, "files_at_once", lambda: files)
        write_layout(tmp_path, {cluster: [frame[number::6]] for number, cluster in enumerate(clusters)})
        options = {"ranking_strategy": RankingStrategy([keep])}
        expected = read_clusters(tmp_path).semdedup.pairwise(device="cpu", **options).compute(scheduler="synchronous")
        scores = read_clusters(tmp_path, backend="cudf").semdedup.pairwise(**options)
        for _ in range(2):
            found = scores.compute(scheduler="threads").to_pandas()
            in_order = [part.sort_values(["centroid", "id"], ignore_index=True) for part in (found, expected)]
            pd.testing.assert_frame_equal(*in_order, atol=2e-6, check_dtype=False, check_column_type=False)
