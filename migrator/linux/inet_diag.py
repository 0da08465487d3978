"""TCP sockets of a network namespace by state, whoever holds them (sock_diag(7), linux/inet_diag.h).

Also those that nobody holds any more: closed by their program, with data or an end still to be acknowledged.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2 = 1, 2, 3, 4, 5
TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 6, 7, 8, 9, 10, 11

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2
_ATTRIBUTE, _INET_DIAG_MD5SIG, _WITH_INFO = struct.Struct("=HH"), 18, 2
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
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as channel:
            request = _REQUEST.pack(family, socket.IPPROTO_TCP, _WITH_INFO if keys else 0, mask)
            size = _HEADER.size + len(request)
            flags = _NLM_F_REQUEST | _NLM_F_DUMP
            channel.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + request)
            yield from _answers(channel)


def _answers(channel: socket.socket) -> Iterator[TcpSocket]:
    while True:
        data = channel.recv(1 << 17)
        position = 0
        while position + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, position)
            at = position + _HEADER.size
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                error = -struct.unpack_from("=i", data, at)[0]
                raise OSError(error, f"inet_diag: {os.strerror(error)}")
            yield _socket(data, at, position + length)
            position += (length + 3) & ~3


def _socket(data: bytes, at: int, end: int) -> TcpSocket:
    family, state, _, _, sport, dport, source, target, _, unread, unsent, _, inode = _MESSAGE.unpack_from(data, at)
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
        _INET_DIAG_MD5SIG in _attributes(data, at + _MESSAGE.size, end),
    )


def _attributes(data: bytes, at: int, end: int) -> Iterator[int]:
    """The types of the attributes (struct rtattr)."""
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind
        at += max(_ATTRIBUTE.size, (length + 3) & ~3)


def _address(family: int, raw: bytes) -> str:
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(raw[:4]))
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)
