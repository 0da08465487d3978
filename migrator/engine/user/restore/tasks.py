"""Tasks on the destination: everything of a task but its memory and descriptors, in the right order.

Credentials come last: what is done before them needs the rights of root. Signals stay blocked until the
registers are in place, so that nothing is delivered to a half-built task.
"""

from __future__ import annotations

import functools
import os
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from signal import SIGKILL, SIGSTOP, SIGURG

from migrator.engine.user.restore import restart_blocks, task_setup
from migrator.engine.user.restore.backing import Program
from migrator.engine.user.restore.stub import Stub, StubThread
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
    TaskFlag,
    Tree,
)
from migrator.image.records import TaskState as SavedState
from migrator.linux import ptrace, sys
from migrator.linux import x86_64 as arch
from migrator.linux.remote import Call, waiting_signals
from migrator.linux.threads import set_all, set_all_xstates

NR = arch.NR
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_ITIMER_REAL = 0
DELETED = " (deleted)"  # behind what /proc shows of a path that is gone
_DEFAULT_SLACK = 50_000
_SIGNALS_AT_ONCE = 1024
_ENDINGS = (int(SIGURG), *(n for n in range(64, 0, -1) if n not in (SIGKILL, SIGSTOP)))  # of a batch


@dataclass(slots=True)
class TaskState:
    """All records of one task."""

    task: Task
    cpu: Cpu | None = None
    pending: list[SigPending] = field(default_factory=list)
    restart_block: RestartBlock | None = None


class TaskRestore:
    """Collects the records of tasks and applies them to stubs."""

    def __init__(
        self, open_path: Callable[[str, int], int], only_root_leads_to: Callable[[str], bool], *, own_root: bool
    ) -> None:
        """`open_path(path, flags)`: a descriptor of ours for a path in the tree's file system.
        `only_root_leads_to(path)`: whether nobody else can make a directory's path lead elsewhere.
        `own_root`: that file system is the one that the stubs see."""
        self._open_path = open_path
        self._only_root_leads_to = only_root_leads_to
        self._own_root = own_root
        self.passed = 0  # ns by which the tasks' clocks ran on since they were stopped
        self._shaped: dict[int, tuple[Mm, str]] = {}
        self._setups: dict[tuple[int, int], task_setup.TaskSetup] = {}  # by vpid and first vtid
        self._made_from: dict[tuple[int, int], list[object]] = {}  # the records of each
        self._in_place: dict[int, task_setup.TaskSetup] = {}  # by vpid: the one whose tables are in the stub
        self.tasks: dict[int, TaskState] = {}
        self._creds: dict[int, Cred] = {}
        self._plain: dict[str, bool] = {}  # by working directory
        self._fs: dict[int, Fs] = {}
        self._sighands: dict[int, Sighand] = {}
        self._signals: dict[int, Signal] = {}

    def keep(self, tree: Tree) -> None:
        """Forget the pre-dumped state of tasks that are not in the tree any more, or have ended."""
        zombies = {t.pid: bool(t.flags & TaskFlag.ZOMBIE) for t in tree.tasks}
        for pid, state in list(self.tasks.items()):
            if zombies.get(pid) != (state.task.state == SavedState.ZOMBIE):
                del self.tasks[pid]

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

    def cloned(self, parent: Stub, child: Stub) -> None:
        """A stub was cloned, and looks like its parent."""
        self._shaped.pop(child.vpid, None)
        if parent.vpid in self._shaped:
            self._shaped[child.vpid] = self._shaped[parent.vpid]

    def looks_like(self, stub: Stub, program: Program) -> bool:
        """Whether a stub shows a program already, or none: one that is mapped cannot be replaced."""
        before = self._shaped.get(stub.vpid)
        return before is None or before[1] == program.path

    def shape(self, stub: Stub, mm: Mm, program: Program) -> None:
        """What /proc shows of a program: its file, arguments, environment. Can come again."""
        before = self._shaped.get(stub.vpid)
        exe = program.path
        self._shaped[stub.vpid] = mm, exe
        calls: list[Call] = []
        fd = -1
        if before is None or before[1] != exe:
            ours = program.open()
            try:
                (fd,) = stub.receive([ours])
            finally:
                os.close(ours)
            calls = [(NR["close"], fd)]
        elif before[0] == mm:
            return
        base = stub.remote.data
        # struct prctl_mm_map (include/uapi/linux/prctl.h)
        layout = struct.pack(
            "<11QQIi",
            mm.start_code, mm.end_code, mm.start_data, mm.end_data, mm.start_brk, mm.brk, mm.start_stack,
            mm.arg_start, mm.arg_end, mm.env_start, mm.env_end,
            base + 128, len(mm.auxv), fd,
        )  # fmt: skip
        stub.put(layout.ljust(128, b"\0") + mm.auxv)
        stub.checked([(NR["prctl"], _PR_SET_MM, _PR_SET_MM_MAP, base, 104, 0), *calls], f"taking the shape of {exe}")
        if before is None or before[0].oom_score_adj != mm.oom_score_adj:
            try:
                with open(f"/proc/{stub.pid}/oom_score_adj", "w") as file:
                    file.write(str(mm.oom_score_adj))
            except PermissionError:
                pass  # lowering it wants CAP_SYS_RESOURCE; it is advice to the OOM killer only

    def prepare(self, stub: Stub) -> None:
        """Work out ahead what is to be set inside, as far as is known yet. Can come again."""
        state = self.tasks.get(stub.vpid)
        if state is None:
            return
        fs = self._fs.get(state.task.fs_objref)
        if fs is None or not self._is_plain(fs):
            return
        for group in _groups(stub):
            if all(vtid in self.tasks for vtid in group):
                made = self._setup(stub, fs, group)
                if stub.vpid in group and self._in_place.get(stub.vpid) is not made:
                    self._put(stub, made)

    def apply(self, stubs: Sequence[Stub]) -> None:
        """Set everything of the tasks of stubs that is set from inside. No descriptors can be passed after it.

        All stubs work at the same time, each at one of its groups of threads; the leader's comes last."""
        waiting = {stub.vpid: _groups(stub) for stub in stubs}
        while waiting:
            now: list[tuple[Stub, task_setup.TaskSetup]] = []
            for stub in stubs:
                if groups := waiting.get(stub.vpid):
                    made = self._setup(stub, self._fs[self.tasks[stub.vpid].task.fs_objref], groups.pop())
                    if self._in_place.get(stub.vpid) is not made:
                        self._put(stub, made)
                    now.append((stub, made))
                    if not groups:
                        stub.channel_closed()
                        del waiting[stub.vpid]
            task_setup.run([run for _, made in now for run in made.runs(made.others)])
            task_setup.run([run for _, made in now for run in made.runs(made.leader)])
            for stub, made in now:
                self._judge(stub, made)

    def _put(self, stub: Stub, made: task_setup.TaskSetup) -> None:
        self._in_place[stub.vpid] = made
        made.put()

    def _judge(self, stub: Stub, made: task_setup.TaskSetup) -> None:
        part = made.process
        for vtid, call, error in made.failures():
            which = task_setup.limit_of(call)
            if which < 0 or part is None:
                raise RestartFailed(f"tid {vtid}: {task_setup.about(call, part)}: {os.strerror(error)}")
            if not self._limit_is(stub, which, part.limits[which]):
                soft, hard = part.limits[which]
                why = os.strerror(error)
                raise RestartFailed(
                    f"pid {stub.vpid}: resource limit {which} cannot be set to {soft}/{hard}: {why}",
                    hint="raise the agent's own hard limit on this host (it lacks CAP_SYS_RESOURCE)",
                )

    def _process_part(self, stub: Stub, fs: Fs, channel: list[Call]) -> task_setup.ProcessPart:
        task = self.tasks[stub.vpid].task
        signal, sighand = self._signals[task.signal_objref], self._sighands[task.sighand_objref]
        place = self._file_system(stub, fs)
        return task_setup.process_part(task, sighand, signal, fs, place, channel)

    def _setup(self, stub: Stub, fs: Fs, vtids: Sequence[int]) -> task_setup.TaskSetup:
        """The setup batch of a group of threads: the one made last, if it is the same."""
        tasks = [self.tasks[vtid].task for vtid in vtids]
        records: list[object] = [stub, *tasks]
        if leader := vtids[0] == stub.vpid:
            first = tasks[0]
            records += (fs, self._signals[first.signal_objref], self._sighands[first.sighand_objref], stub.channel)
        key = stub.vpid, vtids[0]
        known = self._setups.get(key)
        if known is not None and self._made_from[key] == records and self._is_plain(fs):
            return known
        part = self._process_part(stub, fs, stub.channel) if leader else None
        parts = [task_setup.thread_part(task) for task in tasks]
        if known is None or known.stub is not stub or known.parts != (part, *parts):
            known = self._setups[key] = task_setup.TaskSetup(stub, part, parts, self._creds)
        self._made_from[key] = records
        return known

    @staticmethod
    def _limit_is(stub: Stub, which: int, wanted: tuple[int, int]) -> bool:
        at = stub.put(bytes(16))
        stub.checked([(NR["prlimit64"], 0, which, 0, at)], "reading a limit")
        return struct.unpack("<QQ", stub.remote.get(16)) == wanted

    def _is_plain(self, fs: Fs) -> bool:
        """Whether the stub itself finds both by their names, as root: nobody else can make these lead elsewhere."""
        if fs.root != "/" or not self._own_root or fs.cwd.endswith(DELETED):
            return False
        if fs.cwd not in self._plain:
            try:
                self._plain[fs.cwd] = self._only_root_leads_to(fs.cwd)
            except OSError:
                return False
        return self._plain[fs.cwd]

    def _open_directory(self, path: str) -> int:
        """A working directory. One that was deleted is made where it was, or near, and deleted again."""
        flags = os.O_PATH | os.O_DIRECTORY
        try:
            return self._open_path(path, flags)
        except RestartFailed:
            if not path.endswith(DELETED):
                raise
        folder, name = os.path.split(path.removesuffix(DELETED))
        while True:
            try:
                place = self._open_path(folder or "/", flags)
                break
            except RestartFailed:
                if folder in ("", "/"):
                    raise
                folder = os.path.dirname(folder)
        try:
            try:
                os.mkdir(name, 0o700, dir_fd=place)
            except FileExistsError:
                name = os.path.basename(tempfile.mkdtemp(prefix=".migrator-", dir=f"/proc/self/fd/{place}"))
            made = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
            os.rmdir(name, dir_fd=place)
            return made
        except OSError as error:
            raise RestartFailed(f"{path}, a working directory, cannot be made again: {error}") from error
        finally:
            os.close(place)

    def _file_system(self, stub: Stub, fs: Fs) -> tuple[bytes, list[Call]]:
        """(a path, calls): the path stands where chdir() or chroot() in `calls` look for it."""
        if self._is_plain(fs):
            return os.fsencode(fs.cwd) + b"\0", [(NR["chdir"], 0)]
        fds: list[int] = []
        try:
            if fs.root != "/":
                fds.append(self._open_path(fs.root, os.O_PATH | os.O_DIRECTORY))
            fds.append(self._open_directory(fs.cwd))
            numbers = stub.receive(fds)
        finally:
            for fd in fds:
                os.close(fd)
        calls: list[Call] = []
        if fs.root != "/":
            calls += [(NR["fchdir"], numbers[0]), (NR["chroot"], 0)]
        calls.append((NR["fchdir"], numbers[-1]))
        calls += [(NR["close"], n) for n in numbers]
        return b".\0", calls

    @staticmethod
    def _from_outside(thread: StubThread, task: Task) -> None:
        tid = thread.tid
        try:
            os.sched_setscheduler(tid, task.sched_policy, os.sched_param(task.sched_priority))
            if task.nice:
                os.setpriority(os.PRIO_PROCESS, tid, task.nice)
            cpus = _processors(task.affinity)
            if cpus:
                os.sched_setaffinity(tid, cpus)
            if task.timerslack not in (0, _DEFAULT_SLACK):  # which a change of policy sets back
                with open(f"/proc/{tid}/timerslack_ns", "w") as file:
                    file.write(str(task.timerslack))
        except OSError as error:
            raise RestartFailed(f"tid {task.pid}: scheduling parameters: {error}") from error

    # ------------------------------------------------------------------ the last steps

    def timers(self, stub: Stub) -> None:
        """Start the clocks: interval timers and POSIX timers, with what was left of them."""
        signal = self._signals[self.tasks[stub.vpid].task.signal_objref]
        base = stub.remote.data
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
            stub.put(blob)
            stub.checked(calls, "interval timers")
        self._posix_timers(stub, signal)

    def _posix_timers(self, stub: Stub, signal: Signal) -> None:
        """timer_create(2) gives out ids by itself, counting up: unwanted ones are deleted again."""
        base = stub.remote.data
        following = 0
        for timer in sorted(signal.timers, key=lambda t: t.timer_id):
            # struct sigevent: value, signo, notify, tid
            event = struct.pack("<QiiI", timer.sigval, timer.signo, timer.notify, timer.tid & 0xFFFFFFFF)
            spec = struct.pack("<4q", *divmod(timer.interval, 10**9), *divmod(timer.value, 10**9))
            stub.put(event.ljust(64, b"\0") + spec + bytes(8))
            made = -1
            while following <= timer.timer_id:
                stub.checked([(NR["timer_create"], timer.clock, base, base + 96)], "POSIX timer")
                (made,) = struct.unpack("<i", stub.remote.get(4, 96))
                if made != timer.timer_id:
                    stub.checked([(NR["timer_delete"], made)], "POSIX timer")
                if made > timer.timer_id:
                    break
                following = made + 1
            if made != timer.timer_id:
                raise RestartFailed(f"pid {stub.vpid}: POSIX timer {timer.timer_id} came out as {made}")
            if timer.value or timer.interval:
                stub.checked([(NR["timer_settime"], made, 0, base + 64, 0)], "POSIX timer")

    def pending(self, stub: Stub) -> None:
        """Queue the signals that waited. They stay blocked until the registers are set, and no batch follows: its end
        is a signal too."""
        records = [(t, rec) for t in stub.threads.values() for rec in self.tasks[t.vtid].pending]
        waiting = {signo for _, rec in records for signo in waiting_signals(rec.infos)}
        ending = next((n for n in _ENDINGS if n not in waiting), 0)
        if waiting and not ending:
            raise RestartFailed(f"pid {stub.vpid}: every signal there is waits for it")
        for thread, rec in records:
            stub.remote.tid = thread.tid
            stub.remote.end_batches_by(ending)
            try:
                self._queue(stub, thread, rec)
            finally:
                stub.remote.tid = stub.pid

    def stops(self, stubs: Sequence[Stub]) -> None:
        """Send each SIGSTOP that waited: no mask holds it back, so it waits only as long as nothing runs any more."""
        for stub in stubs:
            for thread in stub.threads.values():
                for rec in self.tasks[thread.vtid].pending:
                    if SIGSTOP not in waiting_signals(rec.infos):
                        continue
                    if rec.shared:
                        os.kill(stub.pid, SIGSTOP)
                    else:
                        sys.libc("tgkill", stub.pid, thread.tid, SIGSTOP, about=f"tid {thread.vtid}")

    @staticmethod
    def _queue(stub: Stub, thread: StubThread, rec: SigPending) -> None:
        infos = rec.infos[: len(rec.infos) - len(rec.infos) % ptrace.SIGINFO_SIZE]
        for start in range(0, len(infos), _SIGNALS_AT_ONCE * ptrace.SIGINFO_SIZE):
            part = infos[start : start + _SIGNALS_AT_ONCE * ptrace.SIGINFO_SIZE]
            base = stub.put(part)
            calls: list[Call] = []
            for at in range(0, len(part), ptrace.SIGINFO_SIZE):
                (signo,) = struct.unpack_from("<i", part, at)
                if signo == SIGSTOP:
                    continue
                if rec.shared:
                    calls.append((NR["rt_sigqueueinfo"], stub.vpid, signo, base + at))
                else:
                    calls.append((NR["rt_tgsigqueueinfo"], stub.vpid, thread.vtid, signo, base + at))
            if calls:
                stub.checked(calls, "pending signals")

    def check(self, stubs: Sequence[Stub]) -> None:
        """Set what of the processor's state might be refused: the extended state of every thread."""
        threads = [thread for stub in stubs for thread in stub.threads.values()]
        states = []
        for thread in threads:
            cpu = self.tasks[thread.vtid].cpu
            if cpu is None or len(cpu.regs) != arch.REGS_SIZE:
                raise RestartFailed(f"tid {thread.vtid}: no registers in the image")
            states.append(cpu.xstate)
        for thread, state, result in zip(
            threads, states, set_all_xstates([t.tid for t in threads], states), strict=True
        ):
            if result < 0:
                raise RestartFailed(
                    f"tid {thread.vtid}: extended state of {len(state)} bytes: {os.strerror(-result)}",
                    hint="the processors differ: `migrator check` compares them before anything is stopped",
                )

    def registers(self, stub: Stub) -> dict[int, arch.Regs]:
        """The registers that each thread is to resume with, by tid."""
        out = {}
        for thread in stub.threads.values():
            state = self.tasks[thread.vtid]
            assert state.cpu is not None
            regs = arch.Regs.from_buffer_copy(state.cpu.regs)
            out[thread.tid] = restart_blocks.resumed(stub, thread, state.restart_block, regs, self.passed)
        return out

    def finish(self, stubs: Sequence[Stub]) -> None:
        """Take the scratch areas away and put every thread where it was. Nothing runs yet."""
        final: dict[int, arch.Regs] = {}
        for stub in stubs:
            final |= self.registers(stub)
        for stub in stubs:
            ptrace.set_sigmask(stub.pid, arch.MINUS_ONE)
            with stub.remote.borrowed():
                stub.remote.begin_unmap()
        for stub in stubs:
            stub.remote.end_unmap()
        threads = [thread for stub in stubs for thread in stub.threads.values()]
        tids = [thread.tid for thread in threads]
        tasks = [self.tasks[thread.vtid].task for thread in threads]
        set_all(tids, [final[tid] for tid in tids], [task.blocked for task in tasks])
        for thread, task in zip(threads, tasks, strict=True):
            self._from_outside(thread, task)


def _groups(stub: Stub) -> list[list[int]]:
    """The threads of a stub, as many at a time as it has room for; the leader is in the first group."""
    vtids = list(stub.threads)
    return [vtids[first : first + task_setup.GROUP] for first in range(0, len(vtids), task_setup.GROUP)]


@functools.cache
def _processors(affinity: bytes) -> frozenset[int]:
    """Those of a mask that are here; none if that is no restriction, or nothing that can be kept to."""
    mask = int.from_bytes(affinity, "little")
    cpus = {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1}
    here = os.sched_getaffinity(0)
    return frozenset() if here <= cpus else frozenset(cpus & here)


def _timeval_pair(interval_us: int, value_us: int) -> bytes:
    return struct.pack("<4q", *divmod(interval_us, 10**6), *divmod(value_us, 10**6))
