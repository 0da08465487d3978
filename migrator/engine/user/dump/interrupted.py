"""What a stop does to a task's registers, and how it is undone: nothing of it may be seen when the task goes on."""

from __future__ import annotations

import struct

from migrator.linux import memory
from migrator.linux import x86_64 as arch

# what answers a mere stop with EINTR (signal(7)); of those on sockets, where a time limit is set on them
_EINTR_CALLS = {
    arch.NR[name]
    for name in (
        *("epoll_wait", "epoll_pwait", "epoll_pwait2", "rt_sigtimedwait", "semop", "semtimedop"),
        *("io_getevents", "io_pgetevents", "read", "readv", "write", "writev", "accept", "accept4"),
        *("sendto", "sendmsg", "recvfrom", "recvmsg", "recvmmsg"),
    )
}
_ERESTARTNOHAND = (1 << 64) - 514
_EINTR = (1 << 64) - 4


def without_spurious_eintr(regs: arch.Regs) -> bool:
    """epoll_wait(2) and others answer a mere stop with EINTR; make that one that is made again.

    If a signal with a handler waits as well, the kernel makes it EINTR again: then it was meant."""
    if regs.rax == _EINTR and regs.orig_rax in _EINTR_CALLS:
        regs.rax = _ERESTARTNOHAND
        return True
    return False


def out_of_critical_section(pid: int, rseq: int, regs: arch.Regs) -> bool:
    """Abort a restartable sequence (rseq(2)) that the stop fell into, as the kernel would do later.

    Later is too late: with other code to run in between, the kernel forgets the sequence."""
    if not rseq:
        return False
    try:
        (descriptor,) = struct.unpack("<Q", memory.read(pid, rseq + 8, 8))
        if descriptor:
            start, length, abort = struct.unpack("<8xQQQ", memory.read(pid, descriptor, 32))
            if start <= regs.rip < start + length:
                regs.rip = abort
                return True
    except OSError:
        pass  # its memory is gone: the kernel would kill it for that, not we
    return False
