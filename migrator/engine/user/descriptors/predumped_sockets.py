"""Pre-dumped connections of TCP: their sockets are made on the other side ahead of the freeze, with no address yet.

One counts as pre-dumped in the end if its Socket record and its File are as they were written; else it is written
anew, as other objects. What is in its queues, and its sequence numbers, are of the freeze anyway.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from migrator.engine.user.descriptors import inet_dump, sockopts
from migrator.engine.user.descriptors.ahead import Facts, Writer, facts_of, file_record
from migrator.engine.user.descriptors.description import Description, Holder
from migrator.engine.user.descriptors.found import Found
from migrator.image.records_files import FileKind, Socket
from migrator.linux import inet_diag
from migrator.linux.batch import Area, each
from migrator.linux.namespaces import entered
from migrator.linux.stat import STAT_SIZE, Status
from migrator.linux.x86_64 import NR

_AT_ONCE = 8  # sockets that are held at the same time, for about a millisecond
_KIND = int(socket.SOCK_STREAM), int(socket.IPPROTO_TCP)


class _Sent(NamedTuple):
    """What the stream has of a connection: its Socket, and of its File."""

    rec: Socket
    file_objref: int
    facts: Facts


class _Held(NamedTuple):
    number: int
    fd: int
    stat: Status
    flags: int


class PredumpedSockets:
    def __init__(self, new: Callable[[], int], writer: Writer) -> None:
        """`new` gives out objrefs."""
        self._new = new
        self._writer = writer
        self._sent: dict[int, _Sent] = {}  # by inode number

    def predump(self, process: Holder, found: Sequence[Found]) -> Iterator[tuple[int, int]]:
        """Write the connections among sockets that a running process has; of each number the objref of its File.

        A connection can only be asked through a descriptor. So each is held for a moment, and a FIN of its program
        can leave that much later. Nothing else is: what was bound could not be bound again meanwhile."""
        if not found:
            return
        read: list[tuple[_Held, Socket]] = []
        with entered(f"/proc/{process.pid}/ns/net"):
            there = {sock.inode for sock in inet_diag.tcp_sockets_here([inet_diag.ESTABLISHED])}
            numbers = [item.number for item in found if item.status.st_ino in there]
            defaults = sockopts.Defaults()
            for first in range(0, len(numbers), _AT_ONCE):
                with _held(process, numbers[first : first + _AT_ONCE]) as held:
                    read += _read(held, defaults)
        for one, rec in read:
            yield one.number, self._put(one, rec)

    def find(self, item: Description, rec: Socket) -> int:
        """The objref of the Socket of a description of the stopped tree, which has its own then; 0 if either is not as
        it was written."""
        sent = self._sent.get(item.stat.st_ino)
        if sent is None or sent.facts != facts_of(item.stat, item.flags) or item.owned or item.info.locks:
            return 0
        objref, rec.objref = rec.objref, sent.rec.objref
        same = rec == sent.rec
        rec.objref = objref
        if not same:
            return 0
        item.objref, item.predumped = sent.file_objref, True
        return sent.rec.objref

    def _put(self, one: _Held, rec: Socket) -> int:
        status = one.stat
        facts = facts_of(status, one.flags)
        before = self._sent.get(status.st_ino)
        if before is not None and before.facts == facts and replace(rec, objref=before.rec.objref) == before.rec:
            return before.file_objref
        rec.objref = self._new()
        self._writer.encoded(rec.encode())
        objref = self._new()
        self._sent[status.st_ino] = _Sent(rec, objref, facts)
        file = file_record(objref, FileKind.SOCKET, status, one.flags, inode_objref=rec.objref)
        self._writer.encoded(file.encode())
        return objref


def _read(held: Sequence[_Held], defaults: sockopts.Defaults) -> list[tuple[_Held, Socket]]:
    """Of those that are connections, the records."""
    socks = [sockopts.borrow(one.fd) for one in held]
    try:
        items = [
            (one, sock)
            for one, sock in zip(held, socks, strict=True)
            if sock.family in inet_dump.FAMILIES and (sock.type, sock.proto) == _KIND
        ]
        records = inet_dump.established(items, defaults) if items else []
    finally:
        for sock in socks:
            sock.detach()
    return [(one, rec) for (one, _), rec in zip(items, records, strict=True) if rec is not None and not rec.device]


@contextmanager
def _held(process: Holder, numbers: Sequence[int]) -> Iterator[list[_Held]]:
    """Those of them that are sockets, held."""
    count = len(numbers)
    (fds,) = each(count, (NR["pidfd_getfd"], [process.pidfd] * count, numbers, 0))
    try:
        states = Area(STAT_SIZE, count)
        looked, flags = each(count, (NR["fstat"], fds, states.addresses), (NR["fcntl"], fds, fcntl.F_GETFL))
        stats = [Status.unpack(states.view, at * states.stride) for at in range(count)]
        yield [
            _Held(number, fds[at], stats[at], flags[at])
            for at, number in enumerate(numbers)
            if looked[at] == 0 and not flags[at] & os.O_PATH and stat.S_ISSOCK(stats[at].st_mode)
        ]
    finally:
        for fd in fds:
            if fd >= 0:
                os.close(fd)
