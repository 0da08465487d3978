"""Tasks on the destination: everything of a task but its memory and descriptors, in the right order.

Credentials come last: what is done before them needs the rights of root. Signals stay blocked until the
registers are in place, so that nothing is delivered to a half-built task.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from migrator.engine.user import replay
from migrator.engine.user.shell import Shell, ShellThread
from migrator.errors import RestartFailed
from migrator.image.records import (
    Cpu,
    Cred,
    Fs,
    Mm,
    RestartBlock,
    Sighand,
    Signal,
    SigPending,
    Task,
    TaskBits,
)
from migrator.linux import memory, ptrace
from migrator.linux import x86_64 as arch
from migrator.linux.procfs import read_text
from migrator.linux.remote import Call, name_of, pack_calls

NR = arch.NR
_NSIG = 64
_UNBLOCKABLE = (9, 19)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_SECUREBITS = 1, 4, 15, 28
_PR_SET_TIMERSLACK, _PR_SET_MM, _PR_SET_CHILD_SUBREAPER = 29, 35, 36
_PR_SET_NO_NEW_PRIVS, _PR_SET_THP_DISABLE, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 38, 41, 24, 47
_PR_SET_KEEPCAPS = 8
_PR_SET_MM_MAP = 14
_SS_ONSTACK = 1
_CAP_VERSION_3 = 0x20080522
_RLIMITS = 16
_ITIMER_REAL = 0
_DEFAULT_ACTION = bytes(32)
_DEFAULT_SLACK = 50_000
_LAST_CAP = int(read_text("/proc/sys/kernel/cap_last_cap"))


@dataclass(slots=True)
class TaskState:
    """All records of one task."""

    task: Task
    cpu: Cpu | None = None
    pending: list[SigPending] = field(default_factory=list)
    restart_block: RestartBlock | None = None


class TaskRestore:
    """Collects the records of tasks and applies them to shells."""

    def __init__(self, open_path: Callable[[str, int], int], *, own_root: bool) -> None:
        """`open_path(path, flags)`: a descriptor of ours for a path in the tree's file system.
        `own_root`: that file system is the one that the shells see."""
        self._open_path = open_path
        self._own_root = own_root
        self._shaped: dict[int, tuple[Mm, str]] = {}
        self.tasks: dict[int, TaskState] = {}
        self._creds: dict[int, Cred] = {}
        self._fs: dict[int, Fs] = {}
        self._sighands: dict[int, Sighand] = {}
        self._signals: dict[int, Signal] = {}

    def record(self, rec: object) -> bool:
        """Take a record; False if it is none of a task's."""
        match rec:
            case Task():
                self.tasks[rec.pid] = TaskState(rec)
            case Cpu():
                self.tasks[rec.pid].cpu = rec
            case SigPending():
                self.tasks[rec.pid].pending.append(rec)
            case RestartBlock():
                self.tasks[rec.pid].restart_block = rec
            case Cred():
                self._creds[rec.objref] = rec
            case Fs():
                self._fs[rec.objref] = rec
            case Sighand():
                self._sighands[rec.objref] = rec
            case Signal():
                self._signals[rec.objref] = rec
            case _:
                return False
        return True

    # ------------------------------------------------------------------ the process

    def shape(self, shell: Shell, mm: Mm, exe: str) -> None:
        """What /proc shows of a program: its file, arguments, environment. Can come again."""
        before = self._shaped.get(shell.vpid)
        self._shaped[shell.vpid] = mm, exe
        calls: list[Call] = []
        fd = -1
        if before is None or before[1] != exe:
            ours = self._open_path(exe, os.O_RDONLY)
            try:
                (fd,) = shell.receive([ours])
            finally:
                os.close(ours)
            calls = [(NR["close"], fd)]
        elif before[0] == mm:
            return
        base = shell.remote.data
        # struct prctl_mm_map (include/uapi/linux/prctl.h)
        layout = struct.pack(
            "<11QQIi",
            mm.start_code, mm.end_code, mm.start_data, mm.end_data, mm.start_brk, mm.brk, mm.start_stack,
            mm.arg_start, mm.arg_end, mm.env_start, mm.env_end,
            base + 128, len(mm.auxv), fd,
        )  # fmt: skip
        shell.put(layout.ljust(128, b"\0") + mm.auxv)
        shell.checked([(NR["prctl"], _PR_SET_MM, _PR_SET_MM_MAP, base, 104, 0), *calls], f"taking the shape of {exe}")
        if before is None or before[0].oom_score_adj != mm.oom_score_adj:
            try:
                with open(f"/proc/{shell.pid}/oom_score_adj", "w") as file:
                    file.write(str(mm.oom_score_adj))
            except PermissionError:
                pass  # lowering it wants CAP_SYS_RESOURCE; it is advice to the OOM killer only

    def process(self, shell: Shell, last: list[Call]) -> None:
        """What its threads share: limits, file system, signal actions; then the calls `last`."""
        task = self.tasks[shell.vpid].task
        signal = self._signals[task.signal_objref]
        actions = self._sighands[task.sighand_objref].actions
        if len(actions) != 32 * _NSIG:
            raise RestartFailed(f"pid {shell.vpid}: {len(actions)} bytes of signal actions")
        base = shell.remote.data
        fs = self._fs[task.fs_objref]
        directory, inside = self._file_system(shell, fs)
        limits = struct.pack(
            f"<{2 * len(signal.rlimits)}Q", *[value for limit in signal.rlimits for value in (limit.soft, limit.hard)]
        )
        shell.put(actions + limits + directory)
        limits_at = base + len(actions)
        calls = [
            (call[0], limits_at + len(limits)) if call[0] in (NR["chdir"], NR["chroot"]) else call for call in inside
        ]
        calls.append((NR["umask"], fs.umask))
        for n in range(1, _NSIG + 1):
            at = (n - 1) * 32
            if n not in _UNBLOCKABLE and actions[at : at + 32] != _DEFAULT_ACTION:
                calls.append((NR["rt_sigaction"], n, base + at, 0, 8))
        if task.flags & TaskBits.CHILD_SUBREAPER:
            calls.append((NR["prctl"], _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        if task.flags & TaskBits.THP_DISABLED:
            calls.append((NR["prctl"], _PR_SET_THP_DISABLE, 1, 0, 0, 0))
        first_limit = len(calls)
        nr_limits = min(len(signal.rlimits), _RLIMITS)
        calls += [(NR["prlimit64"], 0, which, limits_at + 16 * which, 0) for which in range(nr_limits)]
        results = shell.call_batch(calls + last)
        for at, (call, result) in enumerate(zip(calls + last, results, strict=True)):
            if not -4096 < result < 0:
                continue
            which = at - first_limit
            if 0 <= which < nr_limits:
                if not self._limit_is(shell, which, signal):
                    raise RestartFailed(
                        f"pid {shell.vpid}: resource limit {which} cannot be set to"
                        f" {signal.rlimits[which].soft}/{signal.rlimits[which].hard}: {os.strerror(-result)}",
                        hint="raise the agent's own hard limit on this host (it lacks CAP_SYS_RESOURCE)",
                    )
                continue
            about = f"{fs.cwd}: " if call[0] in (NR["chdir"], NR["fchdir"], NR["chroot"]) else ""
            raise RestartFailed(f"pid {shell.vpid}: {about}{name_of(call[0])}: {os.strerror(-result)}")

    @staticmethod
    def _limit_is(shell: Shell, which: int, signal: Signal) -> bool:
        at = shell.put(bytes(16))
        shell.checked([(NR["prlimit64"], 0, which, 0, at)], "reading a limit")
        have = struct.unpack("<QQ", shell.remote.get(16))
        return have == (signal.rlimits[which].soft, signal.rlimits[which].hard)

    def _file_system(self, shell: Shell, fs: Fs) -> tuple[bytes, list[Call]]:
        """(a path, calls): the path stands where chdir() or chroot() in `calls` look for it."""
        if fs.root == "/" and self._own_root:
            return os.fsencode(fs.cwd) + b"\0", [(NR["chdir"], 0)]
        fds = [self._open_path(fs.cwd, os.O_PATH | os.O_DIRECTORY)]
        if fs.root != "/":
            fds.insert(0, self._open_path(fs.root, os.O_PATH | os.O_DIRECTORY))
        try:
            numbers = shell.receive(fds)
        finally:
            for fd in fds:
                os.close(fd)
        calls: list[Call] = []
        if fs.root != "/":
            calls += [(NR["fchdir"], numbers[0]), (NR["chroot"], 0)]
        calls.append((NR["fchdir"], numbers[-1]))
        calls += [(NR["close"], n) for n in numbers]
        return b".\0", calls

    # ------------------------------------------------------------------ the threads

    def threads(self, shell: Shell) -> None:
        """What each thread has of its own, set from inside; all threads at the same time."""
        group: list[tuple[ShellThread, TaskState]] = []
        for thread in shell.threads.values():
            state = self.tasks[thread.vtid]
            self._from_outside(thread, state.task)
            group.append((thread, state))
        for first in range(0, len(group), 64):
            self._thread_batches(shell, group[first : first + 64])
        if len(group) > 1:  # another thread's change of credentials may have cleared it
            shell.checked([self._dumpable(shell)], "dumpable")

    def _dumpable(self, shell: Shell) -> Call:
        dumpable = 0 if self.tasks[shell.vpid].task.flags & TaskBits.NOT_DUMPABLE else 1
        return (NR["prctl"], _PR_SET_DUMPABLE, dumpable, 0, 0, 0)

    @staticmethod
    def _from_outside(thread: ShellThread, task: Task) -> None:
        tid = thread.tid
        try:
            if (task.sched_policy, task.sched_priority) != (0, 0):
                os.sched_setscheduler(tid, task.sched_policy, os.sched_param(task.sched_priority))
            if task.nice:
                os.setpriority(os.PRIO_PROCESS, tid, task.nice)
            mask = int.from_bytes(task.affinity, "little")
            cpus = {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1}
            here = _affinity()
            if cpus & here and not here <= cpus:
                os.sched_setaffinity(tid, cpus & here)
        except PermissionError as error:
            raise RestartFailed(f"tid {task.pid}: scheduling parameters: {error}") from error

    def _thread_batches(self, shell: Shell, group: list[tuple[ShellThread, TaskState]]) -> None:
        data = b""
        tables: list[list[Call]] = []
        base = shell.remote.data
        for thread, state in group:
            blob, calls = self._thread_calls(state, base + len(data))
            if thread.vtid == shell.vpid:
                calls.append(self._dumpable(shell))
            data += blob.ljust(-(-len(blob) // 8) * 8, b"\0")
            tables.append(calls)
        shell.put(data)
        at = base + ((len(data) + 63) & ~63)
        starts = []
        packed = b""
        for calls in tables:
            starts.append(at + len(packed))
            packed += pack_calls(calls)
        memory.write(shell.pid, at, packed)
        for (thread, _), start, calls in zip(group, starts, tables, strict=True):
            ptrace.set_sigmask(thread.tid, ~(1 << 22) & arch.MINUS_ONE)
            arch.start_batch(thread.tid, arch.get_regs(thread.tid), shell.remote.scratch, start, len(calls), 23, 0)
            ptrace.cont(thread.tid)
        for thread, _ in group:
            while ptrace.stop_event(status := ptrace.wait(thread.tid)) == ptrace.EVENT_STOP:
                ptrace.cont(thread.tid)
            if not ptrace.is_stop(status) or ptrace.stop_signal(status) != 23:
                raise RestartFailed(f"tid {thread.vtid} stopped with {status:#x} while it was set up")
        raw = memory.read(shell.pid, at, len(packed))
        results = struct.unpack(f"<{len(packed) // 8}q", raw)[7::8]
        position = 0
        for (thread, _), calls in zip(group, tables, strict=True):
            for call in calls:
                result = results[position]
                position += 1
                if -4096 < result < 0:
                    raise RestartFailed(
                        f"tid {thread.vtid}: {name_of(call[0])}{tuple(call[1:])}: {os.strerror(-result)}"
                    )

    def _thread_calls(self, state: TaskState, at: int) -> tuple[bytes, list[Call]]:
        task = state.task
        # a thread that is on its alternate stack cannot say so to the kernel: its stack pointer does
        flags = task.altstack_flags & ~_SS_ONSTACK
        blob = struct.pack("<QixxxxQ", task.altstack_sp, flags, task.altstack_size)
        name_at = at + len(blob)
        blob += task.comm.encode("utf-8", "surrogateescape")[:15].ljust(16, b"\0")
        calls: list[Call] = [
            (NR["set_tid_address"], task.clear_child_tid),
            (NR["prctl"], _PR_SET_NAME, name_at, 0, 0, 0),
            (NR["sigaltstack"], at, 0),
        ]
        if task.robust_list:
            calls.append((NR["set_robust_list"], task.robust_list, task.robust_len))
        if task.rseq_ptr:
            calls.append((NR["rseq"], task.rseq_ptr, task.rseq_len, 0, task.rseq_sig))
        if task.personality:
            calls.append((NR["personality"], task.personality))
        if task.ioprio:
            calls.append((NR["ioprio_set"], 1, 0, task.ioprio))
        if task.timerslack and task.timerslack != _DEFAULT_SLACK:
            calls.append((NR["prctl"], _PR_SET_TIMERSLACK, task.timerslack, 0, 0, 0))
        cred = self._creds[task.cred_objref]
        more, extra = _cred_calls(cred, at + len(blob))
        blob += more
        calls += extra
        if task.flags & TaskBits.NO_NEW_PRIVS:
            calls.append((NR["prctl"], _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        if task.pdeath_signal:
            calls.append((NR["prctl"], _PR_SET_PDEATHSIG, task.pdeath_signal, 0, 0, 0))
        return blob, calls

    # ------------------------------------------------------------------ the last steps

    def timers(self, shell: Shell) -> None:
        """Start the clocks: interval timers and POSIX timers, with what was left of them."""
        signal = self._signals[self.tasks[shell.vpid].task.signal_objref]
        base = shell.remote.data
        blob = b""
        calls: list[Call] = []
        for which, timer in enumerate(signal.itimers[:3]):
            value = timer.value
            if which == _ITIMER_REAL and not value:  # it waits for its SIGALRM to be taken, to begin anew
                value = timer.interval
            if value:
                blob += _timeval_pair(timer.interval, value)
                calls.append((NR["setitimer"], which, base + len(blob) - 32, 0))
        if calls:
            shell.put(blob)
            shell.checked(calls, "interval timers")
        self._posix_timers(shell, signal)

    def _posix_timers(self, shell: Shell, signal: Signal) -> None:
        """timer_create(2) gives out ids by itself, counting up: unwanted ones are deleted again."""
        base = shell.remote.data
        following = 0
        for timer in sorted(signal.timers, key=lambda t: t.timer_id):
            # struct sigevent: value, signo, notify, tid
            event = struct.pack("<QiiI", timer.sigval, timer.signo, timer.notify, timer.tid & 0xFFFFFFFF)
            spec = struct.pack("<4q", *divmod(timer.interval, 10**9), *divmod(timer.value, 10**9))
            shell.put(event.ljust(64, b"\0") + spec + bytes(8))
            made = -1
            while following <= timer.timer_id:
                shell.checked([(NR["timer_create"], timer.clock, base, base + 96)], "POSIX timer")
                (made,) = struct.unpack("<i", shell.remote.get(4, 96))
                if made != timer.timer_id:
                    shell.checked([(NR["timer_delete"], made)], "POSIX timer")
                if made > timer.timer_id:
                    break
                following = made + 1
            if made != timer.timer_id:
                raise RestartFailed(f"pid {shell.vpid}: POSIX timer {timer.timer_id} came out as {made}")
            if timer.value or timer.interval:
                shell.checked([(NR["timer_settime"], made, 0, base + 64, 0)], "POSIX timer")

    def pending(self, shell: Shell) -> None:
        """Queue the signals that waited. They stay blocked until the registers are set."""
        for thread in shell.threads.values():
            for rec in self.tasks[thread.vtid].pending:
                self._queue(shell, thread, rec)

    @staticmethod
    def _queue(shell: Shell, thread: ShellThread, rec: SigPending) -> None:
        base = shell.remote.data
        for at in range(0, len(rec.infos) - 127, 128):
            info = rec.infos[at : at + 128]
            (signo,) = struct.unpack_from("<i", info)
            shell.put(info)
            if rec.shared:
                call: Call = (NR["rt_sigqueueinfo"], shell.vpid, signo, base)
            else:
                call = (NR["rt_tgsigqueueinfo"], shell.vpid, thread.vtid, signo, base)
            if signo == 23:  # the one that ends a batch: queued from outside instead
                os.kill(shell.pid, signo)
                continue
            shell.remote.tid = thread.tid
            try:
                shell.checked([call], f"pending signal {signo}")
            finally:
                shell.remote.tid = shell.pid

    def registers(self, shell: Shell) -> dict[int, arch.Regs]:
        """Extended state and masks set; the registers that each thread is to resume with, by tid."""
        out = {}
        for thread in shell.threads.values():
            state = self.tasks[thread.vtid]
            if state.cpu is None or len(state.cpu.regs) != arch.REGS_SIZE:
                raise RestartFailed(f"tid {thread.vtid}: no registers in the image")
            try:
                arch.set_xstate(thread.tid, state.cpu.xstate)
            except OSError as error:
                raise RestartFailed(
                    f"tid {thread.vtid}: extended state of {len(state.cpu.xstate)} bytes: {error}",
                    hint="the processors differ: `migrator check` compares them before anything is stopped",
                ) from error
            regs = arch.Regs.from_buffer_copy(state.cpu.regs)
            out[thread.tid] = replay.resumed(shell, thread, state.restart_block, regs)
        return out

    def finish(self, shell: Shell) -> None:
        """Take the scratch area away and put every thread where it was. Nothing runs yet."""
        final = self.registers(shell)
        remote = shell.remote
        ptrace.set_sigmask(shell.pid, replay.ALL_BUT_TRAP)
        with remote.borrowed():
            remote.unmap_scratch()
        for thread in shell.threads.values():
            arch.set_regs(thread.tid, final[thread.tid])
            ptrace.set_sigmask(thread.tid, self.tasks[thread.vtid].task.blocked)


@functools.cache
def _affinity() -> set[int]:
    return os.sched_getaffinity(0)


def _cred_calls(cred: Cred, at: int) -> tuple[bytes, list[Call]]:
    """System calls that give the calling thread its credentials, beginning as root with all it can have."""
    inside: list[Call] = []
    for cap in range(_LAST_CAP + 1):
        if not cred.cap_bounding >> cap & 1:
            inside.append((NR["prctl"], _PR_CAPBSET_DROP, cap, 0, 0, 0))
    groups = struct.pack(f"<{len(cred.groups)}I", *[g.gid for g in cred.groups])
    groups = groups.ljust(-(-len(groups) // 8) * 8, b"\0")
    header = struct.pack("<Ii", _CAP_VERSION_3, 0)
    sets = (cred.cap_effective, cred.cap_permitted, cred.cap_inheritable)
    low = struct.pack("<3I", *[s & 0xFFFFFFFF for s in sets])
    high = struct.pack("<3I", *[s >> 32 & 0xFFFFFFFF for s in sets])
    blob = groups + header + low + high
    capabilities = at + len(groups)
    plain_root = (cred.uid, cred.euid, cred.suid, cred.fsuid, cred.gid, cred.egid, cred.sgid, cred.fsgid) == (0,) * 8
    calls: list[Call] = [(NR["setgroups"], len(cred.groups), at)]
    calls += inside
    if not plain_root:
        calls += [
            (NR["prctl"], _PR_SET_KEEPCAPS, 1, 0, 0, 0),
            (NR["setresgid"], cred.gid, cred.egid, cred.sgid),
            (NR["setresuid"], cred.uid, cred.euid, cred.suid),
        ]
        if cred.fsgid != cred.egid:
            calls.append((NR["setfsgid"], cred.fsgid))
        if cred.fsuid != cred.euid:
            calls.append((NR["setfsuid"], cred.fsuid))
    calls.append((NR["capset"], capabilities, capabilities + 8))
    if not plain_root:
        calls.append((NR["prctl"], _PR_SET_KEEPCAPS, 0, 0, 0, 0))
    for cap in range(_LAST_CAP + 1):
        if cred.cap_ambient >> cap & 1:
            calls.append((NR["prctl"], _PR_CAP_AMBIENT, 2, cap, 0, 0))
    if cred.securebits:
        calls.append((NR["prctl"], _PR_SET_SECUREBITS, cred.securebits, 0, 0, 0))
    return blob, calls


def _timeval_pair(interval_us: int, value_us: int) -> bytes:
    return struct.pack("<4q", *divmod(interval_us, 10**6), *divmod(value_us, 10**6))
