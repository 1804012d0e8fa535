"""``python -m dask_semdedup`` is the command ``dask-semdedup``."""

from __future__ import annotations

from dask_semdedup.cli import main

if __name__ == "__main__":
    main(prog_name="python -m dask_semdedup")
