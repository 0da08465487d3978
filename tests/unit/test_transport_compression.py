"""Block compression: what goes in comes out, hostile blocks do not, and the level fits the link."""

from __future__ import annotations

import os
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import TransportError
from transport.compression import (
    APART,
    INLINE,
    LEVELS,
    OFF,
    PROBE,
    START,
    STRETCH,
    BlockCompressor,
    Contest,
    LevelChooser,
    Packed,
    pack,
    unpack,
    unpack_async,
)
from transport.frame import MAX_BLOCK, Block

TEXT = b"the quick brown fox jumps over the lazy dog " * 2000


def block(packed: Packed) -> Block:
    return Block(0, packed.raw_size, packed.compressed, False, packed.data)


@given(raw=st.binary(min_size=1, max_size=5000), level=st.sampled_from([n for n in LEVELS if n != OFF]))
def test_a_block_survives_compression(raw: bytes, level: int) -> None:
    assert unpack(block(pack(raw, level))) == raw


def test_what_does_not_shrink_goes_raw() -> None:
    packed = pack(os.urandom(100_000), 1)
    assert not packed.compressed
    assert len(packed.data) == packed.raw_size == 100_000


@given(blob=st.binary(max_size=300), raw_size=st.integers(1, MAX_BLOCK))
def test_hostile_blocks_only_ever_raise_transport_errors(blob: bytes, raw_size: int) -> None:
    with pytest.raises(TransportError):
        unpack(Block(0, raw_size, True, False, blob))


@given(bit=st.integers(0, len(pack(TEXT, 3).data) * 8 - 1))
def test_a_flipped_bit_never_changes_the_size_of_a_block(bit: int) -> None:
    hostile = bytearray(pack(TEXT, 3).data)
    hostile[bit // 8] ^= 1 << bit % 8
    try:
        assert len(unpack(Block(0, len(TEXT), True, False, bytes(hostile)))) == len(TEXT)
    except TransportError:
        pass


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.compress(bytes(64 << 20))
    with pytest.raises(TransportError, match="sizes differ"):
        unpack(Block(0, 4096, True, False, bomb))
    with pytest.raises(TransportError, match="claims"):
        unpack(Block(0, 64 << 20, True, False, bomb))


def test_a_frame_that_hides_its_size_is_refused() -> None:
    shy = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)
    with pytest.raises(TransportError):
        unpack(Block(0, len(TEXT), True, False, shy))


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    frame = bytearray(pack(bytes(range(256)) * 4, 1).data)
    at = frame.index(struct.pack("<H", 1024 - 256))  # as RFC 8878, 3.1.1.1.4 stores it
    frame[at : at + 2] = struct.pack("<H", 2048 - 256)
    with pytest.raises(TransportError):
        unpack(Block(0, 2048, True, False, bytes(frame)))


def test_bytes_after_the_frame_are_refused() -> None:
    with pytest.raises(TransportError):
        unpack(Block(0, len(TEXT), True, False, pack(TEXT, 1).data + b"more"))


async def test_small_blocks_are_done_at_once_and_large_ones_elsewhere() -> None:
    compressor = BlockCompressor(level=1)
    small = compressor.start(TEXT[:INLINE], 0.0)
    assert isinstance(small, Packed)
    large = compressor.start(TEXT, 0.0)
    assert not isinstance(large, Packed)
    packed = await large
    assert await unpack_async(block(packed)) == TEXT
    compressor.finish(small)
    compressor.finish(packed)
    assert compressor.stats.blocks == 2
    assert compressor.stats.raw == INLINE + len(TEXT)
    assert compressor.stats.ratio > 10


async def test_level_zero_never_compresses() -> None:
    started = BlockCompressor(level=0).start(TEXT, 1.0)
    assert isinstance(started, Packed)
    assert started.data is TEXT


def settle(link_rate: float, ratio: float, *, blocks: int = 400) -> int:
    """Where a chooser ends up; each level costs 1.6 times the one before and saves a little more."""
    chooser = LevelChooser(workers=1)
    for _ in range(blocks):
        level = chooser.choose(link_rate)
        if level != OFF:
            steps = LEVELS.index(level) - 1
            wire = int(100_000 * ratio ** (1 + 0.08 * steps))
            chooser.record(Packed(100_000, bytes(wire), ratio < 1, level, 100_000 / (600e6 / 1.6**steps)))
    return chooser.level


def test_nothing_is_compressed_for_a_very_fast_link() -> None:
    assert settle(5e9, 0.3) == OFF


def test_a_slow_link_gets_a_high_level() -> None:
    assert settle(2e6, 0.4) >= 6


def test_a_faster_link_never_gets_a_higher_level() -> None:
    levels = [LEVELS.index(settle(rate, 0.4)) for rate in (1e6, 1e7, 1e8, 1e9, 1e10)]
    assert levels == sorted(levels, reverse=True)


@pytest.mark.parametrize("rate", [1e6, 1e8, 1e10])
def test_what_does_not_shrink_is_soon_left_alone(rate: float) -> None:
    assert settle(rate, 1.0) == OFF


def test_data_that_begins_to_shrink_is_noticed() -> None:
    chooser = LevelChooser(workers=1)
    for _ in range(50):
        if level := chooser.choose(1e7):
            chooser.record(Packed(100_000, bytes(100_000), False, level, 0.0001))
    assert chooser.level == OFF
    for _ in range(40 * PROBE):
        if level := chooser.choose(1e7):
            chooser.record(Packed(100_000, bytes(10_000), True, level, 0.0002))
    assert chooser.level != OFF


def contest(compressed: float, as_is: float, *, total: int = 400 << 20, pause: float = 0.0) -> float:
    """Of the last half of `total` bytes the part that goes as it is, at these rates in bytes/s."""
    judge, now, whole, late, size = Contest(), 0.0, 0, 0, 256 << 10
    for _ in range(total // size):
        off = judge.off(size, now)
        now += size / (as_is if off else compressed) + pause
        whole += size
        late += size if off and whole > total // 2 else 0
    return late / (total / 2)


def test_a_contest_is_won_by_what_sends_more_of_the_stream() -> None:
    assert contest(200e6, 300e6) == 1.0
    assert contest(300e6, 200e6) == 0.0


def test_little_data_and_data_that_comes_in_drops_have_no_contest() -> None:
    assert contest(200e6, 300e6, total=30 << 20) == 0.0
    assert contest(200e6, 300e6, pause=0.1) == 0.0


def test_a_contest_is_held_again() -> None:
    judge, now, seen = Contest(), 0.0, []
    for block in range(3 * APART // STRETCH * 96):
        off = judge.off(STRETCH // 96, now)
        seen.append(off)
        better = block < APART // STRETCH * 96  # sending as it is, at first
        now += STRETCH / 96 / (300e6 if off == better else 200e6)
    assert seen[APART // STRETCH * 48] and not seen[-1]


async def test_what_a_contest_decides_is_done() -> None:
    compressor = BlockCompressor()
    compressor.finish(Packed(100_000, bytes(50_000), True, START, 100_000 / 300e6))
    compressor._contest.off = lambda size, now: True  # type: ignore[method-assign]
    assert isinstance(compressor.start(TEXT, 100e6), Packed) and compressor.level == OFF
    compressor._contest.off = lambda size, now: False  # type: ignore[method-assign]
    compressor.start(TEXT, 100e6)
    assert compressor.level != OFF
    compressor._contest.off = lambda size, now: True  # type: ignore[method-assign]
    compressor.start(TEXT, 1e6)  # so slow a link leaves no doubt
    assert compressor.level != OFF


def test_before_anything_is_known_a_cheap_level_is_tried() -> None:
    assert LevelChooser().choose(0.0) == START
