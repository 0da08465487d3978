"""POSIX message queues made again in the IPC namespace of a container."""

from __future__ import annotations

import os
from collections.abc import Callable

from migrator.errors import ImageError, RestartFailed
from migrator.image.records_shared import MqMessage, MqQueue
from migrator.linux import ipc, mqueue


class MqueueRestore:
    """pid: of a process in the namespace, 0 until it is known, and where the tree has none of its own."""

    def __init__(self) -> None:
        self.pid = 0
        self._queues: dict[int, tuple[MqQueue, int]] = {}  # by objref, with a descriptor of ours

    def queue(self, rec: MqQueue) -> None:
        def make() -> int:
            fd = mqueue.create(rec.name, mqueue.Attributes(rec.max_messages, rec.message_size, 0))
            os.fchown(fd, rec.uid, rec.gid)
            os.fchmod(fd, rec.mode)
            return fd

        self._queues[rec.objref] = rec, self._inside(make, rec)

    def message(self, rec: MqMessage) -> None:
        queue, fd = self._queues[rec.queue_objref]
        try:
            mqueue.put(fd, rec.priority, bytes(rec.text))
        except OSError as error:
            raise RestartFailed(f"POSIX message queue /{queue.name}: {error}") from error

    def open(self, objref: int, flags: int) -> int:
        """A new description of a queue, which still has its name."""
        found = self._queues.get(objref)
        if found is None:
            raise ImageError(f"there is no message queue {objref}")
        rec = found[0]
        return self._inside(lambda: mqueue.open_queue(rec.name, flags), rec)

    def settle(self) -> None:
        """Once all descriptors are there: names that had been removed go, times are as they were."""
        for rec, fd in self._queues.values():
            if rec.removed:
                self._inside(lambda name=rec.name: mqueue.unlink(name), rec)  # type: ignore[misc]
            os.utime(fd, ns=(rec.atime, rec.mtime))

    def close(self) -> None:
        for _, fd in self._queues.values():
            os.close(fd)
        self._queues.clear()

    def _inside(self, function: Callable[[], ipc.T], rec: MqQueue) -> ipc.T:
        about = f"POSIX message queue /{rec.name}"
        if not self.pid:
            raise RestartFailed(f"{about}: only a container has queues of its own")
        try:
            return ipc.with_ipc_namespace(self.pid, function)
        except OSError as error:
            raise RestartFailed(f"{about}: {error}") from error
