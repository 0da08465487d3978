"""What of a running tree's descriptors is carried, and yet will not be quite the same."""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Iterator, Sequence

from migrator.engine.user.descriptors import fdinfo, sockopts
from migrator.engine.user.descriptors.description import Holder
from migrator.linux import sys


def notes(processes: Sequence[Holder]) -> Iterator[tuple[str, str]]:
    """(what it is about, what will be different), one for each process; the tasks run on all the while."""
    for process in processes:
        try:
            numbers = fdinfo.numbers(process.pid)
            peers = [n for n in numbers if _knows_its_peer(process, n)]
            watching = [n for n in numbers if _watches(process, n)]
            errors = [n for n in numbers if _has_an_error(process, n)]
            deleted = [n for n in numbers if _is_deleted(process, n)]
        except OSError:
            continue  # it ended
        if peers:
            words = "unix connections will name the same user as their peer (SO_PEERCRED), but not its pid"
            yield _about(process, peers), words
        if watching:
            words = "what happens to watched files while the tasks are stopped will not be told (inotify)"
            yield _about(process, watching), words
        if errors:
            words = "an error that a datagram has met waits to be read (SO_ERROR, MSG_ERRQUEUE), and will not be told"
            yield _about(process, errors), words
        if deleted:
            yield _about(process, deleted), "files without a name: when they were last read is not kept"


def _about(process: Holder, numbers: Sequence[int]) -> str:
    return f"pid {process.pid} fd {', '.join(map(str, numbers[:8]))}{', …' if numbers[8:] else ''}"


def _is_deleted(process: Holder, number: int) -> bool:
    try:
        link = os.readlink(f"/proc/{process.pid}/fd/{number}")
        if not link.endswith(" (deleted)") or link.startswith("/memfd:"):
            return False
        status = os.stat(f"/proc/{process.pid}/fd/{number}")
    except OSError:
        return False  # it was closed meanwhile
    return stat.S_ISREG(status.st_mode) and not status.st_nlink


def _watches(process: Holder, number: int) -> bool:
    try:
        return os.readlink(f"/proc/{process.pid}/fd/{number}") == "anon_inode:inotify"
    except OSError:
        return False  # it was closed meanwhile


def _has_an_error(process: Holder, number: int) -> bool:
    try:
        if not os.readlink(f"/proc/{process.pid}/fd/{number}").startswith("socket:"):
            return False
        with socket.socket(fileno=sys.pidfd_getfd(process.pidfd, number)) as sock:
            if sock.type != socket.SOCK_DGRAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
                return False
            poll = select.poll()
            poll.register(sock, 0)
            return any(events & select.POLLERR for _, events in poll.poll(0))
    except OSError:
        return False  # it was closed meanwhile


def _knows_its_peer(process: Holder, number: int) -> bool:
    try:
        if not os.readlink(f"/proc/{process.pid}/fd/{number}").startswith("socket:"):
            return False
        with socket.socket(fileno=sys.pidfd_getfd(process.pidfd, number)) as sock:
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            return sock.family == socket.AF_UNIX and not listens and sockopts.has_peer(sock)
    except OSError:
        return False  # it was closed meanwhile
