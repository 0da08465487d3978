"""When a container was heard again: the first packet that its programs sent once they ran here.

A packet socket inside of the container's network sees what leaves eth0, with the kernel's own time of it: nobody of
ours has to be awake then. What the kernel says by itself (acknowledgements, ARP, announcements) tells nothing of the
programs and is not counted; nor is what comes from elsewhere and only passes, as of connections that stayed behind.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Collection
from typing import NamedTuple

from migrator.container.packet_socket import REJECT_ALL, Instruction, attach

_ETH_P_ALL, _IPV4, _IPV6, _TCP, _UDP = 3, 0x0800, 0x86DD, 6, 17
_SO_TIMESTAMPNS, _SO_RCVBUFFORCE = 35, 33
_TIMESPEC = struct.Struct("@qq")
_SYN_FIN_RST = 0x07
_HEADERS = 128  # bytes of a frame that are looked at
_BUFFER = 1 << 20  # bytes, so what is seen of a flood is its beginning

# linux/filter.h: frames of IPv4 and IPv6, their headers only
_LDH, _JEQ, _RET = 0x28, 0x15, 0x06
_OF_IP: list[Instruction] = [
    (_LDH, 0, 0, 12),
    (_JEQ, 1, 0, _IPV4),
    (_JEQ, 0, 1, _IPV6),
    (_RET, 0, 0, _HEADERS),
    (_RET, 0, 0, 0),
]


class Flow(NamedTuple):
    """Whose packet it is: of what leaves a container, its own port, the peer's address as bytes, and port."""

    local_port: int
    peer: bytes
    peer_port: int


class FirstPacket:
    """Watches `device` of the calling thread's network namespace, from `begin()` on. Raises OSError."""

    def __init__(self, device: str) -> None:
        self.asked = False  # something has come that a program may answer
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            attach(self._socket, REJECT_ALL)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            self._socket.bind((device, _ETH_P_ALL))
        except BaseException:
            self._socket.close()
            raise

    def begin(self) -> None:
        attach(self._socket, _OF_IP)

    def look(self, after: int, passing: Collection[Flow] = ()) -> int:
        """When the first packet left, of those that did since the last call and not before `after`; 0 if none.
        Times in ns of CLOCK_MONOTONIC. Those of `passing` are not counted."""
        found = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, control, _, address = self._socket.recvmsg(_HEADERS, 64, socket.MSG_DONTWAIT)
                flow = spoken(frame)
                if flow is None:
                    continue
                if address[2] != socket.PACKET_OUTGOING:
                    self.asked = True
                elif not found and flow not in passing and (at := _monotonic(control)) >= after:
                    found = at
        return found

    def close(self) -> None:
        self._socket.close()


def spoken(frame: bytes) -> Flow | None:
    """Of an Ethernet frame with a UDP datagram, or a TCP segment that has data or begins or ends a connection: whose
    it is. None for any other."""
    with contextlib.suppress(struct.error, IndexError):
        kind = int.from_bytes(frame[12:14], "big")
        if kind == _IPV4:
            if int.from_bytes(frame[20:22], "big") & 0x1FFF:
                return None  # a fragment: the first one had the ports
            protocol, peer = frame[23], frame[30:34]
            at, end = 14 + (frame[14] & 0xF) * 4, 14 + int.from_bytes(frame[16:18], "big")
        elif kind == _IPV6:
            protocol, peer = frame[20], frame[38:54]
            at, end = 54, 54 + int.from_bytes(frame[18:20], "big")
        else:
            return None
        ports = struct.unpack_from("!HH", frame, at)
        if protocol == _UDP:
            return Flow(ports[0], peer, ports[1])
        if protocol == _TCP and (frame[at + 13] & _SYN_FIN_RST or end > at + (frame[at + 12] >> 4) * 4):
            return Flow(ports[0], peer, ports[1])
    return None


def _monotonic(control: list[tuple[int, int, bytes]]) -> int:
    """The kernel's time of a packet, by the clock that all else goes by."""
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, nanoseconds = _TIMESPEC.unpack_from(data)
            return int(seconds * 10**9 + nanoseconds) - time.time_ns() + time.monotonic_ns()
    return 0
