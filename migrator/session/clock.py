"""How far the destination's clock is ahead, asked for over the link."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from migrator import model
from migrator.errors import MigratorError
from migrator.protocol import messages as m

_SAMPLES = 5
_LIMIT = 0.5  # seconds


class PeerClock:
    """`offset` is what is known so far."""

    def __init__(self, send: Callable[[m.Clock], Awaitable[None]]) -> None:
        self.offset = model.ClockOffset()
        self._send = send
        self._answered = asyncio.Event()

    async def ask(self) -> None:
        """Ask, and do not wait for the answer. Raises TransportError."""
        await self._send(m.Clock(time.monotonic_ns()))

    def heard(self, message: m.Clock) -> None:
        self.offset.sample(message.asked, message.answered, time.monotonic_ns())
        self._answered.set()

    async def sample(self) -> None:
        """Ask a few times, when both hosts are quiet. Takes at most half a second; a failure is no matter."""
        with contextlib.suppress(TimeoutError, MigratorError, OSError):
            async with asyncio.timeout(_LIMIT):
                for _ in range(_SAMPLES):
                    self._answered.clear()
                    await self.ask()
                    await self._answered.wait()
