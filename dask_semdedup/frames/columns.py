"""Names of columns that the package makes."""

from __future__ import annotations

from typing import Any

__all__ = ["DISTANCE_COLUMNS", "has_visits", "home_field"]


def home_field(cluster_field: str) -> str:
    """Name of the column that holds a row's own cluster, in frames where rows visit others.

    A row whose cluster is not its own is a visit: it is compared with the rows of that cluster, and none with it.
    """
    return f"home_{cluster_field}"


def has_visits(frame: Any, cluster_field: str) -> bool:
    """Whether rows of a frame may visit other clusters, as the column of their own ones, of integers, tells.

    Parameters
    ----------
    frame : pandas.DataFrame or cudf.DataFrame
        It may be empty.
    cluster_field : str
    """
    home = home_field(cluster_field)
    return home in frame.columns and getattr(frame[home].dtype, "kind", "") in ("i", "u")


SCORE_COLUMN = "cosine_sim_score"

SCORE_COLUMNS = ("id", "max_id", SCORE_COLUMN)

DISTANCE_COLUMNS = ("l2_dist_to_cent", "cosine_dist_to_cent")
