"""Many sockets of ours asked, and told, the same in one go (migrator.linux.batch).

    ask = Ask(fds)
    sizes, name = ask.option(SOL_SOCKET, SO_SNDBUF), ask.own_name()
    ask.put(IPPROTO_TCP, TCP_REPAIR, 1)
    ask.make()                              # of each socket all of that, one after the other
    for i, size in enumerate(sizes.numbers()): ...

Nothing stops at an error: `results` of each question are what the calls returned, negative errno on error.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

from migrator.linux.batch import Area, Column, each, raise_first
from migrator.linux.x86_64 import NR

NAME_SIZE = 128  # struct sockaddr_storage


class Answers:
    """What came of one question, of each socket. There once it was asked."""

    def __init__(self, size: int, count: int) -> None:
        self.area = Area(max(4, size), count)
        self.lengths = Area(4, count)
        self.lengths.view.cast("Q")[:] = memoryview(array("Q", [size]) * max(1, count))
        self.results: list[int] = []

    def numbers(self) -> list[int]:
        """Each as an int."""
        step = self.area.stride // 4
        return self.area.view.cast("i")[::step].tolist()[: len(self.results)]

    def raw(self, index: int) -> bytes:
        """As much as there is; b"" after an error."""
        return self.area.get(index, self.sizes()[index]) if self.results[index] >= 0 else b""

    def all(self) -> list[bytes]:
        """raw() of each."""
        get = self.area.get
        return [
            get(i, size) if size and result >= 0 else b""
            for i, (size, result) in enumerate(zip(self.sizes(), self.results, strict=False))
        ]

    def texts(self) -> list[str]:
        """Each as a name that ends with NUL; "" after an error."""
        raws = self.all()
        names = {raw: raw.partition(b"\0")[0].decode("ascii", "replace") for raw in set(raws)}  # few are different
        return [names[raw] for raw in raws]

    def sizes(self) -> list[int]:
        """How many bytes there are of each."""
        return self.lengths.view.cast("I")[::2].tolist()

    def check(self, what: str) -> None:
        """Raises OSError for the first that could not be asked, or told."""
        raise_first(self.results, what, range(len(self.results)))


class Ask:
    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = list(fds)
        self._calls: list[Sequence[Column]] = []
        self._answers: list[Answers] = []
        self._values: dict[int, ctypes.c_int] = {}  # at addresses that stay
        self._kept: list[Area] = []  # the same

    def option(self, level: int, name: int, size: int = 4) -> Answers:
        """getsockopt(2)."""
        out = self._new(size)
        self._calls.append((NR["getsockopt"], self._fds, level, name, out.area.addresses, out.lengths.addresses))
        return out

    def own_name(self) -> Answers:
        """getsockname(2): raw addresses."""
        return self._name("getsockname")

    def peer_name(self) -> Answers:
        """getpeername(2): raw addresses."""
        return self._name("getpeername")

    def amount(self, request: int) -> Answers:
        """An ioctl(2) that answers with an int."""
        out = self._new(4)
        self._calls.append((NR["ioctl"], self._fds, request, out.area.addresses))
        return out

    def put(self, level: int, name: int, value: int | Sequence[int]) -> Answers:
        """setsockopt(2) of an int: the same for all, or each its own."""
        if isinstance(value, int):
            cell = self._values.setdefault(value, ctypes.c_int(value))
            out, where = self._new(0), ctypes.addressof(cell)
            self._calls.append((NR["setsockopt"], self._fds, level, name, where, 4))
        else:
            out = self._new(4)
            out.area.view.cast("i")[::2] = memoryview(array("i", value))
            self._calls.append((NR["setsockopt"], self._fds, level, name, out.area.addresses, 4))
        return out

    def put_bytes(self, level: int, name: int, values: Sequence[bytes]) -> Answers:
        """setsockopt(2) of bytes, each its own."""
        places, lengths = self._place(values)
        return self._call(NR["setsockopt"], self._fds, level, name, places, lengths)

    def bind(self, names: Sequence[bytes]) -> Answers:
        """bind(2) to raw addresses."""
        return self._call(NR["bind"], self._fds, *self._place(names))

    def connect(self, names: Sequence[bytes]) -> Answers:
        """connect(2) to raw addresses."""
        return self._call(NR["connect"], self._fds, *self._place(names))

    def peek(self, counts: Sequence[int], flags: int) -> Peeked:
        """recv(2) of so many bytes of each."""
        out = Peeked(counts)
        self._answers.append(out)
        self._calls.append((NR["recvfrom"], self._fds, out.addresses, counts, flags, 0, 0))
        return out

    def send(self, contents: Sequence[bytes], flags: int) -> Answers:
        """send(2)."""
        return self._call(NR["sendto"], self._fds, *self._place(contents), flags, 0, 0)

    def make(self) -> None:
        for answers, results in zip(self._answers, each(len(self._fds), *self._calls), strict=True):
            answers.results = results

    def _name(self, call: str) -> Answers:
        out = self._new(NAME_SIZE)
        self._calls.append((NR[call], self._fds, out.area.addresses, out.lengths.addresses))
        return out

    def _place(self, values: Sequence[bytes]) -> tuple[range, list[int]]:
        """Where the bytes lie until all is made, and how many they are."""
        lengths = [len(value) for value in values]
        area = Area(max(lengths, default=0), len(values))
        area.view[: area.stride * len(values)] = b"".join([value.ljust(area.stride, b"\0") for value in values])
        self._kept.append(area)
        return area.addresses, lengths

    def _call(self, *call: Column) -> Answers:
        self._calls.append(call)
        return self._new(0)

    def _new(self, size: int) -> Answers:
        out = Answers(size, len(self._fds))
        self._answers.append(out)
        return out


class Peeked(Answers):
    """Bytes that wait, of different length for each."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts
        self._memory = ctypes.create_string_buffer(max(1, sum(counts)))
        self.results = []
        self._starts = [0]
        for count in counts:
            self._starts.append(self._starts[-1] + count)
        base = ctypes.addressof(self._memory)
        self.addresses = [base + start for start in self._starts[:-1]]

    def raw(self, index: int) -> bytes:
        if not self._counts[index]:
            return b""
        if (got := self.results[index]) < 0:
            raise_first([got], "recv", [f"connection {index}"])
        start = self._starts[index]
        return bytes(memoryview(self._memory)[start : start + got])
