"""Many system calls of our own in one go.

A call from Python costs about a microsecond more than the call itself; a freeze makes ten thousand. So a table of
them is walked by some bytes of machine code, as it is inside of tracees (migrator.linux.remote):

    sizes = Area(8, len(fds))
    flags, answers = each(len(fds), (NR["fcntl"], fds, F_GETFL), (NR["ioctl"], fds, FIONREAD, sizes.addresses))

All are made by the calling thread, as ptrace(2) wants it. Nothing stops at an error: each result is for the caller
to look at. Where no memory can be made executable, the same calls are made one by one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

from migrator.linux import x86_64 as arch

_WORDS = arch.BATCH_ENTRY // 8

Column = int | Sequence[int]  # the same argument for every item, or each its own
Walker = Callable[[int, int], object]  # address of the table, number of its entries


class Area:
    """`count` buffers of `size` bytes each (rounded up to 8), one behind the other, at addresses that stay."""

    def __init__(self, size: int, count: int) -> None:
        self.stride = -(-size // 8) * 8
        self._memory = ctypes.create_string_buffer(max(8, self.stride * count))
        self.view = memoryview(self._memory).cast("B")
        start = ctypes.addressof(self._memory)
        self.addresses = range(start, start + self.stride * count, self.stride or 1)

    def get(self, index: int, size: int) -> bytes:
        at = index * self.stride
        return bytes(self.view[at : at + size])

    def put(self, index: int, data: bytes) -> None:
        at = index * self.stride
        self.view[at : at + len(data)] = data


class Strings:
    """Strings of C, at addresses that stay as long as this object."""

    def __init__(self, values: Sequence[bytes]) -> None:
        self._memory = ctypes.create_string_buffer(b"\0".join(values))
        start = ctypes.addressof(self._memory)
        self.addresses = list(accumulate([start, *[len(value) + 1 for value in values[:-1]]])) if values else []


class Iovecs:
    """A struct iovec for each of `bases`, at addresses that stay."""

    def __init__(self, bases: Sequence[int], lengths: int | Sequence[int]) -> None:
        count = len(bases)
        self._words = array("Q", bytes(16 * count))
        self._words[0::2] = array("Q", bases)
        self._words[1::2] = array("Q", [lengths]) * count if isinstance(lengths, int) else array("Q", lengths)
        start = self._words.buffer_info()[0]
        self.addresses = range(start, start + 16 * count, 16)


def each(count: int, *calls: Sequence[Column], blocking: bool = False) -> list[list[int]]:
    """For each of `count` items make `calls`, one after the other; of each call, the results of all items.

    A call is (number, arguments...), a sequence among the arguments being item by item. Negative errno on error.
    `blocking`: other threads of Python run meanwhile."""
    if not count:
        return [[] for _ in calls]
    table = Table(count, *calls)
    table.walk(blocking=blocking)
    return [table.results(place).tolist() for place in range(len(calls))]


class Table:
    """The calls of each(), laid out ahead: for when there is time before they are to be made, and none then.

    table = Table(len(numbers), (NR["pidfd_getfd"], pidfd, numbers, 0))
    states = Table(len(numbers), (NR["fstat"], 0, areas))
    table.walk()
    states.put(0, 1, table.results(0))  # the first call's first argument
    states.walk()
    """

    def __init__(self, count: int, *calls: Sequence[Column]) -> None:
        self.count, self._calls = count, len(calls)
        self._stride = _WORDS * len(calls)
        self._words = array("Q", bytes(8 * self._stride * count))
        for place, call in enumerate(calls):
            for word, value in enumerate(call):
                column = array("Q", [value & arch.MINUS_ONE]) * count if isinstance(value, int) else _column(value)
                self._words[place * _WORDS + word :: self._stride] = column
        self._view = memoryview(self._words).cast("B").cast("q") if count else memoryview(array("q"))

    def put(self, place: int, word: int, column: int | memoryview) -> None:
        """Set an argument of the calls number `place`: word 1 is the first. A column is of "q"."""
        if isinstance(column, int):
            column = memoryview(array("q", [column]) * self.count)
        self._view[place * _WORDS + word :: self._stride] = column

    def walk(self, *, blocking: bool = False) -> None:
        if self.count:
            walk(self._words.buffer_info()[0], self.count * self._calls, blocking=blocking)

    def results(self, place: int) -> memoryview:
        """Of the calls number `place`, of all items: a view of "q" that the next walk changes."""
        return self._view[place * _WORDS + _WORDS - 1 :: self._stride]


def differing(answers: Sequence[memoryview], expected: Sequence[bytes]) -> set[int]:
    """The items of which an answer is another than expected: columns, and what was in them."""
    out: set[int] = set()
    for column, wanted in zip(answers, expected, strict=True):
        found = column.tobytes()
        if found != wanted:
            size = column.itemsize
            pairs = ((found[at : at + size], wanted[at : at + size]) for at in range(0, len(wanted), size))
            out.update(at for at, (a, b) in enumerate(pairs) if a != b)
    return out


def _column(values: Sequence[int]) -> array[int]:
    try:
        return array("Q", values)
    except OverflowError:  # a negative one: the result of a call that failed
        return array("Q", [value & arch.MINUS_ONE for value in values])


def walk(address: int, count: int, *, blocking: bool = False) -> None:
    """Make the `count` calls of a table of ours."""
    _walkers()[blocking](address, count)


@cache
def _walkers() -> tuple[Walker, Walker]:
    """That which keeps the other threads waiting, and that which does not."""
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return one_by_one, one_by_one
    code.write(arch.WALK_CODE)
    _code.append(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    types = None, ctypes.c_void_p, ctypes.c_size_t
    return ctypes.PYFUNCTYPE(*types)(address), ctypes.CFUNCTYPE(*types)(address)


_code: list[mmap.mmap] = []  # is never unmapped


def one_by_one(address: int, count: int) -> None:
    words = (ctypes.c_uint64 * (_WORDS * count)).from_address(address)
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    for at in range(0, len(words), _WORDS):
        result = call(*[ctypes.c_uint64(word) for word in words[at : at + _WORDS - 1]])
        words[at + _WORDS - 1] = (-ctypes.get_errno() if result == -1 else result) & arch.MINUS_ONE


def raise_first(results: Sequence[int], what: str, about: Sequence[object]) -> None:
    """OSError for the first of `results` that is one; `about` names each item."""
    if results and min(results) < 0:
        at = next(i for i, result in enumerate(results) if result < 0)
        raise OSError(-results[at], f"{what}: {os.strerror(-results[at])}", str(about[at]))
