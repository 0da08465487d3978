"""The arithmetic of page ranges that dirty tracking rests on."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from migrator.engine.user.dump.dirty_tracker import WpAsyncTracker, groups_of
from migrator.engine.user.dump.pages import chunks, split_readable
from migrator.engine.user.ranges import Span, coarse, intersect, merge, subtract, windows
from migrator.linux.memory import IOV_MAX
from migrator.linux.pagemap import (
    CHECK_WPASYNC,
    IS_FILE,
    IS_PRESENT,
    IS_SWAPPED,
    IS_WRITTEN,
    WP_MATCHING,
    NotRegistered,
    Region,
    Scanner,
)
from migrator.linux.procfs import Vma

raw_spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda p: (p[0], p[0] + p[1])), max_size=12)
spans = raw_spans.map(merge)


def pages(ranges: list[Span]) -> set[int]:
    return {page for start, end in ranges for page in range(start, end)}


@given(raw_spans)
def test_merged_spans_hold_the_same_pages_apart_and_in_order(ranges: list[Span]) -> None:
    merged = merge(ranges)
    assert pages(merged) == pages(ranges)
    assert all(a[1] < b[0] for a, b in pairwise(merged))


@given(spans, spans)
def test_what_is_gone_is_what_was_there_and_is_not_any_more(old: list[Span], new: list[Span]) -> None:
    assert pages(subtract(old, new)) == pages(old) - pages(new)


@given(spans, spans)
def test_what_is_in_both_is_in_each(a: list[Span], b: list[Span]) -> None:
    assert pages(intersect(a, b)) == pages(a) & pages(b)


@given(spans)
def test_coarse_spans_leave_nothing_out(ranges: list[Span]) -> None:
    scaled = [(a * 16384, b * 16384) for a, b in ranges]
    joined = coarse(scaled, 65536)
    assert subtract(scaled, joined) == []
    assert all(b[0] - a[1] > 65536 for a, b in pairwise(joined))


@given(spans, st.integers(1, 9))
def test_windows_are_small_and_lose_nothing(ranges: list[Span], size: int) -> None:
    pieces = list(windows(ranges, size))
    assert merge(pieces) == ranges
    assert sum(end - start for start, end in pieces) == len(pages(ranges))
    assert all(0 < end - start <= size for start, end in pieces)


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 700)), max_size=30))
def test_chunks_are_small_and_lose_nothing(items: list[Span]) -> None:
    ranges = [(start << 12, (start + count) << 12) for start, count in items]
    total = 0
    for group, size in chunks(ranges):
        assert size == sum(length for _, length in group) <= 1 << 20
        assert len(group) <= IOV_MAX
        total += size
    assert total == sum(end - start for start, end in ranges)


def vma(start: int, end: int, *, read: bool, shared: bool = False) -> Vma:
    return Vma(start, end, read, False, False, shared, 0, "00:00", 0, "")


def test_ranges_are_split_at_mappings_by_whether_the_program_may_read_them() -> None:
    vmas = [vma(0, 10, read=True), vma(10, 20, read=False), vma(30, 40, read=True)]
    assert split_readable([(5, 35)], vmas) == ([(5, 10), (30, 35)], [(10, 20)])


def test_mappings_that_touch_are_swept_together() -> None:
    vmas = [vma(0, 10, read=True), vma(10, 20, read=False), vma(30, 40, read=True)]
    assert starts(groups_of(vmas, None)) == [[0, 10], [30]]


def test_of_a_stopped_process_gaps_are_swept_over_where_nothing_can_be() -> None:
    vmas = [vma(0, 10, read=True), vma(20, 30, read=True), vma(40, 50, read=True), vma(50, 60, read=True, shared=True)]
    vmas += [vma(70, 80, read=True), vma(80, 80 + (8 << 20), read=True), vma(9 << 20, 10 << 20, read=True)]
    assert starts(groups_of(vmas, (30, 35))) == [[0, 20], [40], [70], [9 << 20]]
    assert starts(groups_of(vmas, (0, 0))) == [[0, 20, 40], [70], [9 << 20]]


class Untracked(Scanner):
    """A kernel that tracks what was registered: as a scanner, and as the protection."""

    def __init__(self) -> None:  # of no process
        self.registered: list[Span] = []

    def register(self, start: int, end: int) -> None:
        self.registered = merge([*self.registered, (start, end)])

    def scan(self, start: int, end: int, *, flags: int = 0, **_: object) -> list[Region]:  # type: ignore[override]
        if flags & CHECK_WPASYNC and (missing := subtract([(start, end)], self.registered)):
            raise NotRegistered([], missing[0][0])
        return []


def test_a_mapping_that_moves_across_the_end_of_what_is_registered_is_not_left_cut_in_two() -> None:
    kernel = Untracked()
    listed = [vma(1, 10, read=True), vma(20, 30, read=True), vma(50, 60, read=False)]
    cut = [vma(1, 10, read=True), vma(12, 20, read=True), vma(20, 28, read=True), vma(50, 60, read=False)]
    lists = iter([listed, cut, cut])  # what is there when it registers, and after it
    tracker = WpAsyncTracker(kernel, kernel, lambda: next(lists, cut))  # type: ignore[arg-type]
    tracker.first = False
    list(tracker.sweep([vma(1, 10, read=True)]))
    assert subtract([(12, 28)], kernel.registered) == []


class Kernel(Untracked):
    """A kernel whose page tables a test writes: pages by number, each with its categories."""

    def __init__(self, pages: dict[int, int], markers: set[int]) -> None:
        super().__init__()
        self.categories, self.markers = pages, markers

    def scan(  # type: ignore[override]
        self, start: int, end: int, *, mask: int = 0, anyof: int = -1, without: int = 0, returned: int, flags: int = 0
    ) -> list[Region]:
        found = []
        for page in sorted(self.categories):
            has = self.categories[page]
            if start <= page < end and has & mask == mask and has & anyof and not has & without:
                found.append((page, page + 1, has & returned))
                if flags & WP_MATCHING:
                    self.categories[page] &= ~IS_WRITTEN
        return found

    def pages(self, start: int, end: int) -> list[Span]:
        return [(page, page + 1) for page in range(start, end) if page not in self.markers]


def test_what_is_swapped_is_there_unless_it_is_the_marker_of_a_dropped_page() -> None:
    there, moving, dropped = IS_PRESENT | IS_WRITTEN, IS_SWAPPED | IS_WRITTEN, IS_SWAPPED
    kernel = Kernel({1: there, 2: moving, 3: there, 4: there, 5: there, 6: IS_PRESENT | IS_FILE}, markers=set())
    mapped = [vma(1, 10, read=True)]
    tracker = WpAsyncTracker(kernel, kernel, lambda: mapped)  # type: ignore[arg-type]
    (first,) = tracker.sweep(mapped)
    assert (pages(first.data), first.absent) == ({1, 2, 3, 4, 5}, [])
    kernel.categories |= {1: moving, 3: IS_SWAPPED, 4: dropped, 5: IS_PRESENT | IS_FILE}
    kernel.markers = {4}
    (second,) = tracker.sweep(mapped)
    assert (pages(second.data), pages(second.absent)) == ({1}, {4, 5})


def starts(groups: list[list[Vma]]) -> list[list[int]]:
    return [[v.start for v in group] for group in groups]
