"""What a stream holds, for people: a summary gathered record by record, whole stream or broken one.

    summary = ImageSummary()
    for record in decoder.feed(chunk):
        summary.add(record)
    info = summary.finish()

Nothing here trusts the order of records, and nothing raises: the first thing that is out of place is
noted as the cause, and the rest is shown as far as it goes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any

from migrator.errors import ImageError
from migrator.image import records as r
from migrator.image import records_files as f
from migrator.image import records_shared as s
from migrator.image.addresses import socket_text
from migrator.image.codec import Record, Struct
from migrator.image.order import Order

_SHOWN_BYTES = 32  # of a byte string in a generic record
_BEYOND = 10_000  # records shown behind the first error: nothing bounds them any more


@dataclass
class MappingInfo:
    """One mapping: `start` and `end` are addresses, `what` is a path, a name or a kind."""

    start: int
    end: int
    perms: str
    kind: str
    offset: int
    what: str

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass
class RoundInfo:
    """One round of pre-copy, or the pages outside of any (number 0). Pages of 4096 bytes."""

    number: int
    last: bool = False
    time: int = 0  # ns, as the mark says
    data: int = 0
    zero: int = 0
    absent: int = 0
    guard: int = 0
    bytes: int = 0  # of contents


@dataclass
class MemoryInfo:
    """An address space or a shared memory: what was sent for it, over all rounds."""

    objref: int
    kind: str  # "mm" or "shm"
    what: str = ""
    size: int = 0  # bytes mapped, or of the shared memory
    data: int = 0
    zero: int = 0
    absent: int = 0
    guard: int = 0
    mappings: list[MappingInfo] = field(default_factory=list)
    rounds: dict[int, RoundInfo] = field(default_factory=dict)


@dataclass
class TaskInfo:
    """One task of the tree; `comm` and `state` are empty if its own record did not come."""

    pid: int
    tgid: int
    ppid: int
    pgid: int
    sid: int
    thread: bool
    zombie: bool
    orphan: bool
    comm: str = ""
    state: str = ""
    mm_objref: int = 0
    files_objref: int = 0
    registers: bool = False
    pending_signals: int = 0

    def take(self, draft: TaskInfo) -> None:
        """What its own record said ahead of this tree, unless it ended since."""
        if draft.zombie == self.zombie:
            self.comm, self.state = draft.comm, draft.state
            self.mm_objref, self.files_objref = draft.mm_objref, draft.files_objref


@dataclass
class DescriptorInfo:
    """One descriptor of a table: `kind` of its file, `what` is its path or the object it is opened on."""

    fd: int
    cloexec: bool
    file_objref: int
    kind: str
    what: str
    pos: int
    flags: int  # as fcntl(F_GETFL) gives them


@dataclass
class ObjectInfo:
    """A record about files, pipes or sockets, by its fields."""

    record: str
    number: int  # of the record in the stream, from 1
    fields: dict[str, Any]


@dataclass
class ImageInfo:
    """The summary. `whole`: the trailer came, and nothing was out of place ahead of it.

    Otherwise `cause` says what is wrong, `bytes` how far the stream was read, `records` how many came."""

    whole: bool = False
    cause: str = ""
    bytes: int = 0
    records: int = 0
    header: dict[str, Any] = field(default_factory=dict)
    arch: dict[str, Any] = field(default_factory=dict)
    container: dict[str, Any] = field(default_factory=dict)
    tasks: list[TaskInfo] = field(default_factory=list)
    memory: list[MemoryInfo] = field(default_factory=list)
    rounds: list[RoundInfo] = field(default_factory=list)
    tables: dict[int, list[DescriptorInfo]] = field(default_factory=dict)  # by objref
    objects: list[ObjectInfo] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class ImageSummary:
    """Gathers an `ImageInfo`. Records may come without the contents of their pages."""

    def __init__(self) -> None:
        self.info = ImageInfo()
        self._order: Order | None = Order(contents=False)
        self._counts: Counter[str] = Counter()
        self._tasks: dict[int, TaskInfo] = {}
        self._memory: dict[int, MemoryInfo] = {}
        self._named: dict[int, str] = {}  # objref: path or name
        self._files: dict[int, DescriptorInfo] = {}
        self._round = RoundInfo(0)
        self._beyond = 0  # records that came after the first cause

    def add(self, record: Record) -> None:
        """The next record. Never raises."""
        info = self.info
        info.records += 1
        self._counts[type(record).__name__] += 1
        if isinstance(record, r.Error):
            info.errors.append(record.text)
            self.broken(f"the writer of the stream gave up: {record.text}")
        elif self._order is not None:
            try:
                self._order.check(record)
            except ImageError as error:
                self.broken(error.message)
        if self._order is None:
            self._beyond += 1
            if self._beyond > _BEYOND:
                return
        self._take(record)

    def broken(self, cause: str) -> None:
        """The stream cannot be restarted. The first cause is kept, and order is not looked at any more."""
        if not self.info.cause:
            self.info.cause = cause
        self._order = None

    def finish(self, nr_bytes: int = 0) -> ImageInfo:
        """The stream is at its end, after `nr_bytes`."""
        info = self.info
        if self._order is not None and not self._order.done:
            self.broken("the stream ends without a trailer")
        info.whole = self._order is not None
        info.bytes = nr_bytes
        info.tasks = list(self._tasks.values())
        info.memory = [self._memory[objref] for objref in sorted(self._memory)]
        info.counts = dict(sorted(self._counts.items()))
        return info

    def _take(self, record: Record) -> None:
        info = self.info
        match record:
            case r.Pages():
                self._take_pages(record)
            case r.Header():
                info.header = record_fields(record)
            case r.HeaderX86():
                info.arch = record_fields(record)
            case r.Container():
                info.container = record_fields(record)
            case r.Tree():
                drafts, self._tasks = self._tasks, {item.pid: _task_info(item) for item in record.tasks}
                for pid in drafts.keys() & self._tasks.keys():
                    self._tasks[pid].take(drafts[pid])
            case r.Task():
                self._take_task(record)
            case r.Cpu():
                self._task(record.pid).registers = True
            case r.SigPending():
                self._task(record.pid).pending_signals += len(record.infos) // 128
            case r.RoundMark():
                if record.flags != r.RoundFlag.END:
                    self._round = RoundInfo(record.number, bool(record.flags), record.time)
                    info.rounds.append(self._round)
            case r.Mm():
                self._of(record.objref, "mm").what = self._named.get(record.exe_objref, "")
            case r.Shm():
                shm = self._of(record.objref, "shm")
                shm.what = f"{_name(r.ShmKind, record.kind)} {record.name}".strip()
                shm.size = record.size
                self._named[record.objref] = shm.what
            case s.SharedFile():
                shm = self._of(record.objref, "shm")
                shm.what = f"{_name(s.SharedFileKind, record.kind)} {record.name}".strip()
                shm.size = record.size
                self._named[record.objref] = shm.what
            case r.Vmas():
                memory = self._of(record.mm_objref, "mm")
                memory.mappings = [self._mapping(item) for item in record.vmas]
                memory.size = sum(mapping.bytes for mapping in memory.mappings)
            case r.MappedFile():
                self._named[record.objref] = record.path
            case r.Name():
                self._named[record.objref] = record.text
            case s.MqQueue():
                self._named[record.objref] = f"/{record.name}{' (deleted)' if record.removed else ''}"
            case _:
                if type(record).__module__ == f.__name__:
                    self._take_file(record)

    def _task(self, pid: int) -> TaskInfo:
        task = self._tasks.get(pid)
        if task is None:
            task = self._tasks[pid] = _task_info(r.TaskPids(pid=pid, tgid=pid, ppid=0, pgid=0, sid=0, flags=0))
        return task

    def _take_task(self, record: r.Task) -> None:
        task = self._task(record.pid)
        task.comm, task.state = record.comm, _name(r.TaskState, record.state)
        task.mm_objref, task.files_objref = record.mm_objref, record.files_objref

    def _of(self, objref: int, kind: str) -> MemoryInfo:
        return self._memory.setdefault(objref, MemoryInfo(objref, kind))

    def _take_pages(self, record: r.Pages) -> None:
        memory = self._of(record.objref, "mm")
        number = self._round.number
        for kind, count in _count_pages(record).items():
            for total in (memory, self._round, memory.rounds.setdefault(number, RoundInfo(number))):
                setattr(total, kind, getattr(total, kind) + count)
                if kind == "data" and isinstance(total, RoundInfo):
                    total.bytes += count * r.PAGE_SIZE
        if self._round.number == 0 and not self.info.rounds:
            self.info.rounds.append(self._round)

    def _take_file(self, record: Record) -> None:
        shown = record_fields(record)
        self.info.objects.append(ObjectInfo(type(record).__name__, self.info.records, shown))
        match record:
            case f.File():
                kind = _name(f.FileKind, record.kind)
                what = record.path or self._named.get(record.inode_objref, "")
                made = DescriptorInfo(-1, False, record.objref, kind, what, record.pos, record.flags)
                self._files[record.objref] = made
                for table in self.info.tables.values():  # it comes again, and they need not
                    table[:] = [
                        replace(item, pos=made.pos, flags=made.flags) if item.file_objref == made.file_objref else item
                        for item in table
                    ]
            case f.FileTable():
                unknown = DescriptorInfo(-1, False, 0, "?", "", 0, 0)
                self.info.tables[record.objref] = [
                    replace(
                        self._files.get(item.file_objref, unknown),
                        fd=item.fd,
                        cloexec=bool(item.cloexec),
                        file_objref=item.file_objref,
                    )
                    for item in record.descriptors
                ]
            case f.Socket():
                self._named[record.objref] = socket_text(record)
            case f.DeletedFile():
                self._named[record.objref] = f"{record.path} (deleted)"
            case f.Pipe() | f.EventFd() | f.TimerFd() | f.SignalFd() | f.Inotify():
                self._named[record.objref] = f"{type(record).__name__} {record.objref}"
            case f.Pty():
                self._named[record.objref] = f"/dev/pts/{record.index}"
            case f.PidFd():
                self._named[record.objref] = f"pid {record.pid}" if record.pid else "of a process that is gone"

    def _mapping(self, vma: r.VmaItem) -> MappingInfo:
        kind = _name(r.VmaKind, vma.kind)
        what = self._named.get(vma.objref) or self._named.get(vma.name_objref, "")
        return MappingInfo(vma.start, vma.end, perms(vma.flags), kind, vma.offset, what or f"[{kind}]")


def perms(flags: int) -> str:
    """A mapping's permissions as proc(5) writes them: "rw-p"."""
    shown = "".join(
        letter if flags & flag else "-"
        for letter, flag in (("r", r.VmaFlag.READ), ("w", r.VmaFlag.WRITE), ("x", r.VmaFlag.EXEC))
    )
    return shown + ("s" if flags & r.VmaFlag.SHARED else "p")


def record_fields(value: Struct) -> dict[str, Any]:
    """The fields of a record, fit for JSON: byte strings as their length and first bytes in hex."""
    return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, memoryview)):
        shown = bytes(value[:_SHOWN_BYTES]).hex()
        return {"length": len(value), "hex": shown}
    if isinstance(value, list):
        return [record_fields(item) for item in value]
    return value


def _count_pages(record: r.Pages) -> dict[str, int]:
    names = {r.PageKind.DATA: "data", r.PageKind.ZERO: "zero", r.PageKind.GUARD: "guard"}
    counts: Counter[str] = Counter()
    for item in record.ranges:
        counts[names.get(item.kind, "absent")] += item.nr_pages  # type: ignore[call-overload]
    return counts


def _task_info(item: r.TaskPids) -> TaskInfo:
    flags = r.TaskFlag(item.flags & sum(r.TaskFlag))
    return TaskInfo(
        pid=item.pid,
        tgid=item.tgid,
        ppid=item.ppid,
        pgid=item.pgid,
        sid=item.sid,
        thread=r.TaskFlag.THREAD in flags,
        zombie=r.TaskFlag.ZOMBIE in flags,
        orphan=r.TaskFlag.ORPHAN in flags,
    )


def _name(names: Any, value: int) -> str:
    try:
        return str(names(value).name.lower())
    except ValueError:
        return f"{value}?"
