"""Pre-dumped connections of TCP: their sockets are made on the other side ahead of the freeze, with no address yet.

One counts as pre-dumped in the end if its Socket record and its File are as they were written; else it is written
anew, as other objects. What is in its queues, and its sequence numbers, are of the freeze anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from migrator.engine.user.descriptors import sockopts
from migrator.engine.user.descriptors.ahead import Facts, Place, Writer, facts_of, file_record
from migrator.engine.user.descriptors.description import Description, Holder
from migrator.engine.user.descriptors.found import Found
from migrator.engine.user.descriptors.questions import KIND, Answers, Questions
from migrator.image.records_files import FileKind, Socket
from migrator.linux import inet_diag
from migrator.linux.batch import Table
from migrator.linux.namespaces import entered
from migrator.linux.stat import Status
from migrator.linux.x86_64 import NR

_AT_ONCE = 8  # sockets that are held at the same time, for about a millisecond


class Sent(NamedTuple):
    """What the stream has of a connection: its Socket, and of its File. And what of it answered when it was asked."""

    rec: Socket
    file_objref: int
    facts: Facts
    answers: Answers


class PredumpedSockets:
    def __init__(self, new: Callable[[], int], writer: Writer) -> None:
        """`new` gives out objrefs."""
        self._new = new
        self._writer = writer
        self._sent: dict[int, Sent] = {}  # by inode number
        self._places: dict[int, set[Place]] = {}  # where these were found
        self._defaults: sockopts.Defaults | None = None

    def predump(self, process: Holder, found: Sequence[Found]) -> list[tuple[int, int]]:
        """Write the connections among sockets that a running process has; of each number the objref of its File.

        A connection can only be asked through a descriptor. So each is held for a moment, and a FIN of its program
        can leave that much later. Nothing else is: what was bound could not be bound again meanwhile."""
        out: list[tuple[int, int]] = []
        if not found:
            return out
        with entered(f"/proc/{process.pid}/ns/net"):
            there = {sock.inode: sock.family for sock in inet_diag.tcp_sockets_here([inet_diag.ESTABLISHED])}
            self._defaults = self._defaults or sockopts.Defaults()
            for family in sorted(set(there.values())):
                items = [item for item in found if there.get(item.status.st_ino) == family]
                defaults = self.asked_of(family)
                for first in range(0, len(items), _AT_ONCE):
                    out += self._look(process, items[first : first + _AT_ONCE], family, defaults)
        return out

    def asked_of(self, family: int) -> list[sockopts.Default]:
        """The options that connections of a family were asked for."""
        assert self._defaults is not None
        return self._defaults.of(family, *KIND, connected=True)

    def found_once(self) -> Iterator[tuple[Place, Sent]]:
        """Those that were met under one number only, and where that was."""
        for inode, places in self._places.items():
            if len(places) == 1:
                yield next(iter(places)), self._sent[inode]

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

    def _look(
        self, process: Holder, items: Sequence[Found], family: int, defaults: Sequence[sockopts.Default]
    ) -> Iterator[tuple[int, int]]:
        numbers = [item.number for item in items]
        fetch = Table(len(items), (NR["pidfd_getfd"], process.pidfd, numbers, 0))
        let_go = Table(len(items), (NR["close"], 0))
        questions = Questions(family, len(items), defaults)
        fetch.walk()
        try:
            questions.ask(fetch.results(0))
        finally:
            let_go.put(0, 1, fetch.results(0))
            let_go.walk()
        for at, (item, answers) in enumerate(zip(items, questions.each(), strict=True)):
            rec = questions.record(answers)
            if rec is not None and rec.objref == item.status.st_ino:
                sockopts.check(rec.options, item)
                status = Status.unpack(questions.states.view, at * questions.states.stride)
                self._places.setdefault(rec.objref, set()).add((process.pid, item.number))
                yield item.number, self._put(status, questions.flags[at], rec, answers)

    def _put(self, status: Status, flags: int, rec: Socket, answers: Answers) -> int:
        facts = facts_of(status, flags)
        before = self._sent.get(status.st_ino)
        if before is not None and before.facts == facts and replace(rec, objref=before.rec.objref) == before.rec:
            self._sent[status.st_ino] = before._replace(answers=answers)
            return before.file_objref
        rec.objref = self._new()
        self._writer.encoded(rec.encode())
        objref = self._new()
        self._sent[status.st_ino] = Sent(rec, objref, facts, answers)
        file = file_record(objref, FileKind.SOCKET, status, flags, inode_objref=rec.objref)
        self._writer.encoded(file.encode())
        return objref
