"""Draw ``benchmarks-rows.svg`` and ``benchmarks-tools.svg`` from the tables of ``docs/benchmarks/index.md``.

    python docs/images/benchmarks.py

A new row of a table is in the picture when this has run again. Of a range, the middle is drawn.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from dask_semdedup.report.plots import BLUE, INK, PALE, VERMILION

HERE = Path(__file__).parent
PAGE = HERE.parent / "benchmarks" / "index.md"
COLOURS = [BLUE, "#009E73", VERMILION, "#CC79A7"]


def read_table(heading: str) -> list[dict[str, str]]:
    """Return the rows of the first table below a heading of the page."""
    section = PAGE.read_text().split(f"# {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\|\n)+", section, re.MULTILINE)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def number(cell: str) -> float:
    """Return the number of a cell, or the middle of a range."""
    return mean(map(float, cell.replace(",", "").split("–")))


def draw_rows(table: list[dict[str, str]]) -> Figure:
    """Seconds by rows, a line for each kind of hardware."""
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    kinds = dict.fromkeys(row["hardware"] for row in table)
    for kind, colour in zip(kinds, COLOURS, strict=False):
        points = [(number(row["rows"]), number(row["seconds"])) for row in table if row["hardware"] == kind]
        axes.loglog(*zip(*points, strict=True), "o-", color=colour, markersize=6, linewidth=1.6)
        for rows, seconds in points:
            axes.annotate(
                f"{seconds:.2g} s", (rows, seconds), (-5, 6), textcoords="offset points", ha="right", color=INK
            )
        # A single point has its name below, in short lines: beside it there may be the lines of others.
        place = {"xytext": (-5, -8), "ha": "right", "va": "top"} if len(points) == 1 else {"xytext": (12, -3)}
        name = kind.replace(", ", ",\n") if len(points) == 1 else kind
        axes.annotate(name, points[-1], textcoords="offset points", color=colour, **place)
    axes.set_xlim(1e4, 8e7)
    axes.set_ylim(0.2, 250)
    axes.set_xlabel("Rows", color=INK)
    axes.set_ylabel("Seconds", color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=PALE, linewidth=0.6, alpha=0.6)
    return finished(figure)


def draw_tools(table: list[dict[str, str]]) -> Figure:
    """Seconds of each tool, with its recall."""
    figure = Figure(figsize=(5.2, 0.7 + 0.5 * len(table)), layout="constrained")
    axes = figure.add_subplot()
    names, seconds = [row["tool"] for row in table], [number(row["seconds"]) for row in table]
    axes.barh(names, seconds, color=[BLUE if "semdedup" in name else PALE for name in names], height=0.6)
    for place, row in enumerate(table):
        text = f"{row['seconds']} s, recall {row['recall']}"
        axes.annotate(text, (seconds[place], place), (5, 0), textcoords="offset points", va="center", color=INK)
    axes.set_xlim(0, 2.1 * max(seconds))
    axes.invert_yaxis()
    axes.set_xlabel("Seconds", color=INK)
    axes.tick_params("y", length=0)
    return finished(figure)


def finished(figure: Figure) -> Figure:
    """Return the figure without what frames it."""
    (axes,) = figure.axes
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=INK, which="both", color=PALE)
    return figure


def main() -> None:
    """Write the pictures beside this script, the same bytes each time."""
    rows, tools = read_table("From Parquet files to kept rows"), read_table("faiss and SemHash")
    with mpl.rc_context({"svg.hashsalt": "benchmarks", "font.size": 10}):
        for name, figure in (("rows", draw_rows(rows)), ("tools", draw_tools(tools))):
            figure.savefig(HERE / f"benchmarks-{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
