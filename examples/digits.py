"""Near-duplicates among 1,797 handwritten digits: the main job on real data, from images to a picture.

    python examples/digits.py [FOLDER]

The images are those that come with scikit-learn: 8 x 8 pixels, which serve as the embedding of 64 numbers. They are
clustered by k-means and written in the layout that the command reads, ``centroid=<k>/*.parquet``; the command scores
them; the pairs it found are drawn. All files are in FOLDER, by default ``demo``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from dask_semdedup.plots import pair_gallery, score_histogram

CLUSTERS = 20
EPS = 0.015


def write_clusters(pixels: np.ndarray, folder: Path) -> None:
    """Cluster the rows and write each cluster, with every row's distances to its centroid, to a folder of its own."""
    unit = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    kmeans = KMeans(CLUSTERS, n_init=4, random_state=42).fit(unit)
    centroids = kmeans.cluster_centers_[kmeans.labels_]
    cosine = (unit * centroids).sum(axis=1) / np.linalg.norm(centroids, axis=1)
    table = pa.table(
        {
            "id": np.arange(len(pixels)),
            "embeddings": pa.array(list(pixels.astype(np.float32))),
            "cosine_dist_to_cent": 1 - cosine,
            "l2_dist_to_cent": np.linalg.norm(unit - centroids, axis=1),
        }
    )
    for cluster in range(CLUSTERS):
        members = folder / f"centroid={cluster}"
        members.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(kmeans.labels_ == cluster), members / "part.0.parquet")


def run_command(clusters: Path, scores: Path) -> None:
    """Run the real command, as one would in a shell."""
    arguments = ["pairwise", str(clusters), str(scores), "--overwrite"]
    print("$ dask-semdedup", *arguments, flush=True)
    finished = subprocess.run([sys.executable, "-m", "dask_semdedup", *arguments], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def draw(images: np.ndarray, scores: pd.DataFrame) -> Figure:
    """Draw pairs of digits, from the most similar ones down, next to the histogram of all scores."""
    ranked = scores[scores["id"] != scores["max_id"]].sort_values("cosine_sim_score", ascending=False)
    dropped = (ranked["cosine_sim_score"] >= 1 - EPS).sum()
    figure = Figure(figsize=(14, 6.4), facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    for panel, title, pairs in zip(
        left.subfigures(3, 1, height_ratios=[1.75, 1, 1]),
        [f"The most similar of {dropped} duplicates: dropped", "Around 0.97: kept", "Around 0.90: kept"],
        [ranked.head(8), nearest(ranked, 0.97), nearest(ranked, 0.90)],
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
    """Write clusters of handwritten digits, their scores and a picture of them to FOLDER, "demo" by default."""
    digits = load_digits()
    write_clusters(digits.data, folder / "clusters")
    run_command(folder / "clusters", folder / "scores")
    picture = folder / "digits.png"
    draw(digits.images, pd.read_parquet(folder / "scores")).savefig(picture, dpi=110)
    print(f"The most similar pairs, and the scores of all digits: {picture}")


if __name__ == "__main__":
    main()
