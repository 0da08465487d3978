"""What the destinations of all engines have in common: a copy that is being made, and must not be left behind."""

from __future__ import annotations

import abc
import logging
from types import TracebackType
from typing import Self

from migrator.engine.base import Phase, Sandbox
from migrator.engine.phases import Phases
from migrator.linux.cgroup import Cgroup

log = logging.getLogger("migrator.engine")


class UnfinishedCopy(abc.ABC):
    """At the end of its block it is discarded, unless it is held by then, or runs."""

    def __init__(self) -> None:
        self._sandbox: Sandbox | None = None
        self._cgroup: Cgroup | None = None
        self._phases = Phases()
        self._held = self._done = False

    @property
    def phases(self) -> list[Phase]:
        return self._phases

    @property
    def cgroup(self) -> str:
        return str(self._cgroup.path) if self._cgroup is not None else ""

    @abc.abstractmethod
    def discard(self) -> None:
        """Kill the copy; nothing of it is left. Can be called at any time before it runs, twice too."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._held or self._done:
            return
        try:
            self.discard()
        except Exception as error:
            if value is None:
                raise
            log.warning("discarding what was built: %s", error)  # and not in place of the first cause
