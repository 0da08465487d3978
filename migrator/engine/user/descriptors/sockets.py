"""Sockets of a stopped tree: which are there, and their records."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence

from migrator.engine.user.descriptors import multicast, netlink, sockopts, unix_dump
from migrator.engine.user.descriptors.classify import Obstacle, Root
from migrator.engine.user.descriptors.description import Description
from migrator.engine.user.descriptors.inet_dump import FAMILIES as INET
from migrator.engine.user.descriptors.inet_dump import InetDump, Still
from migrator.engine.user.descriptors.standing import Connection
from migrator.engine.user.descriptors.unix_dump import UnixDump
from migrator.errors import CheckpointFailed
from migrator.image.codec import Record
from migrator.image.records_files import Socket
from migrator.linux import descriptors
from migrator.linux.namespaces import entered
from migrator.linux.sockets import Ask

_PLAIN = [(int(family), int(socket.SOCK_STREAM), socket.IPPROTO_TCP) for family in INET]
_FAMILIES = {
    17: "a packet socket",
    40: "a vsock socket",
    38: "a kernel crypto socket (AF_ALG)",
    44: "an AF_XDP socket",
    31: "a Bluetooth socket",
    29: "a CAN socket",
}
_SIOCOUTQ, _CARD_SECONDS = 0x5411, 0.01
_SO_PROTOCOL_NAMES = {262: "MPTCP", 132: "SCTP", 136: "UDP-Lite", 1: "ICMP", 58: "ICMPv6"}


def judge(sock: socket.SocketType) -> None:
    """Raises Obstacle for a kind of socket that cannot be carried."""
    if sock.family == socket.AF_UNIX:
        return
    if sock.family == socket.AF_NETLINK and sock.proto not in netlink.PROTOCOLS:
        raise Obstacle(f"a netlink socket of protocol {sock.proto} cannot be carried; the program must close it first")
    if sock.family not in (*INET, socket.AF_NETLINK):
        what = _FAMILIES.get(sock.family, f"a socket of family {int(sock.family)}")
        raise Obstacle(f"{what} cannot be carried")
    if has_filter(sock):
        raise Obstacle("a socket with a packet filter (SO_ATTACH_FILTER) cannot be carried")
    if sock.family == socket.AF_NETLINK:
        return
    wanted: dict[int, int] = {socket.SOCK_STREAM: socket.IPPROTO_TCP, socket.SOCK_DGRAM: socket.IPPROTO_UDP}
    if wanted.get(sock.type) != sock.proto:
        kind = "raw" if sock.type == socket.SOCK_RAW else _SO_PROTOCOL_NAMES.get(sock.proto, str(sock.proto))
        raise Obstacle(f"a socket of protocol {kind} cannot be carried")
    if sock.proto == socket.IPPROTO_TCP and (upper := sockopts.text(sock, socket.IPPROTO_TCP, sockopts.TCP_ULP)):
        raise Obstacle(f"a TCP connection under kernel {upper} (TCP_ULP) cannot be carried")
    if sock.proto == socket.IPPROTO_TCP and sockopts.peeks_from(sock) >= 0:
        raise Obstacle("a TCP connection that is peeked at from an offset (SO_PEEK_OFF) cannot be carried")
    if sock.proto == socket.IPPROTO_TCP and sockopts.authenticates(sock):
        raise Obstacle("a TCP connection with keys (TCP_AO) cannot be carried: nobody can read them")
    if sock.proto == socket.IPPROTO_UDP and _corked(sock):
        raise Obstacle(
            "a datagram that is not complete (UDP_CORK, MSG_MORE) cannot be carried; it has to be sent first"
        )


def member_of(group: str) -> str:
    return f"a member of the multicast group {group}, which cannot be carried"


def taken_name(sock: socket.SocketType) -> bytes:
    """The name in the file system that a datagram socket was bound to: who sends to it finds the last that took it."""
    try:
        name = sock.getsockname() if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_DGRAM else ""
    except OSError:
        return b""
    return os.fsencode(name) if isinstance(name, str) else b""


def outside_of_root(sock: socket.socket, root: Root) -> str:
    """Why the file that a unix socket is bound to cannot be carried, or ""."""
    where = unix_dump.file_of(sock.fileno())
    if where is not None and where.there:
        try:
            unix_dump.place_of(where, root)
        except Obstacle as obstacle:
            return str(obstacle)
        except OSError:
            pass  # it was removed meanwhile
    return ""


def same_name(name: bytes, first: object) -> str:
    return (
        f"was bound to {os.fsdecode(name)}, as {first} was; what is sent there could reach the wrong one after the"
        " move, so one of them must be closed first"
    )


def _suspects(
    items: Sequence[tuple[Description, socket.SocketType]],
) -> Iterator[tuple[Description, socket.SocketType]]:
    """Those of which judge() may say something: all but plain TCP without filter, upper protocol and peek offset, by
    one question to all of them."""
    ask = Ask([item.fd for item, _ in items])
    filters = ask.option(sockopts.SOL_SOCKET, sockopts.SO_GET_FILTER, 0)
    uppers = ask.option(socket.IPPROTO_TCP, sockopts.TCP_ULP, 16)
    offsets = ask.option(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF)
    ask.make()
    facts = zip(
        items, filters.results, filters.sizes(), uppers.texts(), offsets.results, offsets.numbers(), strict=False
    )
    for (item, sock), result, length, upper, told, offset in facts:
        kind = sock.family, sock.type, sock.proto
        if kind not in _PLAIN or result or length or upper or (told == 0 and offset >= 0):
            yield item, sock


def _corked(sock: socket.SocketType) -> bool:
    """Whether bytes stay in a UDP socket: what was sent leaves the network card in a moment."""
    deadline = time.monotonic() + _CARD_SECONDS
    while struct.unpack("<i", fcntl.ioctl(sock.fileno(), _SIOCOUTQ, bytes(4)))[0]:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.0005)
    return False


def has_filter(sock: socket.SocketType) -> bool:
    try:
        return descriptors.filter_length(sock.fileno()) > 0
    except OSError:
        return True  # an eBPF program, which is not told


class SocketDump:
    """All sockets of a tree. collect(), sockets(), buffers(), and close() at the end.

    pid: a process of the tree, for its network namespace. still, standing, own_netns: see InetDump."""

    def __init__(
        self,
        descriptions: Sequence[Description],
        pid: int,
        still: Still,
        standing: Sequence[Connection] = (),
        *,
        own_netns: bool = True,
    ) -> None:
        self._own_netns = own_netns
        self._standing = standing
        self._pid = pid
        self._still = still
        self._borrowed: list[socket.SocketType] = []
        self._unix: list[tuple[Description, socket.SocketType]] = []
        self._inet: list[tuple[Description, socket.SocketType]] = []
        self._netlink: list[tuple[Description, socket.SocketType]] = []
        self._descriptions = descriptions
        self._dumps: list[UnixDump | InetDump | netlink.NetlinkDump] = []

    def collect(self) -> None:
        """Look at every socket, and leave it as it was. Raises CheckpointFailed."""
        if not (self._descriptions or self._standing):
            return
        for item in self._descriptions:
            sock = sockopts.borrow(item.fd)
            self._borrowed.append(sock)
            of_kind = {int(socket.AF_UNIX): self._unix, int(socket.AF_NETLINK): self._netlink}
            of_kind.get(int(sock.family), self._inet).append((item, sock))
        for item, sock in _suspects([*self._inet, *self._netlink]):
            try:
                judge(sock)
            except Obstacle as obstacle:
                raise CheckpointFailed(f"{item}: {obstacle}", hint="the workload runs on, untouched") from None
        self._refuse()
        with entered(f"/proc/{self._pid}/ns/net"):
            defaults = sockopts.Defaults()
            if self._unix:
                unix = UnixDump(self._unix, defaults)
                self._dumps.append(unix)
                unix.collect()
            if self._inet or self._standing:
                inet = InetDump(self._inet, defaults, self._pid, self._still, self._standing, own_netns=self._own_netns)
                self._dumps.append(inet)
                inet.collect()
            if self._netlink:
                netlinks = netlink.NetlinkDump(self._netlink, defaults)
                self._dumps.append(netlinks)
                netlinks.collect()

    def _refuse(self) -> None:
        """What the survey refuses as well, and has come into being since."""
        for item, sock in self._netlink:
            if reason := netlink.outside(sock, self._pid):
                raise CheckpointFailed(f"{item}: {reason}")
        datagrams = [(item, sock) for item, sock in self._inet if sock.proto == socket.IPPROTO_UDP]
        groups = multicast.joined(self._pid) if datagrams else []
        for item, sock in datagrams:
            if group := multicast.membership(sock, groups):
                raise CheckpointFailed(f"{item}: {member_of(group)}", hint="the workload runs on, untouched")
        names: dict[bytes, Description] = {}
        for item, sock in self._unix:
            if (name := taken_name(sock)) and names.setdefault(name, item) is not item:
                raise CheckpointFailed(f"{item}: {same_name(name, names[name])}")

    @property
    def connections(self) -> Iterator[Socket]:
        """The records of connections of TCP, ahead of sockets(); their objrefs are inode numbers."""
        for dump in self._dumps:
            if isinstance(dump, InetDump):
                yield from dump.connections

    def sockets(self, objref: Callable[[int], int]) -> Iterator[Socket]:
        for dump in self._dumps:
            yield from dump.sockets(objref)

    def buffers(self, objref: Callable[[int], int]) -> Iterator[Record]:
        """What waits in the sockets, and the state of connections. Raises CheckpointFailed."""
        for dump in self._dumps:
            yield from dump.buffers(objref)

    def close(self, *, silent: bool) -> None:
        """silent: connections will end without a word; otherwise they go on as they were."""
        for dump in self._dumps:
            dump.close(silent=silent)
        self._dumps.clear()
        for sock in self._borrowed:
            sock.detach()
        self._borrowed.clear()
