"""What is set from inside a stub: limits, file system, signal actions, credentials, and each thread's own.

All of it is system calls, in one table for each thread. The tables are worked out and written into the stub
while the tasks still run on the source; in the end they are only run, if the records are still the same.

Credentials come last in each table: what is done before them needs the rights of root. The leader's table runs
after all others, as a change of credentials may clear what it sets for the whole process (PR_SET_DUMPABLE).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from signal import SIGKILL, SIGSTOP

from migrator.engine.user.dump.tasks import MCE_POLICIES, MEMBARRIER
from migrator.engine.user.restore.stub import PREPARED, PREPARED_SIZE, Stub
from migrator.errors import RestartFailed
from migrator.image.records import Cred, Fs, Sighand, Signal, Task, TaskBits
from migrator.linux import confinement, memory, procfs
from migrator.linux import x86_64 as arch
from migrator.linux.remote import Call, name_of, pack_calls
from migrator.linux.threads import Run, run_all

NR = arch.NR
_NSIG = 64
_ACTION_SIZE = 32
_UNBLOCKABLE = (SIGKILL, SIGSTOP)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_SECUREBITS = 1, 4, 15, 28
_PR_SET_CHILD_SUBREAPER, _NO_SETUID_FIXUP = 36, 4
_PR_THP_DISABLE_EXCEPT_ADVISED = 2
_PR_SET_NO_NEW_PRIVS, _PR_SET_THP_DISABLE, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 38, 41, 24, 47
_PR_SET_TSC, _PR_TSC_SIGSEGV, _ARCH_SET_CPUID = 26, 2, 0x1012
_PR_MCE_KILL, _PR_MCE_KILL_SET, _PR_SET_MEMORY_MERGE = 33, 1, 67
_MCL_FUTURE, _MCL_ONFAULT = 2, 4
_SS_ONSTACK = 1
_CAP_VERSION_3 = 0x20080522
_RLIMITS = 16
_DEFAULT_ACTION = bytes(_ACTION_SIZE)
_LAST_CAP = int(procfs.read_text("/proc/sys/kernel/cap_last_cap"))
GROUP = 64  # threads whose tables are in the stub at the same time


@dataclass(frozen=True, slots=True)
class ProcessPart:
    """What the leader sets for all. `directory`: a path, for those of `calls` that begin with chdir or chroot."""

    actions: bytes
    limits: tuple[tuple[int, int], ...]
    umask: int
    cwd: str
    directory: bytes
    calls: tuple[Call, ...]
    flags: int
    channel: tuple[Call, ...]  # closing it


@dataclass(frozen=True, slots=True)
class ThreadPart:
    """What a thread sets of its own."""

    vtid: int
    clear_child_tid: int
    comm: str
    altstack: tuple[int, int, int]
    robust: tuple[int, int]
    rseq: tuple[int, int, int]
    personality: int
    ioprio: int
    flags: int
    pdeath_signal: int
    cred: int  # objref


@dataclass(slots=True)
class SetupBatch:
    """The calls of one thread, as they lie in the stub."""

    vtid: int
    address: int
    calls: list[Call]


class TaskSetup:
    """The tables of one group of threads of a stub. `threads[0]` is the leader, in the first one."""

    def __init__(
        self, stub: Stub, process: ProcessPart | None, threads: Sequence[ThreadPart], creds: dict[int, Cred]
    ) -> None:
        self.stub = stub
        self.process = process
        self.parts = (process, *threads)
        self.tables: list[SetupBatch] = []
        blob, calls_of = b"", []
        status = procfs.status(stub.pid)
        for part in threads:
            _check_confinement(status, part, creds[part.cred])
        permitted = int(status["CapPrm"], 16)
        for index, part in enumerate(threads):
            calls: list[Call] = []
            if process is not None and index == 0:
                data, calls = _process_calls(process, PREPARED + len(blob))
                blob += _padded(data)
            data, more = _thread_calls(part, creds[part.cred], PREPARED + len(blob), permitted)
            blob += _padded(data)
            calls += more
            if process is not None and index == 0:
                dumpable = 0 if part.flags & TaskBits.NOT_DUMPABLE else 1
                calls.append((NR["prctl"], _PR_SET_DUMPABLE, dumpable, 0, 0, 0))
            calls_of.append((part.vtid, calls))
        self._begin = PREPARED + (-(-len(blob) // 64) * 64)
        packed = b""
        for vtid, calls in calls_of:
            self.tables.append(SetupBatch(vtid, self._begin + len(packed), calls))
            packed += pack_calls(calls)
        self._size = len(packed)
        if self._begin + self._size > PREPARED + PREPARED_SIZE:
            raise RestartFailed(f"pid {stub.vpid}: its credentials do not fit: {len(blob)} bytes")
        self._raw = blob.ljust(self._begin - PREPARED, b"\0") + packed

    def put(self) -> None:
        """Write the tables into the stub, where there is room for those of one group."""
        memory.write(self.stub.pid, PREPARED, self._raw)

    @property
    def leader(self) -> list[SetupBatch]:
        """The table that is to run after all others of the stub; none in a group without the leader."""
        return self.tables[:1] if self.process is not None else []

    @property
    def others(self) -> list[SetupBatch]:
        return self.tables[1:] if self.process is not None else self.tables

    def failures(self) -> list[tuple[int, Call, int]]:
        """What of the tables failed, once all were run: (vtid, call, errno)."""
        raw = memory.read(self.stub.pid, self._begin, self._size)
        results = struct.unpack(f"<{len(raw) // 8}q", raw)[7::8]
        if min(results) >= 0:
            return []
        every = [(table.vtid, call) for table in self.tables for call in table.calls]
        return [(vtid, call, -r) for (vtid, call), r in zip(every, results, strict=True) if -4096 < r < 0]

    def runs(self, tables: Sequence[SetupBatch]) -> list[Run]:
        stub = self.stub
        return [
            Run(stub.threads[t.vtid].tid, stub.segments, stub.remote.scratch, t.address, len(t.calls)) for t in tables
        ]


def run(runs: Sequence[Run]) -> None:
    """Run tables of any number of stubs, all at the same time."""
    for tid, status in run_all(runs).items():
        raise RestartFailed(f"tid {tid} stopped with {status:#x} while it was set up")


def process_part(
    task: Task, sighand: Sighand, signal: Signal, fs: Fs, place: tuple[bytes, list[Call]], channel: list[Call]
) -> ProcessPart:
    """`place`: a path, and the calls that go there."""
    if len(sighand.actions) != _ACTION_SIZE * _NSIG:
        raise RestartFailed(f"pid {task.pid}: {len(sighand.actions)} bytes of signal actions")
    return ProcessPart(
        sighand.actions,
        tuple((limit.soft, limit.hard) for limit in signal.rlimits[:_RLIMITS]),
        fs.umask,
        fs.cwd,
        place[0],
        tuple(place[1]),
        task.flags,
        tuple(channel),
    )


def thread_part(task: Task) -> ThreadPart:
    return ThreadPart(
        task.pid,
        task.clear_child_tid,
        task.comm,
        (task.altstack_sp, task.altstack_flags, task.altstack_size),
        (task.robust_list, task.robust_len),
        (task.rseq_ptr, task.rseq_len, task.rseq_sig),
        task.personality,
        task.ioprio,
        task.flags,
        task.pdeath_signal,
        task.cred_objref,
    )


def limit_of(call: Call) -> int:
    """The number of the limit that a call sets, -1 for other calls."""
    return call[2] if call[0] == NR["prlimit64"] else -1


def about(call: Call, part: ProcessPart | None) -> str:
    """What to say of a call that failed."""
    path = f"{part.cwd}: " if part is not None and call[0] in (NR["chdir"], NR["fchdir"], NR["chroot"]) else ""
    return f"{path}{name_of(call[0])}{tuple(call[1:])}"


def _process_calls(part: ProcessPart, at: int) -> tuple[bytes, list[Call]]:
    limits = struct.pack(f"<{2 * len(part.limits)}Q", *[value for limit in part.limits for value in limit])
    limits_at = at + len(part.actions)
    directory_at = limits_at + len(limits)
    by_path = (NR["chdir"], NR["chroot"])
    calls: list[Call] = [(call[0], directory_at) if call[0] in by_path else call for call in part.calls]
    calls.append((NR["umask"], part.umask))
    for n in range(1, _NSIG + 1):
        action = (n - 1) * _ACTION_SIZE
        if n not in _UNBLOCKABLE and part.actions[action : action + _ACTION_SIZE] != _DEFAULT_ACTION:
            calls.append((NR["rt_sigaction"], n, at + action, 0, 8))
    if part.flags & TaskBits.CHILD_SUBREAPER:
        calls.append((NR["prctl"], _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    if part.flags & TaskBits.THP_DISABLED:
        flags = _PR_THP_DISABLE_EXCEPT_ADVISED if part.flags & TaskBits.THP_EXCEPT_ADVISED else 0
        calls.append((NR["prctl"], _PR_SET_THP_DISABLE, 1, flags, 0, 0))
    if part.flags & TaskBits.MERGE_ALL:
        calls.append((NR["prctl"], _PR_SET_MEMORY_MERGE, 1, 0, 0, 0))
    if part.flags & TaskBits.LOCK_FUTURE:
        calls.append((NR["mlockall"], _MCL_FUTURE | (_MCL_ONFAULT if part.flags & TaskBits.LOCK_ONFAULT else 0)))
    calls += [(NR["membarrier"], command, 0, 0) for command, bit in MEMBARRIER.items() if part.flags & bit]
    calls += [(NR["prlimit64"], 0, which, limits_at + 16 * which, 0) for which in range(len(part.limits))]
    calls += part.channel
    return part.actions + limits + part.directory, calls


def _thread_calls(part: ThreadPart, cred: Cred, at: int, permitted: int) -> tuple[bytes, list[Call]]:
    # a thread that is on its alternate stack cannot say so to the kernel: its stack pointer does
    sp, flags, size = part.altstack
    blob = struct.pack("<QixxxxQ", sp, flags & ~_SS_ONSTACK, size)
    name_at = at + len(blob)
    blob += part.comm.encode("utf-8", "surrogateescape")[:15].ljust(16, b"\0")
    calls: list[Call] = [
        (NR["set_tid_address"], part.clear_child_tid),
        (NR["prctl"], _PR_SET_NAME, name_at, 0, 0, 0),
        (NR["sigaltstack"], at, 0),
    ]
    if part.robust[0]:
        calls.append((NR["set_robust_list"], *part.robust))
    if part.rseq[0]:
        pointer, length, signature = part.rseq
        calls.append((NR["rseq"], pointer, length, 0, signature))
    if part.personality:
        calls.append((NR["personality"], part.personality))
    if part.ioprio:
        calls.append((NR["ioprio_set"], 1, 0, part.ioprio))
    if part.flags & TaskBits.TSC_DENIED:
        calls.append((NR["prctl"], _PR_SET_TSC, _PR_TSC_SIGSEGV, 0, 0, 0))
    if part.flags & TaskBits.CPUID_DENIED:
        calls.append((NR["arch_prctl"], _ARCH_SET_CPUID, 0))
    for policy, bit in MCE_POLICIES.items():
        if part.flags & bit:
            calls.append((NR["prctl"], _PR_MCE_KILL, _PR_MCE_KILL_SET, policy, 0, 0))
    more, extra = _cred_calls(cred, at + len(blob), permitted)
    blob += more
    calls += extra
    if part.flags & TaskBits.NO_NEW_PRIVS:
        calls.append((NR["prctl"], _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if part.pdeath_signal:
        calls.append((NR["prctl"], _PR_SET_PDEATHSIG, part.pdeath_signal, 0, 0, 0))
    return blob, calls


def _cred_calls(cred: Cred, at: int, permitted: int) -> tuple[bytes, list[Call]]:
    """System calls that give the calling thread its credentials, beginning as root with the capabilities `permitted`.

    What takes a capability is done while all are there: a change of user takes none away meanwhile (capabilities(7),
    securebits), and the last call gives up what is not to be kept."""
    groups = struct.pack(f"<{len(cred.groups)}I", *[g.gid for g in cred.groups])
    groups = groups.ljust(-(-len(groups) // 8) * 8, b"\0")
    header = struct.pack("<Ii", _CAP_VERSION_3, 0)
    first = _cap_data(permitted, permitted, cred.cap_inheritable)
    final = _cap_data(cred.cap_effective, cred.cap_permitted, cred.cap_inheritable)
    header_at = at + len(groups)
    first_at, final_at = header_at + len(header), header_at + len(header) + len(first)
    calls: list[Call] = [
        (NR["setgroups"], len(cred.groups), at),
        (NR["prctl"], _PR_SET_SECUREBITS, _NO_SETUID_FIXUP, 0, 0, 0),
        (NR["capset"], header_at, first_at),  # ahead of the bounding set, which bounds what is inheritable
    ]
    for cap in range(_LAST_CAP + 1):
        if not cred.cap_bounding >> cap & 1:
            calls.append((NR["prctl"], _PR_CAPBSET_DROP, cap, 0, 0, 0))
    calls += [(NR["setresgid"], cred.gid, cred.egid, cred.sgid), (NR["setresuid"], cred.uid, cred.euid, cred.suid)]
    if cred.fsgid != cred.egid:
        calls.append((NR["setfsgid"], cred.fsgid))
    if cred.fsuid != cred.euid:
        calls.append((NR["setfsuid"], cred.fsuid))
    for cap in range(_LAST_CAP + 1):
        if cred.cap_ambient >> cap & 1:
            calls.append((NR["prctl"], _PR_CAP_AMBIENT, 2, cap, 0, 0))
    calls += [(NR["prctl"], _PR_SET_SECUREBITS, cred.securebits, 0, 0, 0), (NR["capset"], header_at, final_at)]
    return groups + header + first + final, calls


def _cap_data(effective: int, permitted: int, inheritable: int) -> bytes:
    sets = (effective, permitted, inheritable)
    return struct.pack("<6I", *[s & 0xFFFFFFFF for s in sets], *[s >> 32 & 0xFFFFFFFF for s in sets])


def _check_confinement(status: Mapping[str, str], part: ThreadPart, cred: Cred) -> None:
    """What a stub has inherited and cannot take off, its task must have had. Raises RestartFailed."""
    lacking = confinement.names(cred.cap_bounding & (2 << _LAST_CAP) - 1 & ~confinement.bounding(status))
    inherited = confinement.inherited(status)
    if part.flags & TaskBits.NO_NEW_PRIVS:
        inherited = [text for text in inherited if not text.startswith("no_new_privs")]
    if lacking:
        raise RestartFailed(
            f"pid {part.vtid}: its capability bounding set has {', '.join(lacking)}, which nothing can have that is"
            " restarted here",
            hint="take CapabilityBoundingSet= out of the agent's unit, or whatever else bounds it",
        )
    if inherited:
        raise RestartFailed(
            f"pid {part.vtid}: it would be under {' and '.join(inherited)} here, as the agent is",
            hint="take that off the agent",
        )


def _padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 8) * 8, b"\0")
