"""A hostile peer: lengths that lie, bombs, numbers out of order, floods. Memory and work stay bounded."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import TransportError
from transport.compression import unpack
from transport.frame import (
    BLOCK_HEADER,
    CHARGE,
    MAX_BLOCK,
    MAX_CONTROL,
    MIN_WINDOW,
    Channel,
    Frame,
    FrameParser,
    PingFlags,
    StreamFlags,
    decode_block,
    decode_packets,
    encode_block,
    encode_end,
    encode_frame,
    encode_packets,
    encode_preface,
    encode_u64,
)
from transport.inbox import INBOX
from transport.link import Link
from transport.stream_receiver import MOST_ENDS
from transport.wire import link_socket

PREFACE = encode_preface(MIN_WINDOW)
READ_AT_ONCE = 256 << 10  # bytes, by asyncio
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))

# A zstd frame by hand (RFC 8878): one that declares what it likes.
MAGIC = struct.pack("<I", 0xFD2FB528)
WINDOW_2_GIB = bytes([21 << 3])
ONE_SEGMENT = 0x20


def zstd_frame(declared: int, body: bytes, *, window: bytes = WINDOW_2_GIB) -> bytes:
    """`declared` in four bytes; the window is 2 GiB if nothing else is given."""
    return MAGIC + bytes([0x80 | (0 if window else ONE_SEGMENT)]) + window + struct.pack("<I", declared) + body


def run(length: int, *, last: bool) -> bytes:
    """A block of `length` times the same byte, in four bytes."""
    return struct.pack("<I", length << 3 | 1 << 1 | last)[:3] + b"a"


def runs(total: int) -> bytes:
    lengths = [1 << 17] * (total >> 17)
    return b"".join(run(length, last=at == len(lengths) - 1) for at, length in enumerate(lengths))


def block(data: bytes, raw_size: int) -> bytes:
    return encode_frame(Channel.STREAM, BLOCK_HEADER.pack(0, raw_size) + data, StreamFlags.COMPRESSED)


BOMBS = {
    "more than it declares": (zstd_frame(1 << 17, runs(MAX_BLOCK)), 1 << 17),
    "less than it declares": (zstd_frame(MAX_BLOCK, runs(1 << 17)), MAX_BLOCK),
    "a gigabyte": (zstd_frame(1 << 30, runs(1 << 30)), MAX_BLOCK),
    "a gigabyte that the block hides": (zstd_frame(MAX_BLOCK, runs(1 << 30)), MAX_BLOCK),
    "without an end": (zstd_frame(MAX_BLOCK, run(1 << 17, last=False) * 31), MAX_BLOCK),
    "of unknown size": (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20)), 1 << 20),
    "two frames": (zstandard.compress(bytes(1000)) * 2, 1000),
    "a frame and more": (zstandard.compress(bytes(1000)) + b"more", 1000),
    "a frame to be skipped": (struct.pack("<II", 0x184D2A50, 1000) + bytes(1000), 1000),
    "nothing": (b"\0", 1000),
    "another size": (zstandard.compress(bytes(1000)), 1001),
    "a dictionary": (
        zstandard.ZstdCompressor(dict_data=zstandard.ZstdCompressionDict(bytes(range(256)) * 9)).compress(
            bytes(range(256)) * 4
        )[:-8],
        1024,
    ),
    "zlib": (zlib.compress(bytes(1000)), 1000),
    "nothing at all": (zstd_frame(0, run(0, last=True)), 1),
}


@pytest.mark.parametrize(("data", "raw_size"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused(data: bytes, raw_size: int) -> None:
    if len(data) > MAX_BLOCK:
        with pytest.raises(TransportError, match="allowed are"):
            block(data, raw_size)
        data = data[:MAX_BLOCK]
    decoded = decode_block(StreamFlags.COMPRESSED, BLOCK_HEADER.pack(0, raw_size) + data)
    with pytest.raises(TransportError):
        unpack(decoded)


def test_a_block_of_the_largest_size_may_be_as_dense_as_it_likes() -> None:
    dense = zstd_frame(MAX_BLOCK, runs(MAX_BLOCK), window=b"")
    assert len(dense) < 200
    assert unpack(decode_block(StreamFlags.COMPRESSED, BLOCK_HEADER.pack(0, MAX_BLOCK) + dense)) == b"a" * MAX_BLOCK


LIMITED = """
import random, resource, sys
from migrator.errors import TransportError
from transport.compression import unpack
from transport.frame import BLOCK_HEADER, FrameParser, StreamFlags, decode_block
from tests.unit.test_transport_hostile import BOMBS, lying_frames

with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + (48 << 20),) * 2)
refused = 0
for _ in range(20):
    for data, raw_size in BOMBS.values():
        try:
            unpack(decode_block(StreamFlags.COMPRESSED, BLOCK_HEADER.pack(0, raw_size) + data))
        except TransportError:
            refused += 1
parsers = []
for start in lying_frames():
    parser = FrameParser()
    parsers.append(parser)  # what they hold is held together
    try:
        parser.feed(start)
    except TransportError:
        refused += 1
assert sum(parser.pending for parser in parsers) < 1 << 20
print(refused)
"""


def lying_frames() -> Iterator[bytes]:
    """Frames that claim anything and send little of it."""
    lengths = [0, 1, 7, 12, MAX_CONTROL, MAX_CONTROL + 1, MAX_BLOCK + 12, MAX_BLOCK + 13, 2**31, 2**32 - 1]
    for channel, flags, length in itertools.product(range(7), (0, 1, 2, 255), lengths):
        yield PREFACE + struct.pack("<BBHI", channel, flags, 0, length) + bytes(min(length, 100))


def test_all_bombs_and_lying_lengths_fit_into_48_mib_of_address_space() -> None:
    child = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    lying = sum(1 for _ in lying_frames())
    assert int(child.stdout) >= 20 * len(BOMBS) + lying // 2


def test_a_frame_in_small_pieces_is_held_once() -> None:
    parser = FrameParser()
    frame = encode_block(0, MAX_BLOCK, bytes(MAX_BLOCK), compressed=False)
    parser.feed(PREFACE)
    for at in range(0, len(frame) - 1, 4099):
        assert parser.feed(frame[at : min(at + 4099, len(frame) - 1)]) == []
        assert parser.pending <= len(frame)
    assert [len(found.payload) for found in parser.feed(frame[-1:])] == [MAX_BLOCK + BLOCK_HEADER.size]
    assert parser.pending == 0


# Floods, against a whole link


async def _against(*pieces: bytes, repeat: int = 1) -> tuple[Link, socket.socket, asyncio.Task[None]]:
    """A link whose peer sends all that, and does not read."""
    left, right = socket.socketpair()
    link = await link_socket(left, "peer")

    def send() -> None:
        try:
            right.sendall(PREFACE)
            for _ in range(repeat):
                for piece in pieces:
                    right.sendall(piece)
        except OSError:
            pass

    return link, right, asyncio.create_task(asyncio.to_thread(send))


async def _ended(link: Link, right: socket.socket, sending: asyncio.Task[None]) -> None:
    await link.close()
    right.close()
    await sending


@pytest.mark.parametrize(
    "numbers",
    [[1], [0, 0], [0, 2], [0, 1, 0], [0, 1, 3], [2**64 - 1], [0, 2**63]],
    ids=lambda numbers: " ".join(map(str, numbers)),
)
async def test_blocks_out_of_order_end_the_link(numbers: list[int]) -> None:
    blocks = b"".join(encode_block(number, 1, b"a", compressed=False) for number in numbers)
    attack = await _against(blocks)
    link = attack[0]
    with pytest.raises(TransportError, match=f"block {numbers[-1]} came where {len(numbers) - 1} was due"):
        await link.receive(20)
    await _ended(*attack)


async def test_the_end_of_a_stream_has_its_number_too() -> None:
    attack = await _against(encode_block(0, 1, b"a", compressed=False), encode_end(0))
    link = attack[0]
    with pytest.raises(TransportError, match="block 0 came where 1 was due"):
        await link.receive(20)
    await _ended(*attack)


async def test_ends_of_streams_that_nobody_reads_are_not_hoarded() -> None:
    attack = await _against(b"".join(encode_end(number) for number in range(2 * MOST_ENDS)))
    link = attack[0]
    with pytest.raises(TransportError, match=f"{MOST_ENDS + 1} streams ended before the first"):
        await link.receive(20)
    await _ended(*attack)


async def test_an_end_that_was_read_makes_room_for_another() -> None:
    link, right, sending = await _against(b"".join(encode_end(number) for number in range(MOST_ENDS)))
    await link.established()
    for number in range(MOST_ENDS, 3 * MOST_ENDS):
        assert await link.pump_out(os.open("/dev/null", os.O_WRONLY)) == 0
        right.sendall(encode_end(number))
    assert link.alive
    await _ended(link, right, sending)


@pytest.mark.parametrize("size", [1, 100, 70_000])
async def test_no_more_than_the_window_is_taken_however_small_the_blocks(size: int) -> None:
    count = itertools.count()
    data = bytes(size)
    flood = (encode_block(next(count), size, data, compressed=False) for _ in range((16 << 20) // (size + CHARGE)))
    attack = await _against(b"".join(flood))
    link = attack[0]
    with pytest.raises(TransportError, match="sent more than the"):
        await link.receive(60)
    await _ended(*attack)


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(Channel.CONTROL, b""),
        encode_frame(Channel.CONTROL, b"x" * 1000),
        encode_frame(Channel.PACKETS, b""),
        encode_packets([b""] * 1000)[0],
        encode_packets([b"ab"] * 170_000)[0],
    ],
    ids=["empty messages", "messages", "frames without packets", "empty packets", "tiny packets"],
)
async def test_what_nobody_receives_is_not_read(frame: bytes) -> None:
    attack = await _against(frame * (1 + (1 << 20) // len(frame)), repeat=64)
    link = attack[0]
    await link.established()
    last = -1
    while link.counters.wire_received != last:
        last = link.counters.wire_received
        await asyncio.sleep(0.1)
    # Each message and packet is charged besides its bytes; what was read at once may come on top.
    assert last <= INBOX + READ_AT_ONCE
    assert link.counters.messages_received * CHARGE <= INBOX + READ_AT_ONCE // 8 * CHARGE
    assert link.counters.packets_received * 4 <= max(2 << 20, INBOX * 4 // CHARGE + READ_AT_ONCE)
    assert link.alive
    await _ended(*attack)


async def test_an_answer_to_a_ping_that_was_not_sent_ends_the_link() -> None:
    attack = await _against(encode_u64(Channel.PING, time.monotonic_ns() - 10**9, PingFlags.PONG))
    link = attack[0]
    with pytest.raises(TransportError, match="never sent"):
        await link.receive(20)
    await _ended(*attack)


async def test_the_same_answer_twice_ends_the_link() -> None:
    left, right = socket.socketpair()
    link = await link_socket(left, "peer")
    right.sendall(PREFACE)
    await link.established()
    parser = FrameParser()
    frames: list[Frame] = []
    while not frames:
        frames = parser.feed(await asyncio.to_thread(right.recv, 4096))
    right.sendall(encode_frame(Channel.PING, frames[0].payload, PingFlags.PONG) * 2)
    with pytest.raises(TransportError, match="never sent"):
        await link.receive(20)
    assert link.rtt > 0
    await link.close()
    right.close()


async def test_a_peer_that_writes_on_and_reads_nothing_does_not_hold_up_the_loop() -> None:
    link, right, sending = await _against(encode_frame(Channel.CONTROL, bytes(1 << 20)), repeat=256)
    await link.established()
    right.shutdown(socket.SHUT_RD)
    with pytest.raises(TransportError):
        for _ in range(1000):
            await link.send(bytes(1000))
            await asyncio.sleep(0.001)
    await _ended(link, right, sending)


# Bytes of any kind


def _good_frames(random_: random.Random) -> bytes:
    """A conversation that a peer might have."""
    count = itertools.count()
    parts = [PREFACE]
    for _ in range(random_.randrange(1, 12)):
        data = random_.randbytes(random_.choice([1, 12, 300, 5000]))
        kind = random_.randrange(6)
        if kind == 0:
            parts.append(encode_frame(Channel.CONTROL, data))
        elif kind == 1:
            parts.append(encode_block(next(count), len(data), data, compressed=False))
        elif kind == 2:
            raw = data * 50
            parts.append(encode_block(next(count), len(raw), zstandard.compress(raw), compressed=True))
        elif kind == 3:
            parts += encode_packets([data, b"", data[:3]])
        elif kind == 4:
            parts.append(encode_u64(random_.choice([Channel.PING, Channel.CREDIT]), random_.randrange(1 << 20)))
        else:
            parts.append(encode_end(next(count)))
    return b"".join(parts)


def _mutated(random_: random.Random, data: bytes) -> bytes:
    hostile = bytearray(data)
    for _ in range(random_.randrange(0, 6)):
        at = random_.randrange(len(hostile))
        what = random_.randrange(5)
        if what == 0:
            hostile[at] ^= 1 << random_.randrange(8)
        elif what == 1:
            hostile[at : at + 4] = random_.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", random_.randbytes(4)])
        elif what == 2:
            del hostile[at : at + random_.randrange(1, 30)]
        elif what == 3:
            hostile[at:at] = random_.randbytes(random_.randrange(1, 30))
        else:
            other = random_.randrange(len(hostile))
            hostile[at:at] = hostile[other : other + random_.randrange(1, 200)]
        if not hostile:
            break
    return bytes(hostile)


def _take(data: bytes, random_: random.Random) -> None:
    """Decode as a link does, cut anywhere."""
    parser = FrameParser()
    at = 0
    while at < len(data):
        size = random_.choice([1, 7, 100, 4096, len(data)])
        piece = data[at : at + size]
        at += size
        for frame in parser.feed(piece):
            if frame.channel == Channel.STREAM:
                found = decode_block(frame.flags, frame.payload)
                if not found.end:
                    assert len(unpack(found)) == found.raw_size <= MAX_BLOCK
            elif frame.channel == Channel.PACKETS:
                assert sum(map(len, decode_packets(frame.payload))) <= len(frame.payload)
        assert parser.pending <= len(data)


def test_mutated_conversations_only_ever_raise_transport_errors() -> None:
    seed = random.randrange(1 << 32)
    end = time.monotonic() + FUZZ_SECONDS
    tried = refused = 0
    while time.monotonic() < end or not refused:
        random_ = random.Random(seed + tried)
        data = _mutated(random_, _good_frames(random_))
        tried += 1
        try:
            _take(data, random_)
        except TransportError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed + tried - 1}: {error!r}") from error
    assert 0 < refused < tried


async def test_a_link_survives_or_refuses_mutated_conversations() -> None:
    seed = random.randrange(1 << 32)
    end = time.monotonic() + FUZZ_SECONDS
    tried = 0
    while time.monotonic() < end or not tried:
        random_ = random.Random(seed + tried)
        data = _mutated(random_, _good_frames(random_))
        tried += 1
        left, right = socket.socketpair()
        link = await link_socket(left, "peer")
        right.sendall(data)
        right.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(60):
                with pytest.raises(TransportError):
                    await asyncio.gather(
                        link.pump_out(os.open("/dev/null", os.O_WRONLY)),
                        _receive_all(link),
                    )
        except BaseException as error:
            raise AssertionError(f"seed {seed + tried - 1}: {error!r}") from error
        await link.close()
        right.close()


async def _receive_all(link: Link) -> None:
    while True:
        await link.receive()


@given(st.binary(max_size=400), st.integers(1, MAX_BLOCK))
def test_any_bytes_as_a_compressed_block_are_refused_or_of_the_size_they_say(data: bytes, raw_size: int) -> None:
    try:
        found = unpack(decode_block(StreamFlags.COMPRESSED, BLOCK_HEADER.pack(0, raw_size) + data))
    except TransportError:
        return
    assert len(found) == raw_size
