"""The file behind a mapping of another process (proc(5), /proc/PID/map_files), for who has read its list of mappings.

A process that runs may have mapped something else at the very same addresses since then: that is told from the file
itself, not from where it was found.
"""

from __future__ import annotations

import os

from migrator.linux.procfs import Vma


def open_path(pid: int, vma: Vma) -> int:
    """An O_PATH descriptor of the file behind a mapping. Raises FileNotFoundError if that is not mapped there any
    more."""
    link = f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}"
    fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
    if not _is_behind(fd, vma):
        os.close(fd)
        raise FileNotFoundError(2, "another file is mapped by now", link)
    return fd


def device(vma: Vma) -> int:
    """As st_dev, of the file behind a mapping; some file systems (btrfs, overlayfs) have another one in stat(2)."""
    major, _, minor = vma.device.partition(":")
    return os.makedev(int(major, 16), int(minor, 16))


def _is_behind(fd: int, vma: Vma) -> bool:
    status = os.fstat(fd)
    if status.st_dev == device(vma):
        return status.st_ino == vma.inode
    return os.readlink(f"/proc/self/fd/{fd}") == vma.path
