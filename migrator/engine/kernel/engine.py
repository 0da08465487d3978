"""The kernel engine as a whole: the two calls of the contract, by the two calls of a patched kernel."""

from __future__ import annotations

import os

from migrator.engine import processor
from migrator.engine.base import (
    Capability,
    DestinationOptions,
    LateLock,
    Move,
    SourceOptions,
)
from migrator.engine.calls import EngineCalls, check_pid
from migrator.engine.kernel import calls
from migrator.engine.kernel.destination import KernelDestination
from migrator.engine.kernel.source import KernelSource
from migrator.errors import UsageError
from migrator.linux import cgroup, procfs


class KernelEngine(EngineCalls):
    """checkpoint() and restart() of a kernel that has them."""

    name = "kernel"
    precopies = True
    carries_less = True

    def probe(self) -> list[Capability]:
        found = calls.probe()
        if all(one.available for one in found):
            try:
                found.append(Capability("freezer cgroup", True, f"version {cgroup.hierarchy().version}"))
            except UsageError as error:
                found.append(Capability("freezer cgroup", False, error.message))
        return found

    def xstate_size(self) -> int:
        return processor.xstate_facts()[1]

    def source(self, pid: int, fd: int, options: SourceOptions) -> KernelSource:
        check_pid(pid)
        if os.getpid() in procfs.descendants(pid):
            raise UsageError(
                f"this very program is below pid {pid}, and the kernel engine cannot leave it out",
                hint="run it from another session, or with --engine user",
            )
        return KernelSource(pid, fd, options)

    def destination(self, fd: int, options: DestinationOptions) -> KernelDestination:
        return KernelDestination(fd, options)

    def finish_moves(self, root: int, moves: list[Move]) -> None:
        """Its copies leave none behind."""

    def take_locks(self, cgroup: str, locks: list[LateLock], seconds: float) -> list[LateLock]:
        """restart() has given its copies their locks already."""
        return []
