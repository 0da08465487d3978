"""Older images made into images of the current revision: bytes in, bytes out.

    converter = Converter()
    while chunk := source.read(1 << 20):
        sink.write(converter.feed(chunk))
    converter.close()               # raises if the stream was cut short

What comes out restarts as what went in would. Never more than one record is held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from migrator.image.codec import Record
from migrator.image.decoder import Decoder
from migrator.image.order import Order
from migrator.image.records import REV, Header


def _from_1(record: Record) -> Record:
    """Revision 2 added pre-dumped state and marks that end a round; nothing of revision 1 changed its meaning."""
    return record


def _from_2(record: Record) -> Record:
    """Revision 3 added records of shared files and System V objects."""
    return record


def _from_3(record: Record) -> Record:
    """Revision 4 added registrations for membarrier(2) and guard regions."""
    return record


def _from_4(record: Record) -> Record:
    """Revision 5 added POSIX message queues, inotify instances, and flags of tasks."""
    return record


def _from_5(record: Record) -> Record:
    """Revision 6 added flags of mappings and tasks, and owners of files."""
    return record


def _from_6(record: Record) -> Record:
    """Revision 7 added pseudo-terminals."""
    return record


# What upgrades each record of a revision to the next one. A record keeps its place: their number stays.
UPGRADES: dict[int, Callable[[Record], Record]] = {
    1: _from_1,
    2: _from_2,
    3: _from_3,
    4: _from_4,
    5: _from_5,
    6: _from_6,
}


class Converter:
    """rev: of what came in, 0 before its header has come. records: those converted so far."""

    def __init__(self) -> None:
        self.rev = 0
        self.records = 0
        self._decoder = Decoder()
        self._order = Order()

    def feed(self, data: bytes) -> bytes:
        """The records that `data` completes, converted. Raises ImageError where the stream is broken, out of order,
        of an unknown revision, or says that saving failed."""
        out = bytearray()
        for record in self._decoder.feed(data):
            self._order.check(record)
            if isinstance(record, Header):
                self.rev = record.rev
                record = replace(record, rev=REV)
            for rev in range(self.rev, REV):
                record = UPGRADES[rev](record)
            out += record.encode()
            self.records += 1
        return bytes(out)

    def close(self) -> None:
        """The stream ends here. Raises ImageError if it is not whole."""
        self._decoder.close()
