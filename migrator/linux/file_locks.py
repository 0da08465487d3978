"""Which files of this host are locked, by whomever (/proc/locks, fs/locks.c)."""

from __future__ import annotations

import os
import threading

from migrator.linux import urgency

PATH = "/proc/locks"
_INIT_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO
_READINGS = 4
_SURE = 3072  # bytes: a reading of so few had room for more


class LockList:
    """The list of all locks, read from the moment when this is made on, by a thread of its own.

    A reading takes 10 ms, in which the kernel waits for all processors and we have other things to do."""

    def __init__(self) -> None:
        self._found: set[int] | None = None
        self._urgent = urgency.is_raised()
        self._thread = threading.Thread(target=self._read, name="locks", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        if self._urgent:  # it is waited for
            urgency.raise_tasks([threading.get_native_id()])
        self._found = locked_inodes()

    def inodes(self) -> set[int] | None:
        """See locked_inodes()."""
        self._thread.join()
        return self._found


def locked_inodes() -> set[int] | None:
    """The kernel's own inode numbers (`ino` in fdinfo) of all files with locks of any kind. None: it cannot be told.

    Only the first pid namespace is told of a flock(2) whose taker has ended, others may hold it still. A long list is
    given by pages, and what changes between two of them can hide a line: it is read until it stays the same."""
    try:
        if not complete():
            return None
        text = _read_all()
        for _ in range(_READINGS):
            if len(text) < _SURE:
                return _inodes(text)
            before, text = text, _read_all()
            if text == before:
                return _inodes(text)
    except (OSError, ValueError, StopIteration):
        pass
    return None


def complete() -> bool:
    """Whether the list is one of all locks."""
    return os.stat("/proc/self/ns/pid").st_ino == _INIT_PID_NAMESPACE


def _read_all() -> bytes:
    with open(PATH, "rb", buffering=0) as file:
        text = file.read(1 << 16)
        while len(text) >= _SURE and (more := file.read(1 << 16)):
            text += more
    return text


def _inodes(text: bytes) -> set[int]:
    """>>> _inodes(b"1: POSIX  ADVISORY  WRITE 3568 fd:00:2531452 0 EOF")
    {2531452}"""
    return {
        int(next(word for word in line.split() if word.count(b":") == 2).rpartition(b":")[2])
        for line in text.split(b"\n")
        if line
    }
