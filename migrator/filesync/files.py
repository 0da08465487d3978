"""Files carried along: `--copy-files`.

The source sends what the destination wanted before the first round, while the workload runs. What the
workload has changed since is found once it is frozen, block by block, and only that is sent again, into the
files as they are there; the saved state of its descriptors follows after the destination has said that all
is in place. What is sent while it is being written to need not be consistent: the last pass makes it so.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field

from migrator.engine.base import FileFact
from migrator.errors import MigratorError
from migrator.filesync.attributes import Held, write_all
from migrator.protocol.messages import FILE_CHUNK, AnyMessage, FileBegin, FileData, FileEnd, FilesSync, MessageError
from migrator.session.preflight import below

Send = Callable[[AnyMessage], Awaitable[float]]  # the seconds that it waited for its turn

_SYNC_SECONDS = 60.0


class FileError(MigratorError):
    """A file cannot be carried along."""


@dataclass
class _Sent:
    """What was sent of a file: a short digest of each block, and what stat(2) said before."""

    fact: FileFact
    blocks: list[bytes] = field(default_factory=list)
    stamp: tuple[int, int] = (0, 0)


class FileSender:
    """The source's side. `root` is the root directory of the workload, as /proc/PID/root shows it; `tell` is
    called with the bytes of each block sent."""

    def __init__(
        self,
        files: Iterable[FileFact],
        send: Send,
        root: str = "",
        tell: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._root = root
        self._tell = tell
        self._files = {fact.path: fact for fact in files}
        self._send = send
        self._wanted: list[str] = []
        self.sent: dict[str, _Sent] = {}
        self._number = 0
        self._answered = asyncio.Event()
        self._last_answer = 0

    @property
    def known(self) -> set[str]:
        return set(self._files)

    def want(self, paths: Iterable[str]) -> None:
        self._wanted = list(paths)

    async def send_wanted(self) -> None:
        """Send every wanted file, and wait until the destination has them."""
        for path in self._wanted:
            await self._send_whole(self._files[path])
        if self._wanted:
            await self.sync()

    async def send_changes(self) -> None:
        """Send what has changed in the files sent; the workload must stand still. Waits if there was any."""
        changed = False
        for sent in self.sent.values():
            if _stamp(below(self._root, sent.fact.path)) != sent.stamp or sent.fact.writable:
                changed |= await self._send_changed(sent)
        if changed:
            await self.sync()

    def synced(self, number: int) -> None:
        """The destination has said that all is in place."""
        self._last_answer = number
        self._answered.set()

    async def sync(self) -> None:
        """Wait until the destination has all that was sent so far in place."""
        self._number += 1
        await self._send(FilesSync(self._number))
        async with asyncio.timeout(_SYNC_SECONDS):
            while self._last_answer < self._number:
                self._answered.clear()
                await self._answered.wait()

    async def _send_whole(self, fact: FileFact) -> None:
        path = below(self._root, fact.path)
        sent = self.sent[fact.path] = _Sent(fact, stamp=_stamp(path))
        try:
            status = os.stat(path)
            with open(path, "rb") as file:
                await self._send(FileBegin(fact, status.st_uid, status.st_gid))
                whole, at = hashlib.sha256(), 0
                while data := await asyncio.to_thread(file.read, FILE_CHUNK):
                    sent.blocks.append(_digest(data))
                    whole.update(data)
                    await self._send(FileData(at, data))
                    self._tell(len(data))
                    at += len(data)
                await self._send(FileEnd(at, whole.hexdigest()))
        except OSError as error:
            raise FileError(f"{fact.path} cannot be copied: {error.strerror}") from error

    async def _send_changed(self, sent: _Sent) -> bool:
        path, begun = below(self._root, sent.fact.path), False
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                for at, data in _blocks(file.fileno()):
                    number = at // FILE_CHUNK
                    if number < len(sent.blocks) and sent.blocks[number] == _digest(data):
                        continue
                    if not begun:
                        await self._send(FileBegin(sent.fact, in_place=True))
                        begun = True
                    await self._send(FileData(at, data))
                    self._tell(len(data))
        except OSError as error:
            raise FileError(f"{path} cannot be copied: {error.strerror}") from error
        if begun or _stamp(path) != sent.stamp:
            if not begun:
                await self._send(FileBegin(sent.fact, in_place=True))
            await self._send(FileEnd(size))
            return True
        return False


class FileReceiver:
    """The destination's side: writes only what it has asked for itself.

    A whole file replaces the old one at once when it is complete (rename(2)), so that programs that run from
    the old one are not disturbed; changes are written in place, when all of them are there. Files appear below
    `root`.
    """

    def __init__(self, wanted: Iterable[str], root: str = "") -> None:
        self._wanted = set(wanted)
        self._root = root
        self._fd = -1
        self._begin: FileBegin | None = None
        self._held: Held | None = None
        self._path = ""
        self._hash = hashlib.sha256()
        self.bytes = 0

    def take(self, message: FileBegin | FileData | FileEnd) -> None:
        """Write it. Raises MessageError for what was not asked for, FileError if it cannot be written."""
        try:
            if isinstance(message, FileBegin):
                self._open(message)
            elif self._begin is None:
                raise MessageError("contents of a file that was not begun")
            elif isinstance(message, FileData):
                self._write(message)
            else:
                self._finish(message)
        except OSError as error:
            self.close()
            raise FileError(
                f"{self._path} cannot be written: {error.strerror}", hint="is there room, and is it writable?"
            ) from error

    def close(self) -> None:
        """Forget a file that is not complete."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._begin is not None and not self._begin.in_place:
                os.unlink(self._partial)
        self._drop_held()
        self._begin = None

    def _drop_held(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    @property
    def _partial(self) -> str:
        head, tail = os.path.split(self._path)
        return os.path.join(head, f".{tail[:200]}.migrator-partial")

    def _open(self, message: FileBegin) -> None:
        path = message.file.path
        if path not in self._wanted:
            raise MessageError(f"{path} was not asked for")
        if self._begin is not None:
            raise MessageError("a file before the last one was complete")
        if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise MessageError(f"not the absolute path of a file: {path!r}")
        if not stat.S_ISREG(message.file.mode):
            raise MessageError(f"{path} is no regular file")
        self._path = below(self._root, path) if self._root else os.path.realpath(path)
        if message.in_place:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._held = Held(os.path.dirname(self._path))
        else:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._partial, flags, 0o600)
        self._begin, self._hash = message, hashlib.sha256()

    def _write(self, message: FileData) -> None:
        assert self._begin is not None
        if self._held is not None:
            self._held.write(message.data, message.offset)
        else:
            self._hash.update(message.data)
            write_all(self._fd, message.data, message.offset)
        self.bytes += len(message.data)

    def _finish(self, message: FileEnd) -> None:
        begin = self._begin
        assert begin is not None
        if not begin.in_place and self._hash.hexdigest() != message.digest:
            self.close()
            raise MessageError(f"{self._path} did not arrive as it was sent")
        if self._held is not None:
            self._held.apply(self._fd)
            self._drop_held()
        os.ftruncate(self._fd, message.size)
        if not begin.in_place:
            os.fchown(self._fd, begin.uid, begin.gid)
            os.fchmod(self._fd, stat.S_IMODE(begin.file.mode))
            os.utime(self._fd, ns=(begin.file.mtime_ns, begin.file.mtime_ns))
            os.replace(self._partial, self._path)
        os.close(self._fd)
        self._fd, self._begin = -1, None


def _blocks(fd: int) -> Iterator[tuple[int, bytes]]:
    at = 0
    while data := os.pread(fd, FILE_CHUNK, at):
        yield at, data
        at += len(data)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)
