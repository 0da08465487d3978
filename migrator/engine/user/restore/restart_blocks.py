"""Waits with a time limit, on the destination: begun anew for what is left of them, then interrupted.

Then the kernel here holds what it needs to go on with the wait (struct restart_block), and the registers
are those of the interruption again: nothing in the program's own registers or memory has to change.
"""

from __future__ import annotations

import struct

from migrator.engine.user.dump.restart_blocks import RESTART_BLOCK
from migrator.engine.user.restore.stub import Stub, StubThread
from migrator.errors import RestartFailed
from migrator.image.records import RestartBlock
from migrator.linux import memory, procfs, ptrace
from migrator.linux import x86_64 as arch

NR = arch.NR
_EPOLL = (NR["epoll_wait"], NR["epoll_pwait"])
_SLEEPS = (NR["nanosleep"], NR["clock_nanosleep"])
_ERESTARTNOHAND = -514 & arch.MINUS_ONE
_POLLFD = 8  # bytes of a struct pollfd


def resumed(stub: Stub, thread: StubThread, block: RestartBlock | None, regs: arch.Regs, passed: int = 0) -> arch.Regs:
    """The registers that a task goes on with whose registers in the image are `regs`.

    `passed`: ns that its clock has run on since it was stopped. As of a task that is frozen and thawed on one
    host, its wait ends when it would have ended.

    An interrupted call is left to the kernel, which makes it again or, if a signal with a handler waits,
    ends it with EINTR: as it would have been on the source."""
    number, code = arch.interrupted_call(regs)
    if number < 0:
        regs.orig_rax = arch.MINUS_ONE
        return regs
    if block is None or block.remaining < 0 or block.syscall != number:
        return _made_again(regs)
    remaining = max(0, block.remaining - passed)
    ms = -(-remaining // 1_000_000)
    if number in _EPOLL:  # keeps no restart block: it is made again, its limit is in a register
        regs.r10 = ms
        return _made_again(regs)
    if code != RESTART_BLOCK:
        return regs
    if not remaining and number in _SLEEPS:  # it is over
        regs.rax, regs.orig_rax = 0, arch.MINUS_ONE
        return regs
    if (number != NR["poll"] or ms) and _begin_anew(stub, thread, number, remaining, regs):
        return regs
    if number == NR["poll"]:  # something is ready, or seems so while sockets are not complete yet
        regs.rdx = ms
    return _made_again(regs)


def _made_again(regs: arch.Regs) -> arch.Regs:
    if arch.interrupted_call(regs)[1] == RESTART_BLOCK:  # of which this kernel knows nothing
        regs.rax = _ERESTARTNOHAND
    return regs


def _begin_anew(stub: Stub, thread: StubThread, number: int, remaining: int, regs: arch.Regs) -> bool:
    """Make the call for `remaining` ns and interrupt it. True if `regs` are those to go on with."""
    at = stub.put(struct.pack("<qq", *divmod(max(remaining, 1), 10**9)) + arch.CALL_CODE)
    call = regs.copy()
    call.rip, call.rax, call.orig_rax = at + 16, number, arch.MINUS_ONE
    if number == NR["nanosleep"]:
        call.rdi = at
    elif number == NR["clock_nanosleep"]:
        call.rdx = at
    elif number == NR["poll"]:
        call.rdx = -(-remaining // 1_000_000)
    elif number == NR["futex"]:
        call.r10 = at
    else:
        return False
    polled = _polled(thread, regs) if number == NR["poll"] else b""
    ptrace.set_sigmask(thread.tid, arch.MINUS_ONE)
    arch.set_regs(thread.tid, call)
    # Stopped at the entry, then asked to stop again: the call finds that waiting for it before it sleeps.
    ptrace.until_syscall(thread.tid)
    _await(thread, ptrace.SYSCALL_STOP)
    ptrace.interrupt(thread.tid)
    ptrace.cont(thread.tid)
    _await(thread, 0)
    if polled and _polled(thread, regs) != polled:  # it told what is ready: the call that is made again does so
        memory.write(thread.tid, regs.rdi, polled)
    now = arch.get_regs(thread.tid)
    if arch.interrupted_call(now)[1] == RESTART_BLOCK:
        regs.rax, regs.orig_rax = now.rax, now.orig_rax
        return True
    if number in _SLEEPS and arch.result(now) == 0:
        regs.rax, regs.orig_rax = 0, arch.MINUS_ONE  # the little that was left is over
        return True
    return False


def _polled(thread: StubThread, regs: arch.Regs) -> bytes:
    """The array of a poll(2), which the kernel writes to at each return; nothing if it would refuse the array."""
    count = regs.rsi & 0xFFFFFFFF
    try:
        if count > procfs.open_files_limits(thread.tid)[0]:
            return b""
        return memory.read(thread.tid, regs.rdi, count * _POLLFD)
    except OSError:
        return b""


def _await(thread: StubThread, signal: int) -> None:
    """Wait for a stop by `signal`, 0 for that of an interruption."""
    while True:
        status = ptrace.wait(thread.tid)
        if not ptrace.is_stop(status):
            raise RestartFailed(f"tid {thread.vtid} ended while its wait was begun anew")
        if ptrace.stop_event(status) == ptrace.EVENT_STOP:
            if not signal:
                return
            ptrace.until_syscall(thread.tid)  # a late interruption of before
        elif ptrace.stop_signal(status) == signal:
            return
        else:
            raise RestartFailed(f"tid {thread.vtid} stopped with {status:#x} while its wait was begun anew")
