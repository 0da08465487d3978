"""What a link is carried by: writing to it, its end, and everybody who waits for either.

`Connection` wraps anything that looks like an asyncio transport. It fails once: the first error
counts, whoever waits is woken, and from then on every call raises that error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from migrator.errors import TransportError

log = logging.getLogger("migrator.transport")

CLOSE_SECONDS = 2.0


class Wire(Protocol):
    """What a link writes to: asyncio's `Transport` and asyncssh's `SSHChannel` both are one."""

    def write(self, data: bytes) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


@dataclass(slots=True)
class Counters:
    """What went over a link since it began.

    wire_*:     bytes on the wire, of all kinds, framing included, encryption not
    stream_*:   bytes of the stream, before compression
    messages_*: control messages, by number
    packets_*:  captured packets, by number
    """

    wire_sent: int = 0
    wire_received: int = 0
    stream_sent: int = 0
    stream_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    packets_sent: int = 0
    packets_received: int = 0


class Connection:
    """See the module. `peer` names the other host in errors and logs."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.counters = Counters()
        self.explain: Callable[[], str] = lambda: ""  # what the peer's program wrote on its standard error
        self.reading_paused = False
        self.lost = asyncio.Event()
        self._wire: Wire | None = None
        self._error: TransportError | None = None
        self._closing = False
        self._watchers: set[Callable[[TransportError], None]] = set()
        self._writable = self.event()
        self._writable.set()

    @property
    def alive(self) -> bool:
        return self._error is None and not self._closing

    @property
    def failed(self) -> bool:
        return self._error is not None

    @property
    def writable(self) -> bool:
        """Whether little enough is unsent."""
        return self._writable.is_set()

    def carry(self, wire: Wire) -> None:
        """From now on write to `wire`."""
        self._wire = wire

    def check(self) -> None:
        """Raises the error that the connection has failed with, if it has."""
        if self._error is not None:
            raise self._error

    def write(self, data: bytes) -> None:
        """Write at once, however much is unsent. Raises `TransportError`."""
        assert self._wire is not None
        try:
            self._wire.write(data)
        except (OSError, RuntimeError) as error:
            self.fail(TransportError(f"the connection to {self.peer} is closed: {error}"))
            self.check()
        self.counters.wire_sent += len(data)

    async def wait_writable(self) -> None:
        if not self._writable.is_set():
            await self._writable.wait()
            self.check()

    def pause_writing(self) -> None:
        if self._error is None:
            self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def pause_reading(self) -> None:
        if not self.reading_paused and self._wire is not None:
            self.reading_paused = True
            self._wire.pause_reading()

    def resume_reading(self) -> None:
        if self.reading_paused and self._wire is not None:
            self.reading_paused = False
            if self._error is None:
                self._wire.resume_reading()

    def watch(self, watcher: Callable[[TransportError], None]) -> None:
        """Have `watcher` called when the connection fails."""
        self._watchers.add(watcher)

    def unwatch(self, watcher: Callable[[TransportError], None]) -> None:
        self._watchers.discard(watcher)

    def event(self) -> asyncio.Event:
        """An event that is also set when the connection fails; who waits for it calls `check()` then."""
        event = asyncio.Event()
        self.watch(lambda _: event.set())
        return event

    def fail(self, error: TransportError) -> None:
        """End the connection with this error, if none came before. Everybody who waits gets it."""
        if self._error is not None:
            return
        self._error = error
        log.debug("link to %s: %s", self.peer, error)
        for watcher in list(self._watchers):
            watcher(error)
        if self._wire is not None and not self._closing:
            self._wire.abort()

    def ended(self, exc: Exception | None) -> None:
        """The other side has closed it, or it broke."""
        self.lost.set()
        why = f": {exc}" if exc else ""
        words = self.explain()
        self.fail(TransportError(f"{self.peer} closed the connection{why}" + (f": {words}" if words else "")))

    async def close(self) -> None:
        """Send what is unsent and close. Does not raise, and takes `CLOSE_SECONDS` at most."""
        self._closing = True
        if self._wire is not None and self._error is None:
            self._wire.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self.lost.wait()
            if not self.lost.is_set():
                self._wire.abort()
        self.fail(TransportError(f"the link to {self.peer} is closed"))
