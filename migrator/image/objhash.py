"""Objects that are shared, saved once: the first to meet one saves it, the others refer to it.

    objref, first = objhash.get(("mm", identity))
    if first:
        writer.write(Mm(objref=objref, ...))

Objrefs are positive and given out in order of appearance; 0 is "none" in every field that holds one.
"""

from __future__ import annotations

from collections.abc import Hashable


class ObjHash:
    """From a key (whatever tells two objects apart) to the objref of the object."""

    def __init__(self) -> None:
        self._objrefs: dict[Hashable, int] = {}

    def get(self, key: Hashable) -> tuple[int, bool]:
        """(objref, first): `first` is true for the call that gave it out, which must save the object."""
        objref = self._objrefs.get(key)
        if objref is not None:
            return objref, False
        objref = len(self._objrefs) + 1
        self._objrefs[key] = objref
        return objref, True

    def find(self, key: Hashable) -> int:
        """The objref of an object that was met before, or 0."""
        return self._objrefs.get(key, 0)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._objrefs

    def __len__(self) -> int:
        return len(self._objrefs)
