"""Reading a file that decides who comes in, as sshd's StrictModes does.

The file, and every directory on the way to it, must belong to root or to us, and nobody else may
write there: else another user of this host could put his own key in, or another file in its place.

One thing is allowed that sshd refuses: a sticky directory (/tmp) higher up. In it nobody can
replace what belongs to root or to us; what comes next on the way must.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from migrator.errors import TransportError

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40  # as the kernel follows, path_resolution(7)


def read_strictly(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of the file `path`, at most `limit` bytes of it.

    Raises `TransportError` if somebody else than root and this process's user may change it, or
    if it is no regular file or too long; OSError if it cannot be read.
    """
    name = _resolve(Path(path))
    # O_NONBLOCK: opening a FIFO would wait for a writer.
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise TransportError(f"{name} is not a regular file")
        _check(name, status)
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TransportError(f"{name} is longer than {limit} bytes")
    return content


def _resolve(path: Path) -> Path:
    """Where `path` leads, once nobody else can lead it elsewhere."""
    at = Path("/")
    ahead = list(Path(os.path.abspath(path)).parts[1:])
    links = 0
    while ahead:
        _check(at, os.lstat(at), sticky=len(ahead) > 1)
        name = ahead.pop(0)
        if name == "..":  # from a symbolic link
            at = at.parent
            continue
        status = os.lstat(at / name)
        if not stat.S_ISLNK(status.st_mode):
            at /= name
            continue
        _check(at / name, status)
        links += 1
        if links > _MOST_LINKS:
            raise TransportError(f"{path} leads through more than {_MOST_LINKS} symbolic links")
        target = Path(os.readlink(at / name))
        if target.is_absolute():
            at = Path("/")
        ahead = [part for part in target.parts if part != "/"] + ahead
    return at


def _check(path: Path, status: os.stat_result, *, sticky: bool = False) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise TransportError(
            f"{path} belongs to the user {status.st_uid}, who could let others in", hint=f"chown root {path}"
        )
    if stat.S_ISLNK(status.st_mode) or not status.st_mode & _OTHERS_MAY_WRITE:
        return
    if not (sticky and stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        raise TransportError(f"{path} can be written by others, who could let anybody in", hint=f"chmod go-w {path}")
