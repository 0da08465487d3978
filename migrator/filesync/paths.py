"""Paths in a tree: bytes, relative to its top, without ".."; and what is said of one that cannot be used."""

from __future__ import annotations

import errno
import os

from migrator.errors import MigratorError
from migrator.protocol.wire import MessageError

WORK = b".migrator-"  # what begins so at the top of a tree is ours, and never carried
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENXIO)


class FileError(MigratorError):
    """A file cannot be carried along. The workload runs on the source."""


def check(path: bytes, *, empty: bool = True, component: bool = False) -> None:
    """Raises MessageError for what is no path in a tree, or with `component` no name in a directory."""
    parts = path.split(b"/")
    bad = any(part in (b"", b".", b"..") for part in parts) if path else not empty or component
    if bad or b"\0" in path or (component and len(parts) > 1):
        raise MessageError(f"not a path in a tree: {path[:200]!r}")


def shown(path: bytes) -> str:
    """For people."""
    return path.decode(errors="backslashreplace")


def below(root: str, path: str) -> str:
    """An absolute path as seen from below `root`, "" for the host's root."""
    return os.path.join(root, path.lstrip("/")) if root else path


def lstat(fd: int, name: bytes) -> os.stat_result | None:
    """What lstat(2) says of `name` in the directory `fd`; None if it is gone."""
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
