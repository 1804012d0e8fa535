"""Near-duplicates among 1,797 handwritten digits: the main job on real data, from images to a report and a picture.

    python examples/digits.py [FOLDER]

The images are those that come with scikit-learn: 8 x 8 pixels, which serve as the embedding of 64 numbers. They are
written to a Parquet file, and the command compares each with all others. The pairs that it found are drawn. All files
are in FOLDER, by default ``demo``.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from dask_semdedup.plots import pair_gallery, score_histogram

EPS = 0.015


def write_digits(images: np.ndarray, path: Path) -> None:
    """Write an id, an image and an embedding for each digit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = images.reshape(len(images), -1).astype(np.float32)
    columns = {"id": np.arange(len(images)), "image": [encoded(image) for image in images], "embeddings": list(pixels)}
    pq.write_table(pa.table(columns), path)


def encoded(image: np.ndarray) -> bytes:
    """Return an image of values from 0 to 16, dark on white, as a PNG large enough to see."""
    file = io.BytesIO()
    Image.fromarray((255 - image * 255 / 16).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC).save(
        file, "PNG"
    )
    return file.getvalue()


def run_command(digits: Path, output: Path) -> None:
    """Run the real command, as one would in a shell."""
    arguments = ["run", str(digits), str(output), "--eps", str(EPS), "--image-field", "image", "--overwrite"]
    print("$ dask-semdedup", *arguments, flush=True)
    finished = subprocess.run([sys.executable, "-m", "dask_semdedup", *arguments], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def draw(images: np.ndarray, scores: pd.DataFrame, duplicates: pd.DataFrame) -> Figure:
    """Draw pairs of digits, from the most similar ones down, next to the histogram of the stored scores."""
    dropped = duplicates.sort_values("cosine_sim_score", ascending=False)
    near = (scores["cosine_sim_score"] >= 1 - EPS).sum()
    figure = Figure(figsize=(14, 6.4), facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    for panel, title, pairs in zip(
        left.subfigures(3, 1, height_ratios=[1.75, 1, 1]),
        [f"{len(dropped)} of {near} near-duplicates are dropped", "Around 0.97: kept", "Around 0.92: kept"],
        [dropped.head(8), nearest(scores, 0.97), nearest(scores, 0.92)],
        strict=True,
    ):
        queries, matches = images[pairs["id"]], images[pairs["max_id"]]
        similarities = pairs["cosine_sim_score"].to_numpy()
        pair_gallery(queries, matches, similarities, title=title, interpolation="bicubic", figure=panel)
    right.subplots_adjust(left=0.12, right=0.97, top=0.9, bottom=0.12)
    score_histogram(scores, EPS, figure=right)
    return figure


def nearest(scores: pd.DataFrame, similarity: float, count: int = 4) -> pd.DataFrame:
    """The rows whose scores are nearest to a similarity."""
    return scores.loc[(scores["cosine_sim_score"] - similarity).abs().nsmallest(count).index]


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default="demo")
def main(folder: Path) -> None:
    """Write handwritten digits, those to keep, a report and a picture to FOLDER, "demo" by default."""
    images, output, picture = load_digits().images, folder / "out", folder / "digits.png"
    write_digits(images, folder / "digits.parquet")
    run_command(folder / "digits.parquet", output)
    draw(images, pd.read_parquet(output / "scores"), pd.read_parquet(output / "duplicates")).savefig(picture, dpi=110)
    print(f"The most similar pairs, and the scores near the threshold: {picture}")


if __name__ == "__main__":
    main()
