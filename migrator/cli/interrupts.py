"""Signals: an abort while something is being made, held back for the moment in which it is handed over."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from migrator.errors import MigratorError

ABORTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(MigratorError):
    """A signal asked for the end. Raised wherever the program is, so that all blocks are left in order."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def aborting() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise Interrupted; not those that were ignored before, as by nohup."""
    before = {n: signal.getsignal(n) for n in ABORTING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, these signals wait: what is half handed over must not be left there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ABORTING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)
