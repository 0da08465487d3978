"""Packets that a peer would have sent, delivered within this host; and what a connection had sent, sent again.

A FIN or RST that the saved connection had received before cannot be put into a socket by any call: it is
made here and sent through a raw socket to the host's own address, where the restored socket receives it.
The same way datagrams get back into the queue of a UDP socket, with their sender's address.

A restored connection knows nothing of its round trip time, and waits a second before it sends again what
was lost while it moved. So what was not acknowledged is sent once by this, at once; the peer's answer puts
the connection right, or tells it that nothing was missing.
"""

from __future__ import annotations

import socket
import struct

from migrator.engine.user.descriptors import addresses

FIN, RST, PSH, ACK = 1, 4, 8, 16

_MAPPED = bytes(10) + b"\xff\xff"


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total = int.from_bytes(data, "big") % 0xFFFF  # one's complement addition is arithmetic modulo 2^16 - 1
    return ~total & 0xFFFF


def _hosts(local: bytes, peer: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """(local host, local port, peer host, peer port) of raw addresses; mapped ones as IPv4."""
    out: list[bytes] = []
    for raw in (local, peer):
        host = raw[4:8] if len(raw) == 16 else raw[8:24]
        out += [host.removeprefix(_MAPPED) if len(host) == 16 and host.startswith(_MAPPED) else host, raw[2:4]]
    return out[0], out[1], out[2], out[3]


def segment(
    local: bytes,
    peer: bytes,
    flags: int,
    seq: int,
    ack: int,
    *,
    data: bytes = b"",
    window: int = 0xFFFF,
    timestamp: int | None = None,
) -> bytes:
    """An IP packet from `peer` to `local` with a TCP segment. `window` as it goes over the wire.

    timestamp: the value of a timestamps option that echoes nothing (RFC 7323)."""
    to, to_port, source, source_port = _hosts(local, peer)
    options = b"" if timestamp is None else struct.pack(">BBBBII", 1, 1, 8, 10, timestamp, 0)
    words = 5 + len(options) // 4
    tcp = source_port + to_port + struct.pack(">IIBBHHH", seq, ack, words << 4, flags, window, 0, 0)
    return _wrap(source, to, socket.IPPROTO_TCP, tcp + options + data, 16)


def datagram(local: bytes, peer: bytes, data: bytes) -> bytes:
    """An IP packet from `peer` to `local` with a UDP datagram."""
    to, to_port, source, source_port = _hosts(local, peer)
    udp = source_port + to_port + struct.pack(">HH", 8 + len(data), 0) + data
    return _wrap(source, to, socket.IPPROTO_UDP, udp, 6)


def _wrap(source: bytes, to: bytes, protocol: int, payload: bytes, place: int) -> bytes:
    pseudo = source + to + struct.pack(">IHH", len(payload), 0, protocol)
    value = checksum(pseudo + payload) or 0xFFFF
    payload = payload[:place] + struct.pack(">H", value) + payload[place + 2 :]
    if len(to) == 4:
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0) + source + to
        return header[:10] + struct.pack(">H", checksum(header)) + header[12:] + payload
    return struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64) + source + to + payload


class Injector:
    """Raw sockets of the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        self._v4 = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._v6: socket.socket | None = None
        try:
            self._v6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
        except OSError:
            pass  # a host without IPv6

    def deliver(self, packet: bytes, to: bytes) -> None:
        """Send; `to` is the raw address that the packet is for. Raises OSError."""
        if packet[0] >> 4 == 4:
            self._v4.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))
        elif self._v6 is not None:
            scope = addresses.unpack(to)[3]
            self._v6.sendto(packet, (socket.inet_ntop(socket.AF_INET6, packet[24:40]), 0, 0, scope))

    def close(self) -> None:
        self._v4.close()
        if self._v6 is not None:
            self._v6.close()
