"""Pre-dumped files: those opened by path, written ahead of the freeze. Most of them do not change until then.

Only /proc is read: nothing of a running process is opened or held. The final FileTable supersedes these records;
unreferenced ones are ignored.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from migrator.engine.user.descriptors.classify import Root
from migrator.engine.user.descriptors.description import Description, Holder
from migrator.engine.user.descriptors.found import Found
from migrator.engine.user.descriptors.survey import look
from migrator.image.records_files import Descriptor, File, FileKind, FileTable
from migrator.linux import descriptors

BY_PATH = frozenset({FileKind.REGULAR, FileKind.DIRECTORY, FileKind.PATH, FileKind.DEVICE})

Place = tuple[int, int]  # pid, number


class Refs(Protocol):
    def get(self, key: Hashable) -> tuple[int, bool]: ...


class Writer(Protocol):
    def encoded(self, raw: bytes) -> None: ...


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

    def predump(self, process: Holder) -> int:
        """Write what a running process has open by path; the objref that its table will have.

        Raises OSError if the tree ends."""
        entries = []
        root = Root(self._root_pid)
        try:
            for item in look(process, root, []):
                if item.verdict.kind in BY_PATH:
                    objref = self._predump(item)
                    entries.append(Descriptor(item.number, objref, int(item.info.cloexec), 0))
        finally:
            root.close()
        table, _ = self._objhash.get(("files", process.pid))
        self.put(FileTable(table, 0, entries))
        return table

    def objref_of(self, description: Description) -> int:
        """The objref of a description of the stopped tree; the pre-dumped one if there is one that fits."""
        for process, number in description.holders:
            objref = self._predumped.get((process.pid, number), 0)
            if objref not in self._taken and self._kinds.get(objref) == (description.kind, description.path):
                self._taken.add(objref)
                return objref
        return self._new()

    def put(self, rec: File | FileTable) -> None:
        """Write a record, unless it stands in the stream as it is."""
        raw = rec.encode()
        if self._sent.get(rec.objref) != raw:
            self._sent[rec.objref] = raw
            self._writer.encoded(raw)

    # ------------------------------------------------------------------ inside

    def _new(self) -> int:
        self._serial += 1
        return self._objhash.get(("file", self._serial))[0]

    def _predump(self, item: Found) -> int:
        status, info, verdict = item.status, item.info, item.verdict
        objref = self._objref(item)
        self._predumped[item.process.pid, item.number] = objref
        self._kinds[objref] = verdict.kind, verdict.path
        self.put(
            File(
                objref=objref,
                kind=verdict.kind,
                flags=info.flags,
                mode=status.st_mode,
                pos=info.pos,
                size=status.st_size,
                mtime=max(0, status.st_mtime_ns),
                dev=status.st_dev,
                ino=status.st_ino,
                rdev=status.st_rdev,
                inode_objref=0,
                owner_type=0,
                owner_pid=0,
                owner_signal=0,
                lock=0,
                reserved=0,
                path=verdict.path,
            )
        )
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
            if self._kinds[objref] == (verdict.kind, verdict.path) and _same(place, other):
                return objref
        others.append(place)
        return self._new()


def _same(a: Place, b: Place) -> bool:
    try:
        return descriptors.same_file(*a, *b)
    except OSError:
        return False  # one of them is closed
