"""struct stat of x86-64, as the system calls write it (stat(2)): for many at a time, with migrator.linux.batch."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

_STAT = struct.Struct("<QQQIII4xQqqq16xQQ16x24x")
STAT_SIZE = _STAT.size
_WORDS = STAT_SIZE // 8
FINGERPRINT_WORDS = (0, 1, 2, 3, 4, 5, 6, 11, 12)  # all but the times of access and change, and what is on disk
Fingerprint = tuple[int, ...]  # st_dev, st_ino, ...


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
    def of(cls, found: os.stat_result) -> Status:
        """What Python's own stat gave."""
        return cls(
            found.st_dev, found.st_ino, found.st_nlink, found.st_mode, found.st_uid, found.st_gid, found.st_rdev,
            found.st_size, found.st_blksize, found.st_blocks, *divmod(found.st_mtime_ns, 10**9),
        )  # fmt: skip

    @property
    def fingerprint(self) -> Fingerprint:
        """A file with the same is as it was."""
        return *self[:3], self.st_mode | self.st_uid << 32, self.st_gid, *self[6:8], *self[10:]

    @classmethod
    def unpack(cls, buffer: memoryview, offset: int) -> Status:
        return cls._make(_STAT.unpack_from(buffer, offset))


def fingerprints(states: memoryview) -> list[Fingerprint]:
    """Of each of many: what Status.fingerprint would be, in a fraction of the time."""
    words = states[: len(states) // STAT_SIZE * STAT_SIZE].cast("Q")
    return list(zip(*(words[at::_WORDS].tolist() for at in FINGERPRINT_WORDS), strict=True))
