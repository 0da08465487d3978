"""Connections compared whose two ends are in one tree: what is on the way may have arrived meanwhile.

The loopback device is never held. Bytes that one end had still to send when it was saved have come to the other when
the copy is looked at, and the kernel has made room for them. What a program will read is the same, and is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from migrator.image.codec import Record
from migrator.image.records_files import Socket, SocketState, SocketTcp

_INET, _INET6 = 2, 10
_TCP = 6
_MAPPED = bytes(10) + b"\xff\xff"  # an IPv4 address as one of IPv6
_SAID_ITS_END = frozenset({4, 5, 9, 11})  # FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING
_MASK = 0xFFFFFFFF
_SENDING, _RECEIVING = 1, 2  # Socket.buf_lock: sizes that the program has set
MOVING = frozenset({"state", "rcv_seq", "unsent", "snd_wl1", "snd_wnd", "max_window", "rcv_wnd", "rcv_wup"})


def pairs(records: Iterable[Record]) -> dict[int, int]:
    """The connections of TCP with both ends here: each end by the other."""
    sockets = [s for s in records if isinstance(s, Socket) and _is_connection(s)]
    by_names = {(_name(s.local), _name(s.peer)): s.objref for s in sockets}
    ends = ((s.objref, by_names.get((_name(s.peer), _name(s.local)), 0)) for s in sockets)
    return {objref: other for objref, other in ends if other}


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


def _is_connection(rec: Socket) -> bool:
    return rec.family in (_INET, _INET6) and rec.protocol == _TCP and rec.state == SocketState.CONNECTED


def _name(address: bytes) -> tuple[bytes, bytes]:
    """(address, port) of a struct sockaddr."""
    if address[:1] == bytes([_INET6]):
        inner = address[8:24]
        return (inner[12:] if inner[:12] == _MAPPED else inner), address[2:4]
    return address[4:8], address[2:4]
