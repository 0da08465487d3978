"""System calls that Python has no name for, made through libc's syscall(2).

One short function per call; each raises OSError with the name of the call and what it was about.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import cast

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_quick = ctypes.PyDLL(None, use_errno=True).syscall  # keeps the GIL: for calls that take less than a microsecond
_quick.restype = ctypes.c_long
_quick.argtypes = [ctypes.c_long] * 6

KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_IO = 0, 1, 2, 3, 4, 5
KCMP_SYSVSEM, KCMP_EPOLL_TFD = 6, 7
_PR_SCHED_CORE = 62

_NR = {
    "kcmp": 312,
    "pidfd_getfd": 438,
    "get_robust_list": 274,
    "ioprio_get": 252,
    "sched_getattr": 315,
    "prctl": 157,
}


def call(number: int, *args: int, name: str = "", about: str = "") -> int:
    """Make system call `number`; raises OSError."""
    result = int(_syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in args]))
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name or f'syscall {number}'}: {os.strerror(error)}", about or None)
    return result


def libc(name: str, *args: int | bytes, about: str = "") -> int:
    """Call a function of the C library that returns -1 and sets errno; raises OSError. An int is passed as long."""
    result = int(getattr(_libc, name)(*(arg if isinstance(arg, bytes) else ctypes.c_long(arg) for arg in args)))
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}", about or None)
    return result


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate, close-on-exec, of the descriptor `fd` of the process behind `pidfd` (pidfd_getfd(2))."""
    result = int(_quick(_NR["pidfd_getfd"], pidfd, fd, 0, 0, 0))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"pidfd_getfd: {os.strerror(error)}", f"fd {fd}")
    return result


def kcmp(pid_a: int, pid_b: int, kind: int, a: int = 0, b: int = 0) -> int:
    """0 if two tasks share a resource of `kind`; 1, 2 or 3 for the order of two that differ (kcmp(2))."""
    result = int(_quick(_NR["kcmp"], pid_a, pid_b, kind, a, b))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"kcmp: {os.strerror(error)}", f"pids {pid_a} and {pid_b}")
    return result


def same(pid_a: int, pid_b: int, kind: int, a: int = 0, b: int = 0) -> bool:
    """Whether two tasks share a resource of `kind` (kcmp(2))."""
    return kcmp(pid_a, pid_b, kind, a, b) == 0


def time_slice(tid: int) -> int:
    """In ns, of a task under SCHED_OTHER or SCHED_BATCH (sched_getattr(2)); 0 for others, and before Linux 6.12."""
    answer = ctypes.create_string_buffer(48)
    call(_NR["sched_getattr"], tid, ctypes.addressof(answer), len(answer), 0, name="sched_getattr", about=f"tid {tid}")
    policy, runtime = struct.unpack_from("<I16xQ", answer, 4)
    return int(runtime) if policy in (os.SCHED_OTHER, os.SCHED_BATCH) else 0


def utilization_clamps(tid: int) -> tuple[int, int]:
    """(least, most) that the scheduler takes a task to use of a processor, 1024 being all (sched_getattr(2)); (0, 0)
    where it has ended or the kernel has no such bounds."""
    answer = ctypes.create_string_buffer(56)
    try:
        call(_NR["sched_getattr"], tid, ctypes.addressof(answer), len(answer), 0, name="sched_getattr")
    except OSError:
        return 0, 0
    return cast(tuple[int, int], struct.unpack_from("<II", answer, 48))


def core_cookie(tid: int) -> int:
    """Tasks with another cookie do not run on the same core (core scheduling); 0 if it has none, or ended."""
    cookie = ctypes.c_uint64()
    try:
        call(_NR["prctl"], _PR_SCHED_CORE, 0, tid, 0, ctypes.addressof(cookie), name="prctl")
    except OSError:
        return 0
    return cookie.value


def get_robust_list(tid: int) -> tuple[int, int]:
    """(head, length) of the robust futex list of a task (get_robust_list(2))."""
    head, length = ctypes.c_uint64(), ctypes.c_uint64()
    call(
        _NR["get_robust_list"],
        tid,
        ctypes.addressof(head),
        ctypes.addressof(length),
        name="get_robust_list",
        about=f"tid {tid}",
    )
    return head.value, length.value


def ioprio_get(tid: int) -> int:
    """The I/O priority of a task (ioprio_get(2))."""
    return call(_NR["ioprio_get"], 1, tid, name="ioprio_get", about=f"tid {tid}")
