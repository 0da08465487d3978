"""The mappings of an address space, as records."""

from __future__ import annotations

import bisect
import itertools
import os
from dataclasses import replace
from typing import Protocol

from migrator.engine.stream import RecordWriter
from migrator.engine.user.dump.shm import SharedMemory, device_key, is_shm
from migrator.image.records import MappedFile, Mm, Name, VmaFlag, VmaItem, VmaKind, Vmas
from migrator.linux import elf, procfs
from migrator.linux.procfs import Vma

_KINDS = {
    "": VmaKind.ANON,
    "[heap]": VmaKind.HEAP,
    "[stack]": VmaKind.STACK,
    "[vdso]": VmaKind.VDSO,
    "[vvar]": VmaKind.VVAR,
    "[vvar_vclock]": VmaKind.VVAR_VCLOCK,
}
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
}
_PROT = VmaFlag.READ | VmaFlag.WRITE | VmaFlag.EXEC
_UNCARRIED = {
    "io": "device memory",
    "pf": "raw page frames",
    "ht": "huge pages of hugetlbfs",
    "um": "watched by a userfaultfd of its own",
    "uw": "write-protected by a userfaultfd",
    "ui": "watched by a userfaultfd of its own",
    "ss": "a shadow stack",
    "sl": "sealed by mseal(2)",
}


class Objrefs(Protocol):
    def get(self, key: object) -> tuple[int, bool]: ...


def obstacle(vma: Vma, flags: frozenset[str]) -> str:
    """Why a mapping cannot be carried, or ""."""
    if vma.path in ("[vsyscall]",) or (vma.path in _KINDS and not flags & _UNCARRIED.keys()):
        return ""
    for flag, reason in _UNCARRIED.items():
        if flag in flags and vma.path not in ("[vvar]", "[vvar_vclock]", "[vdso]"):
            return reason
    if vma.path.startswith("[anon:") or is_shm(vma) or vma.path in _KINDS:
        return ""
    if vma.path.startswith("/SYSV"):
        return "System V shared memory"
    if not vma.path.startswith("/"):
        return f"a mapping of {vma.path}"
    if vma.path.endswith(" (deleted)"):
        return f"a mapping of the deleted file {vma.path.removesuffix(' (deleted)')}"
    if vma.path.startswith("/dev/") and not vma.path.startswith("/dev/shm/"):
        return f"a mapping of the device {vma.path}"
    return ""


class LayoutDump:
    """Writes `Mm`, `Vmas` and what they refer to; only what changed since the last time."""

    def __init__(self, writer: RecordWriter, objrefs: Objrefs, shared: SharedMemory) -> None:
        self._writer = writer
        self._objrefs = objrefs
        self._shared = shared
        self._mms: dict[int, Mm] = {}
        self._vmas: dict[int, list[Vma]] = {}
        self._flags: dict[int, dict[tuple[int, int, str], int]] = {}
        self._items: dict[int, list[VmaItem]] = {}
        self._files: dict[str, int] = {}

    def brk_of(self, objref: int) -> int:
        """The program break as it was written last, 0 if it was not."""
        known = self._mms.get(objref)
        return known.brk if known is not None else 0

    def knows(self, objref: int) -> bool:
        return objref in self._flags

    def write(
        self, pid: int, vpid: int, objref: int, vmas: list[Vma], brk: int, *, refresh_flags: bool
    ) -> list[tuple[int, int]]:
        """Write the address space of `pid`. `refresh_flags` reads smaps, which takes time on a big one.

        Returns the spans that have another backing than when they were written last: what the destination
        had been sent for them is gone."""
        known = self._mms.get(objref)
        if brk and known is not None and not refresh_flags:
            mm = replace(known, brk=brk)
            if self._vmas.get(objref) is vmas:  # not read anew since: nothing has changed
                if mm != known:
                    self._mms[objref] = mm
                    self._writer.write(mm)
                return []
        else:
            mm = self._mm(pid, vpid, objref, brk or brk_from_maps(vmas))
        flags = self._flags_of(pid, objref, vmas, refresh_flags)
        items = []
        for vma in vmas:
            if vma.path == "[vsyscall]":
                continue
            items.append(self._item(pid, vma, flags.get((vma.start, vma.end, vma.path), 0)))
        self._vmas[objref] = vmas
        if mm != known:
            self._mms[objref] = mm
            self._writer.write(mm)
        before = self._items.get(objref, [])
        if items == before:
            return []
        self._items[objref] = items
        self._writer.write(Vmas(objref, 0, items))
        return _rebacked(before, items)

    def forget(self, objref: int) -> None:
        """An address space that is gone."""
        self._mms.pop(objref, None)
        self._vmas.pop(objref, None)
        self._flags.pop(objref, None)
        self._items.pop(objref, None)

    def _flags_of(self, pid: int, objref: int, vmas: list[Vma], refresh: bool) -> dict[tuple[int, int, str], int]:
        before = self._flags.get(objref)
        if before is not None and not refresh:
            new = [vma for vma in vmas if (vma.start, vma.end, vma.path) not in before]
            if not new or _take_over(before, new):
                return before
        raw = procfs.vm_flags(pid)
        fresh = {}
        for vma in vmas:
            bits = 0
            for name in raw.get(vma.start, frozenset()):
                bits |= _FLAGS.get(name, 0)
            fresh[(vma.start, vma.end, vma.path)] = bits
        self._flags[objref] = fresh
        return fresh

    def _item(self, pid: int, vma: Vma, flags: int) -> VmaItem:
        flags |= (
            (VmaFlag.READ if vma.read else 0)
            | (VmaFlag.WRITE if vma.write else 0)
            | (VmaFlag.EXEC if vma.execute else 0)
            | (VmaFlag.SHARED if vma.shared else 0)
        )
        kind = _KINDS.get(vma.path, VmaKind.ANON)
        objref = name = 0
        offset = 0
        if kind == VmaKind.STACK:
            flags |= VmaFlag.GROWSDOWN
        if is_shm(vma):
            kind = VmaKind.SHM
            objref, _ = self._objrefs.get(("shm", *device_key(vma)))
            self._shared.describe(self._shared.of_mapping(pid, vma, objref), self._writer)
            offset = vma.offset
        elif vma.path.startswith("/"):
            kind = VmaKind.FILE
            objref = self.mapped_file(pid, vma.path, f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}")
            offset = vma.offset
        elif vma.path.startswith("[anon:"):
            text = vma.path[6:-1]
            name, first = self._objrefs.get(("name", text))
            if first:
                self._writer.write(Name(name, 0, text))
        return VmaItem(vma.start, vma.end, offset, int(flags), kind, objref, name)

    def mapped_file(self, pid: int, path: str, link: str) -> int:
        """The objref of a mapped or executed file; `link` leads to the very file, whatever its path names."""
        known = self._files.get(path)
        if known is None:
            status = os.stat(link)  # fails where the process has ended: nothing is defined then
            build_id = elf.build_id(link)
            known, _ = self._objrefs.get(("mapped", path))
            self._files[path] = known
            self._writer.write(MappedFile(known, status.st_mode, status.st_size, status.st_mtime_ns, path, build_id))
        return known

    def _mm(self, pid: int, vpid: int, objref: int, brk: int) -> Mm:
        stat = procfs.stat(pid)
        path = os.readlink(f"/proc/{pid}/exe")
        with open(f"/proc/{pid}/auxv", "rb") as file:
            auxv = file.read()
        return Mm(
            objref=objref,
            oom_score_adj=int(procfs.read_text(f"/proc/{pid}/oom_score_adj")),
            start_code=int(stat[26]),
            end_code=int(stat[27]),
            start_data=int(stat[45]),
            end_data=int(stat[46]),
            start_brk=int(stat[47]),
            brk=brk or int(stat[47]),
            start_stack=int(stat[28]),
            arg_start=int(stat[48]),
            arg_end=int(stat[49]),
            env_start=int(stat[50]),
            env_end=int(stat[51]),
            exe_objref=self.mapped_file(pid, path, f"/proc/{pid}/exe"),
            pid=vpid,
            auxv=auxv,
        )


def _take_over(flags: dict[tuple[int, int, str], int], new: list[Vma]) -> bool:
    """A grown, split or merged mapping keeps the flags of what it was; False if one is of no such origin."""
    known = sorted(flags.items())
    ends = list(itertools.accumulate((end for (_, end, _), _ in known), max))  # of all up to there
    found = {}
    for vma in new:
        at = bisect.bisect_right(ends, vma.start)
        while at < len(known) and known[at][0][0] < vma.end:
            (_, end, path), bits = known[at]
            if path == vma.path and end > vma.start:
                found[vma.start, vma.end, vma.path] = bits
                break
            at += 1
        else:
            return False
    flags.update(found)
    return True


def _rebacked(old: list[VmaItem], new: list[VmaItem]) -> list[tuple[int, int]]:
    """Spans of `new` private memory that were mapped, and as something else, in `old`; both sorted."""
    out = []
    i = 0
    for item in new:
        if item.flags & VmaFlag.SHARED:
            continue
        while i < len(old) and old[i].end <= item.start:
            i += 1
        j = i
        while j < len(old) and old[j].start < item.end:
            if _backing(old[j]) != _backing(item):
                out.append((max(old[j].start, item.start), min(old[j].end, item.end)))
            j += 1
    return out


def _backing(item: VmaItem) -> tuple[int, ...]:
    # must not call equal what migrator.engine.user.restore.mappings takes for different
    kind = VmaKind.ANON if item.kind == VmaKind.HEAP else item.kind
    return kind, item.objref, item.offset - item.start if item.objref else 0, item.flags & ~_PROT


def brk_from_maps(vmas: list[Vma]) -> int:
    """The program break as far as mappings tell: the end of the heap, 0 if there is none."""
    return next((v.end for v in reversed(vmas) if v.path == "[heap]"), 0)
