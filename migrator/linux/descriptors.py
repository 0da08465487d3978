"""System calls about descriptors that Python has no name for (x86-64 numbers).

Each raises OSError with the name of the call.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Iterable

from migrator.linux import sys

_TIMERFD_CREATE, _TIMERFD_SETTIME, _TIMERFD_GETTIME, _SIGNALFD4, _TEE = 283, 286, 287, 289, 276
_UNSHARE, _EPOLL_CREATE1, _GETSOCKOPT, _SO_GET_FILTER, _FSTATFS = 272, 291, 55, 26, 138

TMPFS_MAGIC = 0x01021994
O_LARGEFILE = 0o100000
O_TMPFILE_BIT = 0o20000000  # O_TMPFILE without O_DIRECTORY
CLONE_FS = 0x200

F_SETSIG, F_GETSIG, F_SETOWN_EX, F_GETOWN_EX = 10, 11, 15, 16
TFD_IOC_SET_TICKS = 0x40085400  # _IOW('T', 0, u64), linux/timerfd.h
FIONREAD = 0x541B


def reopen(fd: int, flags: int) -> int:
    """A new description of what `fd` is open on, with these flags; O_LARGEFILE is always set."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def fetch_socket(pidfd: int, number: int) -> socket.socket:
    """A duplicate of a socket of another process. Raises OSError if the number is another thing's by now, or nobody's,
    and holds nothing of it."""
    fd = sys.pidfd_getfd(pidfd, number)
    try:
        return socket.socket(fileno=fd)
    except OSError:  # which has not closed it
        os.close(fd)
        raise


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors of ours, those with neighbouring numbers in one go."""
    ordered = sorted(fds)
    first = 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or ordered[end] != ordered[end - 1] + 1:
            os.closerange(ordered[first], ordered[end - 1] + 1)
            first = end


_slot = ctypes.create_string_buffer(12)  # struct kcmp_epoll_slot
_SLOT, _SLOT_AT = struct.Struct("<III"), ctypes.addressof(_slot)
_ORDER = (0, -1, 1, 1)


def filesystem_type(fd: int) -> int:
    """The magic number of the file system that a file is in (fstatfs(2))."""
    answer = ctypes.create_string_buffer(256)  # struct statfs
    sys.call(_FSTATFS, fd, ctypes.addressof(answer), name="fstatfs", about=f"fd {fd}")
    return int.from_bytes(answer.raw[:4], "little")


def order_files(a: int, b: int) -> int:
    """0 if two of our descriptors are one description, otherwise -1 or 1: an order of descriptions."""
    pid = os.getpid()
    return _ORDER[sys.kcmp(pid, pid, sys.KCMP_FILE, a, b)]


def same_file(pid_a: int, a: int, pid_b: int, b: int) -> bool:
    """Whether descriptor `a` of one process and `b` of another are one description."""
    return sys.kcmp(pid_a, pid_b, sys.KCMP_FILE, a, b) == 0


def order_tables(pid_a: int, pid_b: int) -> int:
    """The same of the descriptor tables of two processes: 0 if they share one (CLONE_FILES)."""
    return _ORDER[sys.kcmp(pid_a, pid_b, sys.KCMP_FILES, 0, 0)]


def is_epoll_target(target: int, epoll: int, number: int, nth: int) -> bool:
    """Whether the `nth` entry of our `epoll` that was added as `number` is our `target`."""
    _SLOT.pack_into(_slot, 0, epoll, number, nth)
    pid = os.getpid()
    return sys.kcmp(pid, pid, sys.KCMP_EPOLL_TFD, target, _SLOT_AT) == 0


def tee(source: int, target: int, count: int) -> int:
    """Bytes duplicated from one pipe to another without taking them out; -1 if there was nothing (tee(2))."""
    try:
        return sys.call(_TEE, source, target, count, 2, name="tee")  # SPLICE_F_NONBLOCK
    except BlockingIOError:
        return -1


def timerfd_create(clock: int) -> int:
    return sys.call(_TIMERFD_CREATE, clock, os.O_CLOEXEC, name="timerfd_create", about=f"clock {clock}")


def timerfd_settime(fd: int, flags: int, value: int, interval: int) -> None:
    """Arm a timer; times in ns."""
    spec = struct.pack("<qqqq", *divmod(interval, 10**9), *divmod(value, 10**9))
    buffer = ctypes.create_string_buffer(spec, 32)
    sys.call(_TIMERFD_SETTIME, fd, flags, ctypes.addressof(buffer), 0, name="timerfd_settime")


def timerfd_gettime(fd: int) -> tuple[int, int]:
    """(remaining, interval) in ns. An expired periodic timer goes on from here, as on a read."""
    buffer = ctypes.create_string_buffer(32)
    sys.call(_TIMERFD_GETTIME, fd, ctypes.addressof(buffer), name="timerfd_gettime")
    isec, insec, vsec, vnsec = struct.unpack("<qqqq", buffer.raw)
    return vsec * 10**9 + vnsec, isec * 10**9 + insec


def signalfd(mask: int) -> int:
    buffer = ctypes.create_string_buffer(struct.pack("<Q", mask), 8)
    return sys.call(_SIGNALFD4, -1, ctypes.addressof(buffer), 8, os.O_CLOEXEC, name="signalfd4")


def epoll_create() -> int:
    return sys.call(_EPOLL_CREATE1, os.O_CLOEXEC, name="epoll_create1")


def unshare_fs() -> None:
    """Give the calling thread a root and a working directory of its own."""
    sys.call(_UNSHARE, CLONE_FS, name="unshare")


def filter_length(fd: int) -> int:
    """Instructions of a socket's classic filter. Only a length of 0 is safe to ask with: the kernel counts
    the buffer in instructions (sk_get_filter() in net/core/filter.c)."""
    length = ctypes.c_uint32(0)
    sys.call(_GETSOCKOPT, fd, 1, _SO_GET_FILTER, 0, ctypes.addressof(length), name="getsockopt")
    return length.value


def owner(fd: int) -> tuple[int, int, int]:
    """(type as in enum OwnerType, pid as we see it, signal) of F_GETOWN_EX and F_GETSIG; type 0: nobody, who may still
    have a signal to get."""
    raw = fcntl.fcntl(fd, F_GETOWN_EX, bytes(8))
    kind, pid = struct.unpack("<ii", raw)
    signal = fcntl.fcntl(fd, F_GETSIG)
    return (kind + 1, pid, signal) if pid else (0, 0, signal)


def allow_many_files(count: int) -> None:
    """Raise our soft limit of open files to the hard one, and make room for `count` of them: a tree's descriptors are
    all held at once.

    Without that room the kernel makes it when it is needed, twice as much each time; and in a program with threads it
    waits for all processors then (expand_fdtable() in fs/file.c), which takes 5 ms and more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    some = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.close(fcntl.fcntl(some, fcntl.F_DUPFD_CLOEXEC, min(count, hard - 1)))
    except OSError:
        pass  # so many cannot be open: who opens them will know
    finally:
        os.close(some)


def has_option(fd: int, level: int, name: int, asked: bytes) -> bool:
    """Whether getsockopt(2) has an answer to a question that is in the buffer for the answer."""
    buffer = ctypes.create_string_buffer(asked, len(asked))
    length = ctypes.c_uint32(len(asked))
    try:
        sys.call(_GETSOCKOPT, fd, level, name, ctypes.addressof(buffer), ctypes.addressof(length), name="getsockopt")
    except OSError:
        return False
    return True
