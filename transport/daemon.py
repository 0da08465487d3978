"""The SSH server of `migrator agent`: links and nothing else.

Keys and what each may do come from a file that is read anew for every login, so that taking a
line out takes effect at once (`transport.authorized_keys`):

    migrator-rights="receive,observe",from="10.0.0.0/8" ssh-ed25519 AAAA… source-host

No shell, no command, no forwarding, no file transfer: whatever is asked for but a link is
refused. The user name a client gives means nothing and is only logged.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from migrator.errors import MigratorError
from migrator.text import printable
from transport import keys
from transport.authorized_keys import KeyFile
from transport.library import asyncssh
from transport.link import Link
from transport.slots import Slots
from transport.ssh_channel import CHANNEL_OPTIONS, CONNECTION_OPTIONS, ChannelCallbacks, leave_out_ignores

log = logging.getLogger("migrator.transport")

SUBSYSTEM = "migrator"
_USER_SHOWN = 64  # characters
LOGIN_SECONDS = 10  # to log in, and then again to open the link

Handler = Callable[[Link, str, frozenset[str]], Awaitable[None]]
"""Given the link, the peer's name and its rights; the link is closed when it returns."""
ConnectionSlots = Slots[asyncssh.SSHServerConnection]


class _Sessions:
    """What a daemon has open."""

    def __init__(
        self, authorized_keys: KeyFile, handler: Handler, slots: ConnectionSlots, link_options: dict[str, Any]
    ) -> None:
        self.authorized_keys = authorized_keys
        self.handler = handler
        self.slots = slots
        self.link_options = link_options
        self.tasks: set[asyncio.Task[None]] = set()


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
        for connection in self._sessions.slots.connections():
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
    slots: ConnectionSlots | None = None,
    **link_options: Any,
) -> Daemon:
    """Listen on `host`:`port` (0 for any) and call `handler` for every link.

    host_keys:       private key files; made if missing, with certificates beside them (`keys.host_key`)
    authorized_keys: who may come in; a file that is missing or that others may write lets nobody in
    slots:           how many connections there may be

    Raises OSError if the address cannot be bound, `TransportError` for unusable keys.
    """
    sessions = _Sessions(KeyFile(authorized_keys), handler, slots or Slots(), link_options)
    loaded = [keys.host_key(path) for path in host_keys]
    acceptor = await asyncssh.create_server(
        lambda: _Server(sessions),
        host,
        port,
        server_host_keys=loaded,
        login_timeout=LOGIN_SECONDS,
        password_auth=False,
        kbdint_auth=False,
        host_based_auth=False,
        gss_host=None,
        allow_scp=False,
        line_editor=False,
        agent_forwarding=False,
        reuse_address=True,
        **CONNECTION_OPTIONS,
        **CHANNEL_OPTIONS,
    )
    return Daemon(acceptor, sessions)


class _Server(asyncssh.SSHServer):
    """One connection: logs in by key, may open one link."""

    _connection: asyncssh.SSHServerConnection

    def __init__(self, sessions: _Sessions) -> None:
        self._sessions = sessions
        self._key = ""  # the fingerprint of the one that was shown last; after the login, of the one that was proved
        self._rights: frozenset[str] = frozenset()
        self._user = ""
        self._addr = ""
        self._logged_in = False
        self._has_slot = False
        self._asked = False
        self._linked = False

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._addr = (conn.get_extra_info("peername") or ("",))[0]
        leave_out_ignores(conn)
        leaves = self._sessions.slots.arrived(
            conn, self._addr, lambda: conn.get_extra_info("client_version") is not None
        )
        if leaves is not None:
            log.debug("%s has to leave for a connection from %s", leaves.get_extra_info("peername"), self._addr)
            leaves.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._sessions.slots.left(self._connection)

    def auth_completed(self) -> None:
        self._logged_in = True
        self._has_slot = self._sessions.slots.logged_in(self._connection, self._key)
        if not self._has_slot:
            log.warning("%s@%s: no place left for the key %s", self._user, self._addr, self._key)
        asyncio.get_running_loop().call_later(LOGIN_SECONDS, self._end_if_idle)

    def begin_auth(self, username: str) -> bool:
        self._user = printable(username[:_USER_SHOWN])
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        if self._logged_in:  # the rights stay those of the key that was proved
            return False
        self._key = keys.fingerprint(key)
        self._rights = self._sessions.authorized_keys.rights(key, self._addr)
        if not self._rights:
            log.warning("%s: key %s of %s is not authorized", self._addr, self._key, self._user)
        return bool(self._rights)

    def session_requested(self) -> Any:
        if self._asked:
            return False
        if not self._has_slot:
            slots = self._sessions.slots
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_RESOURCE_SHORTAGE,
                f"{slots.after_login} links are open there; there may be {slots.links}, "
                f"and {slots.peer_share} of one key",
            )
        self._asked = True
        return _ServerSession(Link(self._addr, **self._sessions.link_options), self._run)

    def _end_if_idle(self) -> None:
        if not self._linked:
            self._connection.abort()

    def _run(self, link: Link) -> None:
        self._linked = True
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
            self._connection.close()


class _ServerSession(ChannelCallbacks, asyncssh.SSHServerSession[bytes]):
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
