"""A stage for all tests of a file: two hosts with agents."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrator.testing.stage import Stage


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage(tag="t") as made:
        yield made
