"""The phases that a session measures itself, beside those of its engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from migrator import model
from migrator.engine.base import Phase, Where
from migrator.model import OnEvent


class PhaseLog:
    """What took how long on this host. `tell` hears of each phase as it begins and ends: then only on the event
    loop; without it from any thread."""

    def __init__(self, migration: str = "", tell: OnEvent = model.nobody) -> None:
        self.phases: list[Phase] = []
        self._migration, self._tell = migration, tell

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic_ns()
        self._tell(model.PhaseStarted(self._migration, name, start))
        try:
            yield
        finally:
            phase = Phase(name, start, time.monotonic_ns(), where=Where.SOURCE)
            self.phases.append(phase)
            self._tell(model.PhaseEnded(self._migration, phase))
