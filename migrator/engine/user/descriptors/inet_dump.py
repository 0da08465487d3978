"""TCP and UDP sockets of a tree."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Hashable, Iterator, Sequence

from migrator.engine.user.descriptors import addresses, diag, pipes, sockopts, tcp
from migrator.engine.user.descriptors.description import Description
from migrator.errors import CheckpointFailed
from migrator.image.codec import Record
from migrator.image.records_files import MAX_CHUNK, Socket, SocketBuffer, SocketState, SocketTcp
from migrator.linux import repair

_WHOLE = 1
_RDHUP = 0x2000
_BIG = 1 << 16

Item = tuple[Description, socket.socket]
Still = Callable[[], contextlib.AbstractContextManager[object]]


class InetDump:
    """Made and collected inside the network namespace of the tree, `pid` being one of its processes.

    still: inside it, no task runs even if this program is killed. Connections are under repair only there."""

    def __init__(self, items: Sequence[Item], defaults: sockopts.Defaults, pid: int, still: Still) -> None:
        self._items = items
        self._defaults = defaults
        self._pid = pid
        self._still = still
        self._connections: list[socket.socket] = []
        self._sockets: list[Socket] = []
        self._buffers: list[SocketBuffer | SocketTcp] = []

    def collect(self) -> None:
        connections = []
        for item, sock in self._items:
            if sock.proto == socket.IPPROTO_TCP:
                state = tcp.state_of(sock)
                rec = self._tcp_socket(item, sock, state)
                if state in tcp.CONNECTED:
                    connections.append((item, sock))
            else:
                rec = self._udp_socket(item, sock)
                self._buffers += self._datagrams(item, sock)
            self._sockets.append(rec)
        self._shutdowns()
        self._connections = [sock for _, sock in connections]
        if connections:
            with self._still(), _under_repair(self._connections):
                self._buffers += tcp.save_all([(sock, item.stat.st_ino, str(item)) for item, sock in connections])
        # a name is taken by its listener first; connections get past it in repair mode
        self._sockets.sort(key=lambda rec: rec.state == SocketState.CONNECTED)

    def _shutdowns(self) -> None:
        """What was shut down of UDP sockets."""
        for family in {rec.family for rec in self._sockets if rec.protocol == socket.IPPROTO_UDP}:
            shut = diag.shutdowns_of_udp(family)
            for rec in self._sockets:
                if rec.protocol == socket.IPPROTO_UDP and rec.family == family:
                    rec.shutdown = shut.get(rec.objref, 0)

    def sockets(self, objref: Callable[[Hashable], int]) -> Iterator[Record]:
        for rec in self._sockets:
            rec.objref = objref(("socket", rec.objref))
            yield rec

    def buffers(self, objref: Callable[[Hashable], int]) -> Iterator[Record]:
        for rec in self._buffers:
            rec.socket_objref = objref(("socket", rec.socket_objref))
            yield rec

    def close(self, *, silent: bool) -> None:
        """silent: the tasks, held by their cgroup, are about to be killed, and no peer is to hear of it."""
        if silent:
            for sock in self._connections:
                with contextlib.suppress(OSError):
                    repair.repair(sock)
        self._connections.clear()

    # objrefs of the records are inode numbers until they are written

    def _record(
        self, item: Description, sock: socket.socket, state: SocketState, peer: bytes, backlog: int = 0
    ) -> Socket:
        query = sock.getsockopt
        stream = sock.proto == socket.IPPROTO_TCP
        return Socket(
            objref=item.stat.st_ino,
            family=sock.family,
            type=sock.type,
            protocol=sock.proto,
            state=state,
            shutdown=0,
            backlog=backlog,
            peer_objref=0,
            sndbuf=query(sockopts.SOL_SOCKET, sockopts.SO_SNDBUF),
            rcvbuf=query(sockopts.SOL_SOCKET, sockopts.SO_RCVBUF),
            buf_lock=query(sockopts.SOL_SOCKET, sockopts.SO_BUF_LOCK),
            mode=0,
            uid=item.stat.st_uid,
            gid=item.stat.st_gid,
            error=0,
            local=addresses.pack(sock.family, sock.getsockname()),
            peer=peer,
            path="",
            device=sockopts.text(sock, sockopts.SOL_SOCKET, sockopts.SO_BINDTODEVICE),
            congestion=sockopts.text(sock, sockopts.SOL_TCP, sockopts.TCP_CONGESTION) if stream else "",
            options=self._defaults.changed(sock, connected=state in (SocketState.CONNECTED, SocketState.PEER_GONE)),
        )

    def _tcp_socket(self, item: Description, sock: socket.socket, state: int) -> Socket:
        if state == tcp.LISTEN:
            waiting, backlog = tcp.listening(sock)
            if waiting:
                raise CheckpointFailed(
                    f"{item}: {waiting} connections to {_own_name(sock)} wait to be accepted",
                    hint="try again: a moment later the program will have accepted them",
                )
            return self._record(item, sock, SocketState.LISTENING, b"", backlog)
        if state in tcp.CONNECTED:
            peer = addresses.pack(sock.family, sock.getpeername())
            return self._record(item, sock, SocketState.CONNECTED, peer)
        if state == tcp.SYN_SENT:
            peer = diag.peer_of_connecting(self._pid, item.stat.st_ino)
            return self._record(item, sock, SocketState.CONNECTING, peer)
        if state != tcp.CLOSE:
            raise CheckpointFailed(f"{item}: a connection of {_own_name(sock)} in TCP state {state}")
        return self._closed(item, sock)

    def _closed(self, item: Description, sock: socket.socket) -> Socket:
        """Never connected, or at its end: what was received may still be there to be read."""
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN | _RDHUP)
        events = sum(event for _, event in poll.poll(0))
        if not events & _RDHUP:
            return self._record(item, sock, SocketState.UNCONNECTED, b"")
        rec = self._record(item, sock, SocketState.PEER_GONE, b"")
        rec.shutdown = 3
        # which error it is cannot be asked without taking it; a reset is the one that happens
        rec.error = errno.ECONNRESET if events & select.POLLERR else 0
        if waiting := pipes.waiting(sock.fileno()):
            data = sock.recv(waiting, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            for start in range(0, len(data), MAX_CHUNK):
                chunk = data[start : start + MAX_CHUNK]
                self._buffers.append(SocketBuffer(item.stat.st_ino, 0, chunk, b""))
        return rec

    def _udp_socket(self, item: Description, sock: socket.socket) -> Socket:
        try:
            peer = addresses.pack(sock.family, sock.getpeername())
        except OSError:
            return self._record(item, sock, SocketState.UNCONNECTED, b"")
        return self._record(item, sock, SocketState.CONNECTED, peer)

    def _datagrams(self, item: Description, sock: socket.socket) -> Iterator[SocketBuffer]:
        """Datagrams that wait, left in place."""
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        if not poll.poll(0):
            return
        before = sock.getsockopt(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF)
        sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF, 0)
        try:
            while True:
                try:
                    data, _, _, sender = sock.recvmsg(_BIG, 4096, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                except OSError:
                    return
                yield SocketBuffer(item.stat.st_ino, _WHOLE, data, addresses.pack(sock.family, sender))
        finally:
            sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF, before)


@contextlib.contextmanager
def _under_repair(connections: Sequence[socket.socket]) -> Iterator[None]:
    """SO_REUSEADDR is put back at once: who finds a connection under repair reads there what it is to be."""
    entered = []
    try:
        for sock in connections:
            reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            repair.repair(sock)
            entered.append(sock)
            repair.reuse_address(sock, reuse)
        yield
    finally:
        for sock in entered:
            with contextlib.suppress(OSError):  # one that was reset must not keep the others under repair
                repair.leave(sock, probe=False)


def _own_name(sock: socket.socket) -> str:
    try:
        return addresses.show(addresses.pack(sock.family, sock.getsockname()))
    except OSError as error:
        return os.strerror(error.errno or 0)
