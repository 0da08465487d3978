"""Shared memory on the destination: made again, filled by offset, opened by whoever maps it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any, TypeGuard

from migrator.engine.user.descriptors.files import UnnamedFile
from migrator.engine.user.restore.mqueues import MqueueRestore
from migrator.engine.user.restore.sysv import SysvRestore
from migrator.engine.user.restore.tmpfs import TmpfsRestore
from migrator.errors import ImageError, RestartFailed
from migrator.image.codec import Record
from migrator.image.records import PAGE_SIZE, PageKind, Pages, Shm, ShmKind
from migrator.image.records_shared import (
    MqMessage,
    MqQueue,
    SharedFile,
    SysvMessage,
    SysvQueue,
    SysvSem,
    SysvShm,
    TmpfsEntry,
    TmpfsXattr,
)
from migrator.linux import descriptors, sys

_F_ADD_SEALS, _F_SEAL_FUTURE_WRITE = 1033, 0x10
_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_NR_FALLOCATE = 285


class SharedObjects:
    """All shared memory objects of a stream, by objref. `root_fd`: the root directory of the tree, set before the first
    file comes."""

    def __init__(self) -> None:
        self.root_fd = -1
        self.tmpfs = TmpfsRestore()
        self.sysv = SysvRestore()
        self.mqueues = MqueueRestore()
        self._records: dict[int, Shm | SharedFile] = {}
        self._fds: dict[int, int] = {}
        self._unnamed: dict[int, UnnamedFile] = {}
        self._given: set[int] = set()  # memfds whose first description the tree has
        self._takers: dict[type[Record], Callable[[Any], None]] = {
            Shm: self._take,
            SharedFile: self._take,
            SysvShm: self._segment,
            SysvSem: self.sysv.semaphores,
            SysvQueue: self.sysv.queue,
            SysvMessage: self.sysv.message,
            MqQueue: self.mqueues.queue,
            MqMessage: self.mqueues.message,
            TmpfsEntry: self.tmpfs.entry,
            TmpfsXattr: self.tmpfs.xattr,
        }

    def record(self, rec: Record) -> bool:
        """Take a record; False if it is about nothing shared."""
        taker = self._takers.get(type(rec))
        if taker is not None:
            taker(rec)
        return taker is not None

    def _take(self, rec: Shm | SharedFile) -> None:
        """Make an object, or give it the size that it has by now."""
        fd = self._fds.get(rec.objref)
        if _is_segment(rec):
            pass  # made by _segment(), and of a fixed size
        elif fd is None:
            fd = self._fds[rec.objref] = self._make(rec)
        elif os.fstat(fd).st_size != rec.size and not _is_anonymous(rec):
            os.ftruncate(fd, rec.size)
        self._records[rec.objref] = rec

    def _segment(self, rec: SysvShm) -> None:
        """Make a System V segment, whose Shm came."""
        shm = self._records[rec.shared_objref]
        if not _is_segment(shm):
            raise ImageError(f"segment {rec.shmid} has the memory of something else")
        fd = self.sysv.segment(rec, shm.size)
        if fd is not None:
            self._fds[rec.shared_objref] = fd

    def segment_of(self, objref: int) -> int:
        """The number of the System V segment that this is, or -1."""
        return self.sysv.segment_of(objref) if _is_segment(self._records[objref]) else -1

    def _make(self, rec: Shm | SharedFile) -> int:
        try:
            if isinstance(rec, SharedFile):
                fd = self._make_file(rec)
                os.ftruncate(fd, rec.size)
                return fd
            if rec.kind == ShmKind.ANON:
                # a mapping, so that it is named like one; the file behind it is reached through /proc
                size = max(PAGE_SIZE, -(-rec.size // PAGE_SIZE) * PAGE_SIZE)
                area = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
                try:
                    return _open_mapping(area, size)
                finally:
                    area.close()
            fd = os.memfd_create(rec.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.fchmod(fd, rec.mode)
            os.ftruncate(fd, rec.size)
            return fd
        except OSError as error:
            what = f" ({rec.name})" if rec.name else ""
            raise RestartFailed(f"shared memory of {rec.size} bytes{what}: {error}") from error

    def _make_file(self, rec: SharedFile) -> int:
        if rec.mount:
            return self.tmpfs.make(rec)
        file = self._unnamed[rec.objref] = UnnamedFile(self.root_fd, rec.name)
        return os.dup(file.fd)

    def fill(self, pages: Pages) -> None:
        fd = self.fd(pages.objref)
        view = memoryview(pages.data)
        size = os.fstat(fd).st_size
        position = 0
        for item in pages.ranges:
            length = item.nr_pages * PAGE_SIZE
            if item.kind == PageKind.DATA:
                count = max(0, min(length, size - item.start))  # the last page of an object may be cut
                at = 0
                while at < count:
                    at += os.pwrite(fd, view[position + at : position + count], item.start + at)
                position += length
            else:
                _fallocate(fd, item.start, length)

    def fd(self, objref: int) -> int:
        try:
            return self._fds[objref]
        except KeyError:
            raise ImageError(f"shared memory {objref} was never described") from None

    def reopen(self, objref: int, flags: int) -> int:
        """A new description, for a descriptor of the tree's. Of a memfd the one that it was made with goes first: with
        that, as opposed to one that was opened for writing, it can be executed (ETXTBSY)."""
        first = self.fd(objref)
        if _is_memfd(self._records[objref]) and flags & os.O_ACCMODE == os.O_RDWR and objref not in self._given:
            self._given.add(objref)
            fd = os.dup(first)
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
            return fd
        if objref in self._unnamed:
            return self._unnamed[objref].open(flags)
        if flags & os.O_NOFOLLOW:
            return self.tmpfs.open(objref, flags)
        return descriptors.reopen(first, flags)

    def open(self, objref: int, *, writable: bool) -> int:
        """A new descriptor of ours for mapping it; one that is not `writable` keeps nobody from executing it."""
        fd = self.fd(objref)
        return os.dup(fd) if writable else descriptors.reopen(fd, os.O_RDONLY)

    def settle(self) -> None:
        """Once all contents are there, ahead of who opens or executes it: owners, modes, times and names."""
        for objref, rec in self._records.items():
            if not isinstance(rec, SharedFile):
                continue
            fd = self._fds[objref]
            try:
                os.fchown(fd, rec.uid, rec.gid)
                os.fchmod(fd, rec.mode)
                os.utime(fd, ns=(rec.mtime, rec.mtime))
            except (OSError, OverflowError) as error:
                raise RestartFailed(f"{rec.name}: {error}") from error
        for file in self._unnamed.values():
            file.close()
        self._unnamed.clear()
        for objref, rec in self._records.items():
            if isinstance(rec, SharedFile):  # a file that is open for writing cannot be executed
                self._fds[objref] = _replaced(self._fds[objref])
        self.tmpfs.settle()
        self.sysv.settle()
        self.mqueues.settle()

    def seal(self) -> None:
        """Seal what was sealed: the last thing, after contents and mappings."""
        for objref, rec in self._records.items():
            if _is_memfd(rec) and rec.seals:
                fcntl.fcntl(self._fds[objref], _F_ADD_SEALS, rec.seals)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        for file in self._unnamed.values():
            file.close()
        self._unnamed.clear()
        self.tmpfs.close()
        self.mqueues.close()


def _is_anonymous(rec: Shm | SharedFile) -> bool:
    return isinstance(rec, Shm) and rec.kind == ShmKind.ANON


def _is_memfd(rec: Shm | SharedFile) -> TypeGuard[Shm]:
    return isinstance(rec, Shm) and rec.kind == ShmKind.MEMFD


def _is_segment(rec: Shm | SharedFile) -> bool:
    return isinstance(rec, Shm) and rec.kind == ShmKind.SYSV


def _replaced(fd: int) -> int:
    made = descriptors.reopen(fd, os.O_RDONLY)
    os.close(fd)
    return made


def _open_mapping(area: mmap.mmap, size: int) -> int:
    anchor = ctypes.c_char.from_buffer(area)
    start = ctypes.addressof(anchor)
    del anchor
    # neighbouring mappings of the same kind are separate: each has a file of its own
    return os.open(f"/proc/self/map_files/{start:x}-{start + size:x}", os.O_RDWR | os.O_CLOEXEC)


def _fallocate(fd: int, offset: int, length: int) -> None:
    sys.call(_NR_FALLOCATE, fd, _PUNCH_HOLE, offset, length, name="fallocate", about=f"offset {offset}")
