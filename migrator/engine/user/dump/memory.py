"""The memory of the tree on its way into the stream: instrumented, tracked and sent process by process."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence

from migrator.engine.stream import RecordWriter
from migrator.engine.user.dump import guards
from migrator.engine.user.dump.dirty_tracker import WpAsyncTracker, gathered
from migrator.engine.user.dump.instrument import Instrument
from migrator.engine.user.dump.mappings import LayoutDump
from migrator.engine.user.dump.pages import CHUNK, PageSender
from migrator.engine.user.dump.parasite import SCRATCH, is_left_over
from migrator.engine.user.dump.process import Process
from migrator.engine.user.dump.restart_blocks import RestartBlocks
from migrator.engine.user.dump.shm import SharedMemory
from migrator.engine.user.dump.sysv import SysvDump
from migrator.engine.user.dump.tmpfs import OwnTmpfs
from migrator.engine.user.dump.tracing import stuck
from migrator.engine.user.ranges import Span, merge
from migrator.errors import CheckpointFailed
from migrator.image.objhash import ObjHash
from migrator.image.records import PAGE_SIZE
from migrator.linux import memory, procfs, sys
from migrator.linux.pagemap import Scanner, WriteProtection

# When what could not be read is tried again: who runs may be moving its mappings all the time, and seldom does just so
# in each of these moments.
STOPPED = (0.0,)
RUNNING = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)  # seconds


class MemoryDump:
    """All address spaces of a tree. The tree stays the caller's: `processes` says which there are now."""

    def __init__(
        self,
        writer: RecordWriter,
        objhash: ObjHash,
        restart_blocks: RestartBlocks,
        processes: Callable[[], Mapping[int, Process]],
        tmpfs: OwnTmpfs,
        sysv: SysvDump | None,
    ) -> None:
        self._processes = processes
        self._objhash = objhash
        self.instruments = Instrument(restart_blocks, self._protections)
        self.shared = SharedMemory(objhash, tmpfs, sysv)
        self.layout = LayoutDump(writer, objhash, self.shared)
        self.sender = PageSender(writer)
        self.trackers: dict[int, WpAsyncTracker] = {}  # by pid

    def close(self) -> None:
        self.shared.close()
        self.layout.close()
        self.trackers.clear()

    def forget(self, process: Process) -> None:
        """One that has ended."""
        self.trackers.pop(process.pid, None)
        self.layout.forget(process.pid, process.mm_objref)

    def ahead(self, process: Process) -> None:
        """What there is to read just before a process is stopped. One that ends is left."""
        try:
            self.look(process)
            self.layout.ahead(process.pid, process.mm_objref, process.vmas)
        except OSError:
            pass

    def sweep(self) -> int:
        """Pages written since the last sweep; none is sent."""
        pages = 0
        for process in [p for p in self._processes().values() if not p.zombie]:
            tracker = self.trackers.get(process.pid)
            if tracker is not None:
                self.look(process)
                pages += sum(piece.pages for piece in tracker.sweep(process.vmas))
        return pages

    def look(self, process: Process) -> None:
        """Read the mappings, without our own. A process that has become another program is forgotten."""
        text = procfs.read_text(f"/proc/{process.pid}/maps")
        remote = process.remote
        if remote is not None and remote.scratch and not _has_mapping(text, remote.scratch):
            self.trackers.pop(process.pid, None)
            self.layout.forget(process.pid, process.mm_objref)
            for thing in (process.protection, process.scanner, process.mem):
                if thing is not None:
                    thing.close()
            process.protection = process.scanner = process.mem = process.remote = process.parasite = remote = None
            process.executed += 1
            process.guards = None
        if text != process.maps:
            process.maps = text
            scratch = remote.scratch if remote is not None else 0
            ours = range(scratch, scratch + SCRATCH) if scratch else ()
            vmas = procfs.parse_maps(text, process.lines)
            process.vmas = [v for v in vmas if v.start not in ours and not is_left_over(process.pid, v.start, v.end)]

    def instrument(self, process: Process) -> None:
        """Instrument a process. One that ends, becomes another program or is in its parent's memory is left for a
        later round."""
        try:
            if self._in_parents_memory(process):
                return
            process.mm_objref = self._mm_objref(process)
            self.trackers[process.pid] = self.instruments.install(process)
        except CheckpointFailed:
            process.remote = None
            raise
        except OSError as error:
            process.remote = None
            try:  # one that is ending has lost its memory before it is a zombie
                alive = procfs.stat(process.pid)[3] not in "ZX" and bool(procfs.maps(process.pid))
            except OSError:
                alive = False
            # execve(2) came between: what was mapped a moment ago is not, or the new program has no vdso yet.
            # Or a thread closed the userfaultfd at once, as it closes whatever number there is.
            replaced = error.errno in (errno.EFAULT, errno.ENOENT, errno.EBADF)
            if alive and isinstance(error, TimeoutError):
                raise stuck(process.pid, process.pid) from error
            if alive and not replaced and not isinstance(error, ProcessLookupError):
                raise CheckpointFailed(f"pid {process.pid}: {error}", hint="the workload runs on") from error

    def _protections(self) -> list[WriteProtection]:
        return [p.protection for p in self._processes().values() if p.protection is not None]

    def _in_parents_memory(self, process: Process) -> bool:
        """Between vfork(2) and execve(2)."""
        parent = self._processes().get(int(procfs.stat(process.pid)[4]))
        return parent is not None and not parent.zombie and sys.same(process.pid, parent.pid, sys.KCMP_VM)

    def _mm_objref(self, process: Process) -> int:
        return self._objhash.get(("mm", process.pid, process.start_time, process.executed))[0]

    def prepare(self, process: Process) -> None:
        """A process born since the last round has no scratch area, and nothing of its memory was sent."""
        if process.remote is not None and process.remote.scratch:
            return
        if self._in_parents_memory(process):
            raise CheckpointFailed(
                f"pid {process.pid} shares its address space with its parent", hint="which is not carried"
            )
        self.name(process)
        self.instruments.prepare_stopped(process)

    def name(self, process: Process) -> None:
        """Give the address space of a process its objref, if it has none."""
        process.mm_objref = self._mm_objref(process)

    def send(self, process: Process, *, final: bool = False) -> None:
        """Send what is new of a process's memory; `final`: it is stopped, and this is the last time."""
        vmas = process.vmas
        rebacked = self.layout.write(process.pid, process.vpid, process.mm_objref, vmas, stopped=final)
        tracker = self.trackers.get(process.pid)
        first = tracker is None or tracker.first
        process.scanner = process.scanner or Scanner(process.pid)
        process.mem = process.mem or memory.MemFile(process.pid)
        if tracker is not None:
            pieces = tracker.sweep(vmas, strict=final, whole=rebacked)
        else:
            pieces = WpAsyncTracker.everything(process.scanner, vmas)
        pieces = gathered(pieces, CHUNK // PAGE_SIZE)
        sent: list[Span] = []
        unreadable = False
        while True:
            try:
                piece = next(pieces, None)
            except OSError as error:
                if not final and isinstance(error, ProcessLookupError | FileNotFoundError):
                    raise  # it has ended
                raise CheckpointFailed(f"pid {process.pid}: {error}") from error
            if piece is None:
                break
            self.sender.send(process.pid, process.mm_objref, piece.data, piece.absent, vmas, process.mem, first=first)
            if self.sender.unreadable:
                unreadable = True
                self._read_again(process, process.scanner, process.mem, STOPPED if final else RUNNING)
            if process.guards:
                sent += [*piece.data, *piece.absent]
        for vma in vmas:
            if vma.shared and self.shared.is_shm(vma):
                spans = tracker.sweep_shared(vma) if tracker is not None else [(vma.start, vma.end)]
                self.shared.note_writes(process.pid, vma, spans)
        met = tracker is None or tracker.met_guards or unreadable
        guards.send(process, self.sender, sent, met=met)
        if tracker is not None:
            tracker.met_guards = False
        self.sender.end(process.mm_objref)

    def _read_again(self, process: Process, scanner: Scanner, mem: memory.MemFile, pauses: Sequence[float]) -> None:
        """What could not be read was unmapped meanwhile, and what comes to be there is met by a later sweep; what is
        still there after all turns cannot be had.

        pauses: seconds ahead of each turn"""
        for pause in (*pauses, None):
            missed, self.sender.unreadable = merge(self.sender.unreadable), []
            there = merge(page for start, end in missed for page in scanner.own(start, end))
            if not there:
                return
            if pause is None:
                raise CheckpointFailed(
                    f"pid {process.pid}: the page at {there[0][0]:#x} cannot be read: whoever touches it gets SIGBUS "
                    "(a memory error, or UFFDIO_POISON), which is not carried",
                    hint="the program can unmap it, or drop it by madvise(MADV_DONTNEED)",
                )
            time.sleep(pause)
            self.sender.send(process.pid, process.mm_objref, there, [], process.vmas, mem)


def _has_mapping(maps: str, start: int) -> bool:
    line = f"{start:08x}-"
    return maps.startswith(line) or f"\n{line}" in maps
