"""Walking to a directory of this host, through directories that other users may have a hand in.

Every component is opened relative to the one before, so nothing that is renamed meanwhile leads astray. A symbolic link
is followed only if root has made it, in a directory in which only root can make one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import NamedTuple

from migrator.linux.openat2 import made_by_root

_MOST_LINKS = 40  # as the kernel has it
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Walked(NamedTuple):
    """A directory, the directory that it is in, and its name there; for / that are -1 and b"". Close both."""

    fd: int
    parent: int
    name: bytes


def walk(path: bytes, inner: bytes = b"", *, make: bool = False) -> Walked:
    """Open the directory `path`, absolute, and in it `inner`, of which no component may be a symbolic link: who owns
    what is below `path` may be root by name only, as in a container. With `make` what is missing is made, of mode 0755.

    Raises OSError: ELOOP for a link that is not to be followed.
    """
    stack = [(os.open("/", _PATH | os.O_DIRECTORY), b"")]
    try:
        _descend(stack, path, links=True, make=make)
        _descend(stack, inner, links=False, make=make)
        fd, name = stack.pop()
        parent = stack.pop()[0] if stack else -1
        try:
            readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            if parent >= 0:
                os.close(parent)
            raise
        finally:
            os.close(fd)
        return Walked(readable, parent, name)
    finally:
        for fd, _ in stack:
            os.close(fd)


def _descend(stack: list[tuple[int, bytes]], path: bytes, *, links: bool, make: bool) -> None:
    waiting = path.split(b"/")[::-1]
    followed = 0
    while waiting:
        name = waiting.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            if len(stack) > 1:
                os.close(stack.pop()[0])
            continue
        here = stack[-1][0]
        fd = _open(here, name, make=make)
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            stack.append((fd, name))
            continue
        try:
            if not stat.S_ISLNK(status.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(path))
            followed += 1
            if not links or followed > _MOST_LINKS or not made_by_root(os.fstat(here), status):
                raise OSError(errno.ELOOP, "a symbolic link that is not followed", os.fsdecode(path))
            target = os.readlink(b"", dir_fd=fd)
        finally:
            os.close(fd)
        if target.startswith(b"/"):
            while len(stack) > 1:
                os.close(stack.pop()[0])
        waiting += target.split(b"/")[::-1]


def _open(folder: int, name: bytes, *, make: bool) -> int:
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=folder)
    return os.open(name, _PATH, dir_fd=folder)
