"""TCP repair mode (TCP_REPAIR in linux/tcp.h): on, off, and off again for an agent that has died.

In repair mode a socket tells and takes what else only the kernel knows of a connection. Whoever reads from it
or writes to it gets an error, so no task may run while a connection of its is under repair; and closed, it
ends without FIN or RST. It is not silent: what comes for it is acknowledged all the same (tcp_ack() and
tcp_data_queue() do not look at it), so that silence is the network's business.

Only the socket remembers that it is under repair, which is how an agent finds what another has left.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable

from migrator.linux import descriptors

TCP_REPAIR, TCP_REPAIR_QUEUE = 19, 20
NO_QUEUE, RECV_QUEUE, SEND_QUEUE = 0, 1, 2
ON, OFF, OFF_WITHOUT_PROBE = 1, 0, -1
_FORCE_REUSE = 2  # what SO_REUSEADDR reads while nobody has put it back (SK_FORCE_REUSE in net/sock.h)
_TCP = socket.IPPROTO_TCP


def repair(sock: socket.SocketType) -> None:
    """Enter repair mode. SO_REUSEADDR is forced from here on, and lost on the way out: see `reuse_address()`."""
    sock.setsockopt(_TCP, TCP_REPAIR, ON)


def reuse_address(sock: socket.SocketType, value: int) -> None:
    """Say what SO_REUSEADDR is to be after repair: done early, also another agent can tell."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, value)


def leave(sock: socket.SocketType, *, probe: bool) -> None:
    """Leave repair mode. With `probe` the peer is asked at once for what it has acknowledged.

    SO_REUSEADDR is what it was before, if `reuse_address()` has told; else set: without it, a server that is
    started again could not have its port."""
    reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)
    sock.setsockopt(_TCP, TCP_REPAIR, OFF if probe else OFF_WITHOUT_PROBE)
    reuse_address(sock, 1 if reuse == _FORCE_REUSE else reuse)


def push(sock: socket.SocketType) -> None:
    """Send what waits in the sending queue, as far as the peer's window goes.

    What a filter or a device without carrier did not let go is tried again by the kernel only when a timer ends,
    after a second or more, and the probe of `leave()` does not help a connection that is half closed: the kernel
    sends it in the established state alone. Setting TCP_NODELAY pushes (__tcp_sock_set_nodelay() in net/ipv4/tcp.c)."""
    before = sock.getsockopt(_TCP, socket.TCP_NODELAY)
    sock.setsockopt(_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(_TCP, socket.TCP_NODELAY, before)


def revive(pids: Iterable[int]) -> int:
    """Take every connection of these tasks, which must be frozen, out of repair mode; returns how many.

    Each asks its peer for what it missed, so the network should be open. What has no socket, or has gone, is
    passed over."""
    seen: set[tuple[int, int]] = set()
    revived = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                for entry in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):
                        status = os.stat(f"/proc/{pid}/fd/{entry}")
                        if not stat.S_ISSOCK(status.st_mode) or (status.st_dev, status.st_ino) in seen:
                            continue
                        seen.add((status.st_dev, status.st_ino))
                        with descriptors.fetch_socket(pidfd, int(entry)) as sock:
                            if sock.proto == _TCP:
                                revived += _revive(sock)
            finally:
                os.close(pidfd)
    return revived


def _revive(sock: socket.socket) -> bool:
    if not sock.getsockopt(_TCP, TCP_REPAIR):
        return False
    leave(sock, probe=True)
    push(sock)
    return True
