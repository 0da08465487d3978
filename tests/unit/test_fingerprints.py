"""What of shared memory is not as it was sent is found, page by page, however it was written and sent."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.engine.user.dump.fingerprints import Fingerprints
from migrator.engine.user.ranges import Span, merge
from migrator.image.records import PAGE_SIZE

PAGES = 600  # more than two stretches
pages = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 300)).map(lambda p: (p[0], min(PAGES, p[0] + p[1])))
steps = st.lists(st.tuples(st.sampled_from(["write", "send", "look"]), pages, st.integers(0, 255)), max_size=12)


def bytes_of(span: Span) -> Span:
    return span[0] * PAGE_SIZE, span[1] * PAGE_SIZE


@settings(max_examples=60, deadline=None)
@given(steps)
def test_exactly_the_pages_that_are_not_as_they_were_sent_are_found(steps: list[tuple[str, Span, int]]) -> None:
    fd = os.memfd_create("shared")
    try:
        now, sent = [0] * PAGES, [-1] * PAGES
        os.ftruncate(fd, PAGES * PAGE_SIZE)
        known = Fingerprints()

        def send(span: Span) -> None:
            start, end = bytes_of(span)
            known.note(memoryview(bytearray(os.pread(fd, end - start, start))), start)
            sent[span[0] : span[1]] = now[span[0] : span[1]]

        def look(spans: list[Span]) -> None:
            wanted = merge(bytes_of((n, n + 1)) for a, b in spans for n in range(a, b) if now[n] != sent[n])
            assert merge(known.changed(fd, [bytes_of(span) for span in spans])) == wanted

        send((0, PAGES))
        for what, span, value in steps:
            if what == "write":
                for number in range(*span):
                    os.pwrite(fd, bytes([value]), number * PAGE_SIZE + 17)
                    now[number] = value
            elif what == "send":
                send(span)
            else:
                look([span])
                doubtful = known.doubtful([(0, PAGES * PAGE_SIZE)])
                look([(a // PAGE_SIZE, b // PAGE_SIZE) for a, b in doubtful])
        look([(0, PAGES)])
    finally:
        os.close(fd)


def test_what_was_sent_as_a_whole_is_not_compared_page_by_page() -> None:
    fd = os.memfd_create("shared")
    try:
        os.ftruncate(fd, PAGES * PAGE_SIZE)
        known, whole = Fingerprints(), (0, PAGES * PAGE_SIZE)
        known.note(memoryview(bytearray(whole[1])), 0)
        assert known.doubtful([whole]) == []
        known.note(memoryview(bytearray(PAGE_SIZE)), 7 * PAGE_SIZE)
        assert known.doubtful([whole]) == [(0, 1 << 20)]
        assert known.changed(fd, [whole]) == []
        assert known.doubtful([whole]) == []  # it was found to be as it was sent
    finally:
        os.close(fd)
