"""A short run of each fuzzer, always from the same seed: what fails here fails again. `make fuzz` draws another."""

from __future__ import annotations

import os

import pytest

from tests.fuzz.__main__ import KINDS

SECONDS = float(os.environ.get("MIGRATOR_FUZZ_SECONDS", "8"))
SEED = 20261126


@pytest.mark.root
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found(kind: str) -> None:
    counts = KINDS[kind](SECONDS, SEED)
    assert counts.found == []
    assert counts.inputs >= 10
