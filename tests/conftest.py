"""Settings that every test shares."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# A deadline measures the machine, not the code; in CI the same examples are drawn every time.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


# Models come from packages: nothing may ask the Hugging Face hub for one.
os.environ["HF_HUB_OFFLINE"] = "1"

# Without a GPU, kernels run in Triton's interpreter: it wants to know before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
