"""Compressing stream blocks, at the level that link and cores deserve.

Big blocks are compressed on a small pool of threads (zstd drops the interpreter lock);
small ones at once, in the caller: during the freeze a flush must not wait for a thread.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import zstandard

from migrator.errors import TransportError
from transport.frame import MAX_BLOCK, Block, Buffer

INLINE = 64 << 10  # bytes up to which a block is compressed in the caller
TINY = 256  # bytes below which compression never pays
OFF = 0
LEVELS: Sequence[int] = (OFF, -5, -1, 1, 3, 6, 9)
START = -1
WORKERS = max(1, min(2, (os.cpu_count() or 1) - 1))  # one core is for the rest of us
PROBE = 16
FAST = 500e6  # bytes/s to assume of a link not yet measured
STRETCH = 24 << 20  # bytes of stream over which a contest measures, once
SETTLE = 8 << 20  # bytes, a whole window, have gone by in the same way
APART = 512 << 20  # bytes from one contest to the next
_PAUSE = 0.05  # seconds without a block: what is measured then is who makes them
_EASY = 5.0  # times as fast as the link: compressing then costs next to nothing
_USELESS = 0.97  # of its size: a block that shrinks less than this goes raw


class Packed(NamedTuple):
    """A block ready for the wire. `seconds` is the time that compressing it took."""

    raw_size: int
    data: bytes
    compressed: bool
    level: int
    seconds: float


@dataclass(slots=True)
class CompressionStats:
    """Bytes before (`raw`) and after (`wire`) compression, and the time of all threads together."""

    blocks: int = 0
    raw: int = 0
    wire: int = 0
    seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """Raw bytes per byte on the wire; 1.0 where nothing was sent."""
        return self.raw / self.wire if self.wire else 1.0


@dataclass(slots=True)
class _Record:
    speed: float  # raw bytes/s of one thread
    ratio: float  # wire bytes per raw byte


class LevelChooser:
    """Which level sends a byte in the least time, from what the last blocks did.

    Compressing and sending go on side by side, so the slower one counts in full; the faster one
    still counts in part, because both share the cores. Levels never tried are guessed from the
    nearest one that was, so that the choice moves step by step and corrects itself. While the
    choice is "off", every `PROBE`th block is compressed all the same: data changes.
    Pure: it is told all it knows.
    """

    def __init__(self, levels: Sequence[int] = LEVELS, workers: int = WORKERS, start: int = START) -> None:
        self._levels = list(levels)
        self._workers = workers
        self._start = start
        self._known: dict[int, _Record] = {}
        self._off = 0  # blocks since the last one that was compressed
        self.level = start

    def record(self, packed: Packed) -> None:
        if packed.level == OFF or packed.raw_size < 4096:
            return
        ratio = len(packed.data) / packed.raw_size
        speed = packed.raw_size / max(packed.seconds, 1e-6)
        known = self._known.get(packed.level)
        if known is None:
            self._known[packed.level] = _Record(speed, ratio)
        else:
            known.speed += 0.2 * (speed - known.speed)
            known.ratio += 0.2 * (ratio - known.ratio)

    def choose(self, link_rate: float) -> int:
        """The level for the next block. `link_rate` is in wire bytes/s, 0.0 if not known."""
        if self._known:
            link_rate = link_rate or FAST
            best = min(self._levels, key=lambda level: self._cost(level, link_rate))
            # Ten percent of hysteresis: guesses are not worth moving for less. Off is no guess.
            if best == OFF or self._cost(best, link_rate) < 0.9 * self._cost(self.level, link_rate):
                self.level = self._towards(best)
        self._off = self._off + 1 if self.level == OFF else 0
        return self._start if self._off and self._off % PROBE == 0 else self.level

    def in_doubt(self, link_rate: float) -> bool:
        """Whether it compresses, and that takes so much of the cores that it may do more harm than good."""
        known = self._known.get(self.level)
        return known is not None and known.speed * self._workers < _EASY * (link_rate or FAST)

    def _cost(self, level: int, link_rate: float) -> float:
        """Seconds per raw byte."""
        if level == OFF:
            return 1 / link_rate
        record = self._known.get(level) or self._guess(level)
        compressing = 1 / (record.speed * self._workers)
        sending = record.ratio / link_rate
        return max(compressing, sending) + 0.3 * min(compressing, sending)

    def _guess(self, level: int) -> _Record:
        at = self._levels.index(level)
        near = min(self._known, key=lambda known: abs(self._levels.index(known) - at))
        steps = at - self._levels.index(near)
        known = self._known[near]
        return _Record(known.speed * 0.6**steps, known.ratio ** (1.1**steps))

    def _towards(self, best: int) -> int:
        if best == OFF:
            return OFF
        at, to = self._levels.index(self.level), self._levels.index(best)
        return self._levels[at + (to > at) - (to < at)]


class Contest:
    """Whether to compress at all, by what comes of it: bytes of the stream per second, with and without, in turns.

    Where our own cores are what limits a link, its measured rate says nothing about what it would be if they
    had less to do. Pure: it is told all it knows, sizes in bytes and times in seconds.
    """

    def __init__(self) -> None:
        self._off = False  # the side whose turn it is or, between contests, the winner
        self._left = 0  # bytes until the next contest
        self._bytes = 0  # of this turn
        self._since = 0.0
        self._from = 0
        self._last = 0.0
        self._compressed = 0.0  # bytes/s

    def off(self, size: int, now: float) -> bool:
        """Whether the next block, which is of `size` bytes, is to go as it is."""
        paused, self._last = now - self._last > _PAUSE, now
        if self._left > 0:
            self._left -= size
            if self._left <= 0:
                self._begin(off=False)
            return self._off
        if paused:
            self._begin(off=False)
        if self._bytes < SETTLE:
            self._since, self._from = now, self._bytes
        elif self._bytes - self._from >= STRETCH:
            rate = (self._bytes - self._from) / max(now - self._since, 1e-6)
            if self._off:
                self._off, self._left = rate > self._compressed, APART
            else:
                self._compressed = rate
                self._begin(off=True)
        self._bytes += size
        return self._off

    def _begin(self, *, off: bool) -> None:
        self._off, self._bytes = off, 0


class BlockCompressor:
    """Compresses the blocks of one stream and keeps the score.

    `level` fixes the level; None lets a `LevelChooser` decide block by block and, where the link is about as
    fast as compressing, a `Contest`.
    """

    def __init__(self, level: int | None = None) -> None:
        self._fixed = level
        self._last = START if level is None else level
        self._chooser = LevelChooser()
        self._contest = Contest()
        self.stats = CompressionStats()

    @property
    def level(self) -> int:
        """Of the last block."""
        return self._last

    def start(self, raw: bytes, link_rate: float) -> Packed | asyncio.Future[Packed]:
        """Begin with one block: done at once if it is small, a future otherwise.

        Every result must be given to `finish()`.
        """
        level = self._last = self._fixed if self._fixed is not None else self._choose(len(raw), link_rate)
        if level == OFF or len(raw) < TINY:
            return Packed(len(raw), raw, False, OFF, 0.0)
        if len(raw) <= INLINE:
            return pack(raw, level)
        return asyncio.get_running_loop().run_in_executor(_pool(), pack, raw, level)

    def _choose(self, size: int, link_rate: float) -> int:
        level = self._chooser.choose(link_rate)
        if level != OFF and self._chooser.in_doubt(link_rate) and self._contest.off(size, time.monotonic()):
            return OFF
        return level

    def finish(self, packed: Packed) -> None:
        self._chooser.record(packed)
        self.stats.blocks += 1
        self.stats.raw += packed.raw_size
        self.stats.wire += len(packed.data)
        self.stats.seconds += packed.seconds


def pack(raw: bytes, level: int) -> Packed:
    """One block as a zstd frame, or raw where that is no gain. Thread-safe."""
    begin = time.thread_time()
    data = _compressor(level).compress(raw)
    seconds = time.thread_time() - begin
    if len(data) > len(raw) * _USELESS:
        return Packed(len(raw), raw, False, level, seconds)
    return Packed(len(raw), data, True, level, seconds)


def unpack(block: Block) -> Buffer:
    """The bytes of a block. Thread-safe.

    The zstd frame must declare the very size that the block header does, before anything is
    allocated for it. Raises `TransportError` for everything else.
    """
    if not block.compressed:
        return block.data
    if not 0 < block.raw_size <= MAX_BLOCK:
        raise TransportError(f"stream block claims {block.raw_size} bytes")
    try:
        if zstandard.frame_content_size(block.data) != block.raw_size:
            raise TransportError("stream block whose two sizes differ")
        raw = _decompressor().decompress(block.data, max_output_size=block.raw_size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise TransportError(f"stream block {block.sequence} cannot be decompressed: {error}") from None
    if len(raw) != block.raw_size:
        raise TransportError(f"stream block {block.sequence} has {len(raw)} bytes, not {block.raw_size}")
    return raw


async def unpack_async(block: Block) -> Buffer:
    """As `unpack`, off the event loop where it takes long."""
    if not block.compressed or block.raw_size <= INLINE:
        return unpack(block)
    return await asyncio.get_running_loop().run_in_executor(_pool(), unpack, block)


_local = threading.local()
_executor: ThreadPoolExecutor | None = None


def _pool() -> ThreadPoolExecutor:
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="zstd")
    return _executor


def _compressor(level: int) -> zstandard.ZstdCompressor:
    # Contexts are costly to make and not thread-safe: one per thread and level.
    contexts: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in contexts:
        contexts[level] = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
    return contexts[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    context: zstandard.ZstdDecompressor = _local.decompressor
    return context
