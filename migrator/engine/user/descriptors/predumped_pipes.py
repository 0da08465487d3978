"""Pre-dumped pipes: made on the other side ahead of the freeze, so that only what waits in them is left for it.

A pipe counts as pre-dumped in the end if it has the usual capacity and all of its ends are as they were written. Else
it is written anew, as another object; unreferenced ones are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from migrator.engine.user.descriptors.ahead import Facts, Place, Writer, facts_of, file_record, owner_record, same
from migrator.engine.user.descriptors.description import Description
from migrator.engine.user.descriptors.found import Found
from migrator.engine.user.descriptors.pipes import USUAL
from migrator.image.records_files import FileKind, Pipe
from migrator.linux import descriptors


class _Pipe(NamedTuple):
    objref: int
    mode: int


class End(NamedTuple):
    objref: int  # of its File
    facts: Facts


class PredumpedPipes:
    def __init__(self, new: Callable[[], int], writer: Writer) -> None:
        """`new` gives out objrefs."""
        self._new = new
        self._writer = writer
        self._pipes: dict[tuple[int, int], _Pipe] = {}
        self._ends: dict[Place, End] = {}
        self._first: set[tuple[int, int, int]] = set()  # inode and way of ends that came with their pipe
        self._alike: dict[Facts, list[Place]] = {}

    def predump(self, found: Iterable[Found]) -> Iterator[tuple[int, int]]:
        """Write pipes that a running process has open; of each number the objref of its File.

        Nothing is held meanwhile, so the capacity is not known: that of most pipes is taken for it."""
        for item in found:
            if objref := self._end((item.process.pid, item.number), item.status, item.info.flags):
                yield item.number, objref

    def found_whole(self) -> Iterator[tuple[int, tuple[int, int], list[tuple[Place, End]]]]:
        """Pipes of which one end for reading was found, and one for writing: objref, inode, and both in that order."""
        ends: dict[tuple[int, int], list[tuple[Place, End]]] = {}
        for place, end in self._ends.items():
            ends.setdefault(end.facts[:2], []).append((place, end))
        for inode, found in ends.items():
            found.sort(key=lambda pair: pair[1].facts[3] & os.O_ACCMODE)
            ways = [end.facts[3] & (os.O_ACCMODE | os.O_DIRECT) for _, end in found]
            if ways == [os.O_RDONLY, os.O_WRONLY]:
                yield self._pipes[inode].objref, inode, found

    def find(self, ends: Sequence[Description], capacity: int) -> int:
        """The objref of a pipe of the stopped tree, and its ends have theirs; 0 if it is not as it was written."""
        known = self._pipes.get(ends[0].inode)
        if known is None or capacity != USUAL:
            return 0
        objrefs: list[int] = []
        for end in ends:
            facts = facts_of(end.stat, end.flags)
            for process, number in end.holders:
                there = self._ends.get((process.pid, number))
                if there is not None and there.facts == facts and there.objref not in objrefs:
                    objrefs.append(there.objref)
                    break
            else:
                return 0
            if end.owned or end.info.locks:
                return 0
        for end, objref in zip(ends, objrefs, strict=True):
            end.objref, end.predumped = objref, True
        return known.objref

    def _end(self, place: Place, status: os.stat_result, flags: int) -> int:
        """The objref of what is open there; 0 if that has changed since it was written, and is left for the end."""
        key = status.st_dev, status.st_ino
        facts = facts_of(status, flags)
        before = self._ends.get(place)
        if before is not None and before.facts == facts:
            return before.objref
        others = self._alike.setdefault(facts, [])
        for other in others:
            if self._ends[other].facts == facts and same(place, other):
                self._ends[place] = self._ends[other]
                return self._ends[other].objref
        pipe = self._pipes.get(key)
        if pipe is None:
            pipe = self._pipes[key] = _Pipe(self._new(), status.st_mode)
            self._writer.encoded(Pipe(pipe.objref, USUAL).encode())
        if pipe.mode != status.st_mode:
            return 0
        if not flags & descriptors.O_LARGEFILE:  # an end that came with the pipe: there is one for each way
            way = *key, flags & os.O_ACCMODE
            if way in self._first:
                return 0
            self._first.add(way)
        objref = self._new()
        rec = file_record(objref, FileKind.PIPE, status, flags, inode_objref=pipe.objref)
        self._writer.encoded(rec.encode())
        if (owner := owner_record(objref, status)) is not None:
            self._writer.encoded(owner.encode())
        self._ends[place] = End(objref, facts)
        others.append(place)
        return objref
