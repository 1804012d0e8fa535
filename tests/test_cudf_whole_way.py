"""From raw embeddings to what is left, on cuDF partitions: the same answers as on pandas partitions."""

from __future__ import annotations

from unittest.mock import patch

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_semdedup import EmbeddingError, IdError, InvalidArgumentError, read_clusters, read_table
from dask_semdedup.frames.backend import is_cudf
from dask_semdedup.steps.groups import resolve_groups
from tests.data import arrow_lists
from tests.lazy.test_join import indexed

pytestmark = pytest.mark.gpu

N = 400


@pytest.fixture(scope="module")
def cudf():
    return pytest.importorskip("cudf")


@pytest.fixture(params=["integers", "strings"])
def frame(request) -> pd.DataFrame:
    """Half of the rows are near-copies of the other half."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((N, 16)).astype(np.float32)
    rows[N // 2 :] = rows[: N // 2] + 1e-3 * rng.standard_normal((N // 2, 16)).astype(np.float32)
    ids = np.arange(N) if request.param == "integers" else [f"doc-{i:04d}" for i in range(N)]
    return pd.DataFrame({"id": ids, "embeddings": arrow_lists(rows, pa.float32()), "text": [*map(str, range(N))]})


def on_gpu(cudf, frame: pd.DataFrame, npartitions: int = 3) -> dd.DataFrame:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    return dd.from_pandas(cudf.DataFrame.from_arrow(table), npartitions=npartitions)


def on_cpu(frame: pd.DataFrame, npartitions: int = 3) -> dd.DataFrame:
    return dd.from_pandas(frame, npartitions=npartitions)


def computed(ddf: dd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The rows in one order; what is lazy must say what comes."""
    frame = ddf.compute()
    assert is_cudf(frame)
    assert ddf._meta.dtypes.to_dict() == frame.dtypes.to_dict()
    return frame.to_pandas().sort_values(by, ignore_index=True)


def check_alike(ours: pd.DataFrame, theirs: pd.DataFrame, by: list[str]) -> None:
    theirs = theirs.sort_values(by, ignore_index=True)
    assert list(ours.columns) == list(theirs.columns)
    for name in ours.columns:
        if ours[name].dtype.kind == "f":
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-6)
        else:
            assert ours[name].tolist() == theirs[name].tolist(), name


CENTROIDS = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)


@pytest.mark.parametrize("keep", ["hard", "random"])
def test_scores(cudf, frame, keep):
    scores = [
        ddf.semdedup.kmeans(centroids=CENTROIDS).semdedup.pairwise(which_to_keep=keep)
        for ddf in (on_gpu(cudf, frame), on_cpu(frame))
    ]
    check_alike(computed(scores[0], ["id"]), scores[1].compute(), ["id"])


def test_a_fit_on_the_gpu_groups_what_belongs_together(cudf):
    pytest.importorskip("cuml")
    rng = np.random.default_rng(2)
    truth = np.repeat(np.arange(8), 100)
    rows = np.eye(8, 16)[truth] + 0.05 * rng.standard_normal((800, 16))
    frame = pd.DataFrame({"id": range(800), "embeddings": arrow_lists(rows, pa.float32())})
    clusters = on_gpu(cudf, frame).semdedup.kmeans(8)[["id", "centroid"]].compute().to_pandas().sort_values("id")
    pairs = {(int(a), int(b)) for a, b in zip(truth, clusters["centroid"], strict=True)}
    assert len(pairs) == 8


def test_layout(cudf, frame, tmp_path):
    clustered = on_gpu(cudf, frame).semdedup.kmeans(centroids=CENTROIDS)
    files = clustered.semdedup.to_clusters(str(tmp_path / "clusters"))
    assert sorted(files) == sorted(clustered["centroid"].compute().to_pandas().unique())
    read = read_clusters(tmp_path / "clusters", backend="cudf")
    expected = clustered[["id", "text", "centroid"]].compute().to_pandas()
    check_alike(computed(read[["id", "text", "centroid"]], ["id"]), expected, ["id"])
    scores = computed(read.semdedup.pairwise(), ["id"])
    expected = on_cpu(frame).semdedup.kmeans(centroids=CENTROIDS).semdedup.pairwise().compute()
    check_alike(scores, expected, ["id"])


@pytest.mark.parametrize("theirs", ["integers", "strings"])
def test_against(cudf, frame, theirs):
    reference = frame[: N // 2]
    if theirs == "strings":
        reference = reference.assign(id=[f"ref-{i}" for i in range(N // 2)])
    new = frame[N // 2 :]
    found = [
        make(new, npartitions=2).semdedup.against(make(reference), eps=None, centroids=CENTROIDS)
        for make in (lambda part, npartitions=3: on_gpu(cudf, part, npartitions), on_cpu)
    ]
    check_alike(computed(found[0], ["id"]), found[1].compute(), ["id"])


def test_duplicates_at_several_eps_and_their_curve(cudf, frame):
    scores = [
        ddf.semdedup.kmeans(centroids=CENTROIDS).semdedup.pairwise() for ddf in (on_gpu(cudf, frame), on_cpu(frame))
    ]
    grid = [0.001, 0.01, 0.5]
    flags = [part.semdedup.duplicates(grid) for part in scores]
    check_alike(computed(flags[0], ["id"]), flags[1].compute(), ["id"])
    curves = [part.semdedup.eps_curve(grid).compute() for part in scores]
    curves[0] = curves[0].to_pandas() if is_cudf(curves[0]) else curves[0]
    check_alike(curves[0], curves[1], ["eps"])


def test_groups(cudf, frame):
    scores = [
        ddf.semdedup.kmeans(centroids=CENTROIDS).semdedup.pairwise() for ddf in (on_gpu(cudf, frame), on_cpu(frame))
    ]
    groups = [part.semdedup.groups(0.3) for part in scores]
    check_alike(computed(groups[0], ["id"]), groups[1].compute(), ["id"])


def test_a_circle_is_an_error(cudf):
    with pytest.raises(IdError, match="form a cycle"):
        resolve_groups(cudf.DataFrame({"id": [1, 2], "max_id": [2, 1]}))


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("duplicates_are", ["cudf", "pandas", "dask"])
def test_remove(cudf, frame, broadcast, duplicates_are):
    lost = frame[["id"]].iloc[::7]
    duplicates = {"pandas": lost, "cudf": on_gpu(cudf, lost, 1).compute(), "dask": on_gpu(cudf, lost, 2)}[
        duplicates_are
    ]
    kept = computed(on_gpu(cudf, frame).semdedup.remove(duplicates, broadcast=broadcast)[["id", "text"]], ["id"])
    expected = frame[~frame["id"].isin(lost["id"])][["id", "text"]]
    check_alike(kept, expected, ["id"])


def test_remove_compares_integers_of_any_width(cudf):
    data = dd.from_pandas(cudf.DataFrame({"id": cudf.Series([1, 2, 3], dtype="int32")}), npartitions=1)
    for dtype in ("int64", "uint64", "int8"):
        lost = cudf.DataFrame({"id": cudf.Series([2], dtype=dtype)})
        assert data.semdedup.remove(lost).compute()["id"].to_pandas().tolist() == [1, 3]


def test_ids_that_repeat_or_are_of_another_type_are_refused(cudf):
    data = dd.from_pandas(cudf.DataFrame({"id": [1, 1, 2]}), npartitions=1)
    with pytest.raises(IdError, match=r"'id': 1 id of the duplicates occurs in several rows of the data \(ids 1\)"):
        data.semdedup.remove(cudf.DataFrame({"id": [1]})).compute()
    with pytest.raises(InvalidArgumentError, match="Ids of different types"):
        data.semdedup.remove(cudf.DataFrame({"id": ["1"]}))


def test_deduplicate(cudf, frame):
    kept = [
        ddf.semdedup.deduplicate(0.01, centroids=CENTROIDS)[["id", "text"]]
        for ddf in (on_gpu(cudf, frame), on_cpu(frame))
    ]
    ours = computed(kept[0], ["id"])
    check_alike(ours, kept[1].compute(), ["id"])
    assert len(ours) == N // 2


@pytest.mark.parametrize(("k", "share"), [(0, 6), (12, 6), (12, 1 << 40), (1, 1 << 40)])
@pytest.mark.parametrize("which_to_keep", ["hard", "random"])
@pytest.mark.parametrize("duplicate_of", ["any", "kept"])
def test_compared_with_all_others(cudf, frame, k, share, which_to_keep, duplicate_of):
    """By one search, or by sketches and cells that stay on the GPU or do not: the bits are those of the CPU's cells."""
    rows = np.array(frame["embeddings"].tolist(), np.float32)
    wide = frame.assign(embeddings=arrow_lists(np.hstack([rows, 0.3 * rows[:, ::-1]] * 2), pa.float32()))
    options = {"which_to_keep": which_to_keep, "duplicate_of": duplicate_of, "cluster_field": None, "eps": 0.05}
    device = lambda ddf, options: "cuda" if is_cudf(ddf._meta) else "cpu"  # noqa: E731
    with indexed(k, GPU_SHARE=share), patch("dask_semdedup.lazy.join._device", device):
        scores = [ddf.semdedup.pairwise(**options) for ddf in (on_gpu(cudf, wide), on_cpu(wide))]
        near = [
            make(wide[N // 2 :]).semdedup.against(make(wide[: N // 2]), eps=0.05)
            for make in (lambda part: on_gpu(cudf, part), on_cpu)
        ]
    for ours, theirs in (scores, near):
        found = ours.compute()
        assert is_cudf(found)
        assert ours._meta.dtypes.to_dict() == found.dtypes.to_dict()
        pd.testing.assert_frame_equal(found.to_pandas(), theirs.compute(), check_dtype=False, check_exact=True)
    assert len(scores[1].compute()) >= N // 2


def test_deduplicate_completely(cudf, frame):
    kept = [ddf.semdedup.deduplicate(0.01)[["id", "text"]] for ddf in (on_gpu(cudf, frame), on_cpu(frame))]
    ours = computed(kept[0], ["id"])
    check_alike(ours, kept[1].compute(), ["id"])
    assert len(ours) == N // 2


@pytest.fixture
def files(frame, tmp_path) -> str:
    for number in range(3):
        table = pa.Table.from_pandas(frame.iloc[number::3], preserve_index=False)
        # Dask-cuDF cannot read what pandas says there about columns of lists.
        pq.write_table(table.replace_schema_metadata(None), tmp_path / f"{number}.parquet")
    return str(tmp_path)


def test_files_read_into_the_memory_of_the_gpu(cudf, files, frame):
    ours = read_table(files, backend="cudf", make_ids=True, id_field="row")
    theirs = read_table(files, backend="pandas", make_ids=True, id_field="row")
    check_alike(computed(ours[["row", "id", "text"]], ["id"]), theirs[["row", "id", "text"]].compute(), ["id"])
    with dask.config.set({"dataframe.backend": "cudf"}):
        kept = read_table(files, partition_size=4096).semdedup.deduplicate(0.01)
    assert kept.npartitions == 3
    check_alike(
        computed(kept[["id", "text"]], ["id"]),
        read_table(files, backend="pandas").semdedup.deduplicate(0.01)[["id", "text"]].compute(),
        ["id"],
    )


def test_frames_of_dask_cudf(cudf, files, frame):
    """It takes columns of lists for strings until they are read."""
    dask_cudf = pytest.importorskip("dask_cudf")
    kept = dask_cudf.read_parquet(files).semdedup.deduplicate(0.01)[["id", "text"]].compute()
    assert is_cudf(kept)
    theirs = read_table(files, backend="pandas").semdedup.deduplicate(0.01)[["id", "text"]].compute()
    check_alike(kept.to_pandas().sort_values("id", ignore_index=True), theirs, ["id"])
    with pytest.raises(EmbeddingError, match=r"'text'.*strings"):
        dask_cudf.read_parquet(files).semdedup.pairwise(cluster_field=None, eps=0.1, embedding_field="text").compute()
