"""Signals: the first one asks for an abort, which the API does in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from migrator.errors import MigratorError

ABORTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FORWARDED = (*ABORTING, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

T = TypeVar("T")


class Interrupted(MigratorError):
    """A signal asked for the end, and it was not too late for that."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Signals:
    """What came while a coroutine ran, and cancelled it. Those that were ignored before, as by nohup, stay so."""

    def __init__(self) -> None:
        self.received = 0

    def cancel(self, task: asyncio.Task[Any], numbers: Iterable[int]) -> None:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, self._cancel, task, number)

    def _cancel(self, task: asyncio.Task[Any], number: int) -> None:
        self.received = self.received or number
        task.cancel()

    def forward(self, pid: int) -> None:
        """From here on they are meant for that process; so is one that came too late to be an abort."""
        for number in FORWARDED:
            asyncio.get_running_loop().add_signal_handler(number, _send, pid, number)
        if self.received:
            _send(pid, self.received)


def run(work: Callable[[Signals], Coroutine[Any, Any, T]], *, on: Iterable[int] = ABORTING) -> T:
    """Run a coroutine to its end. Raises Interrupted if a signal of `on` has cancelled it."""
    signals = Signals()

    async def main() -> T:
        task = asyncio.ensure_future(work(signals))
        signals.cancel(task, on)
        return await task

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise Interrupted(signals.received or signal.SIGINT) from None


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
