"""What a program has told the kernel of its mappings: advice of madvise(2), and names of anonymous memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from migrator.image.records import VmaFlag, VmaItem
from migrator.linux import x86_64 as arch
from migrator.linux.remote import Call

Stretch = tuple[int, int, VmaItem | None, VmaItem]  # start, end, as which it is mapped so far, as which it is to be

_NR = arch.NR
_GIVEN_AND_TAKEN_BACK: dict[VmaFlag, tuple[int, int | None]] = {
    VmaFlag.DONTFORK: (10, 11),
    VmaFlag.DONTDUMP: (16, 17),
    VmaFlag.WIPEONFORK: (18, 19),
    VmaFlag.HUGEPAGE: (14, None),
    VmaFlag.NOHUGEPAGE: (15, None),
    VmaFlag.MERGEABLE: (12, 13),
    VmaFlag.RANDOM: (1, 0),
    VmaFlag.SEQUENTIAL: (2, 0),
}
_ADVISED = sum(_GIVEN_AND_TAKEN_BACK)
_ORDERS = VmaFlag.RANDOM | VmaFlag.SEQUENTIAL  # either replaces the other
_PR_SET_VMA, _PR_SET_VMA_ANON_NAME = 0x53564D41, 0


def differs(before: VmaItem | None, item: VmaItem) -> bool:
    if before is None:
        return bool(item.flags & _ADVISED or item.name_objref)
    return bool((before.flags ^ item.flags) & _ADVISED) or before.name_objref != item.name_objref


def calls(stretches: Sequence[Stretch], name_of: Callable[[int], str], at: int) -> tuple[list[Call], bytes]:
    """The calls that make the difference, and what must lie at the address `at` for them."""
    out: list[Call] = []
    names: dict[int, int] = {}
    text = b""
    for start, end, before, item in stretches:
        was = before.flags if before is not None else 0
        out += [(_NR["madvise"], start, end - start, number) for number in _advice(was, item.flags)]
        if item.name_objref == (before.name_objref if before is not None else 0):
            continue
        if item.name_objref and item.name_objref not in names:
            names[item.name_objref] = at + len(text)
            text += name_of(item.name_objref).encode("utf-8", "surrogateescape") + b"\0"
        name = names[item.name_objref] if item.name_objref else 0
        out.append((_NR["prctl"], _PR_SET_VMA, _PR_SET_VMA_ANON_NAME, start, end - start, name))
    return out, text


def _advice(was: int, now: int) -> list[int]:
    out = []
    for flag, (given, taken_back) in _GIVEN_AND_TAKEN_BACK.items():
        replaced = flag & _ORDERS and now & _ORDERS
        if now & flag and not was & flag:
            out.append(given)
        elif was & flag and not now & flag and not replaced and taken_back is not None:
            out.append(taken_back)
    return out
