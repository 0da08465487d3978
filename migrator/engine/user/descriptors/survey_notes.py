"""What of a running tree's descriptors is carried, and yet will not be quite the same."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from collections.abc import Iterator, Sequence

from migrator.engine.user.descriptors import fdinfo, sockopts
from migrator.engine.user.descriptors.description import Holder
from migrator.linux import descriptors

_PEER = "unix connections will name the same user as their peer (SO_PEERCRED), but not its pid"
_WATCHING = "what happens to watched files while the tasks are stopped will not be told (inotify)"
_ERROR = "an error that a datagram has met waits to be read (SO_ERROR, MSG_ERRQUEUE), and will not be told"
_DELETED = "files without a name: when they were last read is not kept"


def notes(processes: Sequence[Holder]) -> Iterator[tuple[str, str]]:
    """(what it is about, what will be different), one of each for each process; the tasks run on all the while."""
    for process in processes:
        found: dict[str, list[int]] = {words: [] for words in (_PEER, _WATCHING, _ERROR, _DELETED)}
        try:
            numbers = fdinfo.numbers(process.pid)
        except OSError:
            continue  # it ended
        for number in numbers:
            with contextlib.suppress(OSError):  # it was closed meanwhile
                if words := _of(process, number):
                    found[words].append(number)
        for words, those in found.items():
            if those:
                yield _about(process, those), words


def _about(process: Holder, numbers: Sequence[int]) -> str:
    return f"pid {process.pid} fd {', '.join(map(str, numbers[:8]))}{', …' if numbers[8:] else ''}"


def _of(process: Holder, number: int) -> str:
    """What is to be said of a descriptor, or ""."""
    link = os.readlink(f"/proc/{process.pid}/fd/{number}")
    if link.startswith("socket:"):
        with descriptors.fetch_socket(process.pidfd, number) as sock:
            return _PEER if _knows_its_peer(sock) else _ERROR if _has_an_error(sock) else ""
    if link == "anon_inode:inotify":
        return _WATCHING
    if link.endswith(" (deleted)") and not link.startswith("/memfd:"):
        status = os.stat(f"/proc/{process.pid}/fd/{number}")
        return _DELETED if stat.S_ISREG(status.st_mode) and not status.st_nlink else ""
    return ""


def _has_an_error(sock: socket.socket) -> bool:
    if sock.type != socket.SOCK_DGRAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _knows_its_peer(sock: socket.socket) -> bool:
    if sock.family != socket.AF_UNIX or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    return sockopts.has_peer(sock)
