"""POSIX message queues of a container: they are its own, as its IPC namespace is.

A message can only be read by taking it out. All of a queue are taken and put back while the tasks are stopped, and stay
so if this program is killed: migrator.linux.message_ledger. Stopped tasks wait in no call, so none is given a message.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from migrator.engine.stream import RecordWriter
from migrator.engine.user.descriptors import MessageQueue
from migrator.errors import CheckpointFailed
from migrator.image.objhash import ObjHash
from migrator.image.records_shared import MqMessage, MqQueue
from migrator.linux import ipc, message_ledger, mqueue

Still = Callable[[], contextlib.AbstractContextManager[object]]


class _Queue(NamedTuple):
    name: str
    fd: int  # ours
    removed: bool


class MqueueDump:
    """pid: a process in the IPC namespace, which is the tree's own. ledger: the file that keeps what is taken out.
    still: inside it, no task runs even if this program is killed."""

    def __init__(self, pid: int, ledger: str = "", still: Still = contextlib.nullcontext) -> None:
        self._pid = pid
        self._ledger = ledger
        self._still = still

    def obstacles(self, opened: Iterable[MessageQueue], pids: Collection[int]) -> Iterator[str]:
        """Why they cannot be carried: one sentence each. `opened`: by a tree with these processes, which runs."""
        opened = list(opened)
        names = ipc.with_ipc_namespace(self._pid, mqueue.names)
        yield from _twins([*names, *(q.name for q in opened if q.removed)])
        for queue in opened:
            yield from _notified(queue)
        if names or opened:
            yield from _others(self._pid, pids)

    def save(self, writer: RecordWriter, objhash: ObjHash, opened: Sequence[MessageQueue]) -> None:
        """All queues, of stopped tasks. `opened`: those that the tree has open."""
        ipc.with_ipc_namespace(self._pid, lambda: self._save(writer, objhash, opened))

    def _save(self, writer: RecordWriter, objhash: ObjHash, opened: Sequence[MessageQueue]) -> None:
        queues: list[_Queue] = []
        try:
            for queue in opened:
                status = os.stat(queue.path)
                for reason in _notified(queue):
                    raise CheckpointFailed(reason)
                os.utime(queue.path, ns=(status.st_atime_ns, status.st_mtime_ns))
                if queue.removed:
                    queues.append(_Queue(queue.name, os.open(queue.path, mqueue.RDWR | os.O_CLOEXEC), True))
            queues += [_Queue(name, mqueue.open_queue(name), False) for name in mqueue.names()]
            for reason in _twins([queue.name for queue in queues]):
                raise CheckpointFailed(reason)
            if queues:
                with self._still():
                    for item in queues:
                        _save_queue(writer, objhash, item, self._ledger)
        finally:
            for item in queues:
                os.close(item.fd)


def _save_queue(writer: RecordWriter, objhash: ObjHash, queue: _Queue, ledger: str) -> None:
    status, found = os.fstat(queue.fd), mqueue.attributes(queue.fd)
    objref, _ = objhash.get(_key(status))
    writer.write(
        MqQueue(
            objref=objref,
            removed=int(queue.removed),
            mode=status.st_mode & 0o7777,
            uid=status.st_uid,
            gid=status.st_gid,
            max_messages=found.max_messages,
            message_size=found.message_size,
            reserved=0,
            atime=status.st_atime_ns,
            mtime=status.st_mtime_ns,
            name=queue.name,
        )
    )
    try:
        messages = message_ledger.look(queue.fd, ledger)
    except message_ledger.OthersUseIt:
        raise CheckpointFailed(f"the POSIX message queue /{queue.name} is used from outside of the tree") from None
    for priority, text in messages:
        writer.write(MqMessage(objref, priority, text))


def _key(status: os.stat_result) -> Hashable:
    return "mqueue", status.st_dev, status.st_ino


def _notified(queue: MessageQueue) -> Iterator[str]:
    """A registration is gone when who made it closes the queue: it is open, or there is none."""
    try:
        fd = os.open(queue.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # it was closed meanwhile
    try:
        pid = mqueue.status(fd).notified
    finally:
        os.close(fd)
    if pid:
        yield (
            f"the POSIX message queue /{queue.name} tells pid {pid} of the next message (mq_notify(3)), which is not"
            " carried"
        )


def _twins(names: Iterable[str]) -> Iterator[str]:
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{count} POSIX message queues were named /{name}, one after the other, which is not carried"


def _others(root: int, pids: Collection[int]) -> Iterator[str]:
    """Processes outside of the tree that could take messages meanwhile."""
    namespace = os.readlink(f"/proc/{root}/ns/ipc")
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in pids:
            with contextlib.suppress(OSError):  # it has ended
                if os.readlink(f"/proc/{entry}/ns/ipc") == namespace:
                    yield f"pid {entry}, outside of the tree, is in the namespace of its POSIX message queues"
