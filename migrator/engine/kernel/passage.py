"""A stream on its way between the kernel and whoever has the other end: pure, bytes in and bytes out.

The calls know nothing of containers: what stands around one is made by the project. So the record of a container is
put in on the way out and left out on the way in, and the trailer counts one record more or less.

    passage = Passage(insert=container.encode())
    while not passage.done:
        out += passage.feed(read())
"""

from __future__ import annotations

from migrator.errors import ImageError
from migrator.image.codec import HEADER, MAX_RECORD
from migrator.image.records import Container, Error, PageKind, PageRange, Pages, RoundFlag, RoundMark, Trailer, Tree
from migrator.image.records_shared import TmpfsEntry

_LOOKED_AT = frozenset({Container.TYPE, TmpfsEntry.TYPE, RoundMark.TYPE, Trailer.TYPE, Error.TYPE})


class Passage:
    """insert:       a record that comes ahead of the first tree, b"" for none
    leave_out:    pass on no `Container`, and no `TmpfsEntry`: they are in `tmpfs`
    done:         the trailer has passed, or an error record
    rounds:       numbers of the rounds whose end has passed
    bytes:        that have passed on
    absent:       pages that have passed without contents"""

    def __init__(self, *, insert: bytes = b"", leave_out: bool = False) -> None:
        self.done = False
        self.rounds: list[int] = []
        self.tmpfs: list[TmpfsEntry] = []
        self.bytes = self.absent = 0
        self._insert, self._leave_out = insert, leave_out
        self._more = 0  # records of ours
        self._held = b""  # the beginning of a record that is not whole
        self._skip = 0  # bytes of a record that has begun to pass

    def feed(self, data: bytes) -> list[bytes | memoryview]:
        """What passes on for these bytes; what follows the trailer does not. Raises ImageError for a length that no
        record has."""
        out = self._feed(data)
        self.bytes += sum(len(part) for part in out)
        return out

    def _feed(self, data: bytes) -> list[bytes | memoryview]:
        data = self._held + data if self._held else data
        view = memoryview(data)
        out: list[bytes | memoryview] = []
        begin, at = 0, self._skip
        while not self.done and at + HEADER.size <= len(data):
            kind, length = HEADER.unpack_from(data, at)
            if not HEADER.size <= length <= MAX_RECORD:
                raise ImageError(f"a record of type {kind} has an impossible length, {length}")
            if kind in _LOOKED_AT and at + length > len(data):
                break  # until it is whole
            if kind == Pages.TYPE and not self._count(data, at, length):
                break  # until its ranges are there
            replaced = self._replace(kind, data[at : at + length]) if kind in _LOOKED_AT else None
            if kind == Tree.TYPE and self._insert:
                out += [view[begin:at], self._insert]
                begin, self._insert, self._more = at, b"", self._more + 1
            if replaced is not None:
                out += [view[begin:at], replaced]
                begin = at + length
            at += length
        if self.done:
            out.append(view[begin:at])
            return out
        if at >= len(data):
            out.append(view[begin:])
            self._held, self._skip = b"", at - len(data)
        else:
            out.append(view[begin:at])
            self._held, self._skip = data[at:], 0
        return out

    def _count(self, data: bytes, at: int, length: int) -> bool:
        """Count the pages without contents of a record that has `length`; false if what says so is not there yet."""
        ranges = at + HEADER.size + Pages._packer.size
        if ranges > len(data):
            return at + length <= len(data)  # too short for one: whoever reads it says so
        nr_ranges = int(Pages._packer.unpack_from(data, at + HEADER.size)[2])
        end = ranges + nr_ranges * PageRange._packer.size
        if end > min(at + length, len(data)):
            return end > at + length
        for _start, nr_pages, kind in PageRange._packer.iter_unpack(memoryview(data)[ranges:end]):
            self.absent += nr_pages if kind != PageKind.DATA else 0
        return True

    def _replace(self, kind: int, raw: bytes) -> bytes | None:
        """What stands for a record; None for itself."""
        payload = raw[HEADER.size :]
        if kind in (Container.TYPE, TmpfsEntry.TYPE) and self._leave_out:
            if kind == TmpfsEntry.TYPE:
                self.tmpfs.append(TmpfsEntry.decode(payload))
            self._more -= 1
            return b""
        if kind == RoundMark.TYPE:
            mark = RoundMark.decode(payload)
            if mark.flags == RoundFlag.END:
                self.rounds.append(mark.number)
        if kind in (Trailer.TYPE, Error.TYPE):
            self.done = True
        if kind == Trailer.TYPE and self._more:
            trailer = Trailer.decode(payload)
            return Trailer(trailer.magic, max(trailer.nr_records + self._more, 0)).encode()
        return None
