"""Steps whose files can be used again: each keeps its parameters beside them, and is redone when those are others."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import fsspec

from dask_semdedup.errors import InvalidArgumentError, some
from dask_semdedup.io.listing import PARQUET_SUFFIXES, is_hidden
from dask_semdedup.io.staging import MANIFEST, Contents, count_files, refuse_strangers, replaced_when_done

NO_REASON = ""
# What file systems, their viewers and notebooks leave in any folder.
LITTER = re.compile(r"(.*/)?(\.DS_Store|\._[^/]*|\.nfs[^/]*|\.ipynb_checkpoints/.*)")
# Below the folder of all steps: what tells that a run has worked there, even one that was killed in its first step.
OF_RUN = re.compile(rf"[^/]+/{re.escape(MANIFEST)}|[^/]+\.partial-[0-9a-f]{{8}}(\.old)?")


@dataclass(frozen=True)
class Step:
    """One folder of files, and how it is made.

    Parameters
    ----------
    name
        Of the step, and of its folder.
    parameters
        What its files depend on, as JSON has it.
    make
        Writes the files to the folder that it is given, and returns counts.
    contents
        What its folder may hold to be replaced.
    needs
        The steps whose files it reads.
    costly
        Whether it is redone for other parameters only where that is asked for.
    """

    name: str
    parameters: dict[str, Any]
    make: Callable[[str], dict[str, int]]
    contents: Contents
    needs: tuple[str, ...] = ()
    costly: bool = False


@dataclass(frozen=True)
class Manifest:
    """What is kept of a step: what it was made of and with, what came out, and how long it took.

    `token` is another each time that the step is made. `files` and `nbytes` are the number and the size of its files.
    """

    step: str
    token: str
    parameters: dict[str, Any]
    needs: dict[str, str]
    counts: dict[str, int]
    seconds: float
    files: int
    nbytes: int


@dataclass(frozen=True)
class Outcome:
    """A step's manifest, and why it was made now; no reason if its files were there."""

    manifest: Manifest
    reason: str

    @property
    def reused(self) -> bool:
        return self.reason == NO_REASON


def plan_steps(
    steps: Sequence[Step], output: str, *, redo_from: str | None, storage_options: Mapping[str, Any]
) -> dict[str, str]:
    """Decide which steps to make, and why; of the others the files are used again.

    Parameters
    ----------
    steps
        In the order in which they are made.
    output
        The folder of their folders.
    redo_from
        The first step to make again in any case.
    storage_options
        Arguments of the fsspec file system.

    Returns
    -------
    dict
        From each step's name to the reason why it is made, which is empty where it is not.

    Raises
    ------
    InvalidArgumentError
        If a folder was made by something else, holds files that would be lost, or a costly step would have to be made
        anew, and nobody said so.
    """
    fs, root = fsspec.url_to_fs(output, **storage_options)
    if fs.isfile(root):
        raise InvalidArgumentError(f"OUTPUT {root!r} is a file. Name a folder.")
    names = [step.name for step in steps]
    if redo_from is not None and redo_from not in names:
        raise InvalidArgumentError(f"There is no step {redo_from!r} in this run, only {', '.join(names)}.")
    redone = names[names.index(redo_from) :] if redo_from is not None else []
    manifests = {step.name: _read_manifest(fs, f"{root}/{step.name}", step.contents) for step in steps}
    if not any(manifests.values()):
        _refuse_foreign(fs, root)
    reasons: dict[str, str] = {}
    for step in steps:
        made = [name for name in step.needs if reasons.get(name)]
        manifest = manifests[step.name]
        if manifest is None or step.name in redone:
            reasons[step.name] = "new" if manifest is None else "asked for"
            continue
        changes = _changes(manifest.parameters, step.parameters) or _losses(fs, f"{root}/{step.name}", manifest)
        reasons[step.name] = _reason(step, manifest, manifests, made, changes)
    for step in steps:
        if reasons[step.name]:
            folder = f"{root}/{step.name}"
            names = [name for name in _names(fs, folder) if not LITTER.fullmatch(name)]
            refuse_strangers(fs, folder, step.contents, names)
    return reasons


def files_of_run(pattern: re.Pattern[str]) -> Contents:
    """Files of a step, which have such names and lie beside its manifest."""

    def strangers(_fs: fsspec.AbstractFileSystem, _folder: str, names: Sequence[str]) -> list[str]:
        return [file for file in names if MANIFEST not in names or not (file == MANIFEST or pattern.fullmatch(file))]

    return Contents("of this step", strangers)


def _names(fs: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    return [path.removeprefix(f"{folder}/") for path in fs.find(folder)]


def _refuse_foreign(fs: fsspec.AbstractFileSystem, root: str) -> None:
    """Keep the folders of steps from being mixed into what others have made."""
    from dask_semdedup.io.jsonlines import JSON_SUFFIXES

    names = _names(fs, root)
    # Logs may be written there.
    data = PARQUET_SUFFIXES + JSON_SUFFIXES
    found = [name for name in names if not is_hidden(name, "") and ("/" in name or name.endswith(data))]
    if not found:
        return
    folders = [path.rpartition("/")[2] for path in fs.ls(root, detail=False)]
    if not any(map(OF_RUN.fullmatch, [*names, *folders])):
        raise InvalidArgumentError(
            f"OUTPUT {root!r} was not made by 'run', and is not empty: {count_files(len(found))}, as {some(found, 3)}. "
            "Name another folder."
        )


def _reason(
    step: Step, manifest: Manifest, manifests: Mapping[str, Manifest | None], made: Collection[str], changes: str
) -> str:
    if changes and step.costly:
        raise InvalidArgumentError(
            f"{step.name}/ cannot be used again: {changes}. Pass '--from {step.name}' to make it and all that follows "
            "anew, or name another OUTPUT."
        )
    if made:
        return f"after {', '.join(made)}"
    anew = [name for name in step.needs if (other := manifests[name]) and manifest.needs.get(name) != other.token]
    if anew:
        return f"after {', '.join(anew)}"
    return changes or NO_REASON


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The parameters that differ, with both values where these are short."""
    changed = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    return ", ".join(
        "the files of INPUT have changed" if name == "files" else f"{name} {before.get(name)} → {now.get(name)}"
        for name in changed
    )


def _losses(fs: fsspec.AbstractFileSystem, folder: str, manifest: Manifest) -> str:
    """What there is of the files, unless they are all; others beside them are no loss."""
    files, nbytes = _measure(fs, folder)
    if files >= manifest.files and nbytes >= manifest.nbytes:
        return NO_REASON
    were = f"{count_files(manifest.files)} of {manifest.nbytes:,} bytes"
    return f"{were} were written, and {count_files(files)} of {nbytes:,} bytes found"


def _measure(fs: fsspec.AbstractFileSystem, folder: str) -> tuple[int, int]:
    """The number and the size of the files that are not hidden, nor the manifest."""
    found = fs.find(folder, detail=True)
    sizes = [info["size"] for path, info in found.items() if not is_hidden(path, folder)]
    return len(sizes), sum(sizes)


def make_step(
    step: Step,
    output: str,
    reason: str,
    *,
    storage_options: Mapping[str, Any],
    needs: Mapping[str, Manifest],
) -> Outcome:
    """Make a step's folder, or read what is kept of it where there is no reason to."""
    fs, root = fsspec.url_to_fs(output, **storage_options)
    folder = f"{root}/{step.name}"
    if reason == NO_REASON:
        kept = _read_manifest(fs, folder, step.contents)
        if kept is None:
            raise InvalidArgumentError(f"{folder} is gone since the run began.")
        return Outcome(kept, reason)
    start = time.perf_counter()
    with _made_if_used(fs, root), replaced_when_done(fs, folder) as staged:
        counts = step.make(staged)
        tokens = {name: needs[name].token for name in step.needs}
        seconds = time.perf_counter() - start
        _, path = fsspec.url_to_fs(staged, **storage_options)
        files, nbytes = _measure(fs, path)
        manifest = Manifest(
            step.name, secrets.token_hex(8), step.parameters, tokens, counts, seconds, files=files, nbytes=nbytes
        )
        fs.pipe_file(f"{path}/{MANIFEST}", json.dumps(asdict(manifest), indent=2).encode())
    return Outcome(manifest, reason)


@contextmanager
def _made_if_used(fs: fsspec.AbstractFileSystem, root: str) -> Iterator[None]:
    """Make the folder of all steps, and remove it again if its first step fails."""
    fs.makedirs(root, exist_ok=True)
    try:
        yield
    except BaseException:
        if not fs.ls(root, detail=False):
            fs.rmdir(root)
        raise


def _read_manifest(fs: fsspec.AbstractFileSystem, folder: str, contents: Contents) -> Manifest | None:
    """What is kept of a step; None where there are no files, or none that another command has not made as well."""
    names = _names(fs, folder)
    if MANIFEST not in names and not contents.strangers(fs, folder, names):
        return None
    try:
        return Manifest(**json.loads(fs.cat_file(f"{folder}/{MANIFEST}")))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidArgumentError(
            f"{folder!r} was not made by 'run', or not by this version: its {MANIFEST} cannot be read. "
            "Remove it yourself, or name another OUTPUT."
        ) from error
