"""Keyrings of the kernel (keyrings(7)): a new process has those of whoever makes it."""

from __future__ import annotations

import errno

from migrator.linux import sys
from migrator.linux.x86_64 import NR

_JOIN_SESSION_KEYRING = 1


def leave_session() -> None:
    """Give this thread, and what it makes from now on, a session keyring that is new and empty.

    Whoever has a session keyring has the keys in it, whatever user it becomes."""
    try:
        sys.call(NR["keyctl"], _JOIN_SESSION_KEYRING, 0, name="keyctl", about="a new session keyring")
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):  # a kernel without keys, or a filter that denies them to all
            raise
