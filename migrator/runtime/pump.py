"""Moving a stream between a descriptor and a link, in the background."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from typing import Any


class Pump:
    """`link.pump_in` or `link.pump_out` at work on a descriptor that it owns.

    However it ends, the descriptor is closed, so that an engine on its other end never waits for ever: also if
    it is stopped before it had its first turn, when nobody has taken the descriptor over yet.
    """

    def __init__(self, pump: Callable[[int], Coroutine[Any, Any, int]], fd: int) -> None:
        self._fd = fd
        self.task = asyncio.create_task(self._run(pump), name="stream")

    async def _run(self, pump: Callable[[int], Coroutine[Any, Any, int]]) -> int:
        fd, self._fd = self._fd, -1
        return await pump(fd)

    @property
    def done(self) -> bool:
        return self.task.done()

    @property
    def error(self) -> BaseException | None:
        """Why it failed; None if it did not, or is still at work."""
        return self.task.exception() if self.task.done() and not self.task.cancelled() else None

    async def stop(self) -> None:
        """End it where it is. Can be called twice."""
        self.task.cancel()
        with contextlib.suppress(BaseException):
            await self.task
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
