"""The ``dask-semdedup`` command: the library's functions with progress bars and summaries."""

from __future__ import annotations

import click

from dask_semdedup.cli import pairwise, report, run
from dask_semdedup.cli.application import Application


@click.group(
    cls=Application,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="dask-semdedup", message="%(package)s %(version)s")
def main() -> None:
    """Exact semantic deduplication of embedding tables, with Dask."""


for _module in (run, pairwise, report):
    main.add_command(_module.command)
