"""Where an image goes: a file that appears whole, or a descriptor of the caller's."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
from pathlib import Path
from types import TracebackType

from migrator.api.image_info import summarise
from migrator.errors import CheckpointFailed, UsageError
from migrator.linux import descriptors

_LOOK_EVERY = 0.02  # seconds


class NoReader(UsageError):
    """A FIFO that can be written to once somebody reads it."""


async def open_output(to: Path | int) -> OutputFile:
    """As the class, and waits until a FIFO has a reader. Raises UsageError."""
    while True:
        try:
            return OutputFile(to)
        except NoReader:
            await asyncio.sleep(_LOOK_EVERY)


class OutputFile:
    """Written beside and renamed by `whole()`, so that a file of that name is a whole image or not there. To
    anything else of that name, such as a FIFO, and to a descriptor, it is written as it comes.

    `fd` is open while the block is. Raises UsageError if it cannot be written to, NoReader for a FIFO that
    nobody reads yet."""

    def __init__(self, to: Path | int) -> None:
        self._beside: Path | None = None
        self._opened = not isinstance(to, int)
        self._begin = 0
        if isinstance(to, int):
            self.fd = to
            self._begin = _end(to)
            self.name = "standard output" if to == 1 else f"descriptor {to}"
            return
        self._path = Path(os.path.realpath(to))
        self.name = str(self._path)
        special = self._path.exists() and not stat.S_ISREG(self._path.stat().st_mode)
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            if special:
                self.fd = os.open(self._path, flags | os.O_NONBLOCK)
                os.set_blocking(self.fd, True)
            else:
                beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
                self.fd = os.open(beside, flags | os.O_CREAT | os.O_EXCL, 0o600)
                self._beside = beside
        except OSError as error:
            if special and error.errno == errno.ENXIO:
                raise NoReader(f"{self._path}: nobody reads it") from error
            raise UsageError(f"{self._path}: {error.strerror}") from error

    def check(self) -> None:
        """What was written is an image that can be read to its end. Only a regular file is looked at, about a second
        for each GiB. Raises CheckpointFailed."""
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            return
        try:
            fd = descriptors.reopen(self.fd, os.O_RDONLY)
        except PermissionError:  # a descriptor of somebody who may read it
            return
        try:
            end = os.lseek(self.fd, 0, os.SEEK_CUR)
            os.lseek(fd, self._begin, os.SEEK_SET)
            info = summarise(fd, end - self._begin)
        finally:
            os.close(fd)
        if not info.whole:
            raise CheckpointFailed(
                f"{self.name}: what was written cannot be restarted: {info.cause}",
                hint="the program runs on; please report this",
            )

    def whole(self) -> None:
        """All is written: put it on the disk and into its place. Raises OSError."""
        if self._beside is not None:
            os.fsync(self.fd)
            os.rename(self._beside, self._path)
            self._beside = None

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._beside is not None:
            self._beside.unlink(missing_ok=True)
        if self._opened:
            os.close(self.fd)


def _end(fd: int) -> int:
    """Where what is written next goes in a regular file."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return 0
    return status.st_size if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND else os.lseek(fd, 0, os.SEEK_CUR)
