"""The other host of a migration, as its source talks to it: over one link now, over another after a break."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from migrator.errors import MigratorError, TransportError
from migrator.protocol import messages as m
from migrator.session.interfaces import Link

Reconnect = Callable[[], Awaitable[Link]]

_LONGEST_PAUSE = 5.0  # seconds


class Peer:
    """Sends messages, and hands over those that come.

    heard:   called with each message; a MessageError from it counts as broken
    broken:  called once per link when it ends: with a MessageError for a peer that does not keep to the
             protocol, with another error where the link is gone
    """

    def __init__(
        self,
        link: Link,
        reconnect: Reconnect | None,
        name: str,
        *,
        heard: Callable[[m.AnyMessage], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        self.link = link
        self._reconnect = reconnect
        self._hello = m.Hello([m.VERSION], "migrator", name)
        self._heard = heard
        self._broken = broken
        self._listener: asyncio.Task[None] | None = None
        self._lost_at = 0.0
        self._closing: set[asyncio.Task[None]] = set()

    async def send(self, message: m.AnyMessage) -> None:
        """Raises TransportError."""
        await self.link.send(m.encode(message))

    async def send_within_cap(self, message: m.AnyMessage) -> float:
        """As send(), once the cap of the link lets it; the seconds that it waited for that."""
        data = m.encode(message)
        waited = await self.link.acquire_bandwidth(len(data))
        await self.link.send(data)
        return waited

    async def greet(self) -> None:
        """The first message on every link."""
        await self.send(self._hello)

    def listen(self) -> None:
        """Begin to hand over what comes over the link."""
        if self._listener is not None:
            self._listener.cancel()
        self._listener = asyncio.create_task(self._listen(self.link), name=f"messages of {self.link.peer}")

    async def _listen(self, link: Link) -> None:
        try:
            while True:
                self._heard(m.decode(await link.receive()))
        except (MigratorError, OSError) as error:
            if link is self.link:
                self._broken(error)

    async def reach(self, seconds: float, waiting: Callable[[BaseException], None]) -> BaseException | None:
        """Drop the link and make a new one, trying for some seconds from the first call on. None once it stands and
        is listened to; else the last error. `waiting` is told of each attempt that failed."""
        self._lost_at = self._lost_at or time.monotonic()
        closing = asyncio.create_task(self.link.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        pause, last = 0.1, None
        while time.monotonic() < self._lost_at + seconds and self._reconnect is not None:
            try:
                link = await self._reconnect()
                await link.send(m.encode(self._hello))
            except (MigratorError, OSError) as error:
                last = error
                waiting(error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                self.link = link
                self.listen()
                return None
        return last or TransportError(f"there is no way to reach {self.link.peer} again")

    async def close(self) -> None:
        for task in [self._listener, *self._closing]:
            if task is not None:
                task.cancel()
                with contextlib.suppress(BaseException):
                    await task
        await self.link.close()
