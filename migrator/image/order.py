"""Which record may follow which: the grammar of a stream, checked record by record.

    order = Order()
    for record in stream:
        order.check(record)       # raises ImageError, naming the record by number and kind
    order.done                    # the trailer came, and nothing was missing

The codec has checked that a record is well formed; this checks what it says about the others: the
hierarchy is a tree, every objref is defined before it is used and of the right kind, mappings do not
overlap, pages add up, nothing is missing at the trailer. A reader that feeds every record through
here may index by pid and objref without checking again.

State is bounded by `hierarchy.MAX_TASKS` and `references.MAX_OBJECTS`, whatever the stream holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from migrator.errors import ImageError
from migrator.image import records as r
from migrator.image.codec import Record
from migrator.image.hierarchy import MAX_PID, check_tasks
from migrator.image.order_files import FilesOrder
from migrator.image.order_shared import SharedOrder
from migrator.image.references import References

TASK_SIZE = (1 << 47) - r.PAGE_SIZE  # x86-64, four levels of page tables
MAX_ROUNDS = 1 << 16
MAX_SHM = 1 << 62  # bytes
NSIG = 64
SIGACTION_SIZE = 32  # the kernel's struct sigaction: handler, flags, restorer, mask
SIGINFO_SIZE = 128
REGS_SIZE = {r.Arch.X86_64: 27 * 8}  # struct user_regs_struct
MAX_XSTATE = 1 << 16

_PAGE_MASK = r.PAGE_SIZE - 1
_TASK_BITS = sum(r.TaskBits)
_VMA_FLAGS = sum(r.VmaFlag)
_VMA_KINDS = frozenset(int(kind) for kind in r.VmaKind)
# What every task but a zombie refers to, and what CLONE_THREAD makes its threads share.
_NEEDED = ("mm_objref", "files_objref", "fs_objref", "sighand_objref", "signal_objref", "cred_objref")
_SHARED_BY_THREADS = ("mm_objref", "sighand_objref", "signal_objref")
_SPECIAL_KINDS = (r.VmaKind.FILE, r.VmaKind.SHM)
_DATA, _GUARD = int(r.PageKind.DATA), int(r.PageKind.GUARD)
_LAST_PAGE_KIND = max(r.PageKind)


class Order:
    """The state of one stream. `records` counts those that were checked, `done` is set by the trailer.

    contents: false where the decoder leaves out the contents of pages, having checked their length."""

    def __init__(self, *, contents: bool = True) -> None:
        self.records = 0
        self.done = False
        self.header: r.Header | None = None
        self._contents = contents
        self._arch_seen = False
        self._container_seen = False
        self._record: Record | None = None
        self._references = References(self._fail)
        self._tree: dict[int, r.TaskPids] = {}
        self._tree_seen = False
        self._generation = 0
        self._round = 0
        self._round_open = self._last_round = False
        self._tasks: dict[int, r.Task] = {}
        self._cpus: set[int] = set()
        self._once: set[tuple[type[Record], int, int]] = set()
        self._limits: dict[int, int] = {}  # objref of an Mm, a Shm or a SharedFile: end of its pages, in bytes
        self._mapped: set[int] = set()  # Mms whose Vmas came
        self._owners: dict[int, int] = {}  # objref of an Mm of the present tree: pid
        self._spaces: dict[int, int] = {}  # and back
        self._checks: dict[type[Record], Callable[[Any], None]] = {
            r.Pages: self._pages,
            r.Vmas: self._vmas,
            r.Tree: self._tree_record,
            r.Mm: self._mm,
            r.Shm: self._shm,
            r.Task: self._task,
            r.Cpu: self._cpu,
            r.RoundMark: self._round_mark,
            r.RestartBlock: self._restart_block,
            r.SigPending: self._sig_pending,
            r.Sighand: self._sighand,
            r.Signal: self._signal,
            r.Trailer: self._trailer,
            **FilesOrder(self._references, self._fail, self._in_tree).checks,
            **SharedOrder(self._references, self._fail, self._limits).checks,
        }

    def check(self, record: Record) -> None:
        """Accept `record` as the next one, or raise ImageError. After an error the state is undefined.

        An error record is the writer's own report: it is raised with its text."""
        if self.done:
            raise ImageError(f"record {self.records + 1} ({type(record).__name__}) follows the trailer")
        self.records += 1
        self._record = record
        kind = type(record)
        if kind is r.Error:
            text = record.text  # type: ignore[attr-defined]
            raise ImageError(f"the writer of the stream gave up: {text}")
        if not self._tree_seen and self._prologue(record):
            return
        if kind in (r.Header, r.HeaderX86, r.Container):
            self._fail("comes once, ahead of the tree")
        if kind is not r.Pages:
            self._references.check(record)
        special = self._checks.get(kind)
        if special is not None:
            special(record)

    # -- before the tree ----------------------------------------------------------------------------

    def _prologue(self, record: Record) -> bool:
        """Header, arch header and container, which nothing else may precede; false once the tree is there."""
        if self.header is None:
            if not isinstance(record, r.Header):
                self._fail("a stream begins with a header")
            self._header(record)
            self.header = record
            return True
        if not self._arch_seen:
            if not isinstance(record, r.HeaderX86):
                self._fail("the header of the architecture comes second")
            if record.xstate_size > MAX_XSTATE:
                self._fail(f"an xstate of {record.xstate_size} bytes")
            self._arch_seen = True
            return True
        if isinstance(record, r.Container):
            if self._container_seen:
                self._fail("comes once, ahead of the tree")
            if not 0 < record.init_pid <= MAX_PID:
                self._fail(f"impossible pid {record.init_pid}")
            self._container_seen = True
            return True
        if not isinstance(record, r.Tree):
            self._fail("the tree comes ahead of everything about its tasks")
        return False

    def _header(self, header: r.Header) -> None:
        if header.magic != r.MAGIC:
            self._fail(f"magic {header.magic:#x}: this is no image")
        if not 1 <= header.rev <= r.REV:
            self._fail(f"revision {header.rev} is not known (1 to {r.REV} are)", hint="a newer migrator may know it")
        if header.arch_id != r.Arch.X86_64:
            self._fail(f"architecture {header.arch_id} is not x86-64 ({r.Arch.X86_64:d})")
        if header.page_shift != r.PAGE_SIZE.bit_length() - 1:
            self._fail(f"pages of 2^{header.page_shift} bytes instead of {r.PAGE_SIZE}")

    # -- hierarchy ----------------------------------------------------------------------------------

    def _tree_record(self, tree: r.Tree) -> None:
        if self._cpus:
            self._fail("the tree changes after the state of its tasks began")
        if self._tree_seen and tree.generation < self._generation:
            self._fail(f"generation {tree.generation} after {self._generation}")
        known = check_tasks(tree.tasks, self._fail)
        self._tree, self._tree_seen, self._generation = known, True, tree.generation
        for pid, task in list(self._tasks.items()):  # drafts of those that have ended, or ended and were born anew
            entry = known.get(pid)
            if entry is None or bool(entry.flags & r.TaskFlag.ZOMBIE) != (task.state == r.TaskState.ZOMBIE):
                del self._tasks[pid]
        for pid, objref in list(self._spaces.items()):
            if pid not in known or known[pid].flags & (r.TaskFlag.THREAD | r.TaskFlag.ZOMBIE):
                self._forget(pid, objref)

    def _forget(self, pid: int, objref: int) -> None:
        """The address space of a process that ended: nothing may be said about it any more."""
        del self._spaces[pid], self._owners[objref], self._limits[objref]
        self._mapped.discard(objref)

    def _in_tree(self, pid: int) -> r.TaskPids:
        task = self._tree.get(pid)
        if task is None:
            self._fail(f"pid {pid} is not in the tree")
        return task

    def _of_task(self, pid: int) -> None:
        if not self._final:
            self._fail(f"pid {pid}: comes while the tasks still run")
        self._in_tree(pid)
        if pid not in self._tasks:
            self._fail(f"pid {pid}: comes ahead of its task")

    # -- tasks --------------------------------------------------------------------------------------

    def _task(self, task: r.Task) -> None:
        entry = self._in_tree(task.pid)
        if task.pid in self._cpus:
            self._fail(f"pid {task.pid} comes again after its registers")
        if task.state > max(r.TaskState):
            self._fail(f"pid {task.pid}: unknown state {task.state}")
        zombie = task.state == r.TaskState.ZOMBIE
        if zombie != bool(entry.flags & r.TaskFlag.ZOMBIE):
            self._fail(f"pid {task.pid}: the tree and its state differ on whether it is a zombie")
        if task.flags & ~_TASK_BITS:
            self._fail(f"pid {task.pid}: unknown flags {task.flags:#x}")
        if not 0 <= task.pdeath_signal <= NSIG or not -1 <= task.exit_signal <= NSIG:
            self._fail(f"pid {task.pid}: impossible signal")
        if not zombie:
            for name in _NEEDED:
                if not getattr(task, name):
                    self._fail(f"pid {task.pid} lives, and has no {name}")
        self._agrees(task, entry)
        self._tasks[task.pid] = task

    def _agrees(self, task: r.Task, entry: r.TaskPids) -> None:
        """A task with the others of its process, as it comes and in the end: drafts may have grown old."""
        if entry.flags & r.TaskFlag.ZOMBIE:
            return
        if self._owners.get(task.mm_objref) != entry.tgid:
            self._fail(f"address space {task.mm_objref} is not that of pid {entry.tgid}")
        if entry.flags & r.TaskFlag.THREAD:
            leader = self._tasks.get(entry.tgid)
            if leader is None:
                self._fail(f"thread {task.pid} comes ahead of its leader {entry.tgid}")
            for name in _SHARED_BY_THREADS:
                if getattr(task, name) != getattr(leader, name):
                    self._fail(f"thread {task.pid} has another {name} than its leader {entry.tgid}")

    @property
    def _final(self) -> bool:
        """Whether what comes now is about tasks that stand still."""
        return self._last_round or not self._round

    def _cpu(self, cpu: r.Cpu) -> None:
        assert self.header is not None
        self._of_task(cpu.pid)
        if cpu.pid in self._cpus:
            self._fail(f"pid {cpu.pid} comes twice")
        if cpu.arch_id != self.header.arch_id:
            self._fail(f"pid {cpu.pid}: registers of architecture {cpu.arch_id}")
        if len(cpu.regs) != REGS_SIZE[r.Arch.X86_64] or len(cpu.xstate) > MAX_XSTATE:
            self._fail(f"pid {cpu.pid}: registers of {len(cpu.regs)} and {len(cpu.xstate)} bytes")
        self._cpus.add(cpu.pid)

    def _restart_block(self, block: r.RestartBlock) -> None:
        self._of_task(block.pid)
        self._only_once(block.pid, 0)
        if block.remaining < -1:
            self._fail(f"pid {block.pid}: {block.remaining} ns remain")

    def _sig_pending(self, pending: r.SigPending) -> None:
        self._of_task(pending.pid)
        if pending.shared > 1:
            self._fail(f"pid {pending.pid}: shared is {pending.shared}")
        self._only_once(pending.pid, pending.shared)
        if len(pending.infos) % SIGINFO_SIZE:
            self._fail(f"pid {pending.pid}: {len(pending.infos)} bytes of siginfo")

    def _sighand(self, sighand: r.Sighand) -> None:
        if len(sighand.actions) != NSIG * SIGACTION_SIZE:
            self._fail(f"{len(sighand.actions)} bytes of actions instead of {NSIG * SIGACTION_SIZE}")

    def _signal(self, signal: r.Signal) -> None:
        if len(signal.rlimits) > 16 or len(signal.itimers) > 3:
            self._fail(f"{len(signal.rlimits)} limits and {len(signal.itimers)} interval timers")

    def _only_once(self, pid: int, which: int) -> None:
        key = (type(self._record), pid, which)
        if key in self._once:
            self._fail(f"pid {pid} comes twice")
        self._once.add(key)  # type: ignore[arg-type]

    # -- memory -------------------------------------------------------------------------------------

    def _mm(self, mm: r.Mm) -> None:
        if self._in_tree(mm.pid).flags & (r.TaskFlag.THREAD | r.TaskFlag.ZOMBIE):
            self._fail(f"pid {mm.pid} is no process that lives")
        if self._owners.get(mm.objref, mm.pid) != mm.pid:
            self._fail(f"was that of pid {self._owners[mm.objref]}, now of pid {mm.pid}")
        former = self._spaces.get(mm.pid, mm.objref)
        if former != mm.objref:  # its pid was given out again, between two trees
            self._forget(mm.pid, former)
        self._owners[mm.objref], self._spaces[mm.pid] = mm.pid, mm.objref
        self._limits[mm.objref] = TASK_SIZE

    def _shm(self, shm: r.Shm) -> None:
        if shm.kind not in (r.ShmKind.ANON, r.ShmKind.MEMFD, r.ShmKind.SYSV):
            self._fail(f"unknown kind {shm.kind}")
        if shm.size > MAX_SHM:
            self._fail(f"impossible size {shm.size}")
        self._limits[shm.objref] = (shm.size + _PAGE_MASK) & ~_PAGE_MASK

    def _vmas(self, vmas: r.Vmas) -> None:
        if vmas.mm_objref not in self._owners:
            self._fail(f"address space {vmas.mm_objref} is of a process that ended, or of none")
        end = 0
        for vma in vmas.vmas:
            if (vma.start | vma.end | vma.offset) & _PAGE_MASK:
                self._fail(f"mapping at {vma.start:#x} is not aligned to pages")
            if vma.start < end:
                self._fail(f"mapping at {vma.start:#x} overlaps the one ahead of it, or is out of order")
            end = vma.end
            if not vma.start < end <= TASK_SIZE:
                self._fail(f"mapping {vma.start:#x}-{end:#x} is empty or outside of user space")
            if vma.kind not in _VMA_KINDS:
                self._fail(f"mapping at {vma.start:#x}: unknown kind {vma.kind}")
            if vma.flags & ~_VMA_FLAGS:
                self._fail(f"mapping at {vma.start:#x}: unknown flags {vma.flags:#x}")
            if vma.offset + (end - vma.start) > MAX_SHM:
                self._fail(f"mapping at {vma.start:#x}: impossible offset {vma.offset:#x}")
            if vma.kind in _SPECIAL_KINDS:
                kinds = ("MappedFile",) if vma.kind == r.VmaKind.FILE else ("Shm", "SharedFile")
                self._references.use(vma.objref, kinds[0], f"mapping at {vma.start:#x}", *kinds[1:])
            elif vma.objref:
                self._fail(f"mapping at {vma.start:#x}: memory of its own, yet objref {vma.objref}")
            if vma.name_objref:
                self._references.use(vma.name_objref, "Name", f"mapping at {vma.start:#x}")
        self._mapped.add(vmas.mm_objref)

    def _pages(self, pages: r.Pages) -> None:
        limit = self._limits.get(pages.objref)
        if limit is None:
            self._fail(f"objref {pages.objref} is neither an Mm nor a Shm, or of a process that ended")
        nr_data = 0
        for item in pages.ranges:
            start, nr_pages, kind = item.start, item.nr_pages, item.kind
            if start & _PAGE_MASK:
                self._fail(f"range at {start:#x} is not aligned to pages")
            if not nr_pages or start + nr_pages * r.PAGE_SIZE > limit:
                self._fail(f"range at {start:#x} of {nr_pages} pages is empty or out of bounds")
            if kind == _DATA:
                nr_data += nr_pages
            elif kind > _LAST_PAGE_KIND:
                self._fail(f"range at {start:#x}: unknown kind {kind}")
            elif kind == _GUARD and pages.objref not in self._owners:
                self._fail(f"range at {start:#x}: a guard outside of an address space")
        if self._contents and nr_data * r.PAGE_SIZE != len(pages.data):
            self._fail(f"{nr_data} pages announced, {len(pages.data)} bytes of contents")

    def _round_mark(self, mark: r.RoundMark) -> None:
        if mark.flags > max(r.RoundFlag):
            self._fail(f"unknown flags {mark.flags:#x}")
        if self._last_round:
            self._fail("the last round was announced already")
        if mark.flags == r.RoundFlag.END:
            if not self._round_open or mark.number != self._round:
                self._fail(f"round {mark.number} ends, which is not open")
            self._round_open = False
            return
        if not self._round < mark.number <= MAX_ROUNDS:
            self._fail(f"round {mark.number} after round {self._round}")
        self._round, self._round_open = mark.number, True
        self._last_round = bool(mark.flags & r.RoundFlag.LAST)

    # -- the end ------------------------------------------------------------------------------------

    def _trailer(self, trailer: r.Trailer) -> None:
        if trailer.magic != r.TRAILER_MAGIC:
            self._fail(f"magic {trailer.magic:#x}")
        if trailer.nr_records != self.records:
            self._fail(f"counts {trailer.nr_records} records, {self.records} came")
        for pid, entry in self._tree.items():
            task = self._tasks.get(pid)
            if task is None:
                self._fail(f"pid {pid} is in the tree, its state never came")
            if entry.flags & r.TaskFlag.ZOMBIE:
                continue
            if pid not in self._cpus:
                self._fail(f"pid {pid}: its registers never came")
            self._agrees(task, entry)
            if task.mm_objref and task.mm_objref not in self._mapped:
                self._fail(f"pid {pid}: the mappings of its address space {task.mm_objref} never came")
        self._references.finish()
        self.done = True

    def _fail(self, message: str, *, hint: str = "") -> NoReturn:
        raise ImageError(f"record {self.records} ({type(self._record).__name__}): {message}", hint=hint)
