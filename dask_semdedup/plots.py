"""Figures of scores and of pairs of documents."""

from __future__ import annotations

from dask_semdedup.report.gallery import pairs_around, text_gallery
from dask_semdedup.report.plots import cluster_sizes, duplicates_curve, pair_gallery, score_histogram

__all__ = ["cluster_sizes", "duplicates_curve", "pair_gallery", "pairs_around", "score_histogram", "text_gallery"]
