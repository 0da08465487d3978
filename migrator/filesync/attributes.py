"""One file of a tree on the destination: which kinds are carried, and how it gets all that is not its content."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from typing import IO

from migrator.protocol.messages import Entry, MessageError

WORK = b".migrator-"  # what begins so at the top of a tree is ours, and never carried
_IN_MEMORY = 4 << 20  # bytes of changes of one file
_COPY = 1 << 20
_XATTRS = ("user.", "security.capability", "system.posix_acl_")


class Held:
    """Changes of one file, kept until all of them are there: a file is never left half changed because the other
    side went away. Beyond some MiB they wait in a file without a name in `folder`."""

    def __init__(self, folder: str) -> None:
        self._spool: IO[bytes] = _spool(folder)
        self._writes: list[tuple[int, int]] = []  # offset, length

    def write(self, data: bytes, offset: int) -> None:
        self._spool.write(data)
        if self._writes and sum(self._writes[-1]) == offset:
            self._writes[-1] = (self._writes[-1][0], self._writes[-1][1] + len(data))
        else:
            self._writes.append((offset, len(data)))

    def apply(self, fd: int) -> None:
        """Write them. Room is made first: a full disk leaves the file as it was."""
        size = os.fstat(fd).st_size
        try:
            for offset, length in self._writes:
                reserve(fd, offset, length)
        except OSError:
            os.ftruncate(fd, size)
            raise
        self._spool.seek(0)
        for offset, length in self._writes:
            while length:
                data = self._spool.read(min(length, _COPY))
                write_all(fd, data, offset)
                offset, length = offset + len(data), length - len(data)

    def close(self) -> None:
        self._spool.close()


def _spool(folder: str) -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=folder)


def carried(mode: int) -> bool:
    """Sockets are made by who binds them, devices belong to the host."""
    return stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO)


def xattrs_of(fd: int) -> dict[str, bytes]:
    """The extended attributes of a file that are carried: a user's, capabilities, access control lists."""
    try:
        names = os.listxattr(fd)
    except OSError:  # a file system without any
        return {}
    found = {}
    for name in names:
        if name.startswith(_XATTRS):
            with contextlib.suppress(OSError):
                found[name] = os.getxattr(fd, name)
    return found


def dress(fd: int, entry: Entry) -> None:
    """Owner before mode and capabilities, which it would take away; times last."""
    status = os.fstat(fd)
    if (status.st_uid, status.st_gid) != (entry.uid, entry.gid):
        os.fchown(fd, entry.uid, entry.gid)
    os.fchmod(fd, stat.S_IMODE(entry.mode))
    before = xattrs_of(fd)
    for name in before.keys() - entry.xattrs.keys():
        os.removexattr(fd, name)
    for name, value in entry.xattrs.items():
        if not name.startswith(_XATTRS):
            raise MessageError(f"{entry.path!r} has the attribute {name!r}")
        if before.get(name) != value:
            os.setxattr(fd, name, value)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def dress_name(folder: int, name: bytes, entry: Entry) -> None:
    """The same for what cannot be opened."""
    os.chown(name, entry.uid, entry.gid, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISFIFO(entry.mode):
        os.chmod(name, stat.S_IMODE(entry.mode), dir_fd=folder)
    os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=folder, follow_symlinks=False)


def write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def reserve(fd: int, offset: int, length: int) -> None:
    try:
        os.posix_fallocate(fd, offset, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def mount_of(path: bytes) -> str:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            return next(line for line in file if line.startswith("mnt_id"))
    finally:
        os.close(fd)
