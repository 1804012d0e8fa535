"""k-means: the nearest centroids and distances of a float64 oracle, a fair sample, and ``ddf.semdedup.kmeans``."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dask.callbacks import Callback
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from dask_semdedup import EmbeddingError, InvalidArgumentError, MissingColumnsError
from dask_semdedup.frames.columns import Columns
from dask_semdedup.lazy import sampling
from dask_semdedup.lazy.sampling import draw
from dask_semdedup.steps import fit, kmeans
from dask_semdedup.steps.fit import KMeansOptions, default_n_clusters, fit_centroids
from dask_semdedup.steps.kmeans import Centroids, assign, check_centroids, distances, kmeans_partition, normalise
from tests.data import arrow_lists, blobs, in_partitions
from tests.strategies import KINDS, seeds


def unit64(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 0.5)


def distances64(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Euclidean distances of normalised rows to all centroids."""
    differences = unit64(rows)[:, None, :] - centroids.astype(np.float64)[None]
    return np.linalg.norm(differences, axis=2)


def assert_assigned(frame: pd.DataFrame, rows: np.ndarray, centroids: np.ndarray) -> None:
    """Clusters and distances are those of float64, outside rounding."""
    every = distances64(rows, centroids)
    label = frame["centroid"].to_numpy()
    own = np.take_along_axis(every, label[:, None].astype(np.int64), axis=1)[:, 0]
    # Squares are what float32 compares.
    assert (own**2 - every.min(axis=1) ** 2).max(initial=0) <= 4e-6
    np.testing.assert_allclose(frame["l2_dist_to_cent"], own, rtol=0, atol=1e-6)
    cosine = 1 - (unit64(rows) * unit64(centroids)[label]).sum(axis=1)
    np.testing.assert_allclose(frame["cosine_dist_to_cent"], cosine, rtol=0, atol=1e-6)
    assert frame.dtypes[["centroid", "l2_dist_to_cent", "cosine_dist_to_cent"]].tolist() == ["i4", "f4", "f4"]


@st.composite
def rows_and_centroids(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    width = draw(st.integers(1, 40))
    rng = draw(seeds())
    rows = draw(st.sampled_from(KINDS))(rng, draw(st.integers(1, 50)), width).astype(np.float32)
    centroids = draw(st.sampled_from(KINDS))(rng, draw(st.integers(1, 30)), width)
    return rows, unit64(centroids).astype(np.float32) * np.float32(draw(st.sampled_from([1, 0.5])))


# --- Assignment ------------------------------------------------------------------------------------------------------


@given(rows_and_centroids())
def test_every_row_is_in_its_nearest_cluster(data: tuple[np.ndarray, np.ndarray]) -> None:
    rows, centroids = data
    frame = pd.DataFrame({"id": range(len(rows)), "embeddings": arrow_lists(rows)})
    assert_assigned(kmeans_partition(frame, Centroids(centroids), columns=Columns()), rows, centroids)


@given(rows_and_centroids(), st.integers(1, 7), st.integers(1, 7))
def test_blocks_of_any_size(data: tuple[np.ndarray, np.ndarray], row_step: int, centroid_step: int) -> None:
    rows, centroids = unit64(data[0]).astype(np.float32), data[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kmeans.BLOCKS, "cpu", (row_step, centroid_step))
        labels = assign(torch.from_numpy(rows), torch.from_numpy(centroids)).numpy()
    assert labels.shape == (len(rows),)
    squares = distances64(rows, centroids) ** 2
    np.testing.assert_allclose(squares[np.arange(len(rows)), labels], squares.min(axis=1), rtol=0, atol=4e-6)


@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_ties_go_to_the_lowest_number(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setitem(kmeans.BLOCKS, "cpu", (2, step))
    corners = torch.eye(6)[[3, 0, 1, 4, 2]]
    rows = torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]]).float()
    assert assign(rows, corners).tolist() == [0, 4, 1, 2]


def test_of_equal_centroids_the_first_has_all_rows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 37)).astype(np.float32)
    few = rng.standard_normal((20, 37)).astype(np.float32)
    numbers = rng.integers(20, size=3000)
    frame = pd.DataFrame({"embeddings": arrow_lists(rows)})
    result = kmeans_partition(frame, Centroids(few[numbers]), columns=Columns())
    first = {number: int(np.flatnonzero(numbers == number)[0]) for number in set(numbers)}
    assert set(result["centroid"]) <= set(first.values())
    assert_assigned(result, rows, few[numbers])


def test_zero_and_minus_zero_are_one_centroid() -> None:
    assert Centroids(np.array([[0.0, 1.0], [-0.0, 1.0], [0.0, 2.0]], np.float32)).distinct.tolist() == [0, 2]


def test_memory_does_not_grow_with_clusters() -> None:
    """2,000 rows and 50,000 centroids: their product is 400 MB, and the centroids themselves are 77 MB."""
    script = (
        f"from {__name__} import Columns, arrow_lists"
        + """
from pathlib import Path
import numpy as np, pandas as pd, torch
from dask_semdedup.steps.kmeans import Centroids, kmeans_partition

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

rng = np.random.default_rng(0)
frame = pd.DataFrame({"embeddings": arrow_lists(rng.standard_normal((2000, 384), dtype="f4"))})
centroids = Centroids(rng.standard_normal((50_000, 384), dtype="f4"))
centroids.__dict__["distinct"] = np.arange(50_000)  # To find them takes memory, but not of the task.
kmeans_partition(frame[:10], Centroids(centroids.values[:10]), Columns())  # What a first call loads is not the work's.
before = resident("VmRSS")
result = kmeans_partition(frame, centroids, Columns())
extra = resident("VmHWM") - before
allowed = 2000 * 384 * 4 + 128e6
assert extra < allowed, (extra, allowed)
"""
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- Distances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-1, 1e-3, 1e-5, 0])
def test_small_distances_are_exact(scale: float) -> None:
    rng = np.random.default_rng(1)
    centroids = unit64(rng.standard_normal((3, 300))).astype(np.float32)
    labels = np.arange(200) % 3
    rows = (centroids[labels] + scale * rng.standard_normal((200, 300)) / 300**0.5).astype(np.float32)
    l2, cosine = distances(torch.from_numpy(rows), torch.from_numpy(centroids), torch.from_numpy(labels))
    truth = np.linalg.norm(unit64(rows) - centroids.astype(np.float64)[labels], axis=1)
    np.testing.assert_allclose(l2, truth, rtol=0, atol=1e-6)
    half = np.square(unit64(rows) - unit64(centroids)[labels]).sum(axis=1) / 2
    np.testing.assert_allclose(cosine, half, rtol=1e-5, atol=1e-14)
    assert cosine.min() >= 0


def test_a_zero_row_is_in_the_shortest_cluster_at_cosine_distance_1() -> None:
    frame = pd.DataFrame({"embeddings": arrow_lists(np.array([[0, 0], [0, 2]], np.float32))})
    result = kmeans_partition(frame, check_centroids([[0, 1], [0.5, 0]]), columns=Columns())
    assert result["centroid"].tolist() == [1, 0]
    assert result["cosine_dist_to_cent"].tolist() == [1, 0]
    assert result["l2_dist_to_cent"].tolist() == [0.5, 0]
    assert rows_of(result)[0].tolist() == [0, 0]


def test_a_zero_centroid_is_at_cosine_distance_1() -> None:
    frame = pd.DataFrame({"embeddings": arrow_lists(np.array([[0, 3]], np.float32))})
    assert kmeans_partition(frame, check_centroids([[0, 0]]), columns=Columns())["cosine_dist_to_cent"].tolist() == [1]


# --- Normalisation ---------------------------------------------------------------------------------------------------


def test_unit_rows_are_kept_as_they_are() -> None:
    rows = torch.nn.functional.normalize(torch.randn(1000, 50, generator=torch.manual_seed(0)), dim=1)
    assert normalise(rows) is rows
    frame = pd.DataFrame({"embeddings": arrow_lists(rows.numpy())})
    result = kmeans_partition(frame, Centroids(rows[:3].numpy()), columns=Columns())
    addresses = [
        f["embeddings"].array.__arrow_array__().chunk(0).flatten().buffers()[1].address for f in (frame, result)
    ]
    assert addresses[0] == addresses[1]


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch, in_place: bool) -> None:
    """Unit rows keep their bits beside others that must be scaled."""
    monkeypatch.setitem(kmeans.CHUNK_BYTES, "cpu", 4 * 8 * 16)
    unit = torch.nn.functional.normalize(torch.randn(100, 8, generator=torch.manual_seed(0)), dim=1)
    factors = torch.where(torch.arange(100) % 3 == 0, 3.0, 1.0)
    factors[:40] = 1
    rows = unit * factors[:, None]
    before = rows.clone()
    result = normalise(rows, in_place=in_place)
    assert torch.equal(result[factors == 1], unit[factors == 1])
    torch.testing.assert_close(result, unit)
    assert (result is rows) == in_place
    assert in_place or torch.equal(rows, before)


def test_input_is_not_written_to() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    frame = pd.DataFrame({"embeddings": arrow_lists(rows)})
    kmeans_partition(frame, Centroids(rows[:2]), columns=Columns())
    np.testing.assert_array_equal(np.array(frame["embeddings"].tolist()), rows)


# --- Fitting ---------------------------------------------------------------------------------------------------------


def test_centroids_do_not_depend_on_the_number_of_threads() -> None:
    rows = np.random.default_rng(0).standard_normal((5000, 64)).astype(np.float32)
    found = []
    for limit in (1, 2):
        with threadpool_limits(limit):
            found.append(fit_centroids(rows.copy(), 20))
    assert found[0].tobytes() == found[1].tobytes()


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
@pytest.mark.parametrize("most", [1 << 28, 0], ids=["all rows", "mini-batches"])
def test_a_fit_finds_the_corners(monkeypatch: pytest.MonkeyPatch, init: str, most: int) -> None:
    monkeypatch.setattr(fit, "PAIRS_WORTH_MINI_BATCHES", most)
    rows, labels = blobs(800)
    centroids = fit_centroids(rows, 4, KMeansOptions(init=init, n_init=5))
    assert centroids.dtype == np.float32
    found = assign(torch.from_numpy(rows), torch.from_numpy(centroids)).numpy()
    assert len(set(zip(labels, found, strict=True))) == 4


def test_on_a_gpu_cuml_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    class KMeans:
        def __init__(self, **arguments: object) -> None:
            asked.update(arguments)

        def fit(self, rows: np.ndarray) -> KMeans:
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
            self.cluster_centers_ = rows[:2].astype(np.float64)
            return self

    cuml, cupy = ModuleType("cuml"), ModuleType("cupy")
    cuml.KMeans, cupy.asarray = KMeans, np.asarray  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuml", cuml)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "cuml")
    centroids = fit_centroids(blobs(50)[0], 2, KMeansOptions(oversampling_factor=1.5), device="cuda")
    assert centroids.dtype == np.float32
    assert asked == {
        "n_clusters": 2,
        "max_iter": 300,
        "tol": 1e-4,
        "random_state": 42,
        "init": "k-means||",
        "n_init": "auto",
        "oversampling_factor": 1.5,
        "max_samples_per_batch": 32_768,
        "output_type": "numpy",
    }


def test_default_n_clusters_parts_no_rows_that_can_be_searched_at_once() -> None:
    rows = range(1, 10**8, 99_991)
    numbers = [default_n_clusters(n) for n in rows]
    assert numbers == sorted(numbers)
    assert all(k == 1 or n / k >= 50_000 for n, k in zip(rows, numbers, strict=True))
    assert default_n_clusters(99_999) == 1


# --- Sampling --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=80).filter(any), st.data(), st.integers(0, 2**32 - 1))
def test_a_sample_has_its_size_and_no_row_twice(lengths: list[int], data: st.DataObject, seed: int) -> None:
    size = data.draw(st.integers(1, sum(lengths)))
    picks = draw(lengths, size, seed)
    assert sum(map(len, picks.values())) == size
    assert list(picks) == sorted(picks)
    for number, positions in picks.items():
        assert len(positions) > 0
        assert len(set(positions)) == len(positions)
        assert 0 <= min(positions) <= max(positions) < lengths[number]
    again = draw(lengths, size, seed)
    assert all(np.array_equal(picks[number], again[number]) for number in picks)


def test_a_sample_is_even_over_rows_and_reads_few_partitions() -> None:
    lengths = [100, 300] * 100
    counts = np.zeros(len(lengths))
    for seed in range(200):
        picks = draw(lengths, 400, seed)
        assert len(picks) <= sampling.MIN_PARTITIONS
        for number, positions in picks.items():
            counts[number] += len(positions)
    ratio = counts[1::2].sum() / counts[::2].sum()
    assert 2.7 < ratio < 3.3


@pytest.mark.parametrize(
    ("lengths", "size"),
    [([200_000] + [100] * 2000, 16_384), ([3] * 500 + [7] * 300 + [40_000] * 3, 900), ([1] * 1000 + [999] * 40, 64)],
    ids=["a large one", "three large ones", "many tiny ones"],
)
def test_each_row_has_the_same_chance_whatever_the_sizes(lengths: list[int], size: int) -> None:
    sizes = np.array(lengths)
    drawn = np.zeros(len(lengths))
    runs = 60
    for seed in range(runs):
        for number, positions in draw(lengths, size, seed).items():
            drawn[number] += len(positions)
    for length in np.unique(sizes):
        share = (length * (sizes == length)).sum() / sizes.sum()
        # Five standard deviations of a share of all that was drawn, were each choice its own.
        choices = runs * max(sampling.MIN_PARTITIONS, 1)
        assert drawn[sizes == length].sum() / (runs * size) == pytest.approx(
            share, abs=5 * np.sqrt(share * (1 - share) / choices)
        )


def test_a_sample_of_a_large_and_many_small_partitions_has_rows_of_both() -> None:
    for seed in range(20):
        picks = draw([200_000] + [100] * 2000, 16_384, seed)
        assert 0.45 < len(picks[0]) / 16_384 < 0.55
        assert len(picks) < 400


def test_billions_of_rows_can_be_drawn_from() -> None:
    assert sum(map(len, draw([5 * 10**8] * 30, 1000, 0).values())) == 1000


def write_raw(root: Path, rows: np.ndarray, files: int) -> dd.DataFrame:
    root.mkdir()
    table = pa.table({"id": np.arange(len(rows)), "text": ["not needed"] * len(rows), "embeddings": list(rows)})
    step = -(-len(rows) // files)
    for number in range(files):
        pq.write_table(table.slice(number * step, step), root / f"{number}.parquet")
    return dd.read_parquet(root)


def test_only_some_partitions_are_read_for_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ddf = write_raw(tmp_path / "raw", blobs(400)[0], files=20)
    monkeypatch.setattr(sampling, "MIN_PARTITIONS", 1)
    taken = []
    take = sampling.take_embeddings

    def watched(frame: pd.DataFrame, *arguments: object) -> np.ndarray:
        taken.append(list(frame.columns))
        return take(frame, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sampling, "take_embeddings", watched)
    ddf.semdedup.fit_centroids(1, fit_data_fraction=0.1)
    assert 0 < len(taken) <= 9
    assert all(sorted(columns) == ["embeddings", "id"] for columns in taken)


def test_no_partition_waits_in_memory_for_its_rows_to_be_taken(tmp_path: Path) -> None:
    ddf = write_raw(tmp_path / "raw", blobs(400)[0], files=20)
    ran = set()
    with Callback(pretask=lambda key, *_: ran.add(key)):
        ddf.semdedup.fit_centroids(1)
    assert len(ran) == 20


# --- The accessor ----------------------------------------------------------------------------------------------------


@pytest.fixture
def raw() -> pd.DataFrame:
    rows, _ = blobs(300)
    return pd.DataFrame({"id": np.arange(300) + 1000, "embeddings": arrow_lists(rows), "text": "words"})


def rows_of(frame: pd.DataFrame) -> np.ndarray:
    return np.array([np.asarray(row) for row in frame["embeddings"]])


def test_a_frame_is_clustered(raw: pd.DataFrame) -> None:
    ddf = in_partitions(raw)
    clustered = ddf.semdedup.kmeans(4)
    result = clustered.compute()
    assert result.dtypes.to_dict() == clustered.dtypes.to_dict()
    assert list(result) == ["id", "embeddings", "text", "centroid", "l2_dist_to_cent", "cosine_dist_to_cent"]
    assert result["embeddings"].dtype == pd.ArrowDtype(pa.list_(pa.float32()))
    pd.testing.assert_frame_equal(result[["id", "text"]], ddf[["id", "text"]].compute())
    np.testing.assert_allclose(rows_of(result), unit64(rows_of(raw)), rtol=0, atol=1e-6)
    assert_assigned(result, rows_of(raw), ddf.semdedup.fit_centroids(4))


def test_it_is_lazy_after_the_fit(raw: pd.DataFrame) -> None:
    raw.at[7, "embeddings"] = None
    clustered = in_partitions(raw).semdedup.kmeans(centroids=np.eye(6))
    with pytest.raises(EmbeddingError, match=r"'embeddings'.*1 row with a null embedding.*ids 1007"):
        clustered.compute()


def layouts(rows: np.ndarray) -> dict[str, pd.Series]:
    halves = rows.astype(np.float16)
    arrow = {
        "halves": pa.array(list(halves), pa.list_(pa.float16())),
        "bits": pa.array(list(halves.view(np.uint16)), pa.list_(pa.uint16())),
        "doubles": pa.array(list(halves.astype(np.float64)), pa.list_(pa.float64())),
        "large": pa.array(list(halves.astype(np.float32)), pa.large_list(pa.float32())),
        "fixed": pa.array(list(halves.astype(np.float32)), pa.list_(pa.float32(), rows.shape[1])),
    }
    columns = {name: pd.Series(pd.array(lists, dtype=pd.ArrowDtype(lists.type))) for name, lists in arrow.items()}
    columns["objects"] = pd.Series(list(halves), dtype=object)
    columns["lists"] = pd.Series(halves.tolist(), dtype=object)
    return columns


@pytest.mark.parametrize("layout", ["halves", "bits", "doubles", "large", "fixed", "objects", "lists"])
def test_every_embedding_column_will_do(raw: pd.DataFrame, layout: str) -> None:
    rows, _ = blobs(300)
    raw["embeddings"] = layouts(rows)[layout]
    with dask.config.set({"dataframe.convert-string": False}):
        clustered = in_partitions(raw).semdedup.kmeans(4)
        result = clustered.compute()
    assert result.dtypes.to_dict() == clustered.dtypes.to_dict()
    rows = rows.astype(np.float16)
    assert_assigned(result, rows, fit_centroids(rows.astype(np.float32), 4))


def test_empty_partitions(raw: pd.DataFrame) -> None:
    ddf = in_partitions(raw, 5)
    ddf = ddf[ddf["id"] < 1100]
    clustered = ddf.semdedup.kmeans(2)
    parts = dask.compute(*clustered.to_delayed())
    assert 0 in map(len, parts)
    assert all(part.dtypes.to_dict() == clustered.dtypes.to_dict() for part in parts)
    assert sum(map(len, parts)) == 100


def test_columns_that_were_there_are_replaced(raw: pd.DataFrame) -> None:
    old = raw.assign(centroid="old", cosine_dist_to_cent=7, kept=1)
    centroids = np.eye(6)
    ddf = in_partitions(old)
    result = ddf.semdedup.kmeans(centroids=centroids)
    expected = in_partitions(raw.assign(kept=1)).semdedup.kmeans(centroids=centroids)
    pd.testing.assert_frame_equal(result.compute(), expected.compute())
    pd.testing.assert_frame_equal(result[["centroid", "id"]].compute(), expected[["centroid", "id"]].compute())


@pytest.mark.parametrize(
    "columns",
    [["id", "centroid"], ["centroid"], ["id", "embeddings"], ["embeddings"], ["text"]],
    ids=",".join,
)
def test_only_needed_columns_are_read(tmp_path: Path, columns: list[str]) -> None:
    ddf = write_raw(tmp_path / "raw", blobs(90)[0], files=3)
    clustered = ddf.semdedup.kmeans(2)
    pd.testing.assert_frame_equal(clustered[columns].compute(), clustered.compute()[columns])
    read = {
        name
        for expr in clustered[columns].optimize(fuse=False).expr.walk()
        if "read" in expr._name and expr.ndim == 2
        for name in expr.columns
    }
    assert read == {"id", "embeddings", *columns} - {"centroid"}


def test_one_column_is_a_series(raw: pd.DataFrame) -> None:
    clustered = in_partitions(raw).semdedup.kmeans(centroids=np.eye(6))
    pd.testing.assert_series_equal(clustered["centroid"].compute(), clustered.compute()["centroid"])
    assert len(clustered) == len(raw)


def test_centroids_are_in_the_graph_once(raw: pd.DataFrame) -> None:
    rng = np.random.default_rng(0)
    clustered = in_partitions(raw, 10).semdedup.kmeans(centroids=rng.standard_normal((20_000, 6)))
    graph = dict(clustered.optimize().__dask_graph__())
    assert len(pickle.dumps(graph)) < 1.5 * 20_000 * 6 * 4


def test_frames_of_other_centroids_have_other_names(raw: pd.DataFrame) -> None:
    ddf = in_partitions(raw)
    first, again, other = (ddf.semdedup.kmeans(centroids=scale * np.eye(6)) for scale in (1, 1, 2))
    assert first._name == again._name
    assert first._name != other._name


def test_a_fit_is_kept_in_a_file(raw: pd.DataFrame, tmp_path: Path) -> None:
    ddf = in_partitions(raw)
    np.save(tmp_path / "centroids.npy", ddf.semdedup.fit_centroids(3))
    expected = ddf.semdedup.kmeans(3).compute()
    for path in (tmp_path / "centroids.npy", f"file://{tmp_path}/centroids.npy"):
        pd.testing.assert_frame_equal(ddf.semdedup.kmeans(centroids=path).compute(), expected)


def test_a_fit_depends_on_seed_and_rows_alone(raw: pd.DataFrame) -> None:
    ddf = in_partitions(raw)
    fits = [ddf.semdedup.fit_centroids(4, fit_data_fraction=0.6, random_state=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(fits[0], fits[1])
    assert not np.array_equal(fits[0], fits[2])


def test_the_default_number_of_clusters(raw: pd.DataFrame) -> None:
    assert len(in_partitions(raw).semdedup.fit_centroids()) == default_n_clusters(300)


def test_clusters_go_into_pairwise(raw: pd.DataFrame) -> None:
    raw = pd.concat([raw, raw.assign(id=raw["id"] + 1000)], ignore_index=True)
    scores = in_partitions(raw).semdedup.kmeans(4).semdedup.pairwise().compute()
    assert (scores["cosine_sim_score"] > 0.999999).sum() >= 300


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_few_rows_a_cluster_are_warned_of(raw: pd.DataFrame, recwarn: pytest.WarningsRecorder) -> None:
    ddf = in_partitions(raw)
    ddf.semdedup.fit_centroids(7)
    assert not [w for w in recwarn if w.category is UserWarning]
    with pytest.warns(UserWarning, match="fitted to 300 rows for 8 clusters, fewer than 40 a cluster") as warned:
        ddf.semdedup.kmeans(8)
    # It points to who asked, not into the package.
    assert warned[0].filename == __file__


def test_a_single_cluster_of_few_rows_is_no_chance(raw: pd.DataFrame, recwarn: pytest.WarningsRecorder) -> None:
    in_partitions(raw.head(3)).semdedup.kmeans().compute()
    assert not [w for w in recwarn if w.category is UserWarning]


def test_first_centroids_are_no_init(raw: pd.DataFrame) -> None:
    with pytest.raises(InvalidArgumentError, match=r"init must be one of .*'random', not a ndarray"):
        in_partitions(raw).semdedup.kmeans(2, init=np.eye(16)[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_clusters": 301}, "n_clusters is 301, but there are only 300 rows"),
        ({"n_clusters": 31, "fit_data_fraction": 0.1}, "only 30 rows in the sample"),
        ({"n_clusters": 0}, "n_clusters must be a positive integer"),
        ({"fit_data_fraction": 0}, "fit_data_fraction must be"),
        ({"fit_data_fraction": 1.5}, "fit_data_fraction must be"),
        ({"init": "best"}, "init must be one of"),
        ({"n_init": 0}, "n_init must be"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"tol": -1}, "tol must be"),
        ({"random_state": -1}, "random_state must be"),
        ({"device": "tpu"}, "device must be"),
        ({"centroids": np.eye(6), "n_clusters": 5}, "n_clusters is 5, but there are 6 centroids"),
        ({"centroids": [1.0, 2.0]}, "centroids must be a matrix"),
        ({"centroids": np.empty((0, 6))}, "centroids must be a matrix"),
        ({"centroids": [[1.0, np.nan]]}, "NaN or infinite"),
        ({"cluster_field": "embeddings"}, "cluster_field may not be 'embeddings'"),
        ({"cluster_field": "id"}, "cluster_field may not be 'id'"),
        ({"cluster_field": "l2_dist_to_cent"}, "cluster_field may not be"),
        ({"id_field": "centroid"}, "'centroid'"),
        ({"id_field": "cosine_dist_to_cent"}, "id_field may not be"),
    ],
    ids=str,
)
def test_bad_arguments(raw: pd.DataFrame, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        in_partitions(raw).semdedup.kmeans(**arguments)


def test_a_file_that_is_not_npy(raw: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "centroids.npy").write_bytes(b"\x93NUMPY" + bytes(3))
    with pytest.raises(InvalidArgumentError, match=r"centroids\.npy.*not a \.npy file"):
        in_partitions(raw).semdedup.kmeans(centroids=tmp_path / "centroids.npy")


def test_centroids_of_another_width(raw: pd.DataFrame) -> None:
    clustered = in_partitions(raw).semdedup.kmeans(centroids=np.eye(5))
    with pytest.raises(EmbeddingError, match=r"'embeddings'.*width 6.*centroids are of width 5"):
        clustered.compute()
    raw["embeddings"] = layouts(blobs(300)[0])["fixed"]
    with pytest.raises(EmbeddingError, match="of width 6"):
        in_partitions(raw).semdedup.kmeans(centroids=np.eye(5))


def test_no_embeddings_and_no_rows(raw: pd.DataFrame) -> None:
    ddf = in_partitions(raw)
    with pytest.raises(MissingColumnsError, match=r"\['vectors'\].*embedding_field"):
        ddf.semdedup.kmeans(2, embedding_field="vectors")
    with pytest.raises(EmbeddingError, match="'text'"):
        ddf.semdedup.kmeans(2, embedding_field="text")
    with pytest.raises(InvalidArgumentError, match="no rows"):
        ddf[ddf["id"] < 0].semdedup.kmeans(2)


def test_bad_rows_of_the_sample_stop_the_fit(raw: pd.DataFrame) -> None:
    rows = rows_of(raw)
    rows[0] = np.nan
    raw["embeddings"] = arrow_lists(rows)
    with pytest.raises(EmbeddingError, match=r"1 row with NaN.*ids 1000"):
        in_partitions(raw).semdedup.kmeans(4)


def test_a_gpu_that_is_not_there(raw: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidArgumentError, match="sees no CUDA device"):
        in_partitions(raw).semdedup.kmeans(centroids=np.eye(6), device="cuda").compute()


def test_centroids_that_change_later_change_nothing(raw: pd.DataFrame) -> None:
    centroids = np.eye(6, dtype=np.float32)
    clustered = in_partitions(raw).semdedup.kmeans(centroids=centroids)
    expected = clustered["centroid"].compute()
    centroids[:] = centroids[::-1].copy()
    pd.testing.assert_series_equal(clustered["centroid"].compute(), expected)
