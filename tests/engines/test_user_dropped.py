"""Pages that are dropped, read again from their file, moved by the kernel or lost while memory is sent."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import pytest
from turns import BEGIN, running

from migrator.engine.user.ranges import merge
from migrator.errors import CheckpointFailed
from migrator.linux.pagemap import IS_SWAPPED, Scanner

pytestmark = pytest.mark.root

PAGE = 4096
DROPS = (
    BEGIN
    + r"""
fd = os.open(sys.argv[3], os.O_RDWR) if sys.argv[3] else -1
start = libc.mmap(None, size, 3, 0x02 if fd >= 0 else 0x22, fd, 0)  # private, on the file or on nothing
ctypes.memset(start, 0x5A, size)
part = size // 4
say(start, 0)
assert libc.madvise(start, 3 * part, 4) == 0  # MADV_DONTNEED
ctypes.string_at(start + part, part)  # one quarter is left, one read again, one written again
ctypes.memset(start + 2 * part, 0x5B, part)
say(1, 1)
say(2, 2)
"""
)
MOVES = (
    BEGIN
    + r"""
huge = 2 << 20
start = -(-libc.mmap(None, size + huge, 3, 0x22, -1, 0) // huge) * huge
ctypes.memset(start, 0x5A, size)
def move():
    assert libc.madvise(start, size, 25) == 0  # MADV_COLLAPSE: huge pages
    for page in range(start, start + size, huge):
        libc.madvise(page, 4096, 20)  # MADV_COLD of a part of it: taken apart, by entries of migration
say(start, 0, move)
"""
)
LOSES = (
    BEGIN
    + r"""
start = libc.mmap(None, size, 3, 0x22, -1, 0)
ctypes.memset(start, 0x5A, size)
fd = libc.syscall(323, 1)  # userfaultfd(UFFD_USER_MODE_ONLY)
def ioctl(code, *words):
    array = (ctypes.c_uint64 * len(words))(*words)
    assert libc.ioctl(fd, ctypes.c_ulong(code), array) == 0, (hex(code), array[:])
assert libc.madvise(start + 4096, 4096, 4) == 0
ioctl(0xC018AA3F, 0xAA, 1 << 14, 0)  # UFFDIO_API, with UFFD_FEATURE_POISON
ioctl(0xC020AA00, start, size, 1, 0)  # UFFDIO_REGISTER
ioctl(0xC020AA08, start + 4096, 4096, 0, 0)  # UFFDIO_POISON
os.close(fd)
say(start, 0)
"""
)


def filled(byte: int) -> int:
    """What Contents has of a page that is full of it."""
    return 1 << 32 | zlib.crc32(bytes([byte]) * PAGE)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("size", [64 * PAGE, 16 << 20], ids=["small", "big"])
@pytest.mark.parametrize("file", [True, False], ids=["file", "anonymous"])
def test_of_what_is_dropped_nothing_is_left_that_was_sent_before(
    file: bool, size: int, turns: int, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x11" * size)
    with running(tmp_path, DROPS, size, path if file else "") as run:
        start = run.said()
        contents = run.image(turns)
    part = size // 4
    (pages,) = (pages for pages in contents.pages.values() if start + 2 * part in pages)
    gone = [pages.get(page) for page in range(start, start + 2 * part, PAGE)]
    assert not any(gone)  # they are what the mapping itself gives
    assert {pages.get(page) for page in range(start + 2 * part, start + 3 * part, PAGE)} == {filled(0x5B)}
    assert {pages.get(page) for page in range(start + 3 * part, start + size, PAGE)} == {filled(0x5A)}


def test_pages_that_the_kernel_moves_are_there(tmp_path: Path) -> None:
    size = 64 << 20
    moved = 0
    with running(tmp_path, MOVES, size) as run:
        start = run.said()
        scanner = Scanner(run.program.pid)
        deadline = time.monotonic() + 60
        while moved < 50:
            assert time.monotonic() < deadline, f"{moved} seen"
            moved += len(scanner.scan(start, start + size, mask=IS_SWAPPED, returned=IS_SWAPPED))
            assert merge(scanner.own(start, start + size)) == [(start, start + size)]
        scanner.close()
        run.go_on(0)
        assert run.program.wait(30) == 0, (tmp_path / "out").read_text()


def test_a_page_that_cannot_be_read_is_refused_before_the_freeze(tmp_path: Path) -> None:
    with running(tmp_path, LOSES, 64 * PAGE) as run:
        start = run.said()
        with pytest.raises(CheckpointFailed, match=f"the page at {start + PAGE:#x} cannot be read") as failure:
            run.image(1)
        assert "UFFDIO_POISON" in str(failure.value)
        run.go_on(0)
        assert run.program.wait(30) == 0
