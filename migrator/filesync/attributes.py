"""All of a file that is not its content: its kind, owner, mode, times and extended attributes."""

from __future__ import annotations

import contextlib
import os
import stat

from migrator.protocol.trees import Entry
from migrator.protocol.wire import MessageError

_XATTRS = ("user.", "security.capability", "system.posix_acl_")


def carried(mode: int) -> bool:
    """Whether files of this kind are carried. Sockets are made by who binds them, devices belong to the host."""
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


def set_attributes(fd: int, entry: Entry) -> None:
    """Make an open file what `entry` says. Raises OSError, MessageError.

    The owner comes before mode and capabilities, which a change of owner takes away; times come last.
    """
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


def set_attributes_at(fd: int, entry: Entry) -> None:
    """The same for what is not opened but only named by `fd` (O_PATH): symbolic links and FIFOs."""
    itself = f"/proc/self/fd/{fd}"
    os.chown(itself, entry.uid, entry.gid)
    if stat.S_ISFIFO(entry.mode):
        os.chmod(itself, stat.S_IMODE(entry.mode))
    os.utime(itself, ns=(entry.mtime_ns, entry.mtime_ns))
