"""The parasite: calls run inside a stopped task for what only the task itself can find out.

These are signal actions, timers, limits and the alternate stack. The tables of calls are written once, while the
process runs, and can be run many times. A run takes a tenth of a millisecond. The threads of a process run their
tables at the same time.

    parasite = Parasite(remote)          # its scratch area is mapped
    parasite.prepare()
    reply = parasite.process(regs, xstate, mask)     # the leader is stopped
    others = parasite.threads(threads)              # the threads are stopped
"""

from __future__ import annotations

import errno
import fcntl
import signal
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from migrator.engine.spawn import SCRATCH_ADDRESS
from migrator.image.records import PosixTimer
from migrator.linux import memory, procfs
from migrator.linux import x86_64 as arch
from migrator.linux.remote import Remote, RemoteError, free_signal, pack_calls, way_of_return
from migrator.linux.threads import Run, run_all, set_all

SCRATCH = 256 << 10  # room for tables, results and the contexts of one group of threads
SCRATCH_SPAN = (SCRATCH_ADDRESS, SCRATCH_ADDRESS + SCRATCH)  # where it is, if that is free
PROBE = 4096  # the end of it: a page that is mapped anew to see how memory is that is mapped from now on

NSIG = 64
SIGACTION_SIZE = 32
UNBLOCKABLE = (signal.SIGKILL, signal.SIGSTOP)
_NR = arch.NR
_PR_GET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_GET_SECUREBITS, _PR_GET_TIMERSLACK = 2, 3, 27, 30
_PR_GET_CHILD_SUBREAPER, _PR_GET_TID_ADDRESS, _PR_GET_THP_DISABLE, _PR_GET_NAME = 37, 40, 42, 16
_PR_GET_SECCOMP, _PR_GET_TSC, _PR_MCE_KILL_GET, _PR_GET_MEMORY_MERGE = 21, 25, 34, 68
_ARCH_GET_CPUID, ARCH_GET_XCOMP_PERM, _ARCH_GET_UNTAG_MASK = 0x1011, 0x1022, 0x4001
_KEYCTL_GET_KEYRING_ID, _THREAD_KEYRING, _PROCESS_KEYRING = 0, -1, -2
_MAP_FIXED, _RWX = 0x32, 7  # private and anonymous
_MADV_DONTFORK, _MADV_COLD = 10, 20  # the latter is not for memory that is locked
_MEMBARRIER_GET_REGISTRATIONS = 1 << 9
_PR_TSC_SIGSEGV, _MCE_DEFAULT = 2, 2
_RLIMITS = 16
_AS_IT_IS = 0xFFFFFFFF  # personality(2) changes nothing

_THREAD_OUT = 64  # bytes of results of a thread: stack_t (24), tid address (8), pdeathsig, TSC (4 each), name (16),
# mode of the NUMA policy (4)
_THREAD_CALLS = 14
# which of them return what
_SLACK, _SECUREBITS, _SECCOMP, _CPUID, _MCE, _KEYRING, _PERSONALITY, _LOOK = 3, 5, 6, 8, 9, 11, 12, 13
_GROUP = 32  # threads that run their tables at the same time, if there is room for their contexts

# In the scratch area's free part: the process's results, those of the threads, tables and contexts of the threads.
_ACTIONS = _THREAD_OUT
_ITIMERS = _ACTIONS + (NSIG - len(UNBLOCKABLE)) * SIGACTION_SIZE
_LIMITS = _ITIMERS + 96
_SUBREAPER = _LIMITS + 16 * _RLIMITS
_XCOMP = _SUBREAPER + 8
_UNTAG = _XCOMP + 8
_LDT = _UNTAG + 8
_PROCESS_OUT = _LDT + 8
_THREADS = 4096
_TABLES = _THREADS + _GROUP * _THREAD_OUT
_CONTEXTS = _TABLES + _GROUP * _THREAD_CALLS * arch.BATCH_ENTRY
_ASKED = [n for n in range(1, NSIG + 1) if n not in UNBLOCKABLE]


class Stopped(Protocol):
    """A stopped thread; see migrator.engine.user.dump.process.Thread."""

    tid: int
    regs: arch.Regs | None
    xstate: bytes
    mask: int


def is_left_over(pid: int, start: int, end: int) -> bool:
    """Whether a mapping is of the scratch area of one of us that was killed before it could take it out, or even
    before it wrote the code there."""
    if start < SCRATCH_SPAN[0] or end > SCRATCH_SPAN[1]:
        return False
    try:
        code = memory.read(pid, SCRATCH_ADDRESS, len(arch.BATCH_CODE))
        if any(code):
            return code == arch.BATCH_CODE
        return any((v.start, v.end) == SCRATCH_SPAN and v.execute and not v.inode for v in procfs.maps(pid))
    except OSError:
        return False


@dataclass(slots=True)
class ThreadReply:
    """What the parasite found out of a thread."""

    altstack: tuple[int, int, int]  # sp, flags, size
    tid_address: int
    pdeathsig: int
    timerslack: int
    comm: str
    securebits: int
    seccomp: int  # 0 none, 1 strict, 2 filters
    tsc_denied: bool  # reading the time stamp counter is a fault (PR_SET_TSC)
    cpuid_denied: bool  # ARCH_SET_CPUID
    mce: int  # PR_MCE_KILL: 0 late, 1 early, 2 as the host does
    numa: bool  # it has a NUMA policy
    keyring: bool  # it has one of its own (keyrings(7))
    personality: int
    denied: bool  # it could not look at the bystander


@dataclass(slots=True)
class ProcessReply:
    """What the parasite found out of a process, through its leader.

    actions:  struct sigaction of signal 1 to 64, zeros where it cannot have one
    limits:   16 pairs of u64, soft and hard
    itimers:  of each, (value, interval) in microseconds"""

    leader: ThreadReply
    actions: bytes
    limits: bytes
    itimers: list[tuple[int, int]]
    brk: int
    dumpable: int
    thp_disabled: int
    subreaper: int
    merge_all: bool  # PR_SET_MEMORY_MERGE
    lock_future: bool  # what is mapped later is locked (MCL_FUTURE),
    lock_onfault: bool  # once it is touched
    membarrier: int  # the commands that registered it; 0 before Linux 6.3 too, which does not tell
    keyring: bool  # it has one of its own
    xcomp: int  # features of the extended state that it may use (ARCH_REQ_XCOMP_PERM); 0 before Linux 5.16
    tags: bool  # addresses with tags (ARCH_ENABLE_TAGGED_ADDR)
    ldt: bool  # it has a table of segments (modify_ldt(2))


class Parasite:
    """The tables of one process. Good for as long as its scratch area is there."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._calls = 0  # of the process's table
        self._bystander = 0
        self._prepared = self._running = False

    @property
    def _probe(self) -> int:
        return self._remote.scratch + SCRATCH - PROBE

    def meet(self, bystander: int) -> None:
        """Its pid, as the process sees it; see migrator.engine.user.dump.bystander. 0: nobody is looked at."""
        if bystander != self._bystander:
            self._bystander, self._prepared = bystander, False
            self.prepare()

    def prepare(self) -> None:
        """Write the tables. The process may run."""
        out = self._remote.data
        calls: list[tuple[int, ...]] = [
            *_thread_calls(out, self._bystander),
            *((_NR["rt_sigaction"], n, 0, out + _ACTIONS + i * SIGACTION_SIZE, 8) for i, n in enumerate(_ASKED)),
            *((_NR["getitimer"], which, out + _ITIMERS + 32 * which) for which in range(3)),
            *((_NR["prlimit64"], 0, which, 0, out + _LIMITS + 16 * which) for which in range(_RLIMITS)),
            (_NR["prctl"], _PR_GET_CHILD_SUBREAPER, out + _SUBREAPER, 0, 0, 0),
            (_NR["mmap"], self._probe, PROBE, _RWX, _MAP_FIXED, -1, 0),
            (_NR["madvise"], self._probe, PROBE, _MADV_DONTFORK),
            (_NR["madvise"], self._probe, PROBE, _MADV_COLD),
            (_NR["mincore"], self._probe, PROBE, out + _SUBREAPER + 4),
            (_NR["prctl"], _PR_GET_MEMORY_MERGE, 0, 0, 0, 0),
            (_NR["brk"], 0),
            (_NR["prctl"], _PR_GET_DUMPABLE, 0, 0, 0, 0),
            (_NR["prctl"], _PR_GET_THP_DISABLE, 0, 0, 0, 0),
            (_NR["membarrier"], _MEMBARRIER_GET_REGISTRATIONS, 0, 0),
            (_NR["keyctl"], _KEYCTL_GET_KEYRING_ID, _PROCESS_KEYRING, 0),
            (_NR["arch_prctl"], ARCH_GET_XCOMP_PERM, out + _XCOMP),
            (_NR["arch_prctl"], _ARCH_GET_UNTAG_MASK, out + _UNTAG),
            (_NR["modify_ldt"], 0, out + _LDT, 8),
        ]
        self._calls = len(calls)
        memory.write(self._remote.pid, self._remote.table, pack_calls(calls))
        outs = (out + _THREADS + i * _THREAD_OUT for i in range(_GROUP))
        tables = b"".join(pack_calls(_thread_calls(at, self._bystander)) for at in outs)
        memory.write(self._remote.pid, out + _TABLES, tables)
        self._prepared = True

    def process(
        self, regs: arch.Regs, mask: int, timers: Sequence[PosixTimer] = (), xstate: bytes = b""
    ) -> ProcessReply:
        """Ask through the leader, which is stopped with `regs` and `mask`; it is as before afterwards.

        Also reads value, interval and overrun of `timers` into them."""
        with self.begun(regs, mask, xstate):
            return self.reply(timers)

    @contextmanager
    def begun(self, regs: arch.Regs, mask: int, xstate: bytes = b"") -> Iterator[None]:
        """process() in two halves: inside the block reply() is to be called; other processes can begin meanwhile."""
        if not self._prepared:
            self.prepare()
        with self._remote.borrowed(regs=regs, mask=mask, xstate=xstate):
            self._remote.start(self._calls)
            self._running = True
            try:
                yield
            finally:
                if self._running:  # another failed: nothing can be put back before it has stopped
                    with suppress(OSError):
                        self._finish()

    def _finish(self) -> None:
        self._running = False
        self._remote.finish()

    def reply(self, timers: Sequence[PosixTimer] = ()) -> ProcessReply:
        """What a process said; see process()."""
        remote = self._remote
        self._finish()
        size = remote.data - remote.table + _PROCESS_OUT
        raw = memory.read(remote.pid, remote.table, size)
        if timers:
            self._timers(timers)
        results = struct.unpack_from(f"<{8 * self._calls}q", raw)[7::8]
        at = remote.data - remote.table
        mapped, _, cold, _, merge_all, brk, dumpable, thp, membarrier, keyring, xcomp, untag, ldt = results[-13:]
        subreaper, resident, features, untagged = struct.unpack_from("<iBxxxQQ", raw, at + _SUBREAPER)
        locked = mapped == -errno.EAGAIN or cold == -errno.EINVAL
        itimers = []
        for which in range(3):
            i_s, i_us, v_s, v_us = struct.unpack_from("<4q", raw, at + _ITIMERS + 32 * which)
            itimers.append((v_s * 1_000_000 + v_us, i_s * 1_000_000 + i_us))
        actions = raw[at + _ACTIONS : at + _ITIMERS]
        for n in UNBLOCKABLE:  # in order: their places are filled from the lower one on
            hole = (n - 1) * SIGACTION_SIZE
            actions = actions[:hole] + bytes(SIGACTION_SIZE) + actions[hole:]
        return ProcessReply(
            _thread_reply(raw, at, results),
            actions,
            raw[at + _LIMITS : at + _SUBREAPER],
            itimers,
            brk,
            dumpable,
            thp,
            subreaper,
            merge_all == 1,
            locked,
            locked and mapped > 0 and not resident & 1,
            max(0, membarrier),
            keyring >= 0,
            features if xcomp == 0 else 0,
            untag == 0 and untagged != arch.MINUS_ONE,
            ldt > 0,
        )

    def _timers(self, timers: Sequence[PosixTimer]) -> None:
        remote = self._remote
        base = remote.data + _TABLES  # a thread's table is written anew after this
        calls: list[tuple[int, ...]] = [(_NR["timer_gettime"], t.timer_id, base + 32 * i) for i, t in enumerate(timers)]
        calls += [(_NR["timer_getoverrun"], t.timer_id) for t in timers]
        results = remote.batch(calls)
        self._prepared = False
        raw = memory.read(remote.pid, base, 32 * len(timers))
        for i, timer in enumerate(timers):
            i_s, i_ns, v_s, v_ns = struct.unpack_from("<4q", raw, 32 * i)
            timer.interval, timer.value = i_s * 10**9 + i_ns, v_s * 10**9 + v_ns
            timer.overrun = max(0, results[len(timers) + i])

    def descriptor_flags(self, leader: Stopped, numbers: Sequence[int]) -> list[int]:
        """F_GETFD of each of `numbers`, or a negative errno, through the leader, which is as before afterwards."""
        assert leader.regs is not None
        remote = self._remote
        self._prepared = False  # the table takes the place of others
        out: list[int] = []
        most = remote.data_size // arch.BATCH_ENTRY
        with remote.borrowed(regs=leader.regs, mask=leader.mask, xstate=leader.xstate):
            for first in range(0, len(numbers), most):
                out += remote.sweep(_NR["fcntl"], numbers[first : first + most], fcntl.F_GETFD)
        return out

    def threads(self, threads: Sequence[Stopped]) -> list[ThreadReply]:
        """Ask stopped threads other than the leader, all at the same time; they are as before afterwards."""
        out: list[ThreadReply] = []
        if threads and not self._prepared:
            self.prepare()
        first = 0
        while first < len(threads):
            size = arch.CONTEXT_SIZE + len(threads[first].xstate) + 128
            room = (self._remote.data_size - _CONTEXTS - 64) // size
            group = threads[first : first + min(_GROUP, room)]
            out += self._ask_group(group)
            first += len(group)
        return out

    def _ask_group(self, group: Sequence[Stopped]) -> list[ThreadReply]:
        remote = self._remote
        pid, out = remote.pid, remote.data
        first = (out + _CONTEXTS + 63) & ~63
        blob = bytearray()
        contexts = []
        for thread in group:
            assert thread.regs is not None
            contexts.append(first + len(blob))
            blob += way_of_return(pid, thread.regs, thread.xstate, thread.mask, contexts[-1])
            blob += bytes(-len(blob) & 63)
        memory.write(pid, first, bytes(blob))
        per_thread = _THREAD_CALLS * arch.BATCH_ENTRY
        tables = range(out + _TABLES, out + _TABLES + len(group) * per_thread, per_thread)
        regs = [thread.regs for thread in group if thread.regs is not None]
        runs = [
            Run(thread.tid, own, remote.scratch, table, _THREAD_CALLS, context)
            for thread, own, table, context in zip(group, regs, tables, contexts, strict=True)
        ]
        for tid, status in run_all(runs, ending=free_signal([thread.tid for thread in group])).items():
            raise RemoteError(3, f"stopped with {status:#x} while it was asked", f"tid {tid}")
        raw = memory.read(pid, out + _THREADS, _TABLES - _THREADS + len(group) * per_thread)
        replies = []
        set_all([thread.tid for thread in group], regs, [thread.mask for thread in group])
        for i in range(len(group)):
            at = _TABLES - _THREADS + i * per_thread
            results = struct.unpack_from(f"<{8 * _THREAD_CALLS}q", raw, at)[7::8]
            replies.append(_thread_reply(raw, i * _THREAD_OUT, results))
        return replies


def _thread_calls(out: int, bystander: int) -> list[tuple[int, ...]]:
    return [
        (_NR["sigaltstack"], 0, out),
        (_NR["prctl"], _PR_GET_TID_ADDRESS, out + 24, 0, 0, 0),
        (_NR["prctl"], _PR_GET_PDEATHSIG, out + 32, 0, 0, 0),
        (_NR["prctl"], _PR_GET_TIMERSLACK, 0, 0, 0, 0),
        (_NR["prctl"], _PR_GET_NAME, out + 40, 0, 0, 0),
        (_NR["prctl"], _PR_GET_SECUREBITS, 0, 0, 0, 0),
        (_NR["prctl"], _PR_GET_SECCOMP, 0, 0, 0, 0),
        (_NR["prctl"], _PR_GET_TSC, out + 36, 0, 0, 0),
        (_NR["arch_prctl"], _ARCH_GET_CPUID, 0),
        (_NR["prctl"], _PR_MCE_KILL_GET, 0, 0, 0, 0),
        (_NR["get_mempolicy"], out + 56, 0, 0, 0, 0),
        (_NR["keyctl"], _KEYCTL_GET_KEYRING_ID, _THREAD_KEYRING, 0),
        (_NR["personality"], _AS_IT_IS),
        (_NR["get_robust_list"], bystander, 0, 0),
    ]


def _thread_reply(raw: bytes, at: int, results: Sequence[int]) -> ThreadReply:
    sp, flags, size, tid_address, pdeathsig, tsc, name, policy = struct.unpack_from("<QixxxxQQii16si", raw, at)
    comm = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return ThreadReply(
        (sp, flags, size),
        tid_address,
        pdeathsig,
        max(0, results[_SLACK]),
        comm,
        results[_SECUREBITS],
        max(0, results[_SECCOMP]),  # EINVAL of a kernel without it
        tsc == _PR_TSC_SIGSEGV,
        results[_CPUID] == 0,
        results[_MCE] if results[_MCE] >= 0 else _MCE_DEFAULT,
        policy != 0,
        results[_KEYRING] >= 0,
        results[_PERSONALITY] & _AS_IT_IS,
        results[_LOOK] in (-errno.EPERM, -errno.ESRCH),
    )
