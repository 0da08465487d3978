"""What records of shared files and System V objects must say.

A part of `migrator.image.order`, which calls it for every such record.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, MutableMapping
from typing import Any, NoReturn

from migrator.image import records_shared as s
from migrator.image.codec import Record
from migrator.image.records import PAGE_SIZE
from migrator.image.references import References

MAX_SIZE = 1 << 62  # bytes of a file
_KINDS = frozenset({stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR})
_ID_MAX = (1 << 31) - 1
_MAX_SEMAPHORES = 32000  # SEMMSL_MAX
_MAX_MESSAGES, _MAX_MESSAGE_SIZE, _MAX_PRIORITY = 65536, 1 << 24, 32767  # HARD_MSGMAX, HARD_MSGSIZEMAX, MQ_PRIO_MAX


class SharedOrder:
    """The records of `migrator.image.records_shared` in one stream.

    limits: where pages of an object end, in bytes, by objref; filled here"""

    def __init__(
        self, references: References, fail: Callable[[str], NoReturn], limits: MutableMapping[int, int]
    ) -> None:
        self._references = references
        self._fail = fail
        self._limits = limits
        self._folders: set[tuple[str, str]] = set()
        self._entries: set[tuple[str, str]] = set()
        self._ids: set[tuple[type[Record], int]] = set()
        self._queues: dict[int, s.MqQueue] = {}  # by objref
        self._queue_names: set[str] = set()
        self._segments: dict[int, int] = {}  # shmid -> objref: they come again, as their Shm does
        self.checks: dict[type[Record], Callable[[Any], None]] = {
            s.SharedFile: self._file,
            s.TmpfsEntry: self._entry,
            s.TmpfsXattr: self._xattr,
            s.SysvShm: self._shm,
            s.SysvSem: self._sem,
            s.SysvQueue: lambda rec: self._id(type(rec), rec.msqid),
            s.SysvMessage: self._message,
            s.MqQueue: self._mq_queue,
            s.MqMessage: self._mq_message,
        }

    def _file(self, file: s.SharedFile) -> None:
        if file.kind not in (s.SharedFileKind.DELETED, s.SharedFileKind.TMPFS):
            self._fail(f"unknown kind {file.kind}")
        if (file.kind == s.SharedFileKind.TMPFS) != bool(file.mount):
            self._fail(f"{file.name!r} is of kind {file.kind}, in {file.mount!r}")
        if file.size > MAX_SIZE:
            self._fail(f"impossible size {file.size}")
        self._limits[file.objref] = -(-file.size // PAGE_SIZE) * PAGE_SIZE

    def _entry(self, entry: s.TmpfsEntry) -> None:
        where = f"{entry.path!r} in {entry.mount!r}"
        parts = entry.path.split("/")
        if not entry.mount.startswith("/") or ".." in entry.mount.split("/"):
            self._fail(f"{where}: no absolute path")
        if entry.path != "." and not {"", ".", ".."}.isdisjoint(parts):
            self._fail(f"{where}: no path below its mount")
        if (entry.mount, entry.path) in self._entries:
            self._fail(f"{where} comes twice")
        folder = "/".join(parts[:-1]) or "."
        if entry.path != "." and (entry.mount, folder) not in self._folders:
            self._fail(f"{where} comes ahead of its directory")
        kind = stat.S_IFMT(entry.mode)
        if kind not in _KINDS or (entry.path == "." and kind != stat.S_IFDIR):
            self._fail(f"{where}: a file of mode {entry.mode:o}")
        if (kind == stat.S_IFREG) != bool(entry.shared_objref) or (kind == stat.S_IFLNK) != bool(entry.target):
            self._fail(f"{where}: contents or a target that do not belong to its mode {entry.mode:o}")
        if (kind == stat.S_IFCHR) != bool(entry.rdev) or entry.rdev not in s.PLAIN_DEVICES:
            self._fail(f"{where}: device {entry.rdev:#x}")
        if kind == stat.S_IFREG:
            self._references.use(entry.shared_objref, "SharedFile", where)
        if kind == stat.S_IFDIR:
            self._folders.add((entry.mount, entry.path))
        self._entries.add((entry.mount, entry.path))

    def _xattr(self, xattr: s.TmpfsXattr) -> None:
        if (xattr.mount, xattr.path) not in self._entries or xattr.flags:
            self._fail(f"an attribute of {xattr.path!r} in {xattr.mount!r}, which did not come")

    def _shm(self, shm: s.SysvShm) -> None:
        if shm.shmid > _ID_MAX:
            self._fail(f"impossible number {shm.shmid}")
        if self._segments.setdefault(shm.shmid, shm.shared_objref) != shm.shared_objref:
            self._fail(f"segment {shm.shmid} comes again as another one")
        self._references.use(shm.shared_objref, "Shm", f"segment {shm.shmid}")

    def _sem(self, sem: s.SysvSem) -> None:
        self._id(type(sem), sem.semid)
        if not 0 < len(sem.values) <= 2 * _MAX_SEMAPHORES or len(sem.values) % 2:
            self._fail(f"{len(sem.values)} bytes of values")

    def _message(self, message: s.SysvMessage) -> None:
        if (s.SysvQueue, message.msqid) not in self._ids:
            self._fail(f"a message for queue {message.msqid}, which did not come")
        if message.kind <= 0 or len(message.text) > s.MAX_MESSAGE:
            self._fail(f"a message of type {message.kind} and {len(message.text)} bytes")

    def _mq_queue(self, queue: s.MqQueue) -> None:
        where = f"message queue {queue.name!r}"
        if not 0 < len(queue.name) <= 255 or "/" in queue.name or queue.name in (".", ".."):
            self._fail(f"{where}: no name of a queue")
        if queue.name in self._queue_names:
            self._fail(f"{where} comes twice")
        if queue.removed > 1 or queue.mode > 0o7777:
            self._fail(f"{where}: removed is {queue.removed}, mode {queue.mode:o}")
        if not 0 < queue.max_messages <= _MAX_MESSAGES or not 0 < queue.message_size <= _MAX_MESSAGE_SIZE:
            self._fail(f"{where}: {queue.max_messages} messages of {queue.message_size} bytes")
        self._queue_names.add(queue.name)
        self._queues[queue.objref] = queue

    def _mq_message(self, message: s.MqMessage) -> None:
        queue = self._queues.get(message.queue_objref)
        if queue is None:
            self._fail(f"a message for queue {message.queue_objref}, which did not come")
        if message.priority > _MAX_PRIORITY or len(message.text) > queue.message_size:
            self._fail(f"a message of priority {message.priority} and {len(message.text)} bytes")

    def _id(self, kind: type[Record], number: int) -> None:
        if number > _ID_MAX or (kind, number) in self._ids:
            self._fail(f"number {number} comes twice, or is impossible")
        self._ids.add((kind, number))
