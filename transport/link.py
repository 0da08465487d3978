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
from collections.abc import Awaitable, Callable

from migrator.errors import TransportError
from transport.connection import CLOSE_SECONDS, Connection, Counters, Wire
from transport.frame import (
    MIN_WINDOW,
    Channel,
    CreditFlags,
    Frame,
    FrameParser,
    decode_block,
    decode_packets,
    decode_u64,
    encode_frame,
    encode_packets,
    encode_preface,
)
from transport.inbox import Inbox
from transport.keepalive import Keepalive
from transport.stream_receiver import StreamReceiver
from transport.stream_sender import StreamSender

WINDOW = 8 << 20
_FIRST_PINGS = 3  # a first idea of the round trip, free of the connection's setup


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
        self.key = ""  # the fingerprint that the peer has logged in with, where we know
        self._connection = Connection(peer)
        self._parser = FrameParser()
        self._inbox = Inbox(self._connection)
        self._keepalive = Keepalive(self._connection, keepalive, dead_after)
        self._sender = StreamSender(self._connection, level, lambda: self.rtt)
        self._receiver = StreamReceiver(self._connection, max(window, MIN_WINDOW))
        self._ready = self._connection.event()
        self._cleanups: list[Callable[[], Awaitable[None]]] = []

    @property
    def peer(self) -> str:
        return self._connection.peer

    # Messages

    async def send(self, message: bytes) -> None:
        """Send one control message of at most 1 MiB. Written at once; waits if much is unsent."""
        self._connection.check()
        self._connection.write(encode_frame(Channel.CONTROL, message))
        self.counters.messages_sent += 1
        await self._connection.wait_writable()

    async def receive(self, timeout: float | None = None) -> bytes:
        """The next control message. What arrived before the link failed can still be received.

        Raises `TransportError` at the end of the connection, or after `timeout` seconds.
        """
        return await self._inbox.message(timeout)

    # Captured packets

    async def send_packets(self, packets: list[bytes]) -> None:
        """Send captured network packets, in order. Like `send` in all else."""
        self._connection.check()
        for frame in encode_packets(packets):
            self._connection.write(frame)
        self.counters.packets_sent += len(packets)
        await self._connection.wait_writable()

    async def receive_packets(self, timeout: float | None = None) -> list[bytes]:
        """The packets of the next frame. Raises as `receive` does."""
        return await self._inbox.packets(timeout)

    # The stream

    async def pump_in(self, fd: int) -> int:
        """Send what `fd` gives, to its end, as one stream. Owns `fd` and closes it. See `StreamSender.pump`."""
        return await self._sender.pump(fd)

    async def pump_out(self, fd: int) -> int:
        """Write one received stream to `fd`. Owns `fd` and closes it. See `StreamReceiver.pump`."""
        return await self._receiver.pump(fd)

    # The cap

    async def acquire_bandwidth(self, size: int) -> float:
        """Wait until the cap lets `size` bytes be sent, and count them; the seconds waited.

        Blocks of the stream wait by themselves; this is for what is sent in bulk as messages.
        """
        return await self._sender.acquire_bandwidth(size)

    def set_cap(self, bandwidth: float) -> None:
        """From now on send at most `bandwidth` wire bytes/s of stream and of `acquire_bandwidth()`."""
        self._sender.set_cap(bandwidth)

    def uncap(self) -> None:
        """Lift the cap at once, also for a block that is waiting for it: the workload is frozen."""
        self._sender.uncap()

    # What was measured

    @property
    def counters(self) -> Counters:
        return self._connection.counters

    @property
    def compression_ratio(self) -> float:
        """Bytes of the stream before compression for each one after it; 1.0 where nothing was sent."""
        return self._sender.compressor.stats.ratio

    @property
    def level(self) -> int:
        """The zstd level now in use, 0 for none."""
        return self._sender.compressor.level

    @property
    def in_flight(self) -> int:
        """Wire bytes of the stream that were sent and that the peer has not acknowledged yet."""
        return self._sender.window.in_flight

    @property
    def rtt(self) -> float:
        """The round trip in seconds, the least ever seen; 0.0 before the first sample."""
        return self._keepalive.round_trip.least

    @property
    def wire_throughput(self) -> float:
        """Wire bytes/s the peer takes of the stream; a lower bound as long as the link was never
        the bottleneck, and 0.0 before the first sample."""
        return self._sender.window.estimate

    @property
    def stream_throughput(self) -> float:
        """The same in bytes/s of the stream before compression, at the ratio so far."""
        return self.wire_throughput * self.compression_ratio

    async def ping(self, timeout: float = 5.0) -> float:
        """Measure the round trip now, in seconds."""
        return await self._keepalive.ping(timeout)

    # Life

    async def established(self, timeout: float = 10.0) -> None:
        """Wait until the peer has introduced itself. Raises `TransportError` if it does not."""
        try:
            async with asyncio.timeout(timeout):
                await self._ready.wait()
        except TimeoutError:
            self.fail(TransportError(f"{self.peer} did not introduce itself within {timeout:g} s"))
        self._connection.check()

    def on_close(self, cleanup: Callable[[], Awaitable[None]]) -> None:
        """Have `cleanup` awaited at the end of `close()`."""
        self._cleanups.append(cleanup)

    def explain_with(self, explain: Callable[[], str]) -> None:
        """Have errors about the end of the link say what `explain` returns then."""
        self._connection.explain = explain

    @property
    def alive(self) -> bool:
        return self._connection.alive

    def fail(self, error: TransportError) -> None:
        """End the link with this error; the first one counts. Everybody who waits gets it."""
        self._connection.fail(error)

    async def wait_closed(self) -> None:
        """Wait until the connection is gone, for whatever reason."""
        await self._connection.lost.wait()

    async def close(self) -> None:
        """Send what is unsent and close. Never raises for the peer's sake, never takes long."""
        await self._connection.close()
        cleanups, self._cleanups = self._cleanups, []
        for cleanup in reversed(cleanups):
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await cleanup()

    async def __aenter__(self) -> Link:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # Callbacks of the wire

    def connection_made(self, wire: Wire) -> None:
        self._connection.carry(wire)
        self._connection.write(encode_preface(self._receiver.window.window))
        self._keepalive.start()

    def data_received(self, data: bytes) -> None:
        if self._connection.failed:
            return
        self._keepalive.heard()
        self.counters.wire_received += len(data)
        try:
            frames = self._parser.feed(data)
            if self._parser.preface is not None and not self._ready.is_set():
                self._introduced(self._parser.preface.window)
            for frame in frames:
                self._dispatch(frame)
        except TransportError as error:
            words = self._parser.garbage.decode("utf-8", "replace").strip() or self._connection.explain()
            said = f" (it says: {words!r})" if words else ""
            self.fail(TransportError(f"{self.peer}: {error}{said}", hint=error.hint))

    def eof_received(self) -> None:
        self._connection.ended(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.ended(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    # Inside

    def _introduced(self, window: int) -> None:
        self._sender.open(window)
        self._ready.set()
        for _ in range(_FIRST_PINGS):
            self._keepalive.send_ping()

    def _dispatch(self, frame: Frame) -> None:
        if frame.channel == Channel.STREAM:
            self._receiver.received(decode_block(frame.flags, frame.payload))
        elif frame.channel == Channel.CONTROL:
            self._inbox.put_message(bytes(frame.payload))
        elif frame.channel == Channel.CREDIT:
            self._sender.granted(decode_u64(frame.payload), backlog=bool(frame.flags & CreditFlags.BACKLOG))
        elif frame.channel == Channel.PACKETS:
            self._inbox.put_packets(decode_packets(frame.payload))
        else:
            self._keepalive.received(frame.flags, frame.payload)
