"""The flags of mappings (VmFlags of proc(5)): what was advised, locked, sealed.

A program can change them at any moment, and nothing else shows it, so they are read again in the freeze. smaps takes
too long for that. The kernel's own words (migrator.linux.vma_flags) are read in no time; what a word means is learnt
from smaps while the tasks run, and smaps is read in the freeze only where a word is new. On a kernel that does not
give them smaps is read again in each round, ahead of the freeze, and in it if that takes no time either, or if more
or less memory is locked than before.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from migrator.image.records import VmaFlag
from migrator.linux import procfs
from migrator.linux.procfs import Vma
from migrator.linux.vma_flags import WORDS, VmaFlags

_FLAGS = {
    "gd": VmaFlag.GROWSDOWN,
    "lo": VmaFlag.LOCKED,
    "nr": VmaFlag.NORESERVE,
    "dc": VmaFlag.DONTFORK,
    "dd": VmaFlag.DONTDUMP,
    "wf": VmaFlag.WIPEONFORK,
    "hg": VmaFlag.HUGEPAGE,
    "nh": VmaFlag.NOHUGEPAGE,
    "mg": VmaFlag.MERGEABLE,
    "rr": VmaFlag.RANDOM,
    "sr": VmaFlag.SEQUENTIAL,
    "dp": VmaFlag.DROPPABLE,
    "mw": VmaFlag.MAY_WRITE,
    "lf": VmaFlag.LOCKED_ONFAULT,
}
UNCARRIED = {
    "io": "device memory",
    "pf": "raw page frames",
    "ht": "huge pages of hugetlbfs",
    "um": "watched by a userfaultfd of its own",
    "uw": "write-protected by a userfaultfd",
    "ui": "watched by a userfaultfd of its own",
    "ss": "a shadow stack",
    "sl": "sealed by mseal(2)",
    "pk": "under a protection key (pkey_mprotect(2))",
}
_OURS = "uw"  # of what is tracked
_QUICK = 0.005  # seconds for which smaps may be read in the freeze
_Key = tuple[int, int, str]  # start, end, path


class Meaning(NamedTuple):
    """Of the flags of a mapping: those that are carried, and the names of those that cannot be."""

    carried: int
    uncarried: frozenset[str]


_NONE = Meaning(0, frozenset())
ByMapping = dict[_Key, Meaning]


@dataclass(slots=True)
class _Seen:
    """What was seen last of an address space."""

    vmas: list[Vma]
    flags: ByMapping
    words: array[int] | None
    took: float = 0.0  # seconds, to read smaps
    locked: str = ""  # VmLck


class MappingFlags:
    """Those of all address spaces of a tree, by objref."""

    def __init__(self) -> None:
        self._reader = VmaFlags()
        self._seen: dict[int, _Seen] = {}
        self._meanings: dict[int, Meaning | None] = {}  # by the kernel's word; None: it has meant two things
        self._interned: dict[Meaning, Meaning] = {_NONE: _NONE}

    def forget(self, pid: int, objref: int) -> None:
        self._seen.pop(objref, None)
        self._reader.forget(pid)

    def close(self) -> None:
        self._reader.close()

    def ahead(self, pid: int, objref: int, vmas: list[Vma]) -> None:
        """The last thing ahead of the freeze, of one that was looked at before."""
        if not self._reader.prepare(pid) and objref in self._seen:
            self._from_smaps(pid, objref, vmas)

    def look(self, pid: int, objref: int, vmas: list[Vma], *, stopped: bool) -> ByMapping:
        """Read them. The same dictionary as the last time if nothing has changed."""
        seen, words = self._seen.get(objref), self._reader.read(pid)
        if words is None:
            return self._without_words(pid, objref, vmas, stopped=stopped)
        if seen is not None and seen.vmas is vmas and seen.words == words:
            return seen.flags
        flags = self._translated(vmas, words)
        if flags is None:
            return self._from_smaps(pid, objref, vmas, words)
        self._seen[objref] = _Seen(vmas, flags, words)
        return flags

    # ------------------------------------------------------------------ inside

    def _translated(self, vmas: list[Vma], words: array[int]) -> ByMapping | None:
        """None if there is a word whose meaning is not known, or a mapping without one."""
        by_start = dict(zip(words[0::WORDS], words[2::WORDS], strict=True))
        meanings, out = self._meanings, {}
        for vma in vmas:
            word = by_start.get(vma.start)
            meaning = meanings.get(word) if word is not None else None
            if meaning is None:
                if vma.path != "[vsyscall]":  # which no process has in its list
                    return None
                meaning = _NONE
            out[(vma.start, vma.end, vma.path)] = meaning
        return out

    def _from_smaps(self, pid: int, objref: int, vmas: list[Vma], words: array[int] | None = None) -> ByMapping:
        """`words`: as they were just now, to learn what they mean."""
        begun = time.monotonic()
        locked = procfs.status(pid).get("VmLck", "") if words is None else ""
        raw = procfs.vm_flags(pid)
        took = time.monotonic() - begun
        if words is not None and self._reader.read(pid) == words:
            self._learn(words, raw)
        flags = {}
        for vma in vmas:
            flags[(vma.start, vma.end, vma.path)] = self._meaning(raw.get(vma.start, frozenset()))
        self._seen[objref] = _Seen(vmas, flags, words, took, locked)
        return flags

    def _learn(self, words: array[int], raw: Mapping[int, frozenset[str]]) -> None:
        for start, word in zip(words[0::WORDS], words[2::WORDS], strict=True):
            if start in raw:
                meaning = self._meaning(raw[start])
                if self._meanings.setdefault(word, meaning) != meaning:
                    self._meanings[word] = None

    def _meaning(self, names: frozenset[str]) -> Meaning:
        carried = 0
        for name in names:
            carried |= _FLAGS.get(name, 0)
        made = Meaning(int(carried), names & UNCARRIED.keys() - {_OURS})
        return self._interned.setdefault(made, made)

    def _without_words(self, pid: int, objref: int, vmas: list[Vma], *, stopped: bool) -> ByMapping:
        seen = self._seen.get(objref)
        if stopped and seen is not None and sum(known.took for known in self._seen.values()) > _QUICK:
            fresh = seen.flags if seen.vmas is vmas else inherited(seen.flags, vmas)
            if fresh is not None and procfs.status(pid).get("VmLck", "") == seen.locked:
                seen.vmas, seen.flags = vmas, fresh
                return fresh
        return self._from_smaps(pid, objref, vmas)


def inherited(before: ByMapping, vmas: list[Vma]) -> ByMapping | None:
    """The flags of `vmas`: a grown, split or merged mapping keeps those of what it was. None if one is of no other."""
    fresh: ByMapping = {}
    old: list[tuple[_Key, Meaning]] = []
    ends: list[int] = []
    for vma in vmas:
        key = (vma.start, vma.end, vma.path)
        flags = before.get(key)
        if flags is None:
            if not old:
                old = sorted(before.items())
                ends = [end for (_, end, _), _ in old]
            for (start, _, path), known in islice(old, bisect_right(ends, vma.start), None):
                if start >= vma.end:
                    return None
                if path == vma.path:
                    flags = known
                    break
            else:
                return None
        fresh[key] = flags
    return fresh
