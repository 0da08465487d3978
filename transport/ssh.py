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
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrator.errors import TransportError
from transport import keys
from transport.host_keys import HostKeyCheck
from transport.library import asyncssh
from transport.link import Link
from transport.ssh_channel import CHANNEL_OPTIONS, CONNECTION_OPTIONS, ClientSession, leave_out_ignores

COMMAND = "migrator agent --stdio"
# Whoever orders a migration names both, and a ProxyCommand of root's ssh_config(5) puts them into a command line.
_HOST = re.compile(r"[\w.:%][\w.:%-]*")
_USER = re.compile(r"[\w.+][\w.+@\\-]*")


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
    if not _HOST.fullmatch(host) or (user and not _USER.fullmatch(user)):
        raise TransportError(f"{text[:200]!r} is not user@host:port")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
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
    check = HostKeyCheck(files, accept_new_host_key)
    options: dict[str, Any] = dict(CONNECTION_OPTIONS)
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
        await connection.create_session(lambda: session, command, **CHANNEL_OPTIONS)
    except asyncssh.ChannelOpenError as error:
        if error.code == asyncssh.OPEN_RESOURCE_SHORTAGE:
            raise TransportError(f"{where} has no place left: {error.reason}", hint="try again later") from None
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
        failure = error if link.counters.wire_received else _failed(session, where, command) or error
        await link.close()
        raise failure from None
    return link


def _failed(session: ClientSession, where: Target, command: str) -> TransportError | None:
    """Why a command ended before it introduced itself; None if it is not known to have ended."""
    if session.status is None:
        return None
    stderr = session.stderr_tail()
    hint = "the end of its standard error is in the message; run it there by hand to see more"
    if session.status in (126, 127):
        hint = f"install migrator on {where.host}, or say where it is with --remote-command"
    return TransportError(
        f"{command!r} on {where} ended with status {session.status}" + (f": {stderr}" if stderr else ""),
        hint=hint,
    )


class _Client(asyncssh.SSHClient):
    def __init__(self, check: HostKeyCheck) -> None:
        self._check = check

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        leave_out_ignores(conn)

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
    check: HostKeyCheck,
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
