"""Memory shared by mappings and descriptors: anonymous shared mappings and memfds.

Such an object is saved once, under its own objref, and its pages are addressed by offset. What is written
through mappings is tracked in each of them; an object that can be written through a descriptor as well is
sent whole again at the end.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, field

from migrator.engine.stream import RecordWriter
from migrator.engine.user.dump.pages import PageSender
from migrator.engine.user.ranges import Span, intersect, merge, subtract
from migrator.image.records import PAGE_SIZE, PageKind, Shm, ShmKind
from migrator.linux.procfs import Vma

_MEMFD = "/memfd:"
_ANON = "/dev/zero (deleted)"
_DELETED = " (deleted)"
_TIME_STEP = 20_000_000  # ns between two steps of the clock that times of change are taken from, and some


def is_shm(vma: Vma) -> bool:
    """A shared mapping whose memory lives in no file that one could open by name."""
    return vma.shared and (vma.path == _ANON or vma.path.startswith(_MEMFD))


@dataclass(slots=True)
class Object:
    objref: int
    kind: ShmKind
    name: str
    fd: int
    size: int = 0
    seals: int = 0
    described: bool = False  # its record was written
    announced: bool = False  # its contents were sent once
    by_descriptor: bool = False
    dirty: list[Span] = field(default_factory=list)
    there: list[Span] = field(default_factory=list)  # where it had contents when it was sent last
    mtime: int = 0  # ns: when it was written, as known when all of it was sent
    sent: int = 0  # ns: when that was


class SharedMemory:
    """All shared objects of a tree, by (device, inode)."""

    def __init__(self) -> None:
        self.objects: dict[tuple[int, int], Object] = {}

    def of_mapping(self, pid: int, vma: Vma, objref: int) -> Object:
        """The object behind a mapping; opened through /proc/PID/map_files when first met."""
        key = device_key(vma)
        known = self.objects.get(key)
        if known is None:
            fd = os.open(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}", os.O_RDWR | os.O_CLOEXEC)
            anon = vma.path == _ANON
            name = "" if anon else vma.path[len(_MEMFD) :].removesuffix(_DELETED)
            known = self.objects[key] = Object(objref, ShmKind.ANON if anon else ShmKind.MEMFD, name, fd)
        return known

    def of_descriptor(self, key: tuple[int, int], fd: int, name: str, seals: int, objref: int) -> Object:
        """The object behind a memfd descriptor `fd` (opened again here)."""
        known = self.objects.get(key)
        if known is None:
            # opened anew: a duplicate would share the file position with the workload
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            known = self.objects[key] = Object(objref, ShmKind.MEMFD, name, own)
        known.by_descriptor = True
        known.seals = seals
        return known

    @staticmethod
    def describe(item: Object, writer: RecordWriter) -> None:
        """Write the record of an object if it never was: ahead of the mappings that refer to it."""
        if not item.described:
            status = os.fstat(item.fd)
            item.size = status.st_size
            item.described = True
            writer.write(Shm(item.objref, item.kind, item.size, item.seals, status.st_mode & 0o7777, item.name))

    def send(self, writer: RecordWriter, sender: PageSender, *, final: bool) -> None:
        for item in self.objects.values():
            status = os.fstat(item.fd)
            size = status.st_size
            if not item.described or size != item.size or final:
                item.size, item.described = size, True
                writer.write(Shm(item.objref, item.kind, size, item.seals, status.st_mode & 0o7777, item.name))
            there = merge(_data_spans(item.fd, size))
            # write(2) shows in the time of change; what it shows may be some ms old, though
            written = status.st_mtime_ns != item.mtime or item.sent - item.mtime < _TIME_STEP
            if not item.announced or (final and item.by_descriptor and written):
                spans = there
                item.mtime, item.sent = status.st_mtime_ns, time.time_ns()
            else:
                rounded = -(-size // PAGE_SIZE) * PAGE_SIZE
                spans = [(a, min(b, rounded)) for a, b in merge(item.dirty) if a < rounded]
                spans = intersect(spans, there)
            sender.announce(item.objref, subtract(item.there, there), PageKind.ABSENT)
            item.announced, item.dirty, item.there = True, [], there
            fd = item.fd
            sender.send_file(item.objref, spans, lambda view, at, fd=fd: os.preadv(fd, [view], at))  # type: ignore[misc]

    def close(self) -> None:
        for item in self.objects.values():
            os.close(item.fd)
        self.objects.clear()


def device_key(vma: Vma) -> tuple[int, int]:
    major, _, minor = vma.device.partition(":")
    return os.makedev(int(major, 16), int(minor, 16)), vma.inode


def _data_spans(fd: int, size: int) -> list[Span]:
    out: list[Span] = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        start -= start % PAGE_SIZE
        out.append((start, -(-end // PAGE_SIZE) * PAGE_SIZE))
        position = end
    return out
