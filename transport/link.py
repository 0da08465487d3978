"""One link between two hosts: messages, the stream and captured packets, side by side.

A `Link` is driven by callbacks (`data_received` and so on, as an asyncio protocol is) and
writes to anything that looks like an asyncio transport: a socket, a pair of pipes, or an
asyncssh channel. Control messages never wait for the stream's reader, because the stream
has its own credit; see `transport.frame` for the wire and `docs/protocol.md` for the whole.

Whatever the peer does, the methods here return or raise `TransportError`; once one was
raised, all others raise the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from migrator.errors import TransportError
from transport import stream
from transport.compression import BlockCompressor, CompressionStats, Packed
from transport.flow import ReceiveWindow, RoundTrip, SendWindow, TokenBucket
from transport.frame import (
    CHARGE,
    MIN_WINDOW,
    Block,
    Channel,
    CreditFlags,
    Frame,
    FrameParser,
    PingFlags,
    decode_block,
    decode_packets,
    decode_u64,
    encode_block,
    encode_end,
    encode_frame,
    encode_packets,
    encode_preface,
    encode_u64,
)

log = logging.getLogger("migrator.transport")

WINDOW = 8 << 20
INBOX = 4 << 20  # bytes of messages and packets not yet received at which we stop reading
CLOSE_SECONDS = 2.0
LITTLE = 64 << 10  # bytes of a block whose credit can wait: what comes behind it may be urgent
LITTLE_SECONDS = 0.03


class Wire(Protocol):
    """What a link writes to: asyncio's `Transport` and asyncssh's `SSHChannel` both are one."""

    def write(self, data: bytes) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


@dataclass(slots=True)
class Counters:
    """Bytes on the wire, framing included, encryption not; bytes of the stream before compression; messages and
    blocks by number."""

    wire_sent: int = 0
    wire_received: int = 0
    stream_sent: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    packets_sent: int = 0
    packets_received: int = 0


class Link:
    """See the module. `peer` names the other host in errors and logs.

    window:     bytes of stream the peer may have in flight towards us
    level:      zstd level of the stream, 0 for none, None to choose by measurement
    keepalive:  seconds between pings
    dead_after: seconds without a sign of life after which the link fails
    """

    def __init__(
        self,
        peer: str,
        *,
        window: int = WINDOW,
        level: int | None = None,
        keepalive: float = 1.0,
        dead_after: float = 15.0,
    ) -> None:
        self.peer = peer
        self.key = ""  # the fingerprint that the peer has logged in with, where we know
        self.counters = Counters()
        self.watchers: set[Callable[[BaseException], None]] = set()
        self.explain: Callable[[], str] = lambda: ""  # the peer's last words, for the error message
        self._cleanups: list[Callable[[], Awaitable[None]]] = []
        self._loop = asyncio.get_running_loop()
        self._wire: Wire | None = None
        self._error: TransportError | None = None
        self._closing = False
        self._parser = FrameParser()
        self._ready = asyncio.Event()
        self._lost = asyncio.Event()
        self._messages: deque[bytes] = deque()
        self._message_there = asyncio.Event()
        self._packets: deque[list[bytes]] = deque()
        self._packets_there = asyncio.Event()
        self._inbox = 0
        self._reading_paused = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._blocks = stream.StreamQueue()
        self._receive_window = ReceiveWindow(max(window, MIN_WINDOW))
        self._granting: asyncio.TimerHandle | None = None
        self._send_window = SendWindow(0)
        self._room = asyncio.Event()
        self._sequence = 0
        self._compressor = BlockCompressor(level)
        self._bucket: TokenBucket | None = None
        self._uncapped = asyncio.Event()
        self._round_trip = RoundTrip()
        self._pongs: deque[asyncio.Future[float]] = deque()
        self._last_sign = time.monotonic()
        self._keepalive_every = keepalive
        self._dead_after = dead_after
        self._keepalive: asyncio.Task[None] | None = None

    # Messages

    async def send(self, message: bytes) -> None:
        """Send one control message of at most 1 MiB. Written at once; waits if much is unsent."""
        self._check()
        self._write(encode_frame(Channel.CONTROL, message))
        self.counters.messages_sent += 1
        await self._wait_writable()

    async def receive(self, timeout: float | None = None) -> bytes:
        """The next control message. What arrived before the link failed can still be received.

        Raises `TransportError` at the end of the connection, or after `timeout` seconds.
        """
        await self._wait_for(self._messages, self._message_there, timeout)
        message = self._messages.popleft()
        self._take_from_inbox(len(message))
        return message

    # Captured packets

    async def send_packets(self, packets: list[bytes]) -> None:
        """Send captured network packets, in order. Like `send` in all else."""
        self._check()
        for frame in encode_packets(packets):
            self._write(frame)
        self.counters.packets_sent += len(packets)
        await self._wait_writable()

    async def receive_packets(self, timeout: float | None = None) -> list[bytes]:
        """The packets of the next frame. Raises as `receive` does."""
        await self._wait_for(self._packets, self._packets_there, timeout)
        packets = self._packets.popleft()
        self._take_from_inbox(_weight(packets))
        return packets

    # The stream

    async def pump_in(self, fd: int) -> int:
        """Send what `fd` gives, to its end, as one stream. Owns `fd` and closes it. See `stream.pump_in`."""
        return await stream.pump_in(self, fd, self._compressor)

    async def pump_out(self, fd: int) -> int:
        """Write one received stream to `fd`. Owns `fd` and closes it. See `stream.pump_out`."""
        return await stream.pump_out(self, fd)

    async def acquire_bandwidth(self, size: int) -> float:
        """Wait until the cap lets `size` bytes be sent, and count them; the seconds waited.

        Blocks of the stream wait by themselves; this is for what is sent in bulk as messages."""
        began = time.monotonic()
        while self._bucket is not None and (delay := self._bucket.delay(time.monotonic())) > 0:
            await self._capped(delay)
            self._check()
        if self._bucket is not None:
            self._bucket.take(size)
        return time.monotonic() - began

    async def _capped(self, delay: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._uncapped.wait()

    def set_cap(self, bandwidth: float) -> None:
        """From now on send at most `bandwidth` wire bytes/s of stream, and of what asks by acquire_bandwidth()."""
        self._bucket = TokenBucket(bandwidth)
        self._uncapped.clear()

    def uncap(self) -> None:
        """Lift the cap at once, also for a block that is waiting for it: the workload is frozen."""
        self._bucket = None
        self._uncapped.set()

    @property
    def cap(self) -> float:
        """The cap in bytes/s, 0.0 where there is none."""
        return self._bucket.rate if self._bucket else 0.0

    # What was measured

    @property
    def rtt(self) -> float:
        """The round trip in seconds, the least ever seen; 0.0 before the first sample."""
        return self._round_trip.least

    @property
    def throughput(self) -> float:
        """Wire bytes/s the peer takes of the stream; a lower bound as long as the link was never
        the bottleneck, and 0.0 before the first sample."""
        return self._send_window.estimate

    @property
    def capacity(self) -> float:
        """Wire bytes/s of the link while it is the bottleneck; 0.0 while it is not known to be."""
        return self._send_window.capacity

    @property
    def pace(self) -> float:
        """Wire bytes/s that are to be had under pressure, the cap included; 0.0 if not known."""
        rate = self.throughput if self._send_window.measured else 0.0
        return min(filter(None, (rate, self.cap)), default=0.0)

    @property
    def stream_throughput(self) -> float:
        """Bytes/s of the stream before compression, at `throughput` and the ratio so far."""
        return self.throughput * self.compression.ratio

    @property
    def compression(self) -> CompressionStats:
        """Of the stream we sent."""
        return self._compressor.stats

    @property
    def compression_ratio(self) -> float:
        """Bytes of the stream before compression for each one after it; 1.0 where nothing was sent."""
        return self._compressor.stats.ratio

    @property
    def in_flight(self) -> int:
        """Wire bytes of the stream that were sent and that the peer has not acknowledged yet."""
        return self._send_window.in_flight

    @property
    def level(self) -> int:
        """The zstd level now in use, 0 for none."""
        return self._compressor.level

    async def ping(self, timeout: float = 5.0) -> float:
        """Measure the round trip now, in seconds."""
        self._check()
        waiter: asyncio.Future[float] = self._loop.create_future()
        self._pongs.append(waiter)
        self._send_ping()
        try:
            async with asyncio.timeout(timeout):
                return await waiter
        except TimeoutError:
            raise TransportError(f"no answer from {self.peer} within {timeout:g} s") from None

    # Life

    async def established(self, timeout: float = 10.0) -> None:
        """Wait until the peer has introduced itself. Raises `TransportError` if it does not."""
        try:
            async with asyncio.timeout(timeout):
                await self._ready.wait()
        except TimeoutError:
            self.fail(TransportError(f"{self.peer} did not introduce itself within {timeout:g} s"))
        self._check()

    def on_close(self, cleanup: Callable[[], Awaitable[None]]) -> None:
        """Have `cleanup` awaited at the end of `close()`."""
        self._cleanups.append(cleanup)

    @property
    def alive(self) -> bool:
        return self._error is None and not self._closing

    async def wait_closed(self) -> None:
        """Wait until the connection is gone, for whatever reason."""
        await self._lost.wait()

    async def close(self) -> None:
        """Send what is unsent and close. Never raises for the peer's sake, never takes long."""
        self._closing = True
        if self._wire is not None and self._error is None:
            self._wire.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._lost.wait()
            if not self._lost.is_set():
                self._wire.abort()
        self.fail(TransportError(f"the link to {self.peer} is closed"))
        cleanups, self._cleanups = self._cleanups, []
        for cleanup in reversed(cleanups):
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await cleanup()

    async def __aenter__(self) -> Link:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def fail(self, error: TransportError) -> None:
        """End the link with this error; the first one counts. Everybody who waits gets it."""
        if self._error is not None:
            return
        self._error = error
        log.debug("link to %s: %s", self.peer, error)
        if self._keepalive is not None:
            self._keepalive.cancel()
        if self._granting is not None:
            self._granting.cancel()
        for event in (
            self._ready,
            self._message_there,
            self._packets_there,
            self._blocks.arrived,
            self._room,
            self._uncapped,
            self._writable,
        ):
            event.set()
        for pong in self._pongs:
            if not pong.done():
                pong.set_exception(error)
                pong.exception()  # it may be that nobody asks any more
        for watcher in list(self.watchers):
            watcher(error)
        if self._wire is not None and not self._closing:
            self._wire.abort()

    # Callbacks of the wire

    def connection_made(self, wire: Wire) -> None:
        self._wire = wire
        self._last_sign = time.monotonic()
        self._write(encode_preface(self._receive_window.window))
        self._keepalive = self._loop.create_task(self._keep_alive(), name=f"keepalive {self.peer}")

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        self._last_sign = time.monotonic()
        self.counters.wire_received += len(data)
        try:
            for frame in self._parser.feed(data):
                if not self._ready.is_set():
                    self._introduced()
                self._dispatch(frame)
            if not self._ready.is_set() and self._parser.preface is not None:
                self._introduced()
        except TransportError as error:
            self.fail(TransportError(f"{self.peer}: {error}{self._said()}", hint=error.hint))

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set()
        why = f": {exc}" if exc else ""
        words = self.explain()
        said = f": {words}" if words else ""
        self.fail(TransportError(f"{self.peer} closed the connection{why}{said}"))

    def pause_writing(self) -> None:
        if self._error is None:
            self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # For `stream`

    def try_send_block(self, packed: Packed) -> bool:
        """Send a block if that needs no wait at all."""
        self._check()
        now = time.monotonic()
        size = stream.charge(len(packed.data))
        if not self._ready.is_set() or not self._writable.is_set():
            return False
        if self._bucket is not None and self._bucket.delay(now) > 0:
            return False
        if not self._send_window.has_room(size, self.rtt, now):
            return False
        if self._bucket is not None:
            self._bucket.take(size)
        self._send_window.sent(size, now)
        self.counters.stream_sent += packed.raw_size
        self._write(encode_block(self._sequence, packed.raw_size, packed.data, compressed=packed.compressed))
        self._sequence += 1
        return True

    async def send_block(self, packed: Packed) -> None:
        """Send a block as soon as cap, credit and the wire allow."""
        size = stream.charge(len(packed.data))
        while not self.try_send_block(packed):
            if not self._ready.is_set():
                await self._ready.wait()
            elif not self._writable.is_set():
                await self._writable.wait()
            elif self._bucket is not None and (delay := self._bucket.delay(time.monotonic())) > 0:
                await self._capped(delay)
            elif not self._send_window.has_room(size, self.rtt, time.monotonic()):
                self._room.clear()
                await self._room.wait()

    def send_end(self) -> None:
        self._check()
        self._write(encode_end(self._sequence))
        self._sequence += 1

    async def next_block(self) -> Block:
        while (block := self._blocks.take()) is None:
            self._check()
            self._blocks.arrived.clear()
            await self._blocks.arrived.wait()
        return block

    def consumed(self, block: Block) -> None:
        idle = not len(self._blocks)
        little = len(block.data) < LITTLE
        self._grant(self._receive_window.consumed(stream.charge(len(block.data)), idle=idle and not little), idle)
        if idle and little and self._granting is None:
            self._granting = self._loop.call_later(LITTLE_SECONDS, self._grant_what_is_owed)

    def _grant_what_is_owed(self) -> None:
        self._granting = None
        idle = not len(self._blocks)
        self._grant(self._receive_window.consumed(0, idle=True), idle)

    def _grant(self, size: int, idle: bool) -> None:
        if size and self._error is None:
            self._write(encode_u64(Channel.CREDIT, size, 0 if idle else CreditFlags.BACKLOG))

    # Inside

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _said(self) -> str:
        words = self._parser.garbage.decode("utf-8", "replace").strip() or self.explain()
        return f" (it says: {words!r})" if words else ""

    def _write(self, data: bytes) -> None:
        assert self._wire is not None
        try:
            self._wire.write(data)
        except (OSError, RuntimeError) as error:
            self.fail(TransportError(f"the connection to {self.peer} is closed: {error}"))
            self._check()
        self.counters.wire_sent += len(data)

    async def _wait_writable(self) -> None:
        if not self._writable.is_set():
            await self._writable.wait()
            self._check()

    async def _wait_for(
        self, queue: deque[bytes] | deque[list[bytes]], there: asyncio.Event, timeout: float | None
    ) -> None:
        if queue:
            return
        try:
            async with asyncio.timeout(timeout):
                while not queue:
                    self._check()
                    there.clear()
                    await there.wait()
        except TimeoutError:
            raise TransportError(f"nothing from {self.peer} for {timeout:g} s") from None

    def _introduced(self) -> None:
        assert self._parser.preface is not None
        self._send_window.window = self._parser.preface.window
        self._ready.set()
        for _ in range(3):  # a first idea of the round trip, free of the connection's setup
            self._send_ping()

    def _dispatch(self, frame: Frame) -> None:
        if frame.channel == Channel.STREAM:
            block = decode_block(frame.flags, frame.payload)
            if not block.end:
                self._receive_window.received(stream.charge(len(block.data)))
            self._blocks.put(block)
        elif frame.channel == Channel.CONTROL:
            self._messages.append(frame.payload)
            self.counters.messages_received += 1
            self._message_there.set()
            self._put_into_inbox(len(frame.payload))
        elif frame.channel == Channel.CREDIT:
            backlog = bool(frame.flags & CreditFlags.BACKLOG)
            self._send_window.granted(decode_u64(frame.payload), time.monotonic(), backlog=backlog)
            self._room.set()
        elif frame.channel == Channel.PACKETS:
            packets = decode_packets(frame.payload)
            self._packets.append(packets)
            self.counters.packets_received += len(packets)
            self._packets_there.set()
            self._put_into_inbox(_weight(packets))
        elif frame.flags & PingFlags.PONG:
            elapsed = (time.monotonic_ns() - decode_u64(frame.payload)) / 1e9
            if not 0 <= elapsed < 3600:
                raise TransportError("answer to a ping that was never sent")
            self._round_trip.add(elapsed)
            while self._pongs:
                pong = self._pongs.popleft()
                if not pong.done():
                    pong.set_result(elapsed)
        elif self._writable.is_set():  # else the peer asks without reading what we answer
            self._write(encode_frame(Channel.PING, frame.payload, PingFlags.PONG))

    def _put_into_inbox(self, size: int) -> None:
        self._inbox += size + CHARGE
        if self._inbox > INBOX and not self._reading_paused and self._wire is not None:
            self._reading_paused = True
            self._wire.pause_reading()

    def _take_from_inbox(self, size: int) -> None:
        self._inbox -= size + CHARGE
        if self._reading_paused and self._inbox < INBOX // 2 and self._wire is not None:
            self._reading_paused = False
            self._last_sign = time.monotonic()
            if self._error is None:
                self._wire.resume_reading()

    def _send_ping(self) -> None:
        self._write(encode_u64(Channel.PING, time.monotonic_ns()))

    async def _keep_alive(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(self._keepalive_every)
            now = time.monotonic()
            if now - before > self._keepalive_every + 1.0 or self._reading_paused:
                # We were the ones who slept (or do not listen): that says nothing about the peer.
                self._last_sign = now
            if now - self._last_sign > self._dead_after:
                self.fail(TransportError(f"no sign of life from {self.peer} for {self._dead_after:g} s"))
                return
            self._send_ping()


def _weight(packets: list[bytes]) -> int:
    return sum(map(len, packets)) + CHARGE * len(packets)
