"""fanotify(7): which names changed on a file system, told by the kernel.

    with FileSystemWatch(top_fd) as watch:
        known[handle_of(dir_fd)] = directory
        ...
        for change in watch.changes():
            directory = known.get(change.directory)

The mark is on the whole file system, so that nothing is missed whatever is moved where; a directory is told
by its file handle (name_to_handle_at(2)), which is its own for its whole life and never used again. Needs
CAP_SYS_ADMIN, and a file system that has handles: overlayfs has none unless it is mounted with `nfs_export`.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from migrator.linux import sys

FAN_MODIFY, FAN_ATTRIB = 0x2, 0x4
FAN_MOVED_FROM, FAN_MOVED_TO = 0x40, 0x80
FAN_CREATE, FAN_DELETE = 0x100, 0x200
FAN_Q_OVERFLOW, FAN_ONDIR = 0x4000, 0x40000000

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_UNLIMITED_QUEUE = 0x1, 0x2, 0x10
_FAN_REPORT_FID, _FAN_REPORT_DFID_NAME = 0x200, 0xC00
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100
_FID, _DFID_NAME, _DFID = 1, 2, 3
_MASK = FAN_MODIFY | FAN_ATTRIB | FAN_MOVED_FROM | FAN_MOVED_TO | FAN_CREATE | FAN_DELETE | FAN_ONDIR

_NR_NAME_TO_HANDLE_AT, _NR_OPEN_BY_HANDLE_AT = 303, 304
_NR_FANOTIFY_INIT, _NR_FANOTIFY_MARK = 300, 301
_AT_EMPTY_PATH = 0x1000
_MAX_HANDLE_SZ = 128
_READ = 256 << 10

_METADATA = struct.Struct("=IBBHQii")  # event_len, vers, reserved, metadata_len, mask, fd, pid
_INFO = struct.Struct("=BBH8x")  # info_type, pad, len, fsid
_HANDLE = struct.Struct("=Ii")  # handle_bytes, handle_type


class Change(NamedTuple):
    """Something happened to `name` in `directory` (or to the directory itself: ".").

    mask:  FAN_ bits
    file:  the handle of what was written to, b"" where it was not told
    A file that got or lost a name is told without a directory. An overflow has neither: anything may have changed.
    """

    directory: bytes
    name: bytes
    mask: int
    file: bytes = b""


class FileSystemWatch:
    """Watches the file system that `fd` is on, from now on. Raises OSError where that cannot be done."""

    def __init__(self, fd: int) -> None:
        flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_UNLIMITED_QUEUE | _FAN_REPORT_DFID_NAME | _FAN_REPORT_FID
        handle_of(fd)  # without handles the events could not be told apart
        self._fd = sys.call(_NR_FANOTIFY_INIT, flags, os.O_RDONLY, name="fanotify_init")
        path = ctypes.create_string_buffer(b".")
        try:
            sys.call(
                _NR_FANOTIFY_MARK,
                self._fd,
                _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM,
                _MASK,
                fd,
                ctypes.addressof(path),
                name="fanotify_mark",
            )
        except OSError:
            os.close(self._fd)
            raise

    def changes(self) -> Iterator[Change]:
        """All that has happened since the last call, in order."""
        while True:
            try:
                data = os.read(self._fd, _READ)
            except BlockingIOError:
                return
            yield from parse(data)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FileSystemWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse(data: bytes) -> Iterator[Change]:
    """What one read(2) from a fanotify descriptor has told."""
    at = 0
    while at + _METADATA.size <= len(data):
        length, _, _, metadata, mask, _, _ = _METADATA.unpack_from(data, at)
        if length < _METADATA.size:
            return
        directory = name = file = b""
        info, end = at + metadata, at + length
        while info + _INFO.size + _HANDLE.size <= end:
            kind, _, size = _INFO.unpack_from(data, info)
            start = info + _INFO.size
            count, _ = _HANDLE.unpack_from(data, start)
            after = start + _HANDLE.size + count
            if kind in (_DFID_NAME, _DFID):
                directory = data[start:after]
                name = data[after : info + size].split(b"\0", 1)[0] if kind == _DFID_NAME else b"."
            elif kind == _FID:
                file = data[start:after]
            if size < _INFO.size:
                break
            info += size
        if mask & FAN_Q_OVERFLOW or directory or file:
            yield Change(directory, name, mask, file)
        at += length


def handle_of(fd: int, name: bytes = b"") -> bytes:
    """The handle of the object behind `fd`, or of `name` in it, as `Change` has it. Raises OSError."""
    buffer = ctypes.create_string_buffer(_HANDLE.pack(_MAX_HANDLE_SZ, 0), _HANDLE.size + _MAX_HANDLE_SZ)
    path = ctypes.create_string_buffer(name)
    mount = ctypes.c_int()
    sys.call(
        _NR_NAME_TO_HANDLE_AT,
        fd,
        ctypes.addressof(path),
        ctypes.addressof(buffer),
        ctypes.addressof(mount),
        0 if name else _AT_EMPTY_PATH,
        name="name_to_handle_at",
    )
    count, _ = _HANDLE.unpack_from(buffer.raw)
    return buffer.raw[: _HANDLE.size + count]


def open_handle(fd: int, handle: bytes, flags: int) -> int:
    """Open what `handle` belongs to, on the file system of `fd` (no O_PATH descriptor). Close-on-exec. Raises
    OSError, ESTALE if it is gone."""
    buffer = ctypes.create_string_buffer(handle, max(len(handle), _HANDLE.size))
    return sys.call(_NR_OPEN_BY_HANDLE_AT, fd, ctypes.addressof(buffer), flags | os.O_CLOEXEC, name="open_by_handle_at")
