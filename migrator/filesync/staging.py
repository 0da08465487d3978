"""Writing to a file so that it is never left half changed."""

from __future__ import annotations

import errno
import os
import tempfile
from typing import IO

_IN_MEMORY = 4 << 20  # bytes of changes of one file
_COPY = 1 << 20


class StagedWrites:
    """Changes of one file, kept until all of them are there: the other side may go away at any moment.

    Beyond 4 MiB they wait in a file without a name in `folder`.
    """

    def __init__(self, folder: str) -> None:
        self._data: IO[bytes] = _temporary(folder)
        self._writes: list[tuple[int, int]] = []  # offset, length

    def write(self, data: bytes, offset: int) -> None:
        self._data.write(data)
        if self._writes and sum(self._writes[-1]) == offset:
            self._writes[-1] = (self._writes[-1][0], self._writes[-1][1] + len(data))
        else:
            self._writes.append((offset, len(data)))

    def apply(self, fd: int) -> None:
        """Write them to `fd`. Room is made first: a full disk leaves the file as it was. Raises OSError."""
        size = os.fstat(fd).st_size
        try:
            for offset, length in self._writes:
                _reserve(fd, offset, length)
        except OSError:
            os.ftruncate(fd, size)
            raise
        self._data.seek(0)
        for offset, length in self._writes:
            while length:
                data = self._data.read(min(length, _COPY))
                write_all(fd, data, offset)
                offset, length = offset + len(data), length - len(data)

    def close(self) -> None:
        self._data.close()


def _temporary(folder: str) -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=folder)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """pwrite(2) until all of it is written. Raises OSError."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _reserve(fd: int, offset: int, length: int) -> None:
    try:
        os.posix_fallocate(fd, offset, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
