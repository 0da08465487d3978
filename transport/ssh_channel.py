"""A link as a session of asyncssh, on either side."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from migrator.text import printable
from transport.library import asyncssh
from transport.link import Link

_STDERR_KEPT = 4096  # bytes
_STDERR_LINES = 5
_MSG_IGNORE = 2
_STATUS_SECONDS = 0.5  # the exit status may come after the end of the output

# For both ends. GCM is one pass in hardware. What is compressed is compressed already. The
# window is never the limit, because credit is (docs/protocol.md). Keys are exchanged again
# as rarely as OpenSSH does for AES (2^32 blocks, 64 GiB): a key exchange stops the flow for
# several ms, and must not fall into a freeze.
CONNECTION_OPTIONS: dict[str, Any] = {
    "encryption_algs": [
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "chacha20-poly1305@openssh.com",
        "aes128-ctr",
        "aes256-ctr",
    ],
    "compression_algs": "none",
    "rekey_bytes": 60 << 30,
    "rekey_seconds": 24 * 3600,
}
CHANNEL_OPTIONS: dict[str, Any] = {"encoding": None, "window": 32 << 20, "max_pktsize": 128 << 10}


def leave_out_ignores(connection: Any) -> None:
    """Leave out the SSH_MSG_IGNORE that asyncssh puts before every packet.

    It protects CBC modes (RFC 4251, 9.3.1), which we do not offer; with the ciphers that we do
    it only doubles the packets, and half of the time of a small message goes into it.
    """
    send = connection.send_packet

    def send_packet(pkttype: int, *args: bytes, **options: Any) -> None:
        if pkttype != _MSG_IGNORE:
            send(pkttype, *args, **options)

    connection.send_packet = send_packet


class _ChannelWire:
    """An SSH channel as a wire.

    Pausing it stops reading the whole connection, which carries nothing else. asyncssh would go on
    reading, and keep what comes up to the channel's window, however small the pieces are.
    """

    def __init__(self, chan: Any) -> None:
        self._connection = chan.get_connection()
        self.write = chan.write
        self.close = chan.close
        self.abort = chan.abort

    def pause_reading(self) -> None:
        if (transport := self._connection._transport) is not None:
            transport.pause_reading()

    def resume_reading(self) -> None:
        if (transport := self._connection._transport) is not None:
            transport.resume_reading()


class ChannelCallbacks:
    """The callbacks that sessions of both sides hand on to the link."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._chan: Any = None

    def connection_made(self, chan: Any) -> None:
        self._chan = chan
        chan.set_write_buffer_limits(high=2 << 20)

    def session_started(self) -> None:
        self.link.connection_made(_ChannelWire(self._chan))

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self.link.data_received(data)

    def eof_received(self) -> bool:
        self.link.eof_received()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.link.connection_lost(exc)

    def pause_writing(self) -> None:
        self.link.pause_writing()

    def resume_writing(self) -> None:
        self.link.resume_writing()


class ClientSession(ChannelCallbacks, asyncssh.SSHClientSession[bytes]):
    """Our end of the remote command. Keeps the end of its standard error, and its exit status."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self._stderr = b""
        self.status: int | None = None
        self._over = asyncio.Event()
        link.explain_with(self.stderr_tail)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype == asyncssh.EXTENDED_DATA_STDERR:
            self._stderr = (self._stderr + data)[-_STDERR_KEPT:]
        else:
            self.link.data_received(data)

    def eof_received(self) -> bool:
        # The exit status and the last of standard error may still be on their way.
        asyncio.get_running_loop().call_later(_STATUS_SECONDS, self.link.eof_received)
        return False

    def exit_status_received(self, status: int) -> None:
        self.status = status

    def connection_lost(self, exc: Exception | None) -> None:
        self._over.set()
        super().connection_lost(exc)

    async def ended(self, timeout: float) -> None:
        """Wait a moment for the exit status."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._over.wait()

    def stderr_tail(self) -> str:
        """The last lines of standard error, in one, printable."""
        lines = self._stderr.decode("utf-8", "replace").splitlines()
        return printable(" / ".join(line.strip() for line in lines[-_STDERR_LINES:] if line.strip()))
