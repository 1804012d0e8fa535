"""The command ``dask-semdedup run``: from raw embeddings to a deduplicated dataset, in steps that can be reused."""

from __future__ import annotations

import json
import platform
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import click
import fsspec
from rich.table import Table

from dask_semdedup.cli.application import Command, as_text, command_line, refuse_contradictions, tell
from dask_semdedup.cli.checks import joining_advice, refuse_run, refuse_strings
from dask_semdedup.cli.execution import log_to, on_cluster, show_progress, show_tasks
from dask_semdedup.cli.files import refuse_memory_output, write_frame
from dask_semdedup.cli.options import (
    Eps,
    cluster_option,
    document_options,
    embedding_options,
    eps_option,
    execution_options,
    id_option,
    keep_options,
    make_ids_option,
    message_options,
    rank_options,
    search_options,
    seed_option,
)
from dask_semdedup.cli.steps import (
    Outcome,
    Step,
    files_of_run,
    folder_of_steps,
    make_step,
    option_of,
    plan_steps,
    stored_parameters,
)
from dask_semdedup.errors import (
    DataNotFoundError,
    DataReadError,
    InvalidArgumentError,
    MissingColumnsError,
    counted,
)
from dask_semdedup.frames.columns import DUPLICATE_OF, Columns, SearchOptions
from dask_semdedup.io.listing import is_local
from dask_semdedup.io.targets import Contents, real_path, refuse_overlap
from dask_semdedup.io.write import writing
from dask_semdedup.steps.ranking import DISTANCE_COLUMNS

if TYPE_CHECKING:
    import dask.dataframe as dd
    import pandas as pd
    from distributed import Client
    from rich.progress import Progress

    from dask_semdedup.steps.ranking import RankingStrategy

# How far scores are stored unless an option says more.
DEFAULT_MAX_EPS = 0.1

SECOND_SEARCH = (
    "The step duplicates may take as long as scores, or longer: if scores do not tell which rows are kept, it compares "
    "rows again at eps = {eps:g} (--eps)."
)

STEPS = ["embeddings", "clusters", "scores", "duplicates", "deduplicated", "report"]

EXAMPLES = """
Examples:

\b
  # Write the kept rows to out/deduplicated, and a report to out/report/index.html
  dask-semdedup run embeddings.parquet out/ --eps 0.02

\b
  # Try another eps: the scores are reused
  dask-semdedup run embeddings.parquet out/ --eps 0.05

\b
  # Like NeMo Curator: within clusters, drop each row that is near any preferred row
  dask-semdedup run embeddings.parquet clustered/ --eps 0.02 --n-clusters 1000 --duplicate-of any

\b
  # Embed texts first, and show them in the report
  dask-semdedup run texts.jsonl out/ --embed --text-field text
"""


@click.command(
    "run",
    cls=Command,
    epilog=EXAMPLES,
    short_help="Deduplicate embeddings: compare rows, write the kept ones, report.",
)
@click.argument("input_path", metavar="INPUT")
@click.argument("output_path", metavar="OUTPUT")
@document_options
@click.option("--embed", is_flag=True, help="Embed the texts of --text-field first. For an INPUT without embeddings.")
@click.option(
    "--model",
    metavar="NAME",
    default="sentence-transformers/all-MiniLM-L6-v2",
    show_default=True,
    help="Name or path of the sentence-transformers model for --embed.",
)
@id_option
@make_ids_option
@click.option(
    "--column",
    "columns",
    metavar="COLUMN",
    multiple=True,
    help="Keep this column of INPUT, in addition to ids and embeddings. Repeat the option for several.  [default: all]",
)
@cluster_option
@embedding_options
@click.option(
    "--n-clusters",
    type=click.IntRange(min=1),
    metavar="K",
    help="Compare rows only within K clusters of k-means. This misses duplicates in different clusters.  "
    "[default: compare all rows]",
)
@keep_options("the mean of all rows (with --n-clusters, the centroid)", "")
@seed_option("Seed of k-means, and of '--which-to-keep random'.")
@eps_option("Drop a row if its similarity to a preferred row is at least 1 - EPS. See --duplicate-of.")
@click.option(
    "--duplicate-of",
    type=click.Choice(DUPLICATE_OF),
    default="kept",
    show_default=True,
    help="'kept': drop a row if a preferred row near it is kept. 'any': drop a row if any preferred row is near it, "
    "even a dropped one. 'kept' needs an EPS below 1, and searches again if scores do not tell which rows are kept.",
)
@click.option(
    "--max-eps",
    type=Eps(),
    metavar="EPS",
    help="Store scores up to this eps: later runs may choose any --eps up to it, and the report's slider ends there. "
    "Larger values take longer, especially 2, which stores the scores of all rows.  [default: that of the scores in "
    f"OUTPUT, or {DEFAULT_MAX_EPS:g}; or --eps if it is larger]",
)
@search_options
@execution_options
@click.option(
    "--from", "redo_from", type=click.Choice(STEPS), metavar="STEP", help="Run this step and all later ones again."
)
@click.option("--overwrite", is_flag=True, help="Run all steps again.")
@click.option("--dry-run", is_flag=True, help="Show which steps would run and how rows would be compared. Run nothing.")
@click.option(
    "--report-json",
    metavar="FILE",
    help="Write the time, rows, files and bytes of each step, and the versions of the packages used, to this file.",
)
@message_options
@click.pass_context
def command(
    ctx: click.Context,
    *,
    output_path: str,
    scheduler: str | None,
    workers: int | None,
    redo_from: str | None,
    overwrite: bool,
    dry_run: bool,
    report_json: str | None,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Deduplicate embeddings: compare all rows, write the kept rows, and write a report.

    INPUT is a file, a folder, or a quoted pattern such as 'data/part-*.parquet': Parquet, or JSON lines (.jsonl,
    .ndjson or .json, also with .gz or .zst), with ids and embeddings, or with ids and texts (--embed). Each step writes
    a folder in OUTPUT: embeddings (with --embed), clusters (with --n-clusters), scores (rows that are near a preferred
    row at --max-eps), duplicates (the rows to drop), deduplicated (the kept rows, with all columns) and report. All
    tables are Parquet. Embeddings of JSON lines are written as float32.

    The columns of scores and duplicates are named id (values of --id-field), max_id (the id of the preferred row that
    the row is near), cosine_sim_score and, with --n-clusters, the cluster.

    By default, --eps is 0.01. The next run reuses the folders whose options are the same. If options differ,
    duplicates, deduplicated and report are redone; embeddings, clusters and scores only with --from or --overwrite. A
    folder that also holds other files is never replaced. After a run that was stopped or killed, the same command
    resumes within its step, except in clusters and report.
    """
    refuse_contradictions(ctx)
    refuse_memory_output(output_path)
    storage_options = options["storage_options"]
    fs, output = fsspec.url_to_fs(output_path, **storage_options)
    output = real_path(fs, output)
    refuse_overlap(fs, output, options["input_path"], storage_options)
    refuse_run(options["input_path"], storage_options, "deduplicated, which holds the kept rows")
    with show_progress(enabled=not quiet) as progress:
        run = Run(
            output=fs.unstrip_protocol(output),
            command=command_line(ctx),
            anew=overwrite,
            progress=progress,
            verbose=verbose,
            **options,
        )
        steps = run.steps()
        first = steps[0].name if overwrite else redo_from
        with nullcontext() if dry_run else folder_of_steps(steps, run.output, storage_options):
            reasons = plan_steps(steps, run.output, redo_from=first, storage_options=storage_options)
            if dry_run:
                progress.stop()
                lines = [f"{name:<19} {why or 'reused'}" for name, why in reasons.items()]
                if reasons["scores"]:
                    lines += ["", run.plan()]
                if reasons["duplicates"] and run.duplicate_of == "kept":
                    lines += ["", SECOND_SEARCH.format(eps=run.eps)]
                tell(*lines, rest="It was a dry run: nothing is written.")
                return
            outcomes: dict[str, Outcome] = {}
            start = time.perf_counter()

            def make(client: Client | None) -> None:
                run.client = client
                for step in steps[len(outcomes) :]:
                    outcome = make_step(
                        step,
                        run.output,
                        reasons[step.name],
                        storage_options=storage_options,
                        needs={name: outcomes[name].manifest for name in step.needs},
                        settings={name: options[name] for name in ("partition_size", "pairwise_batch_size", "device")},
                    )
                    outcomes[step.name] = outcome
                    run.counts[step.name] = outcome.manifest.counts
                    if progress.disable and not outcome.reused:  # Nothing else shows that steps are done.
                        line = f"{step.name}: {result_of(step.name, outcomes)}, {outcome.manifest.seconds:,.1f} s"
                        progress.console.print(line, soft_wrap=True)

            if verbose:
                log_to(progress.console)
            if any(reasons.values()):
                on_cluster(make, scheduler, workers, [run.input_path, output_path], progress)
            else:
                make(None)
        seconds = time.perf_counter() - start
    if report_json is not None:
        with writing(report_json), fsspec.open(report_json, "w", **storage_options) as file:
            json.dump(outcomes_as_json(outcomes, seconds), file, indent=2)
    if not quiet:
        tell(
            as_text(outcome_table(outcomes, seconds)),
            f"  Kept rows in {output_path.rstrip('/')}/deduplicated",
            f"  Look at pairs in {output_path.rstrip('/')}/report/index.html",
            rest=f"All steps are written to {output_path}.",
        )


@dataclass
class Run:
    """The parameters and the state of a run."""

    input_path: str
    output: str
    text_field: str | None
    image_field: str | None
    embed: bool
    model: str
    id_field: str
    make_ids: bool
    columns: tuple[str, ...]
    cluster_field: str
    embedding_field: str
    embedding_dim: int | None
    n_clusters: int | None
    which_to_keep: str
    sim_metric: str
    ranking_strategy: RankingStrategy | None
    random_seed: int
    eps: float
    duplicate_of: str
    max_eps: float | None
    compute_dtype: str
    device: str
    backend: str | None
    pairwise_batch_size: int | None
    partition_size: str | None
    storage_options: dict[str, Any]
    verbose: bool
    command: str
    anew: bool
    progress: Progress
    client: Client | None = None
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    has_all_ids: bool = False

    @property
    def keeps_all(self) -> bool:
        """Whether scores of all rows are kept."""
        return self.largest_eps == 2

    @cached_property
    def largest_eps(self) -> float:
        """The eps up to which scores are stored: by default that of scores that are reused, unless `eps` is larger."""
        if self.max_eps is not None:
            return self.max_eps
        contents = _contents_of_scores()
        stored = {} if self.anew else stored_parameters("scores", contents, self.output, self.storage_options)
        return float(max(stored.get("max_eps") or DEFAULT_MAX_EPS, self.eps))

    @property
    def _is_stretched(self) -> bool:
        """Whether `largest_eps` is `eps`, since that is larger than any that was given or stored."""
        return self.max_eps is None and self.largest_eps == self.eps

    @property
    def is_complete(self) -> bool:
        """Whether rows are compared with all others, without clusters."""
        return self.n_clusters is None

    @property
    def _first_step(self) -> str:
        return "embeddings" if self.embed else "scores" if self.is_complete else "clusters"

    def steps(self) -> list[Step]:
        """Return all steps in their order. Raise if INPUT lacks what they need."""
        from dask_semdedup.io.write import PART_FILE
        from dask_semdedup.lazy.tables import table_token
        from dask_semdedup.report.page import REPORT

        self._check_input()
        source = {"files": table_token(self.input_path, self.storage_options)}
        columns = self._parameters("id_field", "embedding_field")
        source |= self._parameters("make_ids")
        ranked = {"rank_by": ", ".join(self._ranked_by()) or None}
        embedding = self._parameters("id_field", "text_field", "model", "embedding_field") | ranked
        clustering = ranked | self._parameters(
            "id_field", "embedding_field", "cluster_field", "embedding_dim", "n_clusters", "random_seed"
        )
        ranking = self._parameters("which_to_keep", "sim_metric", "random_seed", "compute_dtype", "cluster_field")
        ranking["rank_by"] = None if self.ranking_strategy is None else repr(self.ranking_strategy)
        shown = self._parameters("text_field", "image_field")
        kept = self._parameters("id_field") | {"columns": list(self.columns)}
        ranking["max_eps"] = self.largest_eps
        scoring, deciding = columns | ranking, self._parameters("eps", "duplicate_of")
        parts = files_of_run(PART_FILE)
        clusters = files_of_run(re.compile(f"[^/=]+=[^/]*/{PART_FILE.pattern}"))
        first = (
            [Step("embeddings", source | embedding, self._embed, parts, plan=self._embedded, costly=True)]
            if self.embed
            else []
        )
        before = tuple(step.name for step in first)
        if self.is_complete:
            scoring |= source | self._parameters("embedding_dim") | {"rank_by": self._rank_by()}
        else:
            first.append(Step("clusters", source | clustering, self._cluster, clusters, before, costly=True))
            before = ("clusters",)
        steps = [
            *first,
            Step(
                "scores",
                scoring,
                self._score,
                _contents_of_scores(),
                before,
                plan=self._scores,
                costly=True,
                origins={"max_eps": f"for --eps {self.eps:g}"} if self._is_stretched else {},
            ),
            # All else that duplicates depend on, the scores do too.
            Step("duplicates", deciding, self._find_duplicates, parts, ("scores",), plan=self._duplicates),
            Step("deduplicated", source | kept, self._deduplicate, parts, ("duplicates",), plan=self._kept_rows),
            Step("report", source | deciding | shown, self._report, REPORT, ("scores", "duplicates")),
        ]
        fs, path = fsspec.url_to_fs(self.input_path, **self.storage_options)
        return [replace(step, source=real_path(fs, path) if is_local(fs) else self.input_path) for step in steps]

    def _parameters(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def _check_input(self) -> None:
        """Raise for missing columns and contradictory options before any work."""
        from dask_semdedup.lazy.scores import up_to
        from dask_semdedup.lazy.sources import check_sources, refuse_range_index

        up_to(self.eps, SearchOptions(duplicate_of=self.duplicate_of))
        if self.eps > self.largest_eps:
            raise InvalidArgumentError(
                f"--eps {self.eps:g} is larger than --max-eps {self.largest_eps:g}, up to which scores are stored."
            )
        if self.is_complete and self.backend == "cudf":
            raise InvalidArgumentError(
                "Without clusters, partitions are pandas: leave the backend out. The search uses a GPU if there is "
                "one, regardless of the backend.",
                parameters=["backend"],
            )
        ddf = self._read_input()
        columns = list(ddf.columns)
        shown = [name for name in (self.text_field, self.image_field) if name is not None]
        needed = [self.id_field, *shown, *([] if self.embed else [self.embedding_field]), *self._ranked_by()]
        if self.id_field not in columns:
            refuse_range_index(ddf, self.id_field)
        if not set(needed) <= set(columns):
            raise MissingColumnsError.build(needed, columns, self._column_advice(ddf))
        if self.ranking_strategy is not None:
            self.ranking_strategy.check_columns([*columns, *DISTANCE_COLUMNS.values()], self.embedding_field)
        if not self.embed:
            refuse_strings(ddf, self.embedding_field, self.input_path)
        kept = self._read_input(self._kept())
        check_sources(kept, list(kept.columns))
        check_sources(ddf, needed, self.ranking_strategy)
        if self.embed and self.text_field is None:
            raise InvalidArgumentError("--embed needs --text-field, the column to embed.")
        if self.embed and self.embedding_field in columns:
            raise InvalidArgumentError(
                f"INPUT has a column {self.embedding_field!r} already. Leave --embed out, or name another as "
                "--embedding-field."
            )

    def _ranked_by(self) -> list[str]:
        """Return the columns of INPUT by which rows are ranked."""
        made = [self.id_field, *([] if self.is_complete else DISTANCE_COLUMNS.values())]
        return [name for name in getattr(self.ranking_strategy, "required_columns", []) if name not in made]

    def _rank_by(self) -> str | None:
        """Return the ranking as it is given in options."""
        return None if self.ranking_strategy is None else ", ".join(rank_options(self.ranking_strategy))

    def _kept(self) -> list[str] | None:
        """Return the columns of the rows that are kept; None stands for all."""
        if not self.columns:
            return None
        return list(dict.fromkeys([self.id_field, *self.columns, *([] if self.embed else [self.embedding_field])]))

    def _check_ids(self) -> None:
        """Raise for missing or repeated ids before hours of work, since rows are dropped by id."""
        from dask_semdedup.lazy.removal import check_ids

        if self.has_all_ids or self.make_ids:
            return
        with show_tasks(self.progress, "Looking at ids", client=self.client):
            check_ids(self._read_input([self.id_field])[self.id_field])
        self.has_all_ids = True

    def _column_advice(self, ddf: dd.DataFrame) -> str:
        """Return advice that names the options whose columns INPUT lacks."""
        fields = ["id_field", "text_field", "image_field", *([] if self.embed else ["embedding_field"])]
        missing = [name for name in fields if getattr(self, name) not in (None, *ddf.columns)]
        options = " and ".join(map(option_of, missing))
        advice = f"Name columns of INPUT as {options}" if missing else "Rank by columns of INPUT"
        if "embedding_field" in missing:
            advice += "; or, if it holds texts and no embeddings, pass --embed and --text-field"
        if "id_field" in missing:
            advice += "; or, if it has no ids, pass --make-ids"
        if "embedding_field" not in missing:
            return f"{advice}."
        return f"{advice}.{joining_advice(ddf, self.embedding_field, self.input_path)}"

    def _folder(self, name: str) -> str:
        return f"{self.output}/{name}"

    def _read_input(self, columns: list[str] | None = None) -> dd.DataFrame:
        return self._read_table(self.input_path, columns, make_ids=self.make_ids)

    def _read_table(self, path: str, columns: list[str] | None = None, *, make_ids: bool = False) -> dd.DataFrame:
        from dask_semdedup.lazy.tables import read_table

        return read_table(
            path,
            columns,
            id_field=self.id_field,
            embedding_field=self.embedding_field,
            make_ids=make_ids,
            backend="pandas",
            storage_options=self.storage_options,
            partition_size=self.partition_size or "128MiB",
        )

    def _read_scores(self) -> dd.DataFrame:
        from dask_semdedup.lazy.tables import read_scores

        return read_scores(
            self._folder("scores"), cluster_field=self.cluster_field, storage_options=self.storage_options
        )

    def _read_embedded(self) -> dd.DataFrame:
        """Return all rows, with the columns that are needed to compare them."""
        # The other columns are read from INPUT, when rows are kept or shown.
        needed = list(dict.fromkeys([self.id_field, self.embedding_field, *self._ranked_by()]))
        return self._read_table(self._folder("embeddings"), needed) if self.embed else self._read_input(needed)

    def _read_rows(self) -> dd.DataFrame:
        """Return the rows that are compared: all with each other, or those of each cluster."""
        import dask_semdedup

        if self.is_complete:
            return self._read_embedded()
        return dask_semdedup.read_clusters(
            self._folder("clusters"),
            cluster_field=self.cluster_field,
            backend=self.backend,
            storage_options=self.storage_options or None,
            partition_size=self.partition_size,
        )

    def _compare(self, rows: dd.DataFrame, eps: float | None, duplicate_of: str = "any") -> dd.DataFrame:
        """Return the scores of rows, lazily: of duplicates at eps, or of all."""
        # Without clusters, a sample is looked at now.
        with show_tasks(self.progress, "Sampling", client=self.client) if self.is_complete else nullcontext():
            return rows.semdedup.pairwise(
                eps=eps,
                which_to_keep=self.which_to_keep,
                sim_metric=self.sim_metric,
                ranking_strategy=self.ranking_strategy,
                id_field=self.id_field,
                embedding_field=self.embedding_field,
                cluster_field=None if self.is_complete else self.cluster_field,
                duplicate_of=duplicate_of,
                embedding_dim=self.embedding_dim,
                pairwise_batch_size=self.pairwise_batch_size,
                random_seed=self.random_seed,
                compute_dtype=self.compute_dtype,
                device=self.device,
                verbose=self.verbose,
            )

    def plan(self) -> str:
        """Tell how rows would be compared for the scores, or what has to be there before that can be told."""
        scores = f"for scores up to eps = {self.largest_eps:g} (--max-eps)"
        if not self.is_complete:
            return f"Rows are compared within {counted(self.n_clusters or 0, 'cluster')} of k-means, {scores}."
        try:
            rows = self._read_embedded()
        except DataReadError:
            return f"Rows are compared {scores}. The plan is known once they are embedded."
        plan = rows.semdedup.plan(
            self.largest_eps,
            embedding_field=self.embedding_field,
            embedding_dim=self.embedding_dim,
            compute_dtype=self.compute_dtype,
            device=self.device,
        )
        return f"Rows are compared {scores}:\n{plan}"

    def _count(self, rows: dd.DataFrame) -> pd.Series | int:
        """Count the rows, now: those of each cluster, or all."""
        from dask_semdedup.lazy.sampling import partition_lengths
        from dask_semdedup.lazy.scores import count_rows

        if self.is_complete:
            return int(sum(partition_lengths(rows, Columns(self.id_field, self.embedding_field))))
        return count_rows(rows, Columns(cluster=self.cluster_field))

    def _write(self, frame: dd.DataFrame, folder: str, title: str) -> int:
        return write_frame(frame, folder, self.storage_options, client=self.client, progress=self.progress, title=title)

    # --- The steps: each writes files to a folder, of a frame that was planned if it has parts, and returns counts ---

    def _embedded(self) -> dd.DataFrame:
        from dask_semdedup.lazy.embed import TEXTS_OF_PART
        from dask_semdedup.lazy.sampling import partition_lengths
        from dask_semdedup.lazy.split import split_rows

        self._check_ids()
        needed = list(dict.fromkeys([self.id_field, str(self.text_field), *self._ranked_by()]))
        rows = self._read_input(needed)
        with show_tasks(self.progress, "Counting rows", client=self.client):
            lengths = partition_lengths(rows, Columns(self.id_field, self.embedding_field))
        frame = split_rows(rows, lengths, TEXTS_OF_PART).semdedup.embed(
            self.text_field, model=self.model, embedding_field=self.embedding_field, device=self.device
        )
        unneeded = {self.text_field} - {self.id_field, *self._ranked_by()}
        return frame.drop(columns=list(unneeded))

    def _embed(self, folder: str, frame: dd.DataFrame) -> dict[str, int]:
        return {"rows": self._write(frame, folder, "Embedding")}

    def _cluster(self, folder: str, _: None) -> dict[str, int]:
        from dask_semdedup.io.layout import cluster_files

        self._check_ids()
        with show_tasks(self.progress, "Clustering", client=self.client):
            clustered = self._read_embedded().semdedup.kmeans(
                self.n_clusters,
                embedding_field=self.embedding_field,
                cluster_field=self.cluster_field,
                id_field=self.id_field,
                embedding_dim=self.embedding_dim,
                random_state=self.random_seed,
                device=self.device,
            )
            clustered.semdedup.to_clusters(
                folder,
                cluster_field=self.cluster_field,
                id_field=self.id_field,
                storage_options=self.storage_options,
            )
        files = cluster_files(folder, self.storage_options, cluster_field=self.cluster_field)
        return {"clusters": len(files)}

    def _scores(self) -> dd.DataFrame:
        self._check_ids()  # The clusters may have been made with another column of ids.
        return self._compare(self._read_rows(), None if self.keeps_all else self.largest_eps)

    def _score(self, folder: str, frame: dd.DataFrame) -> dict[str, int]:
        from dask_semdedup.io.scores import Compared, write_compared

        stored = self._write(frame, folder, "Comparing")
        if self.keeps_all:
            return {"rows": stored, "stored": stored}
        compared = Compared(self.largest_eps, self._count(self._read_rows()))
        write_compared(compared, folder, self.storage_options)
        return {"rows": compared.total, "stored": stored}

    def _duplicates(self) -> dd.DataFrame:
        from dask_semdedup.steps.duplicates import without_first_rows

        duplicates = self._read_scores().semdedup.duplicates(self.eps)
        if self.duplicate_of == "kept" and self._has_chains(duplicates):
            duplicates = self._compare(self._read_rows(), self.eps, "kept")
        # If eps is 1 or more, they include the first rows of clusters, which are kept.
        return duplicates.map_partitions(without_first_rows, self.id_field, of_itself=True, meta=duplicates._meta)

    def _has_chains(self, duplicates: dd.DataFrame) -> bool:
        """Tell, now, whether the nearest preferred row of any near-duplicate is a near-duplicate itself.

        Without such rows, all nearest rows are kept, and the rule "kept" drops what the rule "any" drops.
        """
        from dask_semdedup.lazy.tasks import compute
        from dask_semdedup.steps.duplicates import has_chain

        # One task holds the ids, as when rows are removed.
        ids = duplicates[["id", "max_id"]].repartition(npartitions=1)
        with show_tasks(self.progress, "Looking at chains", client=self.client):
            [found] = compute(ids.map_partitions(has_chain, meta=(None, bool)))
        return bool(found.iloc[0])

    def _find_duplicates(self, folder: str, frame: dd.DataFrame) -> dict[str, int]:
        return {"duplicates": self._write(frame, folder, "Finding duplicates")}

    def _kept_rows(self) -> dd.DataFrame:
        from dask_semdedup.lazy.tables import read_table

        duplicates = read_table(self._folder("duplicates"), backend="pandas", storage_options=self.storage_options)
        return self._read_input(self._kept()).semdedup.remove(duplicates, self.id_field)

    def _deduplicate(self, folder: str, frame: dd.DataFrame) -> dict[str, int]:
        rows = self._write(frame, folder, "Removing")
        scored, dropped = self.counts["scores"]["rows"], self.counts["duplicates"]["duplicates"]
        if rows + dropped != scored:
            raise InvalidArgumentError(
                f"{self.input_path} has {rows + dropped:,} rows, of which {dropped:,} are duplicates, but {scored:,} "
                f"were scored. Pass '--from {self._first_step}' to run all steps again on what INPUT holds now."
            )
        return {"rows": rows}

    def _report(self, folder: str, _: None) -> dict[str, int]:
        from dask_semdedup.io.scores import COMPARED, read_compared
        from dask_semdedup.report.page import Documents, write_report

        compared = read_compared(self._folder("scores"), self.storage_options)
        if compared is None and not self.keeps_all:
            raise DataNotFoundError(
                f"{self._folder('scores')} lacks {COMPARED}, which records how many rows were compared. Pass '--from "
                "scores' to compare them again."
            )
        documents = None
        if self.text_field or self.image_field:
            documents = Documents(
                self.input_path, self.text_field, self.image_field, self.id_field, self.storage_options, self.make_ids
            )
        with show_tasks(self.progress, "Reporting", client=self.client):
            summary = write_report(
                self._read_scores(),
                folder,
                self.eps,
                documents=documents,
                cluster_field=self.cluster_field,
                source=self._folder("scores"),
                storage_options=self.storage_options,
                compared=compared,
                dropped=self.counts["duplicates"]["duplicates"] if self.duplicate_of == "kept" else None,
                id_field=self.id_field,
                command=self.command,
            )
        return {"near_duplicates": int(summary.duplicates(self.eps))}


def _contents_of_scores() -> Contents:
    from dask_semdedup.io.scores import COMPARED
    from dask_semdedup.io.write import PART_FILE

    return files_of_run(re.compile(f"{PART_FILE.pattern}|{re.escape(COMPARED)}"))


def outcomes_as_json(outcomes: dict[str, Outcome], seconds: float) -> dict[str, Any]:
    """Return each step's result and time, and the versions of the packages that made them."""
    packages = ("dask-semdedup", "dask", "distributed", "numpy", "pandas", "pyarrow", "torch")
    steps = {
        name: {
            "reused": outcome.reused,
            "reason": outcome.reason,
            "seconds": outcome.manifest.seconds,
            "files": outcome.manifest.files,
            "bytes": outcome.manifest.nbytes,
            **outcome.manifest.counts,
        }
        for name, outcome in outcomes.items()
    }
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    return {"seconds": seconds, "versions": versions, "steps": steps}


def result_of(name: str, outcomes: dict[str, Outcome]) -> str:
    """Return a step's result in a few words."""
    manifest = outcomes[name].manifest
    counts, options = manifest.counts, manifest.parameters
    match name:
        case "clusters":
            return counted(counts["clusters"], "cluster")
        case "scores":
            return f"{counts['stored']:,} of {counted(counts['rows'], 'score')} ≥ {1 - options['max_eps']:g}"
        case "duplicates":
            share = counts["duplicates"] / max(outcomes["scores"].manifest.counts["rows"], 1)
            return f"{counts['duplicates']:,} at eps = {options['eps']:g}, {share:.2%}"
        case "deduplicated":
            return f"{counted(counts['rows'], 'row')} kept"
        case "report":
            return "index.html"
    return counted(counts["rows"], "row")


def outcome_table(outcomes: dict[str, Outcome], seconds: float) -> Table:
    """Return a table of each step's result and time."""
    table = Table(box=None, header_style="dim", padding=(0, 2))
    table.add_column("Step", style="bold", no_wrap=True)
    table.add_column("Result", justify="right", no_wrap=True)
    table.add_column("Time", justify="right", no_wrap=True)
    reasons = {name: "" if outcome.reason == "new" else outcome.reason for name, outcome in outcomes.items()}
    if any(reasons.values()):
        table.add_column("Why", style="dim")
    columns = len(table.columns)
    for name, outcome in outcomes.items():
        taken = "reused" if outcome.reused else f"{outcome.manifest.seconds:,.1f} s"
        table.add_row(*[name, result_of(name, outcomes), taken, reasons[name]][:columns])
    table.add_row("All", "", f"{seconds:,.1f} s")
    return table
