"""A descriptor of a running process, by what /proc shows of it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from migrator.engine.user.descriptors.classify import Classification
from migrator.engine.user.descriptors.description import Holder
from migrator.engine.user.descriptors.fdinfo import FdInfo

GONE = -1  # in fdinfo of a pidfd: its process has ended and was waited for


@dataclass(slots=True, frozen=True)
class Found:
    process: Holder
    name: str  # of the process
    number: int
    link: str
    status: os.stat_result
    info: FdInfo
    verdict: Classification

    def __str__(self) -> str:
        return f"pid {self.process.pid} ({self.name}) fd {self.number}"


class MessageQueue(NamedTuple):
    """A POSIX message queue that a tree has open. path: of a descriptor, through which it can be opened again."""

    key: tuple[int, int]  # st_dev, st_ino
    name: str  # without the slash
    path: str
    removed: bool


def open_elsewhere(inside: Collection[int]) -> Iterator[tuple[int, str]]:
    """(pid, where its link in /proc/PID/fd points) of all descriptors of all other processes."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in inside:
            continue
        try:
            numbers = os.listdir(f"/proc/{name}/fd")
        except OSError:
            continue
        for number in numbers:
            try:
                yield int(name), os.readlink(f"/proc/{name}/fd/{number}")
            except OSError:
                continue
