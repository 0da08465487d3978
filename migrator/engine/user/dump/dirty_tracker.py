"""Which pages of an address space must be sent: dirty tracking without stopping anybody.

A sweep gives page ranges in two lists: `data` (contents to be read and sent) and `absent` (dropped, or
never there: the destination drops its own), and renews the write protection for the next sweep. Big
mappings come in pieces, each as fresh as can be and small enough to be held in memory.
The tracker knows only private memory; shared memory is migrator.engine.user.dump.shm.

What the kernel does that one must know:
- a mapping made, moved or inherited by fork after instrument() is not tracked: the scan stops there with EPERM,
  the ranges before it are already re-protected and must not be lost; it is registered and sent whole;
- a page dropped by madvise(MADV_DONTNEED) is reported as written and not present;
- a page of a private file mapping that was never written is FILE: the destination has it in its file;
- of a page of a private file mapping that was dropped, its write protection is left: SWAPPED, and FILE when it is read
  again, never WRITTEN. So a page counts as there only as long as it is the process's own;
- a page that the kernel is moving (compaction, a huge page taken apart) is SWAPPED for that time, on any host.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import attrgetter

from migrator.engine.user.ranges import Span, coarse, intersect, merge, subtract, windows
from migrator.linux import x86_64 as arch
from migrator.linux.pagemap import (
    CHECK_WPASYNC,
    IS_FILE,
    IS_GUARD,
    IS_PFNZERO,
    IS_PRESENT,
    IS_SWAPPED,
    IS_WRITTEN,
    WP_MATCHING,
    NotRegistered,
    Region,
    Scanner,
    WriteProtection,
    guards_known,
)
from migrator.linux.procfs import Vma

_THERE = IS_PRESENT | IS_SWAPPED
_RETURN = IS_WRITTEN | _THERE | IS_FILE | IS_PFNZERO
_SPECIAL = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")
_BIG = 8 << 20  # bytes from which on a mapping is worth a scan of its own
_LONG = 256 << 10  # bytes of a written stretch that is looked at before it is read
_SPANS = 256  # populated spans of a big mapping beyond which they are not worth their scans
_GAP = 64 << 10  # bytes between two of them that are not worth it either
_WINDOW = 128 << 20  # bytes of a big mapping that are swept at a time
_start, _end = attrgetter("start"), attrgetter("end")


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


def gathered(pieces: Iterable[Sweep], enough: int) -> Iterator[Sweep]:
    """The same, with pieces put together until one has `enough` pages: little that is found goes with more."""
    found, pages = Sweep(), 0
    for piece in pieces:
        found.data += piece.data
        found.absent += piece.absent
        pages += piece.pages
        if pages >= enough:
            yield Sweep(merge(found.data), found.absent)  # sorted, as mappings are
            found, pages = Sweep(), 0
    if pages or found.absent:
        yield Sweep(merge(found.data), found.absent)


class WpAsyncTracker:
    """Tracking by userfaultfd's asynchronous write protection and PAGEMAP_SCAN (Linux 6.7)."""

    name = "wp-async"

    def __init__(
        self,
        scanner: Scanner,
        protection: WriteProtection,
        list_vmas: Callable[[], Sequence[Vma]],
        hidden: Span = (0, 0),
    ) -> None:
        """`list_vmas`: the mappings as they are now. `hidden`: where one lies that nobody lists."""
        self._scanner = scanner
        self._list = list_vmas
        self._hidden = hidden
        self._protection = protection
        self._present: list[Span] = []
        self._owed: list[Span] = []  # to be taken whole by the next sweep
        self._edges: set[int] = set()  # of what was registered while the tasks ran, until _join_cut()
        self._unmapped: list[Span] = []  # what had contents when it was unmapped, and is not mapped again so far
        self._big: dict[int, list[Span]] = {}  # populated spans of big mappings, by where these begin
        self._returned = _RETURN | guards_known()
        self.first = True  # until the first sweep is over
        self.met_guards = False  # since the caller has looked at it last
        self._strict = False

    def sweep(self, vmas: Sequence[Vma], *, strict: bool = False, whole: Sequence[Span] = ()) -> Iterator[Sweep]:
        """What was written since the last sweep in the private mappings of `vmas`; all of it, the first time.

        `strict`: the tasks are stopped, so `vmas` are what is there, and nothing may be left out.
        `whole`: spans of which everything is to be sent, written or not."""
        self._strict = strict
        private = [v for v in vmas if _is_private(v)]
        mapped = merge((v.start, v.end) for v in private)
        owed, self._owed = [*self._owed, *self._mapped_again(mapped)], []
        yield self._sweep_small(vmas)
        there: dict[int, list[Span]] = {}
        for vma in private:
            if _is_big(vma):
                there[vma.start] = yield from self._sweep_big(vma, vmas)
        self._big = there
        for start, end in windows([*whole, *intersect(merge(owed), mapped)], _WINDOW):
            yield self._taken_whole(start, end)
        self.first = False

    def _mapped_again(self, mapped: Sequence[Span]) -> list[Span]:
        """Where a mapping ended between two sweeps and there is one again: one that shrank and grew is still tracked,
        and nothing would tell that what was sent of its end has been dropped."""
        big = [span for spans in self._big.values() for span in spans]
        gone = subtract(self._present, mapped) + subtract(big, mapped)
        self._unmapped = merge([*self._unmapped, *gone])
        again = intersect(self._unmapped, mapped)
        self._unmapped = subtract(self._unmapped, mapped)
        return again

    def _sweep_small(self, vmas: Sequence[Vma]) -> Sweep:
        out = Sweep()
        groups = groups_of(vmas, self._hidden if self._strict else None)
        for group in groups:
            self._sweep_group(group, out)
            if not self.first:  # then all are registered, and the mappings would be read again for each
                self._join_cut()
        self._join_cut()
        # What was there and is not any more was dropped. A page that comes and goes between the two scans
        # is written as well, and met again by the next sweep.
        present = merge(s for g in groups for s in self._scanner.own(g[0].start, g[-1].end))
        if not self.first:
            mapped = merge((v.start, v.end) for group in groups for v in group)
            out.absent += intersect(subtract(self._present, present), mapped)
        self._present = present
        out.data = merge(out.data)
        return out

    def _sweep_big(self, vma: Vma, vmas: Sequence[Vma]) -> Generator[Sweep, None, list[Span]]:
        """Sweep a big anonymous mapping, in pieces; returns the spans of it that are populated.

        Where pages are known to be, the kernel is asked only whether they were written, for which it has a
        fast path, ten times as fast. It counts dropped pages as written: they read as zeros."""
        all_of_it = [(vma.start, vma.end)]
        known = intersect(self._big.get(vma.start, []), all_of_it)
        if len(known) > _SPANS:
            known = []
        there = list(known)
        try:
            for start, end in windows(known, _WINDOW):
                yield self._written(start, end)
            for start, end in windows(subtract(all_of_it, known), _WINDOW):
                piece = Sweep()
                self._classify(self._scan(start, end), piece)
                piece.data = merge(piece.data)
                if known:
                    there += piece.data
                yield piece
        except NotRegistered:
            # moved or mapped anew: nothing that was known of it holds
            if not self._register(vma, vmas if self._strict else self._list()) and not self._strict:
                self._owed.append((vma.start, vma.end))
                return []
            self._join_cut()
            for start, end in windows(all_of_it, _WINDOW):
                yield self._taken_whole(start, end)
            known = []
        if not known:
            there = self._scanner.own(vma.start, vma.end)
        return coarse(merge(there), _GAP)

    def _written(self, start: int, end: int) -> Sweep:
        out = Sweep()
        for a, b, _ in self._scanner.scan(
            start, end, mask=IS_WRITTEN, returned=IS_WRITTEN, flags=WP_MATCHING | CHECK_WPASYNC
        ):
            if b - a < _LONG:
                out.data.append((a, b))
            else:
                self._sort_out(a, b, out)
        return out

    def _sort_out(self, start: int, end: int, out: Sweep) -> None:
        """What of a written stretch has contents."""
        regions = self._scanner.scan(start, end, anyof=_THERE | guards_known(), returned=self._returned)
        there = merge(self._contents(regions))
        out.data += there
        out.absent += subtract([(start, end)], there)

    @staticmethod
    def everything(scanner: Scanner, vmas: Sequence[Vma]) -> Iterator[Sweep]:
        """All that is in the private mappings of a stopped process that was never tracked."""
        mapped = merge((v.start, v.end) for v in vmas if _is_private(v))
        for window in windows(mapped, _WINDOW):
            yield Sweep(merge(scanner.own(*window)))

    def sweep_shared(self, vma: Vma) -> list[Span]:
        """Addresses of a shared mapping that were written through it since the last sweep."""
        try:
            written = self._scan(vma.start, vma.end)
            self.met_guards |= any(categories & IS_GUARD for _, _, categories in written)
            return [(a, b) for a, b, _ in written]
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
            if vma.end <= start or vma.start >= end or vma.shared or is_special(vma) or vma.start == self._hidden[0]:
                continue
            low, high = max(vma.start, start), min(vma.end, end)
            try:
                self._classify(self._scan(low, high), out)
            except NotRegistered as stop:
                self._classify(stop.regions, out)
                if self._register(vma, now) or self._strict:
                    taken = self._taken_whole(low, high)
                    out.data += taken.data
                    out.absent += taken.absent
                # else it changed since it was listed; the next sweep meets what is there now

    def _scan(self, start: int, end: int) -> list[Region]:
        # without `anyof`, memory that was never touched counts as written, and protecting it costs page tables
        return self._scanner.scan(
            start,
            end,
            mask=IS_WRITTEN,
            anyof=_THERE,
            returned=self._returned,
            flags=WP_MATCHING | CHECK_WPASYNC,
        )

    def _taken_whole(self, start: int, end: int) -> Sweep:
        """Everything that is in a stretch of a mapping; the rest of it is to be dropped.

        Not only what is written: parts of it may have been tracked before, and are dropped with the rest."""
        with contextlib.suppress(NotRegistered):
            self._scan(start, end)
        out = Sweep()
        self._sort_out(start, end, out)
        if self.first:
            out.absent = []
        return out

    def _register(self, vma: Vma, vmas: Sequence[Vma]) -> bool:
        """False where the kernel does not track: what is there is then sent whole when the tasks are stopped.

        Registers up to the neighbours. A mapping that has grown since it was listed would otherwise be cut
        in two, which the program would notice: mremap(2) refuses to work on two mappings."""
        before = bisect_right(vmas, vma.start, key=_end) - 1
        behind = bisect_left(vmas, vma.end, key=_start)
        start = vmas[before].end if before >= 0 else vma.start
        end = vmas[behind].start if behind < len(vmas) else vma.end
        end = min(end, arch.USER_END)  # above the last mapping there may be only [vsyscall], which is the kernel's
        try:
            self._protection.register(start, end)
        except OSError:
            return False
        if not self._strict:
            self._edges |= {start, end}
        return True

    def _join_cut(self) -> None:
        """A mapping that came to lie across an end of what was registered, after it was listed, is two mappings now: as
        soon as both are tracked, the kernel makes them one again."""
        if not self._edges:
            return
        edges, self._edges = self._edges, set()
        for left, right in pairwise(self._list()):
            if left.end == right.start and left.end in edges and _alike(left, right):
                with contextlib.suppress(OSError):
                    self._protection.register(left.start, right.end)
                if not self.first:
                    self._owed.append((left.start, right.end))

    def _classify(self, regions: Sequence[Region], out: Sweep) -> None:
        there = self._contents(regions)
        out.data += there
        out.absent += subtract([(start, end) for start, end, _ in regions], there)

    def _contents(self, regions: Sequence[Region]) -> list[Span]:
        self.met_guards |= any(categories & IS_GUARD for _, _, categories in regions)
        return self._scanner.own_of(regions)


def groups_of(vmas: Sequence[Vma], hidden: Span | None) -> list[list[Vma]]:
    """Small private mappings that one scan can sweep: nothing else is mapped between those of a group.

    While the tasks run, `hidden` is None and those of a group touch: in a gap something may appear after
    `vmas` were listed, and a scan would take its pages for sent. Later, `hidden` is the only such thing."""
    groups: list[list[Vma]] = []
    last: Vma | None = None  # of the group that is open
    for vma in vmas:
        if not _is_private(vma) or _is_big(vma):
            last = None
            continue
        if last is not None and last.end < vma.start and (hidden is None or last.end <= hidden[0] < vma.start):
            last = None
        if last is None:
            groups.append([])
        groups[-1].append(vma)
        last = vma
    return groups


def _alike(a: Vma, b: Vma) -> bool:
    """Whether two neighbours can be parts of one anonymous mapping."""
    return _is_private(a) and not a.inode and replace(a, start=b.start, end=b.end) == b


def _is_private(vma: Vma) -> bool:
    return not vma.shared and not is_special(vma)


def _is_big(vma: Vma) -> bool:
    return not vma.inode and vma.end - vma.start >= _BIG
