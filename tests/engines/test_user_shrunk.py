"""A mapping that shrinks and grows again while its memory is sent: its end is empty then, and still tracked."""

from __future__ import annotations

from pathlib import Path

import pytest
from turns import BEGIN, running

pytestmark = pytest.mark.root

PROGRAM = (
    BEGIN
    + r"""
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
start = libc.mmap(None, size, 3, 0x22, -1, 0)  # private, anonymous
ctypes.memset(start, 0x5A, size)
say(start, 0)
assert libc.mremap(start, size, size // 2, 0) == start
say(1, 1)
assert libc.mremap(start, size // 2, size, 0) == start  # in place
say(2, 2)
assert ctypes.string_at(start, size) == b"\x5a" * (size // 2) + bytes(size // 2)
"""
)


@pytest.mark.parametrize("size", [64 << 12, 16 << 20], ids=["small", "big"])
def test_the_end_of_a_mapping_that_shrank_and_grew_is_not_what_was_sent_of_it(size: int, tmp_path: Path) -> None:
    with running(tmp_path, PROGRAM, size) as run:
        start = run.said()
        contents = run.image(2)
    (pages,) = (pages for pages in contents.pages.values() if start in pages)
    assert all(pages.get(page) for page in range(start, start + size // 2, 4096))
    assert not any(pages.get(page) for page in range(start + size // 2, start + size, 4096))
