"""openat2(2): opening paths as the workload's own root shows them."""

from __future__ import annotations

import ctypes
import os
import struct

from migrator.linux import sys

_NR_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10


def open_in_root(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` with `root_fd` as "/": absolute links and ".." stay inside. Close-on-exec. Raises OSError."""
    how = ctypes.create_string_buffer(
        struct.pack("<QQQ", flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS), 24
    )
    name = ctypes.create_string_buffer(os.fsencode(path))
    return sys.call(
        _NR_OPENAT2,
        root_fd,
        ctypes.addressof(name),
        ctypes.addressof(how),
        24,
        name="openat2",
        about=path,
    )
