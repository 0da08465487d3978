"""Making a migration fail at a named place, from a test.

In another process, by its environment: `MIGRATOR_FAULT=point:action`, see `migrator.runtime.fault_points`. In this
one:

    with faulty("source.frozen", "raise"):
        ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from migrator.runtime.fault_points import ACTIONS, EXIT_CODE, POINTS, FaultError, armed, fault, parse

__all__ = ["ACTIONS", "EXIT_CODE", "POINTS", "FaultError", "environment", "fault", "faulty"]


@contextlib.contextmanager
def faulty(point: str, action: str | Callable[[], None] = "raise") -> Iterator[None]:
    """Within the block, passing `point` does `action`: one of `ACTIONS`, or whatever is to be called."""
    parse(point)
    before = armed.point, armed.action
    armed.point = point
    armed.action = ACTIONS[action] if isinstance(action, str) else action
    try:
        yield
    finally:
        armed.point, armed.action = before


def environment(point: str, action: str = "exit") -> dict[str, str]:
    """What to add to the environment of a program that is to fail there."""
    parse(f"{point}:{action}")
    return {"MIGRATOR_FAULT": f"{point}:{action}"}
