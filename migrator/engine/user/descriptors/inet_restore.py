"""TCP and UDP sockets made again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from migrator.engine.user.descriptors import addresses, other_ends, packet, sockopts, tcp
from migrator.engine.user.descriptors.made_sockets import MadeSockets
from migrator.engine.user.descriptors.netns import NetNs
from migrator.errors import ImageError, RestartFailed
from migrator.image.records_files import (
    MAX_CHUNK,
    Socket,
    SocketBuffer,
    SocketState,
    SocketTcp,
)
from migrator.linux import repair
from migrator.linux.sockets import Ask

_TYPES = {(socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP)}
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_MAX_WAITING = 64 << 20
_EARLY = {  # options that decide about addresses and routes: set ahead of bind and connect
    (sockopts.SOL_SOCKET, 2),
    (sockopts.SOL_SOCKET, 5),
    (sockopts.SOL_SOCKET, 15),
    (sockopts.SOL_SOCKET, 36),
    (sockopts.SOL_IP, sockopts.IP_FREEBIND),
    (sockopts.SOL_IP, 24),
    (sockopts.SOL_IPV6, sockopts.IPV6_V6ONLY),
    (sockopts.SOL_IPV6, sockopts.IPV6_FREEBIND),
}
_TRANSPARENT = {
    socket.AF_INET: (sockopts.SOL_IP, sockopts.IP_TRANSPARENT),
    socket.AF_INET6: (sockopts.SOL_IPV6, sockopts.IPV6_TRANSPARENT),
}
_AT_ONCE = 128  # connections that are made together
_INITIAL_WINDOW, _MAX_SEGMENT = 10, 1400  # segments (RFC 6928), and bytes
_PATIENCE = 2.0  # seconds for a packet to pass the loopback device; on an idle machine it takes some microseconds


class InetRestore(MadeSockets[socket.SocketType]):
    """Sockets are made as they come; connections of TCP when their SocketTcp comes, and stay under repair.

    After settle() the kernel has all of a connection: whoever takes it out of repair mode, be it another agent,
    has made it whole. activate() does no more than that, and saves the peer a wait."""

    def __init__(self, net: NetNs) -> None:
        super().__init__()
        self._net = net
        self._records: dict[int, Socket] = {}
        self._tcp: dict[int, SocketTcp] = {}
        self._early: set[int] = set()  # sockets of connections that were made ahead of the freeze
        self._due: list[SocketTcp] = []  # those whose connections are still to be made
        self._buffers: list[SocketBuffer] = []
        self._bytes = 0
        self._injector: packet.Injector | None = None
        self._all_made = False
        self._shared: dict[tuple[int, bytes], set[int]] = {}  # by protocol and port: flags that sharing it takes
        self._groups: dict[Hashable, list[int]] = {}  # by _sharers()
        self._own = os.geteuid(), os.getegid()

    def add(self, rec: Socket) -> None:
        if rec.family not in _FAMILIES or (rec.type, rec.protocol) not in _TYPES:
            raise ImageError(f"socket {rec.objref}: family {rec.family}, type {rec.type}, {rec.protocol}")
        for raw in (rec.local, rec.peer):
            if raw and (len(raw) != (16 if rec.family == socket.AF_INET else 28) or raw[:1] != bytes([rec.family])):
                raise ImageError(f"socket {rec.objref}: an address of another family")
        self._records[rec.objref] = rec
        if rec.state in (SocketState.CONNECTED, SocketState.CONNECTING) and addresses.is_any(rec.peer):
            raise ImageError(f"socket {rec.objref}: connected to nobody")

    def add_early(self, rec: Socket) -> None:
        """Make the socket of a connection ahead of the freeze. It has no address before tcp(), which may never come."""
        self.add(rec)
        self._early.add(rec.objref)
        self._open([rec])

    def is_early(self, objref: int) -> bool:
        return objref in self._early

    def has_come(self, objref: int) -> bool:
        """Whether the state of a connection came."""
        return objref in self._tcp

    def _make_all(self) -> None:
        """Make what is no connection, once all Sockets came: who shares an address with whom is known then."""
        if self._all_made:
            return
        self._all_made = True
        for rec in self._records.values():  # those that came early and not since, too: it does no harm
            for which in (sockopts.SO_REUSEADDR, sockopts.SO_REUSEPORT):
                if _option(rec, sockopts.SOL_SOCKET, which):
                    self._shared.setdefault((rec.protocol, rec.local[2:4]), set()).add(which)
        for rec in self._records.values():
            if rec.type != socket.SOCK_STREAM or rec.state not in (SocketState.CONNECTED, SocketState.PEER_GONE):
                self._make(rec)
        for rec in self._records.values():  # while others came, each had what sharing takes
            there = rec.objref in self._made and rec.objref not in self._early
            for which in self._flags_shared(rec) if there else ():
                option = _option(rec, sockopts.SOL_SOCKET, which)
                self._made[rec.objref].setsockopt(sockopts.SOL_SOCKET, which, option)

    def _flags_shared(self, rec: Socket) -> set[int]:
        """The flags that any socket with the port of `rec` has: all had them when they were bound."""
        return set() if addresses.is_any(rec.local) else self._shared.get((rec.protocol, rec.local[2:4]), set())

    def _make(self, rec: Socket) -> None:
        (sock,) = self._open([rec])
        for which in self._flags_shared(rec):
            sock.setsockopt(sockopts.SOL_SOCKET, which, 1)
        with self._named(rec.family, [rec], [sock]):
            self._bind(rec, sock)
            if rec.type == socket.SOCK_DGRAM and rec.state == SocketState.CONNECTED:
                sock.connect(addresses.unpack(rec.peer))
        self._groups.setdefault(_sharers(rec), []).append(rec.objref)
        self._options(rec, sock, early=False)
        if rec.state == SocketState.LISTENING:
            if rec.type != socket.SOCK_STREAM:
                raise ImageError(f"socket {rec.objref}: a datagram socket that listens")
            try:
                sock.listen(min(rec.backlog, 1 << 20))
            except OSError as error:
                raise RestartFailed(f"cannot listen on {addresses.show(rec.local)}: {error}") from error

    def tcp(self, rec: SocketTcp) -> None:
        """Make a connection of TCP, in repair mode: together with those that come next."""
        self._make_all()
        tcp.check(rec)
        objref = rec.socket_objref
        made = objref in self._made and objref not in self._early
        if objref in self._tcp or made or self._records[objref].state != SocketState.CONNECTED:
            raise ImageError(f"socket {objref}: the state of a connection, but none is due")
        self._tcp[objref] = rec
        self._due.append(rec)
        if len(self._due) == _AT_ONCE:
            self._connect()

    def _connect(self) -> None:
        due, self._due = self._due, []
        for family in _FAMILIES:
            of_family = [(self._records[rec.socket_objref], rec) for rec in due]
            of_family = [(owner, rec) for owner, rec in of_family if owner.family == family]
            if of_family:
                self._connect_all(family, of_family)

    def _connect_all(self, family: int, due: Sequence[tuple[Socket, SocketTcp]]) -> None:
        owners = [owner for owner, _ in due]
        self._open([owner for owner in owners if owner.objref not in self._early])
        socks = [self._made[owner.objref] for owner in owners]
        with self._named(family, owners, socks):
            tcp.make_all([(sock, owner, rec) for sock, (owner, rec) in zip(socks, due, strict=True)])
        _control_congestion(owners, socks)
        ask = Ask([sock.fileno() for sock in socks])
        asked = sockopts.ask_buffers(ask, [owner.sndbuf for owner in owners], [owner.rcvbuf for owner in owners])
        locks = [owner.buf_lock & 3 for owner in owners]
        asked.append((ask.put(sockopts.SOL_SOCKET, sockopts.SO_BUF_LOCK, locks), "SO_BUF_LOCK"))
        reuse = [_option(owner, sockopts.SOL_SOCKET, sockopts.SO_REUSEADDR) for owner in owners]
        asked.append((ask.put(sockopts.SOL_SOCKET, sockopts.SO_REUSEADDR, reuse), "SO_REUSEADDR"))
        ask.make()
        for answers, what in asked:
            answers.check(what)
        for sock, owner in zip(socks, owners, strict=True):
            self._options(owner, sock, early=False)

    def buffer(self, rec: SocketBuffer) -> None:
        self._bytes += len(rec.data) + 64
        if self._bytes > _MAX_WAITING or len(rec.data) > MAX_CHUNK:
            raise ImageError(f"socket {rec.socket_objref}: more on its way than sockets hold")
        self._buffers.append(rec)

    def settle(self) -> None:
        """What needs all sockets to stand: contents, what is still to be sent, and connections to be made.

        What is sent here leaves when the network opens, or is sent again by the kernel."""
        self._make_all()
        self._connect()
        self._half_close_all()
        ended: dict[int, bytes] = {}
        for rec in self._buffers:
            owner = self._records[rec.socket_objref]
            if owner.type == socket.SOCK_DGRAM:
                self._datagram(owner, rec)
            elif owner.state == SocketState.PEER_GONE:
                ended[owner.objref] = ended.get(owner.objref, b"") + rec.data
            else:
                raise ImageError(f"socket {owner.objref}: contents that belong to its connection")
        self._buffers.clear()
        for made in self._records.values():
            if made.type == socket.SOCK_DGRAM and made.shutdown & 3:
                with contextlib.suppress(OSError):  # ENOTCONN: it is shut down all the same
                    self._made[made.objref].shutdown((made.shutdown & 3) - 1)
        for owner in self._records.values():
            if owner.objref not in self._made:  # which the early ones are
                if owner.state != SocketState.PEER_GONE:
                    raise ImageError(f"socket {owner.objref}: the state of its connection never came")
                self._ended(owner, ended.get(owner.objref, b""))
        for objref, state in self._tcp.items():
            if state.unsent or state.state in tcp.FIN_UNACKED:
                self._queue_rest(self._records[objref], self._made[objref], state)
            if self._records[objref].shutdown & 1:
                self._made[objref].shutdown(socket.SHUT_RD)
        for owner in self._records.values():
            if owner.state == SocketState.CONNECTING:
                _connect_without_waiting(self._made[owner.objref], owner)

    def activate(self) -> None:
        """Connections come alive, and ask their peers what they missed; as `repair.leave()`, of all in one go.

        What fails is passed over: the peer may have reset it by now."""
        if not self._tcp:
            return
        leave = Ask([self._made[objref].fileno() for objref in self._tcp])
        leave.put(socket.IPPROTO_TCP, repair.TCP_REPAIR, repair.OFF)
        reuse = [_option(self._records[objref], sockopts.SOL_SOCKET, sockopts.SO_REUSEADDR) for objref in self._tcp]
        leave.put(sockopts.SOL_SOCKET, sockopts.SO_REUSEADDR, reuse)
        leave.make()
        for objref, rec in self._tcp.items():
            if rec.sent or rec.state in tcp.FIN_UNACKED:  # else there is nothing to be sent
                sock, owner = self._made[objref], self._records[objref]
                with contextlib.suppress(OSError):
                    self._send_again(owner, sock, rec)
                    repair.push(sock)

    def close(self) -> None:
        super().close()
        if self._injector is not None:
            self._injector.close()
            self._injector = None

    # ------------------------------------------------------------------ making

    def _open(self, records: Sequence[Socket]) -> list[socket.SocketType]:
        socks = self._net.plain([(rec.family, rec.type, rec.protocol) for rec in records])
        self._made.update(zip([rec.objref for rec in records], socks, strict=True))
        for rec, sock in zip(records, socks, strict=True):
            if (rec.uid, rec.gid) != self._own:
                os.fchown(sock.fileno(), rec.uid, rec.gid)
            if rec.device:
                sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_BINDTODEVICE, rec.device.encode())
            self._options(rec, sock, early=True)
        return socks

    @staticmethod
    def _options(rec: Socket, sock: socket.SocketType, *, early: bool) -> None:
        """Of a connection of TCP, without those that are set of many together."""
        for option in rec.options:
            if ((option.level, option.name) in _EARLY) == early:
                sockopts.put(sock, option)
        if early or (rec.type == socket.SOCK_STREAM and rec.state == SocketState.CONNECTED):
            return
        if rec.type == socket.SOCK_STREAM:
            _control_congestion([rec], [sock])
        InetRestore._sizes(rec, sock, 0)

    @staticmethod
    def _sizes(rec: Socket, sock: socket.SocketType, extra: int) -> None:
        sockopts.force_buffers(sock, rec.sndbuf + 4 * extra, rec.rcvbuf)
        sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_BUF_LOCK, rec.buf_lock & 3)

    @contextlib.contextmanager
    def _named(self, family: int, records: Sequence[Socket], socks: Sequence[socket.SocketType]) -> Iterator[None]:
        """Inside, addresses may be used that this host does not have yet. Errors name the addresses."""
        level, name = _TRANSPARENT[socket.AddressFamily(family)]
        fds = [sock.fileno() for sock in socks]
        try:
            _put(fds, level, name, 1)
            yield
        except OSError as error:
            rec = records[error.at if isinstance(error, tcp.Unmade) else 0]
            to = f" connected to {addresses.show(rec.peer)}" if rec.peer else ""
            raise RestartFailed(
                f"the socket {addresses.show(rec.local)}{to} cannot be made: {error}",
                hint="is the address in use here, or is there no route to the peer?",
            ) from error
        _put(fds, level, name, [_option(rec, level, name) for rec in records])

    @staticmethod
    def _bind(rec: Socket, sock: socket.SocketType) -> None:
        if not addresses.is_any(rec.local):
            sock.bind(addresses.unpack(rec.local))

    def _queue_rest(self, owner: Socket, sock: socket.SocketType, rec: SocketTcp) -> None:
        """Put what was never sent into the queue, and our FIN behind it; under repair again at the end.

        In repair mode the kernel would take it for sent."""
        if rec.unsent:
            self._sizes(owner, sock, rec.unsent)
        repair.leave(sock, probe=False)
        try:
            tcp.send_rest(sock, rec)
            if rec.state in tcp.FIN_UNACKED:
                sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise RestartFailed(
                f"{addresses.show(owner.local)} to {addresses.show(owner.peer)}: {rec.unsent} bytes that were"
                f" not sent yet do not go into the connection: {error}"
            ) from error
        repair.repair(sock)
        if rec.unsent:
            self._sizes(owner, sock, 0)
        repair.reuse_address(sock, _option(owner, sockopts.SOL_SOCKET, sockopts.SO_REUSEADDR))

    # ------------------------------------------------------------------ what only a packet can do

    def _deliver(self, raw: bytes, to: bytes) -> None:
        if self._injector is None:
            with self._net:
                self._injector = packet.Injector()
        self._injector.deliver(raw, to)

    def _send_again(self, owner: Socket, sock: socket.SocketType, rec: SocketTcp) -> None:
        """The first of what the peer has not acknowledged, past the socket: a duplicate does no harm."""
        ends = rec.state in tcp.FIN_UNACKED
        size = min(rec.mss_clamp, _MAX_SEGMENT) - 12
        if not (rec.sent or ends) or size < 64:
            return
        unacked, sent = tcp.in_flight(sock)
        data = rec.sent[max(0, len(rec.sent) + ends - unacked) :][:sent]
        last = ends and sent == unacked > 0  # our FIN is among it
        stamp = tcp.timestamp(sock) if rec.options & 1 else None
        ack = (rec.rcv_seq + (rec.state in tcp.GOT_FIN)) & 0xFFFFFFFF
        window = min(0xFFFF, rec.rcv_wnd >> rec.rcv_wscale)
        oldest = rec.snd_seq + ends - unacked
        for start in range(0, min(len(data) + last, size * _INITIAL_WINDOW), size):
            part = data[start : start + size]
            fin = packet.FIN if last and start + len(part) == len(data) else 0
            raw = packet.segment(
                owner.peer,
                owner.local,
                packet.PSH | packet.ACK | fin,
                (oldest + start) & 0xFFFFFFFF,
                ack,
                data=part,
                window=window,
                timestamp=stamp,
            )
            self._deliver(raw, owner.peer)

    def _half_close_all(self) -> None:
        """Of connections that one side has closed. All stand: what is acknowledged now finds the other end, if that is
        here, and no reset comes back."""
        due = [rec for rec in self._tcp.values() if rec.state in tcp.GOT_FIN or rec.state == tcp.FIN_WAIT2]
        if not due:
            return
        ends = [other_ends.ends_of(owner.local, owner.peer) for owner in map(self._records.__getitem__, self._tcp)]
        objrefs = list(self._tcp)
        alone = {objrefs[at] for at in other_ends.strangers(ends) if other_ends.on_one_host(ends[at])}
        for rec in due:
            owner, sock = self._records[rec.socket_objref], self._made[rec.socket_objref]
            with self._other_end(owner, rec) if owner.objref in alone else contextlib.nullcontext() as other:
                self._half_close(owner, sock, rec)
                told = _await_state(sock, tcp.FIN_WAIT2 if rec.state == tcp.FIN_WAIT2 else tcp.CLOSE_WAIT)
                if other is not None:
                    for now in (1, 0):  # acknowledged at once, and then as after any end
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, now)
                    told = told and _await_state(other, tcp.FIN_WAIT2)
            if not told:
                raise RestartFailed(
                    f"{addresses.show(owner.local)} to {addresses.show(owner.peer)}: the end of the connection"
                    " cannot be told to it",
                    hint="the address must be on this host before the restart, and no filter on loopback",
                )

    @contextlib.contextmanager
    def _other_end(self, owner: Socket, rec: SocketTcp) -> Iterator[socket.SocketType | None]:
        """Inside, a connection within this host has its other end, which its program had closed: what tells that that
        its FIN came would be answered with a reset if nobody was there. None if it is, as where it was saved."""
        other = replace(owner, local=owner.peer, peer=owner.local, buf_lock=0)
        oldest = (rec.snd_seq - len(rec.sent)) & 0xFFFFFFFF
        (sock,) = self._net.plain([(owner.family, owner.type, owner.protocol)])
        there = False
        try:
            if owner.device:
                sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_BINDTODEVICE, owner.device.encode())
            try:
                tcp.make_all([(sock, other, tcp.nothing_said(rec, snd_seq=rec.rcv_seq, rcv_seq=oldest))])
            except tcp.Unmade as error:
                there = error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
                if not there:
                    raise RestartFailed(
                        f"the other end of {addresses.show(owner.local)} to {addresses.show(owner.peer)}, which was"
                        f" closed, cannot be made: {error}"
                    ) from error
            if not there:
                self._count_fin_as_sent(sock)
            yield None if there else sock
        finally:
            sock.close()  # under repair: without a word

    @staticmethod
    def _count_fin_as_sent(sock: socket.SocketType) -> None:
        """A FIN that leaves while the sending queue is under repair counts as sent, and is not."""
        sock.setsockopt(socket.IPPROTO_TCP, repair.TCP_REPAIR_QUEUE, repair.SEND_QUEUE)
        sock.shutdown(socket.SHUT_WR)
        sock.setsockopt(socket.IPPROTO_TCP, repair.TCP_REPAIR_QUEUE, repair.NO_QUEUE)

    def _half_close(self, owner: Socket, sock: socket.SocketType, rec: SocketTcp) -> None:
        """The FIN that had come from the peer comes again; or ours is acknowledged again."""
        oldest = (rec.snd_seq - len(rec.sent)) & 0xFFFFFFFF
        window = min(0xFFFF, rec.snd_wnd >> rec.snd_wscale)  # as it was told
        if rec.state == tcp.FIN_WAIT2:
            self._count_fin_as_sent(sock)
            ack = (rec.snd_seq + 1) & 0xFFFFFFFF
            raw = packet.segment(owner.local, owner.peer, packet.ACK, rec.rcv_seq, ack, window=window)
        else:
            raw = packet.segment(owner.local, owner.peer, packet.FIN | packet.ACK, rec.rcv_seq, oldest, window=window)
        self._deliver(raw, owner.local)

    def _ended(self, rec: Socket, data: bytes) -> None:
        """A connection that was reset or closed on both sides; what it had received can still be read."""
        (sock,) = self._open([rec])
        if addresses.is_any(rec.local):
            raise ImageError(f"socket {rec.objref}: an ended connection without an address")
        peer = rec.local[:2] + bytes([rec.objref >> 8 & 0x7F, rec.objref & 0xFF or 1]) + rec.local[4:]
        with self._named(rec.family, [rec], [sock]):
            repair.repair(sock)
            self._bind(rec, sock)
            for queue, value in ((repair.SEND_QUEUE, 1), (repair.RECV_QUEUE, 1)):
                sock.setsockopt(socket.IPPROTO_TCP, repair.TCP_REPAIR_QUEUE, queue)
                sock.setsockopt(socket.IPPROTO_TCP, tcp.TCP_QUEUE_SEQ, value)
            sock.connect(addresses.unpack(peer))
            sockopts.force_buffers(sock, rec.sndbuf, rec.rcvbuf + 4 * len(data))
            tcp.fill(sock, repair.RECV_QUEUE, data)
            repair.reuse_address(sock, _option(rec, sockopts.SOL_SOCKET, sockopts.SO_REUSEADDR))
            repair.leave(sock, probe=False)
        self._options(rec, sock, early=False)
        self._deliver(packet.segment(rec.local, peer, packet.RST, 1 + len(data), 0), rec.local)
        if not _await_state(sock, tcp.CLOSE):
            raise RestartFailed(f"{addresses.show(rec.local)}: an ended connection cannot be made")
        if not rec.error:
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def _datagram(self, owner: Socket, rec: SocketBuffer) -> None:
        """Put a datagram back into the queue it was in; as any datagram, it may be lost."""
        if len(rec.address) != len(owner.local) or addresses.is_any(owner.local):
            raise ImageError(f"socket {owner.objref}: a datagram without sender or receiver")
        with contextlib.suppress(OSError):
            local = owner.local
            host = addresses.unpack(local)[0]
            if host in ("0.0.0.0", "::"):
                with self._net.socket(owner.family, owner.type) as probe:
                    probe.connect(addresses.unpack(rec.address))
                    near = addresses.pack(owner.family, probe.getsockname())
                local = near[:2] + owner.local[2:4] + near[4:]
            with self._preferred(owner):
                self._deliver(packet.datagram(local, rec.address, rec.data), local)

    @contextlib.contextmanager
    def _preferred(self, owner: Socket) -> Iterator[None]:
        """Inside, what comes for the address of this socket is for it, and not for another that shares the address."""
        group = self._groups[_sharers(owner)]
        if len(group) == 1:
            yield
            return
        sock = self._made[owner.objref]
        sockopts.prefer(sock, group.index(owner.objref))
        try:
            yield
        finally:
            sockopts.prefer(sock, None)


def _sharers(rec: Socket) -> Hashable:
    """What is the same of sockets among which the kernel distributes what comes (reuseport_add_sock() in
    net/core/sock_reuseport.c), in the order in which they were bound."""
    v6only = _option(rec, sockopts.SOL_IPV6, sockopts.IPV6_V6ONLY)
    return rec.family, rec.protocol, rec.local, rec.device, rec.uid, v6only


def _option(rec: Socket, level: int, name: int) -> int:
    for option in rec.options:
        if option.name == name and option.level == level:
            return option.value
    return 0


def _control_congestion(records: Sequence[Socket], socks: Sequence[socket.SocketType]) -> None:
    told = [(rec, sock) for rec, sock in zip(records, socks, strict=True) if rec.congestion]
    ask = Ask([sock.fileno() for _, sock in told])
    names = [rec.congestion.encode() for rec, _ in told]
    answers = ask.put_bytes(sockopts.SOL_TCP, sockopts.TCP_CONGESTION, names)
    ask.make()
    for (rec, _), result in zip(told, answers.results, strict=True):
        if result < 0:
            raise RestartFailed(
                f"{addresses.show(rec.local)}: congestion control {rec.congestion} is not there:"
                f" {os.strerror(-result)}",
                hint=f"modprobe tcp_{rec.congestion}",
            )


def _put(fds: Sequence[int], level: int, name: int, value: int | Sequence[int]) -> None:
    """An option of many sockets."""
    ask = Ask(fds)
    answers = ask.put(level, name, value)
    ask.make()
    answers.check(f"socket option {name} of level {level}")


def _await_state(sock: socket.SocketType, wanted: int) -> bool:
    end = time.monotonic() + _PATIENCE
    while tcp.state_of(sock) != wanted:
        if time.monotonic() > end:
            return False
        time.sleep(0.0002)
    return True


def _connect_without_waiting(sock: socket.SocketType, rec: Socket) -> None:
    flags = fcntl.fcntl(sock.fileno(), fcntl.F_GETFL)
    fcntl.fcntl(sock.fileno(), fcntl.F_SETFL, flags | os.O_NONBLOCK)
    code = sock.connect_ex(addresses.unpack(rec.peer))
    fcntl.fcntl(sock.fileno(), fcntl.F_SETFL, flags)
    if code not in (0, errno.EINPROGRESS):
        raise RestartFailed(
            f"the connection to {addresses.show(rec.peer)}, which was being made, cannot be begun anew:"
            f" {os.strerror(code)}"
        )
