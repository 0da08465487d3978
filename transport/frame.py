"""Frames on one duplex byte pipe: the codec, without I/O.

Each side first sends a preface, then frames:

    preface  {char magic[8], u16 version, u16 reserved, u32 window}
    frame    {u8 channel, u8 flags, u16 reserved, u32 length} payload[length]

All numbers are little-endian, as in the image stream. The peer is hostile until proven
otherwise: every field is checked as soon as it is complete, so that a parser never holds
more than one frame of the size its channel allows. What is not in the tables below is a
`TransportError`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

from migrator.errors import TransportError

VERSION = 1
MAGIC = b"migrator"

MAX_CONTROL = 1 << 20  # bytes of one control message
MAX_BLOCK = 4 << 20  # bytes of one stream block, before compression
MAX_PACKETS = 1 << 20  # bytes of one frame of captured packets, with their length fields
CHARGE = 256  # what a queued frame costs beside its payload: tiny ones must not be free
MIN_WINDOW = MAX_BLOCK + (1 << 20)  # so that one block of the largest size always fits
MAX_WINDOW = 64 << 20

PREFACE = struct.Struct("<8sHHI")
HEADER = struct.Struct("<BBHI")
BLOCK_HEADER = struct.Struct("<QI")  # sequence, size before compression
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")

Buffer = bytes | bytearray | memoryview


class Channel(enum.IntEnum):
    CONTROL = 0  # opaque messages of the session
    STREAM = 1  # blocks of the checkpoint stream
    CREDIT = 2  # u64: bytes of STREAM frames taken off the receiver's hands, CHARGE for each included
    PING = 3  # u64: a time stamp of the sender of the ping, sent back as it is
    PACKETS = 4  # captured network packets


class StreamFlags(enum.IntFlag):
    COMPRESSED = 1  # the block is one zstd frame that declares its content size
    END = 2  # end of the stream; the block is empty


class CreditFlags(enum.IntFlag):
    BACKLOG = 1  # the receiver has more of the stream than it could pass on yet


class PingFlags(enum.IntFlag):
    PONG = 1


# channel: (least length, greatest length, flags that may be set)
_RULES: dict[int, tuple[int, int, int]] = {
    Channel.CONTROL: (0, MAX_CONTROL, 0),
    Channel.STREAM: (BLOCK_HEADER.size, BLOCK_HEADER.size + MAX_BLOCK, 3),
    Channel.CREDIT: (8, 8, 1),
    Channel.PING: (8, 8, 1),
    Channel.PACKETS: (0, MAX_PACKETS, 0),
}


class Preface(NamedTuple):
    version: int
    window: int  # bytes of STREAM payload the other side may send before the first CREDIT


class Frame(NamedTuple):
    channel: int
    flags: int
    payload: bytes | bytearray


class Block(NamedTuple):
    """One piece of the stream. `sequence` counts blocks from 0 over the life of the link."""

    sequence: int
    raw_size: int
    compressed: bool
    end: bool
    data: Buffer


def charge(size: int) -> int:
    """What a block of `size` wire bytes costs of the window, on both sides."""
    return BLOCK_HEADER.size + size + CHARGE


def encode_preface(window: int) -> bytes:
    return PREFACE.pack(MAGIC, VERSION, 0, window)


def encode_frame(channel: int, payload: Buffer, flags: int = 0) -> bytes:
    """One frame as bytes. Raises `TransportError` where the receiver would refuse it."""
    _check(channel, flags, 0, len(payload))
    return b"".join((HEADER.pack(channel, flags, 0, len(payload)), payload))


def encode_block(sequence: int, raw_size: int, data: Buffer, *, compressed: bool) -> bytes:
    """A STREAM frame. `data` is the block itself, or one zstd frame of it."""
    flags = StreamFlags.COMPRESSED if compressed else 0
    length = BLOCK_HEADER.size + len(data)
    _check(Channel.STREAM, flags, 0, length)
    # One join, because blocks are large: no intermediate copy of the payload.
    return b"".join((HEADER.pack(Channel.STREAM, flags, 0, length), BLOCK_HEADER.pack(sequence, raw_size), data))


def encode_end(sequence: int) -> bytes:
    return encode_frame(Channel.STREAM, BLOCK_HEADER.pack(sequence, 0), StreamFlags.END)


def encode_u64(channel: int, value: int, flags: int = 0) -> bytes:
    """A CREDIT or PING frame."""
    return encode_frame(channel, _U64.pack(value), flags)


def decode_u64(payload: Buffer) -> int:
    value: int = _U64.unpack(payload)[0]
    return value


def decode_block(flags: int, payload: Buffer) -> Block:
    """Take a STREAM payload apart. The declared size is checked; decompression is the caller's."""
    if len(payload) < BLOCK_HEADER.size:
        raise TransportError("stream block shorter than its header")
    sequence, raw_size = BLOCK_HEADER.unpack_from(payload)
    data = memoryview(payload)[BLOCK_HEADER.size :]  # no copy: blocks are large
    compressed = bool(flags & StreamFlags.COMPRESSED)
    end = bool(flags & StreamFlags.END)
    if end:
        if compressed or raw_size or data:
            raise TransportError("end of stream with a block in it")
    elif not 0 < raw_size <= MAX_BLOCK:
        raise TransportError(f"stream block claims {raw_size} bytes")
    elif not data or (len(data) != raw_size and not compressed):
        raise TransportError(f"stream block claims {raw_size} bytes and has {len(data)}")
    return Block(sequence, raw_size, compressed, end, data)


def encode_packets(packets: Sequence[bytes]) -> list[bytes]:
    """PACKETS frames, in order, as few as fit: each packet is {u32 length, bytes}."""
    frames: list[bytes] = []
    parts: list[bytes] = []
    size = 0
    for packet in packets:
        if len(packet) + 4 > MAX_PACKETS:
            raise TransportError(f"a packet of {len(packet)} bytes does not fit into a frame")
        if size + 4 + len(packet) > MAX_PACKETS:
            frames.append(encode_frame(Channel.PACKETS, b"".join(parts)))
            parts, size = [], 0
        parts += (_U32.pack(len(packet)), packet)
        size += 4 + len(packet)
    if parts:
        frames.append(encode_frame(Channel.PACKETS, b"".join(parts)))
    return frames


def decode_packets(payload: Buffer) -> list[bytes]:
    packets: list[bytes] = []
    at = 0
    while at < len(payload):
        if len(payload) - at < 4:
            raise TransportError("captured packet without its length")
        (length,) = _U32.unpack_from(payload, at)
        at += 4
        if length > len(payload) - at:
            raise TransportError(f"captured packet of {length} bytes is cut off")
        packets.append(bytes(payload[at : at + length]))
        at += length
    return packets


class FrameParser:
    """Bytes in, frames out.

    The preface is kept in `preface` once it has arrived. After a `TransportError` the
    parser is of no more use: there is no way to find the next frame.
    """

    def __init__(self) -> None:
        self.preface: Preface | None = None
        self._head = bytearray()  # of a preface or header that is not complete yet
        self._open: tuple[int, int, int] | None = None  # channel, flags and length of a frame that is not complete yet
        self._payload = bytearray()  # and what there is of it

    def feed(self, data: bytes) -> list[Frame]:
        """The frames completed by `data`, which may be cut anywhere. Each byte is copied once."""
        frames: list[Frame] = []
        if self.preface is None:
            self._head += data
            if not self._take_preface():
                return frames
            data = bytes(self._head)
            self._head.clear()
        view = memoryview(data)
        at = 0
        while True:
            if self._open is None:
                at = self._take_header(data, at)
                if self._open is None:
                    return frames
            channel, flags, length = self._open
            missing = length - len(self._payload)
            if missing == length <= len(data) - at:
                frames.append(Frame(channel, flags, data[at : at + length]))
            else:
                self._payload += view[at : at + missing]
                if len(self._payload) < length:
                    return frames
                frames.append(Frame(channel, flags, self._payload))
                self._payload = bytearray()
            at += missing
            self._open = None

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._head) + len(self._payload) + (HEADER.size if self._open else 0)

    @property
    def garbage(self) -> bytes:
        """The beginning of what arrived instead of a preface; for the error message."""
        return bytes(self._head[:200]) if self.preface is None else b""

    def _take_header(self, data: bytes, at: int) -> int:
        """Open a frame, if its header is complete; where to go on."""
        if not self._head and len(data) - at >= HEADER.size:
            channel, flags, reserved, length = HEADER.unpack_from(data, at)
            at += HEADER.size
        else:
            piece = data[at : at + HEADER.size - len(self._head)]
            self._head += piece
            at += len(piece)
            if len(self._head) < HEADER.size:
                return at
            channel, flags, reserved, length = HEADER.unpack(self._head)
            self._head.clear()
        _check(channel, flags, reserved, length)
        self._open = channel, flags, length
        return at

    def _take_preface(self) -> bool:
        """Whether it is complete; then only what follows it is left."""
        have = bytes(self._head[: len(MAGIC)])
        if have != MAGIC[: len(have)]:
            raise TransportError(
                "the other end does not speak the migrator protocol",
                hint="the command must run migrator, and the login shell there must print nothing before it",
            )
        if len(self._head) < PREFACE.size:
            return False
        _, version, _, window = PREFACE.unpack_from(self._head)
        if version != VERSION:
            raise TransportError(
                f"the other end speaks protocol version {version}, this one {VERSION}",
                hint="install the same version of migrator on both hosts",
            )
        if not MIN_WINDOW <= window <= MAX_WINDOW:
            raise TransportError(f"the other end offers a window of {window} bytes")
        self.preface = Preface(version, window)
        del self._head[: PREFACE.size]
        return True


def _check(channel: int, flags: int, reserved: int, length: int) -> None:
    rule = _RULES.get(channel)
    if rule is None:
        raise TransportError(f"frame on unknown channel {channel}")
    least, greatest, allowed = rule
    if not least <= length <= greatest:
        raise TransportError(f"frame of {length} bytes on channel {channel}, allowed are {least}..{greatest}")
    if flags & ~allowed or reserved:
        raise TransportError(f"frame on channel {channel} with unknown flags {flags:#x}, {reserved:#x}")
