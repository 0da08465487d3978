"""Tasks as records: credentials, signals, timers, limits, registers.

What can only be found out from inside comes from migrator.engine.user.dump.parasite. Everything but registers,
restart blocks and pending signals is pre-dumped while the tasks run. At the end only what has changed is written
again.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from signal import SIGCHLD

from migrator.engine.stream import RecordWriter
from migrator.engine.user.dump.mappings import SINCE, Objrefs
from migrator.engine.user.dump.parasite import ProcessReply, ThreadReply
from migrator.engine.user.dump.process import Process, Thread
from migrator.engine.user.dump.restart_blocks import RestartBlocks
from migrator.engine.user.dump.survey_tasks import SCHED_DEADLINE, UNDER_DEADLINE
from migrator.engine.user.dump.thread_state import Credentials, ThreadState, credentials, no_new_privs
from migrator.errors import CheckpointFailed
from migrator.image.codec import Record
from migrator.image.records import (
    Arch,
    Cpu,
    Cred,
    Fs,
    Gid,
    Itimer,
    PosixTimer,
    Rlimit,
    Sighand,
    Signal,
    SigPending,
    Task,
    TaskBits,
    TaskState,
)
from migrator.linux import procfs, ptrace, sys

_TIMER = re.compile(r"ID: (\d+)\nsignal: (\d+)/([0-9a-fA-Fx]+)\nnotify: (\w+)/(\w+)\.(-?\d+)\nClockID: (-?\d+)")
_NOTIFY = {"signal": 0, "none": 1, "thread": 2}

MEMBARRIER = {  # by the command that registers
    1 << 2: TaskBits.MEMBARRIER_GLOBAL,
    1 << 4: TaskBits.MEMBARRIER_PRIVATE,
    1 << 6: TaskBits.MEMBARRIER_SYNC_CORE,
    1 << 8: TaskBits.MEMBARRIER_RSEQ,
}

_HUGE_PAGES = {  # of PR_GET_THP_DISABLE
    1: TaskBits.THP_DISABLED,
    3: TaskBits.THP_DISABLED | TaskBits.THP_EXCEPT_ADVISED,
}
MCE_POLICIES = {1: TaskBits.MCE_EARLY, 0: TaskBits.MCE_LATE}  # of PR_MCE_KILL


@dataclass(slots=True)
class Shared:
    """What all tasks of a process have in common, as their records name it."""

    files: int
    fs: int
    sighand: int
    signal: int
    bits: int


class TaskDump:
    """Writes everything of the tasks but memory and descriptors."""

    def __init__(self, writer: RecordWriter, objrefs: Objrefs, restart_blocks: RestartBlocks) -> None:
        self._writer = writer
        self._restart_blocks = restart_blocks
        self._objrefs = objrefs
        self._static = ThreadState()
        self._sent: dict[object, bytes] = {}  # records as they stand in the stream
        self._last: dict[int, tuple[object, ...]] = {}  # the last reply of each process

    def look(self, processes: Iterable[Process]) -> None:
        """Read what seldom changes, just before they are stopped or once they are; nothing of one that vanishes."""
        self._static.look([(process.pid, tid) for process in processes for tid in process.threads])

    def keep(self, vpids: Container[int]) -> None:
        """A new hierarchy was written: its reader forgets the pre-dumped state of tasks that are not in it."""
        for key in [k for k in self._sent if isinstance(k, int) and k not in vpids]:
            del self._sent[key]

    def predump(
        self,
        process: Process,
        state: dict[str, str],
        reply: ProcessReply,
        threads: Sequence[tuple[Thread, ThreadReply]],
        files_objref: int,
    ) -> None:
        """Write what is known of tasks that run on: `threads` with the reply of each."""
        shared = self._shared(process, state, reply, [], files_objref)
        for thread, thread_reply in threads:
            self._task(process, state, thread, thread_reply, shared)

    def write(
        self,
        process: Process,
        state: dict[str, str],
        reply: ProcessReply,
        timers: list[PosixTimer],
        threads: Sequence[ThreadReply],
        files_objref: int,
    ) -> None:
        """Write a stopped process with all its threads; `threads` in the order of Process.threads."""
        shared = self._shared(process, state, reply, timers, files_objref)
        for thread, thread_reply in zip(process.threads.values(), threads, strict=True):
            self._task(process, state, thread, thread_reply, shared)
            self._stopped(process, thread)
        pending = ptrace.peek_siginfo(process.pid, shared=True)
        if pending:
            self._writer.write(SigPending(process.vpid, 1, pending))

    def write_zombie(self, process: Process) -> None:
        fields = procfs.stat(process.pid)
        self._writer.write(_blank_task(process.vpid, TaskState.ZOMBIE, process.exit_code, int(fields[38]), fields[2]))

    # ------------------------------------------------------------------ the records

    def _put(self, key: object, rec: Record) -> None:
        raw = rec.encode()
        if self._sent.get(key) != raw:
            self._sent[key] = raw
            self._writer.encoded(raw)

    def _shared(
        self,
        process: Process,
        state: dict[str, str],
        reply: ProcessReply,
        timers: list[PosixTimer],
        files_objref: int,
    ) -> Shared:
        sighand, _ = self._objrefs.get(("sighand", process.pid))
        signal, _ = self._objrefs.get(("signal", process.pid))
        latest = (reply.actions, reply.limits, reply.itimers, timers)
        if self._last.get(process.pid) != latest:  # else the records are what they were
            self._last[process.pid] = latest
            self._put(("sighand", sighand), Sighand(sighand, 0, reply.actions))
            limits = [Rlimit(*pair) for pair in struct.iter_unpack("<QQ", reply.limits)]
            itimers = [Itimer(value, interval) for value, interval in reply.itimers]
            self._put(("signal", signal), Signal(signal, 0, limits, itimers, timers))
        bits = (
            (TaskBits.CHILD_SUBREAPER if reply.subreaper else 0)
            | _HUGE_PAGES.get(reply.thp_disabled, 0)
            | (TaskBits.NOT_DUMPABLE if reply.dumpable != 1 else 0)
            | (TaskBits.MERGE_ALL if reply.merge_all else 0)
            | (TaskBits.LOCK_FUTURE if reply.lock_future else 0)
            | (TaskBits.LOCK_ONFAULT if reply.lock_onfault else 0)
            | sum(bit for command, bit in MEMBARRIER.items() if reply.membarrier & command)
        )
        return Shared(files_objref, self._fs(process, state), sighand, signal, int(bits))

    def _cred(self, credentials: Credentials, securebits: int) -> int:
        objref, first = self._objrefs.get(("cred", credentials, securebits))
        if first:
            uids, gids, groups, caps = (
                [int(n) for n in credentials[0].split()],
                [int(n) for n in credentials[1].split()],
                [int(n) for n in credentials[2].split()],
                [int(n, 16) for n in credentials[3:]],
            )
            self._writer.write(
                Cred(
                    objref,
                    *(uids[0], uids[1], uids[2], uids[3]),
                    *(gids[0], gids[1], gids[2], gids[3]),
                    securebits,
                    *(caps[0], caps[1], caps[2], caps[3], caps[4]),
                    [Gid(g, 0) for g in groups],
                )
            )
        return objref

    def _fs(self, process: Process, state: dict[str, str]) -> int:
        objref, _ = self._objrefs.get(("fs", process.pid))
        cwd = os.readlink(f"/proc/{process.pid}/cwd")
        root = os.readlink(f"/proc/{process.pid}/root")
        self._put(("fs", objref), Fs(objref, int(state.get("Umask", "0022"), 8), cwd, root))
        return objref

    def _task(
        self, process: Process, state: dict[str, str], thread: Thread, reply: ThreadReply, shared: Shared
    ) -> None:
        tid = thread.tid
        static = self._static.of(process.pid, tid)
        if static.policy & ~os.SCHED_RESET_ON_FORK == SCHED_DEADLINE:
            who = f"pid {process.pid} ({state['Name']}): its thread {tid}"
            raise CheckpointFailed(f"{who} {UNDER_DEADLINE}", hint=SINCE)
        # of a leader the status was read when it was stopped
        cred = self._cred(credentials(state) if static.cred is None else static.cred, reply.securebits)
        denied = no_new_privs(state) if static.cred is None else static.no_new_privs
        rseq = thread.rseq or ptrace.NO_RSEQ
        robust, robust_len = sys.get_robust_list(tid)
        self._put(
            thread.vtid,
            Task(
                pid=thread.vtid,
                state=TaskState.STOPPED if thread.stop_signal else TaskState.RUNNING,
                exit_code=thread.stop_signal,
                exit_signal=int(SIGCHLD) if tid == process.pid else -1,
                pdeath_signal=reply.pdeathsig,
                mm_objref=process.mm_objref,
                files_objref=shared.files,
                fs_objref=shared.fs,
                sighand_objref=shared.sighand,
                signal_objref=shared.signal,
                cred_objref=cred,
                personality=reply.personality,
                sched_policy=static.policy,
                sched_priority=static.priority,
                nice=static.nice,
                ioprio=static.ioprio,
                rseq_len=rseq.length if rseq.pointer else 0,
                rseq_sig=rseq.signature if rseq.pointer else 0,
                altstack_flags=reply.altstack[1],
                flags=shared.bits | (TaskBits.NO_NEW_PRIVS if denied else 0) | _bits(reply),
                clear_child_tid=reply.tid_address,
                robust_list=robust,
                robust_len=robust_len,
                rseq_ptr=rseq.pointer,
                altstack_sp=reply.altstack[0],
                altstack_size=reply.altstack[2],
                blocked=thread.mask,
                timerslack=reply.timerslack,
                comm=reply.comm,
                affinity=static.affinity,
            ),
        )

    def _stopped(self, process: Process, thread: Thread) -> None:
        """What only a stopped task has."""
        assert thread.regs is not None
        regs, block = self._restart_blocks.block(process.pid, thread.tid, thread.vtid, thread.regs)
        if block is not None:
            self._writer.write(block)
        self._writer.write(Cpu(thread.vtid, Arch.X86_64, bytes(regs), thread.xstate))
        own = ptrace.peek_siginfo(thread.tid, shared=False)
        if own:
            self._writer.write(SigPending(thread.vtid, 0, own))


def _bits(reply: ThreadReply) -> int:
    return (
        (TaskBits.TSC_DENIED if reply.tsc_denied else 0)
        | (TaskBits.CPUID_DENIED if reply.cpuid_denied else 0)
        | MCE_POLICIES.get(reply.mce, 0)
    )


def list_timers(process: Process) -> list[PosixTimer]:
    """The POSIX timers of a process; what is left of each, the process itself must say."""
    out = []
    by_tid = {thread.tid: thread.vtid for thread in process.threads.values()}
    for m in _TIMER.finditer(procfs.read_text(f"/proc/{process.pid}/timers")):
        number, signo, value, notify, kind, target, clock = m.groups()
        tid = by_tid.get(int(target), 0) if kind == "tid" else 0
        code = _NOTIFY[notify] | (4 if kind == "tid" else 0)
        out.append(PosixTimer(int(number), int(clock), code, int(signo), tid, 0, int(value, 16), 0, 0))
    return out


def _blank_task(pid: int, state: TaskState, exit_code: int, exit_signal: int, comm: str) -> Task:
    names = {name: 0 for name in Task._plain}
    names.update(pid=pid, state=int(state), exit_code=exit_code, exit_signal=exit_signal)
    return Task(**names, comm=comm, affinity=b"")
