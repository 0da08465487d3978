"""Bytes in, records out: a decoder without I/O, for tools and tests.

    decoder = Decoder(keep_pages=False)
    while chunk := source.read(1 << 20):
        for record in decoder.feed(chunk):
            ...
    decoder.close()               # raises if the stream was cut short

It never holds more than one record that is not complete, and with `keep_pages=False` no contents of
pages at all: those are counted, their checksum verified, and let go.
"""

from __future__ import annotations

import zlib

from migrator.errors import ImageError
from migrator.image.codec import HEADER, MAX_RECORD, REGISTRY, Record
from migrator.image.records import PAGE_SIZE, PageKind, PageRange, Pages, Trailer


class Decoder:
    """Turns a stream, in pieces of any size, into records.

    records:  those handed out so far
    offset:   bytes from the start of the stream to the record that comes next (or is broken)
    finished: the trailer came

    It checks framing and form, not order: see `migrator.image.order.Order`."""

    def __init__(self, *, keep_pages: bool = True) -> None:
        self.records = 0
        self.offset = 0
        self.finished = False
        self._keep_pages = keep_pages
        self._buffer = bytearray()
        self._error: ImageError | None = None
        self._skipping: Pages | None = None  # its contents are passing by
        self._skip = 0  # bytes of them yet to come
        self._crc = 0
        self._length = 0  # of the record that is being skipped

    def feed(self, data: bytes | bytearray | memoryview) -> list[Record]:
        """The records that `data` completes. Raises ImageError where the stream is broken.

        Records that are complete ahead of the broken one are handed out first: the error then comes
        with the next call of feed() or close(), and with every one after it."""
        if self._error is not None:
            raise self._error
        self._buffer += data
        out: list[Record] = []
        position = 0
        try:
            while True:
                taken, record = self._step(position)
                if not taken and record is None:
                    break
                position += taken
                if record is not None:
                    self._hand_out(record)
                    out.append(record)
        except ImageError as error:
            self._error = error
            if not out:
                raise
        del self._buffer[:position]
        return out

    def close(self) -> None:
        """The stream ends here. Raises ImageError if it is broken, or ends without a trailer."""
        if self._error is not None:
            raise self._error
        if not self.finished:
            inside = " and a part of one" if self._buffer or self._skipping else ""
            raise ImageError(
                f"the stream ends at byte {self.offset}, after {self.records} records{inside}, without a trailer",
                hint="it was cut short: nothing can be restarted from it",
            )

    def _hand_out(self, record: Record) -> None:
        self.records += 1
        self.offset += self._length
        self.finished = isinstance(record, Trailer)

    def _step(self, position: int) -> tuple[int, Record | None]:
        """(bytes consumed at `position`, record that they complete); nothing consumed: more is needed."""
        have = len(self._buffer) - position
        if self._skipping is not None:
            return self._skip_contents(position, have)
        if self.finished and have:
            raise self._broken("something follows the trailer")
        if have < HEADER.size:
            return 0, None
        kind, length = HEADER.unpack_from(self._buffer, position)
        cls = REGISTRY.get(kind)
        if cls is None:
            raise self._broken(f"unknown type {kind}")
        if not HEADER.size <= length <= MAX_RECORD:
            raise self._broken(f"impossible length {length}", cls)
        self._length = length
        if cls is Pages and not self._keep_pages:
            return self._begin_skipping(position, have, length)
        if have < length:
            return 0, None
        with memoryview(self._buffer) as view, view[position + HEADER.size : position + length] as payload:
            try:
                record = cls.decode(payload)
            except ImageError as error:
                raise self._broken(str(error)) from error
        if isinstance(record, Pages) and record.crc and record.crc != zlib.crc32(record.data):
            raise self._broken("the checksum of its contents is wrong", Pages)
        return length, record

    def _begin_skipping(self, position: int, have: int, length: int) -> tuple[int, Record | None]:
        head = HEADER.size + Pages._packer.size
        if length < head:
            raise self._broken("shorter than its fixed part", Pages)
        if have < head:
            return 0, None
        objref, crc, nr_ranges, nr_data = Pages._packer.unpack_from(self._buffer, position + HEADER.size)
        end = head + nr_ranges * PageRange._packer.size
        if end + nr_data != length or nr_data % 8:
            raise self._broken("its lengths do not add up", Pages)
        if have < end:
            return 0, None
        raw = bytes(self._buffer[position + head : position + end])
        ranges = [PageRange(*item) for item in PageRange._packer.iter_unpack(raw)]
        if nr_data != PAGE_SIZE * sum(item.nr_pages for item in ranges if item.kind == PageKind.DATA):
            raise self._broken(f"{nr_data} bytes of contents are not what its ranges announce", Pages)
        self._skipping = Pages(objref=objref, crc=crc, ranges=ranges, data=b"")
        self._skip, self._crc = nr_data, 0
        return end, None

    def _skip_contents(self, position: int, have: int) -> tuple[int, Record | None]:
        pages = self._skipping
        assert pages is not None
        step = min(have, self._skip)
        if pages.crc and step:
            with memoryview(self._buffer) as view, view[position : position + step] as part:
                self._crc = zlib.crc32(part, self._crc)
        self._skip -= step
        if self._skip:
            return step, None
        if pages.crc and pages.crc != self._crc:
            raise self._broken("the checksum of its contents is wrong", Pages)
        self._skipping = None
        return step, pages

    def _broken(self, what: str, cls: type[Record] | None = None) -> ImageError:
        name = f" ({cls.__name__})" if cls else ""
        return ImageError(f"record {self.records + 1}{name} at byte {self.offset}: {what}")
