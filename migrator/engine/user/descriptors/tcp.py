"""TCP connections: taken out of one kernel and put into another, the peer none the wiser.

In repair mode a socket tells its queues, sequence numbers and window: see `migrator.linux.repair`.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from migrator.errors import CheckpointFailed, ImageError
from migrator.image.codec import MAX_RECORD
from migrator.image.records_files import SocketTcp
from migrator.linux.repair import NO_QUEUE, RECV_QUEUE, SEND_QUEUE, TCP_REPAIR_QUEUE

TCP_MAXSEG, TCP_INFO, TCP_QUEUE_SEQ = 2, 11, 21
TCP_REPAIR_OPTIONS, TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 22, 24, 29

ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2, TIME_WAIT = 1, 2, 3, 4, 5, 6
CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 7, 8, 9, 10, 11
SENT_FIN = frozenset({FIN_WAIT1, FIN_WAIT2, CLOSING, LAST_ACK})
FIN_UNACKED = frozenset({FIN_WAIT1, CLOSING, LAST_ACK})
GOT_FIN = frozenset({CLOSE_WAIT, CLOSING, LAST_ACK})
CONNECTED = SENT_FIN | GOT_FIN | {ESTABLISHED}

_SIOCINQ, _SIOCOUTQ, _SIOCOUTQNSD = 0x541B, 0x5411, 0x894B
_WINDOW = struct.Struct("<IIIII")
_OPT_TIMESTAMPS, _OPT_SACK, _OPT_WSCALE = 1, 2, 4
_TCPOPT_MSS, _TCPOPT_WINDOW, _TCPOPT_SACK_PERM, _TCPOPT_TIMESTAMP = 2, 3, 4, 8
_CHUNK = 32 << 10
_ROUNDS = 100  # two as a rule; each more needs a packet that came during the one before it
_HELD = "the network must be held while connections are saved"
_TCP = socket.IPPROTO_TCP
_MASK = 0xFFFFFFFF


def state_of(sock: socket.socket) -> int:
    return sock.getsockopt(_TCP, TCP_INFO, 8)[0]


def listening(sock: socket.socket) -> tuple[int, int]:
    """(connections that wait to be accepted, backlog) of a listener: so TCP_INFO has them."""
    waiting, backlog = struct.unpack_from("<II", sock.getsockopt(_TCP, TCP_INFO, 32), 24)
    return waiting, backlog


class Amounts(NamedTuple):
    """What packets change of a connection whose program does not run: each only ever goes one way."""

    state: int
    unacked: int
    unsent: int
    unread: int
    rcv_seq: int
    window: bytes


def amounts(sock: socket.socket) -> Amounts:
    """The amounts now, of a connection in repair mode. Several calls, so packets may come in between them."""
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, RECV_QUEUE)
    state = state_of(sock)
    unacked, unsent = _query(sock, _SIOCOUTQ), _query(sock, _SIOCOUTQNSD)
    if state in FIN_UNACKED:
        unacked -= 1
        unsent = max(0, unsent - 1)
    rcv_seq = (sock.getsockopt(_TCP, TCP_QUEUE_SEQ) - (state in GOT_FIN)) & _MASK
    window = sock.getsockopt(_TCP, TCP_REPAIR_WINDOW, _WINDOW.size)
    return Amounts(state, unacked, unsent, _query(sock, _SIOCINQ), rcv_seq, window)


def save_all(connections: Sequence[tuple[socket.socket, int, str]]) -> list[SocketTcp]:
    """The state of (connection, objref, name for messages), all as they are at one and the same moment.

    All are in repair mode, and stay in it; no program that has one runs. Packets may still come: repair mode
    stops neither the loopback device nor a delayed acknowledgement. Were the receiver of some bytes saved before
    they came, and their sender after they were acknowledged, then neither would have them. So all amounts are
    read again after all queues, until none has changed: then there was a moment between the two readings at
    which all were so."""
    records: list[SocketTcp | None] = [None] * len(connections)
    known: list[Amounts | None] = [None] * len(connections)
    for _ in range(_ROUNDS):
        now = [amounts(sock) for sock, _, _ in connections]
        changed = [number for number, found in enumerate(now) if found != known[number]]
        if not changed:
            break
        for number in changed:
            sock, objref, _ = connections[number]
            known[number] = now[number]
            records[number] = save(sock, objref, now[number])
    else:
        names = ", ".join(connections[number][2] for number in changed[:3])
        raise CheckpointFailed(f"{names}: packets keep coming in", hint=_HELD)
    saved = []
    for (_, _, who), rec, told in zip(connections, records, known, strict=True):
        assert rec and told  # each has changed in the first round
        _check_whole(rec, told, who)
        saved.append(rec)
    return saved


def _check_whole(rec: SocketTcp, told: Amounts, who: str) -> None:
    if len(rec.sent) != told.unacked or len(rec.received) != told.unread or told.unacked < told.unsent:
        raise CheckpointFailed(
            f"{who}: {told.unread} bytes wait in this connection and {told.unacked} are not acknowledged, but"
            f" {len(rec.received)} and {len(rec.sent)} could be read",
            hint=_HELD,
        )
    if len(rec.sent) + len(rec.received) > MAX_RECORD - 4096:
        raise CheckpointFailed(f"{who}: {len(rec.sent) + len(rec.received)} bytes wait in this connection")


def save(sock: socket.socket, objref: int, told: Amounts) -> SocketTcp:
    """The state of a connection in repair mode, with so much in its queues."""
    info = sock.getsockopt(_TCP, TCP_INFO, 8)
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
    snd_seq = (sock.getsockopt(_TCP, TCP_QUEUE_SEQ) - (told.state in SENT_FIN)) & _MASK
    sent = _peek(sock, told.unacked)
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, RECV_QUEUE)
    received = _peek(sock, told.unread)
    snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup = _WINDOW.unpack(told.window)
    return SocketTcp(
        objref,
        told.state,
        told.rcv_seq,
        snd_seq,
        told.unsent,
        info[5] & (_OPT_TIMESTAMPS | _OPT_SACK | _OPT_WSCALE),
        info[6] & 0xF,
        info[6] >> 4,
        sock.getsockopt(_TCP, TCP_MAXSEG),
        sock.getsockopt(_TCP, TCP_TIMESTAMP) & _MASK,
        snd_wl1,
        snd_wnd,
        max_window,
        rcv_wnd,
        rcv_wup,
        received,
        sent,
    )


def in_flight(sock: socket.socket) -> tuple[int, int]:
    """(what the peer has not acknowledged, what of it was sent), in bytes, a FIN counting as one."""
    unacked = _query(sock, _SIOCOUTQ)
    return unacked, unacked - _query(sock, _SIOCOUTQNSD)


def timestamp(sock: socket.socket) -> int:
    """The clock of a connection's timestamps option, now."""
    return sock.getsockopt(_TCP, TCP_TIMESTAMP) & _MASK


def check(rec: SocketTcp) -> None:
    """Refuse what no source writes. Raises ImageError."""
    if rec.state not in CONNECTED and rec.state != CLOSE:
        raise ImageError(f"socket {rec.socket_objref}: impossible state {rec.state} of TCP")
    if rec.unsent > len(rec.sent) or max(rec.snd_wscale, rec.rcv_wscale) > 14 or rec.options & ~7:
        raise ImageError(f"socket {rec.socket_objref}: impossible queue, window scale or options of TCP")


def before_connect(sock: socket.socket, rec: SocketTcp) -> None:
    """Set both queues back to where their oldest bytes were. The socket is in repair mode and closed."""
    for queue, end, data in (
        (SEND_QUEUE, rec.snd_seq, rec.sent),
        (RECV_QUEUE, rec.rcv_seq, rec.received),
    ):
        sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, queue)
        sock.setsockopt(_TCP, TCP_QUEUE_SEQ, _signed(end - len(data)))


def after_connect(sock: socket.socket, rec: SocketTcp) -> None:
    """Options, contents of the queues and window; the part that was never sent is for send_rest()."""
    options = [(_TCPOPT_MSS, rec.mss_clamp)]
    if rec.options & _OPT_WSCALE:
        options.append((_TCPOPT_WINDOW, rec.snd_wscale | rec.rcv_wscale << 16))
    if rec.options & _OPT_SACK:
        options.append((_TCPOPT_SACK_PERM, 0))
    if rec.options & _OPT_TIMESTAMPS:
        options.append((_TCPOPT_TIMESTAMP, 0))
    sock.setsockopt(_TCP, TCP_REPAIR_OPTIONS, b"".join(struct.pack("<II", *o) for o in options))
    if rec.options & _OPT_TIMESTAMPS:
        sock.setsockopt(_TCP, TCP_TIMESTAMP, _signed(rec.timestamp))
    fill(sock, RECV_QUEUE, rec.received)
    fill(sock, SEND_QUEUE, rec.sent[: len(rec.sent) - rec.unsent])
    window = rec.rcv_wnd, rec.rcv_wup
    if (rec.rcv_wup - rec.rcv_seq) & _MASK == 1:
        window = rec.rcv_wnd + 1, rec.rcv_seq  # it counted the peer's FIN, which comes later here
    sock.setsockopt(
        _TCP,
        TCP_REPAIR_WINDOW,
        _WINDOW.pack(rec.snd_wl1, rec.snd_wnd, rec.max_window, *window),
    )
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)


def send_rest(sock: socket.socket, rec: SocketTcp) -> None:
    """Put the bytes that were never sent into the queue, outside of repair mode. Raises OSError."""
    view = memoryview(rec.sent)[len(rec.sent) - rec.unsent :]
    while view:
        view = view[sock.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]


def fill(sock: socket.socket, queue: int, data: bytes) -> None:
    """Put bytes into a queue of a connection in repair mode. Raises OSError."""
    if not data:
        return
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, queue)
    view = memoryview(data)
    while view:
        view = view[sock.send(view[:_CHUNK], socket.MSG_DONTWAIT) :]


def _peek(sock: socket.socket, count: int) -> bytes:
    return sock.recv(count, socket.MSG_PEEK | socket.MSG_DONTWAIT) if count > 0 else b""


def _query(sock: socket.socket, request: int) -> int:
    value = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), request, value)
    return value[0]


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 32) if value >> 31 else value
