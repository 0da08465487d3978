"""What a source does once it has sent COMMIT: frames follow the workload, and its own copy goes."""

from __future__ import annotations

import asyncio
import contextlib

from migrator.errors import MigratorError
from migrator.runtime.fault_points import fault
from migrator.session.interfaces import Link
from migrator.session.phases import PhaseLog
from migrator.session.workload import WorkloadThread

_RESUME_SECONDS = 5.0  # for a copy that has to get its locks first


class Departure:
    """resumed:     set once the copy runs there, or nothing more will be heard of it
    forwarding:  the task of forward(), which release() waits for"""

    def __init__(self, workload: WorkloadThread, log: PhaseLog) -> None:
        self.resumed = asyncio.Event()
        self.forwarding: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self._workload, self._log = workload, log

    async def forward(self, link: Link) -> None:
        """Send on the frames that still come here, until release(). Some may be lost, as on any network."""
        with contextlib.suppress(MigratorError, OSError):
            await self._workload.forward(link, self._arrived)

    async def release(self, link: Link) -> None:
        """Kill the source copy: it is decided that the other runs. Its network stays as long as connections need it
        that stay behind."""
        workload = self._workload
        if not self.resumed.is_set():  # it may wait for locks that our copy still has
            await workload.release()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RESUME_SECONDS):
                    await self.resumed.wait()
        self._arrived.set()
        workload.end_switchover()
        if self.forwarding is not None:
            await self.forwarding
        with self._log.phase("release"):
            await workload.release()
            await workload.release_network()
        fault("source.released")
        if workload.orphans:
            with self._log.phase("orphaned connections"), contextlib.suppress(MigratorError, OSError):
                await workload.serve_orphans(link)
