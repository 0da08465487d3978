"""The destination side of the user engine: builds as it reads, see migrator.engine.base for its life."""

from __future__ import annotations

import gc
import logging
import os
import signal
import stat
from collections.abc import Callable
from contextlib import ExitStack

from migrator.engine import clocks, spawn
from migrator.engine.base import DestinationOptions, LateLock, Move
from migrator.engine.stream import RecordReader
from migrator.engine.unfinished_copy import UnfinishedCopy
from migrator.engine.user.descriptors import OF_DESCRIPTORS, DescriptorRestore
from migrator.engine.user.restore.backing import Backing
from migrator.engine.user.restore.mappings import AddressSpace
from migrator.engine.user.restore.process_tree import StubTree
from migrator.engine.user.restore.second_look import look_again
from migrator.engine.user.restore.shm import SharedObjects
from migrator.engine.user.restore.tasks import TaskRestore
from migrator.errors import ImageError, RestartFailed
from migrator.image.codec import Record
from migrator.image.compare import Contents, differences
from migrator.image.order import Order
from migrator.image.records import (
    Container,
    Error,
    Header,
    HeaderX86,
    MappedFile,
    Mm,
    Name,
    Pages,
    RoundFlag,
    RoundMark,
    TaskState,
    Trailer,
    Tree,
    Vmas,
)
from migrator.image.records_files import FileOwner
from migrator.linux import urgency, vdso
from migrator.linux import x86_64 as arch
from migrator.linux.batch import raise_first
from migrator.linux.cgroup import Cgroup, unique_name
from migrator.linux.threads import detach_all

log = logging.getLogger("migrator.engine")

_CONTAINER_NAMESPACES = (
    spawn.CLONE_NEWNS | spawn.CLONE_NEWUTS | spawn.CLONE_NEWIPC | spawn.CLONE_NEWPID | spawn.CLONE_NEWNET
)
_UNSHARE = 272
_SHOWN_DIFFERENCES = 12
_STOP_SIGNALS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


class UserDestination(UnfinishedCopy):
    """Restarts a tree from the stream `fd`. The input is hostile until its trailer has been read."""

    def __init__(self, fd: int, options: DestinationOptions) -> None:
        super().__init__()
        self.options = options
        self.on_round: Callable[[int], None] = lambda _number: None
        self._reader = RecordReader(fd)
        self._order = Order()
        self._header: Header | None = None
        self._arch: HeaderX86 | None = None
        self._container: Container | None = None
        self._stub_tree: StubTree | None = None
        self._tree: Tree | None = None
        self._spaces: dict[int, AddressSpace] = {}
        self._mms: dict[int, Mm] = {}
        self._names: dict[int, str] = {}
        self._shared = SharedObjects()
        self._backing = Backing(self._shared)
        self._clocks: clocks.Offsets | None = None
        self._marked_at = 0  # ns of the source's wall clock: when the tasks were stopped
        self._live = not stat.S_ISREG(os.fstat(fd).st_mode)  # then their own clocks have run on since
        self._tasks = TaskRestore(self._backing.open_path, self._backing.only_root_leads_to, own_root=not options.root)
        self._descriptors: DescriptorRestore | None = None
        self._saved = Contents() if options.verify else None
        self.pages = 0

    # ------------------------------------------------------------------ what others may know

    @property
    def moves(self) -> list[Move]:
        """What resume() does to files: `Engine.finish_moves()` does it in its stead."""
        return self._descriptors.moves if self._descriptors is not None else []

    @property
    def late_locks(self) -> list[LateLock]:
        return self._descriptors.late_locks if self._descriptors is not None else []

    @property
    def root_pid(self) -> int:
        return self._stub_tree.root.pid if self._stub_tree is not None and self._stub_tree.root is not None else 0

    @property
    def pids(self) -> list[int]:
        return [s.pid for s in self._stub_tree.stubs.values()] if self._stub_tree is not None else []

    # ------------------------------------------------------------------ life

    def build(self) -> int:
        """Read to the trailer and build; the tasks are stopped. The root's pid in our namespace.

        Later steps depend only on these tasks.

        Raises ImageError for a broken stream, RestartFailed for what this host cannot do; nothing of the copy
        is left after either."""
        try:
            while True:
                rec = self._reader.next()
                self._order.check(rec)
                if isinstance(rec, Trailer):
                    break
                if self._saved is not None:
                    self._saved.add(rec)
                self._take(rec)
            self._complete()
        except OSError as error:
            raise _failed(error) from error
        return self.root_pid

    def hold(self) -> None:
        """Put every thread where it was, freeze the tasks by their cgroup and let go of them: they stay as they
        are if this program dies. Raises RestartFailed, and the copy can only be discarded then."""
        try:
            self._hold()
        except OSError as error:
            raise _failed(error) from error

    def _hold(self) -> None:
        assert self._cgroup is not None and self._stub_tree is not None and self._header is not None
        with self._phases.step("registers"):
            clocks.catch_up(self._header, self._marked_at, self._clocks)
            passed = clocks.since_stop(self._header, self._marked_at, self._clocks) if self._live else 0
            self._tasks.passed = max(0, passed)
            stubs = list(self._stub_tree.stubs.values())
            self._tasks.finish(stubs)
            self._tasks.stops(stubs)
        if self._saved is not None:
            with self._phases.step("second look"):
                self._verify(self._saved)
        with self._phases.step("hold"):
            self._cgroup.freeze(wait=False)
            tids = [thread.tid for stub in stubs for thread in stub.threads.values()]
            raise_first(detach_all(tids), "ptrace detach", [f"tid {tid}" for tid in tids])
            for pid in self._stopped_groups():
                os.kill(pid, signal.SIGSTOP)  # waits in the frozen, and with it none runs when thawed, by whomever
            self._held = True

    def _verify(self, saved: Contents) -> None:
        """Save the copy again and compare. Raises RestartFailed with what differs."""
        assert self._stub_tree is not None
        stopped = {v: s.task.exit_code for v, s in self._tasks.tasks.items() if s.task.state == TaskState.STOPPED}
        copied = look_again(
            self._stub_tree, stopped, self.moves, self._shared.tmpfs.mounts, contained=self._container is not None
        )
        for record in self._descriptors.put_off if self._descriptors is not None else ():
            saved.unlock(record)
        copied.container = saved.container  # what stands around a container is the sandbox's, made from this
        found = differences(saved, copied)
        if found:
            more = f"; {len(found) - _SHOWN_DIFFERENCES} more" if len(found) > _SHOWN_DIFFERENCES else ""
            raise RestartFailed(
                f"the copy differs from what was saved: {'; '.join(map(str, found[:_SHOWN_DIFFERENCES]))}{more}",
                hint="it never ran; please report this with the image",
            )

    def resume(self) -> None:
        """Let the tasks run. Nothing that can fail is left to do, and nothing is done that can wait: see tidy()."""
        with self._phases.step("resume"):
            assert self._cgroup is not None
            self._activate()
            self._cgroup.thaw()
            self._done = True

    def tidy(self) -> None:
        """After resume(), or when another lets the copy run: close what was needed to make it. Twice does no harm."""
        if self._sandbox is not None:
            self._sandbox.settled()
        if self._descriptors is not None:
            self._descriptors.close()
        self._close()

    def leave_frozen(self) -> None:
        """Instead of resume(): the tasks are complete and stay frozen in their cgroup."""
        self._activate()
        self._done = True
        self._close()

    def discard(self) -> None:
        """Kill the copy; nothing of it is left. Can be called at any time before resume(), twice too."""
        if self._done:
            return
        self._done = True
        with ExitStack() as stack:  # each of these, whatever becomes of the others; the last one first
            stack.callback(self._close)
            if self._sandbox is not None:
                stack.callback(self._sandbox.remove)
            elif self._cgroup is not None:
                stack.callback(self._cgroup.remove)
            if self._stub_tree is not None:
                stack.callback(self._stub_tree.kill)
                if self._cgroup is not None and self._held:
                    stack.callback(self._cgroup.kill)
            if self._descriptors is not None:
                stack.callback(self._descriptors.close)

    # ------------------------------------------------------------------ records

    def _take(self, rec: Record) -> None:
        if type(rec) in OF_DESCRIPTORS:  # thousands of them
            assert self._descriptors is not None
            self._descriptors.record(rec)
            return
        match rec:
            case Pages():
                space = self._spaces.get(rec.objref)
                if space is not None:
                    space.fill(rec)
                else:
                    self._shared.fill(rec)
            case Vmas():
                self._spaces[rec.mm_objref].apply(rec)
            case Mm():
                self._take_mm(rec)
            case Tree():
                self._take_tree(rec)
            case MappedFile():
                self._backing.mapped[rec.objref] = rec
            case FileOwner() if rec.owned_objref in self._backing.mapped:
                self._backing.owners[rec.owned_objref] = rec.uid
            case Name():
                self._names[rec.objref] = rec.text
            case Header():
                self._header = rec
            case HeaderX86():
                self._arch = rec
                self._check_processor(rec)
            case Container():
                self._container = rec
            case RoundMark():
                self._mark(rec)
            case Error():
                raise ImageError(f"saving failed: {rec.text}", hint="this is the first cause, from the source")
            case _:
                if not self._shared.record(rec) and not self._tasks.record(rec):
                    assert self._descriptors is not None
                    self._descriptors.record(rec)

    def _mark(self, mark: RoundMark) -> None:
        assert self._descriptors is not None
        self._descriptors.final = self._shared.sysv.final = mark.flags == RoundFlag.LAST
        if mark.flags == RoundFlag.END:
            self._prepare()
            self.on_round(mark.number)
        elif mark.flags == RoundFlag.LAST:  # the tasks are stopped: every millisecond from here on is felt
            gc.disable()
            self._marked_at = mark.time
            assert self._stub_tree is not None
            if mark.number == 1:
                return  # all of the memory is still to come: what is read now is a file, or as good as one
            self._stub_tree.complete()  # what a stub is cloned from must not be raised yet
            for stub in self._stub_tree.stubs.values():
                urgency.raise_tasks(t.tid for t in stub.threads.values())

    def _prepare(self) -> None:
        """Between two rounds: whatever can be done of the end already."""
        assert self._stub_tree is not None and self._tree is not None
        self._stub_tree.complete()
        self._stub_tree.set_groups(self._tree)
        for stub in self._stub_tree.stubs.values():
            state = self._tasks.tasks.get(stub.vpid)
            if state is not None and self._descriptors is not None:
                self._descriptors.install_early(stub, state.task.files_objref)
            self._tasks.prepare(stub)
            stub.remote.find_instruction()

    @staticmethod
    def _check_processor(saved: HeaderX86) -> None:
        xstate = spawn.probe_xstate()
        missing = saved.xfeatures & ~arch.xfeatures(xstate)
        if missing or saved.xstate_size > len(xstate):
            raise RestartFailed(
                f"this processor lacks extended state that the tasks use: features {missing:#x},"
                f" {saved.xstate_size} bytes saved, {len(xstate)} here",
                hint="restart on a host with the same processor features",
            )

    def _take_tree(self, tree: Tree) -> None:
        if self._stub_tree is None:
            self._begin(tree)
        assert self._stub_tree is not None
        before = set(self._stub_tree.stubs)
        self._stub_tree.apply(tree)
        gone = before - set(self._stub_tree.stubs)
        for objref in [o for o, mm in self._mms.items() if mm.pid in gone]:
            self._spaces.pop(objref, None)
            self._mms.pop(objref)
        self._tree = tree
        self._tasks.keep(tree)

    def _begin(self, tree: Tree) -> None:
        """The first tree: make the root's stub and everything that stands around it."""
        contained = self._container is not None
        if contained and self.options.sandbox is None:
            raise RestartFailed("this is the image of a container, and only plain trees are taken here")
        self._stub_tree = StubTree(_CONTAINER_NAMESPACES if contained else 0, self._tasks.cloned)
        with self._phases.step("stubs"):
            assert self._header is not None
            self._clocks = clocks.offsets(self._header, self._reader)
            root = self._stub_tree.grow_root(tree, self._clocks)
            if self._container is not None:
                assert self.options.sandbox is not None
                self._sandbox = self.options.sandbox(self._container.spec, root.pid)
                self._cgroup = self._sandbox.cgroup
                root.checked([(_UNSHARE, spawn.CLONE_NEWCGROUP)], "unshare of the cgroup namespace")
            else:
                self._cgroup = Cgroup.create(self.options.cgroup_name or unique_name("restart", root.pid))
                self._cgroup.attach(root.pid)
            if self._arch is not None and vdso.digest(root.pid) != self._arch.vdso_digest:
                raise RestartFailed(
                    "the vdso of this kernel differs from the one that the tasks were saved under",
                    hint="restart on a host that runs the same kernel build",
                )
            self._backing.root_fd = os.open(
                self.options.root or f"/proc/{root.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            )
            self._shared.root_fd = self._backing.root_fd
            self._shared.tmpfs.begin(self._backing.root_fd)
            self._shared.sysv.pid = self._shared.mqueues.pid = root.pid if contained else 0
            netns = f"/proc/{root.pid}/ns/net" if contained else None
            self._descriptors = DescriptorRestore(_Context(self, netns))

    def _take_mm(self, mm: Mm) -> None:
        self._mms[mm.objref] = mm
        if mm.objref not in self._spaces:
            assert self._stub_tree is not None
            stub = self._stub_tree.grow(mm.pid)
            if stub is None:
                raise ImageError(f"address space {mm.objref} belongs to pid {mm.pid}, which is not in the tree")
            for former in [o for o, m in self._mms.items() if m.pid == mm.pid and o != mm.objref]:
                self._mms.pop(former)
                if former in self._spaces:  # it became another program
                    self._spaces.pop(former).clear()
            self._spaces[mm.objref] = AddressSpace(stub, self._backing, self._names.__getitem__)
            program = self._backing.program(mm.exe_objref)
            if not self._tasks.looks_like(stub, program):  # and what is mapped of it would stand in the way
                self._spaces[mm.objref].clear()
            if mm.exe_objref in self._backing.mapped:  # what is written to still is no program yet
                self._tasks.shape(stub, mm, program)

    # ------------------------------------------------------------------ the end of the stream

    def _complete(self) -> None:
        stub_tree, tree = self._stub_tree, self._tree
        assert stub_tree is not None and tree is not None and self._descriptors is not None
        with self._phases.step("groups"):
            stub_tree.complete()
            stub_tree.set_groups(tree)
            states = {v: s.task for v, s in self._tasks.tasks.items()}
            stub_tree.make_zombies(states, {t.pid: t.ppid for t in tree.tasks})
        stubs = list(stub_tree.stubs.values())
        with self._phases.step("shared memory"):
            self._shared.settle()
        with self._phases.step("descriptors"):
            self._descriptors.settle(self._tasks.tasks[stub.vpid].task.files_objref for stub in stubs)
            for stub in stubs:
                self._descriptors.install(stub, self._tasks.tasks[stub.vpid].task.files_objref)
            self._descriptors.finish(stubs)
            self._shared.seal()
        with self._phases.step("tasks"):
            for stub in stubs:
                mm = self._mms[self._tasks.tasks[stub.vpid].task.mm_objref]
                self._tasks.shape(stub, mm, self._backing.program(mm.exe_objref))
                self._spaces[mm.objref].finish()
            self._tasks.apply(stubs)
            for stub in stubs:
                self._tasks.timers(stub)
            self._tasks.check(stubs)
            for stub in stubs:
                self._tasks.pending(stub)

    def _stopped_groups(self) -> list[int]:
        """The processes that were stopped by a signal."""
        assert self._stub_tree is not None
        out = []
        for vpid, stub in self._stub_tree.stubs.items():
            task = self._tasks.tasks[vpid].task
            if task.state == TaskState.STOPPED and task.exit_code in _STOP_SIGNALS:
                out.append(stub.pid)
        return out

    def _activate(self) -> None:
        """The connections speak, and nothing that the tasks have is open here as well: what they close ends."""
        if self._descriptors is not None:
            self._descriptors.activate()
        self._shared.close()
        self._backing.close()

    def _close(self) -> None:
        gc.enable()
        if self._stub_tree is not None:
            self._stub_tree.close()
        self._shared.close()
        if self._cgroup is not None:
            self._cgroup.close()
        self._backing.close()


def _failed(error: OSError) -> RestartFailed:
    log.debug("the copy could not be made", exc_info=error)
    return RestartFailed(f"{error.strerror or error} ({error.filename or 'no object named'})")


class _Context:
    """What the restoring of descriptors needs of us."""

    def __init__(self, owner: UserDestination, netns: str | None) -> None:
        self._owner = owner
        self.netns = netns

    @property
    def root_fd(self) -> int:
        return self._owner._backing.root_fd

    def pid_of(self, vpid: int) -> int:
        stub_tree = self._owner._stub_tree
        assert stub_tree is not None
        stub = stub_tree.stubs.get(vpid)
        return stub.pid if stub is not None else 0

    @property
    def live(self) -> bool:
        return self._owner.options.live

    def open_shm(self, objref: int, flags: int) -> int:
        return self._owner._shared.reopen(objref, flags)

    def open_queue(self, objref: int, flags: int) -> int:
        return self._owner._shared.mqueues.open(objref, flags)
