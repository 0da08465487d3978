"""Increments of checkpoints: what of an image is in none of those before it.

An image is a stream of records (docs/image-format.md), and nearly all of it is pages. It is cut where records begin and
where their pages do, so that what is equal to a part of an earlier image is found wherever it is now: most pages lie
where they lay, others by what they hold. No two parts are taken to be equal that were not compared byte by byte.

    MAGIC · u32 length of the header · header (JSON) · three zstd frames, each behind its length (u64):
    the parts of the image as (place, length), the lengths of the parts that are new, the new parts

A place is a number of bytes into the *room*: the whole image that the chain begins with, then what is new in each
increment, in their order, this one last. So an image is put together in one pass, whatever the length of its chain.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import mmap
import os
import struct
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

import msgspec
import zstandard

from migrator.errors import ImageError

MAGIC = b"migrator increment 1\n"
PAGE = 4096
_RECORD = struct.Struct("<ii")  # type, length with this
_BLOCK = 1 << 20
_MOST_HEADER = 1 << 20
_MOST_TABLE = 1 << 30
_LEVEL = 1


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """base:    the whole image that the chain begins with
    chain:   the increments between it and this one, the oldest first
    length:  of the image, in bytes; `digest` of it, BLAKE2b with 16 bytes
    new:     bytes of it that are in no earlier one
    """

    base: str
    length: int
    digest: str
    new: int
    chain: list[str] = msgspec.field(default_factory=list)


def read_header(path: Path) -> Header:
    """Raises ImageError, OSError."""
    with open(path, "rb") as file:
        return _header(file)


def whole(path: Path) -> int:
    """A descriptor of the image that an increment, with those beside it, makes. Raises ImageError, OSError."""
    with Room(path.parent, path.name) as room, _scratch(path.parent) as file:
        room.put_together(file)
        file.seek(0)
        return os.dup(file.fileno())


def _scratch(directory: Path) -> BinaryIO:
    """A file that nobody else sees: beside the images, where there is room for them, if that may be written."""
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(dir=directory))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return cast(BinaryIO, tempfile.TemporaryFile())


def _header(file: BinaryIO) -> Header:
    if file.read(len(MAGIC)) != MAGIC:
        raise ImageError(f"{file.name} is no increment of an image")
    size = int.from_bytes(file.read(4), "little")
    try:
        header = msgspec.json.decode(file.read(min(size, _MOST_HEADER)), type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ImageError(f"{file.name} is damaged: {error}") from None
    if any("/" in name or name.startswith(".") for name in (header.base, *header.chain)):
        raise ImageError(f"{file.name} is damaged: it names a file elsewhere")
    return header


class Room:
    """All bytes that an image and those before it hold. `name`: the newest, in `directory`; it and what it builds on
    are open while the block is."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self.name = name
        self._stack = contextlib.ExitStack()
        self._starts: list[int] = []
        self._data: list[mmap.mmap] = []
        self._lengths: list[array[int]] = []  # of the parts of each increment
        self.size = 0
        self.base = name
        self.chain: list[str] = []
        self._header: Header | None = None
        self._parts = array("Q")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._stack = stack
            if self.name.endswith(".increment"):
                self._header = read_header(self._directory / self.name)
                self.base, self.chain = self._header.base, [*self._header.chain, self.name]
            with open(self._directory / self.base, "rb") as file:
                self._add(file)
            for number, one in enumerate(self.chain):
                self._open(one, number)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _add(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        if size:
            self._starts.append(self.size)
            self._data.append(self._stack.enter_context(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)))
            self.size += size

    def _open(self, name: str, number: int) -> None:
        with open(self._directory / name, "rb") as file:
            header = _header(file)
            if (header.base, header.chain) != (self.base, self.chain[:number]):
                raise ImageError(f"{name} is damaged: it does not continue what is before it")
            try:
                parts, lengths = array("Q", _frame(file)), array("I", _frame(file))
                with _scratch(self._directory) as room:
                    size = _size(file)
                    unpacked = zstandard.ZstdDecompressor().copy_stream(cast(BinaryIO, _Limited(file, size)), room)[1]
                    room.flush()
                    if unpacked != header.new or sum(lengths) != unpacked or len(parts) % 2:
                        raise ImageError(f"{name} is damaged: its parts do not add up")
                    self._add(room)
            except (zstandard.ZstdError, ValueError) as error:
                raise ImageError(f"{name} is damaged: {error}") from None
        self._lengths.append(lengths)
        self._parts = parts

    def read(self, place: int, length: int) -> bytes:
        """So many bytes from there on, or b"" if they are not in one image."""
        number = bisect.bisect_right(self._starts, place) - 1
        if number < 0:
            return b""
        place -= self._starts[number]
        return self._data[number][place : place + length]

    def parts(self) -> Iterator[tuple[int, bytes]]:
        """All there are, each with its place."""
        for number, (start, data) in enumerate(zip(self._starts, self._data, strict=True)):
            cuts = cut(data) if number == 0 else _steps(self._lengths[number - 1])
            for offset, length in cuts:
                yield start + offset, data[offset : offset + length]

    def put_together(self, to: BinaryIO) -> None:
        """Write the image out. Raises ImageError if it is not what was saved."""
        header, digest, length = self._header, hashlib.blake2b(digest_size=16), 0
        assert header is not None
        for place, size in zip(self._parts[::2], self._parts[1::2], strict=True):
            while size:
                block = self.read(place, min(size, _BLOCK))
                if not block:
                    raise ImageError(f"{self.name} is damaged: it refers to what is not there")
                digest.update(block)
                to.write(block)
                length += len(block)
                place, size = place + len(block), size - len(block)
        if (length, digest.hexdigest()) != (header.length, header.digest):
            raise ImageError(f"{self.name} is damaged, or what it builds on is: it is not what was saved")
        to.flush()


class _Limited:
    """So many bytes of a file."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file, self._left = file, left

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size if size >= 0 else self._left, self._left))
        self._left -= len(data)
        return data


def _frame(file: BinaryIO) -> bytes:
    """Raises ValueError, ZstdError."""
    data = file.read(_size(file))
    if not 0 <= zstandard.frame_content_size(data) <= _MOST_TABLE:
        raise ValueError("a table without a size, or too large")
    return zstandard.ZstdDecompressor().decompress(data)


def _size(file: BinaryIO) -> int:
    """How many bytes follow, as is said here. Raises ValueError for more than there are."""
    size = int.from_bytes(file.read(8), "little")
    if size > os.fstat(file.fileno()).st_size - file.tell():
        raise ValueError("it is cut off")
    return size


def _steps(lengths: array[int]) -> Iterator[tuple[int, int]]:
    offset = 0
    for length in lengths:
        yield offset, length
        offset += length


def cut(image: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Where the parts of an image are: small records whole; of others the pages, which end them, and what is ahead."""
    place, size = 0, len(image)
    while place < size:
        length = _RECORD.unpack_from(image, place)[1] if place + _RECORD.size <= size else 0
        if not _RECORD.size <= length <= size - place:
            length = size - place  # an image that we do not understand: its end is one part
        ahead = length if length <= PAGE else length % PAGE
        if ahead:
            yield place, ahead
        for page in range(place + ahead, place + length, PAGE):
            yield page, PAGE
        place += length


class _Index:
    """Finds parts by what they hold. 32 bytes for each part: a page of 4 KiB costs less than a hundredth of itself."""

    def __init__(self, room: Room) -> None:
        self._room = room
        count = room.size // PAGE + sum(map(len, room._lengths)) + 1024
        self._mask = (1 << (2 * count).bit_length()) - 1
        self._keys = array("Q", bytes(8 * (self._mask + 1)))
        self._places = array("Q", bytes(8 * (self._mask + 1)))
        self._left = count + (self._mask >> 2)
        for place, part in room.parts():
            self._add(part, place)

    def _add(self, part: bytes, place: int) -> None:
        key = hash(part) & 0xFFFF_FFFF_FFFF_FFFF or 1
        slot = key & self._mask
        while self._keys[slot]:
            if self._keys[slot] == key:
                return
            slot = (slot + 1) & self._mask
        if self._left:  # small records beyond what was reckoned with are not looked for
            self._left -= 1
            self._keys[slot], self._places[slot] = key, place

    def find(self, part: bytes) -> int | None:
        key = hash(part) & 0xFFFF_FFFF_FFFF_FFFF or 1
        slot = key & self._mask
        while self._keys[slot]:
            if self._keys[slot] == key:
                place = self._places[slot]
                return place if self._room.read(place, len(part)) == part else None
            slot = (slot + 1) & self._mask
        return None


def write(image: Path, room: Room, to: Path, *, most: float = 0.5) -> bool:
    """Write the increment that makes `image` of what is in `room`, durable when it returns. False, with nothing
    written, if more than the share `most` of it is new: then it is better kept whole. Raises OSError."""
    beside = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        with open(image, "rb") as file, open(beside, "xb") as out, tempfile.TemporaryFile(dir=to.parent) as packed:
            os.fchmod(out.fileno(), 0o600)
            size = os.fstat(file.fileno()).st_size
            with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as data:
                parts, lengths, new = _compare(data, room, packed, most * size)
                if new > most * size:
                    return False
                header = Header(base=room.base, chain=room.chain, length=size, digest=_digest(data), new=new)
            encoded = msgspec.json.encode(header)
            out.write(MAGIC + len(encoded).to_bytes(4, "little") + encoded)
            for frame in (parts, lengths):
                compressed = zstandard.ZstdCompressor(level=_LEVEL).compress(frame.tobytes())
                out.write(len(compressed).to_bytes(8, "little") + compressed)
            out.write(packed.tell().to_bytes(8, "little"))
            packed.seek(0)
            while block := packed.read(_BLOCK):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        os.rename(beside, to)
        return True
    finally:
        beside.unlink(missing_ok=True)


def _compare(data: mmap.mmap, room: Room, packed: BinaryIO, most: float) -> tuple[array[int], array[int], int]:
    """Where each part of an image is in the room, and the lengths and number of bytes of those that are new; these are
    compressed into `packed`."""
    index = _Index(room)
    parts, lengths, new = array("Q"), array("I"), 0
    begin = end = guess = 0  # the last stretch of parts; where the next would be if nothing had changed
    borders = {0, room.size, *room._starts}
    with zstandard.ZstdCompressor(level=_LEVEL).stream_writer(packed, closefd=False) as writer:
        for offset, length in cut(data):
            part = data[offset : offset + length]
            place: int | None = guess if room.read(guess, length) == part else index.find(part)
            if place is None:
                place = room.size + new
                writer.write(part)
                lengths.append(length)
                new += length
                guess += length
                if new > most:
                    break
            else:
                guess = place + length
            if place == end and place not in borders:
                end += length
                continue
            if end > begin:
                parts.extend((begin, end - begin))
            begin, end = place, place + length
    if end > begin:
        parts.extend((begin, end - begin))
    return parts, lengths, new


def _digest(data: mmap.mmap) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(data), _BLOCK):
        digest.update(data[start : start + _BLOCK])
    return digest.hexdigest()
