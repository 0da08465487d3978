"""Memory that is used again at once is not given back to the kernel in between.

glibc gives each allocation of 128 KiB and more pages of its own, and takes fresh ones for the
next: a page fault for each 4 KiB of each copy of each block. See mallopt(3).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_KEPT = 8 << 20  # bytes of one allocation; the largest frame has half of it
_MOST_KEPT = 32 << 20  # bytes free at the end of the heap


@functools.cache
def keep_freed_memory() -> None:
    """Set that for the whole process, once. Nothing happens where the C library has no mallopt()."""
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
