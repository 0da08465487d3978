"""Seizing and stopping tasks one by one (ptrace(2)). `ProcessTree` does it for a whole tree.

All calls for a task come from the thread that seized it.
"""

from __future__ import annotations

import os
import signal
import time

from migrator.engine.user.dump.process import Process, Thread
from migrator.errors import CheckpointFailed
from migrator.linux import procfs, ptrace
from migrator.linux import x86_64 as arch

PATIENCE = 3.0  # seconds that a task may take to stop


# A filter of system calls would end the task for a call of ours (seccomp(2)). It takes CAP_SYS_ADMIN.
_OPTIONS = ptrace.O_TRACESYSGOOD | ptrace.O_SUSPEND_SECCOMP


def seize(pid: int, tid: int) -> bool:
    """Attach to a task; False for one that has ended and waits for its parent."""
    try:
        ptrace.seize(tid, _OPTIONS)
        return True
    except PermissionError as error:
        if procfs.stat(pid, tid)[3] in "ZX":
            return False
        raise CheckpointFailed(
            f"pid {pid} cannot be traced (tid {tid})",
            hint="a debugger may be attached (`grep TracerPid /proc/PID/status` tells), or we lack CAP_SYS_ADMIN",
        ) from error


def stuck(pid: int, tid: int) -> CheckpointFailed:
    """What to raise for a task that does not stop."""
    return CheckpointFailed(
        f"pid {pid} (tid {tid}) does not stop within {PATIENCE:g} s",
        hint="it may be in an uninterruptible sleep (state D), as on a dead network file system: try again",
    )


def stop_one(tid: int) -> None:
    """Seize and stop a single task for a moment; undone by ptrace.detach.

    Raises ProcessLookupError if it has ended, TimeoutError if it does not stop."""
    ptrace.seize(tid, _OPTIONS)
    bring_to_stop(tid)


def bring_to_stop(tid: int) -> None:
    """Stop a seized task, if it is not stopped already. Errors as stop_one()."""
    interrupt(tid)
    deadline = time.monotonic() + PATIENCE
    while True:
        status = _next_status(tid)
        if status is None and procfs.stat(tid)[3] == "t" and _is_stopped(tid):
            status = _next_status(tid)  # it may have stopped only now, and for a signal
            if status is None:
                return
        if status is None:
            if time.monotonic() > deadline:
                raise TimeoutError(110, "does not stop", f"tid {tid}")
            time.sleep(0.00005)
        elif not ptrace.is_stop(status):
            raise ProcessLookupError(3, "ended before it could be stopped", f"tid {tid}")
        elif ptrace.stop_event(status) == ptrace.EVENT_STOP:
            return
        else:
            ptrace.cont(tid, ptrace.stop_signal(status))


def _is_stopped(tid: int) -> bool:
    try:
        arch.get_regs(tid)
    except OSError:
        return False
    return True


def _next_status(tid: int) -> int | None:
    """The next wait status of a tracee, None if there is none yet; ProcessLookupError."""
    try:
        got, status = os.waitpid(tid, ptrace.WALL | os.WNOHANG)
    except ChildProcessError:
        raise ProcessLookupError(3, "is gone", f"tid {tid}") from None
    return status if got else None


def interrupt(tid: int) -> None:
    try:
        ptrace.interrupt(tid)
    except OSError:
        pass  # it has ended, which waiting for it tells


def go_on(tid: int, signum: int = 0) -> None:
    try:
        ptrace.cont(tid, signum)
    except OSError:
        pass


def poll(tasks: dict[int, tuple[Process, Thread]], halted: dict[int, tuple[Process, Thread]] | None) -> bool:
    """Take what has happened to `tasks`: the ended leave, the stopped move to `halted`; without `halted`
    they go on at once. Whether anything happened."""
    moved = False
    for tid, (process, thread) in list(tasks.items()):
        try:
            status = _next_status(tid)
        except ProcessLookupError:
            status = 0
        if status is None:
            continue
        moved = True
        if not ptrace.is_stop(status):  # it ended before the stop reached it
            process.threads.pop(tid, None)
            del tasks[tid]
            continue
        signum = ptrace.stop_signal(status)
        if ptrace.stop_event(status) != ptrace.EVENT_STOP:
            go_on(tid, signum)  # a signal was about to be delivered: let it, then stop
        elif halted is None:
            go_on(tid)
        else:
            thread.stop_signal = 0 if signum == signal.SIGTRAP else signum
            halted[tid] = tasks.pop(tid)
    return moved


def in_d_state(pid: int, tid: int) -> bool:
    try:
        return procfs.stat(pid, tid)[3] == "D"
    except OSError:
        return False
