"""System V objects made again, under their own numbers, in the IPC namespace of a container."""

from __future__ import annotations

from collections.abc import Callable

from migrator.errors import ImageError, RestartFailed
from migrator.image.records_shared import SysvMessage, SysvQueue, SysvSem, SysvShm
from migrator.linux import ipc
from migrator.linux.ipc import IpcObject


class SysvRestore:
    """pid: of a process in the namespace, 0 until it is known, and where the tree has none of its own.
    final: the tasks are stopped, and what comes is what there is"""

    def __init__(self) -> None:
        self.pid = 0
        self.final = False
        self._segments: dict[int, int] = {}  # objref of its Shm -> number
        self._last: dict[int, SysvShm] = {}  # by number: as it came in the last round

    def segment_of(self, objref: int) -> int:
        """Its number. Raises ImageError where the segment of a Shm never came."""
        try:
            return self._segments[objref]
        except KeyError:
            raise ImageError(f"System V memory {objref} has no segment") from None

    def segment(self, rec: SysvShm, size: int) -> int | None:
        """Make a segment; a descriptor of ours, None if it was there already."""
        if self.final:
            self._last[rec.shmid] = rec
        if rec.shared_objref in self._segments:
            return None
        self._segments[rec.shared_objref] = rec.shmid
        item = IpcObject(rec.shmid, rec.key, rec.mode, size, rec.uid, rec.gid, rec.cuid, rec.cgid)

        def make() -> int:
            ipc.make_segment(item)
            return ipc.open_segment(item.id)

        return self._inside(make, f"System V segment {rec.shmid}")

    def semaphores(self, rec: SysvSem) -> None:
        item = IpcObject(rec.semid, rec.key, rec.mode, len(rec.values) // 2, rec.uid, rec.gid, rec.cuid, rec.cgid)
        self._inside(lambda: ipc.make_semaphores(item, bytes(rec.values)), f"System V semaphores {rec.semid}")

    def queue(self, rec: SysvQueue) -> None:
        item = IpcObject(rec.msqid, rec.key, rec.mode, 0, rec.uid, rec.gid, rec.cuid, rec.cgid)
        self._inside(lambda: ipc.make_queue(item, rec.limit), f"System V queue {rec.msqid}")

    def message(self, rec: SysvMessage) -> None:
        self._inside(lambda: ipc.put_message(rec.msqid, rec.kind, bytes(rec.text)), f"System V queue {rec.msqid}")

    def settle(self) -> None:
        """Once all is mapped: owners as they were in the end; those that were removed go with their last mapping."""
        if not self._segments:
            return

        def inside() -> None:
            for shmid in self._segments.values():
                rec = self._last.get(shmid)
                if rec is not None:
                    item = IpcObject(shmid, rec.key, rec.mode, 0, rec.uid, rec.gid, rec.cuid, rec.cgid)
                    ipc.set_segment(item)
                if rec is None or rec.mode & ipc.SHM_DEST:
                    ipc.remove_segment(shmid)

        self._inside(inside, "System V segments")

    def _inside(self, function: Callable[[], ipc.T], about: str) -> ipc.T:
        if not self.pid:
            raise RestartFailed(f"{about}: only a container has System V objects of its own")
        try:
            return ipc.with_ipc_namespace(self.pid, function)
        except OSError as error:
            raise RestartFailed(f"{about}: {error}") from error
