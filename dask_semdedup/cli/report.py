"""The command ``dask-semdedup report``: a page on scores, from which to choose eps."""

from __future__ import annotations

from typing import Any

import click

from dask_semdedup.cli.application import Command, is_given, refuse_contradictions, tell
from dask_semdedup.cli.execution import connect, log_to, show_progress, show_tasks
from dask_semdedup.cli.files import refuse_memory_output
from dask_semdedup.cli.options import (
    cluster_option,
    document_options,
    eps_option,
    execution_options,
    id_option,
    make_ids_option,
    message_options,
)
from dask_semdedup.cli.steps import is_output_of_run, is_unfinished_run, manifest_of
from dask_semdedup.errors import InvalidArgumentError, counted
from dask_semdedup.io.staging import staged_folder

EXAMPLES = """
Examples:

\b
  # Write report/index.html, beside scores/
  dask-semdedup report scores/ --eps 0.02

\b
  # Show the texts of pairs on both sides of the threshold
  dask-semdedup report scores/ --data documents.parquet --text-field text
"""


@click.command("report", cls=Command, epilog=EXAMPLES, short_help="Write a report of plots and pairs, to choose eps.")
@click.argument("scores_path", metavar="SCORES")
@click.argument("output_path", metavar="[OUTPUT]", required=False)
@eps_option("Show the threshold 1 - EPS first, with pairs on both sides of it.")
@click.option(
    "--data", metavar="DATA", help="Documents that were scored: Parquet or JSON lines with ids and texts or images."
)
@document_options
@id_option
@make_ids_option
@cluster_option
@execution_options
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it holds nothing but a report.")
@message_options
@click.pass_context
def command(
    ctx: click.Context,
    *,
    scores_path: str,
    output_path: str | None,
    eps: float,
    data: str | None,
    text_field: str | None,
    image_field: str | None,
    id_field: str,
    make_ids: bool,
    cluster_field: str,
    storage_options: dict[str, Any],
    scheduler: str | None,
    workers: int | None,
    overwrite: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write a report of plots and pairs, to choose eps.

    SCORES is a folder of Parquet files: the output of 'pairwise', or cluster_<k>.parquet of the stages. It can also be
    the OUTPUT of 'run', whose scores are then read, and whose eps is shown first. OUTPUT is a folder with index.html
    and PNG files, by default 'report' next to the scores. The page needs no network. Its slider ends at the eps up to
    which 'pairwise --eps' or 'run' stored scores.

    With --data, and --text-field or --image-field, the page shows the documents of its pairs.
    """
    from dask_semdedup.io.scores import read_compared
    from dask_semdedup.lazy.tables import read_scores
    from dask_semdedup.report.page import PAGE, REPORT, Documents, write_report

    refuse_contradictions(ctx)
    dropped = None
    if is_output_of_run(scores_path, storage_options):
        run_path, scores_path = scores_path.rstrip("/"), f"{scores_path.rstrip('/')}/scores"
        eps, dropped = _dropped_by_run(ctx, run_path, scores_path, eps, storage_options)
        if (scored := manifest_of(scores_path, storage_options)) and not is_given(ctx, "id_field"):
            id_field = scored.parameters.get("id_field", id_field)
    elif is_unfinished_run(scores_path, storage_options):
        raise InvalidArgumentError(
            f"{scores_path} is the OUTPUT of a run that has no scores yet. Wait for the run, or resume it with its own "
            "command."
        )
    _refuse_other_steps(scores_path, storage_options)
    output = output_path or _next_to(scores_path, "report")
    refuse_memory_output(output)
    documents = None
    if data is not None:
        documents = Documents(data, text_field, image_field, id_field, storage_options, make_ids)
    elif text_field or image_field:
        raise InvalidArgumentError("--text-field and --image-field are columns of --data: pass --data too.")
    # Before OUTPUT is checked, since missing SCORES are the first thing to correct.
    scores = read_scores(scores_path, cluster_field=cluster_field, storage_options=storage_options)
    with (
        staged_folder(
            output, scores_path, contents=REPORT, overwrite=overwrite, storage_options=storage_options
        ) as folder,
        show_progress(enabled=not quiet) as progress,
    ):
        if verbose:
            log_to(progress.console)
        with (
            connect(scheduler, workers, [scores_path, data]) as client,
            show_tasks(progress, "Reading", client=client),
        ):
            summary = write_report(
                scores,
                folder,
                eps,
                documents=documents,
                cluster_field=cluster_field,
                source=scores_path,
                storage_options=storage_options,
                compared=read_compared(scores_path, storage_options),
                id_field=id_field,
                dropped=dropped,
            )
    if not quiet:
        count = int(summary.duplicates(eps))
        rows = summary.rows or 0
        tell(
            f"  Near-duplicates at eps = {eps:g}: {count:,} of {counted(rows, 'row')} ({count / max(rows, 1):.2%})",
            f"  Look at them: {output.rstrip('/')}/{PAGE}",
            rest=f"The report is in {output}.",
        )


def _dropped_by_run(
    ctx: click.Context, run: str, scores: str, eps: float, storage_options: dict[str, Any]
) -> tuple[float, int | None]:
    """Return the eps of a run unless one is given, and how many rows it drops at it if its rule is "kept"."""
    made = manifest_of(f"{run}/duplicates", storage_options)
    if made is None:
        return eps, None
    its_eps = made.parameters["eps"]
    if not is_given(ctx, "eps"):
        eps = its_eps
    if made.parameters["duplicate_of"] != "kept":
        return eps, None
    if eps != its_eps:
        raise InvalidArgumentError(
            f"{run} tells which rows are dropped at eps = {its_eps:g}, and not at {eps:g}: the rule 'kept' keeps other "
            f"rows there. Repeat the run with --eps {eps:g}, which reuses its scores; or name {scores}, whose page "
            "goes by the rule 'any'.",
            parameters=["eps"],
        )
    return eps, made.counts["duplicates"]


def _refuse_other_steps(path: str, storage_options: dict[str, Any]) -> None:
    """Raise for a folder of ``run`` that may hold scores, such as its duplicates, but not the number of all rows."""
    made = manifest_of(path, storage_options)
    if made is not None and made.step != "scores":
        raise InvalidArgumentError(
            f"{path} is the folder {made.step!r} of a run, which does not record how many rows were compared. Name the "
            f"folder of its scores: {_next_to(path, 'scores')}."
        )


def _next_to(path: str, name: str) -> str:
    """Return the folder of a name next to another one."""
    parent, slash, _ = path.rstrip("/").rpartition("/")
    return f"{parent}{slash}{name}"
