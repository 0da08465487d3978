"""Records on a file descriptor: blocking, streaming, never seeking.

The writer gathers small records and sends pages without copying them together; the reader reads the
contents of pages into one buffer that it reuses. Neither holds more than a record at a time.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from migrator.errors import ImageError
from migrator.image.codec import HEADER, MAX_RECORD, REGISTRY, Record
from migrator.image.records import TRAILER_MAGIC, Error, PageRange, Pages, Trailer

_FLUSH_AT = 256 << 10
_SMALL = 32 << 10  # bytes of pages that are copied, to go out with what follows

RangeOfPages = tuple[int, int, int]  # the fields of a PageRange: start, nr_pages, kind


class RecordWriter:
    """Writes records to `fd`. `bytes` and `records` count what was written so far, buffered or not.

    checksums: of the contents of pages too"""

    def __init__(self, fd: int, *, checksums: bool = False) -> None:
        self.fd = fd
        self.checksums = checksums
        self.bytes = 0
        self.records = 0
        self._pending: list[Any] = []
        self._pending_bytes = 0

    def write(self, rec: Record) -> None:
        self.encoded(rec.encode())

    def encoded(self, raw: bytes) -> None:
        """As write(), of a record that is encoded already."""
        self._put(raw)
        self.records += 1

    def pages(self, objref: int, ranges: Sequence[RangeOfPages], data: Sequence[memoryview | bytes] = ()) -> None:
        """Write a `Pages` record whose contents are `data`: sent from where they are, then free for reuse."""
        size_of_data = sum(len(part) for part in data)
        crc = 0
        if self.checksums:
            for part in data:
                crc = zlib.crc32(part, crc)
        flat: list[int] = []
        for start, nr_pages, kind in ranges:
            flat += (start, nr_pages | kind << 32)  # two u32, as PageRange has them
        head = Pages._packer.pack(objref, crc, len(ranges), size_of_data) + struct.pack(f"<{len(flat)}Q", *flat)
        length = HEADER.size + len(head) + size_of_data
        if length > MAX_RECORD:
            raise ImageError(f"a chunk of {size_of_data} bytes of pages is longer than a record may be")
        self._put(HEADER.pack(Pages.TYPE, length) + head)
        self.records += 1
        if size_of_data <= _SMALL:
            for part in data:
                self._put(bytes(part))
        else:
            for part in data:
                self._put(part)
            self.flush()

    def trailer(self) -> None:
        self.write(Trailer(magic=TRAILER_MAGIC, nr_records=self.records + 1))
        self.flush()

    def error(self, text: str) -> None:
        """End the stream with the reason why it is not whole. Never raises: the first cause must win."""
        try:
            self.write(Error(text))
            self.flush()
        except OSError:
            pass

    def _put(self, data: Any) -> None:
        self._pending.append(data)
        self._pending_bytes += len(data)
        self.bytes += len(data)
        if self._pending_bytes >= _FLUSH_AT or len(self._pending) >= 512:
            self.flush()

    def flush(self) -> None:
        views = [memoryview(part).cast("B") for part in self._pending if len(part)]
        self._pending, self._pending_bytes = [], 0
        while views:
            sent = os.writev(self.fd, views[:512])
            while sent:
                if sent >= len(views[0]):
                    sent -= len(views[0])
                    views.pop(0)
                else:
                    views[0] = views[0][sent:]
                    sent = 0


class RecordReader:
    """Reads records from `fd`. The input is hostile: see migrator.image.order for the order of records."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.bytes = 0  # of whole records so far
        self.records = 0
        self._buffer = bytearray(256 << 10)
        self._start = self._end = 0
        self._pages = bytearray(4 << 20)

    def next(self) -> Record:
        """The next record. Contents of a `Pages` record are a view that the next call overwrites.

        Raises ImageError at the end of the input: a stream ends with its trailer, which is not followed
        by a call."""
        kind, length = HEADER.unpack(self._take(HEADER.size))
        cls = REGISTRY.get(kind)
        if cls is None:
            raise ImageError(f"record {self.records}: unknown type {kind}")
        if not HEADER.size <= length <= MAX_RECORD:
            raise ImageError(f"record {self.records} ({cls.__name__}): impossible length {length}")
        body = length - HEADER.size
        record = self._read_pages(body) if cls is Pages else cls.decode(self._take(body))
        self.records += 1
        self.bytes += length
        return record

    def read_ahead(self) -> bytes:
        """What was read and is in no record yet: whoever reads on from the descriptor goes on with this."""
        rest = bytes(self._buffer[self._start : self._end])
        self._start = self._end
        return rest

    def tell(self) -> int:
        """Where in a regular file the next record begins."""
        return os.lseek(self.fd, 0, os.SEEK_CUR) - (self._end - self._start)

    def _read_pages(self, length: int) -> Pages:
        size = Pages._packer.size
        if length < size:
            raise ImageError(f"record {self.records}: a chunk of pages of {length} bytes")
        fixed = self._take(size)
        objref, crc, nr_ranges, nr_data = Pages._packer.unpack(fixed)
        if size + nr_ranges * PageRange._packer.size + nr_data != length or nr_data % 8:
            raise ImageError(f"record {self.records}: a chunk of pages does not add up")
        raw = self._take(nr_ranges * PageRange._packer.size)
        ranges = [PageRange(*item) for item in PageRange._packer.iter_unpack(raw)]
        if nr_data > len(self._pages):
            self._pages = bytearray(nr_data)
        view = memoryview(self._pages)[:nr_data]
        have = min(nr_data, self._end - self._start)
        view[:have] = self._buffer[self._start : self._start + have]
        self._start += have
        while have < nr_data:
            got = os.readv(self.fd, [view[have:]])
            if not got:
                raise self._truncated()
            have += got
        if crc and crc != zlib.crc32(view):
            raise ImageError(
                f"record {self.records}: the contents of pages of object {objref} do not fit their checksum",
                hint="the image was damaged after it was written: use another copy of it",
            )
        return Pages(objref=objref, crc=crc, ranges=ranges, data=view)  # type: ignore[arg-type]

    def _take(self, count: int) -> bytes:
        while self._end - self._start < count:
            if self._start:
                left = self._end - self._start
                self._buffer[:left] = self._buffer[self._start : self._end]
                self._start, self._end = 0, left
            if count > len(self._buffer):
                self._buffer.extend(bytes(min(count, 2 * len(self._buffer)) - len(self._buffer)))
            view = memoryview(self._buffer)[self._end :]
            got = os.readv(self.fd, [view])
            view.release()
            if not got:
                raise self._truncated()
            self._end += got
        start = self._start
        self._start += count
        with memoryview(self._buffer) as view:
            return bytes(view[start : self._start])

    def _truncated(self) -> ImageError:
        return ImageError(
            f"the stream ends after {self.bytes} bytes and {self.records} records, without a trailer",
            hint="it was cut short: nothing can be restarted from it",
        )
