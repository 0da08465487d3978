"""POSIX message queues of the calling thread's IPC namespace (mq_overview(7))."""

from __future__ import annotations

import ctypes
import os

from migrator.linux import sys

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CMD_CREATE = 1, 6  # of fsopen(2) and fsmount(2); of fsconfig(2)


def names() -> list[str]:
    """Of all queues, without the slash. They are asked of a mount that nobody sees."""
    kind = ctypes.create_string_buffer(b"mqueue")
    context = sys.call(_FSOPEN, ctypes.addressof(kind), _CLOEXEC, name="fsopen", about="mqueue")
    try:
        sys.call(_FSCONFIG, context, _CMD_CREATE, 0, 0, 0, name="fsconfig", about="mqueue")
        mount = sys.call(_FSMOUNT, context, _CLOEXEC, 0, name="fsmount", about="mqueue")
    finally:
        os.close(context)
    try:
        return sorted(os.listdir(f"/proc/self/fd/{mount}"))
    finally:
        os.close(mount)
