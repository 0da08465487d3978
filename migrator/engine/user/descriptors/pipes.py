"""Pipes and FIFOs with what waits in them.

The contents are read without taking them out: tee(2) duplicates the buffers into a pipe of ours, packets
(O_DIRECT) staying packets.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
from collections.abc import Iterator

from migrator.engine.user.descriptors.description import Description
from migrator.errors import CheckpointFailed, ImageError, RestartFailed
from migrator.image.records_files import MAX_CHUNK, File, FileKind, Pipe, PipeBuffer
from migrator.linux import descriptors
from migrator.linux.openat2 import open_in_root

_PAGE = 4096
_PACKET = 1
_ONCE = os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL | os.O_TRUNC


def outside_end(ends: list[Description]) -> str | None:
    """Whether somebody outside of the tree holds the other end of a pipe: "written" or "read", or None.

    All ends that the tree holds are given. The kernel itself tells: a pipe without writers hangs up."""
    if not any(end.writable for end in ends):
        if not _poll(ends[0].fd) & select.POLLHUP:
            return "written"
    elif not any(end.readable for end in ends) and not _poll(ends[0].fd) & select.POLLERR:
        return "read"
    return None


def _poll(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, 0)
    return sum(events for _, events in poll.poll(0))


def check(ends: list[Description]) -> None:
    """Raises CheckpointFailed if the other end is outside of the tree."""
    how = outside_end(ends)
    if how:
        raise CheckpointFailed(
            f"{ends[0]}: the pipe is {how} by a process outside of the tree",
            hint="start it with its input and output in files, or save the other process along with it",
        )


def waiting(fd: int) -> int:
    """Bytes that wait in a pipe or a socket (FIONREAD)."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, descriptors.FIONREAD, count)
    return count[0]


def contents(read_end: int, capacity: int) -> Iterator[bytes]:
    """Everything that waits behind our descriptor of a read end: packet by packet, or in large parts."""
    left = waiting(read_end)
    if not left:
        return
    copy_read, copy_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if capacity > 16 * _PAGE:
            fcntl.fcntl(copy_write, fcntl.F_SETPIPE_SZ, capacity)
        if descriptors.tee(read_end, copy_write, 1 << 30) != left:
            raise OSError(f"tee: not all of the {left} bytes in the pipe")
        while left:
            data = os.read(copy_read, MAX_CHUNK)
            left -= len(data)
            yield data
    finally:
        os.close(copy_read)
        os.close(copy_write)


def save(objref: int, ends: list[Description]) -> Iterator[Pipe | PipeBuffer]:
    """The records of one pipe, by all the ends that the tree holds of it."""
    capacity = fcntl.fcntl(ends[0].fd, fcntl.F_GETPIPE_SZ)
    yield Pipe(objref, capacity)
    reader = next((end.fd for end in ends if end.readable), None)
    if reader is None:
        return  # nobody can ever read it
    packets = any(end.flags & os.O_DIRECT for end in ends)
    for data in contents(reader, capacity):
        yield PipeBuffer(objref, _PACKET if packets else 0, data)


class PipeRestore:
    """One pipe being built. Its first ends are those of pipe2(2), all others are opened anew."""

    def __init__(self, rec: Pipe) -> None:
        self.capacity = rec.capacity
        self._buffers: list[PipeBuffer] = []
        self._bytes = 0
        self._fresh: dict[bool, int] = {}  # writable? -> an end that nobody has yet
        self._keepers: list[int] = []
        self._filled = False

    def add(self, rec: PipeBuffer) -> None:
        self._bytes += len(rec.data)
        if self._bytes > self.capacity or rec.flags & ~_PACKET or not rec.data:
            raise ImageError(f"{self._bytes} bytes or more in a pipe of {self.capacity}")
        self._buffers.append(rec)

    def open(self, rec: File, root_fd: int) -> int:
        """The description that `rec` is about, ours; its flags are still to be set."""
        flags = rec.flags & ~_ONCE
        if not self._keepers:
            self._keepers = self._open_fifo(rec, root_fd) if rec.kind == FileKind.FIFO else self._make()
            self._fill(rec)
        if rec.kind == FileKind.PIPE and not flags & descriptors.O_LARGEFILE:
            fd = self._fresh.pop(flags & os.O_ACCMODE != os.O_RDONLY, -1)
            if fd < 0:
                raise ImageError(f"file {rec.objref}: a pipe has three ends")
        else:
            fd = descriptors.reopen(self._keepers[0], flags & ~os.O_DIRECT | os.O_NONBLOCK)
        return fd

    def _make(self) -> list[int]:
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._fresh = {False: read, True: write}
        return [descriptors.reopen(read, os.O_RDWR)]

    @staticmethod
    def _open_fifo(rec: File, root_fd: int) -> list[int]:
        flags = os.O_RDWR | os.O_NONBLOCK
        return [open_in_root(root_fd, rec.path.lstrip("/"), flags)]

    def _fill(self, rec: File) -> None:
        keeper = self._keepers[0]
        if fcntl.fcntl(keeper, fcntl.F_GETPIPE_SZ) != self.capacity:
            try:
                fcntl.fcntl(keeper, fcntl.F_SETPIPE_SZ, self.capacity)
            except OSError as error:
                raise RestartFailed(
                    f"file {rec.objref}: a pipe of {self.capacity} bytes cannot be made: {error}",
                    hint="raise /proc/sys/fs/pipe-max-size",
                ) from error
        wanted = b"".join(buffer.data for buffer in self._buffers)
        if waiting(keeper):
            # the saved tasks still hold the same FIFO, on this very host
            if b"".join(contents(keeper, self.capacity)) != wanted:
                raise RestartFailed(f"{rec.path} (file {rec.objref}): other data waits in this FIFO here")
            return
        for buffer in self._buffers:
            fcntl.fcntl(keeper, fcntl.F_SETFL, os.O_NONBLOCK | (os.O_DIRECT if buffer.flags else 0))
            if os.write(keeper, buffer.data) != len(buffer.data):
                raise RestartFailed(f"file {rec.objref}: the pipe does not take what was in it")
        self._buffers.clear()

    def close(self) -> None:
        """Close what only the agent holds: from here on readers see the end when the writers are gone."""
        for fd in [*self._keepers, *self._fresh.values()]:
            os.close(fd)
        self._keepers, self._fresh = [], {}
