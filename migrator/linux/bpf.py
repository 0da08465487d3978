"""Small eBPF programs on a network device, on packet sockets, and over a task's mappings (bpf(2), tcx in linux/bpf.h).

    with Program(code, SCHED_CLS) as program, tcx(program, index, TCX_EGRESS) as link:
        ...

Programs, maps and links live as long as their descriptors: nothing of them is left behind when this
program ends, however it ends. tcx came with Linux 6.6.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from migrator.linux.sys import call

SOCKET_FILTER, SCHED_CLS, TRACING = 1, 3, 26
TCX_INGRESS, TCX_EGRESS = 46, 47
TCX_NEXT, TCX_DROP = -1, 2
KEEP_ALL, KEEP_NONE = -1, 0  # what a socket filter returns

_NR_BPF = 321
_MAP_CREATE, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD, _LINK_CREATE, _ITER_CREATE = 0, 2, 3, 5, 28, 33
_TRACE_ITER = 28
_LOAD_BTF_ID_AT = 108  # of the attributes of _PROG_LOAD
_HASH = 1
_SO_ATTACH_BPF = 50
_PIECE = 1 << 16  # more than the kernel gives out at a time
_LICENSE = ctypes.create_string_buffer(b"GPL")


def _bpf(command: int, attributes: bytes, about: str) -> int:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return call(_NR_BPF, command, ctypes.addressof(buffer), len(attributes), name="bpf", about=about)


class _Held:
    """Something that lives as long as its descriptor `fd`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class KeySet(_Held):
    """A set of keys of `size` bytes that programs can look into; at most `limit` of them."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(_bpf(_MAP_CREATE, struct.pack("=IIIII", _HASH, size, 1, limit, 0), "a map"))
        self.size = size

    def add(self, key: bytes) -> None:
        """Raises OSError; E2BIG where it is full."""
        value = ctypes.create_string_buffer(1)
        self._do(_MAP_UPDATE, key, struct.pack("=QQ", ctypes.addressof(value), 0))

    def discard(self, key: bytes) -> None:
        try:
            self._do(_MAP_DELETE, key, b"")
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def _do(self, command: int, key: bytes, more: bytes) -> None:
        assert len(key) == self.size
        raw = ctypes.create_string_buffer(key, len(key))
        _bpf(command, struct.pack("=IxxxxQ", self.fd, ctypes.addressof(raw)) + more, "a map")


class Program(_Held):
    """`code` (see `Assembly`), verified by the kernel. Raises OSError.

    iterator: the number of the kernel's function that it is for (migrator.linux.btf), of kind TRACING"""

    def __init__(self, code: bytes, kind: int, *, iterator: int = 0) -> None:
        self.piece = memoryview(bytearray(_PIECE if iterator else 0))  # to read into, what an iterator writes
        text = ctypes.create_string_buffer(code, len(code))
        addresses = ctypes.addressof(text), ctypes.addressof(_LICENSE)
        attributes = struct.pack("=IIQQIIQII16s", kind, len(code) // 8, *addresses, 0, 0, 0, 0, 0, b"migrator")
        if iterator:
            attributes += struct.pack("=II", 0, _TRACE_ITER)
            attributes = attributes.ljust(_LOAD_BTF_ID_AT, b"\0") + struct.pack("=II", iterator, 0)
        super().__init__(_bpf(_PROG_LOAD, attributes, "a program"))

    def filter(self, sock: socket.socket) -> None:
        """Let `sock` take what this socket filter keeps, from now on."""
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, self.fd)


def tcx(program: Program, index: int, where: int) -> _Held:
    """Run `program` on every frame that device `index` of this network namespace receives (TCX_INGRESS) or
    sends (TCX_EGRESS), as long as the result is open. Raises OSError."""
    attributes = struct.pack("=IIIIIIQ", program.fd, index, where, 0, 0, 0, 0)
    return _Held(_bpf(_LINK_CREATE, attributes, f"link {index}"))


class Iteration(_Held):
    """`program` run over what there is of the process `pid`; each read() is a new one. Raises OSError."""

    def __init__(self, program: Program, pid: int) -> None:
        info = ctypes.create_string_buffer(struct.pack("=III", 0, pid, 0), 12)
        attributes = struct.pack("=IIIIQI", program.fd, 0, _TRACE_ITER, 0, ctypes.addressof(info), 12)
        super().__init__(_bpf(_LINK_CREATE, attributes, f"pid {pid}"))
        self._piece = program.piece

    def read(self) -> Iterator[memoryview]:
        """What the program writes, in pieces of whole writes, each good until the next is read."""
        fd = _bpf(_ITER_CREATE, struct.pack("=II", self.fd, 0), "an iteration")
        try:
            while length := os.readv(fd, [self._piece]):
                yield self._piece[:length]
        finally:
            os.close(fd)


class Assembly:
    """Instructions, written one after the other; jumps go forward, to labels (Documentation/bpf/standardization).

    Registers are numbers. `load()` and `load_from()` read the frame in network byte order into register 0, need
    the context in register 6, and destroy registers 1 to 5."""

    _SIZES = {1: 0x10, 2: 0x08, 4: 0x00}  # noqa: RUF012

    def __init__(self) -> None:
        self._code: list[list[int]] = []
        self._jumps: list[tuple[int, str]] = []
        self._labels: dict[str, int] = {}

    def _put(self, opcode: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> None:
        self._code.append([opcode, dst | src << 4, offset, immediate])

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def copy(self, dst: int, src: int) -> None:
        self._put(0xBF, dst, src)

    def set(self, dst: int, value: int) -> None:
        self._put(0xB7, dst, immediate=value)

    def add(self, dst: int, value: int) -> None:
        self._put(0x07, dst, immediate=value)

    def mask(self, dst: int, value: int) -> None:
        self._put(0x57, dst, immediate=value)

    def shift_left(self, dst: int, bits: int) -> None:
        self._put(0x67, dst, immediate=bits)

    def load(self, size: int, at: int) -> None:
        self._put(0x20 | self._SIZES[size], immediate=at)

    def load_from(self, size: int, base: int, at: int) -> None:
        self._put(0x40 | self._SIZES[size], src=base, immediate=at)

    def store_word(self, at: int, src: int) -> None:
        """At `at` from the frame pointer, which is negative."""
        self._put(0x63, 10, src, at)

    def fetch(self, dst: int, base: int, at: int) -> None:
        """8 bytes of the context, the stack, or a structure of the kernel's."""
        self._put(0x79, dst, base, at)

    def keep(self, at: int, src: int) -> None:
        """8 bytes at `at` from the frame pointer, which is negative."""
        self._put(0x7B, 10, src, at)

    def call(self, helper: int) -> None:
        self._put(0x85, immediate=helper)

    def jump(self, to: str) -> None:
        self._jumps.append((len(self._code), to))
        self._put(0x05)

    def jump_if_equal(self, dst: int, value: int, to: str) -> None:
        self._jumps.append((len(self._code), to))
        self._put(0x15, dst, immediate=value)

    def jump_unless_equal(self, dst: int, value: int, to: str) -> None:
        self._jumps.append((len(self._code), to))
        self._put(0x55, dst, immediate=value)

    def jump_if_any(self, dst: int, bits: int, to: str) -> None:
        self._jumps.append((len(self._code), to))
        self._put(0x45, dst, immediate=bits)

    def look_up(self, keys: KeySet, at: int) -> None:
        """Register 0 becomes 0 unless the key at `at` from the frame pointer is in `keys`."""
        self._put(0x18, 1, 1, immediate=keys.fd)  # BPF_PSEUDO_MAP_FD
        self._put(0)
        self.copy(2, 10)
        self.add(2, at)
        self.call(1)  # bpf_map_lookup_elem

    def end(self, verdict: int) -> None:
        self.set(0, verdict)
        self._put(0x95)

    def code(self) -> bytes:
        for number, label in self._jumps:
            self._code[number][2] = self._labels[label] - number - 1
        return b"".join(struct.pack("=BBhi", *instruction) for instruction in self._code)
