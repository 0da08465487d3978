"""What can be done before a deadline, with a few slots: the most valuable first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import msgspec


class Job(msgspec.Struct, frozen=True):
    """Something that takes `seconds` of a slot and is worth `value` if it is over in time."""

    name: str
    seconds: float
    value: float


def in_time(jobs: Sequence[Job], slots: Sequence[float], seconds: float) -> list[str]:
    """The jobs that can be over within `seconds`, in the order to begin them: the most valuable first.

    `slots`: seconds until each is free. Of two ways to choose, by value and by value per second, it is the one that
    saves more.
    """
    by_value = _fill(sorted(jobs, key=lambda job: (-job.value, job.seconds, job.name)), slots, seconds)
    dense = sorted(jobs, key=lambda job: (-job.value / max(job.seconds, 1e-9), job.name))
    by_density = _fill(dense, slots, seconds)
    best = max(by_value, by_density, key=lambda chosen: sum(job.value for job in chosen))
    ordered = sorted(best, key=lambda job: (-job.value, job.seconds, job.name))
    # The order that filled the slots is the one known to fit; the other is taken where it fits too.
    return [job.name for job in (ordered if len(_fill(ordered, slots, seconds)) == len(ordered) else best)]


def _fill(jobs: Sequence[Job], slots: Sequence[float], seconds: float) -> list[Job]:
    free = list(slots)
    heapq.heapify(free)
    chosen = []
    for job in jobs:
        if free and free[0] + job.seconds <= seconds:
            heapq.heapreplace(free, free[0] + job.seconds)
            chosen.append(job)
    return chosen
