"""What the calls return, beside `migrator.model.MigrationResult`."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field

from migrator.model import MigrationResult
from migrator.recovery.settle import Settlement


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """A workload can be moved: what a preflight found.

    result:              as of a migration that was not made
    files:               how many were compared
    predicted_downtime:  seconds, without the pages that are written last
    notes:               what will not be quite the same there, one sentence each
    """

    result: MigrationResult
    processes: int
    files: int
    predicted_downtime: float
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class SettleResult:
    """What was settled, and the migrations that another process attends to."""

    settled: list[Settlement] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)


async def exit_status(pid: int) -> int:
    """Wait for a child without blocking the loop. Raises ChildProcessError for what is none."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    pidfd = os.pidfd_open(pid)
    try:
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    finally:
        os.close(pidfd)
    assert result is not None
    return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status
