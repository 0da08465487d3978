"""Shared memory on the destination: made again, filled by offset, opened by whoever maps it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

from migrator.errors import ImageError, RestartFailed
from migrator.image.records import PAGE_SIZE, PageKind, Pages, Shm, ShmKind
from migrator.linux import sys

_F_ADD_SEALS, _F_SEAL_FUTURE_WRITE = 1033, 0x10
_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_NR_FALLOCATE = 285


class SharedObjects:
    """All shared memory objects of a stream, by objref."""

    def __init__(self) -> None:
        self._records: dict[int, Shm] = {}
        self._fds: dict[int, int] = {}

    def take(self, rec: Shm) -> None:
        """Make an object, or give it the size that it has by now."""
        fd = self._fds.get(rec.objref)
        if fd is None:
            fd = self._fds[rec.objref] = self._make(rec)
        elif os.fstat(fd).st_size != rec.size and rec.kind != ShmKind.ANON:
            os.ftruncate(fd, rec.size)
        self._records[rec.objref] = rec

    @staticmethod
    def _make(rec: Shm) -> int:
        try:
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
            raise RestartFailed(f"shared memory of {rec.size} bytes: {error}") from error

    def fill(self, pages: Pages) -> None:
        fd = self.fd(pages.objref)
        view = memoryview(pages.data)
        size = os.fstat(fd).st_size
        position = 0
        for item in pages.ranges:
            length = item.nr_pages * PAGE_SIZE
            if item.kind == PageKind.DATA:
                count = max(0, min(length, size - item.start))  # the last page of an object may be cut
                os.pwrite(fd, view[position : position + count], item.start)
                position += length
            else:
                _fallocate(fd, item.start, length)

    def fd(self, objref: int) -> int:
        try:
            return self._fds[objref]
        except KeyError:
            raise ImageError(f"shared memory {objref} was never described") from None

    def open(self, objref: int) -> int:
        """A new descriptor of ours for mapping it."""
        return os.dup(self.fd(objref))

    def seal(self) -> None:
        """Seal what was sealed: the last thing, after contents and mappings."""
        for objref, rec in self._records.items():
            if rec.seals and rec.kind == ShmKind.MEMFD:
                fcntl.fcntl(self._fds[objref], _F_ADD_SEALS, rec.seals)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _open_mapping(area: mmap.mmap, size: int) -> int:
    anchor = ctypes.c_char.from_buffer(area)
    start = ctypes.addressof(anchor)
    del anchor
    # neighbouring mappings of the same kind are separate: each has a file of its own
    return os.open(f"/proc/self/map_files/{start:x}-{start + size:x}", os.O_RDWR | os.O_CLOEXEC)


def _fallocate(fd: int, offset: int, length: int) -> None:
    sys.call(_NR_FALLOCATE, fd, _PUNCH_HOLE, offset, length, name="fallocate", about=f"offset {offset}")
