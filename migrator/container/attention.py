"""Who looks into the tasks of a container: one that measures how fast they write, or one that saves or moves them.

Both would have the same tracer and write-protection, so a container that is being measured could not be saved. Whoever
measures gives way: a lock (flock(2)) on a file that only root can open, which ends with whoever has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from migrator.container.state import Container


@contextlib.contextmanager
def measuring(container: Container) -> Iterator[bool]:
    """Whether it may be measured for the block."""
    with _opened(container) as fd:
        yield _locked(fd, fcntl.LOCK_SH)


@contextlib.contextmanager
def saving(container: Container | None) -> Iterator[None]:
    """Nobody measures it for the block; waits for who does (5 s at most: `migrator.protocol.fleet.Observe`). Another
    one that saves or moves it is not waited for: that will be found out."""
    with contextlib.ExitStack() as stack:
        if container is not None:
            fd = stack.enter_context(_opened(container))
            if not _locked(fd, fcntl.LOCK_EX) and _locked(fd, fcntl.LOCK_SH):
                fcntl.flock(fd, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opened(container: Container) -> Iterator[int]:
    fd = os.open(container.lock_file, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _locked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
