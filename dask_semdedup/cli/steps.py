"""Steps whose files can be reused: a manifest stores their parameters, and a step is redone if these change."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import fsspec

from dask_semdedup.cli.files import work_of
from dask_semdedup.errors import DataNotFoundError, InvalidArgumentError, OutputExistsError, some
from dask_semdedup.io.listing import PARQUET_SUFFIXES, UNFINISHED, is_hidden, is_local
from dask_semdedup.io.locks import only_run
from dask_semdedup.io.notes import read_note, write_note
from dask_semdedup.io.staging import differences, restore, staged_folder
from dask_semdedup.io.targets import (
    MANIFEST,
    MANIFESTS,
    TABLE_MANIFEST,
    Contents,
    count_files,
    refuse_file,
    refuse_strangers,
)

if TYPE_CHECKING:
    import dask.dataframe as dd

NO_REASON, ASKED_FOR = "", "asked for"
# What reading a manifest raises if it is damaged, or not one of this version.
UNREADABLE = (OSError, ValueError, LookupError, TypeError)
# The lock of the folder of all steps.
LOCK = "_lock.json"
# Names in the folder of all steps that show that a run has worked there, even if it was killed in its first step.
OF_RUN = re.compile(rf"[^/]+/({'|'.join(map(re.escape, [*MANIFESTS, UNFINISHED]))})|[^/]+\.partial(/.*)?")


@dataclass(frozen=True)
class Step:
    """One folder of files, and how it is made.

    Parameters
    ----------
    name
        Name of the step and of its folder.
    parameters
        The parameters on which its files depend, as JSON values.
    make
        Function that writes the files to a given folder, of the frame that was planned, and returns counts.
    contents
        The kind of files that its folder may hold to be replaced.
    needs
        The steps whose files it reads.
    plan
        Function that returns the frame to write, one file a partition, so that a run goes on with the files that a
        stopped one has left; None if no file can be made by itself.
    costly
        Whether other parameters are an error, unless the step is redone on request.
    source
        The path of INPUT, for messages: another one may lead to the same files.
    origins
        What parameters come from that are not given themselves, for messages.
    """

    name: str
    parameters: dict[str, Any]
    make: Callable[[str, Any], dict[str, int]]
    contents: Contents
    needs: tuple[str, ...] = ()
    plan: Callable[[], dd.DataFrame] | None = None
    costly: bool = False
    source: str = ""
    origins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The record of a step: its parameters, the steps that it needed, its counts and its time.

    `token` is new each time that the step is made. `files` and `nbytes` are the number and the size of its files.
    `source` is the path of INPUT, which older manifests lack.
    """

    step: str
    token: str
    parameters: dict[str, Any]
    needs: dict[str, str]
    counts: dict[str, int]
    seconds: float
    files: int
    nbytes: int
    source: str = ""


@dataclass(frozen=True)
class Outcome:
    """A step's manifest, and the reason why it was made, which is empty if its files were reused."""

    manifest: Manifest
    reason: str

    @property
    def reused(self) -> bool:
        return self.reason == NO_REASON


def plan_steps(
    steps: Sequence[Step], output: str, *, redo_from: str | None, storage_options: Mapping[str, Any]
) -> dict[str, str]:
    """Return the steps to make, and why. The files of the others are reused.

    Parameters
    ----------
    steps
        The steps in their order.
    output
        The folder of the steps' folders.
    redo_from
        The first step to redo in any case.
    storage_options
        Arguments of the fsspec file system.

    Returns
    -------
    dict
        From each step's name to the reason why it is made, which is empty if it is not.

    Raises
    ------
    OutputExistsError
        If a folder was made by something else, or holds files that would be lost.
    InvalidArgumentError
        If a costly step would have to be redone, but was not asked for.
    """
    fs, root = fsspec.url_to_fs(output, **storage_options)
    refuse_file(fs, root)
    names = [step.name for step in steps]
    if redo_from is not None and redo_from not in names:
        message = f"There is no step {redo_from!r} in this run, only {', '.join(names)}."
        raise InvalidArgumentError(message, parameters=["redo_from"])
    redone = names[names.index(redo_from) :] if redo_from is not None else []
    manifests = {step.name: _read_manifest(fs, f"{root}/{step.name}", step.contents) for step in steps}
    if not any(manifests.values()):
        _refuse_foreign(fs, root)
    reasons: dict[str, str] = {}
    for step in steps:
        made = [name for name in step.needs if reasons.get(name)]
        manifest = manifests[step.name]
        if manifest is None or step.name in redone:
            reasons[step.name] = ASKED_FOR if step.name in redone else "new"
            continue
        changes = _changes(manifest, step) or _losses(fs, f"{root}/{step.name}", manifest)
        reasons[step.name] = _reason(step, manifest, manifests, made, changes)
    for step in steps:
        if reasons[step.name]:
            folder = f"{root}/{step.name}"
            refuse_strangers(fs, folder, step.contents, _names(fs, folder))
    return reasons


def stored_parameters(name: str, contents: Contents, output: str, storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with which a step was made, which are none if its folder is empty or unfinished."""
    fs, root = fsspec.url_to_fs(output, **storage_options)
    manifest = _read_manifest(fs, f"{root}/{name}", contents)
    return {} if manifest is None else manifest.parameters


def is_output_of_run(path: str, storage_options: Mapping[str, Any]) -> bool:
    """Return whether a path is the folder of all steps, with scores in it."""
    fs, folder = fsspec.url_to_fs(path, **storage_options)
    return bool(fs.exists(f"{folder.rstrip('/')}/scores/{TABLE_MANIFEST}"))


def is_unfinished_run(path: str, storage_options: Mapping[str, Any]) -> bool:
    """Return whether a path is the folder of all steps, with no scores in it yet."""
    fs, folder = fsspec.url_to_fs(path, **storage_options)
    if is_output_of_run(path, storage_options) or not fs.isdir(folder):
        return False
    return any(map(OF_RUN.fullmatch, _names(fs, folder.rstrip("/"))))


def manifest_of(path: str, storage_options: Mapping[str, Any]) -> Manifest | None:
    """Return the manifest in the folder of a step, or None if it is not one, or is not finished."""
    fs, folder = fsspec.url_to_fs(path, **storage_options)
    for name in MANIFESTS:
        with suppress(*UNREADABLE):
            return Manifest(**read_note(fs, f"{folder.rstrip('/')}/{name}"))
    return None


def files_of_run(pattern: re.Pattern[str]) -> Contents:
    """Return the contents of a step: files with such names, next to its manifest."""

    def strangers(_fs: fsspec.AbstractFileSystem, _folder: str, names: Sequence[str]) -> list[str]:
        if not set(MANIFESTS).intersection(names):
            return list(names)
        return [file for file in names if file not in MANIFESTS and not pattern.fullmatch(file)]

    return Contents("of this step", strangers)


def _names(fs: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    return [path.removeprefix(f"{folder}/") for path in fs.find(folder)]


def _refuse_foreign(fs: fsspec.AbstractFileSystem, root: str) -> None:
    """Raise if the folder of all steps holds data of other origin."""
    from dask_semdedup.io.jsonlines import JSON_SUFFIXES

    names = _names(fs, root)
    # Other files, such as logs, may be there.
    data = PARQUET_SUFFIXES + JSON_SUFFIXES
    found = [name for name in names if not is_hidden(name, "") and ("/" in name or name.endswith(data))]
    if not found:
        return
    folders = [path.rpartition("/")[2] for path in fs.ls(root, detail=False)]
    if not any(map(OF_RUN.fullmatch, [*names, *folders])):
        raise OutputExistsError(
            f"OUTPUT {root!r} was not made by 'run', and is not empty: {count_files(len(found))}, as {some(found, 3)}. "
            "Name another folder."
        )


def _reason(
    step: Step, manifest: Manifest, manifests: Mapping[str, Manifest | None], made: Collection[str], changes: str
) -> str:
    if changes and step.costly:
        raise InvalidArgumentError(
            f"{step.name}/ cannot be reused: {changes}. Pass '--from {step.name}' to compute {step.name} and all later "
            "steps again, or name another OUTPUT."
        )
    if made:
        return f"after {', '.join(made)}"
    newer = [name for name in step.needs if (other := manifests[name]) and manifest.needs.get(name) != other.token]
    if newer:
        return f"after {', '.join(newer)}"
    return changes or NO_REASON


def _changes(manifest: Manifest, step: Step) -> str:
    """Return what differs: the steps whose files are read, and the options, with both values."""
    before, now = manifest.parameters, step.parameters
    changed = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    texts = []
    if set(manifest.needs) != set(step.needs):
        texts.append(f"it was made from {_sources(manifest.needs)}, and would now be made from {_sources(step.needs)}")
        # Options of the one source mean nothing to the other.
        changed = [name for name in changed if name in before and name in now]
    if "files" in changed and manifest.source not in ("", step.source):
        texts.append(f"it was made from INPUT {manifest.source}, and would now be made from {step.source}")
        changed.remove("files")
    options = [{option_of(name): _shown(values.get(name)) for name in changed} for values in (before, now)]
    origins = [step.origins[name] for name in changed if name in step.origins]
    return ", ".join([*texts, *differences(*options), *origins])


def _shown(value: Any) -> str:
    """Return a parameter's value as a reader of a table knows it."""
    if isinstance(value, list):
        value = ", ".join(value)
    if isinstance(value, bool) or value in (None, ""):
        return "given" if value else "not given"
    return str(value)


def _sources(needs: Collection[str]) -> str:
    return " and ".join(f"{name}/" for name in needs) or "INPUT"


def option_of(name: str) -> str:
    """Return the option of `run` for a parameter in manifests. The files of INPUT are none."""
    return {"columns": "--column", "files": "files"}.get(name, f"--{name.replace('_', '-')}")


def _losses(fs: fsspec.AbstractFileSystem, folder: str, manifest: Manifest) -> str:
    """Return how many of a step's files are missing, if any are. Additional files do not matter."""
    files, nbytes = _measure(fs, folder)
    if files >= manifest.files and nbytes >= manifest.nbytes:
        return NO_REASON
    were = f"{count_files(manifest.files)} of {manifest.nbytes:,} bytes"
    return f"{were} were written, and {count_files(files)} of {nbytes:,} bytes found"


def _measure(fs: fsspec.AbstractFileSystem, folder: str) -> tuple[int, int]:
    """Return the number and the size of the files that are neither hidden nor the manifest."""
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
    settings: dict[str, Any],
) -> Outcome:
    """Make a step's folder, or read its manifest if there is no reason to make it.

    Parts that a stopped run has left are used if it also had these settings.
    """
    fs, root = fsspec.url_to_fs(output, **storage_options)
    folder = f"{root}/{step.name}"
    if reason == NO_REASON:
        kept = _read_manifest(fs, folder, step.contents)
        if kept is None:
            raise DataNotFoundError(f"{folder} is gone since the run began.")
        return Outcome(kept, reason)
    start = time.perf_counter()
    tokens = {name: needs[name].token for name in step.needs}
    options = {option_of(name): value for name, value in (step.parameters | settings).items()}
    frame = None if step.plan is None else step.plan()
    with staged_folder(
        f"{output}/{step.name}",
        contents=step.contents,
        overwrite=True,
        storage_options=storage_options,
        work=None if frame is None else options | tokens | work_of(frame),
        anew=not step.costly or reason == ASKED_FOR,
    ) as staged:
        counts = step.make(staged, frame)
        seconds = time.perf_counter() - start
        _, path = fsspec.url_to_fs(staged, **storage_options)
        files, nbytes = _measure(fs, path)
        manifest = Manifest(
            step.name, secrets.token_hex(8), step.parameters, tokens, counts, seconds, files, nbytes, step.source
        )
        # The files of a frame lie in the folder itself, and are tables of one schema.
        write_note(fs, f"{path}/{MANIFEST if step.plan is None else TABLE_MANIFEST}", asdict(manifest))
    return Outcome(manifest, reason)


@contextmanager
def folder_of_steps(steps: Sequence[Step], output: str, storage_options: Mapping[str, Any]) -> Iterator[None]:
    """Keep other runs from the folder of all steps. It is made, and removed if nothing is in it in the end."""
    fs, root = fsspec.url_to_fs(output, **storage_options)
    refuse_file(fs, root)
    try:
        with only_run(fs, f"{root}/{LOCK}", root):
            for step in steps:
                restore(fs, f"{root}/{step.name}")
            yield
    finally:
        if is_local(fs):
            with suppress(OSError):
                fs.rmdir(root)


def _read_manifest(fs: fsspec.AbstractFileSystem, folder: str, contents: Contents) -> Manifest | None:
    """Return the manifest of a step, or None if its folder is empty or unfinished, or was made by another command."""
    names = _names(fs, folder)
    if UNFINISHED in names:
        return None
    found = [name for name in MANIFESTS if name in names]
    if not found and not contents.strangers(fs, folder, names):
        return None
    if not found:
        raise OutputExistsError(
            f"{folder!r} was not made by 'run': it holds {count_files(len(names))}, as {some(names, 3)}. Name another "
            "OUTPUT."
        )
    try:
        return Manifest(**read_note(fs, f"{folder}/{found[0]}"))
    except UNREADABLE as error:
        raise OutputExistsError(
            f"{folder!r} was not made by 'run', or not by this version: its {found[0]} cannot be read. "
            "Remove it yourself, or name another OUTPUT."
        ) from error
