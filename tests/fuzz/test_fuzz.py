"""A short run of each fuzzer, always from another seed; `make fuzz` takes as long as it is told."""

from __future__ import annotations

import os
import random

import pytest

from tests.fuzz.__main__ import KINDS

SECONDS = float(os.environ.get("MIGRATOR_FUZZ_SECONDS", "8"))


@pytest.mark.root
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # an action that is cancelled before it begins
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found(kind: str) -> None:
    counts = KINDS[kind](SECONDS, random.randrange(1 << 31))
    assert counts.found == []
    assert counts.inputs >= 10
