"""Locks: one run at a time works on an output. A file names the process, and is void once that process is dead."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import datetime

import fsspec
import psutil

from dask_semdedup.errors import OutputExistsError
from dask_semdedup.io.listing import is_local
from dask_semdedup.io.write import writing

__all__ = ["only_run"]

# Seconds by which the start of a process may differ from what it was: the system's clock may have been set.
CLOCK_ERROR = 10


@dataclass(frozen=True)
class Holder:
    """The process that a file names, and when it began to work there."""

    host: str
    pid: int
    started: float
    since: str

    @classmethod
    def of_this_process(cls) -> Holder:
        started = psutil.Process().create_time()
        return cls(socket.gethostname(), os.getpid(), started, datetime.now().isoformat(" ", "seconds"))

    def is_dead(self) -> bool:
        """Return whether the process has ended. A process on another host is assumed to be alive."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            is_other = abs(process.create_time() - self.started) > CLOCK_ERROR
            return is_other or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


@contextmanager
def only_run(fs: fsspec.AbstractFileSystem, path: str, output: str) -> Iterator[None]:
    """Hold a file, which names this process, while the block runs.

    On a local disk, the system prevents two processes from holding it. Object storage has no such guarantee: two that
    begin within a second may both hold it.

    Parameters
    ----------
    fs : fsspec file system
    path : str
        The file. Its folder is created if it is missing.
    output : str
        Output of the process, for the message.

    Raises
    ------
    OutputExistsError
        If another process holds it. The message names that process.
    """
    with _flock(path, output) if is_local(fs) else nullcontext():
        holder = _read(fs, path)
        if holder is not None and not holder.is_dead():
            raise _held(holder, path, output)
        with writing(path):
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(path, json.dumps(asdict(Holder.of_this_process())).encode())
        try:
            yield
        finally:
            with suppress(OSError):
                fs.rm_file(path)


@contextmanager
def _flock(path: str, output: str) -> Iterator[None]:
    """Lock a local file. The system unlocks it when the process ends, for any reason."""
    while True:
        with writing(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # A run that has ended removed the folder just now.
                continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise _held(_read(fsspec.filesystem("file"), path), path, output) from None
        except OSError:
            pass  # A file system that has no such locks: what the file says must do.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file)):
                break
        os.close(file)  # It was removed between the two calls.
    try:
        yield
    finally:
        os.close(file)


def _read(fs: fsspec.AbstractFileSystem, path: str) -> Holder | None:
    """Return the process that a file names, or None if there is no file or no name in it yet."""
    try:
        return Holder(**json.loads(fs.cat_file(path)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _held(holder: Holder | None, path: str, output: str) -> OutputExistsError:
    who = f"process {holder.pid} on {holder.host}, since {holder.since}" if holder else "another process"
    return OutputExistsError(
        f"Output {output!r} is being written by {who}. Wait for it, or name another folder. If that process is dead, "
        f"remove {path}.",
        parameters=["output_path"],
    )
