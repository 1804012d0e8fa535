"""``ddf.semdedup``: checks arguments against the schema and builds lazy frames; computes nothing."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import dask.dataframe as dd
from dask.dataframe.dask_expr._collection import new_collection
from dask.dataframe.dask_expr._expr import Blockwise
from dask.dataframe.extensions import register_dataframe_accessor

from dask_semdedup._validate import check_choice, check_positive
from dask_semdedup.clusters import align, no_cluster_column
from dask_semdedup.duplicates import EPS_GRID, eps_curve, find_duplicates
from dask_semdedup.embeddings import check_embedding_dtype, check_plain_dtype
from dask_semdedup.errors import InvalidArgumentError, MissingColumnsError
from dask_semdedup.groups import find_groups
from dask_semdedup.pairwise import DEVICES, SCORE_COLUMNS, pairwise_meta, pairwise_partition
from dask_semdedup.ranking import RankingStrategy, choose_strategy
from dask_semdedup.removal import remove_duplicates

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

    def duplicates(self, eps: float | Sequence[float] = 0.01) -> dd.DataFrame:
        """Select the duplicates from a frame of scores: the rows with ``cosine_sim_score >= 1 - eps``.

        Parameters
        ----------
        eps : float or sequence of float, default 0.01
            Cosine distance, from 0 to 2, within which a row is a duplicate of one that is preferred over it. From 1
            on, the first rows of all clusters are selected as well, since their score is 0.

        Returns
        -------
        dask.dataframe.DataFrame
            For one eps, the rows that are duplicates, with all columns. For several, all rows, with one more column of
            bool for each eps, named as ``eps=0.01``.

        Raises
        ------
        MissingColumnsError
            If the frame has no column ``cosine_sim_score``.
        InvalidArgumentError
            If `eps` is not a number from 0 to 2, or a sequence of such that is empty or repeats one.

        Examples
        --------
        >>> import pandas as pd
        >>> scores = pd.DataFrame({"id": [1, 2, 3], "max_id": [1, 1, 2], "cosine_sim_score": [0.0, 0.995, 0.9]})
        >>> scores = dd.from_pandas(scores, npartitions=1)
        >>> scores.semdedup.duplicates(eps=0.05).compute()
           id  max_id  cosine_sim_score
        1   2       1             0.995
        >>> scores.semdedup.duplicates(eps=[0.05, 0.1])[["id", "eps=0.05", "eps=0.1"]].compute()
           id  eps=0.05  eps=0.1
        0   1     False    False
        1   2      True     True
        2   3     False     True
        """
        return find_duplicates(self._ddf, eps)

    def eps_curve(self, eps: Sequence[float] = EPS_GRID) -> dd.DataFrame:
        """Count the duplicates at several eps, in one pass over a frame of scores.

        Parameters
        ----------
        eps : sequence of float
            Cosine distances, from 0 to 2. By default 0, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03,
            0.05, 0.07, 0.1, 0.15, 0.2 and 0.3.

        Returns
        -------
        dask.dataframe.DataFrame
            Of one partition, a row for each eps, in the order given: ``eps`` (float64), ``duplicates`` (int64), which
            is the number of rows of `duplicates` at that eps, and ``share`` (float64), their share of all rows.

        Raises
        ------
        MissingColumnsError
            If the frame has no column ``cosine_sim_score``.
        InvalidArgumentError
            If `eps` is empty, repeats a value, or has one that is not a number from 0 to 2.

        Examples
        --------
        >>> import pandas as pd
        >>> scores = pd.DataFrame({"id": [1, 2, 3, 4], "max_id": [1, 1, 2, 1], "cosine_sim_score": [0, 0.995, 0.9, 1]})
        >>> dd.from_pandas(scores, npartitions=2).semdedup.eps_curve([0, 0.01, 0.1]).compute()
            eps  duplicates  share
        0  0.00           1   0.25
        1  0.01           2   0.50
        2  0.10           3   0.75
        """
        return eps_curve(self._ddf, eps)

    def groups(self, eps: float = 0.01) -> dd.DataFrame:
        """Find the document that is kept in the end for each duplicate in a frame of scores.

        The row that makes another one a duplicate, its ``max_id``, may be a duplicate itself. Such chains are followed
        to the row that is kept.

        Parameters
        ----------
        eps : float, default 0.01
            Cosine distance, from 0 to 2, within which a row is a duplicate of one that is preferred over it. The first
            row of a cluster, which is its own ``max_id``, is kept whatever eps is.

        Returns
        -------
        dask.dataframe.DataFrame
            Of one partition, a row for each duplicate, in the order of the scores: ``id`` and ``kept_id``, of the ids'
            own dtype, and ``n_duplicates`` (int64), the number of duplicates that the kept document stands for.

        Raises
        ------
        MissingColumnsError
            If the frame has no columns ``id``, ``max_id`` and ``cosine_sim_score``.
        InvalidArgumentError
            If `eps` is not a number from 0 to 2.
        IdError
            When computed, if ids of duplicates are null or repeat, or if their ``max_id`` lead in a circle.

        Notes
        -----
        All duplicates come together in one task, with their two columns of ids and no others: chains may cross
        clusters where rows were also compared in a second one. Measured on 5 million duplicates with ids of int64, that
        task takes 250 bytes for each of them; the number of rows that are no duplicates does not matter.

        Examples
        --------
        >>> import pandas as pd
        >>> scores = pd.DataFrame({"id": [1, 2, 3], "max_id": [1, 1, 2], "cosine_sim_score": [0.0, 0.995, 0.99]})
        >>> dd.from_pandas(scores, npartitions=2).semdedup.groups(eps=0.01).compute()
           id  kept_id  n_duplicates
        0   2        1             2
        1   3        1             2
        """
        return find_groups(self._ddf, eps)

    def remove(
        self,
        duplicates: Any,
        id_field: str = "id",
        *,
        duplicates_id_field: str = "id",
        eps: float | None = None,
        broadcast: bool = True,
    ) -> dd.DataFrame:
        """Remove duplicates from the data that they were found in: all rows whose ids are among theirs.

        Parameters
        ----------
        duplicates : Dask, pandas or cuDF DataFrame
            What `duplicates` or `groups` returns, or any frame with the ids to remove. In a frame of scores, rows that
            are their own ``max_id`` are the first of their cluster, and are kept.
        id_field : str, default "id"
            The column of ids of this frame: integers or strings, of any dtype. Rows with a null id are kept.
        duplicates_id_field : str, default "id"
            The column of ids of `duplicates`. Integers of other widths, and strings of other dtypes, are the same ids.
        eps : float, optional
            Which eps to go by, where `duplicates` were found at several, or are all scores.
        broadcast : bool, default True
            Send the ids of all duplicates to every partition of this frame. Where they are too many for the memory of a
            worker, say False: then both frames are shuffled by id.

        Returns
        -------
        dask.dataframe.DataFrame
            The rows that are left, with all columns and dtypes. With `broadcast` also the partitions, their divisions
            and the order of rows stay; without it there are as many partitions, in which rows stand in another order.

        Raises
        ------
        MissingColumnsError
            If a frame has no column of ids, or `duplicates` no scores to compare with `eps`.
        InvalidArgumentError
            If the ids of the two frames are of different types, `duplicates` is no such frame, it was found at several
            eps and none of them is chosen, or `eps` is not a number from 0 to 2.
        IdError
            When computed, if an id to remove stands in several rows of this frame, of which at most one is a
            duplicate. No partition is given out before that is known.

        Notes
        -----
        The column of ids is read twice: by itself for that check, and with all others. Where it cannot be read by
        itself, because the frame is the result of functions that Dask cannot see into, partitions wait in memory until
        the last one is checked: write or persist such a frame before.

        Examples
        --------
        >>> import pandas as pd
        >>> documents = pd.DataFrame({"id": ["a", "b", "c"], "text": ["some text", "other text", "some text!"]})
        >>> scores = pd.DataFrame({"id": ["a", "c"], "max_id": ["a", "a"], "cosine_sim_score": [0.0, 0.995]})
        >>> duplicates = dd.from_pandas(scores, npartitions=1).semdedup.duplicates(eps=0.01)
        >>> dd.from_pandas(documents, npartitions=2).semdedup.remove(duplicates).compute()
          id        text
        0  a   some text
        1  b  other text
        """
        return remove_duplicates(
            self._ddf,
            duplicates,
            id_field,
            duplicates_id_field=duplicates_id_field,
            eps=eps,
            broadcast=broadcast,
        )

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
