"""Pipes and FIFOs with what waits in them.

The contents are read without taking them out.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from migrator.engine.user.descriptors.description import Description
from migrator.errors import CheckpointFailed, ImageError, RestartFailed
from migrator.image.records_files import MAX_CHUNK, File, FileKind, Pipe, PipeBuffer
from migrator.linux import descriptors
from migrator.linux.batch import Area, Strings, each, raise_first
from migrator.linux.openat2 import open_in_root
from migrator.linux.sockets import Peeked
from migrator.linux.x86_64 import NR

_PAGE = 4096
USUAL = 16 * _PAGE  # bytes that a pipe takes unless told otherwise
_AT_ONCE = 256  # pipes whose contents are read at the same time
_PACKET = 1
_MODE = 0o600  # of a new pipe
_SPLICE_F_NONBLOCK = 2
_ONCE = os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL | os.O_TRUNC
_SETTABLE = os.O_APPEND | os.O_NONBLOCK | os.O_ASYNC | os.O_DIRECT | os.O_NOATIME


def outside_end(ends: list[Description]) -> str | None:
    """Whether somebody outside of the tree holds the other end of a pipe: "written" or "read", or None.

    All ends that the tree holds are given. The kernel itself tells: a pipe without writers hangs up."""
    ways = {end.flags & os.O_ACCMODE for end in ends}
    if ways == {os.O_RDONLY}:
        return None if _poll(ends[0].fd) & select.POLLHUP else "written"
    if ways == {os.O_WRONLY}:
        return None if _poll(ends[0].fd) & select.POLLERR else "read"
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


class Copies:
    """What waits in pipes, read without taking it out: tee(2) duplicates the buffers into a pipe of ours, packets
    (O_DIRECT) staying packets. Leave the block."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._capacity = USUAL

    def contents(self, read_end: int, left: int, capacity: int) -> Iterator[bytes]:
        """All `left` bytes behind a read end: packet by packet, or in large parts. To be read to the end."""
        if not left:
            return
        if capacity > self._capacity:
            self._capacity = fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, capacity)
        if descriptors.tee(read_end, self._write, 1 << 30) != left:
            raise OSError(f"tee: not all of the {left} bytes in the pipe")
        while left:
            data = os.read(self._read, min(left, MAX_CHUNK))
            left -= len(data)
            yield data

    def small(self, pipes: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """All that waits in pipes of no more than the usual capacity, (read end, bytes), in one go. None if one of
        them was written to in packets, which are read one by one."""
        counts = [count for _, count in pipes]
        taken = Peeked(counts)
        copied, taken.results = each(
            len(pipes),
            (NR["tee"], [fd for fd, _ in pipes], self._write, 1 << 30, _SPLICE_F_NONBLOCK),
            (NR["read"], self._read, taken.addresses, counts),
        )
        if copied != counts or taken.results != counts:
            with contextlib.suppress(BlockingIOError):
                while os.read(self._read, USUAL):
                    pass
            return None
        return [taken.raw(at) for at in range(len(pipes))]

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *what: object) -> None:
        os.close(self._read)
        os.close(self._write)


def save_all(
    pipes: Sequence[list[Description]], objref_of: Callable[[list[Description], int], tuple[int, bool]]
) -> Iterator[Pipe | PipeBuffer]:
    """The records of pipes, each given as all the ends that the tree holds of it.

    objref_of: of a pipe with a capacity, its objref, and whether its Pipe is still to be written"""
    read_ends = [next((end.fd for end in ends if end.readable), -1) for ends in pipes]
    fds = [fd if fd >= 0 else ends[0].fd for fd, ends in zip(read_ends, pipes, strict=True)]
    sizes = Area(8, len(fds))
    capacities, asked = each(
        len(fds), (NR["fcntl"], fds, fcntl.F_GETPIPE_SZ), (NR["ioctl"], fds, descriptors.FIONREAD, sizes.addresses)
    )
    raise_first(capacities, "F_GETPIPE_SZ", fds)
    raise_first(asked, "FIONREAD", fds)
    waiting_bytes = sizes.view.cast("i")[::2].tolist()
    objrefs: list[int] = []
    for ends, capacity in zip(pipes, capacities, strict=True):
        objref, new = objref_of(ends, capacity)
        objrefs.append(objref)
        if new:
            yield Pipe(objref, capacity)
    full = []
    for at, (fd, amount) in enumerate(zip(read_ends, waiting_bytes, strict=False)):
        if fd >= 0 and amount:  # else nobody can ever read it
            packets = any(end.flags & os.O_DIRECT for end in pipes[at])
            full.append(Full(fd, objrefs[at], amount, capacities[at], packets))
    yield from contents_of(full)


class Full(NamedTuple):
    """A pipe in which `amount` bytes wait. fd: a read end of it, ours"""

    fd: int
    objref: int
    amount: int
    capacity: int
    in_packets: bool


def contents_of(pipes: Sequence[Full]) -> Iterator[PipeBuffer]:
    """What waits in pipes, left there."""
    small = [pipe for pipe in pipes if pipe.capacity <= USUAL and not pipe.in_packets]
    others = [pipe for pipe in pipes if pipe.capacity > USUAL or pipe.in_packets]
    with Copies() as copies:
        for first in range(0, len(small), _AT_ONCE):
            part = small[first : first + _AT_ONCE]
            found = copies.small([(pipe.fd, pipe.amount) for pipe in part])
            if found is None:
                others += part
                continue
            for pipe, data in zip(part, found, strict=True):
                yield PipeBuffer(pipe.objref, 0, data)
        for pipe in others:
            for data in copies.contents(pipe.fd, pipe.amount, pipe.capacity):
                yield PipeBuffer(pipe.objref, _PACKET if pipe.in_packets else 0, data)


class PipeRestore:
    """One pipe being built. Its first ends are those of pipe2(2), all others are opened anew.

    What was in it goes in with the first end that is opened; by fill_all(), if that was ahead of the freeze."""

    def __init__(self, rec: Pipe) -> None:
        self.capacity = rec.capacity
        self.flags = os.O_NONBLOCK  # of the end that it is filled through, once that has its own
        self._buffers: list[PipeBuffer] = []
        self._bytes = 0
        self._fresh: dict[bool, int] = {}  # writable? -> an end that nobody has yet
        self._fifo = -1  # ours, of a FIFO
        self._any = -1  # an end by which others are opened: all of a pipe's first two stay open until close()

    def add(self, rec: PipeBuffer) -> None:
        self._bytes += len(rec.data)
        if self._bytes > self.capacity or rec.flags & ~_PACKET or not rec.data:
            raise ImageError(f"{self._bytes} bytes or more in a pipe of {self.capacity}")
        self._buffers.append(rec)

    @property
    def made(self) -> bool:
        return self._any >= 0

    def take_buffers(self) -> list[tuple[int, int, int, bytes]]:
        """What is to be filled into a pipe that is made: of each (end, flags for that, flags afterwards, data)."""
        out = [
            (self._any, os.O_NONBLOCK | (os.O_DIRECT if buffer.flags else 0), self.flags, buffer.data)
            for buffer in self._buffers
        ]
        self._buffers.clear()
        return out

    def open(self, rec: File, root_fd: int) -> int:
        """The description that `rec` is about, ours; its flags are still to be set."""
        flags = rec.flags & ~_ONCE
        if self._any < 0:
            if rec.kind == FileKind.FIFO:
                self._any = self._fifo = self._open_fifo(rec, root_fd)
            else:
                read, self._any = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
                self._fresh = {False: read, True: self._any}
            self._fill(rec)
        if rec.kind == FileKind.PIPE and not flags & descriptors.O_LARGEFILE:
            fd = self._fresh.pop(flags & os.O_ACCMODE != os.O_RDONLY, -1)
            if fd < 0:
                raise ImageError(f"file {rec.objref}: a pipe has three ends")
        else:
            fd = descriptors.reopen(self._any, flags & ~os.O_DIRECT | os.O_NONBLOCK)
        if fd == self._any:
            self.flags = rec.flags & _SETTABLE
        if rec.kind == FileKind.PIPE and stat.S_IMODE(rec.mode) != _MODE:
            os.fchmod(fd, stat.S_IMODE(rec.mode))
        return fd

    @staticmethod
    def _open_fifo(rec: File, root_fd: int) -> int:
        flags = os.O_RDWR | os.O_NONBLOCK
        return open_in_root(root_fd, rec.path.lstrip("/"), flags)

    def _fill(self, rec: File) -> None:
        end = self._any
        if fcntl.fcntl(end, fcntl.F_GETPIPE_SZ) != self.capacity:
            try:
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, self.capacity)
            except OSError as error:
                raise RestartFailed(
                    f"file {rec.objref}: a pipe of {self.capacity} bytes cannot be made: {error}",
                    hint="raise /proc/sys/fs/pipe-max-size",
                ) from error
        if self._fifo >= 0 and (there := waiting(end)):
            # the saved tasks still hold the same FIFO, on this very host
            with Copies() as copies:
                same = b"".join(copies.contents(end, there, self.capacity)) == b"".join(b.data for b in self._buffers)
            if not same:
                raise RestartFailed(f"{rec.path} (file {rec.objref}): other data waits in this FIFO here")
            return
        packets = 0
        for buffer in self._buffers:
            if buffer.flags != packets:
                packets = buffer.flags
                fcntl.fcntl(end, fcntl.F_SETFL, os.O_NONBLOCK | (os.O_DIRECT if packets else 0))
            if os.write(end, buffer.data) != len(buffer.data):
                raise RestartFailed(f"file {rec.objref}: the pipe does not take what was in it")
        self._buffers.clear()

    def close(self) -> None:
        """Close what only the agent holds: from here on readers see the end when the writers are gone."""
        for fd in self._fresh.values():
            os.close(fd)
        self._fresh = {}
        if self._fifo >= 0:
            os.close(self._fifo)
            self._fifo = -1


def fill_all(pipes: Sequence[PipeRestore]) -> None:
    """Fill pipes that were made ahead of their contents, and whose ends have their flags."""
    parts = [part for pipe in pipes for part in pipe.take_buffers()]
    ends, while_filled, afterwards, contents = zip(*parts, strict=True) if parts else ((), (), (), ())
    lengths = [len(data) for data in contents]
    there = Strings(contents)
    _, written, _ = each(
        len(parts),
        (NR["fcntl"], ends, fcntl.F_SETFL, while_filled),
        (NR["write"], ends, there.addresses, lengths),
        (NR["fcntl"], ends, fcntl.F_SETFL, afterwards),
    )
    if written != lengths:
        raise RestartFailed("a pipe does not take what was in it")
