"""The network of a copy that is about to run: its port, its new place, the frames that came to the old one.

All of it on a thread of its own: frames must not wait for the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable

from migrator.engine.base import Phase
from migrator.errors import MigratorError
from migrator.protocol.messages import OrphanedConnection
from migrator.runtime.thread import OwnThread
from migrator.session.interfaces import Link, NetworkArrival

log = logging.getLogger("migrator.session")

ANNOUNCE_AGAIN = (0.05, 0.15, 0.5)  # seconds after the announcement before: such frames get lost

_DIVERT_EVERY = 0.002
_LISTEN_EVERY = 0.003
_QUIET_SECONDS = 0.03  # after which a copy that nobody has asked anything is not listened to any more
_LISTEN_SECONDS = 0.25
_RESUMING = 1_000_000  # ns that a packet may be ahead of our word that the copy runs

Make = Callable[[], NetworkArrival | None]


class Arrival:
    """What a destination does about the network. `phases` are what it took."""

    def __init__(self, link: Link) -> None:
        self.phases: list[Phase] = []
        self.prepared = False
        self.orphans: list[OrphanedConnection] = []  # served by the source
        self._link = link
        self._thread = OwnThread("network")
        self._network: NetworkArrival | None = None
        self._lock = threading.Lock()
        self._runs = threading.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def prepare(self, make: Make) -> None:
        """Open what the switch of the network needs. May be called again, where it was too early; by any thread."""
        with self._lock:
            if self._network is None:
                network = make()
                if network is not None:
                    network.prepare()
                self._network = network
            self.prepared = True

    async def prepare_early(self, make: Make) -> None:
        """While the rounds come. It may be too early, which is no failure."""
        try:
            await self._thread.run(self.prepare, make)
        except Exception as error:
            log.debug("the network cannot be prepared yet: %s", error)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Open the port, just before the copy runs: what it says in its first instant must not be lost."""
        if self._network is not None:
            start = time.monotonic_ns()
            if self.orphans:
                self._divert(self._network)
            self._network.unlock()
            self.phases.append(Phase("open port", start, time.monotonic_ns()))
            self._thread.submit(self._greet, self._network, loop)

    def _divert(self, network: NetworkArrival) -> None:
        """It is decided that the copy runs: what fails here costs connections that were closed, no more."""
        try:
            network.divert(self.orphans)
        except (MigratorError, OSError) as error:
            log.warning("connections that stay behind cannot be served: %s", error)
            self.orphans = []

    def runs(self) -> None:
        """The copy runs, or never will: its new place may be announced."""
        self._runs.set()

    def _greet(self, network: NetworkArrival, loop: asyncio.AbstractEventLoop) -> None:
        self._runs.wait()
        start = time.monotonic_ns()
        with contextlib.suppress(OSError):
            network.announce()
        self.phases.append(Phase("announce", start, time.monotonic_ns()))
        loop.call_soon_threadsafe(self._begin, network)

    def _begin(self, network: NetworkArrival) -> None:
        self._tasks = [asyncio.create_task(self._announce(network)), asyncio.create_task(self._take_frames(network))]
        if self.orphans:
            self._tasks.append(asyncio.create_task(self._send_frames(network)))

    async def _take_frames(self, network: NetworkArrival) -> None:
        with contextlib.suppress(MigratorError, OSError):
            while True:
                frames = await self._link.receive_packets()
                leaving = [frame for frame in frames if network.is_outgoing(frame)] if self.orphans else []
                if leaving:
                    await self._thread.run(network.emit, leaving)
                    frames = [frame for frame in frames if not network.is_outgoing(frame)]
                if frames:
                    await self._thread.run(network.inject, frames)

    async def _send_frames(self, network: NetworkArrival) -> None:
        """What comes for connections that the source serves."""
        with contextlib.suppress(MigratorError, OSError):
            while True:
                frames = await self._thread.run(network.diverted)
                if frames:
                    await self._link.send_packets(frames)
                await asyncio.sleep(_DIVERT_EVERY)

    async def _announce(self, network: NetworkArrival) -> None:
        with contextlib.suppress(OSError):
            for pause in ANNOUNCE_AGAIN:
                await asyncio.sleep(pause)
                await self._thread.run(network.announce)

    async def first_packet(self, resumed_at: int) -> int:
        """When the copy was heard again, in ns of CLOCK_MONOTONIC; 0 if it said nothing within a quarter of a second
        of `resumed_at`, or soon where nobody asked it anything, or if it has no network."""
        network = self._network
        while network is not None:
            passed = (time.monotonic_ns() - resumed_at) / 1e9
            if at := await self._thread.run(network.heard, resumed_at - _RESUMING):
                return at
            if passed > (_LISTEN_SECONDS if network.asked else _QUIET_SECONDS):
                break
            await asyncio.sleep(_LISTEN_EVERY)
        return 0

    async def announced(self) -> None:
        """Wait for the last announcement, if any was begun."""
        if self._tasks:
            await asyncio.wait(self._tasks[:1])

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(BaseException):
                await task
        if self._network is not None:
            await self._thread.run(self._network.close)
        await self._thread.close()
