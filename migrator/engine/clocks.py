"""CLOCK_MONOTONIC and CLOCK_BOOTTIME go on as the tasks knew them, whatever the host's clocks say.

Hosts count from their own boot. A task that sleeps until an absolute time, or remembers one, would wake
hours late or at once; so where the clocks differ, the tree is restarted in a time namespace whose offsets
make up for it (time_namespaces(7)). The offsets must be there before the first task is.

- From a file, the clocks go on from where they stood when the tasks were stopped.
- From a pipe or a socket the tasks may still run on the source, so the clocks are those of the source now:
  by the wall clocks of both hosts, which have to agree as well as these clocks are wanted to.

No clock ever goes back: what is behind when the tasks are complete is waited for, or the restart is refused.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from migrator.engine.stream import RecordReader
from migrator.errors import RestartFailed
from migrator.image.codec import HEADER
from migrator.image.records import Header, RoundMark
from migrator.linux import procfs
from migrator.linux.fresh_thread import in_fresh_thread
from migrator.linux.namespaces import CLONE_NEWTIME, unshare

AHEAD = 50_000_000  # ns by which the clocks may be ahead without a namespace
BEHIND = 1_000_000  # likewise, behind: less than the tasks are stopped for, or waited for
MOST_WAIT = 100_000_000  # ns

T = TypeVar("T")


@dataclass(frozen=True)
class Offsets:
    """ns to be added to the clocks of the initial time namespace."""

    monotonic: int
    boottime: int


def clock_offsets(pid: int) -> tuple[int, int]:
    """(monotonic, boottime): ns that the time namespace of a task adds to the clocks of the initial one."""
    offsets = {"monotonic": 0, "boottime": 0}
    with contextlib.suppress(FileNotFoundError):  # a kernel without time namespaces
        for line in procfs.read_text(f"/proc/{pid}/timens_offsets").split("\n"):
            fields = line.split()
            if len(fields) == 3 and fields[0] in offsets:
                offsets[fields[0]] = int(fields[1]) * 10**9 + int(fields[2])
    return offsets["monotonic"], offsets["boottime"]


def offsets(header: Header, reader: RecordReader) -> Offsets | None:
    """What a tree saved under `header` needs; None if it needs no namespace."""
    if not header.monotonic:
        return None
    stopped = time_of_stop(reader)
    passed = max(0, (stopped or time.time_ns()) - header.time)
    ours = clock_offsets(os.getpid())
    monotonic = header.monotonic + passed - time.monotonic_ns()
    boottime = header.boottime + passed - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    if -AHEAD <= monotonic <= BEHIND and -AHEAD <= boottime <= BEHIND:
        return None
    return Offsets(monotonic + ours[0], boottime + ours[1])


def since_stop(header: Header, stopped: int, given: Offsets | None) -> int:
    """ns that passed on the tree's own clock since it was stopped at `stopped` of the source's wall clock.

    `given`: its offsets here. A wait that ends at a time of that clock ends that much sooner. Less than 0 where
    the clock is behind."""
    if not header.monotonic or not stopped:
        return 0
    now = time.monotonic_ns()
    if given is not None:
        now += given.monotonic - clock_offsets(os.getpid())[0]
    return now - (header.monotonic + stopped - header.time)


def catch_up(header: Header, stopped: int, given: Offsets | None) -> None:
    """Return when the tree's clock is not behind of where it was stopped. Raises RestartFailed if it is far behind."""
    behind = -since_stop(header, stopped, given)
    if behind > MOST_WAIT:
        raise RestartFailed(
            f"the clock of the tasks would go back by {behind / 1e9:.3f} s: the wall clocks of the hosts differ",
            hint="synchronise them (NTP) and try again",
        )
    if behind > 0:
        time.sleep(behind / 1e9)


def time_of_stop(reader: RecordReader) -> int:
    """When the tasks of an image in a regular file were stopped, in ns of the wall clock; else 0.

    Goes from record to record without reading what is in them; the position of the file stays."""
    fd = reader.fd
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return 0
    at = reader.tell()
    stopped = 0
    while len(head := os.pread(fd, HEADER.size + 16, at)) > HEADER.size:
        kind, length = HEADER.unpack_from(head)
        if length < HEADER.size:
            break
        if kind == RoundMark.TYPE and len(head) == HEADER.size + 16:
            stopped = RoundMark.decode(head[HEADER.size :]).time
        at += length
    return stopped


def within(clocks: Offsets | None, act: Callable[[], T]) -> T:
    """Call `act`, which makes a child that executes a program: that program runs by `clocks`.

    In a thread of its own, as a thread cannot leave a time namespace again. Raises RestartFailed."""
    if clocks is None:
        return act()

    def inside() -> T:
        unshare(CLONE_NEWTIME)
        lines = [
            "{} {} {}\n".format(name, *divmod(offset, 10**9))
            for name, offset in (("monotonic", clocks.monotonic), ("boottime", clocks.boottime))
        ]
        with open(f"/proc/{threading.get_native_id()}/timens_offsets", "w") as file:
            file.write("".join(lines))
        return act()

    try:
        return in_fresh_thread("time namespace", inside)
    except OSError as error:
        raise RestartFailed(
            f"the clocks of the source differ by {clocks.monotonic / 1e9:.3f} s and cannot be set here: {error}",
            hint="a kernel with CONFIG_TIME_NS, and CAP_SYS_TIME, are needed",
        ) from error
