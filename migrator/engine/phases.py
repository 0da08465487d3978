"""How long each step of an engine took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from migrator.engine.base import Phase


class Phases(list[Phase]):
    """The steps so far, in the order in which they ended."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """What is done inside is one step, also where it fails."""
        start = time.monotonic_ns()
        try:
            yield
        finally:
            self.append(Phase(name, start, time.monotonic_ns()))
