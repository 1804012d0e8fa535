"""What all commands share: errors that are one line, and help in sections."""

from __future__ import annotations

import atexit
import math
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

from dask_semdedup.cli.wording import in_options
from dask_semdedup.errors import SemDedupError

EXIT_STATUS = 2
INTERRUPTED = 130
# Seconds after an interrupt in which another one is taken for the same.
PATIENCE = 10

# The commands' parameters as their help groups them.
SECTIONS = {
    "Documents": ["data", "text_field", "image_field", "embed", "model"],
    "Columns": ["id_field", "make_ids", "columns", "embedding_field", "cluster_field", "embedding_dim"],
    "Clusters": ["n_clusters", "n_probe"],
    "What to keep": ["which_to_keep", "sim_metric", "ranking_strategy", "random_seed", "eps"],
    "Search": ["compute_dtype", "device", "pairwise_batch_size"],
    "Where it runs": ["workers", "scheduler", "backend", "partition_size"],
    "Files": ["storage_options", "overwrite", "redo_from"],
    "Messages": ["quiet", "verbose", "traceback"],
}

# Parameters of which the second means nothing where the first is given.
CONTRADICTIONS = [
    ("ranking_strategy", "which_to_keep"),
    ("ranking_strategy", "sim_metric"),
    ("scheduler", "workers"),
    ("quiet", "verbose"),
    ("overwrite", "redo_from"),
]


class Application(click.Group):
    """A group of commands whose errors, click's own included, are one line on stderr and exit status 2."""

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        try:
            with _stopped_by_signals(), _warnings_in_a_line():
                status = super().main(args, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as help_text:
            help_text.show()
            sys.exit(EXIT_STATUS)
        except click.ClickException as error:
            click.echo(f"{click.style('Error:', fg='red', bold=True)} {_one_line(error)}", err=True)
            sys.exit(EXIT_STATUS)
        except click.Abort:
            click.echo("Stopped. Nothing unfinished was left under a final name.", err=True)
            # Python takes a while to end: what is heard then would be another exit status, or a traceback.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
            sys.exit(INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let what batch systems send, to end a job, do as an interrupt does, which leaves nothing unfinished.

    For some seconds only the first is heard: another would end the wait for running tasks, which then fail as the
    program exits. Later ones do: the first may have come where Python drops exceptions, or a task may never end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping_since = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping_since
        if time.monotonic() - stopping_since < PATIENCE:
            return
        if _collects_garbage(frame):
            threading.Timer(0.05, signal.raise_signal, [number]).start()
            return
        stopping_since = time.monotonic()
        with suppress(RuntimeError):  # The signal may have come as something else was printed.
            click.echo("Stopping: waiting for running tasks.", err=True)
        raise KeyboardInterrupt

    # A shell's background jobs ignore interrupts, and go on to.
    # Those of a program around Python are unknown to it.
    unheard = (signal.SIG_IGN, None)
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) not in unheard]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print each warning once, without the line of code that it came from."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            click.echo(f"{click.style('Warning:', fg='yellow', bold=True)} {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _collects_garbage(frame: FrameType | None) -> bool:
    """Whether a frame is where Python drops what is raised: as it collects garbage."""
    while frame is not None:
        if frame.f_code.co_name in ("__del__", "_gc_callback"):
            return True
        frame = frame.f_back
    return False


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
            raise click.ClickException(_describe(error, self)) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in sections; what is in none of them comes last."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        records = {option.name: record for option in options if (record := option.get_help_record(ctx))}
        for heading, names in SECTIONS.items():
            if section := [records.pop(name) for name in names if name in records]:
                with formatter.section(heading):
                    formatter.write_dl(section)
        with formatter.section("Help"):
            formatter.write_dl(list(records.values()))


def _describe(error: Exception, command: click.Command) -> str:
    """An error's message; its type too where the message was not written for the command's user."""
    if isinstance(error, SemDedupError):
        return in_options(str(error), command.params)
    if isinstance(error, OSError):
        return str(error)
    return f"{type(error).__name__}: {error} (--traceback shows where)"


def _one_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        message += f" See '{error.ctx.command_path} --help'."
    return message


def refuse_contradictions(ctx: click.Context) -> None:
    """Refuse two options of which one would silently make the other void."""
    flags = {param.name: param.opts[-1] for param in ctx.command.params}
    given = {name for name in flags if name and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    for pair in CONTRADICTIONS:
        if given.issuperset(pair):
            raise click.UsageError(f"{flags[pair[0]]} and {flags[pair[1]]} exclude each other.", ctx)
