"""What the running kernel says of its own types (Documentation/bpf/btf.rst), as far as a program in it must know.

kernel = Kernel.read()
kernel.function("bpf_iter_task_vma"), kernel.offset("vm_area_struct", "vm_flags")
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import Self

VMLINUX = "/sys/kernel/btf/vmlinux"
_HEADER = struct.Struct("=HBBIIIII")  # struct btf_header (linux/btf.h)
_MAGIC = 0xEB9F
_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _FUNC = 1, 3, 4, 5, 6, 12  # kinds
_PROTO, _VAR, _DATASEC, _TAG, _ENUM64 = 13, 14, 15, 17, 19
_HEAD = 3  # words of struct btf_type
_FIXED = {_INT: 1, _ARRAY: 3, _VAR: 1, _TAG: 1}  # words behind it
_EACH = {_STRUCT: 3, _UNION: 3, _ENUM: 2, _PROTO: 2, _DATASEC: 3, _ENUM64: 3}  # the same, for each member
_KINDS = 32


class Kernel:
    """Raises LookupError for what is not in it, or is in no form that is known here."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) < _HEADER.size:
            raise LookupError("no types of this kernel's")
        magic, _, _, size, types, types_len, names, names_len = _HEADER.unpack_from(raw)
        if magic != _MAGIC:
            raise LookupError("no types of this kernel's")
        self._names = raw[size + names : size + names + names_len]
        self._raw = raw[size + types : size + types + types_len]
        self._words = array("I", self._raw[: len(self._raw) & ~3])
        self._starts: array[int] = array("I")  # by number of a type, as far as was looked

    @classmethod
    def read(cls) -> Self:
        """Raises OSError where the kernel does not tell."""
        with open(VMLINUX, "rb") as file:
            return cls(file.read())

    def function(self, name: str) -> int:
        """Its number."""
        return self._find(name, _FUNC)

    def offset(self, struct_name: str, member: str) -> int:
        """In bytes, of a member that may be in unions and structures without a name."""
        for name, offset in self._members(self._find(struct_name, _STRUCT)):
            if name == member:
                return offset
        raise LookupError(f"no {member} in {struct_name}")

    def _find(self, name: str, kind: int) -> int:
        # a type's words begin with where its name is: only these places can be its, and they are few
        place = self._names.find(b"\0%b\0" % name.encode()) + 1
        wanted = struct.pack("=I", place)
        at = self._raw.find(wanted) if place else -1
        while at >= 0:
            if not at % 4 and self._words[at // 4 + 1] >> 24 & (_KINDS - 1) == kind:
                number = self._number_of(at // 4)
                if number:
                    return number
            at = self._raw.find(wanted, at + 1)
        raise LookupError(f"no {name} in this kernel")

    def _number_of(self, word: int) -> int:
        """Of the type that begins at `word`, or 0: they are as long as they say, one after the other."""
        self._walk(word)
        low = bisect_left(self._starts, word)
        return low + 1 if low < len(self._starts) and self._starts[low] == word else 0

    def _walk(self, to: int = -1, count: int = 0) -> None:
        """Find where the types begin, up to the one at this word, and so many of them at least."""
        words, starts = self._words, self._starts
        fixed = [_HEAD + _FIXED.get(kind, 0) for kind in range(_KINDS)]
        each = [_EACH.get(kind, 0) for kind in range(_KINDS)]
        at = 0
        if starts:
            info = words[starts[-1] + 1]
            kind = info >> 24 & (_KINDS - 1)
            at = starts[-1] + fixed[kind] + each[kind] * (info & 0xFFFF)
        append = starts.append
        while at <= to or len(starts) < count:
            append(at)
            info = words[at + 1]
            kind = info >> 24 & 31  # a hundred thousand of them: nothing that can be left out
            at += fixed[kind]
            if each[kind]:
                at += each[kind] * (info & 0xFFFF)

    def _members(self, number: int, base: int = 0) -> Iterator[tuple[str, int]]:
        at = self._starts[number - 1]
        info = self._words[at + 1]
        mask = 0xFFFFFF if info >> 31 else 0xFFFFFFFF  # bit fields have their size in the upper byte
        for place in range(at + _HEAD, at + _HEAD + 3 * (info & 0xFFFF), 3):
            name, kind, bits = self._words[place : place + 3]
            offset = base + (bits & mask) // 8
            if name:
                yield self._names[name : self._names.index(b"\0", name)].decode(), offset
            elif self._is_aggregate(kind):
                yield from self._members(kind, offset)

    def _is_aggregate(self, number: int) -> bool:
        self._walk(count=number)
        return self._words[self._starts[number - 1] + 1] >> 24 & (_KINDS - 1) in (_STRUCT, _UNION)
