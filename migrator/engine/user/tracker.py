"""Which pages of an address space must be sent: dirty tracking without stopping anybody.

A sweep gives page ranges in three lists: `data` (contents to be read and sent), `absent` (dropped, or
never there: the destination drops its own) and keeps the write protection armed for the next sweep.
The tracker knows only private memory; shared memory is migrator.engine.user.shm.

What the kernel does that one must know:
- a mapping made, moved or inherited by fork after arming is not tracked: the scan stops there with EPERM,
  the ranges before it are already re-protected and must not be lost; it is registered and sent whole;
- a page dropped by madvise(MADV_DONTNEED) is reported as written and not present;
- a page of a private file mapping that was never written is FILE: the destination has it in its file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from migrator.linux.pagemap import (
    CHECK_WPASYNC,
    IS_FILE,
    IS_PFNZERO,
    IS_PRESENT,
    IS_SWAPPED,
    IS_WRITTEN,
    WP_MATCHING,
    NotRegistered,
    Region,
    Scanner,
    WriteProtection,
)
from migrator.linux.procfs import Vma, read_text

_RETURN = IS_WRITTEN | IS_PRESENT | IS_SWAPPED | IS_FILE | IS_PFNZERO
_SPECIAL = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")
_BIG = 8 << 20  # bytes from which on a mapping is worth a scan of its own
_LONG = 256 << 10  # bytes of a written stretch that is looked at before it is read
_SPANS = 256  # populated spans of a big mapping beyond which they are not worth their scans
_GAP = 64 << 10  # bytes between two of them that are not worth it either

Span = tuple[int, int]


def is_special(vma: Vma) -> bool:
    """Mappings that the kernel makes for every process and that are not saved by content."""
    return vma.path in _SPECIAL


@dataclass(slots=True)
class Sweep:
    """Page ranges (start, end), sorted: `data` to be sent, `absent` to be dropped."""

    data: list[Span] = field(default_factory=list)
    absent: list[Span] = field(default_factory=list)

    @property
    def pages(self) -> int:
        return sum(end - start for start, end in self.data) >> 12


class WpAsyncTracker:
    """Tracking by userfaultfd's asynchronous write protection and PAGEMAP_SCAN (Linux 6.7)."""

    name = "wp-async"

    def __init__(self, scanner: Scanner, protection: WriteProtection, list_vmas: Callable[[], Sequence[Vma]]) -> None:
        """`list_vmas`: the mappings as they are now."""
        self._scanner = scanner
        self._list = list_vmas
        self._protection = protection
        self._there = IS_PRESENT | (IS_SWAPPED if _has_swap() else 0)
        self._present: list[Span] = []
        self._owed: list[Span] = []  # to be taken whole by the next sweep
        self._big: dict[int, list[Span]] = {}  # populated spans of big mappings, by where these begin
        self._first = True
        self._strict = False

    def sweep(self, vmas: Sequence[Vma], *, strict: bool = False, whole: Sequence[Span] = ()) -> Sweep:
        """What was written since the last sweep in the private mappings of `vmas`; all of it, the first time.

        `strict`: the tasks are stopped, so `vmas` are what is there, and nothing may be left out.
        `whole`: spans of which everything is to be sent, written or not."""
        self._strict = strict
        out = Sweep()
        private = [v for v in vmas if not v.shared and not is_special(v)]
        big = [v for v in private if not v.inode and v.end - v.start >= _BIG]
        groups = _adjacent([v for v in private if v.inode or v.end - v.start < _BIG])
        for group in groups:
            self._sweep_group(group, out)
        owed, self._owed = self._owed, []
        there: dict[int, list[Span]] = {}
        for vma in big:
            there[vma.start] = self._sweep_big(vma, vmas, out)
        self._big = there
        mapped = _merge([(v.start, v.end) for v in private])
        for start, end in [*whole, *intersect(_merge(owed), mapped)]:
            self._take_whole(start, end, out)
        # What was there and is not any more was dropped. A page that comes and goes between the two scans
        # is written as well, and met again by the next sweep.
        present = _merge([s for g in groups for s in self._present_in(g[0].start, g[-1].end)])
        if not self._first:
            mapped = _merge([(g[0].start, g[-1].end) for g in groups])
            out.absent += intersect(subtract(self._present, present), mapped)
        self._present = present
        self._first = False
        out.data = _merge(out.data)
        return out

    def _sweep_big(self, vma: Vma, vmas: Sequence[Vma], out: Sweep) -> list[Span]:
        """Sweep a big anonymous mapping; the spans of it that are populated.

        Where pages are known to be, the kernel is asked only whether they were written, for which it has a
        fast path, ten times as fast. It counts dropped pages as written: they read as zeros."""
        known = intersect(self._big.get(vma.start, []), [(vma.start, vma.end)])
        if not known or len(known) > _SPANS:
            known = []
        mine = Sweep()
        try:
            for start, end in known:
                for a, b, _ in self._scanner.scan(
                    start, end, mask=IS_WRITTEN, returned=IS_WRITTEN, flags=WP_MATCHING | CHECK_WPASYNC
                ):
                    if b - a < _LONG:
                        mine.data.append((a, b))
                    else:
                        self._sort_out(a, b, mine)
        except NotRegistered:
            # moved or mapped anew: nothing that was known of it holds
            if not self._register(vma, vmas if self._strict else self._list()) and not self._strict:
                self._owed.append((vma.start, vma.end))
                return []
            self._take_whole(vma.start, vma.end, out)
            return _coarse(self._present_in(vma.start, vma.end))
        for start, end in subtract([(vma.start, vma.end)], known):
            self._sweep_group([replace(vma, start=start, end=end)], mine)
        out.data += mine.data
        out.absent += mine.absent
        if not known:
            return _coarse(self._present_in(vma.start, vma.end))
        return _coarse(_merge(known + mine.data))

    def _sort_out(self, start: int, end: int, out: Sweep) -> None:
        """What of a written stretch has contents."""
        regions = self._scanner.scan(start, end, anyof=self._there, returned=_RETURN)
        there = _merge([(a, b) for a, b, categories in regions if self._has_content(categories)])
        out.data += there
        out.absent += subtract([(start, end)], there)

    @staticmethod
    def everything(scanner: Scanner, vmas: Sequence[Vma]) -> Sweep:
        """All that is in the private mappings of a stopped process that was never tracked."""
        there = IS_PRESENT | (IS_SWAPPED if _has_swap() else 0)
        out = Sweep()
        for group in _adjacent([v for v in vmas if not v.shared and not is_special(v)]):
            for start, end, categories in scanner.scan(group[0].start, group[-1].end, anyof=there, returned=_RETURN):
                if not categories & (IS_FILE | IS_PFNZERO):
                    out.data.append((start, end))
        out.data = _merge(out.data)
        return out

    def sweep_shared(self, vma: Vma) -> list[Span]:
        """Addresses of a shared mapping that were written through it since the last sweep."""
        try:
            return [(a, b) for a, b, _ in self._scan(vma.start, vma.end)]
        except NotRegistered:
            self._register(vma, self._list())
            with contextlib.suppress(NotRegistered):
                self._scan(vma.start, vma.end)
            return [(vma.start, vma.end)]

    def _sweep_group(self, group: list[Vma], out: Sweep) -> None:
        start, end = group[0].start, group[-1].end
        try:
            self._classify(self._scan(start, end), out)
            return
        except NotRegistered as stop:
            self._classify(stop.regions, out)
            start = stop.resume
        # Somewhere behind `start` is at least one that is not tracked yet. Read the mappings again: where
        # a hole was made and filled since, the list has one mapping and the kernel three.
        now = self._list() if not self._strict else group
        for vma in now:
            if vma.end <= start or vma.start >= end or vma.shared or is_special(vma):
                continue
            low, high = max(vma.start, start), min(vma.end, end)
            try:
                self._classify(self._scan(low, high), out)
            except NotRegistered as stop:
                self._classify(stop.regions, out)
                if self._register(vma, now) or self._strict:
                    self._take_whole(low, high, out)
                # else it changed since it was listed; the next sweep meets what is there now

    def _scan(self, start: int, end: int) -> list[Region]:
        # without `anyof`, memory that was never touched counts as written, and protecting it costs page tables
        return self._scanner.scan(
            start,
            end,
            mask=IS_WRITTEN,
            anyof=IS_PRESENT | IS_SWAPPED,
            returned=_RETURN,
            flags=WP_MATCHING | CHECK_WPASYNC,
        )

    def _present_in(self, start: int, end: int) -> list[Span]:
        regions = self._scanner.scan(start, end, anyof=self._there, returned=self._there)
        return [(a, b) for a, b, _ in regions]

    def _take_whole(self, start: int, end: int, out: Sweep) -> None:
        """Send everything that is in a mapping, and drop the rest.

        Not only what is written: parts of it may have been tracked before, and are dropped with the rest."""
        with contextlib.suppress(NotRegistered):
            self._scan(start, end)
        regions = self._scanner.scan(start, end, anyof=self._there, returned=_RETURN)
        there = _merge([(a, b) for a, b, categories in regions if self._has_content(categories)])
        out.data += there
        if not self._first:
            out.absent += subtract([(start, end)], there)

    def _register(self, vma: Vma, vmas: Sequence[Vma]) -> bool:
        """False where the kernel does not track: what is there is then sent whole when the tasks are stopped.

        Registers up to the neighbours. A mapping that has grown since it was listed would otherwise be cut
        in two, which the program would notice: mremap(2) refuses to work on two mappings."""
        start = max([v.end for v in vmas if v.end <= vma.start], default=vma.start)
        end = min([v.start for v in vmas if v.start >= vma.end], default=vma.end)
        try:
            self._protection.register(start, end)
        except OSError:
            return False
        return True

    def _classify(self, regions: Sequence[Region], out: Sweep) -> None:
        for start, end, categories in regions:
            (out.data if self._has_content(categories) else out.absent).append((start, end))

    def _has_content(self, categories: int) -> bool:
        return bool(categories & self._there) and not categories & (IS_FILE | IS_PFNZERO)


def _has_swap() -> bool:
    return len(read_text("/proc/swaps").strip().split("\n")) > 1


def subtract(old: list[Span], new: list[Span]) -> list[Span]:
    """Parts of `old` that are not in `new`; both sorted and merged."""
    out = []
    i = 0
    for start, end in old:
        while i < len(new) and new[i][1] <= start:
            i += 1
        j = i
        while j < len(new) and new[j][0] < end:
            if new[j][0] > start:
                out.append((start, new[j][0]))
            start = max(start, new[j][1])
            j += 1
        if start < end:
            out.append((start, end))
    return out


def intersect(a: list[Span], b: list[Span]) -> list[Span]:
    """What is in both; both sorted and merged."""
    return subtract(a, subtract(a, b))


def _adjacent(vmas: Sequence[Vma]) -> list[list[Vma]]:
    groups: list[list[Vma]] = []
    for vma in vmas:
        if groups and groups[-1][-1].end == vma.start:
            groups[-1].append(vma)
        else:
            groups.append([vma])
    return groups


def _merge(spans: list[Span]) -> list[Span]:
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and out[-1][1] >= start:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _coarse(spans: list[Span]) -> list[Span]:
    """Sorted spans, joined over small gaps."""
    out: list[Span] = []
    for start, end in spans:
        if out and start - out[-1][1] <= _GAP:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out
