"""What pytest collects for doctests beside the tests."""

from __future__ import annotations

from importlib.util import find_spec

# Triton comes with torch's CUDA builds only, and its kernels cannot be imported without it.
collect_ignore = [] if find_spec("triton") else ["dask_semdedup/search/triton_engine.py"]
