"""The tree of stubs on the destination: processes with their pids, parents, sessions and groups.

Children are cloned by their parents, inside them, so that every relation is the kernel's own, and so that memory
that they have in common is shared as it was: a process is cloned when its memory is about to come, which is after
that of its parent. A child that is in the session its parent was born into is made earlier, before the parent begins
one of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Callable

from migrator.engine.clocks import Offsets, within
from migrator.engine.spawn import CLONE_ARGS_SIZE, clone_args, spawn, spawn_error
from migrator.engine.user.restore.stub import Stub, StubThread, await_birth
from migrator.errors import RestartFailed
from migrator.image.records import Task, TaskFlag, TaskPids, Tree
from migrator.linux import memory, procfs, ptrace
from migrator.linux import x86_64 as arch
from migrator.linux.remote import pack_calls

NR = arch.NR
_PR_SET_NAME, _RLIMIT_CORE = 15, 4
_CLONE_PTRACE, _CLONE_PARENT = 0x2000, 0x8000
_THREAD_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000 | _CLONE_PTRACE
_SIGCHLD_SET = 1 << (signal.SIGCHLD - 1)


class StubTree:
    """All stubs, by vpid. `root` is the first."""

    def __init__(self, namespaces: int, cloned: Callable[[Stub, Stub], None]) -> None:
        """`cloned(parent, child)` is told of each that is cloned."""
        self._cloned = cloned
        self.stubs: dict[int, Stub] = {}
        self.zombies: dict[int, Stub] = {}  # to be ended once their groups are set, or ended already
        self._namespaces = namespaces
        self._born_into: dict[int, int] = {}  # session that a stub was born into, by vpid
        self._session: dict[int, int] = {}
        self._group: dict[int, int] = {}
        self._outside = 0  # the session that the saved root's was outside of the tree
        self.root: Stub | None = None
        self._wanted: dict[int, TaskPids] = {}  # processes of the tree as it came last, by vpid
        self._children: dict[int, list[TaskPids]] = {}  # and those of each
        self._threads: dict[int, list[int]] = {}  # and threads

    # ------------------------------------------------------------------ building

    def grow_root(self, tree: Tree, clocks: Offsets | None = None) -> Stub:
        """Make the root's stub: the only one that is a child of ours. All others have its clocks."""
        first = tree.tasks[0]
        pid, pidfd = within(clocks, lambda: spawn([first.pid], self._namespaces))
        try:
            ptrace.seize(pid, ptrace.O_EXITKILL | ptrace.O_TRACESYSGOOD)
            ptrace.interrupt(pid)
            await_birth(pid)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, ptrace.WALL)
            os.close(pidfd)
            raise
        self.root = Stub(pid, first.pid, pidfd)
        self.stubs[first.pid] = self.root
        self.root.occupy()
        self._session[first.pid] = self._born_into[first.pid] = first.sid if first.sid != first.pid else -1
        self._outside = first.sid
        self._group[first.pid] = -1
        return self.root

    def apply(self, tree: Tree) -> None:
        """Make the stubs agree with `tree`: the ended are removed, the missing made by grow() and complete().

        A zombie has a stub like any other, which makes its session and group the kernel's own."""
        wanted = {t.pid: t for t in tree.tasks if not t.flags & TaskFlag.THREAD}
        for vpid in [v for v in self.stubs if v not in wanted]:
            self._remove(self.stubs.pop(vpid))
        for vpid in [v for v in self.zombies if v not in wanted or not wanted[v].flags & TaskFlag.ZOMBIE]:
            self._remove(self.zombies.pop(vpid))
        for vpid in [v for v in self.stubs if wanted[v].flags & TaskFlag.ZOMBIE]:
            self._apply_threads(self.stubs[vpid], [])
            self.zombies[vpid] = self.stubs.pop(vpid)
        if self.root is None or self.root.vpid not in self.stubs:
            raise RestartFailed("the root task ended before the freeze", hint="there is nothing left to migrate")
        self._wanted, self._children, self._threads = wanted, {}, {}
        for task in wanted.values():
            if not task.flags & TaskFlag.ORPHAN and task.pid != task.ppid:
                self._children.setdefault(task.ppid, []).append(task)
        for task in tree.tasks:
            if task.flags & TaskFlag.THREAD:
                self._threads.setdefault(task.tgid, []).append(task.pid)
        for vpid in list(self.stubs):
            self._begin(vpid)

    def grow(self, vpid: int) -> Stub | None:
        """The stub of a process, made if it is missing, and its parents before it; None if it is not in the tree."""
        missing: list[TaskPids] = []  # and not by recursion: a chain may be long
        at = vpid
        while not self._has(at):
            task = self._wanted.get(at)
            if task is None or len(missing) > len(self._wanted):
                return None
            missing.append(task)
            at = self._maker(task)
        for task in reversed(missing):
            if not self._has(task.pid):
                if self._maker(task) in self.zombies:
                    return None
                self._make(task)
        return self.stubs.get(vpid)

    def complete(self) -> None:
        """Make all that are still missing: those of which no memory came, or that have ended."""
        for vpid, task in self._wanted.items():
            if task.flags & TaskFlag.ZOMBIE:
                if not task.flags & TaskFlag.ORPHAN:
                    self.grow(vpid)
            elif self.grow(vpid) is None:
                raise RestartFailed(f"pid {vpid}: its parent {task.ppid} is not in the tree")

    def _has(self, vpid: int) -> bool:
        return vpid in self.stubs or vpid in self.zombies

    def _maker(self, task: TaskPids) -> int:
        """Who clones a process: its parent, or for one whose parent is outside of the tree the root, as a sibling."""
        assert self.root is not None
        return self.root.vpid if task.flags & TaskFlag.ORPHAN else task.ppid

    def _make(self, task: TaskPids) -> None:
        """Clone a process inside its maker, which is in the session that it will be in."""
        maker = self._maker(task)
        extra = _CLONE_PARENT if task.flags & TaskFlag.ORPHAN else 0
        if task.sid in (task.pid, self._session[maker]):
            self._clone(maker, task, extra)
        else:
            siblings = [task] if extra else [c for c in self._children[maker] if c.sid == task.sid]
            self._clone_into_session(maker, task, siblings, extra)
            for sibling in siblings:
                if sibling.pid in self.stubs and sibling is not task:
                    self._begin(sibling.pid)
        if task.pid in self.stubs:
            self._begin(task.pid)

    def _begin(self, vpid: int) -> None:
        """What a new stub does before anything else: children that are in the session it was born into, which it
        leaves then, and its threads. Those that have ended as well: they need not hold what it will have mapped."""
        below = [vpid]
        while below:
            vpid = below.pop()
            task, session = self._wanted[vpid], self._session[vpid]
            children = [c for c in self._children.get(vpid, []) if not self._has(c.pid)]
            if task.sid == vpid and session != vpid:
                for child in [c for c in children if c.sid == session]:
                    self._clone(vpid, child)
                    if child.pid in self.stubs:
                        below.append(child.pid)
                self.stubs[vpid].checked([(NR["setsid"],)], "setsid")
                self._session[vpid] = self._group[vpid] = vpid
            for child in children:
                if not self._has(child.pid) and child.flags & TaskFlag.ZOMBIE:
                    self._make(child)
            self._apply_threads(self.stubs[vpid], self._threads.get(vpid, []))

    def _clone(self, parent_vpid: int, child: TaskPids, extra: int = 0) -> None:
        """Clone `child` inside its parent; it comes stopped and traced."""
        self._add(child, self._clone_raw(self.stubs[parent_vpid], child, extra))
        self._session[child.pid] = self._born_into[child.pid] = self._session[parent_vpid]
        self._group[child.pid] = self._group[parent_vpid]
        if child.flags & TaskFlag.ZOMBIE and child.sid == child.pid:
            self.zombies[child.pid].checked([(NR["setsid"],)], "setsid")
            self._session[child.pid] = self._group[child.pid] = child.pid

    def _add(self, task: TaskPids, stub: Stub) -> None:
        (self.zombies if task.flags & TaskFlag.ZOMBIE else self.stubs)[task.pid] = stub

    def _clone_raw(self, parent: Stub, task: TaskPids, extra: int = 0, *, helper: bool = False) -> Stub:
        vpid = task.pid
        base = parent.remote.data
        # a sibling ends with the signal that its maker ends with
        exit_signal = 0 if extra & _CLONE_PARENT else int(signal.SIGCHLD)
        args = clone_args(
            _CLONE_PTRACE | extra, exit_signal=exit_signal, set_tid=base + CLONE_ARGS_SIZE, set_tid_size=1
        )
        parent.put(args + struct.pack("<i4x", vpid))
        (result,) = parent.call_batch([(NR["clone3"], base, CLONE_ARGS_SIZE)])
        if result < 0:
            raise spawn_error(-result, [vpid])
        pid = self._outer_pid(parent, vpid, bool(extra & _CLONE_PARENT))
        await_birth(pid)
        stub = Stub(pid, vpid, os.pidfd_open(pid))
        if helper:
            stub.inherit_to_hand_on(parent)
        elif task.flags & TaskFlag.ZOMBIE:
            stub.inherit_pid(parent)
        else:
            stub.inherit(parent)
        self._cloned(parent, stub)
        return stub

    def _outer_pid(self, parent: Stub, vpid: int, sibling: bool) -> int:
        if parent.pid == parent.vpid and not self._namespaces:
            return vpid
        above = int(procfs.status(parent.pid)["PPid"]) if sibling else parent.pid
        for pid in reversed(procfs.children(above)):
            if procfs.ns_pid(procfs.status(pid)) == vpid:
                return pid
        raise RestartFailed(f"pid {vpid} was cloned and cannot be found")

    def _clone_into_session(self, parent_vpid: int, child: TaskPids, siblings: list[TaskPids], extra: int = 0) -> None:
        """A session whose leader has ended: a helper leads it for as long as it takes to clone its members."""
        parent = self.stubs[parent_vpid]
        helper = self._clone_raw(parent, _helper(child.sid), extra, helper=True)
        try:
            helper.checked([(NR["setsid"],)], "setsid")
            for member in siblings:
                if self._has(member.pid):
                    continue
                self._add(member, self._clone_raw(helper, member, _CLONE_PARENT))
                self._session[member.pid] = self._born_into[member.pid] = child.sid
                self._group[member.pid] = child.sid
        finally:
            self._end_helper(parent, helper, reap=not extra)

    def _end_helper(self, parent: Stub, helper: Stub, *, reap: bool) -> None:
        helper.close()
        os.kill(helper.pid, signal.SIGKILL)
        os.waitpid(helper.pid, ptrace.WALL)
        if reap:
            parent.call_batch([(NR["wait4"], helper.vpid, 0, 0, 0)])
            self._forget_sigchld(parent)

    @staticmethod
    def _forget_sigchld(stub: Stub) -> None:
        """Take the SIGCHLD of a helper's or zombie's end out of the queue: the program never had it."""
        base = stub.put(struct.pack("<QQQ", _SIGCHLD_SET, 0, 0))
        stub.call_batch([(NR["rt_sigtimedwait"], base, 0, base + 8, 8)] * 2)

    # ------------------------------------------------------------------ threads

    def _apply_threads(self, stub: Stub, wanted: list[int]) -> None:
        for vtid in [v for v in stub.threads if v != stub.vpid and v not in wanted]:
            self._end_thread(stub, vtid)
        new = [v for v in wanted if v not in stub.threads]
        for first in range(0, len(new), 256):
            self._clone_threads(stub, new[first : first + 256])

    def _clone_threads(self, stub: Stub, vtids: list[int]) -> None:
        base = stub.remote.data
        size = CLONE_ARGS_SIZE + 8
        blob, calls = b"", []
        for i, vtid in enumerate(vtids):
            at = base + i * size
            blob += clone_args(_THREAD_FLAGS, set_tid=at + CLONE_ARGS_SIZE, set_tid_size=1)
            blob += struct.pack("<i4x", vtid)
            calls.append((NR["clone3"], at, CLONE_ARGS_SIZE))
        stub.put(blob)
        for vtid, result in zip(vtids, stub.call_batch(calls), strict=True):
            if result < 0:
                raise spawn_error(-result, [vtid])
        outer = {v: v for v in vtids}
        if self._namespaces or stub.pid != stub.vpid:
            outer = {}
            for tid in procfs.tids(stub.pid):
                outer[procfs.ns_pid(procfs.status(stub.pid, tid))] = tid
        for vtid in vtids:
            await_birth(outer[vtid])
            stub.threads[vtid] = StubThread(outer[vtid], vtid)

    @staticmethod
    def _end_thread(stub: Stub, vtid: int) -> None:
        thread = stub.threads.pop(vtid)
        regs = arch.get_regs(thread.tid)
        regs.r8 = 0
        # exit(0) of this thread alone: a batch of one call from which it does not return
        table = stub.remote.table
        memory.write(stub.pid, table, pack_calls([(NR["exit"], 0)]))
        arch.start_batch(thread.tid, regs, stub.remote.scratch, table, 1, int(signal.SIGURG), 0)
        ptrace.cont(thread.tid)
        while ptrace.is_stop(ptrace.wait(thread.tid)):
            ptrace.cont(thread.tid)

    # ------------------------------------------------------------------ endings

    def _remove(self, stub: Stub) -> None:
        stub.close()
        os.kill(stub.pid, signal.SIGKILL)
        for thread in reversed(list(stub.threads.values())):
            try:
                while ptrace.is_stop(os.waitpid(thread.tid, ptrace.WALL)[1]):
                    pass
            except ChildProcessError:
                continue
        for other in self.stubs.values():  # its parent reaps it; others have no such child
            other.call_batch([(NR["wait4"], stub.vpid, 0, 1, 0)])
            self._forget_sigchld(other)

    def set_groups(self, tree: Tree) -> None:
        """Process groups, once all processes are there."""
        tasks = [t for t in tree.tasks if self._has(t.pid) and not t.flags & TaskFlag.THREAD]
        for task in tasks:
            if task.pgid == task.pid and self._group[task.pid] != task.pid:
                self._set_group(task.pid, task.pid)
        for task in tasks:
            if task.pgid in (0, self._group[task.pid]):
                continue
            if task.pgid in self._group and self._has(task.pgid) and self._group[task.pgid] == task.pgid:
                self._set_group(task.pid, task.pgid)
            elif self._known_outside(task):
                continue
            else:
                self._group_of_ended(task, [t for t in tasks if t.pgid == task.pgid])

    def _known_outside(self, task: TaskPids) -> bool:
        # the root was in a group of whoever started it, and so were those that stayed in it
        assert self.root is not None
        return self._group[task.pid] == -1 and task.sid in (self._outside, self.root.vpid)

    def _set_group(self, vpid: int, pgid: int) -> None:
        stub = self.stubs.get(vpid) or self.zombies[vpid]
        stub.checked([(NR["setpgid"], 0, pgid)], f"setpgid to {pgid}")
        self._group[vpid] = pgid

    def _group_of_ended(self, task: TaskPids, members: list[TaskPids]) -> None:
        # a zombie is asked as well: as its parent it would have to be there for longer
        parent = self.stubs.get(task.pid) or self.zombies[task.pid]
        helper = self._clone_raw(parent, _helper(task.pgid), helper=True)
        try:
            helper.checked([(NR["setpgid"], 0, 0)], "setpgid")
            for member in members:
                self._set_group(member.pid, task.pgid)
        finally:
            self._end_helper(parent, helper, reap=True)

    def make_zombies(self, tasks: dict[int, Task], parents: dict[int, int]) -> None:
        """End those that are to be zombies as they ended: `tasks` has their names and exit codes."""
        for vpid, stub in self.zombies.items():
            parent, task = self.stubs.get(parents[vpid]), tasks[vpid]
            if parent is None:
                raise RestartFailed(f"pid {vpid} has ended, and its parent {parents[vpid]} is not in the tree")
            code, name = task.exit_code, stub.put(task.comm.encode("utf-8", "surrogateescape")[:15].ljust(32, b"\0"))
            no_core = name + 16
            stub.checked(
                [(NR["prctl"], _PR_SET_NAME, name, 0, 0, 0), (NR["prlimit64"], 0, _RLIMIT_CORE, no_core, 0)],
                "naming a zombie",
            )
            if code & 0x7F:
                _die_by(stub, code & 0x7F)
            else:
                regs = arch.get_regs(stub.pid)
                call = pack_calls([(NR["exit_group"], code >> 8 & 0xFF)])
                memory.write(stub.pid, stub.remote.table, call)
                arch.start_batch(stub.pid, regs, stub.remote.scratch, stub.remote.table, 1, int(signal.SIGURG), 0)
                ptrace.cont(stub.pid)
                while ptrace.is_stop(ptrace.wait(stub.pid)):
                    ptrace.cont(stub.pid)
            self._forget_sigchld(parent)

    def kill(self) -> None:
        """Discard: kill everything and reap it."""
        every = [*self.stubs.values(), *self.zombies.values()]
        for stub in reversed(every):
            try:
                os.kill(stub.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        left = {tid for stub in every for tid in (stub.pid, *(t.tid for t in stub.threads.values()))}
        # In no fixed order: the last thread of the init of a pid namespace does not end before all others have been
        # collected (zap_pid_ns_processes()), and any of them may be that one.
        while left:
            gone = {tid for tid in left if _collected(tid)}
            left -= gone
            if not gone:
                time.sleep(0.0005)
        self.close()

    def close(self) -> None:
        for stub in (*self.stubs.values(), *self.zombies.values()):
            stub.close()
        self.stubs.clear()
        self.zombies.clear()


def _helper(pid: int) -> TaskPids:
    """A process that is there for a moment, to lead a session or group whose leader has ended."""
    return TaskPids(pid, pid, 0, 0, 0, int(TaskFlag.ZOMBIE))


def _die_by(stub: Stub, signum: int) -> None:
    """Have a stub killed by a signal. Its actions are the default ones; its mask has blocked nearly all."""
    ptrace.set_sigmask(stub.pid, 0)
    os.kill(stub.pid, signum)
    with contextlib.suppress(ProcessLookupError):  # SIGKILL does not wait
        ptrace.cont(stub.pid)
    while ptrace.is_stop(status := ptrace.wait(stub.pid)):
        got = ptrace.stop_signal(status)
        ptrace.cont(stub.pid, got if got == signum and not ptrace.stop_event(status) else 0)


def _collected(tid: int) -> bool:
    """Whether a task that was killed has ended and nobody needs to wait for it any more."""
    try:
        pid, status = os.waitpid(tid, ptrace.WALL | os.WNOHANG)
    except ChildProcessError:
        return True
    return pid != 0 and not ptrace.is_stop(status)
