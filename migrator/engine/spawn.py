"""The seed of a restored process: a child that does nothing, has nothing, and bears the wanted pid."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import time

from migrator.errors import RestartFailed
from migrator.linux import keyrings, ptrace
from migrator.linux import x86_64 as arch

STUB_ADDRESS = 0x10000
SCRATCH_ADDRESS = 0x20000
SCRATCH_SIZE = 0x200000
PARKING = 0x300000  # where the vdso waits while it is moved
LOW_END = 0x400000  # a restored program must not use what lies below

CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWCGROUP = 0x80, 0x20000, 0x2000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x4000000, 0x8000000, 0x20000000, 0x40000000
_CLONE_VM, _CLONE_VFORK, _CLONE_PIDFD = 0x100, 0x4000, 0x1000
CLONE_ARGS_SIZE = 88
_PID_PATIENCE = 2.0  # seconds


def clone_args(flags: int, *, pidfd: int = 0, exit_signal: int = 0, set_tid: int = 0, set_tid_size: int = 0) -> bytes:
    """struct clone_args (clone3(2)); `pidfd` and `set_tid` are addresses."""
    return struct.pack("<11Q", flags, pidfd, 0, 0, exit_signal, 0, 0, 0, set_tid, set_tid_size, 0)


def spawn(
    set_tid: list[int], namespaces: int = 0, *, code: bytes = arch.STUB_CODE, keep: tuple[int, int] = (-1, -1)
) -> tuple[int, int]:
    """A stub child of this thread with pids `set_tid` (innermost namespace first), in new `namespaces`.

    It runs `code`, and has our descriptors `keep`, under their numbers, and those that are not close-on-exec; and an
    empty session keyring, which is this thread's, too, from now on.

    Returns (pid in our namespace, pidfd). Raises RestartFailed if a pid is taken."""
    keyrings.leave_session()
    elf = os.memfd_create("migrator-stub", os.MFD_CLOEXEC)
    try:
        os.write(elf, arch.stub_elf(STUB_ADDRESS, code))
        area = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        area.write(arch.SPAWN_CODE)
        anchor = ctypes.c_char.from_buffer(area)
        function = ctypes.CFUNCTYPE(
            ctypes.c_long,
            ctypes.c_void_p,
            ctypes.c_ulong,
            ctypes.c_long,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_int,
        )(ctypes.addressof(anchor))
        pidfd = ctypes.c_int(-1)
        tids = (ctypes.c_int32 * max(1, len(set_tid)))(*set_tid)
        flags = namespaces | _CLONE_VM | _CLONE_VFORK | _CLONE_PIDFD
        args = ctypes.create_string_buffer(
            clone_args(
                flags,
                pidfd=ctypes.addressof(pidfd),
                exit_signal=int(signal.SIGCHLD),
                set_tid=ctypes.addressof(tids) if set_tid else 0,
                set_tid_size=len(set_tid),
            )
        )
        empty = ctypes.create_string_buffer(b"", 8)
        argv = (ctypes.c_void_p * 2)(ctypes.addressof(empty), 0)
        envp = (ctypes.c_void_p * 1)(0)
        deadline = time.monotonic() + _PID_PATIENCE
        while True:
            result = function(
                ctypes.addressof(args),
                CLONE_ARGS_SIZE,
                elf,
                ctypes.addressof(argv),
                ctypes.addressof(envp),
                ctypes.addressof(empty),
                *keep,
            )
            # a pid stays taken for as long as a zombie bears it, or is in its group or session
            if result != -errno.EEXIST or time.monotonic() > deadline:
                break
            time.sleep(0.005)
        del anchor
    finally:
        os.close(elf)
    if result < 0:
        raise spawn_error(-result, set_tid)
    return int(result), pidfd.value


def spawn_error(error: int, set_tid: list[int]) -> RestartFailed:
    if error == errno.EEXIST:
        return RestartFailed(
            f"pid {set_tid[0]} is taken on this host",
            hint="end that process, or run the workload in a container (`migrator run`), which has its own pids",
        )
    return RestartFailed(f"clone3(2) with pid {set_tid}: {os.strerror(error)}", hint="root is needed")


def probe_xstate() -> bytes:
    """The extended state of a fresh task: shows which features and how many bytes this processor has."""
    pid, pidfd = spawn([])
    try:
        ptrace.seize(pid, ptrace.O_EXITKILL | ptrace.O_TRACESYSGOOD)
        ptrace.interrupt(pid)
        ptrace.wait(pid)
        return arch.get_xstate(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pidfd)
