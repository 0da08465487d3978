"""Messages of a POSIX queue can only be read by taking them out: how that is done so that none is ever lost.

    texts = look(fd, place)       # all are in the queue again, in the same order
    recover(place, pids)          # what a program that was killed in look() had taken

The kernel copies each message to a file in memory that is mapped, and outlives us. It tells its length to us alone;
if we are killed in just that moment, the length is what the queue has become shorter by (QSIZE in mq_overview(7)).
Nobody else may use the queue meanwhile: who would are stopped, and stay so if we are killed.

    TAKING      from the queue's beginning, until it is empty
    PUTTING     back, in that order: those of one priority stay in order (mq_send(3))
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Iterator

from migrator.linux import mqueue
from migrator.linux.namespaces import entered

_MAGIC = b"MESSAGES"
_HEAD = struct.Struct("<8sQQIIQ")  # magic, inodes of the namespace and the queue, phase, messages, bytes of them
_PHASE = struct.Struct("<I")
_PHASE_AT = 24
_SLOT = struct.Struct("<II")  # priority, length
_TAKING, _PUTTING = 1, 2
_UNKNOWN = (1 << 32) - 1

Message = tuple[int, bytes]  # priority, text


class OthersUseIt(Exception):
    """Somebody else takes messages out of the queue, or puts some in."""


def look(fd: int, place: str = "") -> list[Message]:
    """The messages of a queue, `fd` being open on it for both without waiting (mqueue.RDWR).

    place: the file; "" where those that are taken may be lost with us. Raises OthersUseIt, OSError."""
    before = os.fstat(fd)
    found = mqueue.attributes(fd)
    if not found.messages:
        return []
    head = _HEAD.pack(_MAGIC, _namespace(), before.st_ino, _TAKING, found.messages, mqueue.status(fd).size)
    with _Ledger.new(place, head, found) as ledger:
        try:
            ledger.go_on(fd)
        except OSError:
            ledger.go_on(fd)  # from where it is: nothing is done twice
        texts = ledger.messages()
        os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
    if place:
        os.unlink(place)
    return texts


def recover(place: str, pids: Iterable[int]) -> None:
    """Put back what a program that has ended had taken from a queue of these tasks, which are stopped. Does nothing
    where there is nothing to do, and can be done again. Raises OthersUseIt, OSError."""
    try:
        fd = os.open(place, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        with _Ledger(fd) as ledger:
            for pid in pids if ledger.begun else ():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError), entered(f"/proc/{pid}/ns/ipc", "ipc"):
                    if ledger.namespace == _namespace() and (queue := _find(ledger.queue, pids)) is not None:
                        try:
                            ledger.go_on(queue)
                        finally:
                            os.close(queue)
                        break
    finally:
        os.close(fd)
    os.unlink(place)


class _Ledger:
    """The file. `begun`: it was complete before the first message was taken."""

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        self.begun = size >= _HEAD.size and os.pread(fd, len(_MAGIC), 0) == _MAGIC
        if not self.begun:
            return
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._view = memoryview(self._map)
        self._letter = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._letter)
        _, self.namespace, self.queue, _, self._count, self._size = _HEAD.unpack_from(self._view)

    @classmethod
    def new(cls, place: str, head: bytes, found: mqueue.Attributes) -> _Ledger:
        (*_, count, size) = _HEAD.unpack(head)
        slots = _SLOT.pack(0, _UNKNOWN) * count
        fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600) if place else _unnamed()
        try:
            body = bytes(len(head)) + slots + bytes(size + found.message_size)  # there is room for each that comes
            os.truncate(fd, len(body))
            os.pwrite(fd, body, 0)
            os.pwrite(fd, head, 0)
            return cls(fd)
        finally:
            os.close(fd)

    def __enter__(self) -> _Ledger:
        return self

    def __exit__(self, *what: object) -> None:
        if self.begun:
            del self._letter
            self._view.release()
            self._map.close()

    def go_on(self, fd: int) -> None:
        """Take what is still in the queue, then put all back. Can be called again, wherever it ended."""
        if self._phase == _TAKING:
            self._take(fd)
            _PHASE.pack_into(self._view, _PHASE_AT, _PUTTING)
        there = mqueue.attributes(fd).messages
        if there > self._count:
            raise OthersUseIt
        for index, (priority, start, length) in enumerate(self._slots()):
            if index >= there:
                mqueue.send(fd, self._address + start, length, priority)

    def _take(self, fd: int) -> None:
        found = mqueue.attributes(fd)
        taken = self._count - found.messages
        known = list(self._slots())
        start = sum(length for _, _, length in known)
        if taken == len(known) + 1:  # the kernel has told the length to nobody who lives
            length = self._size - start - mqueue.status(fd).size
            self._note(len(known), length)
            start += length
        elif taken != len(known):
            raise OthersUseIt
        for index in range(taken, self._count):
            slot = self._address + _HEAD.size + index * _SLOT.size
            at = self._data + start
            length = mqueue.receive(fd, self._address + at, found.message_size, slot)
            self._note(index, length)
            start += length
        if mqueue.attributes(fd).messages or start != self._size:
            raise OthersUseIt

    def messages(self) -> list[Message]:
        return [(priority, bytes(self._view[start : start + length])) for priority, start, length in self._slots()]

    @property
    def _phase(self) -> int:
        return int(_PHASE.unpack_from(self._view, _PHASE_AT)[0])

    @property
    def _data(self) -> int:
        return _HEAD.size + int(self._count) * _SLOT.size

    def _slots(self) -> Iterator[tuple[int, int, int]]:
        """(priority, where it begins, length) of those whose length is known."""
        start = self._data
        for index in range(self._count):
            priority, length = _SLOT.unpack_from(self._view, _HEAD.size + index * _SLOT.size)
            if length == _UNKNOWN:
                return
            yield priority, start, length
            start += length

    def _note(self, index: int, length: int) -> None:
        _PHASE.pack_into(self._view, _HEAD.size + index * _SLOT.size + 4, length)


def _namespace() -> int:
    return os.stat("/proc/thread-self/ns/ipc").st_ino


def _unnamed() -> int:
    return os.memfd_create("messages", os.MFD_CLOEXEC)


def _find(inode: int, pids: Iterable[int]) -> int | None:
    """A descriptor of the queue with this inode: by its name, or, where that was removed, of one who has it open."""
    with mqueue.mounted() as mount:
        device = os.fstat(mount).st_dev
        for name in mqueue.listing(mount):
            if os.stat(name, dir_fd=mount).st_ino == inode:
                return os.open(name, mqueue.RDWR | os.O_CLOEXEC, dir_fd=mount)
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for entry in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{entry}"
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    if (status.st_dev, status.st_ino) == (device, inode) and stat.S_ISREG(status.st_mode):
                        return os.open(path, mqueue.RDWR | os.O_CLOEXEC)
    return None
