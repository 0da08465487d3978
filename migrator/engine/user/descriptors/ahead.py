"""What pre-dumped files of all kinds have in common: how they are known, compared and written."""

from __future__ import annotations

import os
from typing import Protocol

from migrator.image.records_files import File, FileKind, FileOwner
from migrator.linux import descriptors
from migrator.linux.stat import Status

Place = tuple[int, int]  # pid, number
Entry = tuple[int, int, bool]  # of a table: number, objref, close-on-exec
Facts = tuple[int, int, int, int, int, int]  # of what is open: st_dev, st_ino, st_mode, F_GETFL, st_uid, st_gid


class Writer(Protocol):
    def encoded(self, raw: bytes) -> None: ...


def facts_of(status: Status | os.stat_result, flags: int) -> Facts:
    return status.st_dev, status.st_ino, status.st_mode, flags, status.st_uid, status.st_gid


def owner_record(objref: int, status: Status | os.stat_result) -> FileOwner | None:
    """Of the inode of a File; None if it is root's."""
    if not (status.st_uid or status.st_gid):
        return None
    return FileOwner(objref, 0, status.st_uid, status.st_gid)


def same(a: Place, b: Place) -> bool:
    """Whether both are one open file."""
    try:
        return descriptors.same_file(*a, *b)
    except OSError:
        return False  # one of them is closed


def file_record(
    objref: int,
    kind: FileKind,
    status: Status | os.stat_result,
    flags: int,
    *,
    pos: int = 0,
    size: int = 0,
    inode_objref: int = 0,
    path: str = "",
) -> File:
    """Of a file that is open in a running process, without owner and locks."""
    return File(
        objref=objref,
        kind=kind,
        flags=flags,
        mode=status.st_mode,
        pos=pos,
        size=size,
        mtime=max(0, status.st_mtime_ns),
        dev=status.st_dev,
        ino=status.st_ino,
        rdev=status.st_rdev,
        inode_objref=inode_objref,
        owner_type=0,
        owner_pid=0,
        owner_signal=0,
        lock=0,
        reserved=0,
        path=path,
    )
