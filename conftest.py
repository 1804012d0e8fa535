"""What pytest collects for doctests beside the tests."""

from __future__ import annotations

from importlib.util import find_spec

# What can be imported only beside a library that is not always there: Triton comes with torch's CUDA builds.
NEEDS = {"dask_semdedup/curator.py": "nemo_curator", "dask_semdedup/search/triton_*.py": "triton"}
collect_ignore_glob = [pattern for pattern, library in NEEDS.items() if not find_spec(library)]
