"""A stretch of address space as it is mapped in a stub now."""

from __future__ import annotations

from dataclasses import dataclass

from migrator.image.records import VmaItem


@dataclass(slots=True)
class Piece:
    start: int
    end: int
    item: VmaItem
