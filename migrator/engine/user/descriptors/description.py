"""Open file descriptions of a tree, each once, with everybody who holds it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from migrator.engine.user.descriptors.ahead import Entry
from migrator.engine.user.descriptors.classify import Root
from migrator.engine.user.descriptors.fdinfo import FdInfo
from migrator.image.records_files import FileKind
from migrator.linux.stat import Status

if TYPE_CHECKING:
    from migrator.engine.user.descriptors.predumped import Known


@dataclass(slots=True)
class Holder:
    """A process of the tree: `pid` as we see it, `vpid` as in the image, `pidfd` of it."""

    pid: int
    vpid: int
    pidfd: int


@dataclass(slots=True)
class Description:
    """An open file description, fetched as `fd`. `holders` are (process, number)."""

    fd: int
    stat: Status
    flags: int  # as in fdinfo: F_GETFL
    info: FdInfo
    kind: FileKind
    path: str
    root: Root
    holders: list[tuple[Holder, int]] = field(default_factory=list)
    objref: int = 0
    inode_objref: int = 0
    locks_saved: bool = False
    owned: bool = False  # somebody gets its signals (F_SETOWN), or would get others than usual (F_SETSIG)
    predumped: bool = False  # of a pipe or a connection, whose File is written, and holds
    known: Known | None = None  # it is just what was found while the tasks ran

    @property
    def inode(self) -> tuple[int, int]:
        return self.stat.st_dev, self.stat.st_ino

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    def __str__(self) -> str:
        process, number = self.holders[0]
        return f"pid {process.pid} fd {number}"


@dataclass(slots=True)
class Slot:
    """One descriptor in a table."""

    number: int
    description: Description
    cloexec: bool
    locks: tuple[str, ...] = ()  # lines of fdinfo: a lock of fcntl(2) belongs to the process


@dataclass(slots=True)
class DescriptorTable:
    """A descriptor table and the processes that use it (CLONE_FILES)."""

    processes: list[Holder]
    slots: list[Slot] = field(default_factory=list)
    standing: list[Entry] = field(default_factory=list)  # the others: nothing has changed in them

    @property
    def entries(self) -> list[Entry]:
        """All lines of it, once all have their objrefs."""
        own = [(slot.number, slot.description.objref, slot.cloexec) for slot in self.slots]
        return sorted(own + self.standing)

    def find(self, number: int) -> Description | None:
        return next((slot.description for slot in self.slots if slot.number == number), None)
