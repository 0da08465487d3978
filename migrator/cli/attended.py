"""What stands around `migrator checkpoint`: a journal, in case that it is killed, and a network that is shut."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator

from migrator.cli.workload import Workload
from migrator.container.switchover import NetworkLock
from migrator.engine.base import AfterCheckpoint, Source
from migrator.linux import procfs
from migrator.protocol.states import Recorded
from migrator.recovery.journal import Journal, JournalHeader, Role, boot_id, journal_directory


class Attended:
    """The journal of a checkpoint. As that of a migration it says what becomes of the tasks if we are killed: they
    run on, until gone() was called."""

    def __init__(self) -> None:
        self._journal: Journal | None = None
        self.decided = False

    def begin(self, workload: Workload, source: Source) -> None:
        """Durable before the first task is touched. Raises JournalError."""
        pids = []
        for pid in source.pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pids.append((pid, procfs.start_time(pid)))
        facts = JournalHeader(
            migration=f"checkpoint-{uuid.uuid4().hex[:20]}",
            role=Role.SOURCE,
            pids=pids,
            cgroup=source.cgroup,
            container=workload.container.name if workload.container is not None else "",
            boot_id=boot_id(),
            started_at=time.time(),
            homes=source.homes,
        )
        self._journal = Journal.create(journal_directory(), facts)

    def gone(self) -> None:
        """The image is whole, and the tasks, which are held, are to end: durable."""
        assert self._journal is not None
        self._journal.record(Recorded.AWAY, reason="saved, and ended here")
        self.decided = True

    def end(self) -> None:
        """All is done, and nobody will ever ask about it."""
        if self._journal is not None:
            self._journal.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()


@contextlib.contextmanager
def attended() -> Iterator[Attended]:
    """Around everything. If tasks that are to end do not, the journal stays for `migrator settle`."""
    made = Attended()
    try:
        yield made
    except BaseException:
        if not made.decided:
            made.end()
        raise
    else:
        made.end()
    finally:
        made.close()


@contextlib.contextmanager
def silence(workload: Workload, after: AfterCheckpoint) -> Iterator[NetworkLock | None]:
    """For a container that is to end: what its sockets acknowledge after they were saved would be lost with it,
    so its network is to be shut before the freeze. Opened again when the block fails."""
    if workload.container is None or after is not AfterCheckpoint.KILL:
        yield None
        return
    lock = NetworkLock(workload.container)
    try:
        yield lock
    except BaseException:
        lock.unlock()
        raise
    finally:
        lock.close()
