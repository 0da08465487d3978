"""Running before everybody else, for the milliseconds in which a workload stands still.

A frozen workload waits for this program; so, meanwhile, this program waits for nobody (sched(7)), and neither
do the shells of the copy, which it has do things. All threads of the process are raised, since any of them may
be the next in the chain.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator

_PRIORITY = 1  # the lowest of SCHED_FIFO: above all ordinary tasks, below everything of real time


def raise_all() -> None:
    """Put all threads of this process above ordinary tasks. Where that is not allowed, nothing changes."""
    raise_tasks(_own())


def is_raised() -> bool:
    """Whether the calling thread is; those that it makes are not by themselves."""
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside, the calling thread is above ordinary tasks; afterwards it is what it was."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    raise_tasks([0])
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, *before)


def raise_tasks(tids: Iterable[int]) -> None:
    """The same for other tasks; what they become afterwards is the caller's to set."""
    _set(tids, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, _PRIORITY)


def lower_all() -> None:
    """Ordinary tasks again."""
    _set(_own(), os.SCHED_OTHER, 0)


def _own() -> list[int]:
    """From the interpreter: a list of /proc/self/task takes longer than all the rest."""
    return [t.native_id for t in threading.enumerate() if t.native_id is not None]


def _set(tids: Iterable[int], policy: int, priority: int) -> None:
    for tid in tids:
        try:
            os.sched_setscheduler(tid, policy, os.sched_param(priority))
        except (PermissionError, ProcessLookupError):
            continue
