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
from transport.frame import MAX_BLOCK, Block

INLINE = 64 << 10  # bytes up to which a block is compressed in the caller
TINY = 256  # bytes below which compression never pays
OFF = 0
LEVELS: Sequence[int] = (OFF, -5, -1, 1, 3, 6, 9)
START = -1
WORKERS = max(1, min(2, (os.cpu_count() or 1) - 1))  # one core is for the rest of us
PROBE = 16
FAST = 500e6  # bytes/s to assume of a link not yet measured
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


class BlockCompressor:
    """Compresses the blocks of one stream and keeps the score.

    `level` fixes the level; None lets a `LevelChooser` decide block by block.
    """

    def __init__(self, level: int | None = None) -> None:
        self._fixed = level
        self._chooser = LevelChooser()
        self.stats = CompressionStats()

    @property
    def level(self) -> int:
        return self._chooser.level if self._fixed is None else self._fixed

    def start(self, raw: bytes, link_rate: float) -> Packed | asyncio.Future[Packed]:
        """Begin with one block: done at once if it is small, a future otherwise.

        Every result must be given to `finish()`.
        """
        level = self._fixed if self._fixed is not None else self._chooser.choose(link_rate)
        if level == OFF or len(raw) < TINY:
            return Packed(len(raw), raw, False, OFF, 0.0)
        if len(raw) <= INLINE:
            return pack(raw, level)
        return asyncio.get_running_loop().run_in_executor(_pool(), pack, raw, level)

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


def unpack(block: Block) -> bytes:
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


async def unpack_async(block: Block) -> bytes:
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
