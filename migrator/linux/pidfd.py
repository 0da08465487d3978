"""Waiting for the end of a process by its pidfd (pidfd_open(2))."""

from __future__ import annotations

import select


def ends(pidfd: int, seconds: float | None) -> bool:
    """Whether the process ends, or has ended, within so many seconds; None waits for as long as it takes.

    By poll(2): select(2) knows no descriptor above 1023, and an agent can have more."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
