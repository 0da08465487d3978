"""Hostile images for all that reads one without restarting it: the reader, the order, `image info`, `convert`."""

from __future__ import annotations

import os
import random
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from migrator.api.image_convert import convert_image
from migrator.api.image_info import summarise
from migrator.engine.stream import RecordReader
from migrator.errors import MigratorError
from migrator.image.order import Order
from migrator.image.records import Trailer
from migrator.image.render import render_text, to_json
from tests.fuzz.counts import Counts
from tests.fuzz.mutation import cut, mutated

GOLDEN = Path(__file__).parents[1] / "golden"
SLOW = 30.0  # seconds for an image of 28 KB: that is no load of the machine any more


def _read(fd: int) -> str:
    reader, order = RecordReader(fd), Order()
    while True:
        record = reader.next()
        order.check(record)
        if isinstance(record, Trailer):
            return "whole"


def _show(fd: int) -> str:
    info = summarise(fd)
    text = render_text(info, verbose=True) + render_text(info, tree=True) + render_text(info, errors=True)
    assert text.replace("\n", "").isprintable()
    assert to_json(info).isascii()
    return "whole" if info.whole else "broken"


def _convert(fd: int) -> str:
    sink = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        convert_image(fd, sink)
    finally:
        os.close(sink)
    return "converted"


TARGETS: tuple[Callable[[int], str], ...] = (_read, _show, _convert)


def fuzz(seconds: float, seed: int) -> Counts:
    """Read hostile images for a while. What is found has the number that makes it again: `one(NUMBER)`."""
    counts, end = Counts(), time.monotonic() + seconds
    while time.monotonic() < end:
        one(seed, counts)
        seed += 1
    return counts


def one(seed: int, counts: Counts) -> None:
    rng = random.Random(seed)
    seeds = [cut(path.read_bytes()) for path in sorted(GOLDEN.glob("*.img"))]
    image, made = mutated(rng, seeds)
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    os.write(fd, image)
    for target in TARGETS:
        os.lseek(fd, 0, os.SEEK_SET)
        begun = time.monotonic()
        try:
            counts.note(f"{target.__name__[1:]}: {target(fd)}")
        except MigratorError:
            counts.note(f"{target.__name__[1:]}: refused")
        except Exception:
            counts.found.append(f"decoder {seed} ({made}): {target.__name__}: {traceback.format_exc()}")
        if time.monotonic() - begun > SLOW:
            counts.found.append(f"decoder {seed} ({made}): {target.__name__} took {time.monotonic() - begun:.1f} s")
    os.close(fd)
