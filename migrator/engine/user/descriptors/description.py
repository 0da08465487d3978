"""Open file descriptions of a tree, each once, with everybody who holds it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from migrator.engine.user.descriptors import fdinfo
from migrator.engine.user.descriptors.classify import Obstacle, Root, classify
from migrator.engine.user.descriptors.fdinfo import FdInfo
from migrator.errors import CheckpointFailed
from migrator.image.records_files import FileKind
from migrator.linux import descriptors, sys

T = TypeVar("T")


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
    stat: os.stat_result
    flags: int  # as in fdinfo: F_GETFL
    info: FdInfo
    kind: FileKind
    path: str
    root: Root
    holders: list[tuple[Holder, int]] = field(default_factory=list)
    objref: int = 0
    inode_objref: int = 0
    locks_saved: bool = False

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

    def find(self, number: int) -> Description | None:
        return next((slot.description for slot in self.slots if slot.number == number), None)


class Collection:
    """All descriptors of stopped processes, fetched. `close()` gives back what was fetched.

    Raises CheckpointFailed naming pid and descriptor if one cannot be carried; the workload is untouched.
    """

    def __init__(self, processes: Sequence[Holder]) -> None:
        self.tables: list[DescriptorTable] = []
        self.descriptions: list[Description] = []
        self._buckets: dict[tuple[int, int, int], list[Description]] = {}
        self._last: dict[int, tuple[int, Description]] = {}  # number -> (pid, description) met last
        descriptors.allow_many_files()
        self.root = Root(processes[0].pid)
        ordered: list[DescriptorTable] = []
        try:
            for process in processes:
                place, known = search(ordered, partial(_order_tables, process))
                if known:
                    ordered[place].processes.append(process)
                else:
                    ordered.insert(place, self._read_table(process))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for description in self.descriptions:
            os.close(description.fd)
        self.descriptions.clear()
        if self.root.fd >= 0:
            self.root.close()
            self.root.fd = -1

    def _read_table(self, process: Holder) -> DescriptorTable:
        table = DescriptorTable([process])
        with fdinfo.Reader(process.pid) as reader:
            for number in fdinfo.numbers(process.pid):
                info = reader.read(number)
                description = self._known_by_number(process, number) or self._fetch(process, number, info)
                description.holders.append((process, number))
                self._last[number] = process.pid, description
                table.slots.append(Slot(number, description, info.cloexec, info.locks))
        self.tables.append(table)
        return table

    def _known_by_number(self, process: Holder, number: int) -> Description | None:
        """A child mostly has its parent's descriptors under the same numbers: one call tells."""
        pid, description = self._last.get(number, (0, None))
        if description is not None and descriptors.same_file(pid, number, process.pid, number):
            return description
        return None

    def _fetch(self, process: Holder, number: int, info: FdInfo) -> Description:
        fd = sys.pidfd_getfd(process.pidfd, number)
        try:
            status = os.fstat(fd)
            bucket = self._buckets.setdefault((status.st_dev, status.st_ino, info.flags), [])
            place, known = search(bucket, partial(_order_files, fd))
            if known:
                os.close(fd)
                return bucket[place]
            link = os.readlink(f"/proc/self/fd/{fd}")
            try:
                verdict = classify(link, status, info, self.root)
            except Obstacle as obstacle:
                raise CheckpointFailed(
                    f"pid {process.pid} fd {number}: {obstacle}", hint="the workload runs on, untouched"
                ) from None
        except BaseException:
            os.close(fd)
            raise
        made = Description(fd, status, info.flags, info, verdict.kind, verdict.path, self.root)
        bucket.insert(place, made)
        self.descriptions.append(made)
        return made


def _order_tables(process: Holder, table: DescriptorTable) -> int:
    return descriptors.order_tables(process.pid, table.processes[0].pid)


def _order_files(fd: int, description: Description) -> int:
    return descriptors.order_files(fd, description.fd)


def search(ordered: list[T], compare: Callable[[T], int]) -> tuple[int, bool]:
    """(place, whether it is there) by binary search in the kernel's own order of objects (kcmp(2)).

    Anonymous inodes all look the same to stat(2): comparing each with each would be quadratic."""
    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high) // 2
        result = compare(ordered[middle])
        if result == 0:
            return middle, True
        if result < 0:
            high = middle
        else:
            low = middle + 1
    return low, False
