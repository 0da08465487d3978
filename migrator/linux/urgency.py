"""Running before everybody else, for the milliseconds in which a workload stands still.

A frozen workload waits for this program; so, meanwhile, this program waits for nobody (sched(7)). All
threads of the process are raised, since any of them may be the next in the chain.
"""

from __future__ import annotations

import os

_PRIORITY = 1  # the lowest of SCHED_FIFO: above all ordinary tasks, below everything of real time


def raise_all() -> None:
    """Put all threads of this process above ordinary tasks. Where that is not allowed, nothing changes."""
    _set(os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, _PRIORITY)


def lower_all() -> None:
    """Ordinary tasks again."""
    _set(os.SCHED_OTHER, 0)


def _set(policy: int, priority: int) -> None:
    for tid in os.listdir("/proc/self/task"):
        try:
            os.sched_setscheduler(int(tid), policy, os.sched_param(priority))
        except (PermissionError, ProcessLookupError):
            continue
