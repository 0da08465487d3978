"""Whether the peer is alive, and how far away it is: pings and their answers."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from migrator.errors import TransportError
from transport.connection import Connection
from transport.flow import RoundTrip
from transport.frame import Buffer, Channel, PingFlags, decode_u64, encode_frame, encode_u64


class Keepalive:
    """Pings every `every` seconds; after `dead_after` seconds without a sign of life the connection fails."""

    def __init__(self, connection: Connection, every: float, dead_after: float) -> None:
        self.round_trip = RoundTrip()
        self._connection = connection
        self._every = every
        self._dead_after = dead_after
        self._heard_at = time.monotonic()
        self._unanswered: deque[int] = deque()  # when pings were sent; answers come in order
        self._waiters: deque[asyncio.Future[float]] = deque()
        self._task: asyncio.Task[None] | None = None
        connection.watch(self._stop)

    def start(self) -> None:
        self._heard_at = time.monotonic()
        name = f"keepalive {self._connection.peer}"
        self._task = asyncio.get_running_loop().create_task(self._run(), name=name)

    def heard(self) -> None:
        """Anything came from the peer."""
        self._heard_at = time.monotonic()

    def send_ping(self) -> None:
        now = time.monotonic_ns()
        self._unanswered.append(now)
        self._connection.write(encode_u64(Channel.PING, now))

    async def ping(self, timeout: float) -> float:
        """Measure the round trip now, in seconds. Raises `TransportError` if there is no answer."""
        self._connection.check()
        waiter: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self.send_ping()
        try:
            async with asyncio.timeout(timeout):
                return await waiter
        except TimeoutError:
            raise TransportError(f"no answer from {self._connection.peer} within {timeout:g} s") from None

    def received(self, flags: int, payload: Buffer) -> None:
        """A PING frame: a question is answered, an answer is measured."""
        if not flags & PingFlags.PONG:
            if self._connection.writable:  # else the peer asks without reading what we answer
                self._connection.write(encode_frame(Channel.PING, payload, PingFlags.PONG))
            return
        sent = decode_u64(payload)
        while self._unanswered and self._unanswered[0] < sent:
            self._unanswered.popleft()
        if not self._unanswered or self._unanswered.popleft() != sent:
            raise TransportError("answer to a ping that was never sent")
        elapsed = (time.monotonic_ns() - sent) / 1e9
        self.round_trip.add(elapsed)
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(elapsed)

    async def _run(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(self._every)
            now = time.monotonic()
            if now - before > self._every + 1.0 or self._connection.reading_paused:
                # We were the ones who slept (or do not read): that says nothing about the peer.
                self._heard_at = now
            if now - self._heard_at > self._dead_after:
                peer = self._connection.peer
                self._connection.fail(TransportError(f"no sign of life from {peer} for {self._dead_after:g} s"))
                return
            try:
                self.send_ping()
            except TransportError:
                return  # the connection has failed, and everybody knows

    def _stop(self, error: TransportError) -> None:
        if self._task is not None:
            self._task.cancel()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # it may be that nobody asks any more
