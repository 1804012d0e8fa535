"""The script ``dask-semdedup``. It is not in the package, whose import takes a second, which an interrupt may end."""

from __future__ import annotations

import os
import signal

INTERRUPTED = 130


def main() -> None:
    """Run the command. Until it has handlers of its own, an interrupt or SIGTERM ends the process with one line."""
    # Background jobs of a shell ignore interrupts.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)

    from dask_semdedup.cli import main

    main()


def _stop(*_: object) -> None:
    # No work has begun. An exception might be taken by a module that is half loaded for one of its own.
    os.write(2, b"Stopped.\n")
    os._exit(INTERRUPTED)
