"""Another process's memory: process_vm_readv(2), process_vm_writev(2) and /proc/PID/mem."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from types import TracebackType

IOV_MAX = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_held = ctypes.PyDLL(None, use_errno=True)
_ARGS = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]
_calls = {}
for _name in ("process_vm_readv", "process_vm_writev"):
    for _held_gil, _lib in ((True, _held), (False, _libc)):
        _function = getattr(_lib, _name)
        _function.restype = ctypes.c_ssize_t
        _function.argtypes = _ARGS
        _calls[_name, _held_gil] = _function


class Buffer:
    """Page-aligned memory of our own, of `size` bytes, with a fixed address."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size)
        self.view = memoryview(self._map)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)
        self.size = size


def read(pid: int, address: int, size: int) -> bytes:
    """`size` bytes at `address`; raises OSError unless all can be read."""
    buffer = ctypes.create_string_buffer(size)
    if _vector("process_vm_readv", pid, ctypes.addressof(buffer), [(address, size)], size) != size:
        raise OSError(ctypes.get_errno(), "process_vm_readv: short read", f"pid {pid} at {address:#x}")
    return buffer.raw


def write(pid: int, address: int, data: bytes) -> None:
    """Write all of `data` at `address`, within the protection of the mapping; raises OSError."""
    size = len(data)
    buffer = ctypes.create_string_buffer(data, size)
    if _vector("process_vm_writev", pid, ctypes.addressof(buffer), [(address, size)], size) != size:
        raise OSError(ctypes.get_errno(), "process_vm_writev: short write", f"pid {pid} at {address:#x}")


def read_into(pid: int, buffer_address: int, ranges: Sequence[tuple[int, int]], total: int) -> int:
    """Fill the buffer with (address, length) ranges; bytes read, or -1 (a short count: a range vanished).

    Pages that are shared by copy-on-write are copied for it, for good: see MemFile.read_into()."""
    return _vector("process_vm_readv", pid, buffer_address, ranges, total)


def write_from(pid: int, buffer_address: int, ranges: Sequence[tuple[int, int]], total: int) -> int:
    """Spread the buffer over (address, length) ranges; bytes written, or -1."""
    return _vector("process_vm_writev", pid, buffer_address, ranges, total)


def _vector(name: str, pid: int, local: int, ranges: Sequence[tuple[int, int]], total: int) -> int:
    flat: list[int] = []
    for address, length in ranges:
        flat.append(address)
        flat.append(length)
    remote = (ctypes.c_uint64 * len(flat))(*flat)
    mine = (ctypes.c_uint64 * 2)(local, total)
    call = _calls[name, total <= 65536]
    return int(call(pid, ctypes.addressof(mine), 1, ctypes.addressof(remote), len(flat) // 2, 0))


class MemFile:
    """/proc/PID/mem: reads and writes past the protection of private mappings, where the kernel allows it."""

    def __init__(self, pid: int, flags: int = os.O_RDWR) -> None:
        self._path = f"/proc/{pid}/mem"
        self.fd = os.open(self._path, flags | os.O_CLOEXEC)

    def read_into(self, view: memoryview, address: int) -> int:
        """Fill `view`; bytes read. Unlike process_vm_readv(2), which pins what it reads, this leaves pages that are
        shared by copy-on-write shared."""
        try:
            return os.preadv(self.fd, [view], address)
        except OSError as error:
            if error.errno == errno.EIO:  # nothing is mapped there
                return 0
            raise

    def write(self, address: int, data: bytes | memoryview) -> None:
        try:
            written = os.pwrite(self.fd, data, address)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self._path} at {address:#x}") from None
        if written != len(data):
            raise OSError(errno.EIO, "short write", f"{self._path} at {address:#x}")

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> MemFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_memcmp = _held.memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcmp.restype = ctypes.c_int


def is_zero(address: int, size: int) -> bool:
    """Whether `size` bytes of our own memory at `address` are all zero."""
    return ctypes.c_char.from_address(address).value == b"\0" and _memcmp(address, address + 1, size - 1) == 0
