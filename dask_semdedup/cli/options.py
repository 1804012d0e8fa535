"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
import numpy as np

from dask_semdedup.steps.duplicates import DEFAULT_EPS

if TYPE_CHECKING:
    from dask_semdedup.steps.ranking import RankingStrategy

# Files for an encrypted connection, by option: the parameter of `distributed.Security`, and what is in them.
TLS_OPTIONS = {
    "--tls-ca-file": ("tls_ca_file", "Certificate of the authority that signed the scheduler's certificate"),
    "--tls-cert": ("tls_client_cert", "Certificate of this client"),
    "--tls-key": ("tls_client_key", "Private key of this client"),
}

Function = TypeVar("Function", bound=Callable[..., Any])


def _together(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Return one decorator that adds several options."""

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def _parse_storage_options(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Return ``{"anon": True, "key": "x"}`` for ``("anon=true", "key=x")``."""
    options: dict[str, Any] = {}
    for value in values:
        key, equals, setting = value.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"{value!r} is not of the form KEY=VALUE.")
        options[key] = {"true": True, "false": False}.get(setting.lower(), setting)
    return options


def _parse_rank_by(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> RankingStrategy | None:
    """Return the ranking by the columns of ``("quality:desc", "length")``."""
    if not values:
        return None
    from dask_semdedup.steps.ranking import RankingStrategy

    columns, ascending = [], []
    for value in values:
        column, colon, order = value.rpartition(":")
        if not colon:
            column, order = value, "asc"
        if not column or order not in ("asc", "desc"):
            raise click.BadParameter(
                f"{value!r} is not of the form COLUMN, COLUMN:asc or COLUMN:desc. If the name "
                "contains a colon, add :asc or :desc."
            )
        columns.append(column)
        ascending.append(order == "asc")
    return RankingStrategy.metadata_based(columns, ascending=ascending)


def rank_options(strategy: RankingStrategy) -> list[str]:
    """Return the values of ``--rank-by`` for a ranking by columns."""
    orders = ("asc" if ascending else "desc" for ascending in np.atleast_1d(strategy.ascending))
    return [f"{name}:{order}" for name, order in zip(strategy.metadata_cols, orders, strict=True)]


def _remember_traceback(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.meta["traceback"] = value


def _remember_tls(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.meta.setdefault("tls", {})[TLS_OPTIONS[param.opts[0]][0]] = value


def tls_files(ctx: click.Context) -> dict[str, str]:
    """Return the files of certificates and keys that were given, as parameters of `distributed.Security`."""
    return dict(ctx.meta.get("tls", {}))


id_option = click.option("--id-field", metavar="COLUMN", default="id", show_default=True, help="Column of ids.")
make_ids_option = click.option(
    "--make-ids",
    is_flag=True,
    help="Make ids in a new column --id-field: the name of the file and the number of the row in it.",
)
cluster_option = click.option(
    "--cluster-field",
    metavar="COLUMN",
    default="centroid",
    show_default=True,
    help="Column of clusters, or the key in folder names.",
)
embedding_options = _together(
    click.option(
        "--embedding-field", metavar="COLUMN", default="embeddings", show_default=True, help="Column of embeddings."
    ),
    click.option(
        "--embedding-dim", type=click.IntRange(min=1), metavar="N", help="Fail if embeddings have another length."
    ),
)
search_options = _together(
    click.option(
        "--compute-dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Precision of the search. 'auto' is exact and fast; half-precision types are lossy.",
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Device that searches, regardless of the backend.",
    ),
    click.option(
        "--backend",
        type=click.Choice(["pandas", "cudf"]),
        help="Type of the partitions.  [default: Dask's dataframe.backend, which is pandas unless configured]",
    ),
    click.option(
        "--pairwise-batch-size",
        type=click.IntRange(min=1),
        metavar="N",
        help="Number of rows that are searched at once.  [default: 512]",
    ),
    click.option(
        "--partition-size",
        metavar="SIZE",
        help="Maximum size of a partition in memory. A larger cluster stays whole.  [default: 128MiB, or "
        "up to 2GiB on a GPU]",
    ),
)
execution_options = _together(
    click.option(
        "--storage-option",
        "storage_options",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_parse_storage_options,
        help="fsspec option for all paths, such as anon=true. Repeat the option for several.",
    ),
    click.option(
        "--scheduler", metavar="ADDRESS", help="Run on the Dask cluster at this address, such as tcp://10.0.0.1:8786."
    ),
    *(
        click.option(
            name,
            type=click.Path(exists=True, dir_okay=False),
            metavar="FILE",
            expose_value=False,
            callback=_remember_tls,
            help=f"{what}, in PEM format, for a scheduler at tls://.",
        )
        for name, (_, what) in TLS_OPTIONS.items()
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="Run on N processes of this machine.  [default: threads of one process]",
    ),
)
message_options = _together(
    click.option("-q", "--quiet", is_flag=True, help="Show neither progress nor a summary."),
    click.option("-v", "--verbose", is_flag=True, help="Log each search within clusters."),
    click.option(
        "--traceback",
        is_flag=True,
        expose_value=False,
        callback=_remember_traceback,
        help="Show the full traceback of an error.",
    ),
)
document_options = _together(
    click.option("--text-field", metavar="COLUMN", help="Column of texts to show in the report."),
    click.option(
        "--image-field",
        metavar="COLUMN",
        help="Column of images to show in the report: encoded bytes, such as PNG or JPEG, or paths to files.",
    ),
)


def keep_options(centre: str, distances: str) -> Callable[[Function], Function]:
    """Return the options of what is preferred, which differ between commands in the distances of 'hard' and 'easy'."""
    return _together(
        click.option(
            "--which-to-keep",
            type=click.Choice(["hard", "easy", "random"]),
            default="hard",
            show_default=True,
            help=f"Which of two duplicates to keep: the row farther from {centre}, the nearer row, or a random one.",
        ),
        click.option(
            "--sim-metric",
            type=click.Choice(["cosine", "l2"]),
            default="cosine",
            show_default=True,
            help=f"Distance for 'hard' and 'easy'{distances}.",
        ),
        click.option(
            "--rank-by",
            "ranking_strategy",
            metavar="COLUMN[:asc|:desc]",
            multiple=True,
            callback=_parse_rank_by,
            help="Keep the row with the smallest value of this column or, with :desc, the largest. Replaces "
            "--which-to-keep. Repeat the option to break ties.",
        ),
    )


def seed_option(help_text: str) -> Callable[[Function], Function]:
    """Return the option ``--random-seed``."""
    return click.option("--random-seed", type=int, metavar="N", default=42, show_default=True, help=help_text)


class Eps(click.FloatRange):
    """A cosine distance."""

    name = "number"

    def __init__(self) -> None:
        super().__init__(0, 2)


def eps_option(help_text: str, default: float | None = DEFAULT_EPS) -> Callable[[Function], Function]:
    """Return the option ``--eps``, whose effect differs between commands."""
    return click.option("--eps", type=Eps(), metavar="EPS", default=default, show_default=True, help=help_text)
