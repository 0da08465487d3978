"""The SSH server of `migrator agent`: links and nothing else.

Keys and what each may do come from a file in authorized_keys format (sshd(8)), read anew for
every login, so that taking a line out takes effect at once:

    migrator-rights="receive,observe",from="10.0.0.0/8" ssh-ed25519 AAAA… source-host

No shell, no command, no forwarding, no file transfer: whatever is asked for but a link is
refused. The user name a client gives means nothing and is only logged.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncssh

from migrator.errors import MigratorError
from transport import keys
from transport.link import Link
from transport.ssh import CHANNEL, TUNING, _SessionCallbacks, quieten

log = logging.getLogger("migrator.transport")

RIGHTS = frozenset({"receive", "send", "observe"})
"""receive: bring workloads here; send: have workloads sent away from here; observe: look only."""
OPTION = "migrator-rights"
SUBSYSTEM = "migrator"
LOGIN_SECONDS = 10  # to log in, and then again to open the link
MAX_CONNECTIONS = 64  # at a time; more are turned away, before they could cost anything

Handler = Callable[[Link, str, frozenset[str]], Awaitable[None]]
"""Given the link, the peer's name and its rights; the link is closed when it returns."""


class _Sessions:
    """What a daemon has open."""

    def __init__(self, authorized_keys: Path, handler: Handler, link_options: dict[str, Any]) -> None:
        self.authorized_keys = authorized_keys
        self.handler = handler
        self.link_options = link_options
        self.tasks: set[asyncio.Task[None]] = set()
        self.connections: set[asyncssh.SSHServerConnection] = set()


class Daemon:
    """A listening server. Leaving the block stops listening and ends all links."""

    def __init__(self, acceptor: asyncssh.SSHAcceptor, sessions: _Sessions) -> None:
        self._acceptor = acceptor
        self._sessions = sessions

    @property
    def port(self) -> int:
        return int(self._acceptor.get_port())

    async def close(self) -> None:
        """Stop listening, cancel the handlers and wait for them."""
        self._acceptor.close()
        tasks = list(self._sessions.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._sessions.connections):
            connection.abort()
        await self._acceptor.wait_closed()

    async def __aenter__(self) -> Daemon:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


async def serve(
    host: str,
    port: int,
    *,
    host_keys: Sequence[str | os.PathLike[str]],
    authorized_keys: str | os.PathLike[str],
    handler: Handler,
    **link_options: Any,
) -> Daemon:
    """Listen on `host`:`port` (0 for any) and call `handler` for every link.

    host_keys:       private key files; made if missing (`keys.ensure_key`)
    authorized_keys: who may come in; a missing file lets nobody in

    Raises OSError if the address cannot be bound, `TransportError` for unusable keys.
    """
    sessions = _Sessions(Path(authorized_keys), handler, link_options)
    loaded = [keys.ensure_key(path) for path in host_keys]
    acceptor = await asyncssh.create_server(
        lambda: _Server(sessions),
        host,
        port,
        server_host_keys=loaded,
        login_timeout=LOGIN_SECONDS,
        allow_scp=False,
        agent_forwarding=False,
        reuse_address=True,
        **TUNING,
        **CHANNEL,
    )
    return Daemon(acceptor, sessions)


def rights_of(options: Mapping[str, object]) -> frozenset[str]:
    """The rights that the options of an authorized_keys line give.

    Without the option: all of them, as a key without restrictions has in sshd. A word that is
    not a right makes the whole line void, so that a typing error never gives more.
    """
    value = options.get(OPTION)
    if value is None:
        return RIGHTS
    texts = value if isinstance(value, list) else [value]
    words = {word.strip() for text in texts if isinstance(text, str) for word in text.split(",")}
    return frozenset(words) if words and words <= RIGHTS else frozenset()


def authorize(file: Path, key: asyncssh.SSHKey, addr: str) -> frozenset[str]:
    """The rights of `key` for a client at `addr`; none if the file does not have it."""
    try:
        entries = asyncssh.read_authorized_keys(str(file))
    except (OSError, ValueError) as error:
        log.warning("nobody can log in: %s: %s", file, error)
        return frozenset()
    options = entries.validate(key, addr, addr)
    return frozenset() if options is None else rights_of(options)


class _Server(asyncssh.SSHServer):
    """One connection: logs in by key, may open one link."""

    def __init__(self, sessions: _Sessions) -> None:
        self._sessions = sessions
        self._connection: asyncssh.SSHServerConnection | None = None
        self._rights: frozenset[str] = frozenset()
        self._key = ""  # the fingerprint of the one that was shown last; after the login, of the one that was proved
        self._user = ""
        self._addr = ""
        self._linked = False

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._addr = (conn.get_extra_info("peername") or ("",))[0]
        if len(self._sessions.connections) >= MAX_CONNECTIONS:
            log.warning("%s is turned away: %d connections are open", self._addr, MAX_CONNECTIONS)
            conn.abort()
            return
        self._sessions.connections.add(conn)
        quieten(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connection is not None:
            self._sessions.connections.discard(self._connection)

    def auth_completed(self) -> None:
        asyncio.get_running_loop().call_later(LOGIN_SECONDS, self._end_if_idle)

    def begin_auth(self, username: str) -> bool:
        self._user = username
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        self._key = keys.fingerprint(key)
        self._rights = authorize(self._sessions.authorized_keys, key, self._addr)
        if not self._rights:
            log.warning("%s: key %s of %s is not authorized", self._addr, self._key, username)
        return bool(self._rights)

    def session_requested(self) -> Any:
        if self._linked:
            return False
        self._linked = True
        return _ServerSession(Link(self._addr, **self._sessions.link_options), self._run)

    def _end_if_idle(self) -> None:
        if not self._linked and self._connection is not None:
            self._connection.close()

    def _run(self, link: Link) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(link), name=f"link {self._addr}")
        self._sessions.tasks.add(task)
        task.add_done_callback(self._sessions.tasks.discard)

    async def _serve(self, link: Link) -> None:
        try:
            await link.established()
            link.key = self._key
            await self._sessions.handler(link, f"{self._user}@{self._addr}", self._rights)
        except MigratorError as error:
            log.info("%s: %s", self._addr, error)
        except Exception:
            log.exception("%s: the handler failed", self._addr)
        finally:
            await link.close()
            if self._connection is not None:
                self._connection.close()


class _ServerSession(_SessionCallbacks, asyncssh.SSHServerSession[bytes]):
    def __init__(self, link: Link, run: Callable[[Link], None]) -> None:
        super().__init__(link)
        self._run = run

    def pty_requested(self, *args: Any) -> bool:
        return False

    def shell_requested(self) -> bool:
        return False

    def exec_requested(self, command: str) -> bool:
        # Nothing is executed; this is what `transport.ssh.connect` asks any sshd for.
        words = command.split()
        return "agent" in words and "--stdio" in words

    def subsystem_requested(self, subsystem: str) -> bool:
        return subsystem == SUBSYSTEM

    def session_started(self) -> None:
        super().session_started()
        self._run(self.link)
