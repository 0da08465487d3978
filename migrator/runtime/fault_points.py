"""Named places where a migration can be made to fail, for tests of what happens then.

    MIGRATOR_FAULT=source.committed:exit migrator migrate ...

makes that process die as if by SIGKILL when it passes the place. Actions: `exit`, `raise` (a FaultError),
`hang` (that thread sleeps for ever). `migrator.testing.faults` sets them within one process.

Without the variable, passing such a place costs one comparison.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from migrator.errors import MigratorError, UsageError

EXIT_CODE = 86

# In the order in which a migration passes them.
POINTS = (
    "source.proposed",
    "destination.proposed",
    "source.begun",
    "destination.begun",
    "source.round",
    "source.frozen",
    "source.committing",
    "source.saved",
    "destination.built",
    "destination.held",
    "destination.ready",
    "source.ready",
    "source.committed",
    "destination.commit",
    "destination.decided",
    "destination.locked",
    "destination.resumed",
    "destination.told",
    "source.running",
    "source.away",
    "source.released",
    "source.done",
)


class FaultError(MigratorError):
    """Raised on purpose."""


def parse(setting: str) -> tuple[str, str]:
    """("point", "action") of a setting; UsageError if there is no such point or action."""
    point, _, action = setting.partition(":")
    if point not in POINTS:
        raise UsageError(f"no fault point {point!r}", hint="one of " + ", ".join(POINTS))
    if (action or "exit") not in ACTIONS:
        raise UsageError(f"no fault action {action!r}", hint="one of " + ", ".join(ACTIONS))
    return point, action or "exit"


def _raise() -> None:
    raise FaultError("a fault was asked for here")


def _hang() -> None:
    while True:
        time.sleep(3600)


ACTIONS: dict[str, Callable[[], None]] = {
    "exit": lambda: os._exit(EXIT_CODE),
    "raise": _raise,
    "hang": _hang,
}


class _Armed:
    """Which point is armed and what it does; replaced by `migrator.testing.faults`."""

    def __init__(self) -> None:
        self.point = ""
        self.action: Callable[[], None] = lambda: None
        if setting := os.environ.get("MIGRATOR_FAULT"):
            self.point, action = parse(setting)
            self.action = ACTIONS[action]


armed = _Armed()


def fault(point: str) -> None:
    """Fail here if that was asked for."""
    if armed.point == point:
        armed.action()
