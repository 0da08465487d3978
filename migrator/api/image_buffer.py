"""`migrator checkpoint P --kill | migrator restart`: on one host, where the original is still in the way.

A copy is built while its stream is read, but a tree's pids and a container's name are free only when the
original has ended, after the last byte. Then, and only then, the stream is kept in a file without a name
(in $TMPDIR) until it is whole.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable

from migrator import container
from migrator.errors import ImageError
from migrator.image.decoder import Decoder
from migrator.image.records import Container, Header, Tree
from migrator.linux import pipes

_QUIET = 2.0  # seconds without news after which no more is expected before something is taken out
_LAST_BREATH = 5.0  # seconds that an original may take to end once its image is whole

_MOST_HEADER = 8192  # bytes that hold the first record

InTheWay = Callable[[], bool]


def beginning(fd: int) -> InTheWay:
    """Look at the beginning of the image in the pipe `fd`, taking nothing out of it.

    Returns what tells whether something that lives here is in the way of its copy."""
    pipes.widen(fd)
    seen, changed = b"", time.monotonic()
    while data := pipes.peek(fd):
        found = _claims(data)
        if found is not None:
            return found
        if data != seen:
            seen, changed = data, time.monotonic()
        elif time.monotonic() - changed > _QUIET:
            break
        time.sleep(0.005)
    return lambda: False  # whoever reads it will say what is wrong with it


def saved_by(fd: int) -> str:
    """The name of the engine that wrote the image in the file or pipe `fd`, of which nothing is taken; "" if that
    cannot be told."""
    try:
        mode = os.fstat(fd).st_mode
        data = b""
        if stat.S_ISREG(mode):
            data = os.pread(fd, _MOST_HEADER, os.lseek(fd, 0, os.SEEK_CUR))
        elif stat.S_ISFIFO(mode):
            data = pipes.peek(fd)
        return next(
            (record.engine for record in Decoder(keep_pages=False).feed(data) if isinstance(record, Header)), ""
        )
    except (ImageError, OSError):
        return ""  # whoever reads it will say what is wrong with it


def keep(fd: int, in_the_way: InTheWay, given_up: Callable[[], bool] = lambda: False) -> int:
    """Read the stream to its end, and wait for what is in the way to end, for some seconds. A descriptor of
    the whole stream; closing it gives back the room."""
    with tempfile.TemporaryFile() as file, open(fd, "rb", closefd=False, buffering=0) as stream:
        shutil.copyfileobj(stream, file, 1 << 20)
        file.seek(0)
        kept = os.dup(file.fileno())
    deadline = time.monotonic() + _LAST_BREATH
    while in_the_way() and not given_up() and time.monotonic() < deadline:
        time.sleep(0.01)
    return kept


def _claims(data: bytes) -> InTheWay | None:
    decoder = Decoder(keep_pages=False)
    try:
        for record in decoder.feed(data):
            if isinstance(record, Container):
                return _container_lives(record.name)
            if isinstance(record, Tree):
                return _any_taken([task.pid for task in record.tasks])
    except ImageError:
        return lambda: False
    return None


def _container_lives(name: str) -> InTheWay:
    def lives() -> bool:
        found = container.find(name)
        return found is not None and found.alive

    return lives


def _any_taken(pids: list[int]) -> InTheWay:
    return lambda: any(os.path.exists(f"/proc/{pid}") for pid in pids)
