"""The ``dask-semdedup`` command: the library's public functions with a progress bar and a summary."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import dask
import fsspec
import pandas as pd
from click.core import ParameterSource
from dask.callbacks import Callback
from dask.system import CPU_COUNT
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from dask_semdedup.errors import SemDedupError
from dask_semdedup.folders import staged_folder

if TYPE_CHECKING:
    import dask.dataframe as dd
    from distributed import Client, Future

    from dask_semdedup.ranking import RankingStrategy

EXIT_STATUS = 2
INTERRUPTED = 130

# The parameters of `pairwise` as its help groups them.
SECTIONS = {
    "Columns": ["id_field", "embedding_field", "cluster_field", "embedding_dim"],
    "What to keep": ["which_to_keep", "sim_metric", "ranking_strategy", "random_seed", "eps"],
    "Search": ["compute_dtype", "device", "pairwise_batch_size"],
    "Where it runs": ["workers", "scheduler", "backend", "partition_size"],
    "Files": ["storage_options", "overwrite"],
    "Messages": ["quiet", "verbose", "traceback"],
}

# Parameters of which the second means nothing where the first is given.
CONTRADICTIONS = [
    ("ranking_strategy", "which_to_keep"),
    ("ranking_strategy", "sim_metric"),
    ("scheduler", "workers"),
    ("quiet", "verbose"),
]


# --- Errors ----------------------------------------------------------------------------------------------------------


class Application(click.Group):
    """A group of commands whose errors, click's own included, are one line on stderr and exit status 2."""

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        try:
            status = super().main(args, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as help_text:
            help_text.show()
            sys.exit(EXIT_STATUS)
        except click.ClickException as error:
            click.echo(f"{click.style('Error:', fg='red', bold=True)} {_one_line(error)}", err=True)
            sys.exit(EXIT_STATUS)
        except click.Abort:
            click.echo("Stopped. Nothing was left under the final name.", err=True)
            sys.exit(INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)


class Command(click.Command):
    """A command whose failures become one line, below their traceback where that is asked for."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if ctx.meta.get("traceback"):
                traceback.print_exception(error)
            raise click.ClickException(_describe(error)) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in sections; what is in none of them comes last."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        records = {option.name: record for option in options if (record := option.get_help_record(ctx))}
        for heading, names in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([records.pop(name) for name in names])
        with formatter.section("Help"):
            formatter.write_dl(list(records.values()))


def _describe(error: Exception) -> str:
    """An error's message; its type too where the message was not written for the command's user."""
    if isinstance(error, SemDedupError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error} (--traceback shows where)"


def _one_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        message += f" See '{error.ctx.command_path} --help'."
    return message


# --- Options ---------------------------------------------------------------------------------------------------------


def _parse_storage_options(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Turn ``("anon=true", "key=x")`` into ``{"anon": True, "key": "x"}``."""
    options: dict[str, Any] = {}
    for value in values:
        key, equals, setting = value.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"{value!r} is not of the form KEY=VALUE.")
        options[key] = {"true": True, "false": False}.get(setting.lower(), setting)
    return options


def _parse_rank_by(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> RankingStrategy | None:
    """Turn ``("quality:desc", "length")`` into the ranking by those columns."""
    if not values:
        return None
    from dask_semdedup.ranking import RankingStrategy

    columns, ascending = [], []
    for value in values:
        column, colon, order = value.rpartition(":")
        if not colon or order not in ("asc", "desc"):
            column, order = value, "asc"
        columns.append(column)
        ascending.append(order == "asc")
    return RankingStrategy.metadata_based(columns, ascending=ascending)


def _remember_traceback(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.meta["traceback"] = value


EXAMPLES = """
Examples:

\b
  # The k-means output layout, clusters/centroid=<k>/*.parquet, on this machine
  dask-semdedup pairwise clusters/ scores/

\b
  # Keep the rows of the best quality; call 0.95 and above a duplicate
  dask-semdedup pairwise clusters/ scores/ --rank-by quality:desc --eps 0.05

\b
  # On a Dask cluster, from a bucket and to a bucket
  dask-semdedup pairwise s3://bucket/clusters s3://bucket/scores --scheduler tcp://10.0.0.1:8786
"""


@click.group(
    cls=Application,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="dask-semdedup", message="%(package)s %(version)s")
def main() -> None:
    """Exact semantic deduplication of embedding tables, with Dask."""


@main.command(cls=Command, epilog=EXAMPLES, short_help="Score rows by their most similar preferred row.")
@click.argument("input_path", metavar="INPUT")
@click.argument("output_path", metavar="OUTPUT")
@click.option("--id-field", metavar="COLUMN", default="id", show_default=True, help="Column of ids.")
@click.option(
    "--embedding-field", metavar="COLUMN", default="embeddings", show_default=True, help="Column of embeddings."
)
@click.option(
    "--cluster-field",
    metavar="COLUMN",
    default="centroid",
    show_default=True,
    help="Column, or folder key, of clusters.",
)
@click.option(
    "--which-to-keep",
    type=click.Choice(["hard", "easy", "random"]),
    default="hard",
    show_default=True,
    help="Which rows to prefer over their duplicates: those far from their centroid, those near it, or any.",
)
@click.option(
    "--sim-metric",
    type=click.Choice(["cosine", "l2"]),
    default="cosine",
    show_default=True,
    help="Which distance 'hard' and 'easy' mean: the column cosine_dist_to_cent or l2_dist_to_cent.",
)
@click.option(
    "--rank-by",
    "ranking_strategy",
    metavar="COLUMN[:desc]",
    multiple=True,
    callback=_parse_rank_by,
    help="Prefer rows by this column, smallest first or, with :desc, largest first; instead of --which-to-keep. "
    "Repeat it to settle ties.",
)
@click.option(
    "--random-seed", type=int, metavar="N", default=42, show_default=True, help="Seed of '--which-to-keep random'."
)
@click.option(
    "--eps",
    type=click.FloatRange(0, 2),
    metavar="EPS",
    default=0.01,
    show_default=True,
    help="Count a row as a duplicate from a similarity of 1 - EPS on. Only the summary depends on it.",
)
@click.option(
    "--compute-dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="'auto' is exact and fast; the half-precision types alone are lossy.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the search runs, whatever holds the frame.",
)
@click.option(
    "--backend",
    type=click.Choice(["pandas", "cudf"]),
    help="What holds the frame.  [default: Dask's setting, which is pandas unless you changed it]",
)
@click.option("--embedding-dim", type=click.IntRange(min=1), metavar="N", help="Refuse embeddings of any other width.")
@click.option(
    "--pairwise-batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Queries searched at once; the candidates beside them are as many as memory allows.  [default: 512]",
)
@click.option(
    "--partition-size",
    metavar="SIZE",
    default="128MiB",
    show_default=True,
    help="The most that a partition may take in memory, unless a single cluster takes more.",
)
@click.option(
    "--storage-option",
    "storage_options",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_parse_storage_options,
    help="An fsspec option for INPUT and OUTPUT, such as anon=true. Repeatable.",
)
@click.option("--scheduler", metavar="ADDRESS", help="Run on this Dask cluster, such as tcp://10.0.0.1:8786.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run on this many processes of this machine.  [default: threads of one process]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it holds scores already.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar, no summary.")
@click.option("-v", "--verbose", is_flag=True, help="Tell more of what is done.")
@click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    callback=_remember_traceback,
    help="Show an error's whole traceback.",
)
@click.pass_context
def pairwise(
    ctx: click.Context,
    *,
    input_path: str,
    output_path: str,
    cluster_field: str,
    ranking_strategy: RankingStrategy | None,
    eps: float,
    backend: str | None,
    partition_size: str,
    storage_options: dict[str, Any],
    scheduler: str | None,
    workers: int | None,
    overwrite: bool,
    quiet: bool,
    verbose: bool,
    **search_options: Any,
) -> None:
    """Score each row by its most similar preferred row of the same cluster.

    INPUT is a folder of clustered embeddings: INPUT/centroid=<k>/*.parquet, or Parquet files with a cluster column.
    OUTPUT becomes a folder of Parquet files with the columns id, max_id (the most similar row preferred over this one),
    cosine_sim_score and the cluster. It appears when all of it is written; a run that fails leaves nothing.

    Both may be local paths or URLs that fsspec knows.
    """
    import dask_semdedup

    _refuse_contradictions(ctx)
    with (
        staged_folder(output_path, input_path, overwrite=overwrite, storage_options=storage_options) as folder,
        show_progress(enabled=not quiet) as progress,
    ):
        start = time.perf_counter()
        # Before a cluster is started, which takes longer than to see that INPUT is not there.
        embeddings = dask_semdedup.read_clusters(
            input_path,
            cluster_field=cluster_field,
            backend=backend,
            storage_options=storage_options or None,
            partition_size=partition_size,
        )
        scores = embeddings.semdedup.pairwise(
            cluster_field=cluster_field, ranking_strategy=ranking_strategy, verbose=verbose, **search_options
        )
        listed = time.perf_counter() - start
        with connect(scheduler, workers) as client:
            start = time.perf_counter() - listed
            if verbose:
                log_to(progress.console)
                progress.console.print(f"{scores.npartitions:,} partitions, on {client or 'threads of this process'}")
            write_scores(scores, folder, storage_options, client=client, progress=progress)
            seconds = time.perf_counter() - start
            summary = summarise(folder, storage_options, cluster_field=cluster_field, eps=eps)
    if not quiet:
        Console().print(summary_table(summary, seconds=seconds))
        click.echo(f"  Scores in {output_path}")


def _refuse_contradictions(ctx: click.Context) -> None:
    """Refuse two options of which one would silently make the other void."""
    flags = {param.name: param.opts[-1] for param in ctx.command.params}
    given = {name for name in flags if name and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    for pair in CONTRADICTIONS:
        if given.issuperset(pair):
            raise click.UsageError(f"{flags[pair[0]]} and {flags[pair[1]]} exclude each other.", ctx)


# --- Where the scores go ---------------------------------------------------------------------------------------------


def write_scores(
    scores: dd.DataFrame, folder: str, storage_options: dict[str, Any], *, client: Client | None, progress: Progress
) -> None:
    """Compute the scores and write each partition to a file of its own, moving a bar as they are done."""
    fs, path = fsspec.url_to_fs(folder, **storage_options)
    fs.makedirs(path, exist_ok=True)
    meta = pd.DataFrame({"rows": pd.Series(dtype="int64")})
    written = scores.map_partitions(write_part, folder, storage_options, meta=meta)
    # Optimised here, reading, scoring and writing a partition become one task; compute() alone does not fuse them.
    written = written.optimize()
    if client is None:
        with TaskProgress(progress):
            written.compute(scheduler="threads")
    else:
        _follow_futures(client, client.persist(written), progress)


def write_part(
    scores: Any, folder: str, storage_options: dict[str, Any], partition_info: dict[str, Any] | None = None
) -> pd.DataFrame:
    """Write one partition's scores to ``folder`` and return how many there are."""
    number = partition_info["number"] if partition_info else 0
    fs, path = fsspec.url_to_fs(folder, **storage_options)
    # Unlike `fsspec.open`, this does not make the folder anew for a late writer of a run that has failed.
    with fs.open(f"{path}/part.{number:06d}.parquet", "wb") as file:
        scores.to_parquet(file, index=False)
    return pd.DataFrame({"rows": [len(scores)]})


# --- Where it runs, and how far it is --------------------------------------------------------------------------------


@contextmanager
def connect(scheduler: str | None, workers: int | None) -> Iterator[Client | None]:
    """Yield a client of the cluster that is asked for, or None for the threads of this process."""
    if scheduler is None and workers is None:
        import dask_semdedup.search  # noqa: F401  (torch takes seconds to load: now rather than in the first task)

        # A pool of its own, since leaving it waits for its threads: what a failed run leaves is then final.
        with (
            ThreadPoolExecutor(dask.config.get("num_workers", None) or CPU_COUNT) as pool,
            dask.config.set(scheduler="threads", pool=pool),
        ):
            yield None
        return
    from distributed import Client, LocalCluster

    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
        return
    # A worker's failure reaches the user through its future: its own log would only repeat it.
    with (
        LocalCluster(n_workers=workers, dashboard_address=":0", silence_logs=logging.CRITICAL) as cluster,
        Client(cluster) as client,
    ):
        yield client


def show_progress(*, enabled: bool) -> Progress:
    """A progress bar on stderr, drawn only where someone can see it."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
    )


def log_to(console: Console) -> None:
    """Show what the library logs, above the progress bar; workers in other processes keep their own logs."""
    logger = logging.getLogger("dask_semdedup")
    logger.setLevel(logging.INFO)
    logger.addHandler(RichHandler(console=console, show_path=False, show_level=False))


class TaskProgress(Callback):
    """Moves a progress bar with the tasks of Dask's schedulers in this process."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def _start_state(self, _graph: Any, state: dict[str, Any]) -> None:
        total = sum(len(state[name]) for name in ("ready", "waiting", "running"))
        self.task = self.progress.add_task("Comparing", total=total)

    def _posttask(self, *_: Any) -> None:
        self.progress.advance(self.task)


def _follow_futures(client: Client, written: dd.DataFrame, progress: Progress) -> None:
    """Move a progress bar with the partitions of a persisted frame; stop them all at the first error, and raise it."""
    from distributed import as_completed, futures_of

    futures = futures_of(written)
    task = progress.add_task("Comparing", total=len(futures))
    try:
        for future in as_completed(futures):
            future.result()
            progress.advance(task)
    except BaseException:
        # Where the cluster is gone, so are its writers.
        with suppress(OSError):
            _stop(client, futures)
        raise


def _stop(client: Client, futures: list[Future]) -> None:
    """Cancel tasks, and wait for those that run: no worker interrupts them."""
    client.cancel(futures)
    keys = {future.key for future in futures}
    while any(client.run(_knows_any, keys, on_error="ignore").values()):
        time.sleep(0.1)


def _knows_any(keys: set[Any], dask_worker: Any) -> bool:
    """Whether a worker has tasks of these keys; it forgets cancelled ones as soon as they do not run."""
    return not keys.isdisjoint(dask_worker.state.tasks)


# --- What came out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The numbers that the command ends with."""

    clusters: int
    rows: int
    duplicates: int
    eps: float


def summarise(folder: str, storage_options: dict[str, Any], *, cluster_field: str, eps: float) -> Summary:
    """Count what was written, from the scores alone."""
    import dask.dataframe as dd

    with dask.config.set({"dataframe.backend": "pandas"}):
        scores = dd.read_parquet(folder, storage_options=storage_options or None)
        duplicates = scores.semdedup.duplicates(eps=eps)
    clusters, rows, dropped = dask.compute(scores[cluster_field].nunique(), scores["id"].size, duplicates["id"].size)
    return Summary(clusters=int(clusters), rows=int(rows), duplicates=int(dropped), eps=eps)


def summary_table(summary: Summary, *, seconds: float) -> Table:
    """The summary as a table of names, numbers and remarks."""
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
