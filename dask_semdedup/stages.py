"""Stage classes of NeMo Curator's ``semantic.pairwise`` module, name for name, run by Dask.

Arguments, defaults, life cycle and file layout are the same, for users who switch from there. Scores differ: they are
exact, are those of normalised rows, may be negative, and do not depend on the order of files. No GPU is needed.
`dask_semdedup.curator` has the same stages for NeMo Curator's own pipelines.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise, starmap
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import dask
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dask_semdedup._validate import check_choice, check_positive, stack_level
from dask_semdedup.device.devices import DEVICE_OF_BACKEND
from dask_semdedup.device.memory import share_memory_pool
from dask_semdedup.device.queues import gpu_slot
from dask_semdedup.device.streams import default_stream
from dask_semdedup.errors import EmbeddingError, InvalidArgumentError, some
from dask_semdedup.frames.backend import to_arrow
from dask_semdedup.frames.columns import SCORE_COLUMNS, Columns, SearchOptions
from dask_semdedup.frames.embeddings import rows_not_finite
from dask_semdedup.io.cudf_reader import import_cudf
from dask_semdedup.io.folder_keys import key_type
from dask_semdedup.io.fragments import FileStats, Fragment
from dask_semdedup.io.layout import Listing, list_clusters
from dask_semdedup.io.reader import Reader
from dask_semdedup.io.scan import Scan, scan_files
from dask_semdedup.io.targets import is_within
from dask_semdedup.io.write import write_clusters
from dask_semdedup.lazy.planning import CUDF_ELEMENTS, default_size, fitting_size, plan
from dask_semdedup.steps.pairwise import pairwise_partition
from dask_semdedup.steps.ranking import RankingStrategy, check_strategy, choose_strategy

if TYPE_CHECKING:
    from typing import Self

    import torch

__all__ = [
    "ClusterWiseFilePartitioningStage",
    "FileGroupTask",
    "PairwiseCosineSimilarityStage",
    "PairwiseStage",
    "RankingStrategy",
    "Resources",
    "pairwise_cosine_similarity_batched",
]

# The column that tells clusters apart while several are one frame; it is in no file.
CLUSTER_FIELD = "__cluster__"
# What NeMo Curator's stage can be asked to multiply in.
COMPUTE_DTYPES = ("auto", "float16", "float32")

logger = logging.getLogger("dask_semdedup")


def pairwise_cosine_similarity_batched(cluster_reps: torch.Tensor, batch_size: int = 1024) -> tuple[Any, Any]:
    """For every row of a ranked cluster, find the most similar earlier row.

    Parameters
    ----------
    cluster_reps : (n, d) floating-point tensor
        The cluster's rows in rank order, on any device. They need not be of unit length.
    batch_size : int, default 1024
        Number of rows that are compared with all earlier ones at once. Memory is O(n · batch_size).

    Returns
    -------
    max_similarity : (n,) float32 array
        Exact cosine similarities in [-1, 1]; 0 for the first row. A CuPy array for a CUDA tensor, else a NumPy array.
    max_indices : (n,) int64 array
        Positions of the most similar rows, the first among equals; 0 for the first row.

    Raises
    ------
    EmbeddingError
        If rows hold NaN or infinite values.

    Examples
    --------
    >>> import torch
    >>> pairwise_cosine_similarity_batched(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    (array([0. , 0. , 0.8], dtype=float32), array([0, 0, 1]))
    """
    import torch

    from dask_semdedup.search import nearest_earlier

    if len(bad := rows_not_finite(cluster_reps)):
        raise EmbeddingError(f"cluster_reps has NaN or infinite values in rows {some(bad)}. Drop or fix them first.")
    segments = torch.tensor([0, len(cluster_reps)])
    scores, index = nearest_earlier(cluster_reps, segments, batch_size=batch_size)
    if cluster_reps.device.type != "cuda":
        return scores.numpy(), index.numpy()
    import cupy

    return cupy.from_dlpack(scores), cupy.from_dlpack(index)


@dataclass
class FileGroupTask:
    """Files that are processed together, and their metadata.

    Parameters
    ----------
    dataset_name : str
        Name of the dataset of the files.
    data : list of str
        The files.
    _stage_perf : list
        Statistics of earlier stages, passed on unchanged.
    _metadata : dict
        For pairwise similarity ``{"centroid_id": 3, "filetype": "parquet"}``.
    reader_config : dict
        Passed on unchanged.
    task_id : str
        Name of the task.

    Examples
    --------
    >>> FileGroupTask("docs", ["a.parquet", "b.parquet"], _metadata={"centroid_id": 3, "filetype": "parquet"}).num_items
    2
    """

    dataset_name: str
    data: list[str] = field(default_factory=list)
    _stage_perf: list[Any] = field(default_factory=list)
    _metadata: dict[str, Any] = field(default_factory=dict)
    reader_config: dict[str, Any] = field(default_factory=dict)
    task_id: str = ""

    @property
    def num_items(self) -> int:
        """Number of files."""
        return len(self.data)


@dataclass(frozen=True)
class Resources:
    """Resources that a worker of a stage needs, for executors that ask. Dask uses those of its workers instead.

    Parameters
    ----------
    cpus, gpus : float
        Cores and GPUs.

    Examples
    --------
    >>> Resources(cpus=2.0).requires_gpu
    False
    """

    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def requires_gpu(self) -> bool:
        """Return whether a worker needs a GPU."""
        return self.gpus > 0


class _Stage:
    """Life cycle of NeMo Curator's stages: the attributes and methods that an executor uses besides the work itself.

    Nothing is prepared or put away: stages open files, and use a device, only while they work.
    """

    name: str
    resources = Resources()
    batch_size = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Return the attributes of a task, and the columns of its data, that the stage reads."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Return the attributes of a task, and the columns of its data, that the stage sets."""
        return ["data"], []

    def setup_on_node(self, node_info: Any = None, worker_metadata: Any = None) -> None:
        """Prepare a machine: nothing to do."""

    def setup(self, worker_metadata: Any = None) -> None:
        """Prepare a worker: nothing to do."""

    def teardown(self) -> None:
        """Clean up after `setup`: nothing to do."""

    def with_(self, name: str | None = None, resources: Any = None, batch_size: int | None = None) -> Self:
        """Return a copy of the stage with other attributes. None leaves an attribute unchanged."""
        changed = copy(self)
        changes = {"name": name, "resources": resources, "batch_size": batch_size}
        vars(changed).update({attribute: value for attribute, value in changes.items() if value is not None})
        return changed


class ClusterWiseFilePartitioningStage(_Stage):
    """Make one task per cluster of the k-means layout, ``<input_path>/centroid=<k>/*.parquet``.

    Parameters
    ----------
    input_path : str
        Folder: a local path or an fsspec URL.
    storage_options : dict, optional
        Arguments of the fsspec file system.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> folder = tempfile.mkdtemp()
    >>> pd.DataFrame({"id": [1, 2], "centroid": [0, 1]}).to_parquet(folder, partition_cols=["centroid"])
    >>> [task.task_id for task in ClusterWiseFilePartitioningStage(folder).process()]
    ['pairwise_centroid_0', 'pairwise_centroid_1']
    """

    name = "pairwise_file_partitioning"

    def __init__(self, input_path: str, storage_options: dict[str, Any] | None = None) -> None:
        self.input_path = input_path
        self.storage_options = storage_options

    def process(self, _: Any = None) -> list[FileGroupTask]:
        """List the files of each cluster.

        Returns
        -------
        list of FileGroupTask
            One per cluster, in ascending order.

        Raises
        ------
        DataNotFoundError, ClusterError
            If there are no files, or none of them is in that layout.

        Examples
        --------
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> pd.DataFrame({"id": [1, 2], "centroid": [7, 9]}).to_parquet(folder, partition_cols=["centroid"])
        >>> [task._metadata["centroid_id"] for task in ClusterWiseFilePartitioningStage(folder).process()]
        [7, 9]
        """
        return self._tasks(self._list())

    def process_batch(self, tasks: Sequence[Any]) -> list[FileGroupTask]:
        """List the files of each cluster, as `process` does, for each task."""
        return [task for one in tasks for task in self.process(one)]

    def _list(self) -> Listing:
        return list_clusters(self.input_path, self.storage_options)

    def _tasks(self, listing: Listing) -> list[FileGroupTask]:
        dataset = os.path.basename(os.fspath(self.input_path).rstrip("/"))
        return [
            FileGroupTask(
                dataset,
                files,
                _metadata={"centroid_id": cluster, "filetype": "parquet"},
                task_id=f"pairwise_centroid_{cluster}",
            )
            for cluster, files in listing.urls().items()
        ]


@dataclass(frozen=True)
class _Footers:
    """Footers of clusters' files, and the reader of the files."""

    reader: Reader
    by_cluster: dict[Any, list[FileStats]]

    def of(self, clusters: Iterable[Any]) -> _Footers:
        return replace(self, by_cluster={cluster: self.by_cluster[cluster] for cluster in clusters})

    def sizes(self) -> list[tuple[Any, int, int]]:
        """Cluster, rows and bytes of each, as `plan` wants them."""
        groups = {
            cluster: [group for file in files for group in file.row_groups]
            for cluster, files in self.by_cluster.items()
        }
        return [
            (cluster, sum(group.rows for group in of_it), sum(group.nbytes for group in of_it))
            for cluster, of_it in groups.items()
        ]


class PairwiseCosineSimilarityStage(_Stage):
    """Score the files of a cluster, and write ``<output_path>/cluster_<k>.parquet``.

    Parameters
    ----------
    id_field, embedding_field : str
        Columns of ids and embeddings.
    output_path : str
        Folder of the results: a local path or an fsspec URL.
    ranking_strategy : RankingStrategy
        Which rows of a cluster are preferred.
    pairwise_batch_size : int, default 1024
        Number of queries that are multiplied at once, with as many candidates as memory allows.
    verbose : bool, default False
        Log rows and time to the logger ``dask_semdedup``, at level INFO.
    embedding_dim : int, optional
        Length that every embedding must have.
    read_kwargs, write_kwargs : dict, optional
        Arguments of ``read_parquet`` of pandas, or of cuDF if that is Dask's ``dataframe.backend``, and of
        ``to_parquet`` of pandas. Both may hold ``storage_options`` for the fsspec file system.
    compute_dtype : {"auto", "float16", "float32"}, default "float32"
        Accepted for compatibility with NeMo Curator's stage, without effect: the result is always exact, at
        half-precision speed.

    Raises
    ------
    InvalidArgumentError
        If an argument is invalid, `read_kwargs` holds ``columns`` or ``assign_id``, or `write_kwargs` holds ``index``.
    """

    name = "PairwiseCosineSimilarityStage"

    def __init__(
        self,
        id_field: str,
        embedding_field: str,
        output_path: str,
        ranking_strategy: RankingStrategy,
        pairwise_batch_size: int = 1024,
        verbose: bool = False,
        embedding_dim: int | None = None,
        read_kwargs: dict[str, Any] | None = None,
        write_kwargs: dict[str, Any] | None = None,
        compute_dtype: str = "float32",
    ) -> None:
        check_strategy(ranking_strategy)
        check_choice("compute_dtype", compute_dtype, COMPUTE_DTYPES)
        check_positive("pairwise_batch_size", pairwise_batch_size)
        check_positive("embedding_dim", embedding_dim)
        self.id_field = id_field
        self.embedding_field = embedding_field
        self.output_path = output_path
        self.ranking_strategy = ranking_strategy
        self.pairwise_batch_size = pairwise_batch_size
        self.verbose = verbose
        self.embedding_dim = embedding_dim
        self.compute_dtype = compute_dtype
        self.read_kwargs = _allowed("read_kwargs", read_kwargs, "columns", "assign_id")
        self.write_kwargs = _allowed("write_kwargs", write_kwargs, "index", "partition_cols")
        self.input_storage_options = self.read_kwargs.pop("storage_options", None)
        self.output_storage_options = self.write_kwargs.pop("storage_options", None)
        # Workers may be configured differently: what counts is where the stage was made.
        self.backend = dask.config.get("dataframe.backend", "pandas")

    def process(self, task: FileGroupTask) -> FileGroupTask:
        """Score one cluster.

        Parameters
        ----------
        task : FileGroupTask
            The files of the cluster ``_metadata["centroid_id"]``.

        Returns
        -------
        FileGroupTask
            The file of scores: ``id``, ``max_id`` and ``cosine_sim_score``. A task without files gives a warning and no
            file.

        Raises
        ------
        InvalidArgumentError
            If the task has no ``centroid_id``, or its ``filetype`` is not parquet.
        MissingColumnsError, EmbeddingError, DataReadError
            If the files cannot be read or compared. No file of scores is written.
        """
        return self._process_batch([task])[0]

    def process_batch(self, tasks: Sequence[FileGroupTask]) -> list[FileGroupTask]:
        """Score several clusters at once, which is faster for small ones.

        Parameters
        ----------
        tasks : sequence of FileGroupTask
            As for `process`, each for a different cluster.

        Returns
        -------
        list of FileGroupTask
            The results of `process`, in the same order.
        """
        return self._process_batch(tasks)

    def _process_batch(self, tasks: Sequence[FileGroupTask]) -> list[FileGroupTask]:
        clusters = [self._cluster(task) for task in tasks]
        if len(set(map(str, clusters))) < len(clusters):
            raise InvalidArgumentError(f"Tasks of one batch must have different centroid_id, not {some(clusters)}.")
        if len(set(map(type, clusters))) > 1:
            raise InvalidArgumentError(
                f"Tasks of one batch must have integers or strings as centroid_id, not {some(map(repr, clusters))}."
            )
        full = [task for task in tasks if task.data]
        return self._process(tasks, self._scan(self._locate(full)) if full else None)

    def batches(self, tasks: Sequence[FileGroupTask]) -> list[list[FileGroupTask]]:
        """Group tasks into batches of about equal cost for `process_batch`, planned by the footers of the files.

        The batches are as large as the partitions of `read_clusters`.

        Parameters
        ----------
        tasks : sequence of FileGroupTask
            As for `process`, each with files and for a different cluster.

        Raises
        ------
        MissingColumnsError
            If the files lack a column that is needed.
        EmbeddingError
            If the type of the embedding column cannot hold embeddings.
        DataReadError
            If a file cannot be read as Parquet, or files disagree about a column.
        """
        return [batch for batch, _ in self._planned(tasks, self._locate(tasks))] if tasks else []

    def _planned(
        self, tasks: Sequence[FileGroupTask], listing: Listing, client: Any = None
    ) -> list[tuple[list[FileGroupTask], _Footers]]:
        """Batches as `batches` makes them, each with what its files' footers say."""
        footers = self._scan(listing)
        sizes = footers.sizes()
        size = fitting_size(default_size(self.backend, client), self.backend, sum(nbytes for _, _, nbytes in sizes))
        by_cluster = {self._cluster(task): task for task in tasks}
        return [([by_cluster[cluster] for cluster in batch], footers.of(batch)) for batch in plan(sizes, size)]

    @staticmethod
    def _cluster(task: FileGroupTask) -> Any:
        filetype = task._metadata.get("filetype")
        if filetype != "parquet":
            raise InvalidArgumentError(f"PairwiseCosineSimilarityStage only supports parquet files, got {filetype!r}.")
        cluster = task._metadata.get("centroid_id")
        if cluster is None:
            raise InvalidArgumentError(f"centroid_id not found in the metadata of task {task.task_id!r}.")
        if not isinstance(cluster, Integral | str):
            raise InvalidArgumentError(
                f"centroid_id must be an integer or a string, not {cluster!r} as of task {task.task_id!r}."
            )
        # Integers of NumPy as well: the cluster column's type depends on it.
        return int(cluster) if isinstance(cluster, Integral) else cluster

    def _process(self, tasks: Sequence[FileGroupTask], footers: _Footers | None) -> list[FileGroupTask]:
        """Score tasks whose footers have been read. Return None if none has files."""
        clusters = [self._cluster(task) for task in tasks]
        written = {}
        if footers is not None:
            written = self._score(
                {cluster: task.data for cluster, task in zip(clusters, tasks, strict=True) if task.data}, footers
            )
        for cluster in clusters:
            if cluster not in written:
                warnings.warn(f"No data found for cluster {cluster}: its task has no files.", stacklevel=stack_level())
        return [
            replace(task, data=[written[cluster]] if cluster in written else [])
            for cluster, task in zip(clusters, tasks, strict=True)
        ]

    def _score(self, files: Mapping[Any, list[str]], footers: _Footers) -> dict[Any, str]:
        """Score clusters that have files, write a file for each, and return the paths."""
        start = time.perf_counter()
        backend = self._backend_for(footers)
        if self.backend == "cudf":
            share_memory_pool()  # A batch that pandas reads may be the first.
        with gpu_slot(DEVICE_OF_BACKEND[backend]):
            scores = pairwise_partition(
                self._read_with_kwargs(files) if self.read_kwargs else self._read(footers, backend),
                self._fields,
                self.ranking_strategy,
                SearchOptions(batch_size=self.pairwise_batch_size, embedding_dim=self.embedding_dim),
            )
        written = self._write(scores, files)
        if self.verbose:
            seconds = time.perf_counter() - start
            logger.info("pairwise: %d rows in clusters %s took %.3f s", len(scores), some(files), seconds)
        return written

    def _backend_for(self, footers: _Footers) -> str:
        """Return the backend that reads: pandas for more than a list column of cuDF holds; the GPU still searches."""
        stats = chain.from_iterable(footers.by_cluster.values())
        elements = sum(group.elements for file in stats for group in file.row_groups)
        return self.backend if elements <= CUDF_ELEMENTS or self.read_kwargs else "pandas"

    def _read(self, footers: _Footers, backend: str) -> Any:
        """Read the clusters into one frame with a column that tells them apart."""
        clusters = footers.by_cluster
        reader = replace(
            footers.reader,
            nullable=frozenset().union(*(file.nullable for files in clusters.values() for file in files)),
            folders=pa.schema({CLUSTER_FIELD: key_type(clusters)}),
            backend=backend,
        )
        fragments = [
            Fragment(file.path, file.rows, None, (cluster,), state=file.state)
            for cluster, files in clusters.items()
            for file in files
        ]
        return reader.read(fragments, [*self._columns(), CLUSTER_FIELD])

    def _read_with_kwargs(self, files: Mapping[Any, list[str]]) -> Any:
        module: Any = import_cudf() if self.backend == "cudf" else pd
        options: dict[str, Any] = {"dtype_backend": "pyarrow"} if self.backend == "pandas" else {}
        options |= {**self.read_kwargs, "columns": self._columns(), "storage_options": self.input_storage_options}
        with default_stream(DEVICE_OF_BACKEND[self.backend]):
            frames = [
                module.read_parquet(path, **options).assign(**{CLUSTER_FIELD: cluster})
                for cluster, paths in files.items()
                for path in paths
            ]
            return module.concat(frames, ignore_index=True)

    @property
    def _fields(self) -> Columns:
        return Columns(self.id_field, self.embedding_field, CLUSTER_FIELD)

    def _columns(self) -> list[str]:
        return list(dict.fromkeys([self.id_field, *self.ranking_strategy.required_columns, self.embedding_field]))

    def _locate(self, tasks: Sequence[FileGroupTask]) -> Listing:
        """Return the listing of the tasks' files."""
        options = self.input_storage_options or {}
        located = {
            self._cluster(task): [fsspec.core.url_to_fs(path, **options) for path in task.data] for task in tasks
        }
        by_cluster = {cluster: [path for _, path in files] for cluster, files in located.items()}
        fs = next(fs for files in located.values() for fs, _ in files)
        paths = [path for files in by_cluster.values() for path in files]
        return Listing(
            fs, {path: {"size": size} for path, size in zip(paths, fs.sizes(paths), strict=True)}, by_cluster
        )

    def _scan(self, listing: Listing) -> _Footers:
        """Read the footers of files, and check that they have the columns."""
        fs, infos, by_cluster = listing
        scan = scan_files(fs, infos, self._columns())
        reader = Reader.of(fs, scan)
        self._check_schema(scan, reader, next(iter(infos)))
        files = {file.path: file for file in scan.files}
        return _Footers(reader, {cluster: [files[path] for path in paths] for cluster, paths in by_cluster.items()})

    def _check_schema(self, scan: Scan, reader: Reader, path: str) -> None:
        names = scan.names
        self._fields.require(names, "id", "embedding", where=f" in {path}")
        self.ranking_strategy.check_columns(names)
        scan.check_columns(self._columns(), [], "")
        self.ranking_strategy.check_order(reader.unordered)
        meta = reader.meta(list({self.id_field, self.embedding_field}))
        self._fields.check_dtypes(meta, "id", "embedding", embedding_dim=self.embedding_dim)

    def _write(self, scores: Any, files: Mapping[Any, list[str]]) -> dict[Any, str]:
        """Write a file for each cluster, an empty one if it has no rows."""
        runs = pc.run_end_encode(to_arrow(scores[[CLUSTER_FIELD]])[CLUSTER_FIELD].combine_chunks())
        ranges = starmap(range, pairwise([0, *runs.run_ends.to_pylist()]))
        rows = dict(zip(runs.values.to_pylist(), ranges, strict=True))
        return write_clusters(
            scores[list(SCORE_COLUMNS)],
            {cluster: rows.get(cluster, range(0)) for cluster in files},
            self.output_path,
            storage_options=self.output_storage_options,
            **self.write_kwargs,
        )


@dataclass
class PairwiseStage(_Stage):
    """Pairwise similarity of all clusters in a folder.

    Parameters
    ----------
    id_field, embedding_field : str
        Columns of ids and embeddings.
    input_path : str
        Folder with the layout of k-means, ``<input_path>/centroid=<k>/*.parquet``.
    output_path : str
        Folder of the results, ``<output_path>/cluster_<k>.parquet``.
    ranking_strategy : RankingStrategy, optional
        Which rows of a cluster are preferred. It replaces `which_to_keep`, `sim_metric` and `random_seed`.
    embedding_dim : int, optional
        Length that every embedding must have.
    pairwise_batch_size : int, default 1024
        Number of queries that are multiplied at once, with as many candidates as memory allows.
    verbose : bool, default False
        Log rows and times to the logger ``dask_semdedup``, at level INFO.
    read_kwargs, write_kwargs : dict, optional
        As for `PairwiseCosineSimilarityStage`.
    which_to_keep : {"hard", "easy", "random"}, default "hard"
        Prefer rows far from their centroid, rows near it, or a random choice.
    sim_metric : {"cosine", "l2"}, default "cosine"
        Rank by the column ``cosine_dist_to_cent`` or ``l2_dist_to_cent``.
    random_seed : int, default 42
        Seed of ``which_to_keep="random"``.
    compute_dtype : {"auto", "float16", "float32"}, default "float32"
        As for `PairwiseCosineSimilarityStage`.

    Raises
    ------
    InvalidArgumentError
        As for `PairwiseCosineSimilarityStage`, and if `which_to_keep` or `sim_metric` is unknown or the seed is not an
        integer.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"id": [1, 2, 3], "embeddings": [[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]]})
    >>> frame = frame.assign(centroid=0, cosine_dist_to_cent=[0.3, 0.2, 0.1])
    >>> folder = tempfile.mkdtemp()
    >>> frame.to_parquet(folder, partition_cols=["centroid"])
    >>> (task,) = PairwiseStage("id", "embeddings", folder, f"{folder}-scores").run()
    >>> pd.read_parquet(task.data[0])
       id  max_id  cosine_sim_score
    0   1       1               0.0
    1   2       1               0.0
    2   3       2               0.8
    """

    id_field: str
    embedding_field: str
    input_path: str
    output_path: str
    ranking_strategy: RankingStrategy | None = None
    embedding_dim: int | None = None
    pairwise_batch_size: int = 1024
    verbose: bool = False
    read_kwargs: dict[str, Any] | None = None
    write_kwargs: dict[str, Any] | None = None
    which_to_keep: str = "hard"
    sim_metric: str = "cosine"
    random_seed: int = 42
    compute_dtype: str = "float32"
    _changes: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)

    name = "PairwiseStage"
    _parts: ClassVar[tuple[Any, Any]] = (ClusterWiseFilePartitioningStage, PairwiseCosineSimilarityStage)

    def __post_init__(self) -> None:
        self.ranking_strategy = choose_strategy(
            self.ranking_strategy, self.which_to_keep, self.sim_metric, self.id_field, self.random_seed
        )
        # The stages check the other arguments: what is wrong shall not wait for a run.
        self.decompose()

    def decompose(self) -> list[Any]:
        """Return the two stages that this one consists of.

        Returns
        -------
        list
            A `ClusterWiseFilePartitioningStage` and a `PairwiseCosineSimilarityStage`.

        Examples
        --------
        >>> stage = PairwiseStage("id", "embeddings", "kmeans_results", "pairwise_results")
        >>> [type(part).__name__ for part in stage.decompose()]
        ['ClusterWiseFilePartitioningStage', 'PairwiseCosineSimilarityStage']
        """
        partitioning, similarity = self._parts
        stages = [
            partitioning(self.input_path, (self.read_kwargs or {}).get("storage_options")),
            similarity(
                id_field=self.id_field,
                embedding_field=self.embedding_field,
                output_path=self.output_path,
                ranking_strategy=self.ranking_strategy,
                pairwise_batch_size=self.pairwise_batch_size,
                verbose=self.verbose,
                embedding_dim=self.embedding_dim,
                read_kwargs=self.read_kwargs,
                write_kwargs=self.write_kwargs,
                compute_dtype=self.compute_dtype,
            ),
        ]
        return [stage.with_(**self._changes.get(stage.name, {})) for stage in stages]

    def with_(self, changes: Mapping[str, dict[str, Any]]) -> Self:  # type: ignore[override]
        """Return a copy of the stage whose parts have other attributes.

        Parameters
        ----------
        changes : mapping
            From the name of a part to the arguments of its ``with_``.

        Raises
        ------
        InvalidArgumentError
            If a name is not that of a part.

        Examples
        --------
        >>> stage = PairwiseStage("id", "embeddings", "kmeans_results", "pairwise_results")
        >>> [part.batch_size for part in stage.with_({"PairwiseCosineSimilarityStage": {"batch_size": 8}}).decompose()]
        [1, 8]
        """
        names = [part.name for part in self._parts]
        if unknown := [name for name in changes if name not in names]:
            raise InvalidArgumentError(f"PairwiseStage has no part {some(map(repr, unknown))}: it has {some(names)}.")
        changed = copy(self)
        changed._changes = {name: self._changes.get(name, {}) | changes.get(name, {}) for name in names}
        return changed

    def run(self, client: Any = None) -> list[FileGroupTask]:
        """Score all clusters with Dask. Small clusters share a Dask task.

        Parameters
        ----------
        client : distributed.Client, optional
            Client to run on. By default the current client, if there is one; otherwise threads of this process.

        Returns
        -------
        list of FileGroupTask
            One per cluster, in ascending order, with the file of its scores.

        Raises
        ------
        InvalidArgumentError
            If `output_path` is `input_path` or inside it.
        DataNotFoundError, ClusterError
            As for `ClusterWiseFilePartitioningStage.process`.
        DataReadError, EmbeddingError, MissingColumnsError
            As for `PairwiseCosineSimilarityStage.process`. Columns are checked before anything runs.
        """
        partitioning, similarity = self.decompose()
        listing = partitioning._list()
        fs, output = fsspec.url_to_fs(self.output_path, **(similarity.output_storage_options or {}))
        _, source = fsspec.url_to_fs(self.input_path, **(similarity.input_storage_options or {}))
        if type(fs) is type(listing.fs) and is_within(fs, output, source):
            raise InvalidArgumentError(
                f"output_path {self.output_path!r} is within input_path: its files would be taken for embeddings. "
                "Choose a folder outside the input."
            )
        batches = similarity._planned(partitioning._tasks(listing), listing, client)
        name = f"process_batch-{uuid.uuid4().hex}"
        # Of tasks that do not depend on each other, Dask begins with those whose names come last.
        scored = [
            dask.delayed(partial(similarity._process, *batch))(dask_key_name=f"{name}-{number:08d}")
            for number, batch in zip(range(len(batches), 0, -1), batches, strict=True)
        ]
        tasks = [task for batch in dask.compute(*scored, scheduler=client) for task in batch]
        return sorted(tasks, key=lambda task: task._metadata["centroid_id"])


def _allowed(name: str, arguments: dict[str, Any] | None, *disallowed: str) -> dict[str, Any]:
    """Return a copy of keyword arguments. Raise if the stage itself sets one of them."""
    arguments = dict(arguments or {})
    if found := [key for key in disallowed if key in arguments]:
        raise InvalidArgumentError(f"{name} may not hold {', '.join(map(repr, found))}: the stage sets that itself.")
    return arguments
