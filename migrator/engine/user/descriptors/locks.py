"""Locks on files: flock(2), and on ranges those of a process (fcntl(2)) or of an open file description.

All are told by fdinfo, as in /proc/locks: "1: POSIX  ADVISORY  WRITE 359 00:13:11691 128 EOF".

A file on storage that both hosts have is still locked by the frozen source when the copy is built. Such a lock is
put off (`LateLock`), if the file is that very file: it is had once the source's tasks are gone, ahead of the first
instruction of the copy, by migrator.engine.user.restore.late_locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from migrator.engine.user.descriptors.description import Description, DescriptorTable
from migrator.errors import ImageError, RestartFailed
from migrator.image.records_files import File, FileLock
from migrator.linux.x86_64 import NR

if TYPE_CHECKING:
    from migrator.engine.user.descriptors.epolls import Stub

F_SETLK, F_OFD_GETLK, F_OFD_SETLK = 6, 36, 37
SHARED, EXCLUSIVE = 1, 2
_TYPES = {SHARED: fcntl.F_RDLCK, EXCLUSIVE: fcntl.F_WRLCK}
_OPERATIONS = {SHARED: fcntl.LOCK_SH, EXCLUSIVE: fcntl.LOCK_EX}
_FLOCK = struct.Struct("<hhxxxxqqixxxx")  # struct flock of x86-64
_BUSY = (errno.EAGAIN, errno.EACCES)


class Locked(RestartFailed):
    """Somebody else has a lock that stands in the way."""


def flock_of(description: Description) -> int:
    """0 none, 1 shared, 2 exclusive: the flock(2) of a description, as fdinfo shows it."""
    for lock in description.info.locks:
        words = lock.split()
        if words[1] == "FLOCK":
            return EXCLUSIVE if words[3] == "WRITE" else SHARED
    return 0


def save(table: DescriptorTable) -> Iterator[FileLock]:
    """The locks on ranges of the processes of a table, and those of its files: each of these once."""
    for slot in table.slots:
        if not slot.locks:
            continue
        for line in slot.locks:
            _, kind, _, access, _, _, first, last = line.split()[:8]
            start = int(first)
            length = 0 if last == "EOF" else int(last) - start + 1
            mode = EXCLUSIVE if access == "WRITE" else SHARED
            objref = slot.description.objref
            if kind == "POSIX":
                yield FileLock(objref, table.processes[0].vpid, slot.number, mode, start, length)
            elif kind == "OFDLCK" and not slot.description.locks_saved:
                yield FileLock(objref, 0, slot.number, mode, start, length)
        slot.description.locks_saved = True


def take_flock(fd: int, mode: int, where: str) -> None:
    """Lock a description as a whole (flock(2)). Raises Locked."""
    if mode not in _OPERATIONS:
        raise ImageError(f"{where}: unknown lock {mode}")
    try:
        fcntl.flock(fd, _OPERATIONS[mode] | fcntl.LOCK_NB)
    except OSError as error:
        raise _failure(error.errno or 0, where) from error


def take(stub: Stub, rec: FileLock, path: str) -> None:
    """Lock a range from inside: such a lock belongs to the process that takes it, until it closes the file. Raises
    Locked."""
    address = stub.put(request(rec.kind, rec.start, rec.length))
    result = stub.call_batch([(NR["fcntl"], rec.fd, F_SETLK, address)])[0]
    if result < 0:
        raise _failure(-result, path)


def take_for_file(fd: int, rec: FileLock, path: str) -> None:
    """Lock a range for a description, of which `fd` is one of ours. Raises Locked."""
    take_range(fd, rec.kind, rec.start, rec.length, path)


def take_range(fd: int, mode: int, start: int, length: int, path: str) -> None:
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, request(mode, start, length))
    except OSError as error:
        raise _failure(error.errno or 0, path) from error


def is_free(fd: int, mode: int, start: int, length: int) -> bool:
    """Whether a range could be locked by whoever has none there yet; nothing is locked."""
    raw = fcntl.fcntl(fd, F_OFD_GETLK, request(mode, start, length))
    return bool(_FLOCK.unpack(raw)[0] == fcntl.F_UNLCK)


def request(mode: int, start: int, length: int) -> bytes:
    """A struct flock."""
    if mode not in _TYPES or max(start, length) >> 63:
        raise ImageError(f"a lock of kind {mode} on {length} bytes at {start}")
    return _FLOCK.pack(_TYPES[mode], os.SEEK_SET, start, length, 0)


def is_very_file(fd: int, rec: File) -> bool:
    """Whether what stands at the path of `rec` here is the file that the stopped source has open, on storage that both
    hosts have: nobody has written to it since, so all that is known of it is the same."""
    status = os.fstat(fd)
    there = rec.ino, rec.mode, rec.size, rec.mtime
    return (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns) == there


def _failure(number: int, path: str) -> RestartFailed:
    if number in _BUSY:
        return Locked(
            f"{path} is locked by somebody else here",
            hint="a file shared by both hosts stays locked by the saved program until that is gone",
        )
    return RestartFailed(f"{path} cannot be locked: {os.strerror(number)}")
