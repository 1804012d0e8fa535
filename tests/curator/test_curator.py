"""The stages in pipelines of NeMo Curator, run by its executors: `make test-curator`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("nemo_curator", exc_type=ModuleNotFoundError)

from nemo_curator.backends.ray_data import RayDataExecutor
from nemo_curator.core.client import RayClient
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import CompositeStage, ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import EmptyTask, FileGroupTask

from dask_semdedup import curator
from dask_semdedup.curator import ClusterWiseFilePartitioningStage, PairwiseCosineSimilarityStage, PairwiseStage
from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.lazy.clusters import read_clusters
from dask_semdedup.steps.ranking import RankingStrategy, make_strategy
from tests.data import GOLDEN, check_hard, write_layout

RANKING = "nemo_curator.stages.deduplication.semantic.ranking"


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A Ray of two cores."""
    client = RayClient(num_cpus=2, include_dashboard=False)
    client.start()
    yield
    client.stop()


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """Four clusters, one of them in two files."""
    return write_layout(
        tmp_path / "kmeans_results", {0: [GOLDEN[:2], GOLDEN[2:]], 1: [GOLDEN], 7: [GOLDEN], 10: [GOLDEN]}
    )


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Their module of ranking strategies; where there is no cuDF, the package around it does not import."""
    (path,) = [file.locate() for file in files("nemo-curator") or () if file.match("deduplication/semantic/ranking.py")]
    spec = importlib.util.spec_from_file_location(RANKING, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, RANKING, module)
    return module


def test_a_pipeline_scores_every_cluster(ray, layout, tmp_path):
    output = tmp_path / "pairwise_results"
    pipeline = Pipeline("pairwise", stages=[PairwiseStage("id", "embeddings", str(layout), str(output))])
    results = pipeline.run(RayDataExecutor())
    assert all(type(result) is FileGroupTask for result in results)
    assert {result._metadata["centroid_id"]: result.data for result in results} == {
        cluster: [f"{output}/cluster_{cluster}.parquet"] for cluster in (0, 1, 7, 10)
    }
    assert sorted(path.name for path in output.iterdir()) == [f"cluster_{cluster}.parquet" for cluster in (0, 1, 10, 7)]
    for path in output.iterdir():
        check_hard(str(path))
    assert len({result.task_id for result in results}) == 4
    stages = [statistics.stage_name for statistics in results[0]._stage_perf]
    assert stages == ["pairwise_file_partitioning", "PairwiseCosineSimilarityStage"]


def test_a_pipeline_of_batches_and_a_custom_ranking_agrees_with_the_lazy_frame(ray, layout, tmp_path):
    ranking = RankingStrategy(["priority", "custom_score"], [True, False])
    stage = PairwiseStage("id", "embeddings", str(layout), str(tmp_path / "out"), ranking_strategy=ranking)
    stage.with_({"PairwiseCosineSimilarityStage": {"batch_size": 4}})
    results = Pipeline("pairwise", stages=[stage]).run(RayDataExecutor())
    lazy = read_clusters(layout).semdedup.pairwise(ranking_strategy=ranking).compute()
    for result in results:
        scores = pd.read_parquet(result.data[0])
        assert scores["id"].tolist() == [3, 1, 2, 5, 4, 0]
        expected = lazy[lazy["centroid"] == result._metadata["centroid_id"]].drop(columns="centroid")
        pd.testing.assert_frame_equal(scores, expected.reset_index(drop=True))
    assert len(results) == 4


def test_an_error_of_a_stage_ends_the_pipeline_and_names_the_rows(ray, tmp_path):
    path = write_layout(tmp_path / "in", {0: [GOLDEN.assign(embeddings=[[1.0, np.inf, 1.0]] * 6)]})
    pipeline = Pipeline("pairwise", stages=[PairwiseStage("id", "embeddings", str(path), str(tmp_path / "out"))])
    with pytest.raises(Exception, match=r"cluster 0: 6 rows with NaN or infinite values \(ids 0, 1, 2"):
        pipeline.run(RayDataExecutor())
    assert not (tmp_path / "out").exists()


def test_stages_are_those_of_a_pipeline():
    stage = PairwiseStage("id", "embeddings", "in", "out", compute_dtype="float16", embedding_dim=3)
    partitioning, similarity = stage.decompose()
    assert isinstance(stage, CompositeStage)
    assert isinstance(partitioning, ProcessingStage)
    assert isinstance(similarity, ProcessingStage)
    assert (partitioning.is_fanout_stage(), similarity.is_fanout_stage()) == (True, False)
    assert (partitioning.num_workers(), similarity.num_workers()) == (1, None)
    assert similarity.supports_batch_processing()
    assert (similarity.compute_dtype, similarity.embedding_dim) == ("float16", 3)
    assert similarity.with_(name="scores", ray_stage_spec={"max_calls_per_worker": 9}).name == "scores"


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_worker_takes_a_gpu_only_where_there_is_one(monkeypatch, gpus):
    monkeypatch.setattr(curator, "has_cuda", lambda: bool(gpus))
    partitioning, similarity = PairwiseStage("id", "embeddings", "in", "out").decompose()
    assert partitioning.resources == Resources(cpus=0.5)
    assert similarity.resources == Resources(cpus=1.0, gpus=gpus)


def test_tasks_keep_what_is_known_of_them(layout, tmp_path):
    stage = PairwiseCosineSimilarityStage("id", "embeddings", str(tmp_path / "out"), make_strategy("hard"))
    task = ClusterWiseFilePartitioningStage(str(layout)).process(EmptyTask())[0]
    task._metadata["extra"] = "kept"
    result = stage.process(task)
    assert type(result) is FileGroupTask
    assert result._metadata == {"centroid_id": 0, "filetype": "parquet", "extra": "kept"}
    assert result.dataset_name == task.dataset_name == "kmeans_results"
    check_hard(result.data[0])


def test_their_ranking_strategies_are_taken(theirs, layout, tmp_path):
    ranking = theirs.RankingStrategy.metadata_based(["priority", "custom_score"], [True, False])
    for stage in (
        PairwiseCosineSimilarityStage("id", "embeddings", str(tmp_path), ranking),
        PairwiseStage("id", "embeddings", "in", "out", ranking_strategy=ranking).decompose()[1],
    ):
        assert stage.ranking_strategy == RankingStrategy(["priority", "custom_score"], [True, False])
    random = theirs.RankingStrategy.random(7)
    stage = PairwiseCosineSimilarityStage("id", "embeddings", "out", random)
    assert stage.ranking_strategy == RankingStrategy.random(7)


def test_strategies_that_may_rank_in_another_way_are_refused(theirs):
    class Special(theirs.RankingStrategy):
        pass

    with pytest.raises(InvalidArgumentError, match="ranking_strategy must be a RankingStrategy"):
        PairwiseStage("id", "embeddings", "in", "out", ranking_strategy=Special(["id"]))
