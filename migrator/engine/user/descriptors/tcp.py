"""TCP connections: taken out of one kernel and put into another, the peer none the wiser.

In repair mode a socket tells its queues, sequence numbers and window: see `migrator.linux.repair`.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from migrator.engine.user.descriptors.sockopts import ask_buffers
from migrator.errors import CheckpointFailed, ImageError
from migrator.image.codec import MAX_RECORD
from migrator.image.records_files import Socket, SocketTcp
from migrator.linux.repair import NO_QUEUE, RECV_QUEUE, SEND_QUEUE, TCP_REPAIR, TCP_REPAIR_QUEUE
from migrator.linux.sockets import Answers, Ask

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
_CHUNK, _USUAL_WINDOW = 32 << 10, 0xFFFF
_AT_ONCE = 256  # connections whose queues are read at the same time
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_ROUNDS = 100  # two as a rule; each more needs a packet that came during the one before it
_HELD = "the network must be held while connections are saved"
_TCP = socket.IPPROTO_TCP
_MASK = 0xFFFFFFFF


def state_of(sock: socket.SocketType) -> int:
    return sock.getsockopt(_TCP, TCP_INFO, 8)[0]


def listening(sock: socket.SocketType) -> tuple[int, int]:
    """(connections that wait to be accepted, backlog) of a listener: so TCP_INFO has them."""
    waiting, backlog = struct.unpack_from("<II", sock.getsockopt(_TCP, TCP_INFO, 32), 24)
    return waiting, backlog


class Amounts(NamedTuple):
    """What packets change of a connection whose program does not run: each only ever goes one way. And `agreed`, which
    comes with it: what the ends agreed on when they connected, two bytes of TCP_INFO."""

    state: int
    agreed: bytes
    unacked: int
    unsent: int
    unread: int
    rcv_seq: int
    window: bytes


class _Reading:
    """The amounts of connections in repair mode, read as often as is asked. Of each several calls are made, so packets
    may come in between them."""

    def __init__(self, fds: Sequence[int]) -> None:
        ask = self._ask = Ask(fds)
        ask.put(_TCP, TCP_REPAIR_QUEUE, RECV_QUEUE)
        self._info = ask.option(_TCP, TCP_INFO, 8)
        self._unacked, self._unsent = ask.amount(_SIOCOUTQ), ask.amount(_SIOCOUTQNSD)
        self._rcv_seq = ask.option(_TCP, TCP_QUEUE_SEQ)
        self._window = ask.option(_TCP, TCP_REPAIR_WINDOW, _WINDOW.size)
        self._unread = ask.amount(_SIOCINQ)
        self._named = {
            "TCP_INFO": self._info,
            "SIOCOUTQ": self._unacked,
            "SIOCOUTQNSD": self._unsent,
            "SIOCINQ": self._unread,
            "TCP_QUEUE_SEQ": self._rcv_seq,
            "TCP_REPAIR_WINDOW": self._window,
        }
        self._told: list[bytes] = []

    def differs(self) -> bool:
        """Read all. Whether anything was told of any that was not told of it before."""
        self._ask.make()
        for what, answers in self._named.items():
            answers.check(what)
        before, self._told = self._told, [bytes(answers.area.view) for answers in self._named.values()]
        return self._told != before

    def amounts(self) -> list[Amounts]:
        """As they were read last."""
        columns = (answers.numbers() for answers in (self._unacked, self._unsent, self._unread, self._rcv_seq))
        out = []
        for state, raw, *each_of in zip(self._info.all(), self._window.all(), *columns, strict=True):
            not_acked, not_sent, not_read, seq = each_of
            if state[0] in FIN_UNACKED:
                not_acked, not_sent = not_acked - 1, max(0, not_sent - 1)
            seq = (seq - (state[0] in GOT_FIN)) & _MASK
            out.append(Amounts(state[0], state[5:7], not_acked, not_sent, not_read, seq, raw))
        return out


def save_all(connections: Sequence[tuple[int, int, object]]) -> list[SocketTcp]:
    """The state of (descriptor, objref, what to call it in messages), all as they are at one and the same moment.

    All are in repair mode, and stay in it; no program that has one runs. Packets may still come: repair mode
    stops neither the loopback device nor a delayed acknowledgement. Were the receiver of some bytes saved before
    they came, and their sender after they were acknowledged, then neither would have them. So all amounts are
    read again after all queues, until none has changed: then there was a moment between the two readings at
    which all were so."""
    records: list[SocketTcp | None] = [None] * len(connections)
    known: list[Amounts | None] = [None] * len(connections)
    fds = [fd for fd, _, _ in connections]
    reading = _Reading(fds)
    for _ in range(_ROUNDS):
        if not reading.differs():
            break
        now = reading.amounts()
        changed = [number for number, found in enumerate(now) if found != known[number]]
        if not changed:
            break
        for first in range(0, len(changed), _AT_ONCE):
            part = changed[first : first + _AT_ONCE]
            saved = save([(fds[number], connections[number][1], now[number]) for number in part])
            for number, rec in zip(part, saved, strict=True):
                known[number], records[number] = now[number], rec
    else:
        names = ", ".join(str(connections[number][2]) for number in changed[:3])
        raise CheckpointFailed(f"{names}: packets keep coming in", hint=_HELD)
    whole = []
    for (_, _, who), made, told in zip(connections, records, known, strict=True):
        assert made and told  # each has changed in the first round
        _check_whole(made, told, who)
        whole.append(made)
    return whole


def _check_whole(rec: SocketTcp, told: Amounts, who: object) -> None:
    if len(rec.sent) != told.unacked or len(rec.received) != told.unread or told.unacked < told.unsent:
        raise CheckpointFailed(
            f"{who}: {told.unread} bytes wait in this connection and {told.unacked} are not acknowledged, but"
            f" {len(rec.received)} and {len(rec.sent)} could be read",
            hint=_HELD,
        )
    if len(rec.sent) + len(rec.received) > MAX_RECORD - 4096:
        raise CheckpointFailed(f"{who}: {len(rec.sent) + len(rec.received)} bytes wait in this connection")


def save(connections: Sequence[tuple[int, int, Amounts]]) -> list[SocketTcp]:
    """The state of connections in repair mode: (descriptor, objref, how much is in its queues)."""
    ask = Ask([fd for fd, _, _ in connections])
    ask.put(_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
    snd_seq = ask.option(_TCP, TCP_QUEUE_SEQ)
    sent = ask.peek([max(0, told.unacked) for _, _, told in connections], _PEEK)
    ask.put(_TCP, TCP_REPAIR_QUEUE, RECV_QUEUE)
    received = ask.peek([told.unread for _, _, told in connections], _PEEK)
    mss, clock = ask.option(_TCP, TCP_MAXSEG), ask.option(_TCP, TCP_TIMESTAMP)
    ask.make()
    for answers, what in ((snd_seq, "TCP_QUEUE_SEQ"), (mss, "MAXSEG"), (clock, "TCP_TIMESTAMP")):
        answers.check(what)
    out = []
    columns = zip(connections, snd_seq.numbers(), mss.numbers(), clock.numbers(), strict=True)
    for at, ((_, objref, told), seq, segment, timestamp) in enumerate(columns):
        snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup = _WINDOW.unpack(told.window)
        out.append(
            SocketTcp(
                objref,
                told.state,
                told.rcv_seq,
                (seq - (told.state in SENT_FIN)) & _MASK,
                told.unsent,
                told.agreed[0] & (_OPT_TIMESTAMPS | _OPT_SACK | _OPT_WSCALE),
                told.agreed[1] & 0xF,
                told.agreed[1] >> 4,
                segment,
                timestamp & _MASK,
                snd_wl1,
                snd_wnd,
                max_window,
                rcv_wnd,
                rcv_wup,
                received.raw(at),
                sent.raw(at),
            )
        )
    return out


def in_flight(sock: socket.SocketType) -> tuple[int, int]:
    """(what the peer has not acknowledged, what of it was sent), in bytes, a FIN counting as one."""
    unacked = _query(sock, _SIOCOUTQ)
    return unacked, unacked - _query(sock, _SIOCOUTQNSD)


def timestamp(sock: socket.SocketType) -> int:
    """The clock of a connection's timestamps option, now."""
    return sock.getsockopt(_TCP, TCP_TIMESTAMP) & _MASK


def nothing_said(rec: SocketTcp, *, snd_seq: int, rcv_seq: int) -> SocketTcp:
    """The state of a connection with these sequence numbers, with nothing in its queues and no options agreed on;
    segments as in `rec`."""
    return SocketTcp(
        socket_objref=0,
        state=ESTABLISHED,
        rcv_seq=rcv_seq,
        snd_seq=snd_seq,
        unsent=0,
        options=0,
        snd_wscale=0,
        rcv_wscale=0,
        mss_clamp=rec.mss_clamp,
        timestamp=0,
        snd_wl1=rcv_seq,
        snd_wnd=_USUAL_WINDOW,
        max_window=_USUAL_WINDOW,
        rcv_wnd=_USUAL_WINDOW,
        rcv_wup=rcv_seq,
        received=b"",
        sent=b"",
    )


def check(rec: SocketTcp) -> None:
    """Refuse what no source writes. Raises ImageError."""
    if rec.state not in CONNECTED and rec.state != CLOSE:
        raise ImageError(f"socket {rec.socket_objref}: impossible state {rec.state} of TCP")
    if rec.unsent > len(rec.sent) or max(rec.snd_wscale, rec.rcv_wscale) > 14 or rec.options & ~7:
        raise ImageError(f"socket {rec.socket_objref}: impossible queue, window scale or options of TCP")


class Unmade(OSError):
    """Connection number `at` of several cannot be made."""

    def __init__(self, at: int, error: OSError) -> None:
        super().__init__(error.errno, error.strerror)
        self.at = at


def make_all(connections: Sequence[tuple[socket.SocketType, Socket, SocketTcp]]) -> None:
    """Connect new sockets of one family, each as its records have it: under repair, and with all that was in their
    queues but the part that was never sent, which is for send_rest(). Raises Unmade."""
    socks, owners, records = zip(*connections, strict=True)
    ask = Ask([sock.fileno() for sock in socks])
    entered = ask.put(_TCP, TCP_REPAIR, 1)
    ask.make()
    _check([(entered, "TCP_REPAIR")])  # else it would be connected by packets
    # both queues begin where their oldest bytes were
    sent = [_signed(rec.snd_seq - len(rec.sent)) for rec in records]
    received = [_signed(rec.rcv_seq - len(rec.received)) for rec in records]
    agreed = [_agreed(rec.mss_clamp, rec.options, rec.snd_wscale, rec.rcv_wscale) for rec in records]
    rooms = [4 * (len(rec.sent) + len(rec.received)) for rec in records]
    ask = Ask([sock.fileno() for sock in socks])
    asked = [
        (ask.bind([owner.local for owner in owners]), "bind"),
        (ask.put(_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE), "TCP_REPAIR_QUEUE"),
        (ask.put(_TCP, TCP_QUEUE_SEQ, sent), "TCP_QUEUE_SEQ"),
        (ask.put(_TCP, TCP_REPAIR_QUEUE, RECV_QUEUE), "TCP_REPAIR_QUEUE"),
        (ask.put(_TCP, TCP_QUEUE_SEQ, received), "TCP_QUEUE_SEQ"),
        (ask.connect([owner.peer for owner in owners]), "connect"),
        *ask_buffers(
            ask,
            [owner.sndbuf + room for owner, room in zip(owners, rooms, strict=True)],
            [owner.rcvbuf + room for owner, room in zip(owners, rooms, strict=True)],
        ),
        (ask.put_bytes(_TCP, TCP_REPAIR_OPTIONS, agreed), "TCP_REPAIR_OPTIONS"),
    ]
    ask.make()
    _check(asked)
    if stamped := [at for at, rec in enumerate(records) if rec.options & _OPT_TIMESTAMPS]:
        ask = Ask([socks[at].fileno() for at in stamped])
        clocks = ask.put(_TCP, TCP_TIMESTAMP, [_signed(records[at].timestamp) for at in stamped])
        ask.make()
        _check([(clocks, "TCP_TIMESTAMP")], stamped)
    _fill_all(socks, RECV_QUEUE, [rec.received for rec in records])
    _fill_all(socks, SEND_QUEUE, [rec.sent[: len(rec.sent) - rec.unsent] for rec in records])
    ask = Ask([sock.fileno() for sock in socks])
    asked = [
        (ask.put_bytes(_TCP, TCP_REPAIR_WINDOW, list(map(_window, records))), "TCP_REPAIR_WINDOW"),
        (ask.put(_TCP, TCP_REPAIR_QUEUE, NO_QUEUE), "TCP_REPAIR_QUEUE"),
    ]
    ask.make()
    _check(asked)


def _check(asked: Sequence[tuple[Answers, str]], of: Sequence[int] | None = None) -> None:
    """of: the numbers of the connections that were asked; None: of all."""
    for answers, what in asked:
        if min(answers.results) < 0:
            at, result = next((at, result) for at, result in enumerate(answers.results) if result < 0)
            raise Unmade(at if of is None else of[at], OSError(-result, f"{what}: {os.strerror(-result)}"))


@lru_cache(64)  # few are different
def _agreed(mss_clamp: int, agreed: int, snd_wscale: int, rcv_wscale: int) -> bytes:
    """What both ends agreed on when they connected."""
    options = [_TCPOPT_MSS, mss_clamp]
    if agreed & _OPT_WSCALE:
        options += _TCPOPT_WINDOW, snd_wscale | rcv_wscale << 16
    if agreed & _OPT_SACK:
        options += _TCPOPT_SACK_PERM, 0
    if agreed & _OPT_TIMESTAMPS:
        options += _TCPOPT_TIMESTAMP, 0
    return struct.pack(f"<{len(options)}I", *options)


def _window(rec: SocketTcp) -> bytes:
    window = rec.rcv_wnd, rec.rcv_wup
    if (rec.rcv_wup - rec.rcv_seq) & _MASK == 1:
        window = rec.rcv_wnd + 1, rec.rcv_seq  # it counted the peer's FIN, which comes later here
    return _WINDOW.pack(rec.snd_wl1, rec.snd_wnd, rec.max_window, *window)


def send_rest(sock: socket.SocketType, rec: SocketTcp) -> None:
    """Put the bytes that were never sent into the queue, outside of repair mode. Raises OSError."""
    view = memoryview(rec.sent)[len(rec.sent) - rec.unsent :]
    while view:
        view = view[sock.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]


def _fill_all(socks: Sequence[socket.SocketType], queue: int, contents: Sequence[bytes]) -> None:
    """As fill() of each: what is one chunk at most of all together. Raises Unmade."""
    little = [at for at, data in enumerate(contents) if 0 < len(data) <= _CHUNK]
    rest = list(contents)
    if little:
        ask = Ask([socks[at].fileno() for at in little])
        chosen = ask.put(_TCP, TCP_REPAIR_QUEUE, queue)
        sent = ask.send([contents[at] for at in little], socket.MSG_DONTWAIT)
        ask.make()
        _check([(chosen, "TCP_REPAIR_QUEUE")], little)
        for at, result in zip(little, sent.results, strict=True):
            rest[at] = rest[at][max(0, result) :]
    for at, data in enumerate(rest):
        try:
            fill(socks[at], queue, data)
        except OSError as error:
            raise Unmade(at, error) from error


def fill(sock: socket.SocketType, queue: int, data: bytes) -> None:
    """Put bytes into a queue of a connection in repair mode. Raises OSError."""
    if not data:
        return
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, queue)
    view = memoryview(data)
    while view:
        view = view[sock.send(view[:_CHUNK], socket.MSG_DONTWAIT) :]


def _query(sock: socket.SocketType, request: int) -> int:
    value = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), request, value)
    return value[0]


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 32) if value >> 31 else value
