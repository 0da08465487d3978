"""The stream, outgoing: from a file descriptor to STREAM frames.

    engine -> fd -> StreamSender -> frames -> StreamReceiver -> fd -> engine

Blocks are cut as the data comes, compressed by several threads and sent in order. What is small
and comes alone goes out in the same turn of the event loop. Memory is bounded by a handful of
blocks: the source is not read while the peer gives no credit.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

from migrator.errors import TransportError
from transport.allocator import keep_freed_memory
from transport.compression import WORKERS, BlockCompressor, Packed
from transport.connection import Connection
from transport.descriptor import Descriptor
from transport.flow import SendWindow, TokenBucket
from transport.frame import charge, encode_block, encode_end

LARGEST = 256 << 10
SMALLEST = 64 << 10
BLOCK_SECONDS = 0.01  # a control message waits for at most the block that is being written


class StreamSender:
    """`level` is that of zstd, None to choose by measurement; `rtt` says the round trip in seconds."""

    def __init__(self, connection: Connection, level: int | None, rtt: Callable[[], float]) -> None:
        self.window = SendWindow(0)
        self.compressor = BlockCompressor(level)
        self._connection = connection
        self._rtt = rtt
        self._opened = connection.event()
        self._room = connection.event()
        self._uncapped = connection.event()
        self._bucket: TokenBucket | None = None
        self._sequence = 0

    def open(self, window: int) -> None:
        """The peer takes `window` bytes before it grants more."""
        self.window.window = window
        self._opened.set()

    def granted(self, size: int, *, backlog: bool) -> None:
        """The peer is done with `size` bytes. Raises `TransportError` if it never had them."""
        self.window.granted(size, time.monotonic(), backlog=backlog)
        self._room.set()

    # The cap

    @property
    def cap(self) -> float:
        """In bytes/s, 0.0 where there is none."""
        return self._bucket.rate if self._bucket else 0.0

    def set_cap(self, bandwidth: float) -> None:
        self._bucket = TokenBucket(bandwidth)
        self._uncapped.clear()

    def uncap(self) -> None:
        self._bucket = None
        self._uncapped.set()

    async def acquire_bandwidth(self, size: int) -> float:
        """Wait until the cap lets `size` bytes be sent, and count them; the seconds waited."""
        began = time.monotonic()
        while self._bucket is not None and (delay := self._bucket.delay(time.monotonic())) > 0:
            await self._wait_uncapped(delay)
            self._connection.check()
        if self._bucket is not None:
            self._bucket.take(size)
        return time.monotonic() - began

    async def _wait_uncapped(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._uncapped.wait()

    # Blocks

    @property
    def block_size(self) -> int:
        """Bytes to cut at, so that one block takes `BLOCK_SECONDS` of the link at most."""
        known = filter(None, (self.window.estimate, self.cap))
        rate = min(known, default=0.0)
        return max(SMALLEST, min(LARGEST, int(rate * BLOCK_SECONDS))) if rate else LARGEST // 4

    async def pump(self, fd: int) -> int:
        """Send everything that `fd` gives until its end, then the end of the stream. Closes `fd` in any case.

        Returns the bytes read. Raises `TransportError` when the link fails, OSError when reading does.
        """
        keep_freed_memory()
        total = 0
        with Descriptor(fd, self._connection) as source:
            pipeline = _Pipeline(self, source)
            drainer = asyncio.create_task(pipeline.drain())
            try:
                while raw := await source.read(self.block_size):
                    total += len(raw)
                    await pipeline.put(raw)
                pipeline.end()
                await drainer
            finally:
                drainer.cancel()
                with contextlib.suppress(asyncio.CancelledError, TransportError):
                    await drainer
        self._connection.check()
        self._connection.write(encode_end(self._sequence))
        self._sequence += 1
        return total

    def try_send(self, packed: Packed) -> bool:
        """Send a block if that needs no wait at all."""
        self._connection.check()
        now = time.monotonic()
        size = charge(len(packed.data))
        if not self._opened.is_set() or not self._connection.writable:
            return False
        if self._bucket is not None and self._bucket.delay(now) > 0:
            return False
        if not self.window.has_room(size, self._rtt(), now):
            return False
        if self._bucket is not None:
            self._bucket.take(size)
        self.window.sent(size, now)
        frame = encode_block(self._sequence, packed.raw_size, packed.data, compressed=packed.compressed)
        self._connection.write(frame)
        self._connection.counters.stream_sent += packed.raw_size
        self._sequence += 1
        return True

    async def send(self, packed: Packed) -> None:
        """Send a block as soon as cap, credit and the wire allow."""
        size = charge(len(packed.data))
        while not self.try_send(packed):
            if not self._opened.is_set():
                await self._opened.wait()
            elif not self._connection.writable:
                await self._connection.wait_writable()
            elif self._bucket is not None and (delay := self._bucket.delay(time.monotonic())) > 0:
                await self._wait_uncapped(delay)
            elif not self.window.has_room(size, self._rtt(), time.monotonic()):
                self._room.clear()
                await self._room.wait()


class _Pipeline:
    """Blocks under compression, in the order in which they are to be sent."""

    def __init__(self, sender: StreamSender, source: Descriptor) -> None:
        self._sender = sender
        self._compressor = sender.compressor
        self._source = source
        self._queue: deque[Packed | asyncio.Future[Packed]] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None

    async def put(self, raw: bytes) -> None:
        """Take one block; waits while enough of them are under way."""
        started = self._compressor.start(raw, self._sender.cap or self._sender.window.capacity)
        # The short way: nothing before it, room for it, done already. No task switch.
        if isinstance(started, Packed) and not self._queue and self._sender.try_send(started):
            self._compressor.finish(started)
            return
        self._queue.append(started)
        self._changed.set()
        while len(self._queue) > WORKERS:
            await self._wait()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    async def drain(self) -> None:
        """Send until `end()`. A failure is also raised where the source is being read."""
        try:
            while self._queue or not self._ended:
                if not self._queue:
                    await self._wait()
                    continue
                packed = self._queue[0]
                if not isinstance(packed, Packed):
                    packed = await packed
                self._compressor.finish(packed)
                await self._sender.send(packed)
                self._queue.popleft()  # only now: what is being sent keeps `put` off the short way
                self._changed.set()
        except Exception as error:
            self._error = error
            self._changed.set()
            self._source.interrupt(error)
            raise

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._changed.clear()
        await self._changed.wait()
        if self._error is not None:
            raise self._error
