"""A process of the tree and its threads, as the source keeps them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from migrator.engine.user.dump.parasite import Parasite
from migrator.linux import memory, procfs, ptrace
from migrator.linux import x86_64 as arch
from migrator.linux.pagemap import Scanner, WriteProtection
from migrator.linux.remote import Remote


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
    vmas: list[procfs.Vma] = field(default_factory=list)

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


def vtid_of(process: Process, tid: int) -> int:
    """The id of a task as the tree itself sees it."""
    if process.vpid == process.pid:
        return tid
    return process.vpid if tid == process.pid else procfs.ns_pid(procfs.status(process.pid, tid))
