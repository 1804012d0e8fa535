"""Settings that every test of a command shares."""

from __future__ import annotations

from typing import Any

import pytest

from dask_semdedup.report import page

# The pictures that runs have drawn so far, by name. What is in them is looked at by tests of reports.
PICTURES: dict[str, page.Picture] = {}


@pytest.fixture(autouse=True)
def workers_are_loaded(loaded_processes: Any) -> None:
    """Workers of ``--workers`` start in less than a second."""


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw each picture of the report once for all runs, since it takes longer than all other steps."""
    draw = page._picture

    def picture(name: str, draw_figure: Any) -> page.Picture:
        if name not in PICTURES:
            PICTURES[name] = draw(name, draw_figure)
        return PICTURES[name]

    monkeypatch.setattr(page, "_picture", picture)
