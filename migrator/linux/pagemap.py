"""Which pages exist and which were written: PAGEMAP_SCAN and userfaultfd's asynchronous write protection.

PAGEMAP_SCAN (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst) reports ranges of pages by category and
can, in the same step, write-protect what it reports: an atomic get-and-clear of the dirty set. It needs
the mappings registered with a userfaultfd that has UFFD_FEATURE_WP_ASYNC and belongs to the address space.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import threading
from array import array
from collections.abc import Sequence
from itertools import groupby

IS_WPALLOWED, IS_WRITTEN, IS_FILE, IS_PRESENT, IS_SWAPPED, IS_PFNZERO, IS_HUGE, IS_SOFT_DIRTY = (
    1 << bit for bit in range(8)
)
IS_GUARD = 1 << 8  # MADV_GUARD_INSTALL; Linux 6.16
_NOT_OWN = IS_FILE | IS_PFNZERO
WP_MATCHING, CHECK_WPASYNC = 1, 2

UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
_PAGEMAP_SCAN = 0xC0606610
_UFFD_API = 0xAA
_FEATURE_WP_UNPOPULATED, _FEATURE_WP_ASYNC = 1 << 13, 1 << 15
_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
_MODE_WP = 2

_libc = ctypes.PyDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.restype = ctypes.c_int
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

_VECTOR = 32768
_PAGE = 4096
_ENTRIES = 65536  # of /proc/PID/pagemap, read at a time
_ENTRY_PRESENT, _ENTRY_SWAP, _ENTRY_FRAME = 1 << 63, 1 << 62, (1 << 55) - 1
_ENTRY_KIND = _ENTRY_PRESENT | _ENTRY_SWAP | _ENTRY_FRAME
# No page, and only the note that it is protected: the last type of swap entries, and of such the first bit
# (include/linux/swapops.h: SWP_PTE_MARKER, PTE_MARKER_UFFD_WP)
_ENTRY_MARKER = _ENTRY_SWAP | 1 << 5 | 31


class _ScanArg(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    ]


@functools.cache
def guards_known() -> int:
    """IS_GUARD where the kernel tells of it, else 0."""
    scanner = Scanner(os.getpid())
    try:
        scanner.scan(0, 4096, mask=IS_GUARD, returned=IS_GUARD)
    except OSError:
        return 0
    finally:
        scanner.close()
    return IS_GUARD


Span = tuple[int, int]  # start, end
Region = tuple[int, int, int]  # start, end, categories


class NotRegistered(Exception):
    """The scan met a mapping that is not under write protection.

    `regions` were reported, and re-protected, before it: losing them loses pages. `resume` is where the
    scan must go on, once the mapping there is registered."""

    def __init__(self, regions: list[Region], resume: int) -> None:
        super().__init__(f"not registered at {resume:#x}")
        self.regions = regions
        self.resume = resume


class _Vector(threading.local):
    """Where the kernel puts regions; one for each thread, as it is big and a tree has many processes."""

    def __init__(self) -> None:
        self.words = (ctypes.c_uint64 * (3 * _VECTOR))()
        self.used = 0
        self.arg = _ScanArg()


_vector = _Vector()


class Scanner:
    """PAGEMAP_SCAN on one process."""

    def __init__(self, pid: int) -> None:
        self.fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)

    def own(self, start: int, end: int) -> list[Span]:
        """Where the process has pages of its own: not those of a file, and not memory that it has only read."""
        there = IS_PRESENT | IS_SWAPPED
        return self.own_of(self.scan(start, end, anyof=there, without=_NOT_OWN | guards_known(), returned=there))

    def own_of(self, regions: Sequence[Region]) -> list[Span]:
        """What of scanned regions are pages of the process's own, as far as the scan has told."""
        out: list[Span] = []
        for start, end, categories in regions:
            if categories & (IS_GUARD | _NOT_OWN):
                continue
            if categories & IS_PRESENT:
                out.append((start, end))
            elif categories & IS_SWAPPED:
                out += self.pages(start, end)
        return out

    def pages(self, start: int, end: int) -> list[Span]:
        """The parts of a range of IS_SWAPPED in which there are pages: swapped out, being moved by the kernel, or lost
        by a memory error. The rest was dropped, and has only its write protection left.

        Where the kernel hides which it is (without CAP_SYS_ADMIN), all of it."""
        out: list[Span] = []
        while start < end:
            raw = os.pread(self.fd, min((end - start) // _PAGE, _ENTRIES) * 8, start // _PAGE * 8)
            if not raw:
                break
            alike = raw == raw[:8] * (len(raw) // 8)
            for kind, run in groupby([entry & _ENTRY_KIND for entry in array("Q", raw[:8] if alike else raw)]):
                count = len(raw) // 8 if alike else len(list(run))
                if kind & (_ENTRY_PRESENT | _ENTRY_SWAP) and kind != _ENTRY_MARKER:
                    out.append((start, start + count * _PAGE))
                start += count * _PAGE
        return out

    def scan(
        self,
        start: int,
        end: int,
        *,
        mask: int = 0,
        anyof: int = 0,
        without: int = 0,
        returned: int = 0,
        flags: int = 0,
    ) -> list[Region]:
        """Ranges of [start, end) that have all categories of `mask`, any of `anyof` and none of `without`.

        Raises NotRegistered (only with CHECK_WPASYNC) or OSError."""
        out: list[Region] = []
        vector = _vector
        arg = vector.arg
        while start < end:
            if vector.used:
                ctypes.memset(vector.words, 0, 24 * vector.used)
                vector.used = 0
            arg.size, arg.flags, arg.start, arg.end, arg.walk_end = 96, flags, start, end, 0
            arg.vec, arg.vec_len, arg.max_pages = ctypes.addressof(vector.words), _VECTOR, 0
            arg.category_inverted, arg.category_mask, arg.category_anyof_mask = without, mask | without, anyof
            arg.return_mask = returned
            count = _ioctl(self.fd, _PAGEMAP_SCAN, ctypes.addressof(arg))
            if count < 0:
                error = ctypes.get_errno()
                if error != errno.EPERM:
                    raise OSError(error, f"PAGEMAP_SCAN: {os.strerror(error)}", f"{start:#x}-{end:#x}")
                # EPERM at the first unregistered mapping: what was reported before it is in the vector,
                # but the count is not returned; the vector was zeroed, so its end can be seen
                count = 0
                while count < _VECTOR and vector.words[3 * count + 1]:
                    count += 1
                _collect(vector, out, count)
                raise NotRegistered(out, out[-1][1] if out else start)
            _collect(vector, out, count)
            if arg.walk_end <= start:
                break
            start = arg.walk_end
        return out


def _collect(vector: _Vector, out: list[Region], count: int) -> None:
    vector.used = count
    if count:
        flat = iter(vector.words[: 3 * count])
        out.extend(zip(flat, flat, flat, strict=True))


class WriteProtection:
    """A userfaultfd of another process's address space, used only to track writes."""

    def __init__(self, fd: int) -> None:
        """`fd`: created inside the target by userfaultfd(2), fetched by pidfd_getfd(2). Owned from now on."""
        self.fd = fd
        features = _FEATURE_WP_ASYNC | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_HUGETLBFS_SHMEM
        self._ioctl(UFFDIO_API, (ctypes.c_uint64 * 3)(_UFFD_API, features, 0), "UFFDIO_API")

    def register(self, start: int, end: int) -> None:
        """Track writes to [start, end), which must lie in mappings of private anonymous, file or shmem memory."""
        self._ioctl(UFFDIO_REGISTER, (ctypes.c_uint64 * 4)(start, end - start, _MODE_WP, 0), f"{start:#x}-{end:#x}")

    def _ioctl(self, code: int, arg: ctypes.Array[ctypes.c_uint64], about: str) -> None:
        if _ioctl(self.fd, code, ctypes.addressof(arg)) < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"userfaultfd: {os.strerror(error)}", about)

    def close(self) -> None:
        """Ends the tracking: the kernel unregisters everything with the last close."""
        os.close(self.fd)
