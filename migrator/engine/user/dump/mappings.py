"""The mappings of an address space, as records."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Protocol

from migrator.engine.stream import RecordWriter
from migrator.engine.user.dump.shm import SharedMemory, is_shm, shm_obstacle
from migrator.engine.user.dump.vma_flags import UNCARRIED, ByMapping, MappingFlags, Meaning
from migrator.engine.user.ranges import Span
from migrator.engine.user.vma_item import backing
from migrator.errors import CheckpointFailed
from migrator.image.records import MappedFile, Mm, Name, VmaFlag, VmaItem, VmaKind, Vmas
from migrator.image.records_files import FileOwner
from migrator.linux import elf, map_files, procfs
from migrator.linux.procfs import Vma

_KINDS = {
    "": VmaKind.ANON,
    "[heap]": VmaKind.HEAP,
    "[stack]": VmaKind.STACK,
    "[vdso]": VmaKind.VDSO,
    "[vvar]": VmaKind.VVAR,
    "[vvar_vclock]": VmaKind.VVAR_VCLOCK,
}
_PROT = VmaFlag.READ | VmaFlag.WRITE | VmaFlag.EXEC

SINCE = "it is so since the workload was surveyed; the workload runs on"


class Objrefs(Protocol):
    def get(self, key: object) -> tuple[int, bool]: ...


def obstacle(pid: int, vma: Vma, flags: frozenset[str], devices: Collection[int] = ()) -> str:
    """Why a mapping cannot be carried, or "". `devices`: of tmpfs mounts of the container's own."""
    if vma.path in ("[vsyscall]",) or (vma.path in _KINDS and not flags & UNCARRIED.keys()):
        return ""
    for flag, reason in UNCARRIED.items():
        if flag == "pk" and vma.execute and not vma.read and not vma.write:
            continue  # the kernel gives a key to what can be executed alone
        if flag in flags and vma.path not in ("[vvar]", "[vvar_vclock]", "[vdso]"):
            return reason
    if vma.path.startswith("[anon:") or vma.path in _KINDS:
        return ""
    if is_shm(vma, devices):
        return shm_obstacle(pid, vma, devices)
    if not vma.path.startswith("/"):
        return f"a mapping of {vma.path}"
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
        self._flags = MappingFlags()
        self._written: dict[int, ByMapping] = {}  # of the mappings as they were written
        self._obstacles: dict[int, bool] = {}  # whether there is any
        self._items: dict[int, list[VmaItem]] = {}
        # by start: what an item was made from, and why it cannot be carried
        self._made: dict[int, dict[int, tuple[Vma, Meaning, VmaItem, str]]] = {}
        self._files: dict[str, int] = {}

    def written(self, objref: int) -> bool:
        """Whether an address space and its mappings are in the stream."""
        return objref in self._items

    def write(self, pid: int, vpid: int, objref: int, vmas: list[Vma], *, stopped: bool = False) -> list[Span]:
        """Write the address space of `pid`, looking at all of it. What is not known of one that runs, such as its exact
        program break, is as it was written last. Raises CheckpointFailed for a `stopped` one that has a mapping which
        cannot be carried.

        Returns the spans that have another backing than when they were written last: what the destination
        had been sent for them is gone."""
        known = self._mms.get(objref)
        if known is None or not stopped:  # else end() does it
            self._put(objref, self._mm(pid, vpid, objref, brk_from_maps(vmas)))
        before, flags = self._written.get(objref), self._flags.look(pid, objref, vmas, stopped=stopped)
        if before is flags and self._vmas.get(objref) is vmas:
            rebacked = []
        else:
            rebacked = self._write_vmas(pid, objref, vmas, flags)
        if stopped:
            self._refuse(pid, objref)
        return rebacked

    def end(self, pid: int, vpid: int, objref: int, brk: int) -> None:
        """What there is beside the mappings, of a stopped process."""
        self._put(objref, self._mm(pid, vpid, objref, brk))

    def ahead(self, pid: int, objref: int, vmas: list[Vma]) -> None:
        """Be ready for what is to be read in the freeze, which begins now."""
        self._flags.ahead(pid, objref, vmas)

    def close(self) -> None:
        self._flags.close()

    def _put(self, objref: int, mm: Mm) -> None:
        if mm != self._mms.get(objref):
            self._mms[objref] = mm
            self._writer.write(mm)

    def _refuse(self, pid: int, objref: int) -> None:
        for vma, _, _, reason in self._made[objref].values() if self._obstacles.get(objref) else ():
            if reason:
                raise CheckpointFailed(
                    f"pid {pid}: mapping {vma.start:#x}-{vma.end:#x} is {reason}, which cannot be carried",
                    hint=SINCE,
                )

    def _write_vmas(self, pid: int, objref: int, vmas: list[Vma], flags: ByMapping) -> list[Span]:
        made = self._made.get(objref, {})
        now: dict[int, tuple[Vma, Meaning, VmaItem, str]] = {}
        for vma in vmas:
            if vma.path == "[vsyscall]":
                continue
            meaning = flags[(vma.start, vma.end, vma.path)]
            item = made.get(vma.start)
            if item is None or item[0] is not vma or item[1] is not meaning or is_shm(vma):
                reason = obstacle(pid, vma, meaning.uncarried, self._shared.tmpfs.devices)
                item = vma, meaning, self._item(pid, vma, meaning.carried), reason
            now[vma.start] = item
        self._made[objref] = now
        self._obstacles[objref] = any(reason for *_, reason in now.values())
        self._vmas[objref], self._written[objref] = vmas, flags
        items = [item for _, _, item, _ in now.values()]
        before = self._items.get(objref, [])
        if items == before:
            return []
        self._items[objref] = items
        self._writer.write(Vmas(objref, 0, items))
        return _rebacked(before, items)

    def forget(self, pid: int, objref: int) -> None:
        """An address space that is gone."""
        self._flags.forget(pid, objref)
        self._mms.pop(objref, None)
        self._vmas.pop(objref, None)
        self._written.pop(objref, None)
        self._items.pop(objref, None)
        self._made.pop(objref, None)

    def _item(self, pid: int, vma: Vma, flags: int) -> VmaItem:
        flags |= (
            (VmaFlag.READ if vma.read else 0)
            | (VmaFlag.WRITE if vma.write else 0)
            | (VmaFlag.EXEC if vma.execute else 0)
            | (VmaFlag.SHARED if vma.shared else 0)
        )
        if not vma.shared:
            flags &= ~VmaFlag.MAY_WRITE
        kind = _KINDS.get(vma.path, VmaKind.ANON)
        objref = name = 0
        offset = 0
        if kind == VmaKind.STACK:
            flags |= VmaFlag.GROWSDOWN
        if self._shared.is_shm(vma):
            kind = VmaKind.SHM
            item = self._shared.of_mapping(pid, vma)
            self._shared.describe(item, self._writer)
            objref, offset = item.objref, vma.offset
        elif vma.path.startswith("/"):
            kind = VmaKind.FILE
            objref = self.mapped_file(vma.path, lambda: map_files.open_path(pid, vma))
            offset = vma.offset
        elif vma.path.startswith("[anon:"):
            text = vma.path[6:-1]
            name, first = self._objrefs.get(("name", text))
            if first:
                self._writer.write(Name(name, 0, text))
        return VmaItem(vma.start, vma.end, offset, int(flags), kind, objref, name)

    def mapped_file(self, path: str, opened: Callable[[], int]) -> int:
        """The objref of a mapped or executed file. `opened` gives a descriptor of the very file, whatever its path
        names; it raises OSError where the process has ended, and nothing is defined then."""
        known = self._files.get(path)
        if known is None:
            fd = opened()
            try:
                status = os.fstat(fd)
                build_id = elf.build_id(f"/proc/self/fd/{fd}")
            finally:
                os.close(fd)
            known, _ = self._objrefs.get(("mapped", path))
            self._files[path] = known
            self._writer.write(MappedFile(known, status.st_mode, status.st_size, status.st_mtime_ns, path, build_id))
            if status.st_uid:
                self._writer.write(FileOwner(known, 0, status.st_uid, status.st_gid))
        return known

    def _program(self, pid: int) -> int:
        fd = os.open(f"/proc/{pid}/exe", os.O_PATH | os.O_CLOEXEC)
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
            shared = self._shared.of_program(fd, path)
            if shared is None:
                return self.mapped_file(path, lambda: os.dup(fd))
        finally:
            os.close(fd)
        self._shared.describe(shared, self._writer)
        return shared.objref

    def _mm(self, pid: int, vpid: int, objref: int, brk: int) -> Mm:
        stat = procfs.stat(pid, pid)  # that of a thread: for a process it adds up the times of all its threads
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
            exe_objref=self._program(pid),
            pid=vpid,
            auxv=auxv,
        )


def _rebacked(old: list[VmaItem], new: list[VmaItem]) -> list[tuple[int, int]]:
    """Spans of `new` private memory that were mapped, and as something else, in `old`; both sorted."""
    out = []
    i = 0
    for item in new:
        if item.flags & VmaFlag.SHARED:
            continue
        while i < len(old) and old[i].end <= item.start:
            i += 1
        if i < len(old) and old[i] is item:
            continue
        j = i
        while j < len(old) and old[j].start < item.end:
            if backing(old[j]) != backing(item):
                out.append((max(old[j].start, item.start), min(old[j].end, item.end)))
            j += 1
    return out


def brk_from_maps(vmas: list[Vma]) -> int:
    """The program break as far as mappings tell: the end of the heap, 0 if there is none."""
    return next((v.end for v in reversed(vmas) if v.path == "[heap]"), 0)
