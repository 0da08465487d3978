"""Connections of TCP within one host: where their other ends are.

A program that closes one end of a connection of its own leaves the other for a while with a partner that nobody holds
(tcp(7): orphaned). What that had said has come, or is on its way; nobody can be asked for it. Once its end has come
there is no more: the partner can be made again from what its connection knows of it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from migrator.engine.user.descriptors import addresses, tcp
from migrator.linux import inet_diag
from migrator.linux.namespaces import entered

STAYS = "a connection that would stay behind with the address of this host"
Ends = tuple[bytes, bytes]  # own and other, as end_of() has them

_LOOPBACK, _LOOPBACK6 = 127, ipaddress.IPv6Address("::1").packed
_PORT, _IPV4 = 2, 4  # bytes
_UNACCEPTED = (inet_diag.SYN_RECV, inet_diag.ESTABLISHED, inet_diag.CLOSE_WAIT)
_CLOSED = (inet_diag.FIN_WAIT1, inet_diag.FIN_WAIT2, inet_diag.CLOSING, inet_diag.LAST_ACK)


def end_of(raw: bytes) -> bytes:
    """Port and host of a raw address: the same of one of IPv4 and of that as IPv6 has it."""
    raw = addresses.plain(raw)
    return raw[2:8] if len(raw) == 16 else raw[2:4] + raw[8:24]


def ends_of(local: bytes, peer: bytes) -> Ends:
    """Of a connection with these raw addresses."""
    return end_of(local), end_of(peer)


def strangers(connections: Sequence[Ends]) -> list[int]:
    """Which of them have their other end not among them."""
    there = set(connections)
    return [at for at, (own, other) in enumerate(connections) if (other, own) not in there]


def on_one_host(ends: Ends) -> bool:
    own, other = ends
    host = other[_PORT:]
    return host == own[_PORT:] or host == _LOOPBACK6 or (len(host) == _IPV4 and host[0] == _LOOPBACK)


def obstacles(found: Sequence[tuple[Ends, int]], pid: int) -> list[str]:
    """Of strangers within this host, each with its state in TCP: why it cannot be carried, or "". pid: a process with
    their network namespace. Raises OSError."""
    if not found:
        return []
    with entered(f"/proc/{pid}/ns/net"):
        there = {
            (_end(sock.local, sock.local_port), _end(sock.peer, sock.peer_port)): sock
            for sock in inet_diag.tcp_sockets_here((*_UNACCEPTED, *_CLOSED))
        }
    return [_obstacle(there.get((other, own)), state) for (own, other), state in found]


def _obstacle(partner: inet_diag.TcpSocket | None, state: int) -> str:
    if partner is not None and partner.inode:
        return "its other end is open in a process outside of the tree"
    if state in tcp.GOT_FIN:
        return ""
    if partner is None:
        return "its other end is nowhere to be found on this host"
    if partner.state in _UNACCEPTED:
        return "its other end waits to be accepted"
    return "its other end was closed, and what was written to that has not all come"


def _end(host: str, port: int) -> bytes:
    return port.to_bytes(_PORT, "big") + ipaddress.ip_address(host).packed
