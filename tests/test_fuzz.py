"""Damaged and hostile files: a clear error, or the answer that Arrow and Python's json give. See `tests.fuzz`."""

from __future__ import annotations

import os

import pytest

from tests.fuzz import case_of, fuzz, seeds

# For longer: DASK_SEMDEDUP_FUZZ_SECONDS=600, with another DASK_SEMDEDUP_FUZZ_SEED.
SECONDS = float(os.environ.get("DASK_SEMDEDUP_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("DASK_SEMDEDUP_FUZZ_SEED", "0"))


def test_damage_does_no_harm() -> None:
    counts, wrong = fuzz(SEED, SECONDS)
    assert not wrong, "\n".join(f"python -m tests.fuzz --seed {SEED} --number {n}: {why}" for n, why in wrong.items())
    assert counts["same"] > 10, "what is read must not all be refused"
    assert counts["refused"] > 50


@pytest.mark.parametrize("number", range(0, 100, 10))
def test_a_number_stands_for_one_case(number: int) -> None:
    assert case_of(SEED, number, seeds()) == case_of(SEED, number, seeds())
    assert case_of(SEED, number, seeds()) != case_of(SEED + 1, number, seeds())
