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


@dataclass(slots=True, frozen=True)
class FdInfo:
    """`flags` without close-on-exec; `fields` are the lines that only some files have, as text."""

    pos: int
    flags: int
    cloexec: bool
    fields: dict[str, str]
    locks: tuple[str, ...] = ()
    targets: tuple[EpollTarget, ...] = ()


def numbers(pid: int) -> list[int]:
    """The open descriptors of a process, in order."""
    return sorted(map(int, os.listdir(f"/proc/{pid}/fd")))


def read(pid: int, number: int) -> FdInfo:
    """Raises FileNotFoundError or ProcessLookupError if it is gone."""
    fd = os.open(f"/proc/{pid}/fdinfo/{number}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = os.read(fd, 65536)
        if len(raw) > 3000:  # an epoll instance with many entries: read to the end
            while more := os.read(fd, 1 << 20):
                raw += more
    finally:
        os.close(fd)
    return parse(raw.decode("utf-8", "replace"))


def parse(text: str) -> FdInfo:
    """>>> parse("pos:\\t7\\nflags:\\t02100001\\nmnt_id:\\t27\\nino:\\t612\\n").cloexec
    True"""
    fields: dict[str, str] = {}
    locks: list[str] = []
    targets: list[EpollTarget] = []
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if not colon:
            continue
        key = key.strip()
        if key == "tfd":
            targets.append(_target(value))
        elif key == "lock":
            locks.append(value.strip())
        else:
            fields[key] = value.strip()
    flags = int(fields.pop("flags", "0"), 8)
    pos = int(fields.pop("pos", "0"))
    return FdInfo(pos, flags & ~_O_CLOEXEC, bool(flags & _O_CLOEXEC), fields, tuple(locks), tuple(targets))


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
