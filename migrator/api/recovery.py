"""Finishing or undoing what a program that died has left, and deciding what nobody else can decide."""

from __future__ import annotations

import asyncio
import time

from migrator import host
from migrator.api.results import SettleResult
from migrator.errors import Fate
from migrator.recovery.journal import attended, journal_directory
from migrator.recovery.settle import override

BUSY_SECONDS = 15.0  # an agent that cannot reach the other host gives up before that
_LOOK_EVERY = 0.1


async def settle(*, login: host.Login | None = None, wait: float = 0.0) -> SettleResult:
    """Settle every migration of this host that no living process attends to.

    Others may just be at it: while there are only such, they are waited for, up to `wait` seconds. Raises
    nothing for a migration that cannot be settled; its `Settlement` has the fate FROZEN and says what to do.
    """
    end = time.monotonic() + wait
    while True:
        settled = await host.settle(login or host.Login())
        busy = await asyncio.to_thread(attended, journal_directory())
        if settled or not busy or time.monotonic() >= end:
            return SettleResult(settled=settled, busy=busy)
        await asyncio.sleep(_LOOK_EVERY)


async def decide(migration: str, *, here: bool) -> Fate:
    """Decide a migration whose other host cannot be asked, and say where the workload is now.

    `here` lets it run on this host: the caller asserts that the other copy does not and will not run.
    Otherwise it is killed here: the caller asserts that the other copy runs. If that is not true, two copies
    run, or none. Raises UsageError where there is nothing to decide.
    """
    return await asyncio.to_thread(override, journal_directory(), migration, here=here, tools=host.tools())
