"""openat2(2): opening paths as the workload's own root shows them, or strictly below a directory."""

from __future__ import annotations

import ctypes
import os
import struct

from migrator.linux import sys

_NR_OPENAT2 = 437
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS = 0x01, 0x02, 0x04
_RESOLVE_BENEATH, _RESOLVE_IN_ROOT = 0x08, 0x10


def open_in_root(root_fd: int, path: str, flags: int, mode: int = 0, *, links: bool = True) -> int:
    """Open `path` with `root_fd` as "/": absolute links and ".." stay inside; without `links` there may be none
    (ELOOP). Close-on-exec. Raises OSError."""
    resolve = _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS | (0 if links else _RESOLVE_NO_SYMLINKS)
    return _open(root_fd, path, flags, mode, resolve)


def open_beneath(fd: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open `path` below the directory `fd`: no symbolic link is followed, no mount point is crossed (EXDEV),
    nothing above is reached. b"" is the directory itself. Close-on-exec. Raises OSError."""
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV
    return _open(fd, path or b".", flags, mode, resolve)


def _open(fd: int, path: str | bytes, flags: int, mode: int, resolve: int) -> int:
    how = ctypes.create_string_buffer(struct.pack("<QQQ", flags | os.O_CLOEXEC, mode, resolve), 24)
    name = ctypes.create_string_buffer(os.fsencode(path))
    return sys.call(
        _NR_OPENAT2,
        fd,
        ctypes.addressof(name),
        ctypes.addressof(how),
        24,
        name="openat2",
        about=os.fsdecode(path),
    )
