"""Fitting k-means to a sample."""

from __future__ import annotations

import importlib.util
import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dask_semdedup._validate import check_choice, check_positive, stack_level
from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.steps.kmeans import normalise

__all__ = ["KMeansOptions", "default_n_clusters", "fit_centroids", "sample_size"]

INITS = ("k-means++", "k-means||", "random")

# Rows times clusters from which on a fit on mini-batches is worth what it loses.
PAIRS_WORTH_MINI_BATCHES = 1 << 28

MINI_BATCH = 16_384

# Rows of a sample for each cluster: the default, and what is too few to fit on.
ROWS_PER_CLUSTER = 256
MIN_SAMPLE = 16_384
FEW_ROWS_PER_CLUSTER = 40

# What an exact search compares within seconds on two cores, or 10 milliseconds on a GPU. To split these rows would
# lose duplicates and gain little: of 40,000 texts, the first cut already costs 4% of the duplicates at eps = 0.05.
ROWS_WORTH_SPLITTING = 50_000


def default_n_clusters(n_rows: int) -> int:
    """Return a number of clusters: one per 50,000 rows, but at most a quarter of the square root of the rows.

    Clusters separate some duplicates, so there is only one below 100,000 rows. Assigning n rows to k centroids costs in
    proportion to n·k, and searching the clusters in proportion to n²/k. The sum is least if k is in proportion to √n,
    which bounds the number from 160 million rows on. ``benchmarks/recall.py`` measures what is lost.

    Parameters
    ----------
    n_rows : int
        Number of rows to cluster.

    Returns
    -------
    int
        At least 1.
    """
    return max(1, min(math.isqrt(n_rows) // 4, n_rows // ROWS_WORTH_SPLITTING))


@dataclass(frozen=True)
class KMeansOptions:
    """Options of a fit of k-means.

    Parameters
    ----------
    fit_data_fraction : float, optional
        Share of all rows that is in the sample.
    max_iter, tol, random_state, init, n_init
        As in scikit-learn. Both "k-means++" and "k-means||" select the one that the library has.
    oversampling_factor, max_samples_per_batch
        As in cuML.

    Raises
    ------
    InvalidArgumentError
        If an option is invalid.
    """

    fit_data_fraction: float | None = None
    max_iter: int = 300
    tol: float = 1e-4
    random_state: int = 42
    init: str = "k-means++"
    n_init: int | str = "auto"
    oversampling_factor: float = 2.0
    max_samples_per_batch: int = 32_768

    def __post_init__(self) -> None:
        check_positive("max_iter", self.max_iter)
        check_positive("max_samples_per_batch", self.max_samples_per_batch)
        check_choice("init", self.init, INITS)
        if self.n_init != "auto":
            check_positive("n_init", self.n_init)
        for name in ("tol", "oversampling_factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InvalidArgumentError(f"{name} must be a number from 0, not {value!r}.", parameters=[name])
        seed, fraction = self.random_state, self.fit_data_fraction
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise InvalidArgumentError(
                f"random_state must be an integer from 0 to 2**32 - 1, not {seed!r}.",
                parameters=["random_state"],
            )
        if fraction is not None and not (isinstance(fraction, int | float) and 0 < fraction <= 1):
            raise InvalidArgumentError(
                f"fit_data_fraction must be a number above 0 and up to 1, not {fraction!r}.",
                parameters=["fit_data_fraction"],
            )


def fit_centroids(
    rows: np.ndarray, n_clusters: int, options: KMeansOptions | None = None, *, device: str = "cpu"
) -> np.ndarray:
    """Fit k-means to rows.

    Parameters
    ----------
    rows : (n, d) float32 array
        Rows. Those not of unit length are normalised first, in place.
    n_clusters : int
        Number of centroids.
    options : KMeansOptions, optional
        How to fit.
    device : {"cpu", "cuda"}
        On "cuda", cuML fits if it is installed.

    Returns
    -------
    (n_clusters, d) float32 array
        Centroids. They are means of unit rows and do not have unit length.

    Raises
    ------
    InvalidArgumentError
        If there are fewer rows than clusters.

    Notes
    -----
    On a CPU, if rows times clusters exceed 2²⁸, the fit uses mini-batches of 16,384 rows
    (`sklearn.cluster.MiniBatchKMeans`).
    """
    import torch

    options = options or KMeansOptions()
    if n_clusters > len(rows):
        raise too_many_clusters(n_clusters, len(rows), "rows to fit on")
    unit = normalise(torch.from_numpy(rows), in_place=True).numpy()
    fit = _fit_with_cuml if device == "cuda" and importlib.util.find_spec("cuml") else _fit_with_sklearn
    return np.ascontiguousarray(fit(unit, n_clusters, options), dtype=np.float32)


def _shared_arguments(n_clusters: int, options: KMeansOptions) -> dict[str, Any]:
    names = ("max_iter", "tol", "random_state", "n_init")
    return {"n_clusters": n_clusters} | {name: getattr(options, name) for name in names}


def _fit_with_sklearn(rows: np.ndarray, n_clusters: int, options: KMeansOptions) -> np.ndarray:
    from sklearn.cluster import KMeans, MiniBatchKMeans

    init = "random" if options.init == "random" else "k-means++"
    arguments = _shared_arguments(n_clusters, options)
    if len(rows) * n_clusters > PAIRS_WORTH_MINI_BATCHES:
        model = MiniBatchKMeans(init=init, batch_size=MINI_BATCH, **arguments)
    else:
        # The rows are ours: it may shift them to their mean in place.
        model = KMeans(init=init, copy_x=False, **arguments)
    model.fit(rows)
    return _means(rows, model.labels_, model.cluster_centers_)


def _means(rows: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the mean of the rows of each centroid, as one more step of Lloyd's algorithm.

    Threads of scikit-learn sum rows in any order, so its centroids differ in their last bits from run to run.
    """
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(len(centroids) + 1))
    means = centroids.astype(np.float64)
    for number, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            means[number] = rows[order[start:stop]].mean(axis=0, dtype=np.float64)
    return means


def _fit_with_cuml(rows: np.ndarray, n_clusters: int, options: KMeansOptions) -> np.ndarray:
    import cupy
    from cuml import KMeans

    model = KMeans(
        init="random" if options.init == "random" else "k-means||",
        output_type="numpy",
        oversampling_factor=options.oversampling_factor,
        max_samples_per_batch=options.max_samples_per_batch,
        **_shared_arguments(n_clusters, options),
    )
    return model.fit(cupy.asarray(rows)).cluster_centers_


def too_many_clusters(n_clusters: int, n_rows: int, where: str) -> InvalidArgumentError:
    """Return the error for more clusters than rows."""
    return InvalidArgumentError(
        f"n_clusters is {n_clusters:,}, but there are only {n_rows:,} {where}. Ask for fewer clusters.",
        parameters=["n_clusters"],
    )


def sample_size(n_clusters: int | None, n_rows: int, fraction: float | None) -> tuple[int, int]:
    """Return the number of clusters to fit, and of the rows to fit them on."""
    if n_rows == 0:
        raise InvalidArgumentError("The frame has no rows to fit k-means on.")
    if n_clusters is None:
        n_clusters = default_n_clusters(n_rows)
    if n_clusters > n_rows:
        raise too_many_clusters(n_clusters, n_rows, "rows")
    enough = max(ROWS_PER_CLUSTER * n_clusters, MIN_SAMPLE)
    size = min(n_rows, enough) if fraction is None else math.ceil(fraction * n_rows)
    if n_clusters > size:
        raise too_many_clusters(n_clusters, size, f"rows in the sample, {fraction:.2g} of all")
    if n_clusters > 1 and size < FEW_ROWS_PER_CLUSTER * n_clusters:
        warnings.warn(
            f"k-means is fitted to {size:,} rows for {n_clusters:,} clusters, fewer than {FEW_ROWS_PER_CLUSTER} a "
            "cluster: many clusters will be poorly estimated. Ask for fewer clusters, or fit on more rows.",
            stacklevel=stack_level(),
        )
    return n_clusters, size
