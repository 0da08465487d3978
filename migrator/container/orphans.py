"""Connections that a container's program has closed before the switchover and its kernel has not finished.

Their last bytes, or only their end, are still to be acknowledged by the peer. No descriptor names such a
connection (tcp(7) calls it orphaned), so it cannot be saved; and the copy's kernel, which does not know it, would
answer its peer with a reset. So it stays where it is until it has ended, and is served through the link:

    peer -> bridge of the destination -> `Relay.diverted()` ... `Orphans.deliver()` -> network of the source copy
    peer <- bridge of the destination <- `Relay.emit()` ... `Orphans.outgoing()` <- network of the source copy
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from migrator.container import connection_filter
from migrator.container.connection_filter import MOST, Connection
from migrator.container.packet_socket import PacketSocket, give_all
from migrator.container.state import Container
from migrator.linux import inet_diag
from migrator.linux.bpf import TCX_EGRESS, tcx
from migrator.linux.namespaces import entered

_ENDING = (inet_diag.FIN_WAIT1, inet_diag.FIN_WAIT2, inet_diag.CLOSING, inet_diag.LAST_ACK)
_LASTING = (inet_diag.FIN_WAIT1, inet_diag.CLOSING, inet_diag.LAST_ACK)  # the peer has not heard all of it


class Orphans:
    """The source's side: the network namespace of a container, kept while orphaned connections live in it.

    All methods belong to one thread. Raises OSError."""

    def __init__(self, container: Container) -> None:
        with contextlib.ExitStack() as stack:
            self._namespace = os.open(f"/proc/{container.init_pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._namespace)
            self._connections = stack.enter_context(connection_filter.connection_set())
            program = stack.enter_context(connection_filter.taking(self._connections))
            self._port = PacketSocket(container.spec.veth, program=program)
            stack.callback(self._port.close)
            self._stack = stack.pop_all()
        self._known: set[Connection] = set()
        self.left_out = 0  # more than can be served

    def handshakes(self) -> int:
        """Connections that a peer has begun and that are not established yet."""
        with entered(self._namespace):
            return sum(1 for _ in inet_diag.tcp_sockets_here((inet_diag.SYN_RECV,)))

    def find(self) -> list[Connection]:
        """The orphaned connections of now, which are served from here on. The port must be shut."""
        with entered(self._namespace):
            there = [s for s in inet_diag.tcp_sockets_here(_ENDING) if s.inode == 0 and not _is_local(s)]
        there.sort(key=lambda sock: sock.state not in _LASTING)
        self.left_out = max(len(there) - MOST, 0)
        found = [Connection(s.local, s.local_port, s.peer, s.peer_port) for s in there[:MOST]]
        for connection in found:
            self._connections.add(connection.outbound)
        self._known.update(found)
        return found

    def outgoing(self) -> list[bytes]:
        """What they have sent since the last call, as frames."""
        return self._port.take() if self._known else []

    def deliver(self, frames: Iterable[bytes]) -> None:
        """Frames of their peers."""
        give_all(self._port, frames)

    def living(self) -> int:
        """How many have not ended, as far as the peer has something to wait for."""
        if not self._known:
            return 0
        with entered(self._namespace):
            return sum(
                Connection(s.local, s.local_port, s.peer, s.peer_port) in self._known
                for s in inet_diag.tcp_sockets_here(_LASTING)
            )

    def close(self) -> None:
        """They end; where they are not served any more, their peers get a reset from the copy's host."""
        self._stack.close()
        self._known.clear()


class Relay:
    """The destination's side. Raises OSError."""

    def __init__(self, container: Container) -> None:
        with contextlib.ExitStack() as stack:
            self._connections = stack.enter_context(connection_filter.connection_set())
            drop = stack.enter_context(connection_filter.dropping(self._connections))
            program = stack.enter_context(connection_filter.taking(self._connections))
            self._bridge = PacketSocket(container.spec.bridge, promiscuous=True, program=program)
            stack.callback(self._bridge.close)
            stack.enter_context(tcx(drop, container.ifindex, TCX_EGRESS))
            self._stack = stack.pop_all()
        self._serves = False

    def divert(self, connections: Iterable[Connection]) -> None:
        """What comes for these does not reach the copy any more, but `diverted()`."""
        for connection in connections:
            self._connections.add(connection.inbound)
            self._serves = True

    def diverted(self) -> list[bytes]:
        """Frames that have come for them since the last call."""
        return self._bridge.take() if self._serves else []

    def close(self) -> None:
        self._stack.close()


def _is_local(sock: inet_diag.TcpSocket) -> bool:
    """Within the container: both ends are there, and nobody outside waits."""
    return sock.local == sock.peer or sock.peer.startswith("127.") or sock.peer == "::1"
