"""Fingerprints of the pages of shared memory as they were sent.

Writes through a mapping are tracked in the page tables of the process that has it, and forgotten with them: what was
written by a process that ended since, or through a mapping that is gone, shows only in the contents.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from migrator.engine.user.ranges import Span
from migrator.image.records import PAGE_SIZE

_CHUNK = 1 << 20


class Fingerprints:
    """Of one object, by offset. 64 bits (SipHash, its key is random): two pages do not have the same by chance."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def note(self, view: memoryview, at: int) -> None:
        """Pages as they are sent, from offset `at` on."""
        for position in range(0, len(view), PAGE_SIZE):
            self._known[at + position] = hash(bytes(view[position : position + PAGE_SIZE]))

    def changed(self, fd: int, spans: Sequence[Span]) -> list[Span]:
        """The pages within `spans` that are not as they were sent, read from `fd`."""
        out: list[Span] = []
        buffer = bytearray(_CHUNK)
        whole = memoryview(buffer)
        known = self._known
        for start, end in spans:
            for at in range(start, end, _CHUNK):
                view = whole[: min(_CHUNK, end - at)]
                got = os.preadv(fd, [view], at)
                view[got:] = bytes(len(view) - got)
                for position in range(0, len(view), PAGE_SIZE):
                    page = at + position
                    if known.get(page) != hash(bytes(view[position : position + PAGE_SIZE])):
                        if out and out[-1][1] == page:
                            out[-1] = out[-1][0], page + PAGE_SIZE
                        else:
                            out.append((page, page + PAGE_SIZE))
        return out
