"""Doing one thing as another user: what the kernel notes of the caller, such as SO_PEERCRED (unix(7)).

Credentials belong to threads (credentials(7)); libc changes those of all at once, the system calls do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from migrator.linux import sys
from migrator.linux.fresh_thread import in_fresh_thread

T = TypeVar("T")
_SETRESUID, _SETRESGID, _SETFSUID, _PRCTL = 117, 119, 122, 157
_PR_SET_DUMPABLE = 4


def as_user(uid: int, gid: int, function: Callable[[], T]) -> T:
    """Call `function` in a thread whose effective ids these are; files are still open to it as to root.

    The thread has the root and working directory and the namespaces of the caller, who must be root."""

    def inside() -> T:
        sys.call(_SETRESGID, -1, gid, -1, name="setresgid", about=f"gid {gid}")
        sys.call(_SETRESUID, -1, uid, -1, name="setresuid", about=f"uid {uid}")
        sys.call(_SETFSUID, 0, name="setfsuid")
        return function()

    try:
        return in_fresh_thread(f"uid {uid}", inside)
    finally:
        sys.call(_PRCTL, _PR_SET_DUMPABLE, 1, 0, 0, 0, name="prctl")  # the change took it from the whole process
