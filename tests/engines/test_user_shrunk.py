"""A mapping that shrinks and grows again while its memory is sent: its end is empty then, and still tracked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrator.engine.base import SourceOptions
from migrator.engine.stream import RecordReader
from migrator.engine.user.dump.source import UserSource
from migrator.image.compare import Contents
from migrator.image.records import Trailer

pytestmark = pytest.mark.root

PROGRAM = r"""
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
size = int(sys.argv[1])
start = libc.mmap(None, size, 3, 0x22, -1, 0)  # private, anonymous
ctypes.memset(start, 0x5A, size)
def say(text, turn):
    os.write(1, b"%d\n" % text)
    while not os.path.exists(f"{sys.argv[2]}/{turn}"):
        time.sleep(0.001)
say(start, 0)
assert libc.mremap(start, size, size // 2, 0) == start
say(1, 1)
assert libc.mremap(start, size // 2, size, 0) == start  # in place
say(2, 2)
assert ctypes.string_at(start, size) == b"\x5a" * (size // 2) + bytes(size // 2)
"""


@pytest.mark.parametrize("size", [64 << 12, 16 << 20], ids=["small", "big"])
def test_the_end_of_a_mapping_that_shrank_and_grew_is_not_what_was_sent_of_it(size: int, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as out:
        argv = [sys.executable, "-c", PROGRAM, str(size), str(tmp_path)]
        program = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        start = int(said(tmp_path, 1))
        with open(tmp_path / "image", "w+b") as image:
            options = SourceOptions(cgroup_name=f"shrunk-{os.getpid()}-{size}")
            with UserSource(program.pid, image.fileno(), options) as source:
                source.survey()
                source.instrument("user")
                for turn in range(2):
                    source.round()
                    (tmp_path / str(turn)).touch()
                    assert said(tmp_path, turn + 2) == str(turn + 1)
                source.freeze()
                source.final()
            image.seek(0)
            contents, reader = Contents(), RecordReader(image.fileno())
            while not isinstance(record := reader.next(), Trailer):
                contents.add(record)
        (tmp_path / "2").touch()
        assert program.wait(30) == 0, (tmp_path / "out").read_text()
    finally:
        program.kill()
        program.wait()
    (pages,) = (pages for pages in contents.pages.values() if start in pages)
    assert all(pages.get(page) for page in range(start, start + size // 2, 4096))
    assert not any(pages.get(page) for page in range(start + size // 2, start + size, 4096))


def said(folder: Path, count: int) -> str:
    """The last of so many lines of the program, once it is there."""
    deadline = time.monotonic() + 20
    while len(lines := (folder / "out").read_text().splitlines(keepends=True)) < count:
        assert time.monotonic() < deadline, lines
        time.sleep(0.001)
    return lines[count - 1].strip()
