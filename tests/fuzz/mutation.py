"""Images that are wrong in a way that gets past the frame: most of a random change would only spoil a length.

An image is cut into its records; a few of them are changed, dropped, doubled or moved, lengths are kept right, and
the trailer mostly counts again. Which kind of record is changed is drawn first, so that rare ones have their turn.
"""

from __future__ import annotations

import random
import struct

from migrator.image.codec import HEADER
from migrator.image.records import TRAILER_MAGIC, Pages, Trailer

NUMBERS = (0, 1, 2, 7, 8, 63, 64, 255, 4095, 4096, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
WIDE = (*NUMBERS, 1 << 40, 0x7FFFFFFFF000, 0xFFFF800000000000, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
Parts = list[tuple[int, bytes]]  # type and payload


def cut(image: bytes) -> Parts:
    parts, at = [], 0
    while at < len(image):
        kind, length = HEADER.unpack_from(image, at)
        parts.append((kind, image[at + HEADER.size : at + length]))
        at += length
    return parts


def join(parts: Parts) -> bytes:
    return b"".join(HEADER.pack(kind, HEADER.size + len(payload)) + payload for kind, payload in parts)


def mutated(rng: random.Random, seeds: list[Parts]) -> tuple[bytes, str]:
    """A hostile image, and how it was made."""
    parts = list(rng.choice(seeds))
    made = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.choice(sorted({kind for kind, _ in parts}))
        index = rng.choice([at for at, part in enumerate(parts) if part[0] == kind])
        way = rng.choices(list(_WAYS), weights=[weight for _, weight in _WAYS.values()])[0]
        _WAYS[way][0](rng, parts, index, seeds)
        made.append(f"{way} {kind}@{index}")
        if not parts:
            break
    if parts and parts[-1][0] == Trailer.TYPE and rng.random() < 0.9:
        parts[-1] = (Trailer.TYPE, struct.pack("<QQ", TRAILER_MAGIC, len(parts)))
    image = join(parts)
    if rng.random() < 0.02:
        image = image[: rng.randrange(len(image) + 1)]
        made.append("cut short")
    return image, ", ".join(made)


def _number(rng: random.Random, parts: Parts, index: int, _: list[Parts]) -> None:
    kind, payload = parts[index]
    size = rng.choice((1, 2, 4, 4, 8, 8))
    limit = Pages._packer.size + 64 if kind == Pages.TYPE else len(payload)
    if min(limit, len(payload)) < size:
        return
    at = rng.randrange(0, min(limit, len(payload)) - size + 1, size)
    old = int.from_bytes(payload[at : at + size], "little")
    new = rng.choice((rng.choice(WIDE), old + 1, old - 1, old ^ 1 << rng.randrange(8 * size), rng.getrandbits(64)))
    parts[index] = kind, payload[:at] + (new & (1 << 8 * size) - 1).to_bytes(size, "little") + payload[at + size :]


def _bytes(rng: random.Random, parts: Parts, index: int, _: list[Parts]) -> None:
    kind, payload = parts[index]
    changed = bytearray(payload)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    parts[index] = kind, bytes(changed)


def _length(rng: random.Random, parts: Parts, index: int, _: list[Parts]) -> None:
    kind, payload = parts[index]
    cut_at = rng.randrange(len(payload) + 1)
    parts[index] = kind, rng.choice((payload[:cut_at], payload + bytes(rng.choice((1, 4, 8, 64))), payload[cut_at:]))


def _drop(_: random.Random, parts: Parts, index: int, __: list[Parts]) -> None:
    del parts[index]


def _double(rng: random.Random, parts: Parts, index: int, _: list[Parts]) -> None:
    parts.insert(rng.randrange(len(parts) + 1), parts[index])


def _move(rng: random.Random, parts: Parts, index: int, _: list[Parts]) -> None:
    part = parts.pop(index)
    parts.insert(rng.randrange(len(parts) + 1), part)


def _foreign(rng: random.Random, parts: Parts, index: int, seeds: list[Parts]) -> None:
    """One of another image, of the same kind if there is one."""
    other = rng.choice(seeds)
    same = [part for part in other if part[0] == parts[index][0]] or other
    parts[index] = rng.choice(same)


def _type(rng: random.Random, parts: Parts, index: int, _: list[Parts]) -> None:
    parts[index] = rng.choice(parts)[0], parts[index][1]


_WAYS = {
    "number": (_number, 10), "bytes": (_bytes, 3), "length": (_length, 2), "drop": (_drop, 3), "double": (_double, 2),
    "move": (_move, 2), "foreign": (_foreign, 3), "type": (_type, 1),
}  # fmt: skip
