"""TCP and UDP sockets of a tree."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from migrator.engine.user.descriptors import addresses, diag, other_ends, pipes, sockopts, tcp
from migrator.engine.user.descriptors.standing import Connection
from migrator.errors import CheckpointFailed
from migrator.image.codec import Record
from migrator.image.records_files import MAX_CHUNK, Socket, SocketBuffer, SocketState, SocketTcp
from migrator.linux import repair
from migrator.linux.sockets import Ask
from migrator.linux.stat import Status

_WHOLE = 1
_RDHUP = 0x2000
_BIG = 1 << 16
_SIZES = (sockopts.SO_SNDBUF, sockopts.SO_RCVBUF, sockopts.SO_BUF_LOCK)

FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Fetched(Protocol):
    """A socket that is fetched as `fd`. Its str() is a name for messages."""

    @property
    def fd(self) -> int: ...
    @property
    def stat(self) -> Status: ...


Item = tuple[Fetched, socket.SocketType]
Still = Callable[[], contextlib.AbstractContextManager[object]]


class InetDump:
    """Made and collected inside the network namespace of the tree, `pid` being one of its processes.

    still: inside it, no task runs even if this program is killed. Connections are under repair only there.
    standing: more connections, of which only the state is still to be told. own_netns: addresses move along."""

    def __init__(
        self,
        items: Sequence[Item],
        defaults: sockopts.Defaults,
        pid: int,
        still: Still,
        standing: Sequence[Connection] = (),
        *,
        own_netns: bool = True,
    ) -> None:
        self._own_netns = own_netns
        self._items = items
        self._defaults = defaults
        self._pid = pid
        self._still = still
        self._standing = standing
        self._connections: list[Item] = []
        self._ends: list[other_ends.Ends] = []  # of each
        self._sockets: list[Socket] = []
        self._buffers: list[SocketBuffer] = []
        self._states: list[int] = []
        self._numbers: list[tuple[int, ...]] = []
        self._own: list[bytes] = []
        self._peers: list[bytes] = []
        self._devices: list[str] = []
        self._congestion: list[str] = []

    def collect(self) -> None:
        connections = []
        self._ask()
        for at, (item, sock) in enumerate(self._items):
            if sock.proto == socket.IPPROTO_TCP:
                state = self._states[at]
                rec = self._tcp_socket(at, state)
                if state in tcp.CONNECTED:
                    connections.append((item, sock))
                    self._ends.append(other_ends.ends_of(rec.local, rec.peer))
            else:
                rec = self._udp_socket(at)
                self._buffers += self._datagrams(item, sock)
            self._sockets.append(rec)
        if self._sockets:
            peers = {
                at
                for at, rec in enumerate(self._sockets)
                if rec.state in (SocketState.CONNECTED, SocketState.PEER_GONE)
            }
            options = self._defaults.changed([sock for _, sock in self._items], peers)
            for (item, _), rec, changed in zip(self._items, self._sockets, options, strict=True):
                sockopts.check(changed, item)
                rec.options = changed
        self._shutdowns()
        self._look_at([item for item, _ in connections])
        self._connections = connections
        # a name is taken by its listener first; connections get past it in repair mode
        self._sockets.sort(key=lambda rec: rec.state == SocketState.CONNECTED)

    def _shutdowns(self) -> None:
        """What was shut down of UDP sockets."""
        for family in {rec.family for rec in self._sockets if rec.protocol == socket.IPPROTO_UDP}:
            shut = diag.shutdowns_of_udp(family)
            for rec in self._sockets:
                if rec.protocol == socket.IPPROTO_UDP and rec.family == family:
                    rec.shutdown = shut.get(rec.objref, 0)

    def _look_at(self, connections: Sequence[Fetched]) -> None:
        """What of connections only poll(2) tells: that they are shut down for reading, and that urgent data waits."""
        poll = select.poll()
        for item in connections:
            poll.register(item.fd, select.POLLPRI | _RDHUP)
        seen = dict(poll.poll(0)) if connections else {}
        if not seen:
            return
        at = {item.fd: number for number, (item, _) in enumerate(self._items)}
        records = {rec.objref: rec for rec in self._sockets}
        for item in connections:
            events = seen.get(item.fd, 0)
            if events & select.POLLPRI:
                raise CheckpointFailed(
                    f"{item}: urgent data (MSG_OOB) waits in this connection",
                    hint="try again: a moment later the program will have taken it",
                )
            if events & _RDHUP and self._states[at[item.fd]] not in tcp.GOT_FIN:
                records[item.stat.st_ino].shutdown = 1

    @property
    def connections(self) -> Iterator[Socket]:
        """The records of connections; their objrefs are inode numbers."""
        return (rec for rec in self._sockets if rec.state == SocketState.CONNECTED and rec.type == socket.SOCK_STREAM)

    def sockets(self, objref: Callable[[int], int]) -> Iterator[Socket]:
        for rec in self._sockets:
            rec.objref = objref(rec.objref)
            yield rec

    def buffers(self, objref: Callable[[int], int]) -> Iterator[Record]:
        """Connections of TCP are in repair mode when they are looked at for this, and only then. All together: what one
        end has sent the other may have, or not yet."""
        connections = [(item.fd, objref(item.stat.st_ino), item) for item, _ in self._connections]
        whole = [*connections, *((one.fd, one.objref, one) for one in self._standing)]
        states: list[SocketTcp] = []
        if whole:
            with self._still(), _under_repair([fd for fd, _, _ in whole]):
                states = tcp.save_all(whole)
            self._check_other_ends([who for _, _, who in whole], [rec.state for rec in states])
        yield from states
        for rec in self._buffers:
            rec.socket_objref = objref(rec.socket_objref)
            yield rec

    def _check_other_ends(self, whole: Sequence[object], states: Sequence[int]) -> None:
        """Raises CheckpointFailed if one within this host has its other end elsewhere, and not all that it said."""
        ends = self._ends + [one.ends for one in self._standing]
        strangers = other_ends.strangers(ends)
        here = [at for at in strangers if other_ends.on_one_host(ends[at])]
        if not self._own_netns and len(here) < len(strangers):
            at = next(at for at in strangers if at not in here)
            raise CheckpointFailed(f"{whole[at]}: {other_ends.STAYS}", hint="the workload runs on, untouched")
        found = other_ends.obstacles([(ends[at], states[at]) for at in here], self._pid)
        for at, why in zip(here, found, strict=True):
            if why:
                raise CheckpointFailed(
                    f"{whole[at]}: a connection within this host: {why}",
                    hint="try again: a moment later it may have changed",
                )

    def close(self, *, silent: bool) -> None:
        """silent: the tasks, held by their cgroup, are about to be killed, and no peer is to hear of it."""
        if silent:
            ask = Ask([*(item.fd for item, _ in self._connections), *(one.fd for one in self._standing)])
            ask.put(socket.IPPROTO_TCP, repair.TCP_REPAIR, repair.ON)
            ask.make()  # of each, whatever became of the others
        self._connections.clear()
        self._standing = ()

    def _ask(self) -> None:
        """Of all sockets what getsockopt(2) and the like tell, one list each."""
        ask = Ask([item.fd for item, _ in self._items])
        states = ask.option(socket.IPPROTO_TCP, tcp.TCP_INFO, 8)
        sizes = [ask.option(sockopts.SOL_SOCKET, name) for name in _SIZES]
        own, peers = ask.own_name(), ask.peer_name()
        devices = ask.option(sockopts.SOL_SOCKET, sockopts.SO_BINDTODEVICE, 64)
        congestion = ask.option(sockopts.SOL_TCP, sockopts.TCP_CONGESTION, 64)
        ask.make()
        for answers in (*sizes, own):
            answers.check("looking at a socket")
        self._states = [raw[0] if raw else 0 for raw in states.all()]
        self._numbers = list(zip(*(answers.numbers() for answers in sizes), strict=True))
        self._own, self._peers = own.all(), peers.all()
        self._devices, self._congestion = devices.texts(), congestion.texts()

    # objrefs of the records are inode numbers until they are written

    def _record(self, at: int, state: SocketState, peer: bytes, backlog: int = 0) -> Socket:
        """Without its options: those are asked of all together."""
        item, sock = self._items[at]
        sndbuf, rcvbuf, buf_lock = self._numbers[at]
        return Socket(
            objref=item.stat.st_ino,
            family=sock.family,
            type=sock.type,
            protocol=sock.proto,
            state=state,
            shutdown=0,
            backlog=backlog,
            peer_objref=0,
            # Odd only by the kernel's own tuning, and never had again: setsockopt(2) doubles what it is given.
            sndbuf=sndbuf & ~1,
            rcvbuf=rcvbuf & ~1,
            buf_lock=buf_lock,
            mode=0,
            uid=item.stat.st_uid,
            gid=item.stat.st_gid,
            error=0,
            local=self._own[at],
            peer=peer,
            path="",
            device=self._devices[at],
            congestion=self._congestion[at] if sock.proto == socket.IPPROTO_TCP else "",
            options=[],
        )

    def _tcp_socket(self, at: int, state: int) -> Socket:
        item, sock = self._items[at]
        if state == tcp.LISTEN:
            waiting, backlog = tcp.listening(sock)
            if waiting:
                raise CheckpointFailed(
                    f"{item}: {waiting} connections to {_own_name(sock)} wait to be accepted",
                    hint="try again: a moment later the program will have accepted them",
                )
            return self._record(at, SocketState.LISTENING, b"", backlog)
        if state in tcp.CONNECTED:
            if not self._peers[at]:
                raise CheckpointFailed(f"{item}: the connection of {_own_name(sock)} has just ended")
            return self._record(at, SocketState.CONNECTED, self._peers[at])
        if state == tcp.SYN_SENT:
            peer = diag.peer_of_connecting(self._pid, item.stat.st_ino)
            return self._record(at, SocketState.CONNECTING, peer)
        if state != tcp.CLOSE:
            raise CheckpointFailed(f"{item}: a connection of {_own_name(sock)} in TCP state {state}")
        return self._closed(at)

    def _closed(self, at: int) -> Socket:
        """Never connected, or at its end: what was received may still be there to be read."""
        item, sock = self._items[at]
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN | _RDHUP)
        events = sum(event for _, event in poll.poll(0))
        if not events & _RDHUP:
            return self._record(at, SocketState.UNCONNECTED, b"")
        rec = self._record(at, SocketState.PEER_GONE, b"")
        rec.shutdown = 3
        # which error it is cannot be asked without taking it; a reset is the one that happens
        rec.error = errno.ECONNRESET if events & select.POLLERR else 0
        if waiting := pipes.waiting(sock.fileno()):
            data = sock.recv(waiting, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            for start in range(0, len(data), MAX_CHUNK):
                chunk = data[start : start + MAX_CHUNK]
                self._buffers.append(SocketBuffer(item.stat.st_ino, 0, chunk, b""))
        return rec

    def _udp_socket(self, at: int) -> Socket:
        peer = self._peers[at]
        return self._record(at, SocketState.CONNECTED if peer else SocketState.UNCONNECTED, peer)

    def _datagrams(self, item: Fetched, sock: socket.SocketType) -> Iterator[SocketBuffer]:
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
def _under_repair(fds: Sequence[int]) -> Iterator[None]:
    """SO_REUSEADDR is put back at once: who finds a connection under repair reads there what it is to be."""
    ask = Ask(fds)
    reuse = ask.option(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    ask.make()
    reuse.check("SO_REUSEADDR")
    values = reuse.numbers()
    enter = Ask(fds)
    entered = enter.put(socket.IPPROTO_TCP, repair.TCP_REPAIR, 1)
    enter.put(socket.SOL_SOCKET, socket.SO_REUSEADDR, values)
    try:
        enter.make()
        entered.check("TCP_REPAIR")
        yield
    finally:
        inside = [at for at, result in enumerate(entered.results) if result == 0]
        leave = Ask([fds[at] for at in inside])
        leave.put(socket.IPPROTO_TCP, repair.TCP_REPAIR_QUEUE, repair.NO_QUEUE)
        leave.put(socket.IPPROTO_TCP, repair.TCP_REPAIR, repair.OFF_WITHOUT_PROBE)
        leave.put(socket.SOL_SOCKET, socket.SO_REUSEADDR, [values[at] for at in inside])
        leave.make()  # of each, whatever became of the others


def _own_name(sock: socket.SocketType) -> str:
    try:
        return addresses.show(addresses.pack(sock.family, sock.getsockname()))
    except OSError as error:
        return os.strerror(error.errno or 0)
