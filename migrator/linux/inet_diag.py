"""TCP sockets of a network namespace by state, whoever holds them (sock_diag(7), linux/inet_diag.h).

Also those that nobody holds any more: closed by their program, with data or an end still to be acknowledged.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from migrator.linux import netlink

ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2 = 1, 2, 3, 4, 5
TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 6, 7, 8, 9, 10, 11

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_REQUEST = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2
_INET_DIAG_MD5SIG, _WITH_INFO = 18, 2
_MESSAGE = struct.Struct("=BBBB2s2s16s16s12xIIIII")  # struct inet_diag_msg


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """`inode` is 0 where no descriptor holds it. `unread` and `unsent` are bytes in its queues. `signed`: by keys of
    TCP_MD5SIG."""

    family: int
    state: int
    local: str
    local_port: int
    peer: str
    peer_port: int
    inode: int
    unread: int
    unsent: int
    signed: bool


def tcp_sockets_here(states: Iterable[int], *, keys: bool = False) -> Iterator[TcpSocket]:
    """TCP sockets in one of `states` in the network namespace of this thread; `keys`: ask whether they are `signed`.

    Raises OSError."""
    mask = sum(1 << state for state in states)
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, _WITH_INFO if keys else 0, mask)
        yield from map(_socket, netlink.dump(_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request))


def _socket(payload: bytes) -> TcpSocket:
    family, state, _, _, sport, dport, source, target, _, unread, unsent, _, inode = _MESSAGE.unpack_from(payload)
    return TcpSocket(
        family,
        state,
        _address(family, source),
        int.from_bytes(sport, "big"),
        _address(family, target),
        int.from_bytes(dport, "big"),
        inode,
        unread,
        unsent,
        any(kind == _INET_DIAG_MD5SIG for kind, _ in netlink.attributes(payload, _MESSAGE.size)),
    )


def _address(family: int, raw: bytes) -> str:
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(raw[:4]))
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)
