"""Figures to look at before choosing eps: scores, duplicates, clusters and pairs of documents.

>>> from dask_semdedup import plots

`score_histogram`, `duplicates_curve` and `cluster_sizes` take what ``ddf.semdedup.pairwise()`` returns, read partition
by partition. `pairs_around` selects the pairs on both sides of a threshold; `pair_gallery` and `text_gallery` show
their images and texts side by side.

A figure is a :class:`matplotlib.figure.Figure` made without pyplot: no global state changes and no display is needed.
A notebook shows it, a script calls ``savefig``. With ``figure=``, a function draws on that figure or subfigure instead.
"""

from __future__ import annotations

from dask_semdedup.report.gallery import pairs_around, text_gallery
from dask_semdedup.report.plots import cluster_sizes, duplicates_curve, pair_gallery, score_histogram

__all__ = ["cluster_sizes", "duplicates_curve", "pair_gallery", "pairs_around", "score_histogram", "text_gallery"]
