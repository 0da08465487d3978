"""The process tree on the source: listing, stopping, and letting go again.

Tasks are seized only for the freeze: a seized task stops at every signal until its tracer answers, which
a program that runs under pre-copy must not feel.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from migrator.engine.user.dump.parasite import Parasite
from migrator.errors import CheckpointFailed
from migrator.linux import memory, procfs, ptrace
from migrator.linux import x86_64 as arch
from migrator.linux.pagemap import Scanner, WriteProtection
from migrator.linux.remote import Remote

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
LEADERLESS = "such a process is not carried yet"
_PATIENCE = 3.0  # seconds that a task may take to stop
_STUCK = 0.002  # seconds after which the others run again for one that may wait for them


@dataclass(slots=True)
class Thread:
    """One task. Registers and mask are there while it is stopped."""

    tid: int
    vtid: int
    regs: arch.Regs | None = None
    xstate: bytes = b""
    mask: int = 0
    stop_signal: int = 0  # in a group stop by this signal
    rseq: ptrace.RseqConfiguration | None = None
    adjusted: bool = False  # `regs` are not what the task has, and are to be set when it goes on


@dataclass(slots=True)
class Process:
    """One process of the tree, by its pid in our namespace; `vpid` is its own view."""

    pid: int
    vpid: int
    pidfd: int
    start_time: int
    threads: dict[int, Thread] = field(default_factory=dict)
    zombie: bool = False
    exit_code: int = 0
    remote: Remote | None = None
    parasite: Parasite | None = None
    predumped: set[int] = field(default_factory=set)  # tids whose state was pre-dumped
    protection: WriteProtection | None = None
    scanner: Scanner | None = None
    mem: memory.MemFile | None = None
    mm_objref: int = 0
    executed: int = 0  # how often it was seen to have become another program
    maps: str = ""  # as read last
    vmas: list[procfs.Vma] = field(default_factory=list)

    @property
    def leader(self) -> Thread:
        return self.threads[self.pid]

    def close(self) -> None:
        for thing in (self.protection, self.scanner, self.mem):
            if thing is not None:
                thing.close()
        self.protection = self.scanner = self.mem = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class ProcessTree:
    """The processes below (and with) `root`, or all those that `list_pids` names.

    Order: parents before children."""

    def __init__(self, root: int, list_pids: Callable[[], list[int]]) -> None:
        self.root = root
        self._list_pids = list_pids
        self.processes: dict[int, Process] = {}
        self.stopped = False

    def refresh(self) -> tuple[list[Process], list[Process]]:
        """List again. Returns (born, gone); the gone ones are closed."""
        pids = self._list_pids()
        born, gone = [], []
        for pid in pids:
            known = self.processes.get(pid)
            if known is not None:
                try:
                    now = procfs.stat(pid)
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if int(now[22]) == known.start_time:
                    if _is_zombie(now):
                        self._to_zombie(known, int(now[52]))
                    continue
            if known is not None:  # the pid was given out again
                gone.append(self.processes.pop(pid))
            process = _open(pid)
            if process is not None:
                self.processes[pid] = process
                born.append(process)
        for pid in set(self.processes) - set(pids):
            gone.append(self.processes.pop(pid))
        for process in gone:
            _let_go_of_ended(process)
            process.close()
        return born, gone

    @staticmethod
    def _to_zombie(process: Process, exit_code: int) -> None:
        process.zombie = True
        process.exit_code = exit_code
        _let_go_of_ended(process)

    @property
    def living(self) -> list[Process]:
        return [p for p in self.processes.values() if not p.zombie]

    def seize(self) -> None:
        """Attach to every task without stopping any; those born meanwhile are found by stop()."""
        self.refresh()
        for process in self.living:
            self._seize_threads(process)

    def _seize_threads(self, process: Process) -> list[Thread]:
        new = []
        try:
            tids = procfs.tids(process.pid)
        except (FileNotFoundError, ProcessLookupError):
            return []
        for tid in tids:
            if tid in process.threads:
                continue
            try:
                if not _seize(process.pid, tid):
                    continue
            except (FileNotFoundError, ProcessLookupError):
                continue
            try:
                vtid = vtid_of(process, tid)
            except (FileNotFoundError, ProcessLookupError):
                vtid = tid  # it has ended, which waiting for it will tell
            thread = Thread(tid, vtid)
            process.threads[tid] = thread
            new.append(thread)
        return new

    def stop(self) -> None:
        """Stop every task. Stopped ones cannot fork, so a pass that finds nobody new has them all.

        Raises CheckpointFailed for a task that does not stop: in an uninterruptible sleep, as on a dead
        network file system."""
        self.stopped = True
        waiting = {t.tid: (p, t) for p in self.living for t in p.threads.values()}
        halted: dict[int, tuple[Process, Thread]] = {}
        deadline = time.monotonic() + _PATIENCE
        while waiting:
            for tid in waiting:
                _interrupt(tid)
            self._halt(waiting, halted, deadline)
            if any(pid not in self.processes for pid in self._list_pids()):
                self.refresh()
            waiting = {t.tid: (p, t) for p in self.living for t in self._seize_threads(p)}
        for process in list(self.living):
            if not process.threads:
                try:
                    self._to_zombie(process, int(procfs.stat(process.pid)[52]))
                except OSError:  # reaped already
                    self.processes.pop(process.pid).close()
                continue
            if process.pid not in process.threads:
                raise CheckpointFailed(
                    f"the main thread of pid {process.pid} has ended while others run", hint=LEADERLESS
                )
            for thread in process.threads.values():
                thread.rseq = ptrace.rseq_configuration(thread.tid)
                regs = arch.get_regs(thread.tid)
                thread.adjusted = without_spurious_eintr(regs)
                thread.adjusted |= out_of_critical_section(process.pid, thread.rseq.pointer, regs)
                thread.regs = regs
                thread.xstate = arch.get_xstate(thread.tid)
                thread.mask = ptrace.get_sigmask(thread.tid)
        self._forget_reaped()
        self.check_root()

    def _forget_reaped(self) -> None:
        """Of the zombies only those stay whose parent is here, and stopped: nobody reaps them any more."""
        for process in [p for p in self.processes.values() if p.zombie and p.pid != self.root]:
            try:
                kept = int(procfs.stat(process.pid)[4]) in self.processes
            except (FileNotFoundError, ProcessLookupError):
                kept = False
            if not kept:
                self.processes.pop(process.pid).close()

    def check_root(self) -> None:
        """Raises CheckpointFailed if the root task has ended."""
        root = self.processes.get(self.root)
        if root is None or root.zombie:
            raise CheckpointFailed(f"pid {self.root} has ended", hint="there is nothing left to save")

    def _halt(
        self,
        waiting: dict[int, tuple[Process, Thread]],
        halted: dict[int, tuple[Process, Thread]],
        deadline: float,
    ) -> None:
        """Wait until all of `waiting` have stopped and move them to `halted`.

        A task in vfork(2) stops only when its child has gone on: if one keeps us waiting in such a sleep,
        all others run again until it comes, and are stopped anew."""
        loose: dict[int, tuple[Process, Thread]] = {}
        stuck_at = time.monotonic() + _STUCK
        while waiting or loose:
            moved = _poll(waiting, halted)
            if loose:
                _poll(loose, None)
            if not waiting:
                waiting.update(loose)
                loose.clear()
                for tid in waiting:
                    _interrupt(tid)
                stuck_at = time.monotonic() + _STUCK
                continue
            if moved:
                continue
            now = time.monotonic()
            if now > deadline:
                tid = next(iter(waiting))
                raise CheckpointFailed(
                    f"pid {waiting[tid][0].pid} (tid {tid}) does not stop within {_PATIENCE:g} s",
                    hint="it may be in an uninterruptible sleep (state D), as on a dead network file system",
                )
            if not loose and now > stuck_at and halted and any(_in_d_state(p.pid, t) for t, (p, _) in waiting.items()):
                for tid in halted:
                    _go_on(tid)
                loose.update(halted)
                halted.clear()
            time.sleep(0.00005)

    def detach(self) -> None:
        """Let every task go on exactly where it was."""
        for process in self.living:
            for thread in list(process.threads.values()):
                try:
                    if thread.regs is None:  # seized, and not stopped for good
                        bring_to_stop(thread.tid)
                    elif thread.adjusted:
                        arch.set_regs(thread.tid, thread.regs)
                    ptrace.detach(thread.tid)
                except OSError:
                    pass  # it was killed meanwhile: nothing to let go
                thread.regs = None
            process.threads.clear()
        self.stopped = False

    def close(self) -> None:
        for process in self.processes.values():
            process.close()
        self.processes.clear()


def vtid_of(process: Process, tid: int) -> int:
    """The id of a task as the tree itself sees it."""
    if process.vpid == process.pid:
        return tid
    return process.vpid if tid == process.pid else procfs.ns_pid(procfs.status(process.pid, tid))


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


def _is_zombie(fields: list[str]) -> bool:
    return fields[3] == "Z" and int(fields[20]) <= 1  # else its other threads live on


def _open(pid: int) -> Process | None:
    try:
        state = procfs.status(pid)
        pidfd = os.pidfd_open(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        fields = procfs.stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        os.close(pidfd)
        return None
    process = Process(pid, procfs.ns_pid(state), pidfd, int(fields[22]))
    if _is_zombie(fields):
        ProcessTree._to_zombie(process, int(fields[52]))
    return process


def _seize(pid: int, tid: int) -> bool:
    """Attach to a task; False for one that has ended and waits for its parent."""
    options = ptrace.O_TRACESYSGOOD
    try:
        ptrace.seize(tid, options | ptrace.O_SUSPEND_SECCOMP)
        return True
    except PermissionError:
        pass  # not for this option, perhaps
    try:
        ptrace.seize(tid, options)
        return True
    except PermissionError as error:
        if procfs.stat(pid, tid)[3] in "ZX":
            return False
        raise CheckpointFailed(
            f"pid {pid} cannot be traced (tid {tid})",
            hint="a debugger may be attached; `grep TracerPid /proc/PID/status` tells",
        ) from error


def _let_go_of_ended(process: Process) -> None:
    """Take the end of seized tasks: until their tracer has, their parent cannot."""
    for tid in process.threads:
        try:
            os.waitpid(tid, ptrace.WALL | os.WNOHANG)
        except ChildProcessError:
            pass
    process.threads.clear()


def stop_one(tid: int) -> None:
    """Seize and stop a single task for a moment; undone by ptrace.detach.

    Raises ProcessLookupError if it has ended, TimeoutError if it does not stop."""
    ptrace.seize(tid, ptrace.O_TRACESYSGOOD)
    bring_to_stop(tid)


def bring_to_stop(tid: int) -> None:
    """Stop a seized task, if it is not stopped already. Errors as stop_one()."""
    _interrupt(tid)
    deadline = time.monotonic() + _PATIENCE
    while True:
        status = _next_status(tid)
        if status is None:
            if procfs.stat(tid)[3] == "t" and _is_stopped(tid):
                return
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


def _interrupt(tid: int) -> None:
    try:
        ptrace.interrupt(tid)
    except OSError:
        pass  # it has ended, which waiting for it tells


def _go_on(tid: int, signum: int = 0) -> None:
    try:
        ptrace.cont(tid, signum)
    except OSError:
        pass


def _poll(tasks: dict[int, tuple[Process, Thread]], halted: dict[int, tuple[Process, Thread]] | None) -> bool:
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
            _go_on(tid, signum)  # a signal was about to be delivered: let it, then stop
        elif halted is None:
            _go_on(tid)
        else:
            thread.stop_signal = 0 if signum == signal.SIGTRAP else signum
            halted[tid] = tasks.pop(tid)
    return moved


def _in_d_state(pid: int, tid: int) -> bool:
    try:
        return procfs.stat(pid, tid)[3] == "D"
    except OSError:
        return False
