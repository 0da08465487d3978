"""Opening a file that holds an image, or what is new in one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from migrator.api import increments
from migrator.errors import ImageError, UsageError


def open_image(path: Path) -> int:
    """A descriptor to read a whole image from; an increment is put together first. Raises UsageError, ImageError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="an image made by `migrator checkpoint`") from error
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"{path} is a directory", hint="an image made by `migrator checkpoint`")
        if not stat.S_ISREG(mode) or os.pread(fd, len(increments.MAGIC), 0) != increments.MAGIC:
            return os.dup(fd)
        return increments.whole(path)
    except FileNotFoundError as error:
        raise ImageError(
            f"{path.name} builds on {Path(error.filename).name}, which is not beside it",
            hint="an increment is restarted from the directory in which it was saved",
        ) from error
    except OSError as error:
        raise ImageError(f"{path} cannot be put together: {error}") from error
    finally:
        os.close(fd)
