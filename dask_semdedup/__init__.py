"""Exact semantic deduplication of embedding tables, lazily, with Dask DataFrame.

Importing the package gives every Dask DataFrame the accessor ``semdedup``.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from dask_semdedup import accessor as _accessor  # noqa: F401  (registers ddf.semdedup)
from dask_semdedup.errors import (
    ClusterError,
    DataNotFoundError,
    DataReadError,
    EmbeddingError,
    IdError,
    InvalidArgumentError,
    MissingColumnsError,
    MissingDependencyError,
    OutputError,
    OutputExistsError,
    SemDedupError,
    ZeroEmbeddingWarning,
)
from dask_semdedup.lazy.clusters import read_clusters
from dask_semdedup.lazy.tables import from_pandas, read_table
from dask_semdedup.steps.ranking import RankingStrategy

try:
    __version__ = version("dask-semdedup")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ClusterError",
    "DataNotFoundError",
    "DataReadError",
    "EmbeddingError",
    "IdError",
    "InvalidArgumentError",
    "MissingColumnsError",
    "MissingDependencyError",
    "OutputError",
    "OutputExistsError",
    "RankingStrategy",
    "SemDedupError",
    "ZeroEmbeddingWarning",
    "__version__",
    "from_pandas",
    "read_clusters",
    "read_table",
]


def __dir__() -> list[str]:
    """List what users need: not the modules, nor what is imported to make the version."""
    return __all__
