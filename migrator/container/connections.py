"""TCP connections that an agent has left in repair mode when it died.

Connections are saved and made in repair mode (TCP_REPAIR in linux/tcp.h): silent, and EPERM to whoever reads
or writes. Only their sockets remember that once the agent is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable

from migrator.linux.sys import pidfd_getfd

TCP_REPAIR, TCP_REPAIR_QUEUE, NO_QUEUE = 19, 20, 0


def revive(pids: Iterable[int]) -> int:
    """Take every connection of these tasks, which must be frozen, out of repair mode; returns how many.

    Each asks its peer for what it missed, so the network should be open. SO_REUSEADDR, which repair mode has
    replaced, is set: without it a server that is started again could not have its port. What has no socket,
    or has gone, is passed over.
    """
    seen: set[tuple[int, int]] = set()
    count = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                for entry in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):
                        count += _revive(pidfd, pid, int(entry), seen)
            finally:
                os.close(pidfd)
    return count


def _revive(pidfd: int, pid: int, number: int, seen: set[tuple[int, int]]) -> bool:
    status = os.stat(f"/proc/{pid}/fd/{number}")
    if not stat.S_ISSOCK(status.st_mode) or (status.st_dev, status.st_ino) in seen:
        return False
    seen.add((status.st_dev, status.st_ino))
    with socket.socket(fileno=pidfd_getfd(pidfd, number)) as sock:
        tcp = socket.IPPROTO_TCP
        if sock.proto != tcp or not sock.getsockopt(tcp, TCP_REPAIR):
            return False
        sock.setsockopt(tcp, TCP_REPAIR_QUEUE, NO_QUEUE)
        sock.setsockopt(tcp, TCP_REPAIR, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return True
