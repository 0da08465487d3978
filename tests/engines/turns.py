"""Programs that change their memory turn by turn, between the rounds in which it is sent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from migrator.engine.base import SourceOptions
from migrator.engine.stream import RecordReader
from migrator.engine.user.dump.source import UserSource
from migrator.image.compare import Contents
from migrator.image.records import Trailer

# How each begins: it says a number, and goes on when it is let go of that turn.
BEGIN = r"""
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
folder, size = sys.argv[1], int(sys.argv[2])
def say(text, turn, meanwhile=lambda: time.sleep(0.001)):
    os.write(1, b"%d\n" % text)
    while not os.path.exists(f"{folder}/{turn}"):
        meanwhile()
"""


class Run:
    def __init__(self, folder: Path, program: subprocess.Popen[bytes]) -> None:
        self.folder, self.program = folder, program
        self.lines = 0

    def said(self) -> int:
        """The next line of the program, once it is there."""
        deadline = time.monotonic() + 20
        while len(lines := (self.folder / "out").read_text().splitlines(keepends=True)) <= self.lines:
            assert time.monotonic() < deadline, lines
            time.sleep(0.001)
        self.lines += 1
        return int(lines[self.lines - 1])

    def go_on(self, turn: int) -> None:
        (self.folder / str(turn)).touch()

    def image(self, turns: int) -> Contents:
        """What is sent of it in so many rounds, each of which lets it go one turn further."""
        contents = Contents()
        with open(self.folder / "image", "w+b") as image:
            options = SourceOptions(cgroup_name=f"dropped-{os.getpid()}-{self.program.pid}")
            with UserSource(self.program.pid, image.fileno(), options) as source:
                source.survey()
                source.instrument("user")
                for turn in range(turns):
                    source.round()
                    self.go_on(turn)
                    assert self.said() == turn + 1
                source.freeze()
                source.final()
            image.seek(0)
            reader = RecordReader(image.fileno())
            while not isinstance(record := reader.next(), Trailer):
                contents.add(record)
        for turn in range(turns, 9):
            self.go_on(turn)
        assert self.program.wait(30) == 0, (self.folder / "out").read_text()
        return contents


@contextmanager
def running(folder: Path, code: str, *argv: object) -> Iterator[Run]:
    with open(folder / "out", "w") as out:
        program = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), *map(str, argv)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield Run(folder, program)
    finally:
        program.kill()
        program.wait()
