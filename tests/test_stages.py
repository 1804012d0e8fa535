from __future__ import annotations

import importlib
import logging
import pickle
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import dask
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given

from dask_semdedup import stages
from dask_semdedup.errors import (
    DataNotFoundError,
    DataReadError,
    EmbeddingError,
    InvalidArgumentError,
    MissingColumnsError,
    MissingDependencyError,
)
from dask_semdedup.lazy import clusters, planning
from dask_semdedup.stages import (
    ClusterWiseFilePartitioningStage,
    FileGroupTask,
    PairwiseCosineSimilarityStage,
    PairwiseStage,
    Resources,
    pairwise_cosine_similarity_batched,
)
from dask_semdedup.steps.ranking import RankingStrategy, make_strategy
from tests.data import GOLDEN, NORMED, check_hard, write_layout
from tests.oracle import assert_nearest_earlier
from tests.strategies import rows_and_segments

HARD = make_strategy("hard")
NAMES = {"id_field": "id", "embedding_field": "embeddings", "output_path": "out"}


@pytest.fixture
def golden(tmp_path) -> Path:
    """The golden rows as two clusters of the k-means layout, the first in two files, and a third of one row."""
    return write_layout(tmp_path / "input", {0: [GOLDEN[:2], GOLDEN[2:]], 10: [GOLDEN], 9: [GOLDEN[:1]]})


def similarity(output: Path | str, ranking: RankingStrategy = HARD, **arguments) -> PairwiseCosineSimilarityStage:
    return PairwiseCosineSimilarityStage("id", "embeddings", str(output), ranking, **arguments)


def task(cluster=0, files=(), **metadata) -> FileGroupTask:
    metadata = {"centroid_id": cluster, "filetype": "parquet"} | metadata
    return FileGroupTask("docs", [str(file) for file in files], _metadata=metadata, task_id=f"task-{cluster}")


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [*product([torch.float32, torch.float64], [1.0, 3.0]), (torch.float64, 1e39), (torch.float64, 1e-60)],
)
def test_golden_similarities_for_every_batch_size(dtype, scale):
    for batch_size in (1, 2, 3, 4, 5, 6, 7, 1024):
        scores, index = pairwise_cosine_similarity_batched(torch.tensor(NORMED * scale, dtype=dtype), batch_size)
        assert isinstance(scores, np.ndarray)
        assert isinstance(index, np.ndarray)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, [0, 0.974631, 0.998190, 0.999618, 1, 1], atol=2e-6)
        assert index.tolist() == [0, 0, 1, 2, 0, 0], batch_size


@given(rows_and_segments(max_segments=1))
def test_similarities_are_exact(case):
    rows, segments = case
    assert_nearest_earlier(rows, segments, *pairwise_cosine_similarity_batched(torch.from_numpy(rows), 7))


@pytest.mark.parametrize("rows", [0, 1])
def test_similarities_of_hardly_any_rows(rows):
    scores, index = pairwise_cosine_similarity_batched(torch.ones(rows, 3))
    assert scores.tolist() == [0.0] * rows
    assert index.tolist() == [0] * rows


def test_similarities_of_rows_that_are_not_finite_are_refused():
    with pytest.raises(EmbeddingError, match="NaN or infinite values in rows 1, 3"):
        pairwise_cosine_similarity_batched(torch.tensor([[1.0], [np.nan], [2.0], [np.inf]]))


@pytest.mark.gpu
def test_similarities_of_cuda_tensors_are_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    scores, index = pairwise_cosine_similarity_batched(torch.tensor(NORMED).cuda())
    assert isinstance(scores, cupy.ndarray)
    assert index.tolist() == [0, 0, 1, 2, 0, 0]


def test_tasks_count_their_files_and_survive_pickling():
    some = task(3, ["a", "b"])
    assert some.num_items == 2
    assert FileGroupTask(dataset_name="docs").data == []
    assert pickle.loads(pickle.dumps(some)) == some


@pytest.mark.parametrize("as_url", [False, True])
def test_partitioning_makes_one_task_a_cluster(golden, as_url):
    stage = ClusterWiseFilePartitioningStage(f"file://{golden}/" if as_url else str(golden))
    tasks = stage.process()
    assert [task._metadata for task in tasks] == [{"centroid_id": k, "filetype": "parquet"} for k in (0, 9, 10)]
    assert [task.num_items for task in tasks] == [2, 1, 1]
    assert {task.dataset_name for task in tasks} == {"input"}
    assert tasks[0].data == [f"{golden}/centroid=0/part.{number}.parquet" for number in range(2)]


def test_partitioning_refuses_a_folder_without_clusters(tmp_path):
    with pytest.raises(DataNotFoundError, match="No Parquet files"):
        ClusterWiseFilePartitioningStage(str(tmp_path)).process()


@pytest.mark.parametrize("batch_size", [1, 4, 1024])
@pytest.mark.parametrize("read_kwargs", [None, {"memory_map": True}], ids=["plain", "with read_kwargs"])
def test_a_cluster_of_several_files(golden, tmp_path, read_kwargs, batch_size):
    stage = similarity(tmp_path / "out", pairwise_batch_size=batch_size, read_kwargs=read_kwargs)
    before = task(0, sorted((golden / "centroid=0").iterdir()), extra="kept")
    before._stage_perf.append("statistics")
    after = stage.process(before)
    assert after.data == [f"{tmp_path}/out/cluster_0.parquet"]
    assert after._metadata == {"centroid_id": 0, "filetype": "parquet", "extra": "kept"}
    assert (after.dataset_name, after.task_id, after._stage_perf) == ("docs", "task-0", ["statistics"])
    check_hard(after.data[0])


def test_the_order_of_files_does_not_matter(golden, tmp_path):
    files = sorted((golden / "centroid=0").iterdir(), reverse=True)
    check_hard(similarity(tmp_path).process(task(0, files)).data[0])


@pytest.mark.parametrize("columns", [["id", "embeddings"], ["id", "embeddings", "custom_score", "priority"]])
def test_only_the_columns_that_are_needed_are_read(golden, tmp_path, monkeypatch, columns):
    read = []
    original = stages.Reader.read
    monkeypatch.setattr(stages.Reader, "read", lambda *args: read.append(args[2]) or original(*args))
    ranking = RankingStrategy.random() if len(columns) == 2 else RankingStrategy(["priority", "custom_score"])
    similarity(tmp_path, ranking).process(task(9, (golden / "centroid=9").iterdir()))
    assert set(read[0]) == {*columns, stages.CLUSTER_FIELD}


def test_a_cluster_too_long_for_cudf_is_read_by_pandas(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "CUDF_ELEMENTS", 17)
    share = Mock()
    monkeypatch.setattr(stages, "share_memory_pool", share)
    with dask.config.set({"dataframe.backend": "cudf"}):
        stage = similarity(tmp_path)
    assert stage.backend == "cudf"
    check_hard(stage.process(task(10, (golden / "centroid=10").iterdir())).data[0])
    share.assert_called_once()  # The next one may be cuDF's.


def test_a_cluster_of_one_row(golden, tmp_path):
    scores = pd.read_parquet(similarity(tmp_path).process(task(9, (golden / "centroid=9").iterdir())).data[0])
    assert scores.to_dict("list") == {"id": [0], "max_id": [0], "cosine_sim_score": [0.0]}


def test_files_without_rows_give_a_file_without_rows(tmp_path):
    root = write_layout(tmp_path / "in", {1: [GOLDEN[:0]], 2: [GOLDEN]})
    tasks = [task(cluster, (root / f"centroid={cluster}").iterdir()) for cluster in (1, 2)]
    empty, full = similarity(tmp_path / "out").process_batch(tasks)
    scores = pd.read_parquet(empty.data[0])
    assert scores.empty
    assert pq.read_schema(empty.data[0]).types == [pa.int64(), pa.int64(), pa.float32()]
    check_hard(full.data[0])
    assert pd.read_parquet(similarity(tmp_path / "alone").process(tasks[0]).data[0]).equals(scores)


def test_an_empty_task_gives_an_empty_task_and_a_warning(tmp_path):
    empty = task(4)
    with pytest.warns(UserWarning, match="No data found for cluster 4"):
        assert similarity(tmp_path / "out").process(empty) == empty
    assert not (tmp_path / "out").exists()


def test_a_batch_is_its_tasks_one_by_one(golden, tmp_path):
    tasks = ClusterWiseFilePartitioningStage(str(golden)).process()
    batch = similarity(tmp_path / "batch").process_batch(tasks[::-1])[::-1]
    for together, before in zip(batch, tasks, strict=True):
        alone = similarity(tmp_path / "alone").process(before)
        assert together._metadata == alone._metadata == before._metadata
        pd.testing.assert_frame_equal(pd.read_parquet(together.data[0]), pd.read_parquet(alone.data[0]))


def test_tasks_of_a_batch_must_be_of_different_clusters(golden, tmp_path):
    with pytest.raises(InvalidArgumentError, match="different centroid_id, not 9, 9"):
        similarity(tmp_path).process_batch([task(9, (golden / "centroid=9").iterdir())] * 2)


@pytest.mark.parametrize("ids", [[f"id-{number}" for number in range(6)], pd.array([1, 2, 3, 4, 5, 6], "int32")])
def test_ids_keep_their_type_in_the_file(tmp_path, ids):
    root = write_layout(tmp_path / "in", {0: [GOLDEN.assign(id=ids)]})
    path = similarity(tmp_path / "out").process(task(0, (root / "centroid=0").iterdir())).data[0]
    expected = pq.read_schema(next((root / "centroid=0").iterdir())).field("id").type
    types = pq.read_schema(path).types
    assert [str(kind).removeprefix("large_") for kind in types[:2]] == [str(expected).removeprefix("large_")] * 2


@pytest.mark.parametrize("clusters", [("a", "b/c"), ("1", "2")])
def test_clusters_may_be_strings(golden, tmp_path, clusters):
    files = list((golden / "centroid=10").iterdir())
    for result in similarity(tmp_path / "out").process_batch([task(cluster, files) for cluster in clusters]):
        check_hard(result.data[0])


def test_urls_and_storage_options():
    fs = fsspec.filesystem("memory")
    fs.rm("/semdedup", recursive=True) if fs.exists("/semdedup") else None
    for number, frame in enumerate([GOLDEN[:4], GOLDEN[4:]]):
        with fs.open(f"/semdedup/in/centroid=5/part.{number}.parquet", "wb") as file:
            frame.drop(columns="centroid").to_parquet(file)
    options = {"storage_options": {"skip_instance_cache": False}}
    stage = PairwiseStage(
        "id", "embeddings", "memory://semdedup/in", "memory://semdedup/out", read_kwargs=options, write_kwargs=options
    )
    (result,) = stage.run()
    assert result.data == ["memory://semdedup/out/cluster_5.parquet"]
    assert fs.ls("/semdedup/out", detail=False) == ["/semdedup/out/cluster_5.parquet"]
    check_hard(result.data[0])
    assert options == {"storage_options": {"skip_instance_cache": False}}


def test_write_kwargs_reach_the_file(golden, tmp_path):
    stage = similarity(tmp_path, write_kwargs={"compression": "gzip"})
    path = stage.process(task(9, (golden / "centroid=9").iterdir())).data[0]
    assert pq.read_metadata(path).row_group(0).column(0).compression == "GZIP"


def test_read_kwargs_reach_the_reader(golden, tmp_path):
    stage = similarity(tmp_path, read_kwargs={"filters": [("id", "in", [3, 2, 5])]})
    scores = pd.read_parquet(stage.process(task(10, (golden / "centroid=10").iterdir())).data[0])
    assert scores["id"].tolist() == [3, 2, 5]


@pytest.mark.parametrize("name", ["columns", "assign_id"])
def test_read_kwargs_of_the_stage_itself_are_refused(name):
    with pytest.raises(ValueError, match=f"read_kwargs may not hold '{name}'"):
        similarity("out", read_kwargs={name: True})
    with pytest.raises(ValueError, match=f"read_kwargs may not hold '{name}'"):
        PairwiseStage("id", "embeddings", "in", "out", read_kwargs={name: True})


def test_write_kwargs_of_the_stage_itself_are_refused():
    with pytest.raises(ValueError, match="write_kwargs may not hold 'index'"):
        similarity("out", write_kwargs={"index": False})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"pairwise_batch_size": 0}, "pairwise_batch_size must be a positive integer or None, not 0"),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of 'auto', 'float16', 'float32', not 'int8'"),
        ({"embedding_dim": 2.5}, "embedding_dim must be a positive integer or None, not 2.5"),
        ({"ranking_strategy": "hard"}, "ranking_strategy must be a RankingStrategy, such as .* not 'hard'"),
    ],
)
def test_arguments_are_checked_when_either_stage_is_made(argument, message):
    with pytest.raises(InvalidArgumentError, match=message):
        PairwiseCosineSimilarityStage(**{"ranking_strategy": HARD, **argument}, **NAMES)
    with pytest.raises(InvalidArgumentError, match=message):
        PairwiseStage(input_path="in", **argument, **NAMES)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"which_to_keep": "soft"}, "which_to_keep must be one of 'hard', 'easy', 'random', not 'soft'"),
        ({"sim_metric": "dot"}, "sim_metric must be one of 'cosine', 'l2', not 'dot'"),
        ({"random_seed": "x"}, "random_seed must be an integer, not 'x'"),
        ({"write_kwargs": {"index": True}}, "write_kwargs may not hold 'index'"),
    ],
)
def test_arguments_are_checked_when_the_whole_stage_is_made(argument, message):
    with pytest.raises(InvalidArgumentError, match=message):
        PairwiseStage(input_path="in", **argument, **NAMES)


def test_a_stage_without_a_ranking_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"ranking_strategy must be a RankingStrategy, such as .* not None"):
        PairwiseCosineSimilarityStage(ranking_strategy=None, **NAMES)


@pytest.mark.parametrize("read_kwargs", [None, {"memory_map": True}], ids=["plain", "with read_kwargs"])
def test_clusters_may_be_integers_of_numpy(golden, tmp_path, read_kwargs):
    tasks = [task(np.int64(cluster), (golden / f"centroid={cluster}").iterdir()) for cluster in (0, 10)]
    stage = similarity(tmp_path / "out", read_kwargs=read_kwargs)
    assert [len(batch) for batch in stage.batches(tasks)] == [2]
    for result, cluster in zip(stage.process_batch(tasks), (0, 10), strict=True):
        assert result.data == [f"{tmp_path}/out/cluster_{cluster}.parquet"]
        check_hard(result.data[0])


@pytest.mark.parametrize("filetype", ["jsonl", None])
def test_other_file_types_are_refused(filetype):
    with pytest.raises(ValueError, match=f"only supports parquet files, got {filetype!r}"):
        similarity("out").process(task(0, ["a.jsonl"], filetype=filetype))


def test_tasks_without_a_cluster_are_refused():
    with pytest.raises(ValueError, match="centroid_id not found in the metadata of task 'task-None'"):
        similarity("out").process(task(None, ["a.parquet"]))


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        (
            {"ranking": RankingStrategy(["score"])},
            MissingColumnsError,
            r"Required columns \['score'\] not found .*'priority'",
        ),
        ({"id_field": "doc"}, MissingColumnsError, r"\['doc'\] not found .*part.0.parquet as id_field"),
        ({"embedding_field": "vector"}, MissingColumnsError, r"\['vector'\] not found"),
        ({"embedding_field": "priority"}, EmbeddingError, "'priority' has dtype int64, not embeddings"),
        ({"id_field": "embeddings"}, InvalidArgumentError, "dtype list.*integers or strings as id_field"),
        ({"embedding_dim": 4}, EmbeddingError, r"cluster 9: 1 row with width 3, where 4 is expected \(ids 0\)"),
    ],
)
def test_bad_columns_are_named_and_nothing_is_written(golden, tmp_path, stage, error, message):
    arguments = {"ranking": HARD, "id_field": "id", "embedding_field": "embeddings"} | stage
    ranking = arguments.pop("ranking")
    built = PairwiseCosineSimilarityStage(output_path=str(tmp_path / "out"), ranking_strategy=ranking, **arguments)
    with pytest.raises(error, match=message):
        built.process(task(9, (golden / "centroid=9").iterdir()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not parquet at all"])
def test_damaged_files_are_named(golden, tmp_path, content):
    damaged = golden / "centroid=0" / "part.1.parquet"
    damaged.write_bytes(content)
    with pytest.raises(DataReadError, match=str(damaged)):
        PairwiseStage("id", "embeddings", str(golden), str(tmp_path / "out")).run()
    assert not (tmp_path / "out").exists()


def test_absent_files_are_named(golden, tmp_path):
    files = [golden / "centroid=9" / "part.0.parquet", golden / "centroid=9" / "gone.parquet"]
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"):
        similarity(tmp_path / "out").process(task(9, files))


def test_files_of_different_types_are_named(tmp_path):
    root = write_layout(tmp_path / "in", {0: [GOLDEN, GOLDEN.assign(id=list("abcdef"))]})
    with pytest.raises(
        DataReadError,
        match=r"'id' is .*string in .*part\.1\.parquet but int64 in .*part\.0\.parquet.*columns that agree",
    ):
        PairwiseStage("id", "embeddings", str(root), str(tmp_path / "out")).run()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, RankingStrategy(["cosine_dist_to_cent", "id"], False)),
        ({"which_to_keep": "easy", "sim_metric": "l2"}, RankingStrategy(["l2_dist_to_cent", "id"], True)),
        ({"which_to_keep": "random", "random_seed": 3}, RankingStrategy.random(3)),
        ({"ranking_strategy": RankingStrategy(["score"]), "which_to_keep": "random"}, RankingStrategy(["score"])),
    ],
)
def test_decompose(arguments, expected):
    options = {"storage_options": {"anon": True}}
    stage = PairwiseStage("id", "vector", "in", "out", embedding_dim=8, verbose=True, read_kwargs=options, **arguments)
    partitioning, pairwise = stage.decompose()
    assert isinstance(partitioning, ClusterWiseFilePartitioningStage)
    assert (partitioning.input_path, partitioning.storage_options) == ("in", {"anon": True})
    assert isinstance(pairwise, PairwiseCosineSimilarityStage)
    assert (pairwise.id_field, pairwise.embedding_field, pairwise.output_path) == ("id", "vector", "out")
    assert (pairwise.pairwise_batch_size, pairwise.embedding_dim, pairwise.verbose) == (1024, 8, True)
    assert pairwise.input_storage_options == {"anon": True}
    assert pairwise.output_storage_options is None
    assert pairwise.ranking_strategy == stage.ranking_strategy == expected


@pytest.mark.parametrize(("name", "value"), [("which_to_keep", "soft"), ("sim_metric", "dot")])
def test_unknown_words_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .*{value!r}"):
        PairwiseStage("id", "embeddings", "in", "out", **{name: value})


@pytest.mark.parametrize("batch_bytes", [1, 2**27], ids=["a task each", "one task"])
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_run_scores_every_cluster(golden, tmp_path, monkeypatch, caplog, scheduler, batch_bytes):
    monkeypatch.setattr(stages, "default_size", lambda *_: batch_bytes)
    stage = PairwiseStage("id", "embeddings", str(golden), str(tmp_path / "out"), verbose=True)
    with dask.config.set(scheduler=scheduler), caplog.at_level(logging.INFO, "dask_semdedup"):
        results = stage.run()
    assert [result._metadata["centroid_id"] for result in results] == [0, 9, 10]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"cluster_{k}.parquet" for k in (0, 10, 9)]
    for result in (results[0], results[2]):
        check_hard(result.data[0])
    logged = sorted(message.partition(" took ")[0] for message in caplog.messages)
    one_task = ["pairwise: 13 rows in clusters 0, 9, 10"]
    task_each = [f"pairwise: {rows} rows in clusters {cluster}" for rows, cluster in [(1, 9), (6, 0), (6, 10)]]
    assert logged == (task_each if batch_bytes == 1 else one_task)


def write_remote_layout(root: str, clusters: int, files: int) -> None:
    fs = fsspec.filesystem("memory")
    for cluster in range(clusters):
        for number in range(files):
            with fs.open(f"{root}/centroid={cluster}/part.{number}.parquet", "wb") as file:
                GOLDEN[3 * number : 3 * number + 3].drop(columns="centroid").to_parquet(file)


@pytest.mark.parametrize(("batch_bytes", "batches"), [(1, 3), (2**27, 1)], ids=["a task each", "one task"])
def test_run_lists_once_reads_footers_once_and_makes_the_folder_once_a_task(monkeypatch, calls, batch_bytes, batches):
    monkeypatch.setattr(stages, "default_size", lambda *_: batch_bytes)
    write_remote_layout("memory://counted/in", clusters=3, files=2)
    calls.clear()
    results = PairwiseStage("id", "embeddings", "memory://counted/in", "memory://counted/out").run()
    counts = Counter(calls)
    fsspec.filesystem("memory").rm("/counted", recursive=True)
    inputs = [f"/counted/in/centroid={cluster}/part.{number}.parquet" for cluster in range(3) for number in range(2)]
    assert [counts["cat_file", path] for path in inputs[1:]] == [1] * 5
    assert {path: counts[name, path] for name, path in counts if name == "find"} == {"/counted/in": 1}
    assert {path: counts[name, path] for name, path in counts if name == "makedirs"} == {"/counted/out": batches}
    assert not [call for call in counts if call[0] in ("exists", "info", "isdir") and call[1] in inputs]
    assert not [call for call in counts if call[0] in ("exists", "find", "info", "isdir", "ls") and "out" in call[1]]
    assert [result.data for result in results] == [[f"memory://counted/out/cluster_{k}.parquet"] for k in range(3)]


def test_a_task_is_sent_the_footers_of_its_own_files(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "default_size", lambda *_: 1)
    sent = []
    original = PairwiseCosineSimilarityStage._process

    def process(self, tasks, footers):
        sent.append((tasks, pickle.loads(pickle.dumps(footers))))
        return original(self, tasks, sent[-1][1])

    monkeypatch.setattr(PairwiseCosineSimilarityStage, "_process", process)
    monkeypatch.setattr(PairwiseCosineSimilarityStage, "process_batch", lambda *_: pytest.fail("read footers again"))
    PairwiseStage("id", "embeddings", str(golden), str(tmp_path / "out")).run()
    assert len(sent) == 3
    for (only,), footers in sent:
        paths = [file.path for files in footers.by_cluster.values() for file in files]
        assert paths == only.data


def test_run_begins_batches_in_the_order_of_the_plan_and_returns_tasks_in_that_of_clusters(
    golden, tmp_path, monkeypatch
):
    plan, begun = [[10], [0], [9]], []
    original = PairwiseCosineSimilarityStage._process
    monkeypatch.setattr(stages, "plan", lambda *_: plan)
    monkeypatch.setattr(
        PairwiseCosineSimilarityStage,
        "_process",
        lambda self, tasks, footers: begun.append(list(footers.by_cluster)) or original(self, tasks, footers),
    )
    with dask.config.set(scheduler="sync"):
        results = PairwiseStage("id", "embeddings", str(golden), str(tmp_path / "out")).run()
    assert begun == plan
    assert [result._metadata["centroid_id"] for result in results] == [0, 9, 10]


def test_a_little_data_is_shared_out_to_all_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "CPU_COUNT", 2)
    monkeypatch.setattr(planning, "SMALL_PARTITION", 1)
    root = write_layout(tmp_path / "in", {cluster: [GOLDEN] for cluster in range(16)})
    stage = similarity(tmp_path / "out")
    batches = stage.batches(ClusterWiseFilePartitioningStage(str(root)).process())
    assert [task._metadata["centroid_id"] for batch in batches for task in batch] == list(range(16))
    assert len(batches) == 8


@pytest.mark.parametrize("backend", ["pandas", "cudf"])
def test_batches_are_as_large_as_the_partitions_of_the_backend(golden, tmp_path, monkeypatch, backend):
    asked = []
    monkeypatch.setattr(stages, "default_size", lambda name, client: asked.append(name) or 2**27)
    with dask.config.set({"dataframe.backend": backend}):
        stage = similarity(tmp_path / "out")
    assert len(stage.batches(ClusterWiseFilePartitioningStage(str(golden)).process())) == 1
    assert asked == [backend]


def test_nulls_in_one_batch_leave_the_types_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "default_size", lambda *_: 1)
    with_null = GOLDEN.assign(id=pd.array([None, 1, 2, 3, 4, 5], "Int64"))
    root = write_layout(tmp_path / "in", {0: [with_null], 1: [GOLDEN]})
    nulls, none = PairwiseStage("id", "embeddings", str(root), str(tmp_path / "out")).run()
    assert pd.read_parquet(nulls.data[0])["id"].isna().sum() == 1
    assert pd.read_parquet(none.data[0])["id"].dtype == np.int64


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
def test_run_agrees_with_the_lazy_frame(golden, tmp_path, keep):
    results = PairwiseStage("id", "embeddings", str(golden), str(tmp_path), which_to_keep=keep, random_seed=7).run()
    lazy = clusters.read_clusters(golden).semdedup.pairwise(which_to_keep=keep, random_seed=7).compute()
    for result in results:
        expected = lazy[lazy["centroid"] == result._metadata["centroid_id"]].drop(columns="centroid")
        pd.testing.assert_frame_equal(pd.read_parquet(result.data[0]), expected.reset_index(drop=True))


def test_run_gives_clusters_in_order_whichever_are_scored_first(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "fitting_size", lambda *_: 1)
    giant = pd.concat([GOLDEN] * 50, ignore_index=True)
    path = write_layout(tmp_path / "in", {0: [GOLDEN], 1: [giant], 2: [GOLDEN], 10: [GOLDEN]})
    results = PairwiseStage("id", "embeddings", str(path), str(tmp_path / "out")).run()
    assert [result._metadata["centroid_id"] for result in results] == [0, 1, 2, 10]


def test_run_checks_columns_before_anything_runs(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(PairwiseCosineSimilarityStage, "_process", lambda *_: pytest.fail("ran"))
    with pytest.raises(MissingColumnsError, match=r"\['score'\] not found"):
        PairwiseStage("id", "embeddings", str(golden), str(tmp_path), ranking_strategy=RankingStrategy(["score"])).run()


def test_a_run_that_fails_leaves_no_file_of_the_cluster_that_failed(tmp_path):
    bad = GOLDEN.assign(embeddings=[[1.0, 2.0, np.inf]] * 6)
    root = write_layout(tmp_path / "in", {0: [GOLDEN.assign(embeddings=NORMED.tolist())], 1: [bad]})
    with pytest.raises(EmbeddingError, match=r"cluster 1: 6 rows with NaN or infinite values \(ids 0, 1, 2"):
        PairwiseStage("id", "embeddings", str(root), str(tmp_path / "out")).run()
    assert not list(tmp_path.glob("out/*cluster_1*"))


def test_run_on_a_client(golden, tmp_path):
    distributed = pytest.importorskip("distributed")
    stage = PairwiseStage("id", "embeddings", str(golden), str(tmp_path))
    with (
        # As for users: other tests may have processes that are loaded already.
        dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}),
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        results = stage.run(client)
    check_hard(results[0].data[0])


def test_an_executor_finds_the_life_cycle_of_a_stage(golden, tmp_path):
    tasks = [None]
    for stage in PairwiseStage("id", "embeddings", str(golden), str(tmp_path)).decompose():
        assert (stage.resources, stage.resources.requires_gpu, stage.batch_size) == (
            Resources(cpus=1, gpus=0),
            False,
            1,
        )
        assert (stage.inputs(), stage.outputs()) == ((["data"], []), (["data"], []))
        stage.setup_on_node(node_info=None, worker_metadata=None)
        stage.setup(worker_metadata=None)
        tasks = stage.process_batch(tasks)
        stage.teardown()
    assert [result._metadata["centroid_id"] for result in tasks] == [0, 9, 10]
    check_hard(tasks[0].data[0])


def test_stages_have_the_names_that_users_change_them_by():
    stage = PairwiseStage("id", "embeddings", "in", "out")
    names = [part.name for part in stage.decompose()]
    assert names == ["pairwise_file_partitioning", "PairwiseCosineSimilarityStage"]
    changed = stage.with_({names[1]: {"resources": Resources(cpus=2, gpus=0.5)}}).with_({names[1]: {"batch_size": 4}})
    partitioning, similarity = changed.decompose()
    assert (similarity.resources.gpus, similarity.batch_size, similarity.name) == (0.5, 4, names[1])
    assert partitioning.batch_size == 1
    assert stage.decompose()[1].batch_size == 1
    with pytest.raises(InvalidArgumentError, match="no part 'x': it has pairwise_file_partitioning, Pairwise"):
        stage.with_({"x": {}})


def test_with_gives_a_copy():
    stage = similarity("out")
    changed = stage.with_(name="scores", batch_size=8)
    assert (changed.name, changed.batch_size, changed.output_path) == ("scores", 8, "out")
    assert (stage.name, stage.batch_size) == ("PairwiseCosineSimilarityStage", 1)
    assert type(stage).batch_size == 1


@pytest.mark.parametrize("compute_dtype", ["auto", "float16", "float32"])
def test_the_answer_is_exact_whatever_dtype_is_asked_for(tmp_path, compute_dtype):
    # Half precision takes the first two for one.
    rows = [[1.0, 0.0], [np.cos(1e-3), np.sin(1e-3)], [np.cos(3e-3), np.sin(3e-3)]]
    frame = pd.DataFrame({"id": [0, 1, 2], "embeddings": rows, "centroid": 0, "cosine_dist_to_cent": [0.0, 0.1, 0.2]})
    root = write_layout(tmp_path / "in", {0: [frame]})
    stage = PairwiseStage(
        "id", "embeddings", str(root), str(tmp_path / "out"), which_to_keep="easy", compute_dtype=compute_dtype
    )
    scores = pd.read_parquet(stage.run()[0].data[0])
    assert scores["max_id"].tolist() == [0, 0, 1]
    np.testing.assert_allclose(scores["cosine_sim_score"], [0, np.cos(1e-3), np.cos(2e-3)], atol=1e-7)


def test_an_unknown_strategy_is_refused_when_either_stage_is_made():
    ranking = RankingStrategy(["id"], strategy="best")
    for make in (PairwiseCosineSimilarityStage, partial(PairwiseStage, input_path="in")):
        with pytest.raises(InvalidArgumentError, match="Invalid strategy"):
            make(ranking_strategy=ranking, **NAMES)


@pytest.mark.skipif(find_spec("nemo_curator") is not None, reason="NeMo Curator is there")
def test_stages_of_pipelines_say_what_they_need():
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[curator\]' in a clone"):
        importlib.import_module("dask_semdedup.curator")


def test_clusters_are_integers_or_strings(golden, tmp_path):
    stage = PairwiseCosineSimilarityStage("id", "embeddings", str(tmp_path / "out"), make_strategy("random"))
    (task, *_) = ClusterWiseFilePartitioningStage(str(golden)).process()
    for cluster in (3.0, None, (1,)):
        odd = replace(task, _metadata={**task._metadata, "centroid_id": cluster})
        with pytest.raises(InvalidArgumentError, match="centroid_id"):
            stage.process(odd)
    with pytest.raises(InvalidArgumentError, match="different centroid_id"):
        stage.process_batch([replace(task, _metadata={**task._metadata, "centroid_id": one}) for one in (3, "3")])
    with pytest.raises(InvalidArgumentError, match="integers or strings as centroid_id, not 3, 'b'"):
        stage.process_batch([replace(task, _metadata={**task._metadata, "centroid_id": one}) for one in (3, "b")])
    assert stage.batches([]) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["", "/scores", "/x/.."])
def test_results_do_not_go_to_where_embeddings_are(golden, inside):
    with pytest.raises(InvalidArgumentError, match="is within input_path"):
        PairwiseStage("id", "embeddings", str(golden), f"{golden}{inside}", which_to_keep="random").run()
    assert len(clusters.read_clusters(golden))
