"""What seldom changes of a thread, and anybody can read: its place in scheduling, and its credentials.

It is read of all threads at once, as the bytes that the kernel says: ahead of the freeze, and in it. Only what differs
then is worked out anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from migrator.linux import procfs
from migrator.linux.batch import Area, Strings, each
from migrator.linux.x86_64 import NR

Credentials = tuple[str, ...]  # as proc(5) has them

_CREDENTIALS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_PRIO_PROCESS, _IOPRIO_WHO_PROCESS, _AT_FDCWD = 0, 1, -100
_NICE_FROM = 20  # getpriority(2) returns so much more than the nice value is below this
_AFFINITY = 1024  # bytes: of 8192 processors
_STATUS = 4096  # bytes; a longer one is read by itself
_AT_ONCE = 256  # threads: each takes a descriptor
# Of a status: from where to where there is nothing but what is asked here
_PARTS = ((b"\nUid:", b"\nFDSize:"), (b"\nGroups:", b"\nNStgid:"), (b"\nCapInh:", b"\nSeccomp:"))


@dataclass(slots=True)
class Static:
    policy: int
    priority: int
    nice: int
    ioprio: int
    affinity: bytes
    cred: Credentials | None  # None for a leader, whose status is read when it is stopped
    no_new_privs: bool


class _Told(NamedTuple):
    """As the kernel says it. `status`: the parts that are asked here; empty for a leader."""

    policy: int
    priority: bytes
    prio: int
    ioprio: int
    affinity: bytes
    status: bytes


class ThreadState:
    """That of all threads of a tree, by tid."""

    def __init__(self) -> None:
        self._told: dict[int, _Told] = {}
        self._made: dict[int, Static] = {}

    def look(self, threads: Sequence[tuple[int, int]]) -> None:
        """Read that of these threads, (pid, tid) each; nothing of one that has ended."""
        for first in range(0, len(threads), _AT_ONCE):
            group = threads[first : first + _AT_ONCE]
            for (pid, tid), told in zip(group, _ask(group), strict=True):
                if told is None:
                    self._told.pop(tid, None)
                elif self._told.get(tid) != told:
                    self._told[tid] = told
                    self._made[tid] = _static(told, leader=pid == tid)

    def of(self, pid: int, tid: int) -> Static:
        """As it was read last. Raises ProcessLookupError if it has ended."""
        if tid not in self._told:
            self.look([(pid, tid)])
        if tid not in self._told:
            raise ProcessLookupError(f"no thread {tid}")
        return self._made[tid]


def credentials(state: dict[str, str]) -> Credentials:
    return tuple(state[key] for key in _CREDENTIALS)


def no_new_privs(state: dict[str, str]) -> bool:
    return state.get("NoNewPrivs") == "1"


def _ask(threads: Sequence[tuple[int, int]]) -> list[_Told | None]:
    """Of each thread what is said of it; None of one that has ended."""
    count = len(threads)
    tids = [tid for _, tid in threads]
    parameters, cpus = Area(4, count), Area(_AFFINITY, count)
    others = [at for at, (pid, tid) in enumerate(threads) if pid != tid]
    states = Area(_STATUS, len(others))
    paths = Strings([b"/proc/%d/task/%d/status" % threads[at] for at in others])
    policies, priorities, prios, ioprios, sizes = each(
        count,
        (NR["sched_getscheduler"], tids),
        (NR["sched_getparam"], tids, parameters.addresses),
        (NR["getpriority"], _PRIO_PROCESS, tids),
        (NR["ioprio_get"], _IOPRIO_WHO_PROCESS, tids),
        (NR["sched_getaffinity"], tids, _AFFINITY, cpus.addresses),
    )
    (opened,) = each(len(others), (NR["openat"], _AT_FDCWD, paths.addresses, os.O_RDONLY | os.O_CLOEXEC))
    read, _ = each(len(others), (NR["read"], opened, states.addresses, _STATUS), (NR["close"], opened))
    of_others = {
        at: states.get(place, max(0, length)) for place, (at, length) in enumerate(zip(others, read, strict=True))
    }
    out: list[_Told | None] = []
    for at, (pid, tid) in enumerate(threads):
        status = of_others.get(at, b"")
        gone = pid != tid and not status
        if gone or min(policies[at], priorities[at], prios[at], ioprios[at], sizes[at]) < 0:
            out.append(None)
            continue
        if len(status) == _STATUS:
            try:
                status = procfs.read_bytes(f"/proc/{pid}/task/{tid}/status")
            except (FileNotFoundError, ProcessLookupError):
                out.append(None)
                continue
        affinity = cpus.get(at, sizes[at])
        parts = b"".join([_part(status, first, behind) for first, behind in _PARTS]) if status else b""
        out.append(_Told(policies[at], parameters.get(at, 4), prios[at], ioprios[at], affinity, parts))
    return out


def _part(status: bytes, first: bytes, behind: bytes) -> bytes:
    start = status.find(first)
    end = status.find(behind, start)
    return status[start : end if end >= 0 else len(status)]


def _static(told: _Told, *, leader: bool) -> Static:
    mask = int.from_bytes(told.affinity, "little")
    state = {}
    for line in told.status.decode().split("\n"):
        key, _, value = line.partition(":\t")
        state[key] = value.strip()
    return Static(
        policy=told.policy,
        priority=int.from_bytes(told.priority, "little"),
        nice=_NICE_FROM - told.prio,
        ioprio=told.ioprio,
        affinity=mask.to_bytes(max(8, -(-mask.bit_length() // 64) * 8), "little"),
        cred=None if leader else credentials(state),
        no_new_privs=not leader and no_new_privs(state),
    )
