"""Which calls make the mappings of a stub be what the stream says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from migrator.engine.user.restore.mappings import NR, AddressSpace
from migrator.engine.user.vma_item import backing
from migrator.image.records import VmaFlag, VmaItem, VmaKind, Vmas
from migrator.linux.remote import Call

START, PAGE = 0x7F0000000000, 4096
PRIVATE = VmaFlag.READ | VmaFlag.WRITE


@dataclass
class Recorder:
    """A stub that was cloned from a filled one, and has these mappings."""

    mapped: list[VmaItem]
    forked: bool = True
    calls: list[Call] = field(default_factory=list)

    def place_system_mappings(self, system: object) -> None:
        assert not system

    def checked(self, calls: Sequence[Call], what: str) -> None:
        self.calls += calls


def item(first: int, end: int, flags: VmaFlag) -> VmaItem:
    return VmaItem(START + first * PAGE, START + end * PAGE, 0, int(flags), VmaKind.ANON, 0, 0)


def test_what_lies_where_a_mapping_is_made_larger_goes_first() -> None:
    small, other = item(0, 2, PRIVATE), item(2, 10, VmaFlag.NORESERVE)
    stub: Any = Recorder([small, other])
    space = AddressSpace(stub, None, str)  # type: ignore[arg-type]
    space._inherited = []
    space.apply(Vmas(1, 0, [item(0, 4, PRIVATE), item(4, 10, VmaFlag.NORESERVE)]))
    assert stub.calls == [(NR["munmap"], START + 2 * PAGE, 2 * PAGE), (NR["mremap"], START, 2 * PAGE, 4 * PAGE, 0)]


def test_a_shared_mapping_that_becomes_writable_is_made_again_unless_it_could_be() -> None:
    """What was seen of a running process may be wrong in a round: none is changed that was mapped from what cannot be
    written to."""
    reads, may = VmaFlag.READ | VmaFlag.SHARED, VmaFlag.MAY_WRITE
    before = VmaItem(START, START + PAGE, 0, int(reads), VmaKind.FILE, 7, 0)
    for flags, kept in ((reads | VmaFlag.WRITE, False), (reads | may, False), (reads | VmaFlag.EXEC, True)):
        assert (backing(replace(before, flags=int(flags))) == backing(before)) == kept
    writable = replace(before, flags=int(reads | may))
    assert backing(replace(before, flags=int(reads | VmaFlag.WRITE))) == backing(writable)
