"""Contents of memory: from a tracee into the stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from migrator.engine.stream import RangeOfPages, RecordWriter
from migrator.engine.user.ranges import Span
from migrator.image.records import PAGE_SIZE, PageKind
from migrator.linux import memory
from migrator.linux.procfs import Vma

CHUNK = 1 << 20  # bytes of contents in one record: big enough for throughput, small enough to pipeline
_LONG = 8 * PAGE_SIZE  # bytes of a range from which on a call of its own costs nothing
_WORDS = PAGE_SIZE // 8
_DATA, _ZERO = int(PageKind.DATA), int(PageKind.ZERO)


class PageSender:
    """Reads page ranges and writes `Pages` records. Counts pages sent with contents and without."""

    def __init__(self, writer: RecordWriter) -> None:
        self._writer = writer
        self._buffer = memory.Buffer(CHUNK)
        self.pages = 0
        self.zero_pages = 0
        self.unreadable: list[Span] = []  # pages that were to be sent, and could not be read

    def send(
        self,
        pid: int,
        objref: int,
        data: Sequence[Span],
        absent: Sequence[Span],
        vmas: Sequence[Vma],
        mem: memory.MemFile,
        *,
        first: bool = False,
    ) -> None:
        """Send pages of an address space: `absent` first, then `data`. end() is to follow, once.

        `first`: nothing of it was sent yet, so much may be shared with who forked it, and stays so.
        What cannot be read is left out, and told in `unreadable`."""
        self.announce(objref, absent, PageKind.ABSENT)
        readable, hidden = split_readable(data, vmas)
        for ranges, total in chunks(readable):
            if first or total >= _LONG * len(ranges):
                got = self._read_each(ranges, mem)
            else:
                got = memory.read_into(pid, self._buffer.address, ranges, total)
            if got == total:
                self._emit(objref, ranges)
            else:
                self._one_by_one(objref, ranges, mem)
        for ranges, _ in chunks(hidden):
            self._one_by_one(objref, ranges, mem)

    def end(self, objref: int) -> None:
        """Say that an object is complete in this round."""
        self._writer.pages(objref, [])

    def send_file(self, objref: int, spans: Iterable[Span], read: Callable[[memoryview, int], int]) -> None:
        """Send ranges of a shared object; `read` fills a view from an offset and gives the bytes it got."""
        for ranges, _ in chunks(spans):
            position = 0
            for start, length in ranges:
                view = self._buffer.view[position : position + length]
                got = read(view, start)
                if got < length:
                    view[got:] = bytes(length - got)
                position += length
            self._emit(objref, ranges)
        self.end(objref)

    def _read_each(self, ranges: Sequence[Span], mem: memory.MemFile) -> int:
        position = 0
        for start, length in ranges:
            if mem.read_into(self._buffer.view[position : position + length], start) != length:
                return -1
            position += length
        return position

    def _one_by_one(self, objref: int, ranges: Sequence[Span], mem: memory.MemFile) -> None:
        position = 0
        got: list[Span] = []
        for start, length in ranges:
            for page in range(start, start + length, PAGE_SIZE):
                view = self._buffer.view[position : position + PAGE_SIZE]
                try:
                    whole = os.preadv(mem.fd, [view], page) == PAGE_SIZE
                except OSError:
                    whole = False
                if not whole:
                    self.unreadable.append((page, page + PAGE_SIZE))
                    continue
                got.append((page, PAGE_SIZE))
                position += PAGE_SIZE
        if got:
            self._emit(objref, got)

    def _emit(self, objref: int, ranges: Sequence[Span]) -> None:
        view, address = self._buffer.view, self._buffer.address
        total = sum(length for _, length in ranges)
        first_words = view[:total].cast("Q")[::_WORDS].tolist()
        if 0 not in first_words:
            self.pages += total // PAGE_SIZE
            self._writer.pages(objref, [(start, n // PAGE_SIZE, _DATA) for start, n in ranges], [view[:total]])
            return
        out: list[RangeOfPages] = []
        parts: list[memoryview] = []
        position = 0
        for start, length in ranges:
            run = position  # where the current run of data pages began in the buffer
            for at in range(position, position + length, PAGE_SIZE):
                if not first_words[at // PAGE_SIZE] and memory.is_zero(address + at, PAGE_SIZE):
                    _extend(out, parts, view, start, run, at)
                    start += at - run
                    _extend_zeros(out, start)
                    self.zero_pages += 1
                    start += PAGE_SIZE
                    run = at + PAGE_SIZE
            position += length
            _extend(out, parts, view, start, run, position)
        self.pages += sum(len(part) for part in parts) // PAGE_SIZE
        self._writer.pages(objref, out, parts)

    def announce(self, objref: int, spans: Sequence[Span], kind: PageKind) -> None:
        """Say of spans that they are `kind`, without contents."""
        ranges: list[RangeOfPages] = []
        for start, end in spans:
            while start < end:
                count = min((end - start) // PAGE_SIZE, 1 << 30)
                ranges.append((start, count, int(kind)))
                start += count * PAGE_SIZE
                if len(ranges) == 8192:
                    self._writer.pages(objref, ranges)
                    ranges = []
        if ranges:
            self._writer.pages(objref, ranges)


def _extend(out: list[RangeOfPages], parts: list[memoryview], view: memoryview, start: int, run: int, end: int) -> None:
    if end > run:
        out.append((start, (end - run) // PAGE_SIZE, _DATA))
        parts.append(view[run:end])


def _extend_zeros(out: list[RangeOfPages], start: int) -> None:
    if out:
        first, count, kind = out[-1]
        if kind == _ZERO and first + count * PAGE_SIZE == start:
            out[-1] = first, count + 1, kind
            return
    out.append((start, 1, _ZERO))


def chunks(spans: Iterable[Span]) -> Iterator[tuple[list[Span], int]]:
    """Cut (start, end) spans into lists of (start, length) of at most CHUNK bytes and IOV_MAX items."""
    ranges: list[Span] = []
    total = 0
    for start, end in spans:
        while start < end:
            length = min(end - start, CHUNK - total)
            ranges.append((start, length))
            total += length
            start += length
            if total == CHUNK or len(ranges) == memory.IOV_MAX:
                yield ranges, total
                ranges, total = [], 0
    if ranges:
        yield ranges, total


def split_readable(spans: Sequence[Span], vmas: Sequence[Vma]) -> tuple[list[Span], list[Span]]:
    """Split spans at the borders of mappings, into those that the program itself could read and the rest."""
    readable: list[Span] = []
    hidden: list[Span] = []
    i = 0
    for start, end in spans:
        while start < end and i < len(vmas):
            vma = vmas[i]
            if vma.end <= start:
                i += 1
                continue
            if vma.start >= end:
                break
            start = max(start, vma.start)
            stop = min(end, vma.end)
            (readable if vma.read else hidden).append((start, stop))
            start = stop
    return readable, hidden
