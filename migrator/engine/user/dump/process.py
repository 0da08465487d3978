"""A process of the tree and its threads, as the source keeps them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from migrator.engine.user.dump.parasite import Parasite, ProcessReply
from migrator.image.records import PosixTimer
from migrator.linux import memory, procfs, ptrace
from migrator.linux import x86_64 as arch
from migrator.linux.pagemap import Scanner, WriteProtection
from migrator.linux.remote import Remote

_AT_ONCE = 32  # processes that are asked at the same time: more than processors, and few to wait for if one fails


@dataclass(slots=True)
class Thread:
    """One task. Registers and mask are there while it is stopped."""

    tid: int
    vtid: int
    regs: arch.Regs | None = None
    xstate: bytes = b""
    mask: int = 0
    stop_signal: int = 0  # in a group stop by this signal
    rseq: ptrace.RseqConfiguration | None = None
    adjusted: bool = False  # `regs` are not what the task has, and are to be set when it goes on


@dataclass(slots=True)
class Process:
    """One process of the tree, by its pid in our namespace; `vpid` is its own view."""

    pid: int
    vpid: int
    pidfd: int
    start_time: int
    threads: dict[int, Thread] = field(default_factory=dict)
    zombie: bool = False
    exit_code: int = 0
    remote: Remote | None = None
    parasite: Parasite | None = None
    predumped: set[int] = field(default_factory=set)  # tids whose state was pre-dumped
    protection: WriteProtection | None = None
    scanner: Scanner | None = None
    mem: memory.MemFile | None = None
    mm_objref: int = 0
    executed: int = 0  # how often it was seen to have become another program
    maps: str = ""  # as read last
    lines: dict[str, procfs.Vma] = field(default_factory=dict)  # of it
    vmas: list[procfs.Vma] = field(default_factory=list)
    guards: list[tuple[int, int]] | None = None  # guard regions as the destination knows them; None: never looked at

    @property
    def leader(self) -> Thread:
        return self.threads[self.pid]

    def close(self) -> None:
        for thing in (self.protection, self.scanner, self.mem):
            if thing is not None:
                thing.close()
        self.protection = self.scanner = self.mem = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def ask_all(processes: Sequence[Process], timers: Mapping[int, Sequence[PosixTimer]]) -> dict[int, ProcessReply]:
    """What the parasites of stopped processes say, by pid: all of a group work at the same time."""
    replies = {}
    for first in range(0, len(processes), _AT_ONCE):
        group = processes[first : first + _AT_ONCE]
        with ExitStack() as stack:
            for process in group:
                leader, parasite = process.leader, process.parasite
                assert parasite is not None and leader.regs is not None
                stack.enter_context(parasite.begun(leader.regs, leader.mask, leader.xstate))
            for process in group:
                assert process.parasite is not None
                replies[process.pid] = process.parasite.reply(timers[process.pid])
    return replies


def vtid_of(process: Process, tid: int) -> int:
    """The id of a task as the tree itself sees it."""
    if process.vpid == process.pid:
        return tid
    return process.vpid if tid == process.pid else procfs.ns_pid(procfs.status(process.pid, tid))
