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
}
# Parameters that have another name.
RENAMED = {"random_seed": "random_state"}
QUOTED = re.compile(r"""((?<!\w)'[^']*'(?!\w)|"[^"]*")""")
# Columns and paths, which may have the name of a parameter, are quoted or have slashes.
BEFORE, AFTER = r"(?<![\w'\"/.=-])", r"(?![\w'\"/=-]|\.\w)"


def in_options(message: str, parameters: Sequence[click.Parameter]) -> str:
    """Say what the library says of its parameters of a command's options."""
    for phrase, words in PHRASES.items():
        message = message.replace(phrase, words)
    options = [option for option in parameters if isinstance(option, click.Option) and option.name]
    if any(option.name == "columns" for option in options):
        message = re.sub(
            "or name (columns that agree|the columns to read)", "or keep others: name each as --column", message
        )
    for option in options:
        message = re.sub(rf"{BEFORE}{option.name}=True\b", option.opts[-1], message)
        message = re.sub(rf"{BEFORE}{option.name}='(\w+)'", rf"{option.opts[-1]} \1", message)
    pieces = QUOTED.split(message)
    pieces[::2] = [_reworded(piece, options) for piece in pieces[::2]]
    return "".join(pieces)


def _reworded(text: str, options: Sequence[click.Option]) -> str:
    for option in options:
        flag = option.opts[-1]
        names = {option.name, flag.strip("-").replace("-", "_"), RENAMED.get(str(option.name))} - {None}
        # Names without, such as device, are words too.
        if names := {str(name) for name in names if "_" in str(name)}:
            text = re.sub(f"{BEFORE}({'|'.join(sorted(names))}){AFTER}", flag, text)
    return text
