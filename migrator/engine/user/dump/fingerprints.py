"""Fingerprints of the pages of shared memory as they were sent.

Writes through a mapping are tracked in the page tables of the process that has it, and forgotten with them: what was
written by a process that ended since, or through a mapping that is gone, shows only in the contents.

All of it is compared while the tasks stand still, so stretches of 1 MiB have a fingerprint of their own: 0.2 s of
processor time for a GiB, and not 0.57. A stretch gets one when it is sent as a whole, or was found to be as it was
sent, page by page.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from migrator.engine.user.ranges import Span
from migrator.image.records import PAGE_SIZE

_STRETCH = 1 << 20
_NONCE = bytes(12)  # one key, one nonce: nothing is encrypted or shown to anybody


class Fingerprints:
    """Of one object, by offset. Of pages 64 bits (SipHash), of stretches 128 (GMAC), each with a key of its own that
    nobody knows: two contents do not have the same by chance."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._stretches: dict[int, tuple[Span, bytes]] = {}  # by their place: what of it, and its fingerprint
        self._cipher = AESGCM(os.urandom(16))

    def note(self, view: memoryview, at: int) -> None:
        """Pages as they are sent, from offset `at` on."""
        for start, end in _cut([(at, at + len(view))]):
            self._note_stretch(view[start - at : end - at], start)
        for position in range(0, len(view), PAGE_SIZE):
            self._known[at + position] = hash(bytes(view[position : position + PAGE_SIZE]))

    def doubtful(self, spans: Sequence[Span]) -> list[Span]:
        """The stretches of `spans` that would have to be compared page by page."""
        out = []
        for span in _cut(spans):
            found = self._stretches.get(span[0] // _STRETCH)
            if found is None or found[0] != span:
                out.append(span)
        return out

    def changed(self, fd: int, spans: Sequence[Span]) -> list[Span]:
        """The pages within `spans` that are not as they were sent, read from `fd`."""
        out: list[Span] = []
        whole = memoryview(bytearray(_STRETCH))
        for start, end in _cut(spans):
            view = whole[: end - start]
            got = os.preadv(fd, [view], start)
            view[got:] = bytes(len(view) - got)
            found = self._stretches.get(start // _STRETCH)
            if found is not None and found == ((start, end), self._of(view)):
                continue
            different = False
            for position in range(0, len(view), PAGE_SIZE):
                page = start + position
                if self._known.get(page) != hash(bytes(view[position : position + PAGE_SIZE])):
                    different = True
                    if out and out[-1][1] == page:
                        out[-1] = out[-1][0], page + PAGE_SIZE
                    else:
                        out.append((page, page + PAGE_SIZE))
            if not different:
                self._note_stretch(view, start)
        return out

    def _note_stretch(self, view: memoryview, start: int) -> None:
        self._stretches[start // _STRETCH] = (start, start + len(view)), self._of(view)

    def _of(self, view: memoryview) -> bytes:
        return self._cipher.encrypt(_NONCE, b"", view)


def _cut(spans: Sequence[Span]) -> Iterator[Span]:
    """Cut where stretches end."""
    for start, end in spans:
        while start < end:
            stop = min(end, start - start % _STRETCH + _STRETCH)
            yield start, stop
            start = stop
