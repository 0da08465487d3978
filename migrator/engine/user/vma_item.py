"""What a mapping, as it is in the stream, means for both ends."""

from __future__ import annotations

from migrator.image.records import VmaFlag, VmaItem, VmaKind

_IDENTITY = VmaFlag.SHARED | VmaFlag.GROWSDOWN | VmaFlag.NORESERVE | VmaFlag.DROPPABLE


def writes_through(item: VmaItem) -> bool:
    """Whether what is behind a mapping can be written to by it, now or once the program asks for that. No other may be
    made of a descriptor that is open for writing: a user would write by it what only others may write."""
    return bool(item.flags & VmaFlag.SHARED and item.flags & (VmaFlag.WRITE | VmaFlag.MAY_WRITE))


def backing(item: VmaItem) -> tuple[int, int, int, int, bool]:
    """What must be equal for a mapping to keep its contents where it is: kind, object, offset of address 0, kind of
    mapping. The destination keeps by it what it has; the source sends by it what the destination has not."""
    kind = VmaKind.ANON if item.kind == VmaKind.HEAP else item.kind
    offset = item.offset - item.start if item.objref else 0
    return kind, item.objref, offset, item.flags & _IDENTITY, writes_through(item)
