"""A link to another host over SSH.

    link = await connect("root@host", command="migrator agent --stdio")

works with any sshd: the command is run there and spoken to over its standard input and
output, as rsync does. A `migrator agent` daemon (`transport.daemon`) answers to the same
command without running anything.

Host keys are checked against known_hosts files; an unknown or changed key is an error that
says what was seen and what to do, never a question.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import asyncssh

from migrator.errors import TransportError
from transport import keys
from transport.link import Link, Wire
from transport.wire import stdio_link

__all__ = ["COMMAND", "TUNING", "Target", "connect", "parse_target", "stdio_link"]

COMMAND = "migrator agent --stdio"
_STDERR_KEPT = 4096
_Keys = Sequence[Any]
_MSG_IGNORE = 2

# For both ends. GCM is one pass in hardware. What is compressed is compressed already. The
# window is never the limit, because credit is (docs/protocol.md). Keys are exchanged again
# as rarely as OpenSSH does for AES (2^32 blocks, 64 GiB): a key exchange stops the flow for
# several ms, and must not fall into a freeze.
TUNING: dict[str, Any] = {
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
CHANNEL: dict[str, Any] = {"encoding": None, "window": 32 << 20, "max_pktsize": 128 << 10}


@dataclass(frozen=True, slots=True)
class Target:
    """user@host:port; user and port are None where the SSH configuration decides."""

    user: str | None
    host: str
    port: int | None

    def __str__(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host


def parse_target(text: str) -> Target:
    """Parse `[user@]host[:port]`; an IPv6 address with a port is written `[addr]:port`."""
    user, _, rest = text.rpartition("@")
    host, port = rest, ""
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise TransportError(f"{text!r} is not user@host:port")
        port = tail[1:]
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    if not host or host.startswith("-") or (port and not (port.isdigit() and 0 < int(port) < 65536)):
        raise TransportError(f"{text!r} is not user@host:port")
    return Target(user or None, host, int(port) if port else None)


async def connect(
    target: str,
    *,
    identity: str | os.PathLike[str] | None = None,
    known_hosts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    command: str = COMMAND,
    port: int | None = None,
    accept_new_host_key: bool = False,
    timeout: float = 15.0,
    config: bool = True,
    **link_options: Any,
) -> Link:
    """Log in to `target` ([user@]host[:port]), start `command` there and talk to it.

    identity:    private key file; by default those of ssh(1) and its agent
    known_hosts: files to check the host's key with; see `keys.default_known_hosts`
    accept_new_host_key: pin the key of a host never seen before, in the first of these files
    config:      honour ~/.ssh/config

    Returns a link that the other side has already introduced itself on. Raises
    `TransportError`; then nothing is left running here or there.
    """
    where = parse_target(target)
    port = port or where.port
    files = _files(known_hosts)
    check = _HostKeyCheck(files, accept_new_host_key)
    options: dict[str, Any] = dict(TUNING)
    if where.user:
        options["username"] = where.user
    if identity is not None:
        options["client_keys"] = [keys.load_key(identity)]
        options["agent_path"] = None
    if not config:
        options["config"] = None
    if port:
        options["port"] = port
    try:
        async with asyncio.timeout(timeout):
            connection = await asyncssh.connect(
                where.host,
                client_factory=lambda: _Client(check),
                known_hosts=check.known,
                preferred_auth=["publickey"],
                **options,
            )
    except (OSError, asyncssh.Error) as error:
        raise _explained(error, where, port, check, identity, timeout) from None
    try:
        check.pin_accepted()
        return await _start(connection, where, command, timeout, link_options)
    except BaseException:
        connection.abort()
        raise


async def _start(
    connection: asyncssh.SSHClientConnection,
    where: Target,
    command: str,
    timeout: float,
    link_options: dict[str, Any],
) -> Link:
    link = Link(where.host, **link_options)
    session = ClientSession(link)
    try:
        await connection.create_session(lambda: session, command, **CHANNEL)
    except asyncssh.ChannelOpenError as error:
        raise TransportError(
            f"{where} refuses to run {command!r}: {error.reason}",
            hint="the key may be bound to another command in authorized_keys there",
        ) from None
    except (OSError, asyncssh.Error) as error:
        raise TransportError(f"{where}: {error}") from None

    async def disconnect() -> None:
        connection.close()
        await connection.wait_closed()

    link.on_close(disconnect)
    try:
        await link.established(timeout)
        await link.ping(timeout)  # the round trip is known before there is any load
    except TransportError as error:
        await session.ended(0.5)
        # What came instead of a preface says more than the exit status does.
        failure = error if link.counters.wire_received else session.failure(where, command) or error
        await link.close()
        raise failure from None
    return link


def quieten(connection: Any) -> None:
    """Leave out the SSH_MSG_IGNORE that asyncssh puts before every packet.

    It protects CBC modes (RFC 4251, 9.3.1), which we do not offer; with the ciphers that we do
    it only doubles the packets, and half of the time of a small message goes into it.
    """
    send = connection.send_packet

    def send_packet(pkttype: int, *args: bytes, **options: Any) -> None:
        if pkttype != _MSG_IGNORE:
            send(pkttype, *args, **options)

    connection.send_packet = send_packet


class _SessionCallbacks:
    """The callbacks that both kinds of SSH session hand on to the link."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._chan: Any = None

    def connection_made(self, chan: Any) -> None:
        self._chan = chan
        chan.set_write_buffer_limits(high=2 << 20)

    def session_started(self) -> None:
        self.link.connection_made(cast(Wire, self._chan))

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


class ClientSession(_SessionCallbacks, asyncssh.SSHClientSession[bytes]):
    """Our end of the remote command. Keeps what it says on standard error, and how it ended."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self._stderr = b""
        self._status: int | None = None
        self._over = asyncio.Event()
        link.explain = self.last_words

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype == asyncssh.EXTENDED_DATA_STDERR:
            self._stderr = (self._stderr + data)[-_STDERR_KEPT:]
        else:
            self.link.data_received(data)

    def eof_received(self) -> bool:
        # The exit status and the last of standard error may still be on their way.
        asyncio.get_running_loop().call_later(0.5, self.link.eof_received)
        return False

    def exit_status_received(self, status: int) -> None:
        self._status = status

    def connection_lost(self, exc: Exception | None) -> None:
        self._over.set()
        super().connection_lost(exc)

    async def ended(self, timeout: float) -> None:
        """Wait a moment for the exit status."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._over.wait()

    def last_words(self) -> str:
        """The last lines of standard error, in one, without what would steer a terminal."""
        lines = self._stderr.decode("utf-8", "replace").splitlines()
        text = " / ".join(line.strip() for line in lines[-5:] if line.strip())
        return "".join(char if char.isprintable() else "?" for char in text)

    def failure(self, where: Target, command: str) -> TransportError | None:
        """What a command that ended before it introduced itself died of."""
        if self._status is None:
            return None
        said = self.last_words()
        hint = "what it said is in the message; run it there by hand to see more"
        if self._status in (126, 127):
            hint = f"install migrator on {where.host}, or say where it is with --remote-command"
        return TransportError(
            f"{command!r} on {where} ended with status {self._status}" + (f": {said}" if said else ""),
            hint=hint,
        )


class _HostKeyCheck:
    """Decides about one host's key, and remembers what it saw for the error message."""

    def __init__(self, files: list[Path], accept_new: bool) -> None:
        self.files = files
        self.offered: asyncssh.SSHKey | None = None
        self.found: keys.KnownKeys | None = None
        self.error: TransportError | None = None
        self.host = ""
        self._port: int | None = None
        self._accept_new = accept_new
        self._accepted = False

    def known(self, host: str, addr: str, port: int | None) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """asyncssh's known_hosts hook; it also picks the algorithms by the keys that are known."""
        self.host, self._port = host, port
        try:
            self.found = keys.known_keys(self.files, host, addr, port)
        except TransportError as error:
            self.error = error
            return [], [], []
        return self.found.trusted, self.found.authorities, self.found.revoked

    def decide(self, key: asyncssh.SSHKey) -> bool:
        """Called for a key that is not known."""
        self.offered = key
        never_seen = self.found is not None and not self.found.trusted and not self.found.authorities
        self._accepted = self._accept_new and never_seen
        return self._accepted

    def pin_accepted(self) -> None:
        if self._accepted and self.offered is not None:
            keys.pin(self.files[0], self.host, self._port, self.offered)

    def refusal(self, reason: str) -> TransportError:
        """Why the key was not accepted, and what to do."""
        if self.error is not None:
            return self.error
        name = keys.host_pattern(self.host, self._port)
        file = self.files[0]
        seen = keys.fingerprint(self.offered) if self.offered else "a key of another type"
        if "revoked" in reason:
            return TransportError(
                f"the host key of {name} is marked as revoked",
                hint="do not trust this host; ask its operator",
            )
        if self.found is not None and (self.found.trusted or self.found.authorities):
            expected = ", ".join(sorted({keys.fingerprint(key) for key in self.found.trusted}))
            return TransportError(
                f"THE HOST KEY OF {name} HAS CHANGED: it offers {seen}, known is "
                f"{expected or 'an authority'}. Somebody may be in between, or it was installed anew",
                hint=f"find out which; then remove the old key: ssh-keygen -R {shlex.quote(name)} -f FILE, "
                f"for each of {', '.join(str(f) for f in self.files if f.exists())}",
            )
        scan = f"ssh-keyscan{f' -p {self._port}' if self._port else ''} {self.host} >> {file}"
        return TransportError(
            f"the host key of {name} is not known: it offers {seen}, which is not in {file}",
            hint=f"compare the fingerprint, then run again with --accept-new-host-key, or: {scan}",
        )


class _Client(asyncssh.SSHClient):
    def __init__(self, check: _HostKeyCheck) -> None:
        self._check = check

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        quieten(conn)

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        return self._check.decide(key)


def _files(known_hosts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None) -> list[Path]:
    if known_hosts is None:
        return keys.default_known_hosts()
    if isinstance(known_hosts, (str, os.PathLike)):
        return [Path(known_hosts)]
    return [Path(file) for file in known_hosts]


def _explained(
    error: Exception,
    where: Target,
    port: int | None,
    check: _HostKeyCheck,
    identity: str | os.PathLike[str] | None,
    timeout: float,
) -> TransportError:
    """One sentence about what went wrong, and one about what to do."""
    name = keys.host_pattern(where.host, port)
    if isinstance(error, asyncssh.HostKeyNotVerifiable) or check.error is not None:
        return check.refusal(str(error))
    if isinstance(error, asyncssh.KeyExchangeFailed) and check.found is not None and check.found.trusted:
        return check.refusal(str(error))  # it has no key of a type that we know of it
    if isinstance(error, asyncssh.PermissionDenied):
        used = f"the key {identity}" if identity else "any key of ssh's defaults and its agent"
        public = f"{identity}.pub" if identity else "your public key (ssh-keygen makes one)"
        return TransportError(
            f"{where} does not accept {used}",
            hint=f"add {public} to authorized_keys there, or choose another key with --identity",
        )
    if isinstance(error, TimeoutError):
        return TransportError(f"{name} does not answer within {timeout:g} s", hint="is it up, is a firewall between?")
    if isinstance(error, ConnectionRefusedError):
        return TransportError(
            f"nothing listens at {name}", hint="start sshd or `migrator agent` there, or give another port"
        )
    if isinstance(error, socket.gaierror):
        return TransportError(
            f"{where.host} cannot be resolved: {error.strerror}",
            hint="is the name right? An address works too, as USER@10.0.0.2",
        )
    return TransportError(f"cannot connect to {name}: {error}")
