"""Reading any stream to see what is in it: a file, or standard input."""

from __future__ import annotations

import os
from pathlib import Path

from migrator.api.image_file import open_image
from migrator.errors import ImageError
from migrator.image.decoder import Decoder
from migrator.image.info import ImageInfo, ImageSummary

_CHUNK = 1 << 20


def summarise(fd: int, size: int | None = None) -> ImageInfo:
    """What the stream on `fd` holds, read to its end or to where it breaks. Never raises on what is in it.

    size:  bytes to read; None for all

    Memory does not grow with the contents of pages: they are checked, counted and let go. OSError
    from read(2) other than at the end is told as the cause as well."""
    decoder = Decoder(keep_pages=False)
    summary = ImageSummary()
    read = 0
    try:
        while chunk := os.read(fd, _CHUNK if size is None else min(_CHUNK, size - read)):
            read += len(chunk)
            for record in decoder.feed(chunk):
                summary.add(record)
        decoder.close()
    except ImageError as error:
        summary.broken(error.message)
    except OSError as error:
        summary.broken(f"reading failed at byte {decoder.offset}: {error.strerror}")
    return summary.finish(decoder.offset)


def read_info(path: str) -> ImageInfo:
    """What the stream in file `path` holds; "-" is standard input.

    Raises UsageError if there is no such file."""
    if path == "-":
        return summarise(0)
    fd = open_image(Path(path))
    try:
        return summarise(fd)
    finally:
        os.close(fd)
