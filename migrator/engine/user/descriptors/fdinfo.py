"""/proc/PID/fdinfo/N as Python values (proc(5), Documentation/filesystems/proc.rst §3.8)."""

from __future__ import annotations

import os
from dataclasses import dataclass

_O_CLOEXEC = 0o2000000


@dataclass(slots=True, frozen=True)
class EpollTarget:
    """One `tfd:` line. `ino` and `dev` are those of the target; `dev` in the kernel's own encoding."""

    number: int
    events: int
    data: int
    ino: int
    dev: int


@dataclass(slots=True)
class FdInfo:
    """`flags` without close-on-exec; `fields` are the lines that only some files have, as text."""

    pos: int
    flags: int
    cloexec: bool
    fields: dict[str, str]
    locks: tuple[str, ...] = ()
    ino: int = 0  # the kernel's own number, as /proc/locks has it; not always that of stat(2)
    targets: tuple[EpollTarget, ...] = ()
    watches: tuple[str, ...] = ()  # of an inotify instance, a line each


def numbers(pid: int) -> list[int]:
    """The open descriptors of a process, in order."""
    return sorted(map(int, os.listdir(f"/proc/{pid}/fd")))


def count(pid: int) -> int:
    """How many it has open: so proc(5) has the size of that directory."""
    return os.stat(f"/proc/{pid}/fd").st_size


class Reader:
    """fdinfo of one process, many times. Close it, or leave the block."""

    def __init__(self, pid: int) -> None:
        self._dir = os.open(f"/proc/{pid}/fdinfo", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def read(self, number: int) -> FdInfo:
        """Raises FileNotFoundError or ProcessLookupError if it is gone."""
        fd = os.open(str(number), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dir)
        try:
            raw = os.read(fd, 65536)
            if len(raw) > 3000:  # an epoll instance with many entries: read to the end
                while more := os.read(fd, 1 << 20):
                    raw += more
        finally:
            os.close(fd)
        return parse(raw)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *what: object) -> None:
        os.close(self._dir)


def read(pid: int, number: int) -> FdInfo:
    """Once. Raises FileNotFoundError or ProcessLookupError if it is gone."""
    with Reader(pid) as reader:
        return reader.read(number)


_NONE: dict[str, str] = {}


def parse(raw: bytes) -> FdInfo:
    """>>> parse(b"pos:\\t7\\nflags:\\t02100001\\nmnt_id:\\t27\\nino:\\t612\\n").cloexec
    True"""
    lines = raw.split(b"\n")
    if lines[0][:4] != b"pos:" or lines[1][:6] != b"flags:":
        raise OSError(f"fdinfo begins with {raw[:40]!r}")
    pos, flags = int(lines[0][4:]), int(lines[1][6:], 8)
    cloexec = bool(flags & _O_CLOEXEC)
    flags &= ~_O_CLOEXEC
    ino = int(lines[3][4:]) if len(lines) > 3 and lines[3][:4] == b"ino:" else 0
    if len(lines) <= 5:  # mnt_id, ino, and the end: nothing special
        return FdInfo(pos, flags, cloexec, _NONE, ino=ino)
    fields: dict[str, str] = {}
    locks: list[str] = []
    targets: list[EpollTarget] = []
    watches: list[str] = []
    for line in raw.decode("utf-8", "replace").split("\n")[2:]:
        key, colon, value = line.partition(":")
        if not colon:
            continue
        key = key.strip()
        if key == "tfd":
            targets.append(_target(value))
        elif key == "inotify wd":
            watches.append(line)
        elif key == "lock":
            locks.append(value.strip())
        else:
            fields[key] = value.strip()
    return FdInfo(pos, flags, cloexec, fields, tuple(locks), ino, tuple(targets), tuple(watches))


def _target(text: str) -> EpollTarget:
    """tfd:        5 events:       19 data: 123456789abcdef0  pos:0 ino:1234 sdev:d"""
    words = text.replace(":", ": ").split()
    values = dict(zip(words[1::2], words[2::2], strict=False))
    return EpollTarget(
        number=int(words[0]),
        events=int(values["events:"], 16),
        data=int(values["data:"], 16),
        ino=int(values.get("ino:", "0"), 16),
        dev=int(values.get("sdev:", "0"), 16),
    )
