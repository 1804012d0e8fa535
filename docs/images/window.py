"""Draw ``window.svg``: what the certificate excludes, for one of the handwritten digits.

    python docs/images/window.py

Coarse scores are those of bfloat16 copies, with the measured bound on their error; exact ones those of the digits.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from dask_semdedup.report.plots import BLUE, INK, PALE, VERMILION
from dask_semdedup.search import certify

# A digit whose best coarse candidate is not its nearest.
QUERY, SHOWN = 1639, 16


def draw(rows: torch.Tensor) -> Figure:
    """Coarse scores of the best candidates of one query, the window, and the exact scores within it."""
    half, residual = certify.half_copy(certify.measure(rows), torch.bfloat16)
    coarse = half[:QUERY].float() @ half[QUERY].float()
    exact = rows[:QUERY].double() @ rows[QUERY].double()
    bound = float(certify.half_bound(residual[QUERY], residual[:QUERY].max(), rows.shape[1]))
    best = coarse.topk(SHOWN).indices
    left = coarse.max() - 2 * bound
    inside = int((coarse >= left).sum())

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.axhspan(left, coarse.max(), color=VERMILION, alpha=0.10, linewidth=0)
    axes.axhline(left, color=VERMILION, linewidth=1.2, linestyle=(0, (4, 2)))
    place = torch.arange(SHOWN)
    for part, colour, label in (
        (place >= inside, BLUE, "coarse score and its bound: excluded"),
        (place < inside, VERMILION, "coarse score and its bound: inside the window"),
    ):
        points = axes.errorbar(
            place[part], coarse[best][part], bound, fmt="o", color=colour, markersize=4, elinewidth=1, label=label
        )
        points[2][0].set_alpha(0.45)
    axes.plot(place[:inside] + 0.25, exact[best][:inside], "_", color=INK, markersize=13, mew=2, label="exact score")
    axes.annotate(
        "best coarse score − 2β",
        (SHOWN - 0.6, float(left)),
        (0, 5),
        textcoords="offset points",
        ha="right",
        color=VERMILION,
    )
    axes.set_xlim(-0.8, SHOWN - 0.4)
    axes.set_xticks([])
    axes.set_xlabel(f"The {SHOWN} best of {QUERY:,} candidates, by coarse score", color=INK, labelpad=8)
    axes.set_ylabel("Cosine similarity", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=INK, color=PALE)
    axes.legend(frameon=False, loc="lower left", labelcolor=INK)
    return figure


def main() -> None:
    """Write the picture beside this script, the same bytes each time."""
    digits = torch.nn.functional.normalize(torch.from_numpy(load_digits().data).float())
    with mpl.rc_context({"svg.hashsalt": "window", "font.size": 10}):
        path = Path(__file__).with_suffix(".svg")
        draw(digits).savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
