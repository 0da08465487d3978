"""Locks on ranges of files (fcntl(2)): of a process, or of an open file description.

Both are told by fdinfo, as in /proc/locks: "1: POSIX  ADVISORY  WRITE 359 00:13:11691 128 EOF".
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from migrator.engine.user.descriptors.description import DescriptorTable
from migrator.errors import ImageError, RestartFailed
from migrator.image.records_files import FileLock
from migrator.linux.x86_64 import NR

if TYPE_CHECKING:
    from migrator.engine.user.descriptors.epolls import Stub

_F_SETLK, _F_OFD_SETLK = 6, 37
_TYPES = {1: fcntl.F_RDLCK, 2: fcntl.F_WRLCK}
_FLOCK = struct.Struct("<hhxxxxqqixxxx")  # struct flock of x86-64


def save(table: DescriptorTable) -> Iterator[FileLock]:
    """The locks of the processes of a table, and those of its files: each of these once."""
    for slot in table.slots:
        for line in slot.locks:
            _, kind, _, access, _, _, first, last = line.split()[:8]
            start = int(first)
            length = 0 if last == "EOF" else int(last) - start + 1
            mode = 2 if access == "WRITE" else 1
            objref = slot.description.objref
            if kind == "POSIX":
                yield FileLock(objref, table.processes[0].vpid, slot.number, mode, start, length)
            elif kind == "OFDLCK" and not slot.description.locks_saved:
                yield FileLock(objref, 0, slot.number, mode, start, length)
        slot.description.locks_saved = True


def take(stub: Stub, rec: FileLock, path: str) -> None:
    """Lock from inside: such a lock belongs to the process that takes it, until it closes the file."""
    address = stub.put(_request(rec))
    result = stub.call_batch([(NR["fcntl"], rec.fd, _F_SETLK, address)])[0]
    if result < 0:
        raise _failure(-result, path)


def take_for_file(fd: int, rec: FileLock, path: str) -> None:
    """Lock for a description, of which `fd` is one of ours."""
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _request(rec))
    except OSError as error:
        raise _failure(error.errno or 0, path) from error


def _request(rec: FileLock) -> bytes:
    if rec.kind not in _TYPES or max(rec.start, rec.length) >> 63:
        raise ImageError(f"a lock of kind {rec.kind} on {rec.length} bytes at {rec.start}")
    return _FLOCK.pack(_TYPES[rec.kind], os.SEEK_SET, rec.start, rec.length, 0)


def _failure(number: int, path: str) -> RestartFailed:
    if number in (errno.EAGAIN, errno.EACCES):
        return RestartFailed(
            f"{path} is locked by somebody else here",
            hint="a file shared by both hosts stays locked by the saved program until that is gone",
        )
    return RestartFailed(f"{path} cannot be locked: {os.strerror(number)}")
