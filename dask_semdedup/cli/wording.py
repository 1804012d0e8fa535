"""What the library says, in the command's words: parameters are options, and methods are commands."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

# What the library advises for which there are other words in a shell.
PHRASES = {
    "ddf.semdedup.kmeans() and, to keep them, .semdedup.to_clusters(path)": "'dask-semdedup run' does it",
    "in the ranking strategy": "as --rank-by",
    "in the frame, which has": "among",
    "random_state": "random_seed",
}
# Columns and paths, which may have the name of a parameter, are quoted or have slashes.
BEFORE, AFTER = r"(?<![\w'\"/.=-])", r"(?![\w'\"/=-]|\.\w)"


def in_options(message: str, parameters: Sequence[click.Parameter]) -> str:
    """Say what the library says of its parameters of a command's options.

    Examples
    --------
    >>> flags = [click.Option(["--overwrite"], is_flag=True), click.Option(["--id-field"]), click.Option(["--device"])]
    >>> in_options("Pass overwrite=True, or device='cpu', or name columns as id_field, not 'id_field'.", flags)
    "Pass --overwrite, or --device cpu, or name columns as --id-field, not 'id_field'."
    """
    for phrase, words in PHRASES.items():
        message = message.replace(phrase, words)
    for option in parameters:
        if isinstance(option, click.Option) and option.name:
            flag = option.opts[-1]
            message = re.sub(rf"{BEFORE}{option.name}=True\b", flag, message)
            message = re.sub(rf"{BEFORE}{option.name}='(\w+)'", rf"{flag} \1", message)
            # Names without, such as device, are words too.
            names = {name for name in (option.name, flag.strip("-").replace("-", "_")) if "_" in name}
            message = re.sub(f"{BEFORE}({'|'.join(names)}){AFTER}", flag, message) if names else message
    return message
