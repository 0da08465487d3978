"""Pre-dumped files: those opened by path, pipes and connections, written ahead of the freeze. Most stay as they are.

The final FileTable supersedes these records; unreferenced ones are ignored.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol

from migrator.engine.user.descriptors import fdinfo, inotify
from migrator.engine.user.descriptors.ahead import Entry, Place, Writer, file_record, same
from migrator.engine.user.descriptors.classify import Obstacle, Root
from migrator.engine.user.descriptors.description import Description, Holder
from migrator.engine.user.descriptors.fdinfo import FdInfo
from migrator.engine.user.descriptors.found import Found
from migrator.engine.user.descriptors.predumped_pipes import PredumpedPipes
from migrator.engine.user.descriptors.predumped_sockets import PredumpedSockets
from migrator.engine.user.descriptors.questions import Answers
from migrator.engine.user.descriptors.standing import (
    Candidate,
    Listed,
    Standing,
    StandingConnections,
    StandingFiles,
    StandingPipes,
)
from migrator.engine.user.descriptors.survey import look
from migrator.image.records_files import OWNED_INODES, Descriptor, File, FileKind, FileOwner, FileTable, Socket
from migrator.linux.stat import Fingerprint, Status

BY_PATH = (FileKind.REGULAR, FileKind.DIRECTORY, FileKind.PATH, FileKind.DEVICE)  # few: faster than by a hash
_ROOT = 0, 0


class Known(NamedTuple):
    """What was found under a number while the process ran, and was written of it."""

    objref: int
    kind: FileKind
    path: str
    name: bytes  # the path from the tree's root, for the kernel
    status: Status
    fingerprint: Fingerprint  # of it
    info: FdInfo
    written: bytes  # the File record


class Refs(Protocol):
    def get(self, key: Hashable) -> tuple[int, bool]: ...


class PredumpedFiles:
    """`File` and `FileTable` records of a tree; those that stand in the stream already are not written again."""

    def __init__(self, objhash: Refs, writer: Writer, root_pid: int = 0) -> None:
        """`root_pid`: the tree's first process, by whose root directory all paths go."""
        self._root_pid = root_pid
        self._objhash = objhash
        self._writer = writer
        self._serial = 0
        self._sent: dict[int, bytes] = {}
        self._kinds: dict[int, tuple[int, str]] = {}  # kind and path of a File, which stay
        self._predumped: dict[Place, int] = {}
        self._inodes: dict[tuple[int, int, int], list[Place]] = {}
        self._taken: set[int] = set()
        self._tables: dict[int, list[Entry]] = {}  # as written last
        self._counts: dict[int, int] = {}  # by pid: how many were open then
        self._listed: dict[int, Listed] = {}  # by pid: which
        self._owners: dict[int, tuple[int, int]] = {}  # by objref of a File: user and group of its inode, as written
        self.known: dict[Place, Known] = {}
        self.pipes = PredumpedPipes(self._new, writer)
        self.sockets = PredumpedSockets(self._new, writer)
        self.with_pipes_and_connections = False
        self.looks = 0  # how often a process was looked at
        self.watched: dict[inotify.Key, str] = {}  # where what is watched lies

    def has_grown(self, process: Holder) -> bool:
        """Whether a process has more descriptors open than when it was looked at. Raises OSError if it has ended."""
        return fdinfo.count(process.pid) > self._counts.get(process.pid, 0)

    def predump(self, process: Holder) -> int:
        """Write the files of a running process that can be pre-dumped; the objref that its table will have.

        Raises OSError if the tree ends."""
        entries: list[Entry] = []
        cloexec: dict[int, bool] = {}  # of pipes and sockets, by number
        pipes: list[Found] = []
        sockets: list[Found] = []
        self.looks += 1
        self._counts[process.pid] = fdinfo.count(process.pid)
        root = Root(self._root_pid)
        try:
            found = list(look(process, root, []))
            self._listed[process.pid] = Listed(
                [item.number for item in found], [int(item.info.cloexec) for item in found]
            )
            for item in found:
                if item.verdict.kind == FileKind.INOTIFY:
                    with contextlib.suppress(Obstacle):  # it is said at the freeze, if it is so then
                        inotify.resolve(root, inotify.watches(item.info.watches), self.watched)
                if item.verdict.kind in BY_PATH:
                    entries.append((item.number, self._predump(item), item.info.cloexec))
                elif self.with_pipes_and_connections and item.verdict.kind in (FileKind.PIPE, FileKind.SOCKET):
                    cloexec[item.number] = item.info.cloexec
                    (pipes if item.verdict.kind == FileKind.PIPE else sockets).append(item)
        finally:
            root.close()
        for number, objref in (*self.pipes.predump(pipes), *self.sockets.predump(process, sockets)):
            entries.append((number, objref, cloexec[number]))
        entries.sort()
        table, _ = self._objhash.get(("files", process.pid))
        self.put_table(table, entries)
        return table

    def standing(self, processes: Sequence[Holder]) -> Standing:
        """What to compare in the freeze, of all that was written of these and that nobody else has."""
        of_pid = {process.pid: process for process in processes}
        inodes = Counter(known.fingerprint[:2] for known in self.known.values())
        entries = {
            (pid, number): (objref, flag)
            for pid in of_pid
            if pid in self._listed
            for number, objref, flag in self._tables.get(self._objhash.get(("files", pid))[0], ())
        }

        def candidate(place: Place, objref: int, inode: tuple[int, int], kernel_ino: int) -> Candidate | None:
            there, cloexec = entries.get(place, (0, False))
            if there != objref:
                return None  # it has gone, and its number may be another's
            return Candidate(of_pid[place[0]], place[1], objref, cloexec, inode, kernel_ino)

        files = []
        for place, known in self.known.items():
            inode, info = (known.status.st_dev, known.status.st_ino), known.info
            if inodes[inode] > 1 or info.locks or self._sent[known.objref] is not known.written:
                continue
            if (one := candidate(place, known.objref, inode, info.ino)) is not None:
                files.append((one, info.flags, info.pos, known.fingerprint, known.name))
        pipes = []
        for objref, inode, ((read_at, reads), (write_at, writes)) in self.pipes.found_whole():
            read = candidate(read_at, reads.objref, inode, inode[1])
            write = candidate(write_at, writes.objref, inode, inode[1])
            if read is not None and write is not None:
                pipes.append((objref, (read, reads.facts), (write, writes.facts)))
        connections: dict[int, list[tuple[Candidate, Socket, Answers]]] = {}
        for place, sent in self.sockets.found_once():
            if (one := candidate(place, sent.file_objref, sent.facts[:2], sent.facts[1])) is not None:
                connections.setdefault(sent.rec.family, []).append((one, sent.rec, sent.answers))
        return Standing(
            StandingFiles(files),
            StandingPipes(pipes),
            [StandingConnections(family, of, self.sockets.asked_of(family)) for family, of in connections.items()],
            {pid: self._listed[pid] for pid in of_pid if pid in self._listed},
        )

    def take(self, objrefs: Iterable[int]) -> None:
        """These stand: no description is to have one of them."""
        self._taken.update(objrefs)

    def objref_of(self, description: Description) -> int:
        """The objref of a description of the stopped tree; the pre-dumped one if there is one that fits."""
        if description.objref:
            return description.objref  # of a pre-dumped pipe or connection
        known = description.known
        if known is not None and known.objref not in self._taken:
            self._taken.add(known.objref)
            return known.objref
        if description.kind not in BY_PATH:
            return self._new()
        for process, number in description.holders:
            objref = self._predumped.get((process.pid, number), 0)
            if objref and objref not in self._taken and self._kinds.get(objref) == (description.kind, description.path):
                self._taken.add(objref)
                return objref
        return self._new()

    def stands(self, description: Description) -> bool:
        """Whether what the stream has of a description is all that there is to say of it."""
        known = description.known
        if description.kind in (FileKind.PIPE, FileKind.SOCKET):
            return description.predumped
        return known is not None and description.objref == known.objref and self._sent[known.objref] is known.written

    def put(self, rec: File, status: Status | os.stat_result) -> bytes:
        """Write a record and who owns its inode, unless they stand in the stream as they are; what stands there then of
        the record."""
        raw = rec.encode()
        before = self._sent.get(rec.objref)
        if before == raw:
            raw = before
        else:
            self._sent[rec.objref] = raw
            self._writer.encoded(raw)
        owner = status.st_uid, status.st_gid
        # of what is in /proc about a task, the owner is that of the task, which is another one until it is restarted
        if (
            rec.kind in OWNED_INODES
            and not rec.path.startswith("/proc/")
            and self._owners.get(rec.objref, _ROOT) != owner
        ):
            self._owners[rec.objref] = owner
            self._writer.encoded(FileOwner(rec.objref, 0, *owner).encode())
        return raw

    def put_table(self, objref: int, entries: list[Entry]) -> None:
        """The same of a table."""
        if self._tables.get(objref) != entries:
            self._tables[objref] = entries
            self._writer.encoded(
                FileTable(objref, 0, [Descriptor(n, file, int(c), 0) for n, file, c in entries]).encode()
            )

    # ------------------------------------------------------------------ inside

    def _new(self) -> int:
        self._serial += 1
        return self._objhash.get(("file", self._serial))[0]

    def _predump(self, item: Found) -> int:
        status, info, verdict = item.status, item.info, item.verdict
        objref = self._objref(item)
        self._predumped[item.process.pid, item.number] = objref
        self._kinds[objref] = verdict.kind, verdict.path
        written = self.put(
            file_record(objref, verdict.kind, status, info.flags, pos=info.pos, size=status.st_size, path=verdict.path),
            status,
        )
        place = item.process.pid, item.number
        self.known.pop(place, None)
        if verdict.kind == FileKind.REGULAR and info.ino:
            name = os.fsencode(verdict.path.lstrip("/"))
            known = Status.of(status)
            self.known[place] = Known(objref, verdict.kind, verdict.path, name, known, known.fingerprint, info, written)
        return objref

    def _objref(self, item: Found) -> int:
        place = item.process.pid, item.number
        verdict = item.verdict
        before = self._predumped.get(place, 0)
        if self._kinds.get(before) == (verdict.kind, verdict.path):
            return before
        others = self._inodes.setdefault((item.status.st_dev, item.status.st_ino, item.info.flags), [])
        for other in others:
            objref = self._predumped[other]
            if self._kinds[objref] == (verdict.kind, verdict.path) and same(place, other):
                return objref
        others.append(place)
        return self._new()
