"""An image that was damaged on the disk is not restarted: its pages have checksums."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli import counter, leftovers, migrator

from migrator.image.codec import HEADER, REGISTRY
from migrator.image.records import Pages

pytestmark = pytest.mark.root


def contents(image: bytes) -> list[int]:
    """Where the contents of each record of pages end."""
    ends, at = [], 0
    while at < len(image):
        kind, length = HEADER.unpack_from(image, at)
        at += length
        if REGISTRY[kind] is Pages and Pages._packer.unpack_from(image, at - length + HEADER.size)[3]:
            ends.append(at)
    return ends


def test_one_bit_of_memory_is_enough(tmp_path: Path) -> None:
    image, damaged = tmp_path / "image", tmp_path / "damaged"
    with counter(tmp_path) as program:
        migrator("checkpoint", program.pid, "--kill", "-o", image)
        program.await_end()
        raw = bytearray(image.read_bytes())
        ends = contents(raw)
        assert ends
        for end in (ends[0], ends[-1]):
            raw[end - 100] ^= 1
            damaged.write_bytes(raw)
            raw[end - 100] ^= 1
            done = migrator("restart", "--detach", "-i", damaged, code=6)
            assert "do not fit their checksum" in " ".join(done.stderr.split())
            assert program.is_gone()
        migrator("restart", "--detach", "-i", image)
        program.check_alive_and_progressing()
        program.finish()
    assert leftovers(tmp_path) == []
