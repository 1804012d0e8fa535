"""The command ``dask-semdedup pairwise``: scores of clustered embeddings, and a summary."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import dask
from rich.table import Table

from dask_semdedup.cli.application import Command, as_text, options_of_output, refuse_contradictions, tell
from dask_semdedup.cli.checks import clusters_needed, refuse_dimensions, refuse_run, refuse_strings
from dask_semdedup.cli.execution import log_to, on_cluster, show_progress
from dask_semdedup.cli.files import refuse_memory_output, work_of, write_frame
from dask_semdedup.cli.options import (
    DEFAULT_EPS,
    cluster_option,
    embedding_options,
    eps_option,
    execution_options,
    id_option,
    keep_options,
    message_options,
    search_options,
    seed_option,
)
from dask_semdedup.io.staging import staged_folder

if TYPE_CHECKING:
    from distributed import Client

    from dask_semdedup.steps.ranking import RankingStrategy

EXAMPLES = """
Examples:

\b
  # Score clusters/centroid=<k>/*.parquet on this machine
  dask-semdedup pairwise clusters/ scores/

\b
  # Prefer rows of high quality, and write only rows whose similarity is at least 0.95
  dask-semdedup pairwise clusters/ duplicates/ --rank-by quality:desc --eps 0.05

\b
  # Run on a Dask cluster, and read and write object storage
  dask-semdedup pairwise s3://bucket/clusters s3://bucket/scores --scheduler tcp://10.0.0.1:8786
"""


@click.command(
    "pairwise",
    cls=Command,
    epilog=EXAMPLES,
    short_help="Score embeddings within clusters.",
)
@click.argument("input_path", metavar="INPUT")
@click.argument("output_path", metavar="OUTPUT")
@id_option
@cluster_option
@embedding_options
@keep_options("the centroid", ", which need its column from k-means: cosine_dist_to_cent or l2_dist_to_cent")
@seed_option("Seed of '--which-to-keep random'.")
@eps_option(
    "Write only duplicates: rows whose similarity is at least 1 - EPS. This takes less time.  "
    "[default: write the scores of all rows]",
    default=None,
)
@search_options
@execution_options
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace OUTPUT if it holds nothing but scores, and remove what a stopped run with other options has left.",
)
@message_options
@click.pass_context
def command(
    ctx: click.Context,
    *,
    input_path: str,
    output_path: str,
    cluster_field: str,
    ranking_strategy: RankingStrategy | None,
    eps: float | None,
    backend: str | None,
    partition_size: str | None,
    storage_options: dict[str, Any],
    scheduler: str | None,
    workers: int | None,
    overwrite: bool,
    quiet: bool,
    verbose: bool,
    **search_options: Any,
) -> None:
    """Score each row by its similarity to the most similar preferred row of its cluster.

    INPUT is a folder of clustered embeddings: INPUT/centroid=<k>/*.parquet, or Parquet files with a cluster column. For
    embeddings without clusters, use 'dask-semdedup run'. OUTPUT is a folder of Parquet files with the columns id,
    max_id (the most similar preferred row), cosine_sim_score and the cluster. It holds all rows, or only duplicates
    with --eps. It appears when all of it is written. After a run that was stopped or killed, the same command resumes:
    finished parts are kept in OUTPUT.partial.

    Both may be local paths or fsspec URLs.
    """
    from dask_semdedup.frames.columns import Columns
    from dask_semdedup.io.listing import checksum, list_files
    from dask_semdedup.io.scores import SCORES, Compared, write_compared
    from dask_semdedup.lazy.clusters import read_listed
    from dask_semdedup.lazy.scores import count_rows

    refuse_contradictions(ctx)
    refuse_memory_output(output_path)
    refuse_run(input_path, storage_options, "clusters, which a run with --n-clusters writes")
    start = time.perf_counter()
    with clusters_needed():
        fs, files = list_files(input_path, storage_options)
        embeddings = read_listed(fs, files, cluster_field=cluster_field, backend=backend, partition_size=partition_size)
    refuse_dimensions(embeddings, search_options["embedding_field"], input_path)
    refuse_strings(embeddings, search_options["embedding_field"], input_path)
    scores = embeddings.semdedup.pairwise(
        eps=eps, cluster_field=cluster_field, ranking_strategy=ranking_strategy, verbose=verbose, **search_options
    )
    listed = time.perf_counter() - start
    with (
        staged_folder(
            output_path,
            input_path,
            contents=SCORES,
            overwrite=overwrite,
            storage_options=storage_options,
            work={"files": checksum(files), **options_of_output(ctx), **work_of(scores)},
        ) as folder,
        show_progress(enabled=not quiet) as progress,
    ):

        def write(client: Client | None) -> tuple[Summary, float]:
            start = time.perf_counter() - listed
            if verbose:
                progress.console.print(f"{scores.npartitions:,} partitions, on {client or 'threads of this process'}")
            written = write_frame(scores, folder, storage_options, client=client, progress=progress, title="Comparing")
            seconds = time.perf_counter() - start
            if eps is None:
                return summarise(folder, storage_options, cluster_field=cluster_field), seconds
            rows = count_rows(embeddings, Columns(cluster=cluster_field))
            write_compared(Compared(eps, rows), folder, storage_options)
            return Summary(clusters=len(rows), rows=int(rows.sum()), duplicates=written, eps=eps), seconds

        if verbose:
            log_to(progress.console)
        summary, seconds = on_cluster(write, scheduler, workers, [input_path, output_path], progress)
    if not quiet:
        where = f"{'Scores' if eps is None else 'Duplicates'} in {output_path}"
        tell(as_text(summary_table(summary, seconds=seconds)), f"  {where}", rest=f"All is written: {where}.")


@dataclass(frozen=True)
class Summary:
    """The numbers that the command prints at the end."""

    clusters: int
    rows: int
    duplicates: int
    eps: float


def summarise(folder: str, storage_options: dict[str, Any], *, cluster_field: str) -> Summary:
    """Return the summary of the scores of all rows that were written."""
    from dask_semdedup.lazy.tables import read_scores

    eps = DEFAULT_EPS
    scores = read_scores(folder, cluster_field=cluster_field, storage_options=storage_options)
    duplicates = scores.semdedup.duplicates(eps=eps)
    rows, dropped = dask.compute(scores[cluster_field].value_counts(), duplicates["id"].size)
    return Summary(clusters=len(rows), rows=int(rows.sum()), duplicates=int(dropped), eps=eps)


def summary_table(summary: Summary, *, seconds: float) -> Table:
    """Return the summary as a table of names, numbers and remarks."""
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    share = summary.duplicates / summary.rows if summary.rows else 0.0
    table.add_row("Clusters", f"{summary.clusters:,}")
    table.add_row("Rows", f"{summary.rows:,}")
    table.add_row("Duplicates", f"{summary.duplicates:,}", f"{share:.2%} at eps = {summary.eps:g}")
    table.add_row("Time", f"{seconds:,.1f} s", f"{summary.rows / seconds:,.0f} rows per second")
    return table
