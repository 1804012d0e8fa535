"""Fitting k-means to a sample."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_semdedup._validate import check_choice, check_positive
from dask_semdedup.errors import InvalidArgumentError
from dask_semdedup.steps.kmeans import normalise

if TYPE_CHECKING:
    pass

__all__ = ["default_n_clusters", "fit_centroids"]

INITS = ("k-means++", "k-means||", "random")

# Rows times clusters from which on a fit on mini-batches is worth what it loses.
PAIRS_WORTH_MINI_BATCHES = 1 << 28

MINI_BATCH = 16_384

# What an exact search compares within seconds on two cores, or 10 milliseconds on a GPU. To part these rows would lose
# duplicates and gain little: of 40,000 texts, the first cut already costs 4% of the duplicates at eps = 0.05.
ROWS_WORTH_PARTING = 50_000


def default_n_clusters(n_rows: int) -> int:
    """Choose a number of clusters: of 50,000 rows each, but no more than a quarter of the square root of the rows.

    Clusters part some duplicates from each other, so that below 100,000 rows there is but one. Assigning n rows to k
    centroids costs in proportion to n·k and searching the clusters to n²/k, so that the sum is least where k is in
    proportion to √n: that bounds the number from 160 million rows on. ``benchmarks/recall.py`` measures what is lost.

    Parameters
    ----------
    n_rows : int
        The rows that are to be clustered.

    Returns
    -------
    int
        At least 1.
    """
    return max(1, min(math.isqrt(n_rows) // 4, n_rows // ROWS_WORTH_PARTING))


def fit_centroids(
    rows: np.ndarray,
    n_clusters: int,
    *,
    max_iter: int = 300,
    tol: float = 1e-4,
    random_state: int = 42,
    init: str = "k-means++",
    n_init: int | str = "auto",
    oversampling_factor: float = 2.0,
    max_samples_per_batch: int = 32_768,
    device: str = "cpu",
) -> np.ndarray:
    """Fit k-means to rows.

    Parameters
    ----------
    rows : (n, d) float32 array
        They are brought to unit length first, in place where they are not.
    n_clusters : int
        The number of centroids.
    max_iter, tol, random_state, init, n_init
        As in scikit-learn. "k-means++" and "k-means||" both mean the one of them that the library has.
    oversampling_factor, max_samples_per_batch
        Of cuML: see there.
    device : {"cpu", "cuda"}
        On "cuda" it is cuML that fits, where it is installed.

    Returns
    -------
    (n_clusters, d) float32 array
        The centroids: means of unit rows, which are not of unit length themselves.

    Raises
    ------
    InvalidArgumentError
        If there are fewer rows than clusters, or an argument is not one of those allowed.

    Notes
    -----
    On a CPU, where rows times clusters are more than 2²⁸, the fit is on mini-batches of 16,384 rows
    (`sklearn.cluster.MiniBatchKMeans`).
    """
    import torch

    check_fit_arguments(n_clusters, max_iter, tol, random_state, init, n_init, oversampling_factor)
    if n_clusters > len(rows):
        raise too_many_clusters(n_clusters, len(rows), "rows to fit on")
    unit = normalise(torch.from_numpy(rows), in_place=True).numpy()
    arguments = {"n_clusters": n_clusters, "max_iter": max_iter, "tol": tol, "random_state": random_state}
    if device == "cuda" and importlib.util.find_spec("cuml"):
        extra = {"oversampling_factor": oversampling_factor, "max_samples_per_batch": max_samples_per_batch}
        return _fit_with_cuml(unit, init=init, n_init=n_init, **arguments, **extra)
    return _fit_with_sklearn(unit, init=init, n_init=n_init, **arguments)


def _fit_with_sklearn(rows: np.ndarray, *, init: str, **arguments: Any) -> np.ndarray:
    from sklearn.cluster import KMeans, MiniBatchKMeans

    init = "random" if init == "random" else "k-means++"
    if len(rows) * arguments["n_clusters"] > PAIRS_WORTH_MINI_BATCHES:
        model = MiniBatchKMeans(init=init, batch_size=MINI_BATCH, **arguments)
    else:
        # The rows are ours: it may shift them to their mean in place.
        model = KMeans(init=init, copy_x=False, **arguments)
    return np.ascontiguousarray(model.fit(rows).cluster_centers_, dtype=np.float32)


def _fit_with_cuml(rows: np.ndarray, *, init: str, **arguments: Any) -> np.ndarray:
    import cupy
    from cuml import KMeans

    init = "random" if init == "random" else "k-means||"
    model = KMeans(init=init, output_type="numpy", **arguments).fit(cupy.asarray(rows))
    return np.ascontiguousarray(model.cluster_centers_, dtype=np.float32)


def check_fit_arguments(
    n_clusters: int | None,
    max_iter: int,
    tol: float,
    random_state: int,
    init: str,
    n_init: int | str,
    oversampling_factor: float,
) -> None:
    """Raise unless the arguments of a fit are those allowed."""
    check_positive("n_clusters", n_clusters)
    check_positive("max_iter", max_iter)
    check_choice("init", init, INITS)
    if n_init != "auto":
        check_positive("n_init", n_init)
    if not isinstance(tol, int | float) or not 0 <= tol < math.inf:
        raise InvalidArgumentError(f"tol must be a number from 0, not {tol!r}.")
    if not isinstance(oversampling_factor, int | float) or not 0 <= oversampling_factor < math.inf:
        raise InvalidArgumentError(f"oversampling_factor must be a number from 0, not {oversampling_factor!r}.")
    if not isinstance(random_state, int | np.integer) or not 0 <= random_state < 2**32:
        raise InvalidArgumentError(f"random_state must be an integer from 0 to 2**32 - 1, not {random_state!r}.")


def too_many_clusters(n_clusters: int, n_rows: int, where: str) -> InvalidArgumentError:
    """The error for more clusters than rows."""
    return InvalidArgumentError(
        f"n_clusters is {n_clusters:,}, but there are only {n_rows:,} {where}. Ask for fewer clusters."
    )
