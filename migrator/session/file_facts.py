"""What this host has under the paths of mapped and open files.

A path is opened with O_PATH first and looked at; only a regular file is then opened for reading. So nothing waits
for the writer of a FIFO. A file that says that it is empty is not read: those of /proc may wait, or have no end.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import replace

from migrator.engine.base import FileFact
from migrator.errors import MigrationAborted
from migrator.filesync.paths import below
from migrator.linux import elf

DIGEST_LIMIT = 16 << 20  # bytes of a file that are read for its digest, at most
_CHUNK = 1 << 20


def never() -> bool:
    return False


def collect_files(
    facts: Iterable[FileFact], root: str = "", *, stopped: Callable[[], bool] = never
) -> dict[str, FileFact | None]:
    """What this host has under the paths of `facts`, below `root`. Symbolic links are followed.

    `stopped` is asked again and again; once it says so, MigrationAborted is raised."""
    found: dict[str, FileFact | None] = {}
    for fact in facts:
        if fact.path not in found:
            found[fact.path] = _look(fact, below(root, fact.path), stopped)
    return found


def with_digests(facts: Iterable[FileFact], root: str = "", *, stopped: Callable[[], bool] = never) -> list[FileFact]:
    """`facts` with a digest where nothing else identifies the contents: files that are no ELF files, that the
    workload does not write to, and that are no larger than DIGEST_LIMIT. `stopped` as above."""
    return [
        replace(fact, digest=file_digest(below(root, fact.path), stopped))
        if not fact.build_id and not fact.writable and fact.size <= DIGEST_LIMIT
        else fact
        for fact in facts
    ]


def still_there(facts: Iterable[FileFact], root: str = "") -> list[FileFact]:
    """Those whose names lead to anything: a file that was deleted since it was surveyed is in the image, if it is still
    open, and nobody has to have it."""
    return [fact for fact in facts if os.path.lexists(below(root, fact.path))]


def file_digest(path: str, stopped: Callable[[], bool] = never) -> str:
    """sha256 in hex; "" for what cannot be read, is no regular file, or is larger than DIGEST_LIMIT."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError):
        return ""
    try:
        status = os.fstat(fd)
        return _digest(fd, status.st_size, stopped) if stat.S_ISREG(status.st_mode) else ""
    finally:
        os.close(fd)


def _look(fact: FileFact, path: str, stopped: Callable[[], bool]) -> FileFact | None:
    if stopped():
        raise MigrationAborted("the comparison of files was cancelled")
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(fd)
        regular = stat.S_ISREG(status.st_mode)
        build_id = elf.build_id(_again(fd)) if regular and status.st_size and not fact.writable else ""
        digest = _digest(fd, status.st_size, stopped) if fact.digest and regular else ""
    finally:
        os.close(fd)
    return FileFact(fact.path, status.st_size, status.st_mode, status.st_mtime_ns, build_id, fact.writable, digest)


def _digest(fd: int, size: int, stopped: Callable[[], bool]) -> str:
    """Of a regular file that `fd` names."""
    if size > DIGEST_LIMIT:
        return ""
    digest = hashlib.sha256()
    if size:
        try:
            file = os.open(_again(fd), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                left = DIGEST_LIMIT
                while left > 0 and (data := os.read(file, min(_CHUNK, left))):
                    if stopped():
                        raise MigrationAborted("the comparison of files was cancelled")
                    digest.update(data)
                    left -= len(data)
            finally:
                os.close(file)
        except OSError:
            return ""
    return digest.hexdigest()


def _again(fd: int) -> str:
    """A path that opens what an O_PATH descriptor names, whatever its name means by now."""
    return f"/proc/self/fd/{fd}"
