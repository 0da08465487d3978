"""Tasks as records: credentials, signals, timers, limits, registers.

What can only be asked from inside (signal actions, alternate stacks, timers) is asked by one batch of
injected calls per thread. What seldom changes is read before the freeze by warm(), and the rest after it.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass

from migrator.engine.stream import RecordWriter
from migrator.engine.user.layout_dump import Objrefs
from migrator.engine.user.tree import Process, Thread
from migrator.engine.user.waits import Waits
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
from migrator.linux import memory, procfs, ptrace, sys
from migrator.linux import x86_64 as arch
from migrator.linux.remote import pack_calls, way_of_return

_NR = arch.NR
_PR_GET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_GET_SECUREBITS, _PR_GET_TIMERSLACK = 2, 3, 27, 30
_PR_GET_CHILD_SUBREAPER, _PR_GET_TID_ADDRESS, _PR_GET_THP_DISABLE, _PR_GET_NAME = 37, 40, 42, 16
_SIGACTION_SIZE = 32
_NSIG = 64
_UNBLOCKABLE = (9, 19)

_THREAD_OUT = 64  # bytes of answers per thread: stack_t (24), tid address (8), pdeathsig (4), name (16)
_THREAD_CALLS = 5
_SLACK = 3  # which of them answers with the timer slack
_RLIMITS = 16
_GROUP = 32  # threads that run their tables at the same time
_SIGURG = 23
SCRATCH = 256 << 10  # room for the tables, answers and contexts of one group
_TIMER = re.compile(r"ID: (\d+)\nsignal: (\d+)/([0-9a-fA-Fx]+)\nnotify: (\w+)/(\w+)\.(-?\d+)\nClockID: (-?\d+)")
_NOTIFY = {"signal": 0, "none": 1, "thread": 2}


@dataclass(slots=True)
class Static:
    """What seldom changes of a thread, read while it runs."""

    policy: int
    priority: int
    nice: int
    ioprio: int
    affinity: bytes
    personality: int


@dataclass(slots=True)
class Answers:
    """What a thread said of itself."""

    altstack: tuple[int, int, int]  # sp, flags, size
    tid_address: int
    pdeathsig: int
    timerslack: int
    comm: str


@dataclass(slots=True)
class Collected:
    """What a process said of itself; `threads` in the order of Process.threads."""

    state: dict[str, str]
    threads: list[Answers]
    brk: int
    signal_objref: int
    sighand_objref: int
    actions: bytes
    limits: list[Rlimit]
    itimers: list[Itimer]
    timers: list[PosixTimer]
    securebits: int
    bits: int


class TaskDump:
    """Writes everything of the tasks but memory and descriptors."""

    def __init__(self, writer: RecordWriter, objrefs: Objrefs, waits: Waits) -> None:
        self._writer = writer
        self._waits = waits
        self._objrefs = objrefs
        self._static: dict[int, Static] = {}

    def warm(self, processes: list[Process]) -> None:
        """Read what seldom changes, of running tasks; never raises for those that vanish."""
        for process in processes:
            try:
                for tid in procfs.tids(process.pid):
                    self._static[tid] = _read_static(process.pid, tid)
            except (FileNotFoundError, ProcessLookupError):
                continue

    def collect(self, process: Process) -> Collected:
        """Ask a stopped process, from inside, for what cannot be seen from outside."""
        return self._ask(process, procfs.status(process.pid))

    def write(self, process: Process, said: Collected, files_objref: int) -> None:
        """Write a stopped process with all its threads."""
        state = said.state
        self._writer.write(Sighand(said.sighand_objref, 0, said.actions))
        self._writer.write(Signal(said.signal_objref, 0, said.limits, said.itimers, said.timers))
        answers, signal, sighand, bits = said.threads, said.signal_objref, said.sighand_objref, said.bits
        self._securebits = said.securebits
        cred = self._cred(process, state)
        fs = self._fs(process, state)
        for index, thread in enumerate(process.threads.values()):
            self._thread(process, thread, answers[index], (files_objref, fs, sighand, signal, cred), state, bits)
        shared = ptrace.peek_siginfo(process.pid, shared=True)
        if shared:
            self._writer.write(SigPending(process.vpid, 1, shared))

    def write_zombie(self, process: Process) -> None:
        fields = procfs.stat(process.pid)
        self._writer.write(_blank_task(process.vpid, TaskState.ZOMBIE, process.exit_code, int(fields[38]), fields[2]))

    # ------------------------------------------------------------------ inside the process

    def _ask(self, process: Process, state: dict[str, str]) -> Collected:
        remote = process.remote
        assert remote is not None
        threads = list(process.threads.values())
        out = remote.data
        caught = int(state["SigCgt"], 16) | int(state["SigIgn"], 16)
        asked = [n for n in range(1, _NSIG + 1) if caught >> (n - 1) & 1 and n not in _UNBLOCKABLE]
        timers = _list_timers(process)

        base = _THREAD_OUT  # the leader's own answers come first
        calls: list[tuple[int, ...]] = _thread_calls(out)
        actions_at = base
        calls += [(_NR["rt_sigaction"], n, 0, out + actions_at + i * _SIGACTION_SIZE, 8) for i, n in enumerate(asked)]
        itimers_at = actions_at + len(asked) * _SIGACTION_SIZE
        calls += [(_NR["getitimer"], which, out + itimers_at + 32 * which) for which in range(3)]
        timers_at = itimers_at + 96
        calls += [(_NR["timer_gettime"], t.timer_id, out + timers_at + 32 * i) for i, t in enumerate(timers)]
        limits_at = timers_at + 32 * len(timers)
        calls += [(_NR["prlimit64"], 0, which, 0, out + limits_at + 16 * which) for which in range(_RLIMITS)]
        subreaper_at = limits_at + 16 * _RLIMITS
        fixed = len(calls)
        calls += [
            (_NR["brk"], 0),
            (_NR["prctl"], _PR_GET_SECUREBITS, 0, 0, 0, 0),
            (_NR["prctl"], _PR_GET_DUMPABLE, 0, 0, 0, 0),
            (_NR["prctl"], _PR_GET_THP_DISABLE, 0, 0, 0, 0),
            (_NR["prctl"], _PR_GET_CHILD_SUBREAPER, out + subreaper_at, 0, 0, 0),
        ]
        calls += [(_NR["timer_getoverrun"], t.timer_id) for t in timers]
        leader = threads[0]
        with remote.borrowed(regs=leader.regs, mask=leader.mask):
            results = remote.batch(calls)
            raw = remote.get(subreaper_at + 8)
        answers = [_answers(raw, 0, results[_SLACK])]
        answers += self._ask_threads(process, threads[1:])

        actions = bytearray(_NSIG * _SIGACTION_SIZE)
        for i, n in enumerate(asked):
            at = actions_at + i * _SIGACTION_SIZE
            actions[(n - 1) * _SIGACTION_SIZE : n * _SIGACTION_SIZE] = raw[at : at + _SIGACTION_SIZE]
        sighand, _ = self._objrefs.get(("sighand", process.pid))

        itimers = []
        for which in range(3):
            i_s, i_us, v_s, v_us = struct.unpack_from("<4q", raw, itimers_at + 32 * which)
            itimers.append(Itimer(v_s * 1_000_000 + v_us, i_s * 1_000_000 + i_us))
        for i, timer in enumerate(timers):
            i_s, i_ns, v_s, v_ns = struct.unpack_from("<4q", raw, timers_at + 32 * i)
            timer.interval, timer.value = i_s * 10**9 + i_ns, v_s * 10**9 + v_ns
            timer.overrun = max(0, results[fixed + 5 + i])
        signal, _ = self._objrefs.get(("signal", process.pid))

        brk, securebits, dumpable, thp, _ = results[fixed : fixed + 5]
        (subreaper,) = struct.unpack_from("<i", raw, subreaper_at)
        bits = (
            (TaskBits.NO_NEW_PRIVS if state.get("NoNewPrivs") == "1" else 0)
            | (TaskBits.CHILD_SUBREAPER if subreaper else 0)
            | (TaskBits.THP_DISABLED if thp == 1 else 0)
            | (TaskBits.NOT_DUMPABLE if dumpable != 1 else 0)
        )
        limits = [Rlimit(*pair) for pair in struct.iter_unpack("<QQ", raw[limits_at:subreaper_at])]
        return Collected(
            state, answers, brk, signal, sighand, bytes(actions), limits, itimers, timers, securebits, int(bits)
        )

    @staticmethod
    def _ask_threads(process: Process, threads: list[Thread]) -> list[Answers]:
        """All threads run their tables at the same time, each with its own."""
        remote = process.remote
        assert remote is not None
        out: list[Answers] = []
        per_call = arch.BATCH_ENTRY
        per_thread = _THREAD_CALLS * per_call
        for first in range(0, len(threads), _GROUP):
            group = threads[first : first + _GROUP]
            at = remote.data + _GROUP * _THREAD_OUT  # tables after the answers, contexts after the tables
            context = (at + _GROUP * per_thread + 63) & ~63
            tables = b"".join(pack_calls(_thread_calls(remote.data + i * _THREAD_OUT)) for i in range(len(group)))
            blob = bytearray(tables.ljust(context - at, b"\0"))
            contexts = []
            for thread in group:
                assert thread.regs is not None
                contexts.append(at + len(blob))
                blob += way_of_return(process.pid, thread.regs, thread.xstate, thread.mask, contexts[-1])
                blob += bytes(-len(blob) & 63)
            memory.write(process.pid, at, bytes(blob))
            for i, thread in enumerate(group):
                assert thread.regs is not None
                # registers first: they lead back by themselves, whenever we die
                table = at + i * per_thread
                arch.start_batch(thread.tid, thread.regs, remote.scratch, table, _THREAD_CALLS, _SIGURG, contexts[i])
                ptrace.set_sigmask(thread.tid, ~(1 << (_SIGURG - 1)) & arch.MINUS_ONE)
                ptrace.cont(thread.tid)
            for thread in group:
                while ptrace.stop_event(ptrace.wait(thread.tid)) == ptrace.EVENT_STOP:
                    ptrace.cont(thread.tid)
            raw = memory.read(process.pid, remote.data, _GROUP * _THREAD_OUT + len(tables))
            for i, thread in enumerate(group):
                assert thread.regs is not None
                ptrace.set_sigmask(thread.tid, thread.mask)
                arch.set_regs(thread.tid, thread.regs)
                slack_at = _GROUP * _THREAD_OUT + i * per_thread + _SLACK * per_call + 56
                (slack,) = struct.unpack_from("<q", raw, slack_at)
                out.append(_answers(raw, i * _THREAD_OUT, slack))
        return out

    # ------------------------------------------------------------------ from outside

    def _cred(self, process: Process, state: dict[str, str]) -> int:
        uids = [int(n) for n in state["Uid"].split()]
        gids = [int(n) for n in state["Gid"].split()]
        groups = [int(n) for n in state["Groups"].split()]
        caps = [int(state[k], 16) for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
        objref, first = self._objrefs.get(
            ("cred", tuple(uids), tuple(gids), tuple(groups), tuple(caps), self._securebits)
        )
        if first:
            self._writer.write(
                Cred(
                    objref,
                    *(uids[0], uids[1], uids[2], uids[3]),
                    *(gids[0], gids[1], gids[2], gids[3]),
                    self._securebits,
                    *(caps[0], caps[1], caps[2], caps[3], caps[4]),
                    [Gid(g, 0) for g in groups],
                )
            )
        return objref

    def _fs(self, process: Process, state: dict[str, str]) -> int:
        objref, _ = self._objrefs.get(("fs", process.pid))
        cwd = os.readlink(f"/proc/{process.pid}/cwd")
        root = os.readlink(f"/proc/{process.pid}/root")
        self._writer.write(Fs(objref, int(state.get("Umask", "0022"), 8), cwd, root))
        return objref

    def _thread(
        self,
        process: Process,
        thread: Thread,
        said: Answers,
        objrefs: tuple[int, int, int, int, int],
        state: dict[str, str],
        bits: int,
    ) -> None:
        tid = thread.tid
        static = self._static.get(tid) or _read_static(process.pid, tid)
        rseq = thread.rseq or ptrace.rseq_configuration(tid)
        robust, robust_len = sys.get_robust_list(tid)
        files, fs, sighand, signal, cred = objrefs
        assert thread.regs is not None
        self._writer.write(
            Task(
                pid=thread.vtid,
                state=TaskState.STOPPED if thread.stop_signal else TaskState.RUNNING,
                exit_code=thread.stop_signal,
                exit_signal=17,
                pdeath_signal=said.pdeathsig,
                mm_objref=process.mm_objref,
                files_objref=files,
                fs_objref=fs,
                sighand_objref=sighand,
                signal_objref=signal,
                cred_objref=cred,
                personality=static.personality,
                sched_policy=static.policy,
                sched_priority=static.priority,
                nice=static.nice,
                ioprio=static.ioprio,
                rseq_len=rseq.length if rseq.pointer else 0,
                rseq_sig=rseq.signature if rseq.pointer else 0,
                altstack_flags=said.altstack[1],
                flags=bits,
                clear_child_tid=said.tid_address,
                robust_list=robust,
                robust_len=robust_len,
                rseq_ptr=rseq.pointer,
                altstack_sp=said.altstack[0],
                altstack_size=said.altstack[2],
                blocked=thread.mask,
                timerslack=said.timerslack,
                comm=said.comm,
                affinity=static.affinity,
            )
        )
        regs, block = self._waits.block(process.pid, tid, thread.vtid, thread.regs)
        if block is not None:
            self._writer.write(block)
        self._writer.write(Cpu(thread.vtid, Arch.X86_64, bytes(regs), thread.xstate))
        own = ptrace.peek_siginfo(tid, shared=False)
        if own:
            self._writer.write(SigPending(thread.vtid, 0, own))


def _thread_calls(out: int) -> list[tuple[int, ...]]:
    return [
        (_NR["sigaltstack"], 0, out),
        (_NR["prctl"], _PR_GET_TID_ADDRESS, out + 24, 0, 0, 0),
        (_NR["prctl"], _PR_GET_PDEATHSIG, out + 32, 0, 0, 0),
        (_NR["prctl"], _PR_GET_TIMERSLACK, 0, 0, 0, 0),
        (_NR["prctl"], _PR_GET_NAME, out + 40, 0, 0, 0),
    ]


def _answers(raw: bytes, at: int, slack: int) -> Answers:
    sp, flags, size, tid_address, pdeathsig, name = struct.unpack_from("<QixxxxQQixxxx16s", raw, at)
    comm = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return Answers((sp, flags, size), tid_address, pdeathsig, slack if slack > 0 else 0, comm)


def _read_static(pid: int, tid: int) -> Static:
    fields = procfs.stat(pid, tid)
    cpus = os.sched_getaffinity(tid)
    mask = sum(1 << cpu for cpu in cpus)
    return Static(
        policy=os.sched_getscheduler(tid),
        priority=os.sched_getparam(tid).sched_priority,
        nice=int(fields[19]),
        ioprio=sys.ioprio_get(tid),
        affinity=mask.to_bytes(max(8, -(-mask.bit_length() // 64) * 8), "little"),
        personality=int(procfs.read_text(f"/proc/{pid}/task/{tid}/personality"), 16),
    )


def _list_timers(process: Process) -> list[PosixTimer]:
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
