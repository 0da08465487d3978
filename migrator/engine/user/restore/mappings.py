"""Address spaces on the destination: mappings made to agree with what the stream says, and filled.

A stub that was cloned from a filled one has all that its parent had. What is the same in both is left as it is and so
stays shared by copy-on-write, as fork(2) had left it; what its own first round of pages does not bring is dropped.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from migrator.engine.user.ranges import Span, intersect, merge, subtract
from migrator.engine.user.restore import advice
from migrator.engine.user.restore.advice import Stretch
from migrator.engine.user.restore.stub import Stub
from migrator.engine.user.vma_item import backing, writes_through
from migrator.errors import RestartFailed
from migrator.image.records import (
    PAGE_SIZE,
    Mm,
    PageKind,
    Pages,
    VmaFlag,
    VmaItem,
    VmaKind,
    Vmas,
)
from migrator.linux import memory
from migrator.linux import x86_64 as arch
from migrator.linux.remote import Call

NR = arch.NR
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 1, 2, 0x10, 0x20
_MAP_GROWSDOWN, _MAP_NORESERVE, _MAP_DROPPABLE = 0x100, 0x4000, 0x8
_PROT = VmaFlag.READ | VmaFlag.WRITE | VmaFlag.EXEC
_MADV_DONTNEED, _MADV_GUARD_INSTALL = 4, 102
_SHM_REMAP, _SHM_RDONLY, _MLOCK_ONFAULT = 0o40000, 0o10000, 1
_MIRROR = 1 << 18  # bytes that are compared at a time
_SYSTEM = {VmaKind.VDSO: "[vdso]", VmaKind.VVAR: "[vvar]", VmaKind.VVAR_VCLOCK: "[vvar_vclock]"}


class Behind(Protocol):
    """What there is behind mappings."""

    def open_backing(self, item: VmaItem) -> int: ...  # a descriptor of ours for the file or shared memory
    def segment_of(self, item: VmaItem) -> int: ...  # the number of the System V segment that it is, or -1


def _access(item: VmaItem) -> tuple[int, int]:
    """What decides how the file behind a mapping is opened."""
    return item.objref, item.flags & VmaFlag.SHARED | (VmaFlag.WRITE if writes_through(item) else 0)


def _covers(kept: Sequence[tuple[int, int, VmaItem]], item: VmaItem) -> bool:
    return len(kept) == 1 and kept[0][:2] == (item.start, item.end)


class AddressSpace:
    """The memory of one stub."""

    def __init__(self, stub: Stub, behind: Behind, name_of: Callable[[int], str]) -> None:
        self.stub = stub
        self.mm: Mm | None = None
        self._behind = behind
        self._name_of = name_of
        self._items: list[VmaItem] = []
        self._writable: list[tuple[int, int, bool]] = []
        self._zeros: list[tuple[int, int]] = []
        self._mirror: memory.Buffer | None = None
        # private memory with the contents that the parent had, until the first round of its own has come
        self._inherited = merge((v.start, v.end) for v in stub.mapped if not v.flags & VmaFlag.SHARED)
        self._filled: list[Span] = []  # what has come of it
        self._guards: list[Span] = []
        self._unplaced: list[Span] = []  # contents came for it that have no place: see _force()

    @property
    def items(self) -> list[VmaItem]:
        return self._items

    def apply(self, vmas: Vmas) -> None:
        """Make the mappings be exactly `vmas`. What was mapped the same keeps its contents.

        The kernel does not join what fork(2) has left in a process with what is mapped beside it (anon_vma): such a
        mapping is made larger by mremap(2) where it grows at its end, and made anew where it grows otherwise."""
        self._flush_zeros()
        system = {_SYSTEM[VmaKind(v.kind)]: (v.start, v.end) for v in vmas.vmas if v.kind in _SYSTEM}
        self.stub.place_system_mappings(system)
        wanted = [v for v in vmas.vmas if v.kind not in _SYSTEM]
        calls: list[Call] = []
        grown: list[Call] = []
        aside: list[tuple[int, memoryview]] = []
        holes: list[tuple[int, int, VmaItem]] = []
        keep: list[tuple[int, int]] = []
        advised: list[Stretch] = []
        same = {(v.start, v.end): v for v in self.stub.mapped}
        changed = []
        for item in wanted:
            if same.get((item.start, item.end)) == item:
                del same[item.start, item.end]
            else:
                changed.append(item)
        old = sorted(same.values(), key=lambda v: v.start)  # what is there and not exactly what is wanted
        ends = [there.end for there in old]
        for item in changed:
            kept = self._kept(item, itertools.islice(old, bisect.bisect_right(ends, item.start), None))
            reach = 0  # of one that is made larger: what lies there now goes first, whatever it is
            if self.stub.forked and kept and not item.flags & VmaFlag.SHARED and not _covers(kept, item):
                start, end, before = kept[0]
                if len(kept) == 1 and start == item.start:
                    grown.append((NR["mremap"], start, end - start, item.end - start, 0))
                    reach = end
                    kept = [(start, item.end, before)]
                    if before.flags & _PROT != item.flags & _PROT:
                        calls.append((NR["mprotect"], start, end - start, item.flags & _PROT))
                        kept = [(start, item.end, replace(before, flags=before.flags & ~_PROT | item.flags & _PROT))]
                else:
                    aside += itertools.chain.from_iterable(itertools.starmap(self._contents, kept))
                    kept = []
            at = item.start
            for start, end, before in kept:
                if start > at:
                    holes.append((at, start, item))
                if before.flags & _PROT != item.flags & _PROT:
                    calls.append((NR["mprotect"], start, end - start, item.flags & _PROT))
                if advice.differs(before, item):
                    advised.append((start, end, before, item))
                keep.append((start, reach or end))
                at = end
            if at < item.end:
                holes.append((at, item.end, item))
        self.stub.checked([*self._unmaps(old, keep), *calls, *grown], "changing the address space")
        if holes:
            self._map(holes)
        for at, page in aside:
            self.stub.mem.write(at, page)
        if advised:
            self._advise(advised)
        if self._inherited or self._unplaced:
            new, there = merge((start, end) for start, end, _ in holes), merge((v.start, v.end) for v in wanted)
            self._inherited = intersect(subtract(self._inherited, new), there)
            self._unplaced = intersect(subtract(self._unplaced, new), there)
        self.stub.mapped = self._items = wanted
        self._writable = [(v.start, v.end, bool(v.flags & VmaFlag.WRITE)) for v in wanted]

    def _kept(self, item: VmaItem, old: Iterable[VmaItem]) -> list[tuple[int, int, VmaItem]]:
        """The stretches of a wanted mapping that are mapped already, and what they are. Of what was just inherited
        only what is large enough."""
        behind, out = backing(item), []
        for there in old:
            if there.start >= item.end:
                break
            if backing(there) == behind:
                out.append((max(there.start, item.start), min(there.end, item.end), there))
        return [] if self._inherited and not _covers(out, item) else out

    def _contents(self, start: int, end: int, item: VmaItem) -> Iterator[tuple[int, memoryview]]:
        """The pages there that have contents: of a file those that are its own no more, zeros too."""
        zeros = bytes(PAGE_SIZE)
        for first, last in self.stub.own_pages(start, end):
            there = memoryview(bytearray(last - first))
            self.stub.mem.read_into(there, first)
            for at in range(0, len(there), PAGE_SIZE):
                page = there[at : at + PAGE_SIZE]
                if item.objref or page != zeros:
                    yield first + at, page

    def clear(self) -> None:
        """Unmap everything."""
        self._zeros.clear()
        self._inherited = []
        self._guards = []
        self._unplaced = []
        self.stub.checked([(NR["munmap"], v.start, v.end - v.start) for v in self.stub.mapped], "unmapping")
        self.stub.mapped, self._items, self._writable = [], [], []

    @staticmethod
    def _unmaps(old: list[VmaItem], keep: list[tuple[int, int]]) -> list[Call]:
        """What of `old` is not in `keep`; both sorted."""
        calls: list[Call] = []
        i = 0
        for item in old:
            at = item.start
            while i < len(keep) and keep[i][1] <= at:
                i += 1
            j = i
            while j < len(keep) and keep[j][0] < item.end:
                if keep[j][0] > at:
                    calls.append((NR["munmap"], at, keep[j][0] - at))
                at = max(at, keep[j][1])
                j += 1
            if at < item.end:
                calls.append((NR["munmap"], at, item.end - at))
        return calls

    def _map(self, holes: Sequence[tuple[int, int, VmaItem]]) -> None:
        fds: list[int] = []
        numbers: dict[tuple[int, int], int] = {}
        try:
            for _, _, item in holes:
                key = _access(item)
                if item.objref and key not in numbers and self._behind.segment_of(item) < 0:
                    numbers[key] = len(fds)
                    fds.append(self._behind.open_backing(item))
            inside = self.stub.receive(fds) if fds else []
        finally:
            for fd in fds:
                os.close(fd)
        calls: list[Call] = []
        after: list[Stretch] = []
        for start, end, item in holes:
            flags = _MAP_FIXED | (_MAP_SHARED if item.flags & VmaFlag.SHARED else _MAP_PRIVATE)
            if item.flags & VmaFlag.NORESERVE:
                flags |= _MAP_NORESERVE
            if item.flags & VmaFlag.GROWSDOWN:
                flags |= _MAP_GROWSDOWN
            if item.flags & VmaFlag.DROPPABLE:
                flags = flags & ~_MAP_PRIVATE | _MAP_DROPPABLE
            prot = item.flags & _PROT
            if item.objref and (segment := self._behind.segment_of(item)) >= 0:
                if start == item.start - item.offset:  # which brings the rest of it as well
                    readonly = 0 if writes_through(item) else _SHM_RDONLY
                    calls.append((NR["shmat"], segment, start, _SHM_REMAP | readonly))
                calls.append((NR["mprotect"], start, end - start, prot))
            elif item.objref:
                key = _access(item)
                offset = item.offset + start - item.start
                calls.append((NR["mmap"], start, end - start, prot, flags, inside[numbers[key]], offset))
            else:
                calls.append((NR["mmap"], start, end - start, prot, flags | _MAP_ANONYMOUS, -1, 0))
            if advice.differs(None, item):
                after.append((start, end, None, item))
        calls += [(NR["close"], number) for number in inside]
        self.stub.checked(calls, "mapping memory")
        if after:
            self._advise(after)

    def _advise(self, stretches: Sequence[Stretch]) -> None:
        calls, text = advice.calls(stretches, self._name_of, self.stub.remote.data)
        if text:
            self.stub.put(text)
        self.stub.call_batch(calls)  # what this kernel does not know changes nothing that is seen

    # ------------------------------------------------------------------ contents

    def fill(self, pages: Pages) -> None:
        """Put a chunk of contents in place."""
        if not pages.ranges:
            self.settle()
            return
        data: list[tuple[int, int]] = []
        absent: list[tuple[int, int]] = []
        guards: list[Span] = []
        for item in pages.ranges:
            span = (item.start, item.start + item.nr_pages * PAGE_SIZE)
            if item.kind == PageKind.DATA:
                data.append(span)
            elif item.kind == PageKind.ABSENT:
                absent.append(span)
            elif item.kind == PageKind.GUARD:
                guards.append(span)
            else:
                self._zeros.append(span)
        if self._guards or self._unplaced:
            told = merge((i.start, i.start + i.nr_pages * PAGE_SIZE) for i in pages.ranges)
            self._guards = subtract(self._guards, told)
            self._unplaced = subtract(self._unplaced, told)
        if guards:
            self._guards = merge([*self._guards, *guards])
        if absent:
            self._drop(absent)
        if data:
            if self._inherited:
                self._filled += data
            self._write(data, pages.data)

    def finish(self) -> None:
        """Once all contents are there: what is not to be touched (guard regions), and what stays there (mlock(2)).

        Raises RestartFailed if contents came for what lies beyond the end of a file."""
        if self._unplaced:
            raise RestartFailed(
                f"pid {self.stub.vpid}: there are contents for {self._unplaced[0][0]:#x}, which lies beyond the end of"
                " the file that is mapped there",
                hint="the file must be the same on both hosts",
            )
        guards = intersect(self._guards, merge((v.start, v.end) for v in self._items))
        calls = [(NR["madvise"], start, end - start, _MADV_GUARD_INSTALL) for start, end in guards]
        self.stub.checked(calls, "guard regions (MADV_GUARD_INSTALL, Linux 6.13)")
        locked = [
            (v.start, v.end)
            for v in self._items
            if v.flags & (VmaFlag.LOCKED | VmaFlag.LOCKED_ONFAULT) == VmaFlag.LOCKED
        ]
        whole = [span for span in locked if not intersect([span], guards)]
        self.stub.checked([(NR["mlock"], start, end - start) for start, end in whole], "locking memory")
        for start, end in set(locked) - set(whole):  # it is locked, and fails at the guard (ENOMEM), as on the source
            self.stub.call_batch([(NR["mlock"], start, end - start)])
        later = [v for v in self._items if v.flags & VmaFlag.LOCKED_ONFAULT]
        calls = [(NR["mlock2"], v.start, v.end - v.start, _MLOCK_ONFAULT) for v in later]
        self.stub.checked(calls, "locking memory once it is touched (mlock2(2))")

    def settle(self) -> None:
        """The first round, or a later one, is complete: what was inherited and has not come is not there."""
        if self._inherited:
            left, self._inherited = subtract(self._inherited, merge(self._filled)), []
            self._filled = []
            self._drop(left)
        self._flush_zeros()

    def _flush_zeros(self) -> None:
        if self._zeros:
            spans, self._zeros = self._zeros, []
            file_backed = [(v.start, v.end) for v in self._items if v.kind in (VmaKind.FILE, VmaKind.SHM)]
            ends = [end for _, end in file_backed]
            plain = []
            for start, end in spans:
                at = bisect.bisect_right(ends, start)
                if at < len(ends) and file_backed[at][0] < end:
                    for at in range(start, end, PAGE_SIZE):  # dropping would bring the file's content back
                        self._force(at, memoryview(bytes(PAGE_SIZE)))
                else:
                    plain.append((start, end))
            self._drop(plain)

    def _drop(self, spans: Sequence[tuple[int, int]]) -> None:
        calls: list[Call] = []
        for start, end in merge(spans):
            for a, b, _ in self._writable_parts(start, end):
                calls.append((NR["madvise"], a, b - a, _MADV_DONTNEED))
        self.stub.checked(calls, "dropping pages")

    def _write(self, spans: Sequence[tuple[int, int]], data: bytes) -> None:
        view = memoryview(data)
        position = 0
        run: list[tuple[int, int]] = []
        run_start = 0

        def flush() -> None:
            nonlocal run
            if run:
                total = position - run_start
                self._write_run(run, view[run_start:position], total)
                run = []

        for start, end in spans:
            for a, b, writable in self._writable_parts(start, end):
                if self._is_inherited(a, b):
                    flush()
                    self._write_differing(a, view[position : position + b - a], writable)
                    position += b - a
                elif writable:
                    if not run:
                        run_start = position
                    run.append((a, b - a))
                    position += b - a
                    if len(run) == memory.IOV_MAX:
                        flush()
                else:
                    flush()
                    self._force(a, view[position : position + b - a])
                    position += b - a
        flush()
        if position != len(view):
            raise RestartFailed(
                f"pid {self.stub.vpid}: contents for memory that is not mapped ({len(view) - position} bytes)"
            )

    def _is_inherited(self, start: int, end: int) -> bool:
        """Whether any of it has the contents of the parent's."""
        return bool(self._inherited) and bool(intersect([(start, end)], self._inherited))

    def _write_differing(self, start: int, view: memoryview, writable: bool) -> None:
        """Write the pages of a stretch of one mapping that are not what they should be: those too of which only the
        file behind it has the same contents, as it may change."""
        self._mirror = self._mirror or memory.Buffer(_MIRROR)
        of_files = self._items[self._last_from(start)].objref != 0
        for at in range(0, len(view), _MIRROR):
            part = view[at : at + _MIRROR]
            length = len(part)
            there = self._mirror.view[:length]
            got = self.stub.mem.read_into(there, start + at)
            span = (start + at, start + at + length)
            own = self.stub.own_pages(*span) if of_files else [span]
            if got == length and there == part and own == [span]:
                continue
            pages = [slice(p, p + PAGE_SIZE) for p in range(0, length, PAGE_SIZE)]
            differ = [page.start for page in pages if page.stop > got or there[page] != part[page]]
            others = [(a - start - at, b - start - at) for a, b in subtract([span], own)]
            for a, b in merge([*((p, p + PAGE_SIZE) for p in differ), *others]):
                if writable:
                    self._write_run([(start + at + a, b - a)], part[a:b], b - a)
                else:
                    self._force(start + at + a, part[a:b])

    def _write_run(self, run: Sequence[tuple[int, int]], view: memoryview, total: int) -> None:
        if view.readonly:
            held = ctypes.create_string_buffer(bytes(view), total)
            address = ctypes.addressof(held)
        else:
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        if memory.write_from(self.stub.pid, address, run, total) != total:
            at = 0
            for start, length in run:
                self._force(start, view[at : at + length])
                at += length

    def _force(self, start: int, part: memoryview) -> None:
        """Write past the protection of a mapping.

        What lies beyond the end of a file is not there. Contents for it can come in a round: there was other memory
        by the time that it was read, as a loader of programs maps it over a file. They are of no use, and what is
        there in the end comes later; if nothing does, finish() says so."""
        try:
            self.stub.mem.write(start, part)
            return
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        for at in range(start, start + len(part), PAGE_SIZE):
            try:
                self.stub.mem.write(at, part[at - start : at - start + PAGE_SIZE])
            except OSError as error:
                if error.errno != errno.EIO or not self._items[self._last_from(at)].objref:
                    raise RestartFailed(
                        f"pid {self.stub.vpid}: writing memory at {at:#x}: {error.strerror}",
                        hint="is there enough free memory on this host?",
                    ) from error
                self._unplaced = merge([*self._unplaced, (at, at + PAGE_SIZE)])

    def _last_from(self, start: int) -> int:
        """The index of the last mapping that begins there or before, else 0."""
        return max(bisect.bisect_right(self._writable, (start, 1 << 63, True)) - 1, 0)

    def _writable_parts(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Split [start, end) at the borders of mappings."""
        out = []
        i = self._last_from(start)
        while start < end and i < len(self._writable):
            a, b, writable = self._writable[i]
            if b <= start:
                i += 1
                continue
            if a >= end:
                break
            start = max(start, a)
            stop = min(b, end)
            out.append((start, stop, writable))
            start = stop
        return out
