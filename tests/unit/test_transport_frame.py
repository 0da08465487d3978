"""The frame codec: every frame both ways, and nothing but `TransportError` for hostile bytes."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import TransportError
from transport.frame import (
    MAX_BLOCK,
    MAX_CONTROL,
    MAX_PACKETS,
    MIN_WINDOW,
    Block,
    Channel,
    Frame,
    FrameParser,
    PingFlags,
    StreamFlags,
    decode_block,
    decode_packets,
    decode_u64,
    encode_block,
    encode_end,
    encode_frame,
    encode_packets,
    encode_preface,
    encode_u64,
)

PREFACE = encode_preface(MIN_WINDOW)

# What is sent, as bytes written by hand, and what the receiver makes of it.
FRAMES = [
    (encode_frame(Channel.CONTROL, b"hello"), b"\0\0\0\0\5\0\0\0hello", Frame(0, 0, b"hello")),
    (encode_frame(Channel.CONTROL, b""), b"\0\0\0\0\0\0\0\0", Frame(0, 0, b"")),
    (
        encode_block(7, 3, b"abc", compressed=False),
        b"\1\0\0\0\x0f\0\0\0" + struct.pack("<QI", 7, 3) + b"abc",
        Frame(1, 0, struct.pack("<QI", 7, 3) + b"abc"),
    ),
    (
        encode_block(8, 9, b"ab", compressed=True),
        b"\1\1\0\0\x0e\0\0\0" + struct.pack("<QI", 8, 9) + b"ab",
        Frame(1, StreamFlags.COMPRESSED, struct.pack("<QI", 8, 9) + b"ab"),
    ),
    (
        encode_end(9),
        b"\1\2\0\0\x0c\0\0\0" + struct.pack("<QI", 9, 0),
        Frame(1, StreamFlags.END, struct.pack("<QI", 9, 0)),
    ),
    (
        encode_u64(Channel.CREDIT, 4096),
        b"\2\0\0\0\x08\0\0\0" + (4096).to_bytes(8, "little"),
        Frame(2, 0, (4096).to_bytes(8, "little")),
    ),
    (
        encode_u64(Channel.PING, 5, PingFlags.PONG),
        b"\3\1\0\0\x08\0\0\0" + (5).to_bytes(8, "little"),
        Frame(3, PingFlags.PONG, (5).to_bytes(8, "little")),
    ),
    (
        encode_packets([b"E\0", b""])[0],
        b"\4\0\0\0\x0a\0\0\0\2\0\0\0E\0\0\0\0\0",
        Frame(4, 0, b"\2\0\0\0E\0\0\0\0\0"),
    ),
]
ALL = PREFACE + b"".join(encoded for encoded, _, _ in FRAMES)
ALL_FRAMES = [frame for _, _, frame in FRAMES]


@pytest.mark.parametrize(("encoded", "wire", "frame"), FRAMES)
def test_a_frame_is_these_bytes_and_these_bytes_are_the_frame(encoded: bytes, wire: bytes, frame: Frame) -> None:
    assert encoded == wire
    assert FrameParser().feed(PREFACE + wire) == [frame]


@given(cuts=st.lists(st.integers(0, len(ALL)), max_size=12))
def test_frames_come_out_the_same_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    parser = FrameParser()
    frames: list[Frame] = []
    edges = [0, *sorted(cuts), len(ALL)]
    for begin, end in itertools.pairwise(edges):
        frames += parser.feed(ALL[begin:end])
    assert frames == ALL_FRAMES
    assert parser.pending == 0


def test_one_byte_at_a_time_is_enough() -> None:
    parser = FrameParser()
    assert [frame for byte in ALL for frame in parser.feed(bytes([byte]))] == ALL_FRAMES


@pytest.mark.parametrize("cut", range(len(ALL)))
def test_a_truncated_stream_gives_whole_frames_only(cut: int) -> None:
    frames = FrameParser().feed(ALL[:cut])
    assert frames == ALL_FRAMES[: len(frames)]


@given(blob=st.binary(max_size=200))
def test_hostile_bytes_only_ever_raise_transport_errors(blob: bytes) -> None:
    for start in (b"", PREFACE):
        parser = FrameParser()
        try:
            for frame in parser.feed(start + blob):
                digest(frame)
        except TransportError:
            pass


@given(bit=st.integers(0, len(ALL) * 8 - 1))
def test_a_flipped_bit_only_ever_raises_transport_errors(bit: int) -> None:
    hostile = bytearray(ALL)
    hostile[bit // 8] ^= 1 << bit % 8
    parser = FrameParser()
    try:
        for frame in parser.feed(bytes(hostile)):
            digest(frame)
    except TransportError:
        pass


def digest(frame: Frame) -> None:
    """Decode a frame's payload as a link does."""
    if frame.channel == Channel.STREAM:
        block = decode_block(frame.flags, frame.payload)
        assert 0 <= block.raw_size <= MAX_BLOCK
    elif frame.channel == Channel.PACKETS:
        decode_packets(frame.payload)
    elif frame.channel in (Channel.CREDIT, Channel.PING):
        decode_u64(frame.payload)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ((5, 0, 0, 0), "unknown channel"),
        ((255, 0, 0, 8), "unknown channel"),
        ((Channel.CONTROL, 0, 0, MAX_CONTROL + 1), "allowed are"),
        ((Channel.CONTROL, 0, 0, 0xFFFFFFFF), "allowed are"),
        ((Channel.CONTROL, 1, 0, 0), "unknown flags"),
        ((Channel.CONTROL, 0, 1, 0), "unknown flags"),
        ((Channel.STREAM, 4, 0, 20), "unknown flags"),
        ((Channel.STREAM, 0, 0, 11), "allowed are"),
        ((Channel.STREAM, 0, 0, MAX_BLOCK + 13), "allowed are"),
        ((Channel.CREDIT, 0, 0, 7), "allowed are"),
        ((Channel.PING, 2, 0, 8), "unknown flags"),
        ((Channel.PACKETS, 0, 0, MAX_PACKETS + 1), "allowed are"),
    ],
)
def test_a_bad_header_is_refused_before_its_payload_arrives(header: tuple[int, int, int, int], why: str) -> None:
    with pytest.raises(TransportError, match=why):
        FrameParser().feed(PREFACE + struct.pack("<BBHI", *header))


@pytest.mark.parametrize("size", range(1, 8))
def test_what_is_no_preface_is_refused_at_its_first_wrong_byte(size: int) -> None:
    with pytest.raises(TransportError, match="does not speak"):
        FrameParser().feed(PREFACE[: size - 1] + b"!")


def test_garbage_before_the_preface_is_kept_for_the_message() -> None:
    parser = FrameParser()
    with pytest.raises(TransportError):
        parser.feed(b"Welcome to Debian\n")
    assert parser.garbage == b"Welcome to Debian\n"


@pytest.mark.parametrize(
    ("preface", "why"),
    [
        (struct.pack("<8sHHI", b"migrator", 2, 0, MIN_WINDOW), "version 2"),
        (struct.pack("<8sHHI", b"migrator", 1, 0, 0), "window of 0"),
        (struct.pack("<8sHHI", b"migrator", 1, 0, 0xFFFFFFFF), "window of"),
    ],
)
def test_a_preface_we_cannot_work_with_is_refused(preface: bytes, why: str) -> None:
    with pytest.raises(TransportError, match=why):
        FrameParser().feed(preface)


@pytest.mark.parametrize(
    ("flags", "payload"),
    [
        (0, b""),
        (0, struct.pack("<QI", 0, 0)),
        (0, struct.pack("<QI", 0, 1)),
        (0, struct.pack("<QI", 0, 2) + b"a"),
        (0, struct.pack("<QI", 0, 1) + b"ab"),
        (StreamFlags.COMPRESSED, struct.pack("<QI", 0, MAX_BLOCK + 1) + b"a"),
        (StreamFlags.COMPRESSED, struct.pack("<QI", 0, 5)),
        (StreamFlags.END, struct.pack("<QI", 0, 1) + b"a"),
        (StreamFlags.END | StreamFlags.COMPRESSED, struct.pack("<QI", 0, 0)),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(flags: int, payload: bytes) -> None:
    with pytest.raises(TransportError):
        decode_block(flags, payload)


def test_blocks_carry_their_sequence_and_size() -> None:
    payload = encode_block(2**40, 3, b"xyz", compressed=False)[8:]
    assert decode_block(0, payload) == Block(2**40, 3, False, False, b"xyz")


@given(packets=st.lists(st.binary(max_size=70), max_size=20))
def test_packets_keep_their_borders_and_order(packets: list[bytes]) -> None:
    frames = FrameParser().feed(PREFACE + b"".join(encode_packets(packets)))
    assert [packet for frame in frames for packet in decode_packets(frame.payload)] == packets


def test_many_packets_are_spread_over_frames() -> None:
    packets = [bytes([n]) * 60_000 for n in range(40)]
    encoded = encode_packets(packets)
    assert len(encoded) == 3
    frames = FrameParser().feed(PREFACE + b"".join(encoded))
    assert [packet for frame in frames for packet in decode_packets(frame.payload)] == packets


@pytest.mark.parametrize("payload", [b"\1", b"\1\0\0\0", b"\xff\xff\xff\xffab", b"\1\0\0\0ab"])
def test_cut_off_packets_are_refused(payload: bytes) -> None:
    with pytest.raises(TransportError):
        decode_packets(payload)


def test_a_message_too_large_is_refused_by_its_sender() -> None:
    with pytest.raises(TransportError, match="allowed are"):
        encode_frame(Channel.CONTROL, bytes(MAX_CONTROL + 1))
    with pytest.raises(TransportError, match="does not fit"):
        encode_packets([bytes(MAX_PACKETS)])
