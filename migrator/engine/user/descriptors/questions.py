"""All that is asked of a connection of TCP, and its Socket record from the answers.

The same calls are made twice: ahead of the freeze, where the record is made of what they answer, and in the freeze,
where only answers that differ are looked into. So whatever the record has of a connection must be asked here.
"""

from __future__ import annotations

import fcntl
import socket
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from migrator.engine.user.descriptors import sockopts, tcp
from migrator.image.records_files import Socket, SocketOption, SocketState
from migrator.linux import descriptors
from migrator.linux.batch import Area, Column, Table
from migrator.linux.stat import STAT_SIZE
from migrator.linux.x86_64 import NR

Answers = tuple[int, ...]  # of one connection, word by word
KIND = int(socket.SOCK_STREAM), int(socket.IPPROTO_TCP)

_STATE = 0xFF  # of the first word of TCP_INFO
_OF_STAT = (0, 1, 3, 4)  # words of struct stat: device, inode number, mode and user, group
_NAME_BYTES = {int(socket.AF_INET): 16, int(socket.AF_INET6): 28}  # struct sockaddr_in, struct sockaddr_in6
_CONGESTION_BYTES = 16
_SIGNAL, _PEEK_OFF = 3, 4  # of the questions
_LAST_INT = 1 << 31


class _Question(NamedTuple):
    """One call, and the words of its answers that count."""

    call: tuple[Column, ...]
    area: Area | None = None
    words: Sequence[int] = ()
    kept: Area | None = None  # what else the kernel writes


class Questions:
    """Those to `count` connections of one family, laid out ahead. To be asked once.

    defaults: what the options are compared with: those that differ are in the record."""

    def __init__(self, family: int, count: int, defaults: Sequence[sockopts.Default]) -> None:
        self._family, self._defaults, self._count = family, defaults, count
        self.states = Area(STAT_SIZE, count)
        owners = Area(8, count)
        self._questions = [
            _Question((NR["fstat"], 0, self.states.addresses), self.states, _OF_STAT),
            _Question((NR["fcntl"], 0, fcntl.F_GETFL)),
            _Question((NR["fcntl"], 0, descriptors.F_GETOWN_EX, owners.addresses), owners, (0,)),
            _Question((NR["fcntl"], 0, descriptors.F_GETSIG)),
            self._option(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF, 4),
            self._option(sockopts.SOL_SOCKET, sockopts.SO_GET_FILTER, 0, told_by_length=True),
            self._option(socket.IPPROTO_TCP, sockopts.TCP_ULP, 16, told_by_length=True),
            self._option(sockopts.SOL_SOCKET, sockopts.SO_BINDTOIFINDEX, 4),
            self._name("getsockname"),
            self._name("getpeername"),
            self._option(socket.IPPROTO_TCP, sockopts.TCP_CONGESTION, _CONGESTION_BYTES),
            self._option(sockopts.SOL_SOCKET, sockopts.SO_SNDBUF, 4),
            self._option(sockopts.SOL_SOCKET, sockopts.SO_RCVBUF, 4),
            self._option(sockopts.SOL_SOCKET, sockopts.SO_BUF_LOCK, 4),
        ]
        for level, name, _, special in defaults:
            self._questions.append(self._option(level, name, sockopts.size_of(name) if special else 4))
        self._info = Area(8, count)
        self._questions.append(self._option(socket.IPPROTO_TCP, tcp.TCP_INFO, 8, into=self._info))
        self._table = Table(count, *(question.call for question in self._questions))

    def ask(self, fds: memoryview) -> None:
        """`fds` is a column, as of Table.put()."""
        for place in range(len(self._questions)):
            self._table.put(place, 1, fds)
        self._table.walk()
        state = self._info.view.cast("Q")
        state[:] = memoryview(array("Q", [word & _STATE for word in state.tolist()]))

    @property
    def flags(self) -> memoryview:
        """F_GETFL of each, a column."""
        return self._table.results(1)

    @property
    def answers(self) -> list[memoryview]:
        """Columns of words: what each call returned, and then all else that it answered."""
        out = [self._table.results(place) for place in range(len(self._questions))]
        for question in self._questions:
            if question.area is not None:
                view = question.area.view.cast("q")
                out += (view[word :: question.area.stride // 8] for word in question.words)
        return out

    def each(self) -> list[Answers]:
        """The same of each connection."""
        return list(zip(*(column.tolist() for column in self.answers), strict=True))

    def record(self, answers: Answers) -> Socket | None:
        """The record of a connection that can go ahead, with its inode number for objref; None of another."""
        questions = len(self._questions)
        rest = iter(answers[questions:])
        called = list(answers[:questions])
        called[_PEEK_OFF] = max(0, called[_PEEK_OFF])  # older kernels have none of TCP
        if min(called) < 0 or called[_SIGNAL]:
            return None
        _, ino, mode_and_uid, gid = (next(rest) for _ in _OF_STAT)
        owner, peek_off, filtered, upper, device = (next(rest) for _ in range(5))
        own, peer = self._take_name(rest), self._take_name(rest)
        congestion = _bytes(next(rest) for _ in range(_CONGESTION_BYTES // 8)).partition(b"\0")[0]
        sndbuf, rcvbuf, buf_lock = (next(rest) for _ in range(3))
        options = self._changed(rest)
        told = answers[_PEEK_OFF] == 0
        if owner or filtered or upper or device or next(rest) != tcp.ESTABLISHED or (told and _signed(peek_off) >= 0):
            return None
        return Socket(
            objref=ino,
            family=self._family,
            type=KIND[0],
            protocol=KIND[1],
            state=SocketState.CONNECTED,
            shutdown=0,
            backlog=0,
            peer_objref=0,
            sndbuf=sndbuf & ~1,  # see InetDump
            rcvbuf=rcvbuf & ~1,
            buf_lock=buf_lock,
            mode=0,
            uid=mode_and_uid >> 32 & 0xFFFFFFFF,
            gid=gid & 0xFFFFFFFF,
            error=0,
            local=own,
            peer=peer,
            path="",
            device="",
            congestion=congestion.decode("ascii", "replace"),
            options=options,
        )

    # ------------------------------------------------------------------ inside

    def _option(
        self, level: int, name: int, size: int, *, told_by_length: bool = False, into: Area | None = None
    ) -> _Question:
        area = into or Area(max(4, size), self._count)
        lengths = Area(4, self._count)
        lengths.view.cast("Q")[:] = memoryview(array("Q", [size]) * max(1, self._count))
        call = NR["getsockopt"], 0, level, name, area.addresses, lengths.addresses
        if told_by_length:
            return _Question(call, lengths, (0,), kept=area)
        return _Question(call, area, range(area.stride // 8), kept=lengths)

    def _name(self, which: str) -> _Question:
        size = _NAME_BYTES[self._family]
        area, lengths = Area(size, self._count), Area(4, self._count)
        lengths.view.cast("Q")[:] = memoryview(array("Q", [size]) * max(1, self._count))
        call = NR[which], 0, area.addresses, lengths.addresses
        return _Question(call, area, range(area.stride // 8), kept=lengths)

    def _take_name(self, words: Iterable[int]) -> bytes:
        words, size = iter(words), _NAME_BYTES[self._family]
        return _bytes(next(words) for _ in range(-(-size // 8)))[:size]

    def _changed(self, words: Iterable[int]) -> list[SocketOption]:
        words, out, priority = iter(words), [], 0
        for level, name, default, special in self._defaults:
            if special:
                value = sockopts.number(name, _bytes(next(words) for _ in range(sockopts.size_of(name) // 8)))
            else:
                value = _signed(next(words))
            if (level, name) == sockopts.PRIORITY:
                priority = value
            if value != default:
                out.append(SocketOption(level, name, value))
        return sockopts.with_priority_last(out, lambda: priority)


def _bytes(words: Iterable[int]) -> bytes:
    return array("q", words).tobytes()


def _signed(word: int) -> int:
    """An int of four bytes."""
    return word - 2 * _LAST_INT if word >= _LAST_INT else word
