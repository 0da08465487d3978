"""Connections compared whose two ends are in one tree: what is on the way may have arrived meanwhile.

The loopback device is never held. Bytes that one end had still to send when it was saved have come to the other when
the copy is looked at, and the kernel has made room for them. What a program will read is the same, and is compared.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

from migrator.image.codec import Record
from migrator.image.records_files import Socket, SocketState, SocketTcp

_INET, _INET6 = 2, 10
_TCP = 6
_MAPPED = bytes(10) + b"\xff\xff"  # an IPv4 address as one of IPv6
_SAID_ITS_END = frozenset({4, 5, 9, 11})  # FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING
_MASK = 0xFFFFFFFF
_IPV4, _LOOPBACK, _LOOPBACK6 = 4, 127, bytes(15) + b"\1"  # bytes of an address, the first of it, all of it
_SENDING, _RECEIVING = 1, 2  # Socket.buf_lock: sizes that the program has set
# move when what came is acknowledged, or when the other end, which is nobody's, acknowledges
ACKNOWLEDGING = frozenset({"rcv_wnd", "rcv_wup", "snd_wl1"})
MOVING = ACKNOWLEDGING | frozenset({"state", "rcv_seq", "unsent", "snd_wnd", "max_window"})


def pairs(records: Iterable[Record], states: Container[int]) -> dict[int, int]:
    """The connections of TCP within a host: each end by the other, or by 0 if that was closed.

    states: the objrefs of all whose state is known; of what came ahead and ended since it is not"""
    sockets = [s for s in records if isinstance(s, Socket) and _is_connection(s) and s.objref in states]
    by_names = {(_name(s.local), _name(s.peer)): s.objref for s in sockets}
    ends = ((s, by_names.get((_name(s.peer), _name(s.local)), 0)) for s in sockets)
    return {s.objref: other for s, other in ends if other or _is_within_a_host(s)}


def stream(end: SocketTcp, other: SocketTcp) -> Iterator[tuple[str, object]]:
    """What the program with `end` has still to read, wherever it is by now; whether each side has said its end."""
    acknowledged = (other.snd_seq - len(other.sent)) & _MASK
    arrived = (end.rcv_seq - acknowledged) & _MASK
    yield "to be read", bytes(end.received) + bytes(other.sent[arrived:])
    yield "ended", (end.state in _SAID_ITS_END, other.state in _SAID_ITS_END)


def sizes(rec: Socket, paired: Mapping[int, int]) -> Iterator[tuple[str, object]]:
    """The sizes of the buffers of a socket: the kernel tunes those that its program has not set, to any number, and
    takes even ones only."""
    for name, size, lock in (("sndbuf", rec.sndbuf, _SENDING), ("rcvbuf", rec.rcvbuf, _RECEIVING)):
        tuned = _is_connection(rec) and not rec.buf_lock & lock
        yield name, "as it came to be" if tuned and rec.objref in paired else size & ~1 if tuned else size


def _is_within_a_host(rec: Socket) -> bool:
    (own, _), (other, _) = _name(rec.local), _name(rec.peer)
    return own == other or other == _LOOPBACK6 or (len(other) == _IPV4 and other[0] == _LOOPBACK)


def _is_connection(rec: Socket) -> bool:
    return rec.family in (_INET, _INET6) and rec.protocol == _TCP and rec.state == SocketState.CONNECTED


def _name(address: bytes) -> tuple[bytes, bytes]:
    """(address, port) of a struct sockaddr."""
    if address[:1] == bytes([_INET6]):
        inner = address[8:24]
        return (inner[12:] if inner[:12] == _MAPPED else inner), address[2:4]
    return address[4:8], address[2:4]
