"""The classes of all commands: their errors are one line, and their help has sections."""

from __future__ import annotations

import atexit
import io
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from dask_semdedup.cli.options import rank_options
from dask_semdedup.errors import OutputError, SemDedupError, ZeroEmbeddingWarning, counted, some
from dask_semdedup.steps.ranking import RankingStrategy

EXIT_STATUS = 2
INTERRUPTED = 130
# Columns that a table needs.
LEAST_WIDTH = 80
# Seconds within which several interrupts are one: programs such as timeout pass on what the terminal sends, too.
ONE_INTERRUPT = 0.5

RESUME = "Run the same command again: it reuses the parts that are finished, if there are any."

# The sections of the commands' help, with the parameters in each.
SECTIONS = {
    "Documents": ["data", "text_field", "image_field", "embed", "model"],
    "Columns": ["id_field", "make_ids", "columns", "embedding_field", "cluster_field", "embedding_dim"],
    "Clusters": ["n_clusters"],
    "Which row is kept": [
        "which_to_keep",
        "sim_metric",
        "ranking_strategy",
        "random_seed",
    ],
    "Threshold": ["eps", "duplicate_of", "max_eps"],
    "Search": ["compute_dtype", "device", "pairwise_batch_size"],
    "Where it runs": [
        "workers",
        "scheduler",
        "tls_ca_file",
        "tls_cert",
        "tls_key",
        "backend",
        "partition_size",
    ],
    "Files": ["storage_options", "overwrite", "redo_from"],
    "Messages": ["dry_run", "quiet", "verbose", "report_json", "traceback"],
}

# Options that change nothing of what is written.
NOT_OF_OUTPUT = {"storage_options", "scheduler", "workers", "overwrite", "quiet", "verbose"}

# Options that the command on a run's page leaves out, too: it has an eps of its own, and the scores have theirs.
NOT_REPEATED = NOT_OF_OUTPUT | {"eps", "max_eps", "redo_from", "dry_run", "report_json"}

# Parameters of the library that an option has under another name.
OTHER_NAMES = {"random_state": "random_seed"}

# The words with which messages of the library name parameters: "as id_field, text_field and image_field".
AS_PARAMETERS = re.compile(r"\bas \w+(?:(?:, | and | or )\w+)*")

# Pairs of parameters of which the first makes the second void.
CONTRADICTIONS = [
    ("ranking_strategy", "which_to_keep"),
    ("ranking_strategy", "sim_metric"),
    ("scheduler", "workers"),
    ("quiet", "verbose"),
    ("overwrite", "redo_from"),
]

# Pairs of parameters of which the first is void without the second, where a command has both.
DEPENDENCES = [("cluster_field", "n_clusters")]


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
            click.echo(f"Stopped. {RESUME}", err=True)
            # A signal while Python exits would lead to another exit status, or to a traceback.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
            sys.exit(INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Treat the signal with which batch systems end a job as an interrupt, which leaves nothing unfinished.

    The first one waits for running tasks, which would fail if the program exited. The next one ends the process, since
    such a task may take minutes, or Python may have dropped the first exception.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping_since: float | None = None

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping_since
        if stopping_since is not None:
            if time.monotonic() - stopping_since > ONE_INTERRUPT:
                _stop_at_once()
            return
        stopping_since = time.monotonic()
        with suppress(RuntimeError):  # The signal may have interrupted another print.
            click.echo("Stopping: waiting for running tasks. Press Ctrl-C again to stop at once.", err=True)
        raise KeyboardInterrupt

    # Background jobs of a shell ignore interrupts. None is a handler of a program that embeds Python.
    untouched = (signal.SIG_IGN, None)
    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) not in untouched]
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_at_once() -> None:
    """End this process, whatever its threads do. The next run sees that the locks of this one are void."""
    # A progress bar has hidden the cursor.
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    with suppress(RuntimeError, OSError):
        click.echo(f"{cursor}\nStopped at once. {RESUME}", err=True)
    os._exit(INTERRUPTED)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print each warning once, without the line of code that raised it."""
    shown: set[object] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        # Each partition with such rows warns of its own: the first is enough.
        key = ZeroEmbeddingWarning if isinstance(message, ZeroEmbeddingWarning) else str(message)
        if key not in shown:
            shown.add(key)
            click.echo(f"{click.style('Warning:', fg='yellow', bold=True)} {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


class Command(click.Command):
    """A command whose errors are one line, after the traceback if ``--traceback`` is given."""

    # They are refused here, with advice.
    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if rest:
            ctx.fail(
                f"Got {counted(len(rest), 'unexpected argument')}: {some(rest, 3)}. To read several files, name their "
                "folder, or quote the pattern: a shell replaces *.parquet by the names of all files."
            )
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if ctx.meta.get("traceback"):
                traceback.print_exception(error)
            message = _describe(error, self)
            if not isinstance(error, SemDedupError):
                message += _urls_not_in(message, ctx)
            raise click.ClickException(message) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in their sections; options of no section come last."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        records = {option.name: record for option in options if (record := option.get_help_record(ctx))}
        for heading, names in SECTIONS.items():
            if section := [records.pop(name) for name in names if name in records]:
                with formatter.section(heading):
                    formatter.write_dl(section)
        with formatter.section("Help"):
            formatter.write_dl(list(records.values()))


def _describe(error: Exception, command: click.Command) -> str:
    """Return an error's message with the options that it is about, or with its type if it was not expected."""
    if isinstance(error, SemDedupError):
        flags = _flags(command)
        options = {name: flags[known] for name in error.parameters if (known := OTHER_NAMES.get(name, name)) in flags}
        message = _in_options(str(error), options)
        others = [option for option in options.values() if option not in message]
        return f"{message} ({', '.join(others)})" if others else message
    if isinstance(error, OSError):
        return str(error)
    return f"{type(error).__name__}: {error} (--traceback shows where)"


def _urls_not_in(message: str, ctx: click.Context) -> str:
    """Return the URLs of the command, which errors of a library for object storage may not name."""
    arguments = [param for param in ctx.command.params if isinstance(param, click.Argument)]
    given = {str(param.metavar).strip("[]"): str(ctx.params.get(str(param.name))) for param in arguments}
    urls = {name: path for name, path in given.items() if "://" in path}
    if not urls or any(path in message for path in urls.values()):
        return ""
    return f" ({', '.join(f'{name} {path}' for name, path in urls.items())})"


def _in_options(message: str, options: Mapping[str, str]) -> str:
    """Return a message that names options where it says what to pass: ``as id_field``, ``duplicate_of='any'``."""
    names = AS_PARAMETERS.sub(
        lambda match: re.sub(r"\w+", lambda word: options.get(word[0], word[0]), match[0]), message
    )
    for name, option in options.items():
        names = names.replace(f"{name}=True", option).replace(f"{name}=RankingStrategy([column])", f"{option} COLUMN")
        names = re.sub(rf"\b{name}='(\w+)'", rf"{option} \1", names)
    return names.replace("name another folder", "name another OUTPUT, the second argument")


def _flags(command: click.Command) -> dict[str, str]:
    """Return the options of a command by the names of their parameters."""
    return {str(param.name): param.opts[-1] for param in command.params if isinstance(param, click.Option)}


def as_text(table: Table) -> str:
    """Return a table as text for standard output, with styles if that is a terminal."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=bool(sys.stdout and sys.stdout.isatty()) or None)
    # A narrower terminal breaks lines, where rich would leave out numbers.
    console.width = max(console.width, LEAST_WIDTH)
    console.print(table)
    return text.getvalue().rstrip("\n")


def tell(*lines: str, rest: str) -> None:
    """Print lines to standard output. If it is full, the error ends with `rest`, which says what is done anyway.

    If whoever reads it has enough, as ``head`` has after some lines, that is no error.
    """
    try:
        click.echo("\n".join(lines))
    except OSError as error:
        # Python would write the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"Cannot write to standard output: {error}. {rest}") from error


def _one_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        message += f" See '{error.ctx.command_path} --help'."
    return message


def options_of_output(ctx: click.Context) -> dict[str, Any]:
    """Return the values of all options on which a command's output depends, as JSON."""
    flags = _flags(ctx.command)
    values = {flag: ctx.params[name] for name, flag in flags.items() if name in ctx.params.keys() - NOT_OF_OUTPUT}
    plain = (str, int, float, type(None))
    return {flag: value if isinstance(value, plain) else repr(value) for flag, value in values.items()}


def command_line(ctx: click.Context) -> str:
    """Return the command as it was given, without options that the next one may have otherwise."""
    words = ctx.command_path.split()
    for param in ctx.command.params:
        name = str(param.name)
        if isinstance(param, click.Argument):
            words.append(ctx.params[name])
        elif name in ctx.params.keys() - NOT_REPEATED and is_given(ctx, name):
            words += _as_given(param.opts[-1], ctx.params[name])
    return shlex.join(words)


def _as_given(flag: str, value: Any) -> list[str]:
    """Return the words of an option with this value."""
    if isinstance(value, bool):
        return [flag]
    if isinstance(value, RankingStrategy):
        value = rank_options(value)
    values = value if isinstance(value, list | tuple) else [value]
    return [word for one in values for word in (flag, str(one))]


def is_given(ctx: click.Context, name: str) -> bool:
    """Return whether a parameter is on the command line, not left to its default."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def refuse_contradictions(ctx: click.Context) -> None:
    """Raise if a given option would silently be void: by another one, or by the lack of another."""
    flags = _flags(ctx.command)
    given = {name for name in flags if is_given(ctx, name)}
    for pair in CONTRADICTIONS:
        if given.issuperset(pair):
            raise click.UsageError(f"{flags[pair[0]]} and {flags[pair[1]]} cannot be used together.", ctx)
    for name, needed in DEPENDENCES:
        if name in given and needed in flags and needed not in given:
            raise click.UsageError(f"{flags[name]} has no effect without {flags[needed]}.", ctx)
