"""Netlink sockets to the network stack (NETLINK_ROUTE, rtnetlink(7)): who asks for addresses and routes, or listens for
changes of them. BIND, dnsmasq, ntpd and many others have one for as long as they run. And those to the audit subsystem
(NETLINK_AUDIT), through which dbus-daemon and programs with PAM tell it what they have done.

Only in a network namespace of the tree's own: another host's network is another one. What waits to be read can be
read by the program alone (migrator.engine.user.descriptors.transients waits for that): nobody but the kernel can put
its messages into such a socket. What happens to the copy's network from when its socket is made, it is told.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

from migrator.engine.user.descriptors import sockopts
from migrator.engine.user.descriptors.description import Description
from migrator.engine.user.descriptors.made_sockets import MadeSockets
from migrator.engine.user.descriptors.netns import NetNs
from migrator.errors import ImageError, RestartFailed
from migrator.image.codec import Record
from migrator.image.records_files import Socket, SocketBuffer, SocketOption, SocketState
from migrator.linux.namespaces import identity

_ROUTE, _AUDIT = 0, 9  # NETLINK_ROUTE, NETLINK_AUDIT
PROTOCOLS = (_ROUTE, _AUDIT)
OF_THE_HOST = "a netlink socket of this host's network cannot be carried; run it under `migrator run`"

_OF_ITS_AUDIT = "a netlink socket of this host's audit cannot be carried; run it under `migrator run`"
_TYPES = (socket.SOCK_RAW, socket.SOCK_DGRAM)
_ADDRESS = struct.Struct("<HHII")  # struct sockaddr_nl: family, padding, port id, groups
_LIST_MEMBERSHIPS, _GROUPS = 9, 1 << 10  # linux/netlink.h; bits that are asked for


def outside(sock: socket.SocketType, pid: int) -> str:
    """Why a socket of process `pid` belongs to this host rather than to its tree, or "".

    In the pid namespace of the host it can be the audit daemon, which nothing tells of a socket (kernel/audit.c)."""
    if identity(pid, "net") == identity(os.getpid(), "net"):
        return OF_THE_HOST
    if sock.proto == _AUDIT and identity(pid, "pid") == identity(os.getpid(), "pid"):
        return _OF_ITS_AUDIT
    return ""


class NetlinkDump:
    """Collected inside the network namespace of the tree."""

    def __init__(self, items: Sequence[tuple[Description, socket.SocketType]], defaults: sockopts.Defaults) -> None:
        self._items = items
        self._defaults = defaults
        self._sockets: list[Socket] = []

    def collect(self) -> None:
        changed = self._defaults.changed([sock for _, sock in self._items])
        for (item, sock), options in zip(self._items, changed, strict=True):
            sockopts.check(options, item)
            peer = sock.getpeername()
            self._sockets.append(
                Socket(
                    objref=item.stat.st_ino,  # until it is written
                    family=sock.family,
                    type=sock.type,
                    protocol=sock.proto,
                    state=SocketState.CONNECTED if any(peer) else SocketState.UNCONNECTED,
                    shutdown=0,
                    backlog=0,
                    peer_objref=0,
                    sndbuf=sock.getsockopt(sockopts.SOL_SOCKET, sockopts.SO_SNDBUF),
                    rcvbuf=sock.getsockopt(sockopts.SOL_SOCKET, sockopts.SO_RCVBUF),
                    buf_lock=sock.getsockopt(sockopts.SOL_SOCKET, sockopts.SO_BUF_LOCK),
                    mode=0,
                    uid=item.stat.st_uid,
                    gid=item.stat.st_gid,
                    error=0,
                    local=_ADDRESS.pack(sock.family, 0, *sock.getsockname()),
                    peer=_ADDRESS.pack(sock.family, 0, *peer) if any(peer) else b"",
                    path="",
                    device="",
                    congestion="",
                    options=[*options, *_memberships(sock)],
                )
            )

    def sockets(self, objref: Callable[[int], int]) -> Iterator[Socket]:
        for rec in self._sockets:
            rec.objref = objref(rec.objref)
            yield rec

    def buffers(self, objref: Callable[[int], int]) -> Iterator[Record]:
        return iter(())

    def close(self, *, silent: bool) -> None:
        self._sockets.clear()


def _memberships(sock: socket.SocketType) -> Iterator[SocketOption]:
    bits = sock.getsockopt(sockopts.SOL_NETLINK, _LIST_MEMBERSHIPS, _GROUPS // 8)
    mask = int.from_bytes(bits, "little")
    for group in range(1, mask.bit_length() + 1):
        if mask >> (group - 1) & 1:
            yield SocketOption(sockopts.SOL_NETLINK, sockopts.NETLINK_ADD_MEMBERSHIP, group)


class NetlinkRestore(MadeSockets[socket.SocketType]):
    """They are made when all is there, so that they hear little of how the network of the copy was set up."""

    def __init__(self, net: NetNs) -> None:
        super().__init__()
        self._net = net
        self._records: dict[int, Socket] = {}

    def add(self, rec: Socket) -> None:
        if rec.type not in _TYPES or rec.protocol not in PROTOCOLS:
            raise ImageError(f"socket {rec.objref}: netlink of type {rec.type} and protocol {rec.protocol}")
        for raw in (rec.local, rec.peer or rec.local):
            if len(raw) != _ADDRESS.size or raw[:4] != struct.pack("<HH", rec.family, 0):
                raise ImageError(f"socket {rec.objref}: an address of another family")
        self._records[rec.objref] = rec

    def buffer(self, rec: SocketBuffer) -> None:
        raise ImageError(f"socket {rec.socket_objref}: netlink, in which nothing can wait")

    def settle(self) -> None:
        for objref, rec in self._records.items():
            (sock,) = self._net.plain([(rec.family, rec.type, rec.protocol)])
            self._made[objref] = sock
            _, _, port, groups = _ADDRESS.unpack(rec.local)
            try:
                if port or groups:
                    sock.bind((port, groups))
                for option in rec.options:
                    sockopts.put(sock, option)
                if rec.peer:
                    sock.connect(_ADDRESS.unpack(rec.peer)[2:])
                sockopts.force_buffers(sock, rec.sndbuf, rec.rcvbuf)
                sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_BUF_LOCK, rec.buf_lock & 3)
            except OSError as error:
                raise RestartFailed(f"the netlink socket of port {port} cannot be made: {error}") from error
