"""Reading and writing a file descriptor without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
from collections.abc import Callable
from typing import Any

from transport.connection import Connection
from transport.frame import Buffer

PIPE_SIZE = 256 << 10


class Descriptor:
    """A pipe, socket or file. The block owns the descriptor and closes it.

    A failure of the connection interrupts the wait, so that whoever is on the other end of the
    descriptor learns of it even if it has nothing to say.
    """

    def __init__(self, fd: int, connection: Connection) -> None:
        self._fd = fd
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Descriptor:
        mode = os.fstat(self._fd).st_mode
        # epoll refuses regular files: those never block for long, a thread will do.
        self._file = stat.S_ISREG(mode)
        if not self._file:
            os.set_blocking(self._fd, False)
        if stat.S_ISFIFO(mode):
            with contextlib.suppress(OSError):  # the per-user limit of pipe buffers; see pipe(7)
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self._connection.watch(self.interrupt)
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.unwatch(self.interrupt)
        os.close(self._fd)

    def interrupt(self, error: BaseException) -> None:
        """Have whoever waits for the descriptor, now or later, raise `error`."""
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

    async def write(self, data: Buffer) -> None:
        """All of `data`. Raises BrokenPipeError if nobody reads it."""
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
