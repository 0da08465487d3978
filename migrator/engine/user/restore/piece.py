"""A stretch of address space as it is mapped in a stub now."""

from __future__ import annotations

from dataclasses import dataclass

from migrator.image.records import VmaFlag, VmaItem


def writes_through(item: VmaItem) -> bool:
    """Whether what is behind a mapping can be written to by it, now or once the program asks for that. No other may be
    made of a descriptor that is open for writing: a user would write by it what only others may write."""
    return bool(item.flags & VmaFlag.SHARED and item.flags & (VmaFlag.WRITE | VmaFlag.MAY_WRITE))


@dataclass(slots=True)
class Piece:
    start: int
    end: int
    item: VmaItem
