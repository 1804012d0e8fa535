"""Removal of duplicates from the data that they were found in: an anti-join on ids that keeps everything else.

The ids to remove are brought to every partition of the data, or both are shuffled by id. Beside that, one pass over the
ids alone checks that none of those to remove stands in two rows; no partition is given out before it is through.
"""

from __future__ import annotations

import functools
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask import _expr as core
from dask.dataframe.dask_expr._collection import new_collection
from dask.dataframe.dask_expr._expr import Blockwise, Expr, Projection, plain_column_projection
from dask.dataframe.dispatch import concat

from dask_semdedup.clusters import ShuffleByCluster
from dask_semdedup.duplicates import SCORE_COLUMN, check_eps, eps_column, find_duplicates
from dask_semdedup.embeddings import array_of, check_plain_dtype, is_cudf, to_list
from dask_semdedup.errors import IdError, InvalidArgumentError, MissingColumnsError, some
from dask_semdedup.hashing import hash_ids
from dask_semdedup.ids import are_equal, check_same_kind, is_in

__all__ = ["remove_duplicates"]

HASH_COLUMN = "_semdedup_id_hash"
