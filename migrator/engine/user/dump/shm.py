"""Memory shared by mappings and descriptors: anonymous shared mappings, memfds, System V segments, and files that are
on no other host: deleted ones that are mapped, and those in a tmpfs of the container's own.

Such an object is saved once, under its own objref, and its pages are addressed by offset. What is written
through mappings is tracked in each of them; what was written otherwise, or by a process that has ended, is found by
comparing contents (migrator.engine.user.dump.fingerprints), the last time when the tasks are stopped.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, field

from migrator.engine.stream import RecordWriter
from migrator.engine.user.dump.fingerprints import Fingerprints
from migrator.engine.user.dump.pages import PageSender
from migrator.engine.user.dump.sysv import SYSV, SysvDump, record_of
from migrator.engine.user.dump.tmpfs import MAX_FILES, OwnTmpfs
from migrator.engine.user.ranges import Span, intersect, merge, subtract
from migrator.errors import CheckpointFailed
from migrator.image.objhash import ObjHash
from migrator.image.records import PAGE_SIZE, PageKind, Shm, ShmKind
from migrator.image.records_shared import SharedFile, SharedFileKind
from migrator.linux import descriptors, map_files
from migrator.linux.ipc import IpcObject
from migrator.linux.procfs import Vma

_MEMFD = "/memfd:"
_ANON = "/dev/zero (deleted)"
_SEGMENTS = -1  # the device of System V segments, whose numbers are their own
_DELETED = " (deleted)"
_INSIDE = ("/secretmem", "/[aio]", "/anon_hugepage")  # files of the kernel's own


def is_shm(vma: Vma, devices: Collection[int] = ()) -> bool:
    """Whether the memory behind a mapping is in no file that the other host has. `devices`: of tmpfs mounts of the
    container's own."""
    path = vma.path
    if not path.startswith("/"):
        return False
    if path == _ANON or path.startswith(SYSV):
        return vma.shared
    return path.endswith(_DELETED) or (bool(devices) and device_key(vma)[0] in devices)


def shm_obstacle(pid: int, vma: Vma, devices: Collection[int]) -> str:
    """Why a mapping for which is_shm() is true cannot be carried, or ""."""
    path = vma.path
    if path == _ANON or path.startswith((_MEMFD, SYSV)):
        return ""
    if path.startswith(_INSIDE):
        return f"memory of the kernel's own ({path.removesuffix(_DELETED)})"
    try:
        fd = map_files.open_path(pid, vma)
    except FileNotFoundError:  # it has been unmapped
        return ""
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_dev == _inside():
        return f"a mapping of {path}"
    if status.st_nlink and status.st_dev not in devices:
        return f"a mapping of {path}: its name was removed, but it has others"
    return ""


@dataclass(slots=True)
class Object:
    """fd: ours. kind: a ShmKind, 0 of a file. name: of a memfd, or a path."""

    objref: int
    kind: int
    name: str
    fd: int
    size: int = 0
    seals: int = 0
    segment: IpcObject | None = None  # of System V
    described: bool = False  # its record was written
    announced: bool = False  # its contents were sent once
    dirty: list[Span] = field(default_factory=list)
    there: list[Span] = field(default_factory=list)  # where it had contents when it was sent last
    mtime: int = 0  # as it was sent
    sent: Fingerprints = field(default_factory=Fingerprints)

    def read(self, view: memoryview, at: int) -> int:
        """Fill `view` from offset `at`, to be sent; the bytes that there were."""
        got = os.preadv(self.fd, [view], at)
        view[got:] = bytes(len(view) - got)
        self.sent.note(view, at)
        return got

    def record(self, status: os.stat_result, mount: str) -> Shm | SharedFile:
        """`mount`: the tmpfs of the container's own that it is in."""
        mode = stat.S_IMODE(status.st_mode)
        if self.kind:
            return Shm(self.objref, self.kind, status.st_size, self.seals, mode, self.name)
        mount = mount if status.st_nlink else ""
        return SharedFile(
            objref=self.objref,
            kind=SharedFileKind.TMPFS if mount else SharedFileKind.DELETED,
            size=status.st_size,
            mtime=status.st_mtime_ns,
            mode=mode,
            uid=status.st_uid,
            gid=status.st_gid,
            reserved=0,
            mount=mount,
            name=self.name,
        )


class SharedMemory:
    """All shared objects of a tree, by (device, inode)."""

    def __init__(self, objhash: ObjHash, tmpfs: OwnTmpfs, sysv: SysvDump | None) -> None:
        self._objhash = objhash
        self.tmpfs = tmpfs
        self._sysv = sysv  # None: the tree has no IPC namespace of its own
        self.objects: dict[tuple[int, int], Object] = {}
        self._mapped: dict[tuple[int, int], Object] = {}  # by the device that /proc/PID/maps shows

    def is_shm(self, vma: Vma) -> bool:
        return is_shm(vma, self.tmpfs.devices)

    def of_mapping(self, pid: int, vma: Vma) -> Object:
        """The object behind a mapping; opened through /proc/PID/map_files when first met."""
        known = self._mapped.get(_key(vma))
        if known is not None:
            return known
        path = vma.path
        kind = _kind(vma)
        if reason := shm_obstacle(pid, vma, self.tmpfs.devices):
            raise CheckpointFailed(f"pid {pid}: mapping {vma.start:#x} is {reason}, which cannot be carried")
        if kind == ShmKind.SYSV:
            self._find_segments()
            if _key(vma) not in self.objects:
                raise CheckpointFailed(f"pid {pid}: mapping {vma.start:#x} is of System V memory of the host")
            return self.objects[_key(vma)]
        place = map_files.open_path(pid, vma)
        try:
            fd = descriptors.reopen(place, os.O_RDONLY)
        finally:
            os.close(place)
        status = os.fstat(fd)
        key = status.st_dev, status.st_ino
        found = self.objects.get(key)
        if found is None:
            name = path.removesuffix(_DELETED)
            name = "" if kind == ShmKind.ANON else name[len(_MEMFD) :] if kind == ShmKind.MEMFD else name
            found = self.objects[key] = self._object(key, kind, name, fd)
        else:
            os.close(fd)
        self._mapped[_key(vma)] = found
        return found

    def of_program(self, fd: int, path: str) -> Object | None:
        """The object behind a program that is open as `fd`, if that is a file that the other host has not."""
        status = os.fstat(fd)
        if status.st_nlink and status.st_dev not in self.tmpfs.devices:
            return None
        key = status.st_dev, status.st_ino
        if key not in self.objects:
            memfd = path.startswith(_MEMFD)
            name = path.removesuffix(_DELETED)
            own = descriptors.reopen(fd, os.O_RDONLY)
            self._object(key, ShmKind.MEMFD if memfd else 0, name[len(_MEMFD) :] if memfd else name, own)
        return self.objects[key]

    def of_descriptor(self, key: tuple[int, int], fd: int, name: str, seals: int) -> Object:
        """The object behind a memfd descriptor `fd` (opened again here), or a file that is known already."""
        known = self.objects.get(key)
        if known is None:
            # opened anew: a duplicate would share the file position with the workload
            own = descriptors.reopen(fd, os.O_RDONLY)
            known = self._object(key, ShmKind.MEMFD, name, own)
        known.seals = seals
        return known

    def _object(self, key: tuple[int, int], kind: int, name: str, fd: int) -> Object:
        objref, _ = self._objhash.get(("shm", *key))
        made = self.objects[key] = Object(objref, kind, name, fd)
        return made

    def note_writes(self, pid: int, vma: Vma, spans: list[Span]) -> None:
        """What was written through a shared mapping, by address."""
        shift = vma.offset - vma.start
        self.of_mapping(pid, vma).dirty += [(a + shift, b + shift) for a, b in spans]

    def describe(self, item: Object, writer: RecordWriter) -> None:
        """Write the record of an object if it never was: ahead of the mappings that refer to it."""
        if not item.described:
            status = os.fstat(item.fd)
            item.size = status.st_size
            item.described = True
            self._describe(item, status, writer)

    def _describe(self, item: Object, status: os.stat_result, writer: RecordWriter) -> None:
        writer.write(item.record(status, self.tmpfs.devices.get(status.st_dev, "")))
        if item.segment is not None:
            writer.write(record_of(item.segment, item.objref))

    def _find_segments(self) -> None:
        """Those of System V that there are by now; those that are gone are not saved any more."""
        if self._sysv is None:
            return
        known = {key for key in self.objects if key[0] == _SEGMENTS}
        for segment in self._sysv.segments():
            key = _SEGMENTS, segment.id
            known.discard(key)
            if key not in self.objects:
                try:
                    fd = self._sysv.open_segment(segment.id)
                except OSError as error:
                    if error.errno in (errno.EINVAL, errno.EIDRM):  # removed meanwhile
                        continue
                    raise
                self._object(key, ShmKind.SYSV, f"{SYSV}{segment.key:08x}", fd)
            self.objects[key].segment = segment
        for key in known:
            os.close(self.objects.pop(key).fd)

    def send(self, writer: RecordWriter, sender: PageSender, *, final: bool) -> None:
        for entry in self.tmpfs.walk():
            if entry.regular and entry.key not in self.objects:
                if len(self.objects) > MAX_FILES:
                    raise CheckpointFailed(f"{entry}: more than {MAX_FILES} files in tmpfs cannot be carried")
                try:
                    self._object(entry.key, 0, str(entry), entry.open())
                except FileNotFoundError:
                    continue
        self._find_segments()
        for item in self.objects.values():
            self._send(item, writer, sender, final)
        if final and self._sysv is not None:
            self._sysv.save(writer)
        if final:
            self.tmpfs.save(writer, lambda key: self._objhash.find(("shm", *key)))

    def _send(self, item: Object, writer: RecordWriter, sender: PageSender, final: bool) -> None:
        status = os.fstat(item.fd)
        size = status.st_size
        if not item.described or size != item.size or final:
            item.size, item.described = size, True
            self._describe(item, status, writer)
        there = merge(_data_spans(item.fd, size))
        if not item.announced:
            spans = there
        else:
            spans = intersect(merge(item.dirty), there)
            rest = subtract(there, spans)
            if not final and status.st_mtime_ns == item.mtime:  # write(2) shows in it, most of the time
                rest = item.sent.doubtful(rest)  # what is seen to be as it was sent now takes less time at the end
            spans = merge([*spans, *item.sent.changed(item.fd, rest)])
        item.mtime = status.st_mtime_ns
        sender.announce(item.objref, subtract(item.there, there), PageKind.ABSENT)
        item.announced, item.dirty, item.there = True, [], there
        sender.send_file(item.objref, spans, item.read)

    def close(self) -> None:
        for item in self.objects.values():
            os.close(item.fd)
        self.objects.clear()
        self._mapped.clear()
        self.tmpfs.close()


def device_key(vma: Vma) -> tuple[int, int]:
    return map_files.device(vma), vma.inode


@functools.cache
def _inside() -> int:
    """st_dev of the kernel's own tmpfs, in which nothing has a name."""
    fd = os.memfd_create("probe")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _key(vma: Vma) -> tuple[int, int]:
    """What tells objects of /proc/PID/maps apart; inode numbers of System V segments are their own."""
    return (_SEGMENTS, vma.inode) if vma.path.startswith(SYSV) else device_key(vma)


def _kind(vma: Vma) -> int:
    if vma.path == _ANON:
        return ShmKind.ANON
    if vma.path.startswith(SYSV):
        return ShmKind.SYSV
    return ShmKind.MEMFD if vma.path.startswith(_MEMFD) else 0


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
