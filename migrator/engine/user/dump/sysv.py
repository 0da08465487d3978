"""System V objects of a container: they are its own, as its IPC namespace is.

Segments are shared memory (migrator.engine.user.dump.shm); sets of semaphores and queues are read when the tasks are
stopped. Nothing is taken out of a queue for that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self

from migrator.engine.stream import RecordWriter
from migrator.image.records import PAGE_SIZE
from migrator.image.records_shared import SysvMessage, SysvQueue, SysvSem, SysvShm
from migrator.linux import descriptors, ipc, procfs, sys
from migrator.linux.ipc import IpcObject
from migrator.linux.procfs import Vma

SYSV = "/SYSV"  # how mappings of segments are named


class SysvDump:
    """pid: a process in the IPC namespace, which is the tree's own."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def segments(self) -> list[IpcObject]:
        return ipc.with_ipc_namespace(self._pid, ipc.segments)

    def open_segment(self, shmid: int) -> int:
        """A descriptor of ours. It is attached for a moment, by us: by which it is seen to have been used."""
        return ipc.with_ipc_namespace(self._pid, lambda: ipc.open_segment(shmid))

    def save(self, writer: RecordWriter) -> None:
        """Semaphores and queues, of stopped tasks."""
        ipc.with_ipc_namespace(self._pid, lambda: _save(writer))

    def obstacles(self, pids: Iterable[int]) -> Iterator[str]:
        """Why they cannot be carried, for a tree with these processes: one sentence each."""
        if ipc.with_ipc_namespace(self._pid, ipc.semaphores):
            with Undo() as undo:
                for pid in pids:
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                        if reason := undo.obstacle(pid):
                            yield f"pid {pid} {reason}"
        for segment in self.segments():
            fd = self.open_segment(segment.id)
            try:
                if descriptors.filesystem_type(fd) != descriptors.TMPFS_MAGIC:
                    yield f"System V segment {segment.id} has huge pages, which cannot be carried"
            finally:
                os.close(fd)


def record_of(segment: IpcObject, objref: int) -> SysvShm:
    return SysvShm(
        shared_objref=objref,
        shmid=segment.id,
        key=segment.key,
        mode=segment.mode,
        uid=segment.uid,
        gid=segment.gid,
        cuid=segment.cuid,
        cgid=segment.cgid,
    )


def _save(writer: RecordWriter) -> None:
    for item in ipc.semaphores():
        owner = item.uid, item.gid, item.cuid, item.cgid
        writer.write(SysvSem(item.id, item.key, item.mode, *owner, 0, ipc.values(item)))
    for item in ipc.queues():
        owner = item.uid, item.gid, item.cuid, item.cgid
        writer.write(SysvQueue(item.id, item.key, item.mode, *owner, 0, ipc.queue_limit(item)))
        for kind, text in ipc.messages(item):
            writer.write(SysvMessage(item.id, 0, kind, text))


class Undo:
    """Who may have changes of semaphores that its end takes back (SEM_UNDO): the kernel does not tell which they are,
    but has a list for everyone that did so, or has threads. One that was just born has none."""

    def __enter__(self) -> Self:
        ours, theirs = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(theirs)
            os.read(ours, 1)
            os._exit(0)
        os.close(ours)
        self._end = theirs
        return self

    def __exit__(self, *what: object) -> None:
        os.close(self._end)
        os.waitpid(self._pid, 0)

    def obstacle(self, pid: int) -> str:
        if all(sys.same(tid, self._pid, sys.KCMP_SYSVSEM) for tid in procfs.tids(pid)):
            return ""
        return "may have changed System V semaphores with SEM_UNDO, of which the kernel does not tell"


def parts_obstacle(vmas: Sequence[Vma], sizes: Mapping[int, int]) -> str:
    """Whether a part of an attached segment was unmapped: it can be attached as a whole only (shmat(2)). `sizes` of
    the segments, by number."""
    at = 0
    while at < len(vmas):
        first = vmas[at]
        end = first.end
        at += 1
        if not first.path.startswith(SYSV) or first.inode not in sizes:
            continue
        while at < len(vmas) and vmas[at].start == end and vmas[at].inode == first.inode and vmas[at].offset:
            end = vmas[at].end
            at += 1
        whole = -(-sizes[first.inode] // PAGE_SIZE) * PAGE_SIZE
        if first.offset or end - first.start != whole:
            return f"mapping {first.start:#x} is a part of System V segment {first.inode}, the rest is unmapped"
    return ""
