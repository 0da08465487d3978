"""Taking frames from a device and giving frames to it (packet(7)).

Every frame is preceded by the 10 bytes of a `struct virtio_net_hdr` (linux/virtio_net.h, PACKET_VNET_HDR):
a frame may be a segment of 64 KiB that was never cut, with a checksum that nobody has computed yet, and the
header is what carries that to where the frame goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Iterable

from migrator.linux.bpf import Program

VNET_HDR = 10
MAX_FRAME = 1 << 17

_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP, _PACKET_VNET_HDR, _PACKET_MR_PROMISC = 1, 15, 1
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_ETH_P_ALL = 3

# linux/filter.h
_LD, _LDH, _LDB, _JEQ, _JSET, _RET = 0x20, 0x28, 0x30, 0x15, 0x45, 0x06
_ALL = 0xFFFFFFFF

Instruction = tuple[int, int, int, int]

REJECT_ALL: list[Instruction] = [(_RET, 0, 0, 0)]


def concerning(mac: bytes) -> list[Instruction]:
    """A filter that passes frames to `mac`, and multicast frames from it."""
    high, low = struct.unpack("!HI", mac)
    return [
        (_LD, 0, 0, 2),
        (_JEQ, 0, 2, low),  # else to "from"
        (_LDH, 0, 0, 0),
        (_JEQ, 6, 0, high),  # to "pass"
        (_LDB, 0, 0, 0),  # from:
        (_JSET, 0, 5, 1),  # else to "reject"
        (_LD, 0, 0, 8),
        (_JEQ, 0, 3, low),
        (_LDH, 0, 0, 6),
        (_JEQ, 0, 1, high),
        (_RET, 0, 0, _ALL),  # pass:
        (_RET, 0, 0, 0),  # reject:
    ]


def attach(sock: socket.socket, program: list[Instruction]) -> None:
    """From now on `sock` takes what `program` passes, and as much of it."""
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    blob = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(blob))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)


class PacketSocket:
    """A raw socket on one device of the calling thread's network namespace. It takes nothing until
    `admit()`. Raises OSError; PermissionError without CAP_NET_RAW."""

    def __init__(
        self, device: str, *, promiscuous: bool = False, buffer: int = 32 << 20, program: Program | None = None
    ) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
            self.admit(program or REJECT_ALL)
            self._socket.bind((device, _ETH_P_ALL))
            if promiscuous:
                request = struct.pack("=iHH8s", socket.if_nametoindex(device), _PACKET_MR_PROMISC, 0, b"")
                self._socket.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
        except BaseException:
            self._socket.close()
            raise
        self._buffer = bytearray(MAX_FRAME)

    def admit(self, program: list[Instruction] | Program) -> None:
        """From now on take the frames that `program` passes."""
        if isinstance(program, Program):
            program.filter(self._socket)
            return
        attach(self._socket, program)

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> list[bytes]:
        """All frames that have come, without waiting."""
        frames: list[bytes] = []
        while True:
            try:
                size = self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return frames
            frames.append(bytes(self._buffer[:size]))

    def give(self, frame: bytes) -> None:
        """Send a frame that has its virtio_net_hdr. This socket does not take it back."""
        self._socket.send(frame)

    def give_plain(self, frame: bytes) -> None:
        """Send a frame that is complete: its checksums are right and it fits the MTU."""
        self._socket.send(bytes(VNET_HDR) + frame)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> PacketSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def give_all(port: PacketSocket, frames: Iterable[bytes]) -> None:
    """A frame that the device refuses is one lost frame, which every network may lose; it is no reason to give
    up a migration whose point of no return has passed."""
    for frame in frames:
        with contextlib.suppress(OSError):
            port.give(frame)
