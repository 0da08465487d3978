"""What stands around a checkpoint: a journal, in case that it is killed, and a network that is shut."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from types import TracebackType

from migrator.api.workloads import Workload
from migrator.container.switchover import NetworkLock
from migrator.engine.base import AfterCheckpoint, CheckpointHooks, Source
from migrator.linux import procfs
from migrator.protocol.states import Recorded
from migrator.recovery.journal import Journal, JournalHeader, Role, boot_id, journal_directory


class CheckpointGuard(CheckpointHooks):
    """The hooks of one checkpoint; a context manager around it.

    The journal says what becomes of the tasks if this program is killed, as that of a migration does: they run on,
    until they are about to be ended. If tasks that are to end do not, it stays for settling.

    A container that is to end has its network shut before its sockets are looked at: what they acknowledge later
    would be lost with it. `whole` is called when the image is complete, while the tasks stand still."""

    def __init__(
        self,
        workload: Workload,
        after: AfterCheckpoint,
        *,
        whole: Callable[[], None],
    ) -> None:
        self._workload = workload
        self._whole = whole
        self._journal: Journal | None = None
        self._ending = False
        self.pids: list[int] = []
        found = workload.container
        self._network = NetworkLock(found) if found is not None and after is AfterCheckpoint.KILL else None

    def surveyed(self, source: Source) -> None:
        """Make the journal durable before the first task is touched. Raises JournalError."""
        self.pids = list(source.pids)
        pids = []
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pids.append((pid, procfs.start_time(pid)))
        header = JournalHeader(
            migration=f"checkpoint-{uuid.uuid4().hex[:20]}",
            role=Role.SOURCE,
            pids=pids,
            cgroup=source.cgroup,
            container=self._workload.container.name if self._workload.container is not None else "",
            boot_id=boot_id(),
            started_at=time.time(),
            origins=source.origins,
        )
        self._journal = Journal.create(journal_directory(), header)
        if self._network is not None:
            self._network.prepare()

    def silence(self) -> None:
        if self._network is not None:
            self._network.lock()

    def saved(self) -> None:
        self._whole()

    def ending(self) -> None:
        """The image is whole, and the tasks, which are held, are to end: durable."""
        assert self._journal is not None
        self._journal.record(Recorded.AWAY, reason="saved, and ended here")
        self._ending = True

    def __enter__(self) -> CheckpointGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._network is not None:
            if value is not None:
                self._network.unlock()
            self._network.close()
        if self._journal is not None:
            if value is None or not self._ending:
                self._journal.path.unlink(missing_ok=True)
            self._journal.close()
