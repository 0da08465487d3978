"""What each end of a migration writes into its journal, and when."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from migrator.engine.base import LateLock, Move
from migrator.errors import MigrationAborted
from migrator.protocol.states import DestinationEvent, Recorded
from migrator.recovery.journal import Journal, JournalHeader, Role, boot_id
from migrator.runtime.fault_points import fault
from migrator.session.interfaces import Link
from migrator.session.settings import SourceSettings
from migrator.session.workload import WorkloadThread


class SourceJournal:
    """Written on a thread of its own, beside the engine. `header` is the latest."""

    def __init__(self, settings: SourceSettings, workload: WorkloadThread) -> None:
        self.header = JournalHeader(
            migration=settings.migration,
            role=Role.SOURCE,
            peer=settings.peer,
            container=settings.container,
            boot_id=boot_id(),
            started_at=time.time(),
        )
        self.journal: Journal | None = None
        self._directory, self._workload = settings.journal, workload

    async def refresh(self) -> None:
        """Note tasks and cgroup as they are now. Slow: not while the workload stands still."""
        self.header = await self._workload.thread.run(self._workload.header, self.header)

    async def open(self) -> None:
        """Raises FileExistsError, JournalError. With the cgroup: it tells whose network is shut, should this program
        die then."""
        await self.refresh()
        self.journal = await self._workload.journal_thread.run(Journal.create, self._directory, self.header)

    async def record(self, state: Recorded, reason: str = "") -> None:
        """Nothing where the migration ended before it was opened. Raises JournalError."""
        if self.journal is not None:
            await self._workload.journal_thread.run(self.journal.record, state, reason=reason)

    async def record_away(self) -> None:
        fault("source.running")
        await self.record(Recorded.AWAY)
        fault("source.away")

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()


class DestinationJournal:
    """Written on the event loop: the workload stands still, and a thread costs more than the disk."""

    def __init__(self, directory: Path, migration: str, link: Link) -> None:
        self._directory, self._link = directory, link
        self._about = JournalHeader(
            migration=migration,
            role=Role.DESTINATION,
            peer=link.peer,
            key=link.key,
            boot_id=boot_id(),
            started_at=time.time(),
        )
        self._journal: Journal | None = None

    def open(self, cgroup: str, container: str) -> None:
        """Raises MigrationAborted for a migration that is known here, JournalError."""
        try:
            header = msgspec.structs.replace(self._about, cgroup=cgroup, container=container)
            self._journal = Journal.create(self._directory, header)
        except FileExistsError:
            raise MigrationAborted(f"migration {self._about.migration} is already known here") from None

    def decide(self, wish: Recorded, reason: str, moves: list[Move], locks: list[LateLock]) -> DestinationEvent:
        """Decide RUNNING or DISCARDED, unless that is done already; what counts is returned, durable. `moves` and
        `locks` are for an agent that resumes the copy in our place. Raises JournalError: then nothing is decided."""
        if self._journal is None:  # asked about a migration that was never begun here
            self._journal = Journal.create(self._directory, self._about)
            wish = Recorded.DISCARDED
        known = None
        if wish is Recorded.RUNNING and (moves or locks):
            taken = [tuple(lock) for lock in locks]
            known = msgspec.structs.replace(self._journal.header, moves=moves, locks=taken)
        decided = self._journal.decide(wish, reason=reason, header=known)
        if decided is Recorded.DISCARDED:
            return DestinationEvent.DECIDED_DISCARDED
        return DestinationEvent.DECIDED_LOCKING if self.header.locks else DestinationEvent.DECIDED_RUNNING

    def record(self, state: Recorded) -> None:
        """Raises JournalError."""
        if self._journal is not None:
            self._journal.record(state)

    @property
    def header(self) -> JournalHeader:
        return self._journal.header if self._journal is not None else self._about

    @property
    def reason(self) -> str:
        """Why it was decided so."""
        return self._journal.reason if self._journal is not None else ""

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
