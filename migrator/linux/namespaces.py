"""Entering and leaving namespaces (namespaces(7), setns(2), unshare(2)).

A thread can enter a network or IPC namespace for a while and come back; everything else is done by a child
process that enters, acts, and answers through a pipe:

    with entered(f"/proc/{pid}/ns/net"):
        sock = socket.socket()         # belongs to that network for good

    addresses = run_in(pid, {"net", "mnt"}, read_addresses)
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import signal
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar, cast

from migrator.errors import MigratorError
from migrator.linux import sys

CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x80, 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x8000000, 0x10000000, 0x20000000, 0x40000000

# Names as in /proc/PID/ns. The mount namespace is entered last: after that /proc is another one.
KINDS = {
    "user": CLONE_NEWUSER,
    "cgroup": CLONE_NEWCGROUP,
    "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS,
    "net": CLONE_NEWNET,
    "pid": CLONE_NEWPID,
    "time": CLONE_NEWTIME,
    "mnt": CLONE_NEWNS,
}
WITH_SYSCTLS = ("ipc", "net", "pid", "user")  # /proc/sys has other files for those who are in other ones of these

T = TypeVar("T")


class NamespaceError(MigratorError):
    """What a child process in another namespace was asked to do failed there."""


def setns(fd: int, flags: int = 0) -> None:
    """Move the calling thread into the namespace behind `fd`, or into those of a pidfd (setns(2))."""
    sys.libc("setns", fd, flags, about=f"flags {flags:#x}")


def unshare(flags: int) -> None:
    """Give the calling thread namespaces of its own (unshare(2))."""
    sys.libc("unshare", flags, about=f"flags {flags:#x}")


def identity(pid: int, kind: str) -> int:
    """The inode number that tells a namespace of a process from all others."""
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


@contextlib.contextmanager
def entered(where: int | str, kind: str = "net") -> Iterator[None]:
    """The calling thread is in the namespace inside the block, and back in its own after it.

    `where` is a descriptor of it, a pidfd, or a path such as /proc/PID/ns/net. Only the kinds
    "net" and "ipc" may be entered by a thread of a process that has others; those do not move."""
    if kind not in ("net", "ipc"):
        raise ValueError(f"a thread cannot enter a namespace of kind {kind} and come back: use run_in()")
    home = os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if isinstance(where, int):
            setns(where, KINDS[kind])
        else:
            there = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(there, KINDS[kind])
            finally:
                os.close(there)
        try:
            yield
        finally:
            setns(home, KINDS[kind])
    finally:
        os.close(home)


@contextlib.contextmanager
def born_in(pid: int) -> Iterator[None]:
    """Children that this thread makes inside the block are in the pid namespace of `pid`; it makes no threads there."""
    home = os.open("/proc/thread-self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(there, CLONE_NEWPID)
        finally:
            os.close(there)
        try:
            yield
        finally:
            setns(home, CLONE_NEWPID)
    finally:
        os.close(home)


def enter(pid: int, kinds: Collection[str]) -> None:
    """Move this process into namespaces of `pid`, for good. Needs a process with a single thread.

    Entering "pid" affects only children born later (pid_namespaces(7)).
    """
    unknown = set(kinds) - KINDS.keys()
    if unknown:
        raise ValueError(f"no such kind of namespace: {', '.join(sorted(unknown))}")
    fds = {kind: os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in KINDS if kind in kinds}
    for kind, fd in fds.items():
        setns(fd, KINDS[kind])
        os.close(fd)


def run_in(pid: int, kinds: Collection[str], function: Callable[[], T]) -> T:
    """Run `function` in a child process that has entered namespaces of `pid`, and return its result.

    The result travels by pickle. What the function raises is raised here: the same object where pickle
    can carry it, otherwise a NamespaceError with its text. The child has no threads but the one that
    runs `function`, so the function must not wait for any. Raises ProcessLookupError if `pid` ended meanwhile.
    """
    receive, send = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _answer_and_exit(send, pid, kinds, function)
    os.close(send)
    try:
        with open(receive, "rb") as pipe:
            data = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if not data:
        if not os.path.exists(f"/proc/{pid}/ns/mnt"):
            raise ProcessLookupError(errno.ESRCH, "it ended", f"pid {pid}")
        raise NamespaceError(f"a helper in the namespaces of pid {pid} died: wait status {status:#x}")
    good, value = pickle.loads(data)
    if good:
        return cast(T, value)
    raise value


def open_in(pid: int, kinds: Collection[str], function: Callable[[], int]) -> int:
    """As run_in(), for a function that returns a descriptor: here it is one of ours, of the same open file."""
    receive, send = socket.socketpair()
    with receive, send:
        run_in(pid, kinds, lambda: socket.send_fds(send, [b"f"], [function()]))
        _, fds, _, _ = socket.recv_fds(receive, 1, 1, socket.MSG_CMSG_CLOEXEC)
        return fds[0]


def of_its_own(pid: int, kinds: Iterable[str]) -> tuple[str, ...]:
    """The kinds of namespaces in which `pid` is in another one than we are."""
    links = {kind: [os.readlink(f"/proc/{who}/ns/{kind}") for who in (pid, "self")] for kind in kinds}
    return tuple(kind for kind, (theirs, ours) in links.items() if theirs != ours)


def _answer_and_exit(send: int, pid: int, kinds: Collection[str], function: Callable[[], T]) -> None:
    """The child's whole life. Never returns."""
    try:
        try:
            enter(pid, kinds)
            if "pid" in kinds and (inner := os.fork()) != 0:
                # The grandchild is the one that is in the pid namespace, and answers.
                os.waitpid(inner, 0)
                os._exit(0)
            answer = pickle.dumps((True, function()))
        except BaseException as error:
            answer = _pickled(error)
        with open(send, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    finally:
        os._exit(1)


def _pickled(error: BaseException) -> bytes:
    try:
        blob = pickle.dumps((False, error))
        pickle.loads(blob)  # some exceptions pickle but do not come back
        return blob
    except Exception:
        return pickle.dumps((False, NamespaceError(f"{type(error).__name__}: {error}")))
