"""Looking into a pipe without taking anything out of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat

from migrator.linux import sys

_TEE = 276
CAPACITY = 1 << 20  # bytes; pipe(7): the most that is granted to everybody


def is_pipe(fd: int) -> bool:
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def widen(fd: int) -> None:
    """Let a pipe hold up to CAPACITY bytes, where that is allowed."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, CAPACITY)


def peek(fd: int) -> bytes:
    """What is in a pipe, which keeps it (tee(2)). Blocks until there is something; b"" at its end."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        widen(write)
        count = sys.call(_TEE, fd, write, CAPACITY, 0, name="tee", about=f"fd {fd}")
        out = b""
        while len(out) < count:
            out += os.read(read, count - len(out))
        return out
    finally:
        os.close(read)
        os.close(write)
