"""Two streams compared by what they say in the end, record by record.

    saved, copied = Contents(), Contents()
    for record in ...: saved.add(record)          # as they come; nothing of their memory is kept but checksums
    for record in ...: copied.add(record)
    for difference in differences(saved, copied): ...

The last word of each stream counts: what came earlier in it and was replaced is forgotten. Objrefs are no names, as
another writer gives out others: an object is known by the way that leads to it first, from the tasks in the order of
their pids. `SKIPPED` has what may differ between a tree and its copy, and why; there is no other exception.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from migrator.image import compare_sockets
from migrator.image import records as r
from migrator.image import records_files as f
from migrator.image import records_shared as s
from migrator.image.codec import Record, Struct

SKIPPED = {
    "Header": "about the host that wrote the stream, and its clocks, which go on",
    "HeaderX86": "about the host",
    "Tree.generation": "counts how often a writer sent the hierarchy",
    "Mm.oom_score_adj": "advice to the kernel, which it may refuse to take from a caller without CAP_SYS_RESOURCE",
    "DeletedFile.path": "where its name was: the copy has no name either, and /proc shows another text for that",
    "File.path of DELETED": "likewise",
    "SharedFile.name of DELETED": "likewise",
    "TmpfsEntry.mtime of directories": "sockets are named there when the copy runs",
    "File.flags of O_TMPFILE": "how a file without a name came to be",
    "MappedFile.mtime": "of a file of the host",
    "MappedFile.mode": "of a file of the host",
    "File.dev": "as information",
    "File.ino": "as information",
    "File.mtime": "of a file of the host, or of an inode that was made anew",
    "File.size": "of a file of the host; what is carried has a size of its own",
    "RestartBlock": "time goes on: the wait may be over",
    "SigPending of SIGSTOP": "who sent it: nobody can take it, or look at it",
    "SigPending of timers": "time goes on: they may have expired again",
    "Cpu.orig_rax": "of a task that is in no call",
    "Cpu.rax": "how an interrupted call is made again; or a wait that is over",
    "Cpu.r10": "what is left of epoll_wait(2)",
    "Cpu.rdx": "what is left of poll(2)",
    "Cpu.xstate header": "which components are marked as in their initial state: what is in each is compared",
    "Itimer.value": "time goes on; whether it is armed is compared, but where it was over soon",
    "PosixTimer.value": "as of Itimer",
    "PosixTimer.overrun": "told by the kernel when the signal is taken",
    "TimerFd.value": "as of Itimer",
    "TimerFd.ticks": "time goes on",
    "FileLock that the source has": "on storage of both hosts, until its tasks are gone; taken before the copy runs",
    "SocketTcp.timestamp": "the clock of the connection goes on",
    "SocketTcp within the tree": "its bytes go on from one end to the other: see migrator.image.compare_sockets",
    "Sizes of tuned buffers": "the kernel tunes those of connections, and takes no odd ones: likewise",
    "Borders of mappings": "those that touch and are alike are one to the program, wherever the kernel keeps a border",
    "Pages of sleeps": "the kernel writes what is left of an interrupted nanosleep(2) to where its caller said",
    "Pages of rseq": "the kernel writes the processor that a thread runs on to the page of its rseq(2) area",
}
_PARTS: dict[type[Record], str] = {  # contents of objects, by what refers to the object
    f.PipeBuffer: "pipe_objref",
    f.FileData: "inode_objref",
    f.SocketBuffer: "socket_objref",
    f.SocketTcp: "socket_objref",
    f.EpollItems: "epoll_objref",
    f.FileLock: "file_objref",
    f.FileOwner: "owned_objref",
    f.InotifyWatch: "inotify_objref",
    f.PtyData: "pty_objref",
}
_OUTSIDE = -1  # a session or group that is led from outside of the tree
_DATA = 1 << 32  # in a page's entry: it has contents, the rest is their checksum
_ZERO, _GUARD = 0, 2 << 32
_X86_64 = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_RESTARTED = frozenset(range(-516, -511))  # -ERESTARTSYS to -ERESTART_RESTARTBLOCK
_TIMES = {("Itimer", "value"), ("PosixTimer", "value"), ("TimerFd", "value")}
_SOON = {"Itimer": 5_000_000, "PosixTimer": 5_000_000_000, "TimerFd": 5_000_000_000}  # in the unit of the record
_ARMED, _OVER_SOON, _NOT_ARMED = "armed", "over soon", "not armed"
_TIME_GOES_ON = {(_ARMED, _OVER_SOON), (_OVER_SOON, _NOT_ARMED)}  # as saved, in the copy
_TIMER_SIGNALS, _SI_KERNEL, _SI_TIMER, _SIGINFO, _SIGSTOP = (14, 26, 27), 0x80, -2, 128, 19
_XSAVE_HEADER = 512  # of the xsave area of x86-64: the components that are not in their initial state
_O_TMPFILE = 0o20200000
_NSIG = 64
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Difference:
    """`where`: the way to it; `saved` and `copied`: what the streams say, None for nothing."""

    where: str
    saved: object
    copied: object

    def __str__(self) -> str:
        return f"{self.where}: {_short(self.saved)} became {_short(self.copied)}"


@dataclass(slots=True)
class Contents:
    """What a stream says in the end. Records have been checked (migrator.image.order)."""

    tree: r.Tree | None = None
    container: r.Container | None = None
    objects: dict[int, Record] = field(default_factory=dict)
    tasks: dict[int, r.Task] = field(default_factory=dict)
    stopped: dict[tuple[str, int, int], Record] = field(default_factory=dict)  # what only a stopped task has
    vmas: dict[int, r.Vmas] = field(default_factory=dict)
    pages: dict[int, dict[int, int]] = field(default_factory=dict)
    parts: dict[int, list[Record]] = field(default_factory=dict)  # contents of objects, in order
    named: dict[str, list[Record]] = field(default_factory=dict)  # what tasks find by a name or a number, not by a task

    def unlock(self, record: f.File | f.FileLock) -> None:
        """Leave the lock that a record tells of out of what is compared."""
        if isinstance(record, f.File):
            self.objects[record.objref] = replace(record, lock=0)
        else:
            self.parts[record.file_objref].remove(record)

    def add(self, record: Record) -> None:
        match record:
            case r.Pages():
                self._pages(record)
            case r.Tree():
                self._tree(record)
            case r.Task():
                self.tasks[record.pid] = record
            case r.Cpu() | r.RestartBlock():
                self.stopped[type(record).__name__, record.pid, 0] = record
            case r.SigPending():
                self.stopped["SigPending", record.pid, record.shared] = record
            case r.Vmas():
                self.vmas[record.mm_objref] = record
            case r.Container():
                self.container = record
            case _ if type(record) in _PARTS:
                self.parts.setdefault(getattr(record, _PARTS[type(record)]), []).append(record)
            case s.TmpfsEntry() | s.TmpfsXattr():
                self._named(f"tmpfs {record.mount} {record.path}", record)
            case s.SysvShm():
                self.named[f"segment {record.shmid}"] = [record]
            case s.SysvSem():
                self._named(f"semaphores {record.semid}", record)
            case s.SysvQueue() | s.SysvMessage():
                self._named(f"queue {record.msqid}", record)
            case s.MqQueue():
                self.objects[record.objref] = record
                self._named(f"message queue {record.name}", record)
            case s.MqMessage():
                queue = self.objects[record.queue_objref]
                self._named(f"message queue {queue.name}", record)  # type: ignore[attr-defined]
            case r.Header() | r.HeaderX86() | r.RoundMark() | r.Trailer() | r.Error():
                pass
            case _:
                self.objects[record.objref] = record  # type: ignore[attr-defined]

    def _named(self, where: str, record: Record) -> None:
        self.named.setdefault(where, []).append(record)

    def _tree(self, tree: r.Tree) -> None:
        self.tree = tree
        zombies = {t.pid: bool(t.flags & r.TaskFlag.ZOMBIE) for t in tree.tasks}
        for pid, task in list(self.tasks.items()):
            if zombies.get(pid) != (task.state == r.TaskState.ZOMBIE):
                del self.tasks[pid]

    def _pages(self, pages: r.Pages) -> None:
        known = self.pages.setdefault(pages.objref, {})
        view = memoryview(pages.data)
        position = 0
        for item in pages.ranges:
            for page in range(item.start, item.start + item.nr_pages * r.PAGE_SIZE, r.PAGE_SIZE):
                if item.kind == r.PageKind.DATA:
                    known[page] = _DATA | zlib.crc32(view[position : position + r.PAGE_SIZE])
                    position += r.PAGE_SIZE
                elif item.kind == r.PageKind.ZERO:
                    known[page] = _ZERO
                elif item.kind == r.PageKind.GUARD:
                    known[page] = _GUARD
                else:
                    known.pop(page, None)

    def touched(self) -> dict[int, set[int]]:
        """The pages that the kernel writes to as it likes, by pid of their process."""
        out: dict[int, set[int]] = {}
        tgids = {t.pid: t.tgid for t in self.tree.tasks} if self.tree else {}
        for pid, task in self.tasks.items():
            places = [(task.rseq_ptr, task.rseq_len)]
            block = self.stopped.get(("RestartBlock", pid, 0))
            if isinstance(block, r.RestartBlock):
                places.append((_remainder(block), 16))
            pages = out.setdefault(tgids.get(pid, pid), set())
            for start, length in places:
                if start:
                    pages |= {at & ~(r.PAGE_SIZE - 1) for at in (start, start + max(1, length) - 1)}
        return out


def differences(saved: Contents, copied: Contents) -> list[Difference]:
    """What is not the same, but for `SKIPPED`; nothing if the copy is the original."""
    waits = {pid for kind, pid, _ in saved.stopped if kind == "RestartBlock"}
    touched = saved.touched()
    for pid, pages in copied.touched().items():
        touched.setdefault(pid, set()).update(pages)
    a, b = _Walk(saved, waits, touched).out, _Walk(copied, waits, touched).out
    ways = [
        way for way in sorted({*a, *b}) if a.get(way) != b.get(way) and (a.get(way), b.get(way)) not in _TIME_GOES_ON
    ]
    return [Difference(way, a.get(way), b.get(way)) for way in ways]


class _Walk:
    """Everything of a stream by the way that leads to it: "pid 7 task.files fd 3.file.pos" -> 12.

    waits:   tasks that sit in a call with a time limit, which may be over by now
    touched: see Contents.touched()"""

    def __init__(self, contents: Contents, waits: set[int], touched: dict[int, set[int]]) -> None:
        self._contents = contents
        self._waits = waits
        self._touched = touched
        self._names: dict[int, str] = {}
        states = {objref for objref, parts in contents.parts.items() if any(isinstance(p, f.SocketTcp) for p in parts)}
        self._paired = compare_sockets.pairs(contents.objects.values(), states)
        self.out: dict[str, object] = {}
        if contents.container is not None:
            self._fields("container", contents.container)
        tasks = sorted(contents.tree.tasks if contents.tree else [], key=lambda t: t.pid)
        inside = {t.pid for t in tasks}
        for task in tasks:
            where = f"pid {task.pid}"
            self._fields(where, task)
            for name in ("pgid", "sid"):
                if getattr(task, name) not in inside and not self._led_by_ended(task, name):
                    self.out[f"{where}.{name}"] = _OUTSIDE
        for pid in sorted(contents.tasks):
            self._task(pid)
        for where, records in sorted(contents.named.items()):
            for index, record in enumerate(records):
                self._fields(f"{where} {index}", record)

    def _led_by_ended(self, task: r.TaskPids, name: str) -> bool:
        """Whether a group or session has lost its leader: its number is kept. The root's may be anybody's."""
        assert self._contents.tree is not None
        root = self._contents.tree.tasks[0]
        return getattr(task, name) not in (root.pgid, root.sid, 0)

    def _task(self, pid: int) -> None:
        contents = self._contents
        task = contents.tasks[pid]
        where = f"pid {pid} task"
        self._fields(where, task)
        for shared in (0, 1):
            pending = contents.stopped.get(("SigPending", pid, shared))
            if isinstance(pending, r.SigPending):
                for index, info in enumerate(_signals(pending)):
                    self.out[f"{where} pending{' of all' * shared} {index}"] = info
        cpu = contents.stopped.get(("Cpu", pid, 0))
        if isinstance(cpu, r.Cpu):
            self._cpu(where, cpu)

    def _cpu(self, where: str, cpu: r.Cpu) -> None:
        for at in range(0, len(cpu.xstate), 64):
            part = cpu.xstate[at : at + 64]
            if at == _XSAVE_HEADER:
                part = bytes(8) + part[8:]  # XSTATE_BV: the kernel gives those that it leaves out their initial values
            self.out[f"{where} xstate {at}"] = part
        if cpu.arch_id != r.Arch.X86_64:
            self.out[f"{where} regs"] = cpu.regs
            return
        regs = dict(zip(_X86_64, struct.unpack(f"<{len(_X86_64)}q", cpu.regs), strict=True))
        if regs["orig_rax"] < 0 or regs["rax"] not in _RESTARTED:
            regs["orig_rax"] = -1
        elif cpu.pid not in self._waits:
            del regs["rax"]
        if cpu.pid in self._waits:
            for name in ("rax", "orig_rax", "r10", "rdx"):
                del regs[name]
        self.out.update({f"{where} {name}": value for name, value in regs.items()})

    # ------------------------------------------------------------------ objects

    def _fields(self, where: str, rec: Struct) -> None:
        kind = type(rec).__name__
        for name in (*rec._plain, *(name for name, _ in rec._tails)):
            if name in ("objref", "reserved") and isinstance(rec, Record):
                continue
            if f"{kind}.{name}" in SKIPPED and (kind, name) not in _TIMES:
                continue
            if isinstance(rec, f.Socket) and name in ("sndbuf", "rcvbuf"):
                continue
            if name == "path" and isinstance(rec, f.File) and rec.kind == f.FileKind.DELETED:
                continue
            if name == "name" and isinstance(rec, s.SharedFile) and not rec.mount:
                continue
            if name == "mtime" and isinstance(rec, s.TmpfsEntry) and stat.S_ISDIR(rec.mode):
                continue
            value = getattr(rec, name)
            way = f"{where}.{name}"
            if name == "flags" and isinstance(rec, f.File) and rec.kind == f.FileKind.DELETED:
                value &= ~_O_TMPFILE
            if (kind, name) == ("Sighand", "actions"):
                size = len(value) // _NSIG
                for signal in range(1, _NSIG + 1):
                    self.out[f"{way} {signal}"] = value[(signal - 1) * size : signal * size]
                continue
            if name == "objref" or name.endswith("_objref"):
                self._refer(f"{where}.{name.removesuffix('_objref')}", value)
            elif isinstance(value, list):
                self._items(way, value)
            elif (kind, name) in _TIMES:
                lasting = rec.interval or value > _SOON[kind]  # type: ignore[attr-defined]
                self.out[way] = _ARMED if lasting else _OVER_SOON if value else _NOT_ARMED
            else:
                self.out[way] = bytes(value) if isinstance(value, (bytes, memoryview)) else value

    def _items(self, way: str, items: list[Any]) -> None:
        for index, item in enumerate(items):
            match item:
                case f.Descriptor():
                    at = f"{way.removesuffix('.descriptors')} fd {item.fd}"
                case r.VmaItem():
                    at = f"{way.removesuffix('.vmas')} {item.start:#x}-{item.end:#x}"
                case f.SocketOption():
                    self.out[f"{way} {item.level}/{item.name}"] = item.value
                    continue
                case r.PosixTimer():
                    at = f"{way} {item.timer_id}"
                case _:
                    at = f"{way} {index}"
            self._fields(at, item)

    def _refer(self, way: str, objref: int) -> None:
        if not objref:
            self.out[way] = None
            return
        known = self._names.get(objref)
        if known is not None:
            self.out[way] = f"the same as {known}"
            return
        self._names[objref] = way
        rec = self._contents.objects.get(objref)
        if rec is None:
            self.out[way] = "missing"
            return
        self.out[way] = type(rec).__name__
        self._fields(way, rec)
        if isinstance(rec, r.Mm):
            self._memory(way, objref)
        elif isinstance(rec, (r.Shm, s.SharedFile)):
            self._shared(way, objref)
        elif isinstance(rec, f.Socket):
            self.out.update((f"{way}.{name}", size) for name, size in compare_sockets.sizes(rec, self._paired))
        self._parts(way, objref)

    def _memory(self, way: str, objref: int) -> None:
        vmas = self._contents.vmas.get(objref)
        if vmas is None:
            return
        self._items(f"{way}.vmas", _joined(vmas.vmas))
        pages = self._contents.pages.get(objref, {})
        mm = self._contents.objects[objref]
        touched = self._touched.get(mm.pid, set()) if isinstance(mm, r.Mm) else set()
        ordered = sorted(pages)
        at = 0
        for vma in vmas.vmas:
            while at < len(ordered) and ordered[at] < vma.start:
                at += 1
            while at < len(ordered) and ordered[at] < vma.end:
                page = ordered[at]
                at += 1
                if vma.flags & r.VmaFlag.SHARED and pages[page] != _GUARD:
                    continue  # of what was mapped there in an earlier round
                if page not in touched and (pages[page] or vma.kind == r.VmaKind.FILE):
                    self.out[f"{way} page {page:#x}"] = pages[page]

    def _shared(self, way: str, objref: int) -> None:
        for offset, value in sorted(self._contents.pages.get(objref, {}).items()):
            if value:
                self.out[f"{way} page {offset:#x}"] = value

    def _parts(self, way: str, objref: int) -> None:
        parts = self._contents.parts.get(objref, [])
        for tcp in (p for p in parts if isinstance(p, f.SocketTcp)):
            self._tcp(f"{way}.tcp", tcp)
        for index, (key, data) in enumerate(_messages(parts)):
            self.out[f"{way} message {index}"] = key, data
        for index, piece in enumerate(_spans(parts)):
            self.out[f"{way} data {index}"] = piece
        for watch in parts:
            if isinstance(watch, f.InotifyWatch):
                self.out[f"{way} watch {watch.wd}"] = watch.mask, watch.path
        waiting: dict[int, list[tuple[int, bytes]]] = {1: [], 2: []}
        for typed in (p for p in parts if isinstance(p, f.PtyData)):
            queue = waiting[typed.direction]
            if queue and not queue[-1][0] and not typed.end:  # however it was cut
                queue[-1] = 0, queue[-1][1] + typed.data
            else:
                queue.append((typed.end, typed.data))
        for direction, queue in waiting.items():
            for index, (end, data) in enumerate(queue):
                self.out[f"{way} waits {direction} {index}"] = end, data
        for owner in [p for p in parts if isinstance(p, f.FileOwner)][-1:]:
            self.out[f"{way} owner"] = owner.uid, owner.gid
        locks = [(p.pid, p.kind, p.start, p.length, p.fd) for p in parts if isinstance(p, f.FileLock)]
        for index, lock in enumerate(sorted(locks)):
            self.out[f"{way} lock {index}"] = lock
        items = [item for p in parts if isinstance(p, f.EpollItems) for item in p.items]
        for index, item in enumerate(sorted(items, key=lambda i: (i.fd, i.data, i.events))):
            self._fields(f"{way} waits for {index}", item)

    def _tcp(self, way: str, end: f.SocketTcp) -> None:
        self._fields(way, end)
        others = self._contents.parts.get(self._paired.get(end.socket_objref, 0), [])
        other = next((p for p in others if isinstance(p, f.SocketTcp)), None)
        if other is not None:
            for name in (*compare_sockets.MOVING, "received", "sent"):
                del self.out[f"{way}.{name}"]
            self.out.update((f"{way}.{name}", value) for name, value in compare_sockets.stream(end, other))
        elif end.socket_objref in self._paired:
            for name in compare_sockets.ACKNOWLEDGING:
                del self.out[f"{way}.{name}"]


def _signals(pending: r.SigPending) -> Iterator[bytes]:
    """Each siginfo_t but those of timers. What is with a SIGSTOP nobody can see."""
    for at in range(0, len(pending.infos), _SIGINFO):
        signal, _, code = struct.unpack_from("<iii", pending.infos, at)
        if signal == _SIGSTOP:
            yield b"SIGSTOP"
        elif code != _SI_TIMER and not (code == _SI_KERNEL and signal in _TIMER_SIGNALS):
            yield pending.infos[at : at + _SIGINFO]


def _remainder(block: r.RestartBlock) -> int:
    """Where a call writes what is left of its time, or 0."""
    which = {35: 1, 230: 3}.get(block.syscall)  # nanosleep, clock_nanosleep of x86-64
    return int(struct.unpack_from("<Q", block.args, 8 * which)[0]) if which and len(block.args) == 48 else 0


def _joined(vmas: list[r.VmaItem]) -> list[r.VmaItem]:
    """The same mappings, those that touch and are alike as one."""
    out: list[r.VmaItem] = []
    for vma in vmas:
        last = out[-1] if out else None
        if last is not None and last.end == vma.start:
            shift = vma.offset - last.offset == vma.start - last.start or not vma.objref
            alike = ("flags", "kind", "objref", "name_objref")
            if shift and all(getattr(last, name) == getattr(vma, name) for name in alike):
                out[-1] = replace(last, end=vma.end)
                continue
        out.append(vma)
    return out


def _messages(parts: list[Record]) -> Iterator[tuple[object, bytes]]:
    """What waits in a pipe or socket: whole messages, or one stream of bytes however it was cut."""
    stream = b""
    for part in parts:
        if not isinstance(part, (f.PipeBuffer, f.SocketBuffer)):
            continue
        if not part.flags:
            stream += part.data
            continue
        if stream:
            yield "stream", stream
            stream = b""
        yield getattr(part, "address", b""), part.data
    if stream:
        yield "stream", stream


def _spans(parts: list[Record]) -> Iterator[tuple[int, int, int]]:
    """(offset, length, checksum) of the contents of a deleted file; pieces that touch count as one."""
    begin, end, crc = 0, 0, 0
    for part in sorted((p for p in parts if isinstance(p, f.FileData)), key=lambda p: p.offset):
        if end != part.offset or end == begin:
            if end > begin:
                yield begin, end - begin, crc
            begin, crc = part.offset, 0
        crc = zlib.crc32(part.data, crc)
        end = part.offset + len(part.data)
    if end > begin:
        yield begin, end - begin, crc


def _short(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bytes):
        return f"{len(value)} bytes {value[:16].hex()}{'…' if len(value) > 16 else ''}"
    if isinstance(value, int) and value > 0xFFFF:
        return hex(value)
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
