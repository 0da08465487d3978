"""Address spaces on the destination: mappings made to agree with what the stream says, and filled."""

from __future__ import annotations

import bisect
import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from migrator.engine.user.ranges import merge
from migrator.engine.user.restore.stub import Stub
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
_MADV_DONTNEED = 4
_SHM_REMAP = 0o40000
_ADVICE = {
    VmaFlag.DONTFORK: 10,
    VmaFlag.DONTDUMP: 16,
    VmaFlag.WIPEONFORK: 18,
    VmaFlag.HUGEPAGE: 14,
    VmaFlag.NOHUGEPAGE: 15,
    VmaFlag.MERGEABLE: 12,
    VmaFlag.RANDOM: 1,
    VmaFlag.SEQUENTIAL: 2,
}
_SYSTEM = {VmaKind.VDSO: "[vdso]", VmaKind.VVAR: "[vvar]", VmaKind.VVAR_VCLOCK: "[vvar_vclock]"}
_PR_SET_VMA, _PR_SET_VMA_ANON_NAME = 0x53564D41, 0
_IDENTITY = VmaFlag.SHARED | VmaFlag.GROWSDOWN | VmaFlag.NORESERVE | VmaFlag.DROPPABLE


class Behind(Protocol):
    """What there is behind mappings."""

    def open_backing(self, item: VmaItem) -> int: ...  # a descriptor of ours for the file or shared memory
    def segment_of(self, item: VmaItem) -> int: ...  # the number of the System V segment that it is, or -1


def _access(item: VmaItem) -> tuple[int, int]:
    """What decides how the file behind a mapping is opened."""
    shared = item.flags & VmaFlag.SHARED
    return item.objref, shared | (item.flags & VmaFlag.WRITE if shared else 0)


@dataclass(slots=True)
class Piece:
    """A stretch of address space as it is mapped in the stub now."""

    start: int
    end: int
    item: VmaItem

    def backing(self) -> tuple[int, int, int, int]:
        """What must be equal for the stretch to be kept: kind, object, offset of address 0, kind of mapping."""
        item = self.item
        shift = item.offset - item.start if item.objref else 0
        kind = VmaKind.ANON if item.kind == VmaKind.HEAP else item.kind
        return kind, item.objref, shift, item.flags & _IDENTITY


class AddressSpace:
    """The memory of one stub."""

    def __init__(self, stub: Stub, behind: Behind, name_of: Callable[[int], str]) -> None:
        self.stub = stub
        self.mm: Mm | None = None
        self._behind = behind
        self._name_of = name_of
        self._pieces: list[Piece] = []
        self._items: list[VmaItem] = []
        self._writable: list[tuple[int, int, bool]] = []
        self._zeros: list[tuple[int, int]] = []

    @property
    def items(self) -> list[VmaItem]:
        return self._items

    def apply(self, vmas: Vmas) -> None:
        """Make the mappings be exactly `vmas`. What was mapped the same keeps its contents."""
        self._flush_zeros()
        system = {_SYSTEM[VmaKind(v.kind)]: (v.start, v.end) for v in vmas.vmas if v.kind in _SYSTEM}
        self.stub.place_system_mappings(system)
        wanted = [v for v in vmas.vmas if v.kind not in _SYSTEM]
        calls: list[Call] = []
        holes: list[tuple[int, int, VmaItem]] = []
        keep: list[tuple[int, int]] = []
        same = {(p.start, p.end): p for p in self._pieces}
        changed = []
        for item in wanted:
            piece = same.get((item.start, item.end))
            if piece is not None and piece.item == item:
                del same[item.start, item.end]
            else:
                changed.append(item)
        old = sorted(same.values(), key=lambda p: p.start)  # what is there and not exactly what is wanted
        ends = [piece.end for piece in old]
        for item in changed:
            new = Piece(item.start, item.end, item)
            at = item.start
            for piece in itertools.islice(old, bisect.bisect_right(ends, item.start), None):
                if piece.start >= item.end:
                    break
                if piece.backing() != new.backing():
                    continue
                start, end = max(piece.start, item.start), min(piece.end, item.end)
                if start > at:
                    holes.append((at, start, item))
                if piece.item.flags & _PROT != item.flags & _PROT:
                    calls.append((NR["mprotect"], start, end - start, item.flags & _PROT))
                keep.append((start, end))
                at = end
            if at < item.end:
                holes.append((at, item.end, item))
        calls = self._unmaps(old, keep) + calls
        self.stub.checked(calls, "changing the address space")
        if holes:
            self._map(holes)
        self._pieces = [Piece(v.start, v.end, v) for v in wanted]
        self._items = wanted
        self._writable = [(v.start, v.end, bool(v.flags & VmaFlag.WRITE)) for v in wanted]

    def clear(self) -> None:
        """Unmap everything."""
        self._zeros.clear()
        self.stub.checked([(NR["munmap"], p.start, p.end - p.start) for p in self._pieces], "unmapping")
        self._pieces, self._items, self._writable = [], [], []

    @staticmethod
    def _unmaps(old: list[Piece], keep: list[tuple[int, int]]) -> list[Call]:
        """What of `old` is not in `keep`; both sorted."""
        calls: list[Call] = []
        i = 0
        for piece in old:
            at = piece.start
            while i < len(keep) and keep[i][1] <= at:
                i += 1
            j = i
            while j < len(keep) and keep[j][0] < piece.end:
                if keep[j][0] > at:
                    calls.append((NR["munmap"], at, keep[j][0] - at))
                at = max(at, keep[j][1])
                j += 1
            if at < piece.end:
                calls.append((NR["munmap"], at, piece.end - at))
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
        after: list[Call] = []
        names: dict[int, int] = {}
        text = b""
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
                    calls.append((NR["shmat"], segment, start, _SHM_REMAP))
                calls.append((NR["mprotect"], start, end - start, prot))
            elif item.objref:
                key = _access(item)
                offset = item.offset + start - item.start
                calls.append((NR["mmap"], start, end - start, prot, flags, inside[numbers[key]], offset))
            else:
                calls.append((NR["mmap"], start, end - start, prot, flags | _MAP_ANONYMOUS, -1, 0))
            for flag, advice in _ADVICE.items():
                if item.flags & flag:
                    after.append((NR["madvise"], start, end - start, advice))
            if item.name_objref:
                if item.name_objref not in names:
                    names[item.name_objref] = len(text)
                    text += self._name_of(item.name_objref).encode("utf-8", "surrogateescape") + b"\0"
                at = self.stub.remote.data + names[item.name_objref]
                after.append((NR["prctl"], _PR_SET_VMA, _PR_SET_VMA_ANON_NAME, start, end - start, at))
        if text:
            self.stub.put(text)
        calls += [(NR["close"], number) for number in inside]
        self.stub.checked(calls, "mapping memory")
        self.stub.call_batch(after)  # advice that this kernel does not know changes nothing that is seen

    # ------------------------------------------------------------------ contents

    def fill(self, pages: Pages) -> None:
        """Put a chunk of contents in place."""
        if not pages.ranges:
            self._flush_zeros()
            return
        data: list[tuple[int, int]] = []
        absent: list[tuple[int, int]] = []
        for item in pages.ranges:
            span = (item.start, item.start + item.nr_pages * PAGE_SIZE)
            if item.kind == PageKind.DATA:
                data.append(span)
            elif item.kind == PageKind.ABSENT:
                absent.append(span)
            else:
                self._zeros.append(span)
        if absent:
            self._drop(absent)
        if data:
            self._write(data, pages.data)

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
                        self.stub.mem.write(at, bytes(PAGE_SIZE))
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
                if writable:
                    if not run:
                        run_start = position
                    run.append((a, b - a))
                    position += b - a
                    if len(run) == memory.IOV_MAX:
                        flush()
                else:
                    flush()
                    self.stub.mem.write(a, view[position : position + b - a])
                    position += b - a
        flush()
        if position != len(view):
            raise RestartFailed(
                f"pid {self.stub.vpid}: contents for memory that is not mapped ({len(view) - position} bytes)"
            )

    def _write_run(self, run: Sequence[tuple[int, int]], view: memoryview, total: int) -> None:
        if view.readonly:
            held = ctypes.create_string_buffer(bytes(view), total)
            address = ctypes.addressof(held)
        else:
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        got = memory.write_from(self.stub.pid, address, run, total)
        if got != total:
            raise RestartFailed(
                f"pid {self.stub.vpid}: writing memory at {run[0][0]:#x}: {got} of {total} bytes",
                hint="is there enough free memory on this host?",
            )

    def _writable_parts(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Split [start, end) at the borders of mappings."""
        out = []
        i = bisect.bisect_right(self._writable, (start, 1 << 63, True)) - 1
        i = max(i, 0)
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
