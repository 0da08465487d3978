"""The stream, incoming: from STREAM frames to a file descriptor.

Credit is given back once the bytes are written. So the peer never has more under way than the
window, and that is what bounds memory here.
"""

from __future__ import annotations

import asyncio
from collections import deque

from migrator.errors import ReaderGone, TransportError
from transport.allocator import keep_freed_memory
from transport.compression import unpack_async
from transport.connection import Connection
from transport.descriptor import Descriptor
from transport.flow import ReceiveWindow
from transport.frame import Block, Channel, CreditFlags, charge, encode_u64

LITTLE = 64 << 10  # bytes of a block whose credit can wait: what comes behind it may be urgent
LITTLE_SECONDS = 0.03
MOST_ENDS = 64  # ends of streams not reached yet: they cost no credit, but memory


class StreamReceiver:
    """`window` is the number of bytes that the peer may have in flight towards us."""

    def __init__(self, connection: Connection, window: int) -> None:
        self.window = ReceiveWindow(window)
        self._connection = connection
        self._blocks: deque[Block] = deque()
        self._arrived = connection.event()
        self._expected = 0
        self._ends = 0
        self._granting: asyncio.TimerHandle | None = None
        connection.watch(self._stop)

    def received(self, block: Block) -> None:
        """Take a block. Raises `TransportError` for one out of order, and for more than the window."""
        if block.end:
            self._ends += 1
            if self._ends > MOST_ENDS:
                raise TransportError(f"{self._ends} streams ended before the first of them was read")
        else:
            self.window.received(charge(len(block.data)))
        if block.sequence != self._expected:
            raise TransportError(f"stream block {block.sequence} came where {self._expected} was due")
        self._expected += 1
        self._blocks.append(block)
        self._arrived.set()

    async def pump(self, fd: int) -> int:
        """Write one stream to `fd`, to its end. Closes `fd` in any case.

        Returns the bytes written. Raises `TransportError` when the link fails, `ReaderGone` when the
        reader of `fd` goes away.
        """
        keep_freed_memory()
        total = 0
        with Descriptor(fd, self._connection) as sink:
            while not (block := await self._next()).end:
                raw = await unpack_async(block)
                try:
                    await sink.write(raw)
                except BrokenPipeError:
                    raise ReaderGone("whoever reads the stream on this host stopped reading") from None
                total += len(raw)
                self._connection.counters.stream_received += len(raw)
                self._consumed(block)
        self._ends -= 1
        return total

    async def _next(self) -> Block:
        while not self._blocks:
            self._connection.check()
            self._arrived.clear()
            await self._arrived.wait()
        return self._blocks.popleft()

    def _consumed(self, block: Block) -> None:
        idle = not self._blocks
        little = len(block.data) < LITTLE
        self._grant(self.window.consumed(charge(len(block.data)), idle=idle and not little), idle)
        if idle and little and self._granting is None:
            self._granting = asyncio.get_running_loop().call_later(LITTLE_SECONDS, self._grant_what_is_owed)

    def _grant_what_is_owed(self) -> None:
        self._granting = None
        self._grant(self.window.consumed(0, idle=True), not self._blocks)

    def _grant(self, size: int, idle: bool) -> None:
        if size and not self._connection.failed:
            self._connection.write(encode_u64(Channel.CREDIT, size, 0 if idle else CreditFlags.BACKLOG))

    def _stop(self, error: TransportError) -> None:
        if self._granting is not None:
            self._granting.cancel()
