"""The stages for NeMo Curator's pipelines: its tasks in and out, run by its executors, with or without a GPU.

To switch, import `PairwiseStage` from here instead of from ``nemo_curator.stages.deduplication.semantic.pairwise``. The
life cycle of these stages is NeMo Curator's, and the work is that of `dask_semdedup.stages`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dask_semdedup import stages
from dask_semdedup.device.devices import has_cuda
from dask_semdedup.errors import MissingDependencyError
from dask_semdedup.io.layout import Listing
from dask_semdedup.stages import pairwise_cosine_similarity_batched
from dask_semdedup.steps.ranking import RankingStrategy

try:
    from nemo_curator.stages.base import CompositeStage, ProcessingStage
    from nemo_curator.stages.resources import Resources
    from nemo_curator.tasks import EmptyTask, FileGroupTask
except ImportError as error:
    raise MissingDependencyError(
        "dask_semdedup.curator needs NeMo Curator 1.4 or newer: pip install 'nemo-curator>=1.4', or pip install "
        "'.[curator]' in a clone of dask-semdedup. The same stages without it are in dask_semdedup.stages."
    ) from error

__all__ = [
    "ClusterWiseFilePartitioningStage",
    "PairwiseCosineSimilarityStage",
    "PairwiseStage",
    "RankingStrategy",
    "pairwise_cosine_similarity_batched",
]


class ClusterWiseFilePartitioningStage(
    ProcessingStage[EmptyTask, FileGroupTask], stages.ClusterWiseFilePartitioningStage
):
    """Make one task of NeMo Curator per cluster of the k-means layout.

    Its parameters are those of `dask_semdedup.stages.ClusterWiseFilePartitioningStage`.
    """

    name = stages.ClusterWiseFilePartitioningStage.name
    resources = Resources(cpus=0.5)

    def num_workers(self) -> int:
        """Return the number of workers: one, since there is one task."""
        return 1

    def process(self, _: EmptyTask | None = None) -> list[FileGroupTask]:
        """List the files of each cluster, as `dask_semdedup.stages.ClusterWiseFilePartitioningStage.process` does."""
        return stages.ClusterWiseFilePartitioningStage.process(self)

    def _tasks(self, listing: Listing) -> list[FileGroupTask]:
        # Ids of tasks are the executor's to give.
        return [
            FileGroupTask(task.dataset_name, task.data, _metadata=task._metadata) for task in super()._tasks(listing)
        ]


class PairwiseCosineSimilarityStage(
    ProcessingStage[FileGroupTask, FileGroupTask], stages.PairwiseCosineSimilarityStage
):
    """Score the files of a cluster. A worker takes a GPU if torch sees one when the stage is made.

    Parameters
    ----------
    id_field, embedding_field, output_path : str
        As for `dask_semdedup.stages.PairwiseCosineSimilarityStage`.
    ranking_strategy : RankingStrategy
        Which rows of a cluster are preferred: a strategy of this package or of NeMo Curator.
    **arguments
        Further arguments of `dask_semdedup.stages.PairwiseCosineSimilarityStage`.
    """

    name = stages.PairwiseCosineSimilarityStage.name

    def __init__(
        self, id_field: str, embedding_field: str, output_path: str, ranking_strategy: Any, **arguments: Any
    ) -> None:
        super().__init__(id_field, embedding_field, output_path, _as_ours(ranking_strategy), **arguments)
        self.resources = Resources(cpus=1.0, gpus=float(has_cuda()))

    def process(self, task: FileGroupTask) -> FileGroupTask:
        """Score one cluster, as `dask_semdedup.stages.PairwiseCosineSimilarityStage.process` does."""
        return stages.PairwiseCosineSimilarityStage.process(self, task)

    def process_batch(self, tasks: Sequence[FileGroupTask]) -> list[FileGroupTask]:
        """Score several clusters at once, which is faster for small ones."""
        return stages.PairwiseCosineSimilarityStage.process_batch(self, tasks)


@dataclass
class PairwiseStage(CompositeStage[EmptyTask, FileGroupTask], stages.PairwiseStage):
    """Pairwise similarity of all clusters in a folder, as a stage of a ``nemo_curator.pipeline.Pipeline``.

    Its parameters are those of `dask_semdedup.stages.PairwiseStage`; `ranking_strategy` may also be NeMo Curator's.
    """

    name = stages.PairwiseStage.name
    _parts: ClassVar[tuple[Any, Any]] = (ClusterWiseFilePartitioningStage, PairwiseCosineSimilarityStage)

    def __post_init__(self) -> None:
        CompositeStage.__init__(self)
        self.ranking_strategy = _as_ours(self.ranking_strategy)
        super().__post_init__()

    def decompose(self) -> list[ProcessingStage]:
        """Return the two stages of which this one consists."""
        return stages.PairwiseStage.decompose(self)


def _as_ours(strategy: Any) -> Any:
    """Convert a ranking strategy of NeMo Curator to ours. Return anything else unchanged."""
    # Their module imports only where cuDF is installed. Nobody has a strategy of theirs who has not imported it.
    theirs = sys.modules.get("nemo_curator.stages.deduplication.semantic.ranking")
    # A subclass may rank in another way.
    if theirs is None or type(strategy) is not theirs.RankingStrategy:
        return strategy
    return RankingStrategy(strategy.metadata_cols, strategy.ascending, strategy.strategy, strategy.random_seed)
