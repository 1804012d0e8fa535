"""Draw ``cells.svg``: two cells, the plane between them, and why one of two near sketches visits the other's cell.

    python docs/images/cells.py

Orange are the members of each cell that stand within half the reach of the plane, and visit the other cell.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from dask_semdedup.report.plots import BLUE, INK, VERMILION

REACH = 1.0
P, Q = np.array([-0.2, 0.3]), np.array([0.62, -0.1])
A, B = np.array([-1.55, 0.0]), np.array([1.55, 0.0])


def draw() -> Figure:
    """Members of two cells, the plane, and the strip of those that visit the other cell."""
    rng = np.random.default_rng(3)
    figure = Figure(figsize=(5.2, 2.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(-REACH / 2, REACH / 2, color=VERMILION, alpha=0.10, linewidth=0)
    axes.axvline(0, color=INK, linewidth=1.4)
    points = np.concatenate([rng.normal(c, (0.6, 0.45), size=(26, 2)) for c in (A, B)])
    points = points[(np.abs(points[:, 1]) < 1) & (np.linalg.norm(points[:, None] - [P, Q], axis=2).min(axis=1) > 0.2)]
    visits = np.abs(points[:, 0]) <= REACH / 2
    axes.plot(*points[~visits].T, "o", color=BLUE, markersize=3.5, alpha=0.55)
    axes.plot(*points[visits].T, "o", color=VERMILION, markersize=3.5, alpha=0.7)
    for name, centre in (("$c_a$", A), ("$c_b$", B)):
        axes.plot(*centre, "+", color=INK, markersize=13, mew=2)
        axes.annotate(name, centre, (7, 7), textcoords="offset points", color=INK, fontsize=13)
    axes.plot(*np.stack([P, Q]).T, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    for name, point, colour, offset in (("$p$", P, VERMILION, (-15, 3)), ("$q$", Q, BLUE, (8, -9))):
        axes.plot(*point, "o", color=colour, markersize=8)
        axes.annotate(name, point, offset, textcoords="offset points", color=INK, fontsize=13)
    arrow = {"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0}
    for side in (-1, 1):
        axes.annotate("", (0, -0.92), (side * REACH / 2, -0.92), arrowprops=arrow)
        axes.annotate("$r/2$", (side * REACH / 4, -0.9), (0, 3), textcoords="offset points", ha="center", color=INK)
    axes.text(-3.1, 0.98, "cell $a$", color=INK, va="top", fontsize=12)
    axes.text(3.1, 0.98, "cell $b$", color=INK, va="top", ha="right", fontsize=12)
    axes.set_xlim(-3.2, 3.2)
    axes.set_ylim(-1.05, 1.05)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return figure


def main() -> None:
    """Write the picture beside this script, the same bytes each time."""
    with mpl.rc_context({"svg.hashsalt": "cells", "font.size": 10}):
        path = Path(__file__).with_suffix(".svg")
        draw().savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
