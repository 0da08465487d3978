"""What is on its way in a running tree and cannot be saved: only running tasks can take it.

A connection that waits to be accepted belongs to no descriptor yet, and a descriptor that is sent through a unix
socket to none any more; what the kernel told a netlink socket or an inotify instance, only its program can read, and of
a process that has ended behind a pidfd only its parent can take note. A program does all of this within microseconds
when it runs. So a freeze waits for a moment in which there is none, and looks again once the tasks are stopped.

    with Transients(processes) as transients:    # ahead of the freeze
        ...                                      # hold back new connections
        transients.settle(0.005)                 # then freeze
        transients.waiting()                     # "" if there is nothing now
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from migrator.engine.user.descriptors import fdinfo, sockopts
from migrator.engine.user.descriptors.description import Holder
from migrator.linux import descriptors, sys

_PAUSE = 0.0002
_READABLE = {
    "anon_inode:inotify": "what happened to watched files waits to be read (inotify)",
    "anon_inode:[pidfd]": "the process behind this pidfd has ended, and its parent is still to take note of it",
}
_CONTROL = socket.CMSG_SPACE(253 * 4)  # SCM_MAX_FD
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_CHUNK = 1 << 16


class Transients:
    """The listeners, unix sockets and inotify instances that `processes` have now, each held by a duplicate: close it
    soon.

    A process or descriptor that vanishes meanwhile is left out."""

    def __init__(self, processes: Sequence[Holder]) -> None:
        self._listeners: dict[int, str] = {}  # our descriptor -> what it is to the tree
        self._unix: dict[int, str] = {}
        self._netlink: dict[int, str] = {}
        self._others: dict[int, tuple[Holder, int, str]] = {}  # and under which number who has it
        self._poll = select.poll()
        self._poll_unix = select.poll()
        self._poll_netlink = select.poll()
        self._poll_others = select.poll()
        seen: set[str] = set()
        for process in processes:
            try:
                for number in fdinfo.numbers(process.pid):
                    link = os.readlink(f"/proc/{process.pid}/fd/{number}")
                    if link.startswith("socket:[") and link not in seen:
                        seen.add(link)
                        self._look(process, number)
                    elif link in _READABLE:
                        fd = sys.pidfd_getfd(process.pidfd, number)
                        self._others[fd] = process, number, _READABLE[link]
                        self._poll_others.register(fd, select.POLLIN)
            except OSError:
                continue

    def _look(self, process: Holder, number: int) -> None:
        sock = descriptors.fetch_socket(process.pidfd, number)
        fd = sock.fileno()
        what = f"pid {process.vpid} fd {number}"
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._listeners[sock.detach()] = what
            self._poll.register(fd, select.POLLIN)
        elif sock.family == socket.AF_NETLINK:
            self._netlink[sock.detach()] = what
            self._poll_netlink.register(fd, select.POLLIN)
        elif sock.family == socket.AF_UNIX:
            self._unix[sock.detach()] = what
            self._poll_unix.register(fd, select.POLLIN)
        else:
            sock.close()

    def waiting(self) -> str:
        """What there is now, in words; "" for nothing. The tasks are stopped: their peek offsets are borrowed."""
        return self._waiting(_carries_descriptors)

    def _waiting(self, carries_descriptors: Callable[[int], bool]) -> str:
        for fd, _ in self._poll.poll(0):
            return f"{self._listeners[fd]}: a connection waits to be accepted"
        for fd, _ in self._poll_netlink.poll(0):
            return f"{self._netlink[fd]}: what the kernel says about the network waits to be read (netlink)"
        for fd, _ in self._poll_others.poll(0):
            process, number, what = self._others[fd]
            if _has_still(process, number, fd):
                return f"pid {process.vpid} fd {number}: {what}"
        for fd, events in self._poll_unix.poll(0):
            if events & select.POLLIN and carries_descriptors(fd):
                return f"{self._unix[fd]}: descriptors are on their way through this unix socket (SCM_RIGHTS)"
        return ""

    def settle(self, seconds: float) -> bool:
        """Wait until the program has taken what can be seen while it runs, at most this long; whether it has."""
        end = time.monotonic() + seconds
        while self._waiting(_begins_with_descriptors):
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE)
        return True

    def close(self) -> None:
        for fd in (*self._listeners, *self._unix, *self._netlink, *self._others):
            os.close(fd)
        self._listeners.clear()
        self._netlink.clear()
        self._others.clear()
        self._unix.clear()

    def __enter__(self) -> Transients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _has_still(process: Holder, number: int, fd: int) -> bool:
    """Whether it has not been closed, and is no pidfd of a process that was waited for: closed in a moment, too."""
    try:
        return descriptors.same_file(os.getpid(), fd, process.pid, number) and (
            fdinfo.read(os.getpid(), fd).fields.get("Pid") != "-1"
        )
    except OSError:
        return False


def _begins_with_descriptors(fd: int) -> bool:
    """Whether what is to be received next brings a descriptor. The program may run meanwhile.

    Looking further would move the peek offset, which is the program's (SO_PEEK_OFF, socket(7)): its own MSG_PEEK
    would skip messages. So would any look of ours where the program has set one; such a socket is left for later."""
    sock = sockopts.borrow(fd)
    try:
        if sock.getsockopt(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF) >= 0:
            return False
        return _close_received(sock.recvmsg(1, _CONTROL, _PEEK)[1])
    except OSError:
        return False  # it was taken meanwhile
    finally:
        sock.detach()


def _close_received(control: list[tuple[int, int, bytes]]) -> bool:
    """Close the descriptors that came with a message; whether there were any."""
    found = False
    for level, kind, payload in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found = True
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            for number in numbers:
                os.close(number)
    return found


def _carries_descriptors(fd: int) -> bool:
    """Whether a descriptor is in the queue of a unix socket. All is left in place."""
    sock = sockopts.borrow(fd)
    before = sock.getsockopt(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF)
    sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF, 0)
    found = False
    try:
        while not found:
            data, control, _, _ = sock.recvmsg(_CHUNK, _CONTROL, _PEEK)
            found = _close_received(control)
            if not data:
                break
    except OSError:
        pass  # nothing more
    finally:
        sock.setsockopt(sockopts.SOL_SOCKET, sockopts.SO_PEEK_OFF, before)
        sock.detach()
    return found
