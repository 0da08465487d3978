"""The process tree on the source: listing, stopping, and letting go again.

Tasks are seized only for the freeze: a seized task stops at every signal until its tracer answers, which
a program that runs under pre-copy must not feel.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from migrator.errors import CheckpointFailed
from migrator.linux import memory, procfs, ptrace
from migrator.linux import x86_64 as arch
from migrator.linux.pagemap import Scanner, WriteProtection
from migrator.linux.remote import Remote

_EPOLL_CALLS = {arch.NR["epoll_wait"], arch.NR["epoll_pwait"], arch.NR["epoll_pwait2"]}
_ERESTARTNOHAND = (1 << 64) - 514
_EINTR = (1 << 64) - 4


@dataclass(slots=True)
class Thread:
    """One task. Registers and mask are there while it is stopped."""

    tid: int
    vtid: int
    regs: arch.Regs | None = None
    xstate: bytes = b""
    mask: int = 0
    stop_signal: int = 0  # in a group stop by this signal


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
    protection: WriteProtection | None = None
    scanner: Scanner | None = None
    mem: memory.MemFile | None = None
    mm_objref: int = 0

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
                    if now[3] == "Z":
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
            process.close()
        return born, gone

    @staticmethod
    def _to_zombie(process: Process, exit_code: int) -> None:
        process.zombie = True
        process.exit_code = exit_code
        process.threads.clear()

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
                ptrace.seize(tid, ptrace.O_SUSPEND_SECCOMP)
            except ProcessLookupError:
                continue
            except PermissionError:
                try:
                    ptrace.seize(tid)
                except ProcessLookupError:
                    continue
                except PermissionError as error:
                    if procfs.stat(process.pid, tid)[3] == "Z":
                        continue
                    raise CheckpointFailed(
                        f"pid {process.pid} cannot be traced (tid {tid})",
                        hint="a debugger may be attached; `grep TracerPid /proc/PID/status` tells",
                    ) from error
            vtid = tid if process.vpid == process.pid else procfs.ns_pid(procfs.status(process.pid, tid))
            thread = Thread(tid, vtid)
            process.threads[tid] = thread
            new.append(thread)
        return new

    def stop(self) -> None:
        """Stop every task. Stopped ones cannot fork, so a pass that finds nobody new has them all."""
        pending = [(p, t) for p in self.living for t in p.threads.values()]
        self.stopped = True
        while True:
            for _, thread in pending:
                try:
                    ptrace.interrupt(thread.tid)
                except (ProcessLookupError, OSError):
                    continue
            for process, thread in pending:
                self._await_stop(process, thread)
            self.refresh()
            pending = []
            for process in self.living:
                for thread in self._seize_threads(process):
                    pending.append((process, thread))
            if not pending:
                break
        for process in list(self.living):
            if not process.threads:
                self._to_zombie(process, int(procfs.stat(process.pid)[52]))
                continue
            for thread in process.threads.values():
                regs = _without_spurious_eintr(arch.get_regs(thread.tid))
                thread.regs = _out_of_critical_section(process.pid, thread.tid, regs)
                thread.xstate = arch.get_xstate(thread.tid)
                thread.mask = ptrace.get_sigmask(thread.tid)

    @staticmethod
    def _await_stop(process: Process, thread: Thread) -> None:
        while True:
            try:
                status = ptrace.wait(thread.tid)
            except ChildProcessError:
                process.threads.pop(thread.tid, None)
                return
            if not ptrace.is_stop(status):  # it ended before the stop reached it
                process.threads.pop(thread.tid, None)
                return
            signal = ptrace.stop_signal(status)
            if ptrace.stop_event(status) == ptrace.EVENT_STOP:
                thread.stop_signal = 0 if signal == 5 else signal
                return
            ptrace.cont(thread.tid, signal)  # a signal was about to be delivered: let it, then stop

    def detach(self) -> None:
        """Let every task go on exactly where it was."""
        for process in self.living:
            for thread in list(process.threads.values()):
                try:
                    if thread.regs is None:  # seized, and not stopped yet
                        ptrace.interrupt(thread.tid)
                        self._await_stop(process, thread)
                    else:
                        arch.set_regs(thread.tid, thread.regs)
                        ptrace.set_sigmask(thread.tid, thread.mask)
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


def _without_spurious_eintr(regs: arch.Regs) -> arch.Regs:
    """epoll_wait(2) answers a mere stop with EINTR (signal(7)); make it one that is made again.

    Only where no signal was delivered: then the stop is what interrupted it."""
    if regs.rax == _EINTR and regs.orig_rax in _EPOLL_CALLS:
        regs.rax = _ERESTARTNOHAND
    return regs


def _out_of_critical_section(pid: int, tid: int, regs: arch.Regs) -> arch.Regs:
    """Abort a restartable sequence (rseq(2)) that the stop fell into, as the kernel would do later.

    Later is too late: with other code to run in between, the kernel forgets the sequence."""
    rseq = ptrace.rseq_configuration(tid)
    if not rseq.pointer:
        return regs
    try:
        (descriptor,) = struct.unpack("<Q", memory.read(pid, rseq.pointer + 8, 8))
        if descriptor:
            start, length, abort = struct.unpack("<8xQQQ", memory.read(pid, descriptor, 32))
            if start <= regs.rip < start + length:
                regs.rip = abort
    except OSError:
        pass  # its memory is gone: the kernel would kill it for that, not we
    return regs


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
    if fields[3] == "Z":
        ProcessTree._to_zombie(process, int(fields[52]))
    return process


def stop_one(tid: int) -> None:
    """Seize and stop a single task for a moment; undone by ptrace.detach."""
    ptrace.seize(tid, 0)
    ptrace.interrupt(tid)
    while True:
        status = ptrace.wait(tid)
        if not ptrace.is_stop(status):
            raise ProcessLookupError(3, "ended before it could be stopped", f"tid {tid}")
        if ptrace.stop_event(status) == ptrace.EVENT_STOP:
            return
        ptrace.cont(tid, ptrace.stop_signal(status))
