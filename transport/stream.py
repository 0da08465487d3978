"""The stream between two file descriptors and a link.

    engine -> fd -> pump_in -> STREAM frames -> pump_out -> fd -> engine

Blocks are cut as the data comes, compressed by several threads and sent in order. What is
small and comes alone goes out in the same turn of the event loop. Memory on either side is
bounded by the window and a handful of blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from migrator.errors import TransportError
from transport.compression import WORKERS, BlockCompressor, Packed, unpack_async
from transport.frame import BLOCK_HEADER, CHARGE, Block

if TYPE_CHECKING:
    from transport.link import Link

LARGEST = 256 << 10
SMALLEST = 64 << 10
BLOCK_SECONDS = 0.01  # a control message waits for at most the block that is being written


def charge(size: int) -> int:
    """What a block of `size` wire bytes costs of the window, on both sides."""
    return BLOCK_HEADER.size + size + CHARGE


def block_size(link: Link) -> int:
    """Bytes to cut at, so that one block takes about `BLOCK_SECONDS` of the link."""
    if not link.pace:
        return LARGEST // 4
    return max(SMALLEST, min(LARGEST, int(link.pace * BLOCK_SECONDS)))


async def pump_in(link: Link, fd: int, compressor: BlockCompressor) -> int:
    """Send everything `fd` gives until its end, then the end of the stream. Closes `fd` in any case.

    Returns the bytes read. Raises `TransportError` when the link fails, `OSError` when reading does.
    """
    total = 0
    with _Descriptor(fd, link) as source:
        pipeline = _Pipeline(link, compressor, source)
        drainer = asyncio.create_task(pipeline.drain())
        try:
            while raw := await source.read(block_size(link)):
                total += len(raw)
                await pipeline.put(raw)
            pipeline.end()
            await drainer
        finally:
            drainer.cancel()
            with contextlib.suppress(asyncio.CancelledError, TransportError):
                await drainer
    link.send_end()
    return total


async def pump_out(link: Link, fd: int) -> int:
    """Write what the link receives to `fd` until the end of the stream. Closes `fd` in any case.

    Credit is given back only once the bytes are written. Returns the bytes written. Raises
    `TransportError` when the link fails or whoever reads `fd` goes away.
    """
    total = 0
    with _Descriptor(fd, link) as sink:
        while not (block := await link.next_block()).end:
            raw = await unpack_async(block)
            try:
                await sink.write(raw)
            except BrokenPipeError:
                raise TransportError("whoever reads the stream on this host stopped reading") from None
            total += len(raw)
            link.consumed(block)
    return total


class _Pipeline:
    """Blocks under compression, in the order in which they are to be sent."""

    def __init__(self, link: Link, compressor: BlockCompressor, source: _Descriptor) -> None:
        self._link = link
        self._compressor = compressor
        self._source = source
        self._queue: deque[Packed | asyncio.Future[Packed]] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None

    async def put(self, raw: bytes) -> None:
        """Take one block; waits while enough of them are under way."""
        started = self._compressor.start(raw, self._link.cap or self._link.capacity)
        # The short way: nothing before it, room for it, done already. No task switch.
        if isinstance(started, Packed) and not self._queue and self._link.try_send_block(started):
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
                await self._link.send_block(packed)
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


class StreamQueue:
    """Blocks that have arrived and were not taken yet, in order and without gaps."""

    def __init__(self) -> None:
        self._blocks: deque[Block] = deque()
        self._expected = 0
        self.arrived = asyncio.Event()

    def put(self, block: Block) -> None:
        if block.sequence != self._expected:
            raise TransportError(f"stream block {block.sequence} came where {self._expected} was due")
        self._expected += 1
        self._blocks.append(block)
        self.arrived.set()

    def take(self) -> Block | None:
        return self._blocks.popleft() if self._blocks else None

    def __len__(self) -> int:
        return len(self._blocks)


class _Descriptor:
    """A pipe, socket or file that is waited for. Owns and closes the descriptor.

    A failure of the link interrupts the wait, so that whoever is on the other end of the
    descriptor learns of it even if it has nothing to say.
    """

    def __init__(self, fd: int, link: Link) -> None:
        self._fd = fd
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> _Descriptor:
        mode = os.fstat(self._fd).st_mode
        # epoll refuses regular files: those never block for long, a thread will do.
        self._file = stat.S_ISREG(mode)
        if not self._file:
            os.set_blocking(self._fd, False)
        if stat.S_ISFIFO(mode):
            with contextlib.suppress(OSError):  # the per-user limit of pipe buffers; see pipe(7)
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, LARGEST)
        self._link.watchers.add(self.interrupt)
        return self

    def __exit__(self, *exc: object) -> None:
        self._link.watchers.discard(self.interrupt)
        os.close(self._fd)

    def interrupt(self, error: BaseException) -> None:
        self._error = error
        self._wake()

    async def read(self, size: int) -> bytes:
        """What is there, at most `size` bytes; waits only where nothing is. b"" at the end."""
        while True:
            self._check()
            if self._file:
                return await asyncio.to_thread(os.read, self._fd, size)
            try:
                return os.read(self._fd, size)
            except BlockingIOError:
                await self._wait(self._loop.add_reader, self._loop.remove_reader)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._check()
            try:
                if self._file:
                    done = await asyncio.to_thread(os.write, self._fd, view)
                else:
                    done = os.write(self._fd, view)
                view = view[done:]
            except BlockingIOError:
                await self._wait(self._loop.add_writer, self._loop.remove_writer)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _wait(self, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
        waiter = self._waiter = self._loop.create_future()
        add(self._fd, self._wake)
        try:
            await waiter
        finally:
            remove(self._fd)
