"""Older images made into images of the current revision."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from migrator.api.image_file import open_image
from migrator.api.output_file import OutputFile
from migrator.errors import UsageError
from migrator.image.convert import Converter
from migrator.image.records import REV

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Converted:
    """Revisions of what was read and of what was written; records and bytes written."""

    from_rev: int
    to_rev: int
    records: int
    bytes: int


def convert_image(source: Path | int, output: Path | int) -> Converted:
    """Convert the image in `source` to the current revision. A file in `output` is whole or not there.

    Raises UsageError, or ImageError if what is read is not a whole image."""
    fd = source if isinstance(source, int) else open_image(source)
    try:
        with OutputFile(output) as sink:
            converter, written = Converter(), 0
            while chunk := _read(fd, source):
                data = converter.feed(chunk)
                written += _write(sink.fd, data)
            converter.close()
            sink.whole()
    finally:
        if not isinstance(source, int):
            os.close(fd)
    return Converted(converter.rev, REV, converter.records, written)


def _read(fd: int, source: Path | int) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except IsADirectoryError:
        raise UsageError(f"{source} is a directory") from None


def _write(fd: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)
