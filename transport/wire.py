"""Links over what the kernel gives: sockets, pipes, and the standard input and output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import sys
from typing import Any, cast

from migrator.errors import TransportError
from transport.connection import Wire
from transport.link import Link

GRACE = 0.5  # seconds
_REST = 4 << 20  # bytes: a peer that goes on writing must not hold us up
WRITE_BUFFER = 2 << 20  # bytes unsent at which `Link.send` begins to wait


class _Duplex(asyncio.Protocol):
    """One transport for both directions."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._fd = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        wire = cast(asyncio.Transport, transport)
        self._fd = wire.get_extra_info("socket").fileno()
        wire.set_write_buffer_limits(high=WRITE_BUFFER)
        self._link.connection_made(wire)

    def data_received(self, data: bytes) -> None:
        self._link.data_received(data)

    def eof_received(self) -> bool:
        self._link.eof_received()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, BrokenPipeError):
            self._read_the_rest()
        self._link.connection_lost(exc)

    def _read_the_rest(self) -> None:
        """asyncio stops reading where a write fails; what the peer said before it closed is still there."""
        left = _REST
        with contextlib.suppress(OSError):
            while left > 0 and (data := os.read(self._fd, 1 << 16)):
                self._link.data_received(data)
                left -= len(data)

    def pause_writing(self) -> None:
        self._link.pause_writing()

    def resume_writing(self) -> None:
        self._link.resume_writing()


class _Reading(asyncio.Protocol):
    """The reading half of a pair of pipes."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def data_received(self, data: bytes) -> None:
        self._link.data_received(data)

    def eof_received(self) -> None:
        self._link.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.connection_lost(exc)


class _Writing(asyncio.BaseProtocol):
    """The writing half. That it closes is told by the reading half, after what is still to be read.

    Only where the reading half says nothing is the loss of this one the end of the link.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            asyncio.get_running_loop().call_later(GRACE, self._link.connection_lost, exc)

    def pause_writing(self) -> None:
        self._link.pause_writing()

    def resume_writing(self) -> None:
        self._link.resume_writing()


class _PipePair:
    """Two pipes as one wire."""

    def __init__(self, reader: asyncio.ReadTransport, writer: asyncio.WriteTransport) -> None:
        self._reader = reader
        self._writer = writer
        self.write = writer.write
        self.pause_reading = reader.pause_reading
        self.resume_reading = reader.resume_reading

    def close(self) -> None:
        self._writer.close()
        self._reader.close()

    def abort(self) -> None:
        if not self._writer.is_closing() or self._writer.get_write_buffer_size():
            self._writer.abort()
        self._reader.close()


async def link_socket(sock: socket.socket, peer: str, **options: Any) -> Link:
    """A link over a connected stream socket, which it owns. `options` are those of `Link`."""
    link = Link(peer, **options)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    await asyncio.get_running_loop().create_connection(lambda: _Duplex(link), sock=sock)
    return link


async def link_pipes(read_fd: int, write_fd: int, peer: str, **options: Any) -> Link:
    """A link over two pipes, which it owns."""
    loop = asyncio.get_running_loop()
    link = Link(peer, **options)
    writer, _ = await loop.connect_write_pipe(lambda: _Writing(link), os.fdopen(write_fd, "wb", 0))
    reader, _ = await loop.connect_read_pipe(lambda: _Reading(link), os.fdopen(read_fd, "rb", 0))
    link.connection_made(cast(Wire, _PipePair(reader, writer)))
    return link


async def link_pair(**options: Any) -> tuple[Link, Link]:
    """Two links that are each other's peer, within this process; for tests and measurements."""
    left, right = socket.socketpair()
    links = await link_socket(left, "right", **options), await link_socket(right, "left", **options)
    for link in links:
        await link.established()
    return links


async def stdio_link(**options: Any) -> Link:
    """The link of `agent --stdio`: over standard input and output, as sshd hands them over.

    Afterwards descriptor 0 is /dev/null and 1 is standard error, so that nothing that prints
    can get between the frames. Raises `TransportError` where they are no pipes or sockets.
    """
    sys.stdout.flush()
    read_fd, write_fd = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    what = os.fstat(read_fd)
    to = os.fstat(write_fd)
    peer = os.environ.get("SSH_CONNECTION", "").split(" ")[0] or "the caller"
    if stat.S_ISSOCK(what.st_mode) and what.st_ino == to.st_ino:
        # sshd hands over one socketpair for both; asyncio's pipes take its input for a broken output.
        os.close(write_fd)
        return await link_socket(socket.socket(fileno=read_fd), peer, **options)
    if not all(stat.S_ISFIFO(st.st_mode) or stat.S_ISSOCK(st.st_mode) for st in (what, to)):
        raise TransportError(
            "standard input and output are no pipes",
            hint="--stdio is for the other host's migrator to call over ssh, not for a terminal",
        )
    return await link_pipes(read_fd, write_fd, peer, **options)
