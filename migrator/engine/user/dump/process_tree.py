"""The process tree on the source: listing, stopping, and letting go again.

Tasks are seized only for the freeze: a seized task stops at every signal until its tracer answers, which
a program that runs under pre-copy must not feel.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from migrator.engine.user.dump.interrupted import out_of_critical_section, without_spurious_eintr
from migrator.engine.user.dump.process import Process, Thread, vtid_of
from migrator.engine.user.dump.tracing import PATIENCE, bring_to_stop, go_on, in_d_state, interrupt, poll, seize, stuck
from migrator.errors import CheckpointFailed
from migrator.linux import procfs, ptrace
from migrator.linux import x86_64 as arch
from migrator.linux.threads import detach_all, get_all

LEADERLESS = "such a process is not carried yet"
_STUCK = 0.002  # seconds after which the others run again for one that may wait for them


def dispatches_syscalls(pid: int, tid: int) -> CheckpointFailed:
    """A call of ours would become a signal of the program's."""
    return CheckpointFailed(
        f"pid {pid}: its thread {tid} has system calls turned into signals (PR_SET_SYSCALL_USER_DISPATCH), "
        "which is not carried",
        hint="the workload runs on; a program that emulates another system does that, such as wine",
    )


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
                if not seize(process.pid, tid):
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
        deadline = time.monotonic() + PATIENCE
        while waiting:
            for tid in waiting:
                interrupt(tid)
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
            stopped_by = process.leader.stop_signal if process.pid in process.threads else 0
            if stopped_by not in (0, signal.SIGSTOP):
                raise CheckpointFailed(
                    f"pid {process.pid} was stopped by signal {stopped_by} meanwhile, which is not carried",
                    hint="let it go on (SIGCONT) and try again",
                )
            if process.pid not in process.threads:
                raise CheckpointFailed(
                    f"the main thread of pid {process.pid} has ended while others run", hint=LEADERLESS
                )
        self._read_threads()
        self._forget_reaped()
        self.check_root()

    def _read_threads(self) -> None:
        refused = None
        stopped = [(process.pid, thread) for process in self.living for thread in process.threads.values()]
        for (pid, thread), state in zip(stopped, get_all([thread.tid for _, thread in stopped]), strict=True):
            thread.regs, thread.xstate, thread.mask, thread.rseq, dispatches = state
            if dispatches:
                refused = dispatches_syscalls(pid, thread.tid)
            thread.adjusted = without_spurious_eintr(thread.regs)
            thread.adjusted |= out_of_critical_section(pid, thread.rseq.pointer, thread.regs)
        if refused is not None:
            raise refused

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
            moved = poll(waiting, halted)
            if loose:
                poll(loose, None)
            if not waiting:
                waiting.update(loose)
                loose.clear()
                for tid in waiting:
                    interrupt(tid)
                stuck_at = time.monotonic() + _STUCK
                continue
            if moved:
                continue
            now = time.monotonic()
            if now > deadline:
                tid = next(iter(waiting))
                raise stuck(waiting[tid][0].pid, tid)
            if not loose and now > stuck_at and halted and any(in_d_state(p.pid, t) for t, (p, _) in waiting.items()):
                for tid in halted:
                    go_on(tid)
                loose.update(halted)
                halted.clear()
            time.sleep(0.00005)

    def detach(self) -> None:
        """Let every task go on exactly where it was."""
        threads = [thread for process in self.living for thread in process.threads.values()]
        for thread in threads:
            try:
                if thread.regs is None:  # seized, and not stopped for good
                    bring_to_stop(thread.tid)
                    ptrace.detach(thread.tid)  # at once: it runs
                elif thread.adjusted:
                    arch.set_regs(thread.tid, thread.regs)
            except OSError:
                pass  # it was killed meanwhile: nothing to let go
        detach_all([thread.tid for thread in threads if thread.regs is not None])  # or was killed
        for process in self.living:
            process.threads.clear()
        self.stopped = False

    def close(self) -> None:
        for process in self.processes.values():
            process.close()
        self.processes.clear()


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


def _let_go_of_ended(process: Process) -> None:
    """Take the end of seized tasks: until their tracer has, their parent cannot."""
    for tid in process.threads:
        try:
            os.waitpid(tid, ptrace.WALL | os.WNOHANG)
        except ChildProcessError:
            pass
    process.threads.clear()
