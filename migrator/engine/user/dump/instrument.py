"""What is put into a process that is to be moved: a scratch area, questions, and a tracker of its writes.

Each takes a stop of well under a millisecond; all of it is taken out again before the process goes on for
good.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from migrator.engine.spawn import SCRATCH_ADDRESS
from migrator.engine.user.descriptors import fdinfo
from migrator.engine.user.dump.dirty_tracker import WpAsyncTracker
from migrator.engine.user.dump.interrupted import out_of_critical_section, without_spurious_eintr
from migrator.engine.user.dump.parasite import PROBE, SCRATCH, SCRATCH_SPAN, Parasite, is_left_over
from migrator.engine.user.dump.process import Process, Thread, vtid_of
from migrator.engine.user.dump.process_tree import dispatches_syscalls
from migrator.engine.user.dump.restart_blocks import RestartBlocks
from migrator.engine.user.dump.tracing import stop_one
from migrator.errors import CheckpointFailed
from migrator.linux import memory, procfs, ptrace, sys, urgency
from migrator.linux import x86_64 as arch
from migrator.linux.pagemap import Scanner, WriteProtection
from migrator.linux.remote import Remote, RemoteError

_UFFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | 1  # UFFD_USER_MODE_ONLY
_PR_SET_VMA, _PR_SET_VMA_ANON_NAME, _MADV_DONTFORK = 0x53564D41, 0, 10
_SCRATCH_NAME = b"migrator\0"


class Instrument:
    """`restart_blocks` learns of every stop, so that none makes a wait longer than it was; `protections` are those of
    all processes of the tree."""

    def __init__(self, restart_blocks: RestartBlocks, protections: Callable[[], Iterable[WriteProtection]]) -> None:
        self._restart_blocks = restart_blocks
        self._protections = protections
        self._since = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))  # as start times are told

    @contextmanager
    def stopped(self, process: Process, tid: int) -> Iterator[Thread]:
        """A task that runs, stopped inside the block. Raises ProcessLookupError if it ends, TimeoutError.

        On a busy host our turn would come after tens of milliseconds, in which the task stands still."""
        pid = process.pid
        self._restart_blocks.observe(pid, tid)
        with urgency.raised():
            stop_one(tid)
            try:
                if ptrace.dispatches_syscalls(tid):
                    raise dispatches_syscalls(pid, tid)
                self._restart_blocks.confirm(pid, [tid])
                regs = arch.get_regs(tid)
                rseq = ptrace.rseq_configuration(tid)
                adjusted = out_of_critical_section(pid, rseq.pointer, regs)
                if without_spurious_eintr(regs):
                    self._restart_blocks.shorten(pid, tid, regs)
                    adjusted = True
                if adjusted:
                    arch.set_regs(tid, regs)
                mask = ptrace.get_sigmask(tid)
                yield Thread(tid, vtid_of(process, tid), regs, arch.get_xstate(tid), mask, rseq=rseq)
                self._restart_blocks.interrupted(pid, tid)
            finally:
                ptrace.detach(tid)

    def install(self, process: Process) -> WpAsyncTracker:
        """Begin to track the writes of a running process. Raises OSError if it ends meanwhile."""
        pid = process.pid
        remote = Remote(pid)
        remote.prepare()
        with self.stopped(process, pid) as leader:
            process.remote = remote
            remote.confirm()
            with remote.borrowed(regs=leader.regs, mask=leader.mask, xstate=leader.xstate):
                self._map_scratch(process, remote)
                try:
                    self._close_inherited(process, remote)
                    protection = process.protection = WriteProtection(_userfaultfd(process, remote))
                except BaseException:
                    remote.unmap_scratch()
                    raise
                _prepare(process, remote)
        process.maps = ""
        process.predumped.clear()
        scanner = process.scanner = Scanner(pid)
        process.mem = memory.MemFile(pid)
        hidden = (remote.scratch, remote.scratch + SCRATCH)
        return WpAsyncTracker(scanner, protection, lambda: procfs.maps(pid), hidden)

    def prepare_stopped(self, process: Process) -> None:
        """Give a process that was stopped before it could be instrumented its scratch area."""
        remote = process.remote = Remote(process.pid)
        remote.prepare()
        leader = process.leader
        with remote.borrowed(regs=leader.regs, mask=leader.mask, xstate=leader.xstate):
            self._map_scratch(process, remote)
            self._close_inherited(process, remote)
            _prepare(process, remote)

    @staticmethod
    def _map_scratch(process: Process, remote: Remote) -> None:
        """Where programs have nothing: a place that the kernel chooses is often one that was unmapped just now, and the
        program would find it taken (mincore(2), MAP_FIXED_NOREPLACE)."""
        if is_left_over(process.pid, *SCRATCH_SPAN):
            remote.call(arch.NR["munmap"], SCRATCH_ADDRESS, SCRATCH)
        for address in (SCRATCH_ADDRESS, 0):
            try:
                remote.map_scratch(SCRATCH, address, reserved=PROBE)
                break
            except RemoteError as error:
                if address and error.errno in (errno.EEXIST, errno.EPERM):  # it is taken, or below vm.mmap_min_addr
                    continue
                if error.errno == errno.EACCES:
                    raise CheckpointFailed(
                        f"pid {process.pid} denies itself memory that can be executed (PR_SET_MDWE)",
                        hint="start it without MemoryDenyWriteExecute=",
                    ) from error
                raise
        name = remote.put(_SCRATCH_NAME)
        remote.batch(
            [
                (arch.NR["madvise"], remote.scratch, SCRATCH, _MADV_DONTFORK),
                (arch.NR["prctl"], _PR_SET_VMA, _PR_SET_VMA_ANON_NAME, remote.scratch, SCRATCH, name),
            ]
        )

    def _close_inherited(self, process: Process, remote: Remote) -> None:
        """Take userfaultfds of ours out of a process that was born just when its parent had one."""
        pid, own = process.pid, os.getpid()
        if process.start_time < self._since:
            return
        for number in fdinfo.numbers(pid):
            if os.readlink(f"/proc/{pid}/fd/{number}") == "anon_inode:[userfaultfd]" and any(
                sys.kcmp(pid, own, sys.KCMP_FILE, number, protection.fd) == 0 for protection in self._protections()
            ):
                remote.call(arch.NR["close"], number)

    def remove_stopped(self, processes: Iterable[Process]) -> None:
        """Take the scratch areas out of stopped processes."""
        for process in processes:
            remote = process.remote
            if remote is None or not remote.scratch or not process.threads:
                continue
            try:
                with remote.borrowed(regs=process.leader.regs, mask=process.leader.mask):
                    remote.unmap_scratch()
            except OSError:
                pass  # it was killed meanwhile

    def remove_running(self, processes: Iterable[Process]) -> None:
        """Take the scratch areas that are left out of processes that run: each stops for a moment."""
        for process in processes:
            remote = process.remote
            if remote is None or not remote.scratch:
                continue
            try:
                with self.stopped(process, process.pid) as leader, remote.borrowed(regs=leader.regs, mask=leader.mask):
                    remote.unmap_scratch()
            except OSError:
                pass  # it ended by itself


def _prepare(process: Process, remote: Remote) -> None:
    process.parasite = Parasite(remote)
    process.parasite.prepare()


def _userfaultfd(process: Process, remote: Remote) -> int:
    """One of the stopped process, as a descriptor of ours.

    It makes, shows and closes its own in one go, and closes it without us if we die meanwhile. Other threads run: what
    they have put in its place is left alone."""
    pid = process.pid
    vpid = vtid_of(process, pid)
    result = remote.table + arch.BATCH_ENTRY - 8  # of the first call, and the argument of the last
    argument = remote.table + 3 * arch.BATCH_ENTRY + 8
    vectors = remote.put(struct.pack("<QQQQ", argument, 8, result, 8))
    calls = [
        (arch.NR["userfaultfd"], _UFFD_FLAGS),
        (arch.NR["process_vm_readv"], vpid, vectors, 1, vectors + 16, 1, 0),  # copies the result
        (arch.NR["tgkill"], vpid, vpid, remote.signal),  # stops for us; see Remote.finish()
        (arch.NR["close"], -1),
    ]
    remote.begin(calls)
    remote.finish()
    number, copied = remote.results(2)
    ours = -1
    try:
        if number >= 0:
            ours = sys.pidfd_getfd(process.pidfd, number)
            same = sys.kcmp(pid, os.getpid(), sys.KCMP_FILE, number, ours) == 0
            if not same or copied != 8:  # Linux without process_vm_readv(2)
                memory.write(pid, argument, struct.pack("<q", number if same else -1))
    finally:
        remote.go_on()
        remote.finish()
    if number < 0:
        raise CheckpointFailed(
            f"pid {pid}: userfaultfd(2) fails inside it: {os.strerror(-number)}",
            hint="the workload runs on; its descriptor limit may forbid it",
        )
    return ours
