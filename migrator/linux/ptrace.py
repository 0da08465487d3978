"""ptrace(2), one function per request.

All requests for a tracee must come from the OS thread that seized it. Errors are OSError with the name
of the request and the tid.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from dataclasses import dataclass

_libc = ctypes.PyDLL(None, use_errno=True)  # requests take about a microsecond: keep the GIL
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

CONT, SINGLESTEP, DETACH, SYSCALL = 7, 9, 17, 24
SETOPTIONS, GETEVENTMSG, GETSIGINFO = 0x4200, 0x4201, 0x4202
GETREGSET, SETREGSET = 0x4204, 0x4205
SEIZE, INTERRUPT, LISTEN = 0x4206, 0x4207, 0x4208
PEEKSIGINFO, GETSIGMASK, SETSIGMASK = 0x4209, 0x420A, 0x420B
GET_RSEQ_CONFIGURATION = 0x420F
GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211

O_TRACESYSGOOD = 0x1  # also what makes a tracee survive its tracer in a system-call stop
O_EXITKILL = 0x100000
O_SUSPEND_SECCOMP = 0x200000

EVENT_STOP = 128
SYSCALL_STOP = 0x85  # SIGTRAP | 0x80, with O_TRACESYSGOOD
NT_PRSTATUS, NT_X86_XSTATE = 1, 0x202
WALL = 0x40000000
SIGINFO_SIZE = 128


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _PeekArgs(ctypes.Structure):
    _fields_ = [("off", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("nr", ctypes.c_int32)]


@dataclass(frozen=True)
class RseqConfiguration:
    """What PTRACE_GET_RSEQ_CONFIGURATION gives; `pointer` 0 means not registered."""

    pointer: int
    length: int
    signature: int
    flags: int


NO_RSEQ = RseqConfiguration(0, 0, 0, 0)


def request(code: int, tid: int, addr: int = 0, data: int = 0, name: str = "") -> int:
    ctypes.set_errno(0)
    result = int(_ptrace(code, tid, addr, data))
    if result == -1:
        error = ctypes.get_errno()
        if error:
            raise OSError(error, f"ptrace {name or hex(code)}: {os.strerror(error)}", f"tid {tid}")
    return result


def seize(tid: int, options: int = 0) -> None:
    """Attach without stopping."""
    request(SEIZE, tid, 0, options, "seize")


def interrupt(tid: int) -> None:
    request(INTERRUPT, tid, name="interrupt")


def cont(tid: int, signal: int = 0) -> None:
    request(CONT, tid, 0, signal, "cont")


def listen(tid: int) -> None:
    """Let a group-stopped tracee stay in its group stop, without running."""
    request(LISTEN, tid, name="listen")


def singlestep(tid: int) -> None:
    request(SINGLESTEP, tid, name="singlestep")


def until_syscall(tid: int) -> None:
    """Go on to the next entry into, or return from, a system call."""
    request(SYSCALL, tid, name="syscall")


def detach(tid: int, signal: int = 0) -> None:
    request(DETACH, tid, 0, signal, "detach")


def set_options(tid: int, options: int) -> None:
    request(SETOPTIONS, tid, 0, options, "setoptions")


_buffer = ctypes.create_string_buffer(64 << 10)
_buffer_address = ctypes.addressof(_buffer)
_iovec = _Iovec()
_iovec_address = ctypes.addressof(_iovec)


def get_regset(tid: int, kind: int) -> bytes:
    """The register set `kind` of a stopped tracee, as many bytes as the kernel has."""
    _iovec.base, _iovec.length = _buffer_address, len(_buffer)
    request(GETREGSET, tid, kind, _iovec_address, "getregset")
    return ctypes.string_at(_buffer_address, _iovec.length)


def set_regset(tid: int, kind: int, data: bytes) -> None:
    ctypes.memmove(_buffer_address, data, len(data))
    _iovec.base, _iovec.length = _buffer_address, len(data)
    request(SETREGSET, tid, kind, _iovec_address, "setregset")


def set_regset_at(tid: int, kind: int, address: int, size: int) -> None:
    """As set_regset(), from memory of our own."""
    _iovec.base, _iovec.length = address, size
    request(SETREGSET, tid, kind, _iovec_address, "setregset")


def get_sigmask(tid: int) -> int:
    request(GETSIGMASK, tid, 8, _buffer_address, "getsigmask")
    return int(struct.unpack_from("<Q", _buffer)[0])


def set_sigmask(tid: int, mask: int) -> None:
    struct.pack_into("<Q", _buffer, 0, mask)
    request(SETSIGMASK, tid, 8, _buffer_address, "setsigmask")


def get_siginfo(tid: int) -> bytes:
    request(GETSIGINFO, tid, 0, _buffer_address, "getsiginfo")
    return ctypes.string_at(_buffer_address, SIGINFO_SIZE)


def peek_siginfo(tid: int, *, shared: bool, most: int = sys.maxsize) -> bytes:
    """The first `most` pending signals of the task's own queue, or of the one its process shares, as siginfo_t's.

    The kernel walks the queue from its beginning in each call, and there may be tens of thousands."""
    out: list[bytes] = []
    found = 0
    while found < most:
        args = _PeekArgs(found, 1 if shared else 0, min(most - found, len(_buffer) // SIGINFO_SIZE))
        count = request(PEEKSIGINFO, tid, ctypes.addressof(args), _buffer_address, "peeksiginfo")
        if count <= 0:
            break
        out.append(ctypes.string_at(_buffer_address, count * SIGINFO_SIZE))
        found += count
        if count < args.nr:
            break
    return b"".join(out)


def rseq_configuration(tid: int) -> RseqConfiguration:
    request(GET_RSEQ_CONFIGURATION, tid, 24, _buffer_address, "get_rseq_configuration")
    return RseqConfiguration(*struct.unpack_from("<QIII", _buffer))


def dispatches_syscalls(tid: int) -> bool:
    """Whether a stopped tracee may have its system calls turned into signals (PR_SET_SYSCALL_USER_DISPATCH). False
    before Linux 6.4, which does not tell."""
    try:
        request(GET_SYSCALL_USER_DISPATCH_CONFIG, tid, 32, _buffer_address, "get_syscall_user_dispatch_config")
    except OSError as error:
        if error.errno in (errno.EIO, errno.EINVAL):
            return False
        raise
    return bool(struct.unpack_from("<Q", _buffer)[0])


def wait(tid: int) -> int:
    """Wait for the tracee's next stop or end; the wait(2) status."""
    return os.waitpid(tid, WALL)[1]


def is_stop(status: int) -> bool:
    return status & 0xFF == 0x7F


def stop_signal(status: int) -> int:
    return (status >> 8) & 0xFF


def stop_event(status: int) -> int:
    return status >> 16
