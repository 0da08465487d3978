"""What the kernel knows of sockets and does not tell through system calls on them (sock_diag(7))."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from migrator.linux import netlink

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_REQUEST = struct.Struct("<BBHIIIII")  # struct unix_diag_req
_MESSAGE = struct.Struct("<BBBxIII")  # struct unix_diag_msg
_SHOW = 0x1 | 0x4 | 0x8 | 0x10  # name, peer, waiting connections, queue lengths
_INET_REQUEST = struct.Struct("<BBBxI48x")  # struct inet_diag_req_v2
_INET_MESSAGE = struct.Struct("<68xI")  # struct inet_diag_msg: the inode number
_INET_SHUTDOWN = 8
_PEER, _ICONS, _RQLEN, _SHUTDOWN = 2, 3, 4, 6


@dataclass(slots=True)
class UnixSocket:
    """`peer` is an inode number, 0 for a peer without one, -1 for no peer. `waiting`: connections that
    wait to be accepted. `queued`, `backlog`: bytes and limit, or connections and limit of a listener."""

    inode: int
    state: int
    peer: int = -1
    shutdown: int = 0
    waiting: int = 0
    queued: int = 0
    backlog: int = 0


def unix_sockets_here() -> dict[int, UnixSocket]:
    """All unix sockets of the network namespace of this thread, by inode number. Raises OSError."""
    items = map(_parse, _dump(_REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW, 0xFFFFFFFF, 0xFFFFFFFF)))
    return {item.inode: item for item in items}


def shutdowns_of_udp(family: int) -> dict[int, int]:
    """The UDP sockets of a family that were shut down, here as above: inode number -> 1 reading, 2 writing, 3 both.

    Raises OSError where the kernel has no udp_diag."""
    out: dict[int, int] = {}
    for payload in _dump(_INET_REQUEST.pack(family, socket.IPPROTO_UDP, 1 << (_INET_SHUTDOWN - 1), 0xFFFFFFFF)):
        (inode,) = _INET_MESSAGE.unpack_from(payload)
        for kind, value in netlink.attributes(payload, _INET_MESSAGE.size):
            if kind == _INET_SHUTDOWN and value[0]:
                out[inode] = value[0]
    return out


def _dump(request: bytes) -> Iterator[bytes]:
    return netlink.dump(_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request)


def _parse(payload: bytes) -> UnixSocket:
    _, _, state, inode, _, _ = _MESSAGE.unpack_from(payload)
    item = UnixSocket(inode, state)
    for kind, value in netlink.attributes(payload, _MESSAGE.size):
        if kind == _PEER:
            (item.peer,) = struct.unpack("<I", value)
        elif kind == _ICONS:
            item.waiting = len(value) // 4
        elif kind == _RQLEN:
            item.queued, item.backlog = struct.unpack("<II", value)
        elif kind == _SHUTDOWN:
            item.shutdown = value[0]
    return item


def peer_of_connecting(pid: int, inode: int) -> bytes:
    """The raw address that a TCP socket in SYN_SENT is connecting to, from /proc/PID/net/tcp; b"" if gone."""
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        try:
            with open(f"/proc/{pid}/net/{name}", encoding="ascii") as file:
                lines = file.read().split("\n")[1:]
        except FileNotFoundError:
            continue
        for line in lines:
            words = line.split()
            if len(words) > 9 and words[9] == str(inode):
                host, _, port = words[2].partition(":")
                raw = b"".join(struct.pack("<I", int(host[i : i + 8], 16)) for i in range(0, len(host), 8))
                if family == socket.AF_INET:
                    return struct.pack("<H", family) + struct.pack(">H", int(port, 16)) + raw + bytes(8)
                return struct.pack("<H", family) + struct.pack(">H", int(port, 16)) + bytes(4) + raw + bytes(4)
    return b""
