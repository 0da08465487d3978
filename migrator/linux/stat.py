"""struct stat of x86-64, as the system calls write it (stat(2)): for many at a time, with migrator.linux.batch."""

from __future__ import annotations

import struct
from typing import NamedTuple

_STAT = struct.Struct("<QQQIII4xQqqq16xQQ16x24x")
STAT_SIZE = _STAT.size


class Status(NamedTuple):
    """Named as in `os.stat_result`."""

    st_dev: int
    st_ino: int
    st_nlink: int
    st_mode: int
    st_uid: int
    st_gid: int
    st_rdev: int
    st_size: int
    st_blksize: int
    st_blocks: int
    mtime_seconds: int
    mtime_rest: int

    @property
    def st_mtime_ns(self) -> int:
        return self.mtime_seconds * 10**9 + self.mtime_rest

    @classmethod
    def unpack(cls, buffer: memoryview, offset: int) -> Status:
        return cls._make(_STAT.unpack_from(buffer, offset))
