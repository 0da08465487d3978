"""/proc/PID as Python values (proc(5)). Nothing is cached; a vanished process raises ProcessLookupError
or FileNotFoundError, as the kernel says it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

_UNLIMITED = (1 << 64) - 1  # as RLIM_INFINITY
_PF_EXITING = 4  # include/linux/sched.h
ENDING_SECONDS = 1.0  # that a process may take to end once it has begun to


@dataclass(slots=True, frozen=True)
class Vma:
    """One line of /proc/PID/maps. `offset` in bytes; `path` as shown, "" for anonymous memory."""

    start: int
    end: int
    read: bool
    write: bool
    execute: bool
    shared: bool
    offset: int
    device: str
    inode: int
    path: str


def read_bytes(path: str) -> bytes:
    """The whole of a file of /proc."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = [os.read(fd, 65536)]
        while parts[-1]:
            # a short read of a seq_file is no end: only an empty one is
            parts.append(os.read(fd, 65536))
        return b"".join(parts)
    finally:
        os.close(fd)


def read_text(path: str) -> str:
    return read_bytes(path).decode("utf-8", "surrogateescape")


def maps(pid: int) -> list[Vma]:
    """The mappings of a process, in order of address. Backslash-012 in names is undone."""
    return parse_maps(read_text(f"/proc/{pid}/maps"))


def parse_maps(text: str, lines: dict[str, Vma] | None = None) -> list[Vma]:
    """/proc/PID/maps as values. `lines`: those of the last time, which are not parsed again; replaced by today's.

    The kernel gives it out in pieces, between which a running process may change: of mappings that were
    seen twice, overlapping, the first is kept."""
    before, now = {} if lines is None else lines.copy(), {}
    end = 0
    for line in text.split("\n"):
        if not line:
            continue
        vma = before.get(line) or _vma(line)
        if vma.start >= end:
            now[line] = vma
            end = vma.end
    if lines is not None:
        lines.clear()
        lines.update(now)
    return list(now.values())


def _vma(line: str) -> Vma:
    span, perms, offset, device, inode, *rest = line.split(None, 5)
    start, _, end = span.partition("-")
    return Vma(
        int(start, 16),
        int(end, 16),
        perms[0] == "r",
        perms[1] == "w",
        perms[2] == "x",
        perms[3] == "s",
        int(offset, 16),
        device,
        int(inode),
        rest[0].replace("\\012", "\n") if rest else "",
    )


def vm_flags(pid: int) -> dict[int, frozenset[str]]:
    """start address -> VmFlags of every mapping, from smaps, with "pk" if it has a protection key: walks the page
    tables, so not for a frozen tree."""
    return parse_vm_flags(read_text(f"/proc/{pid}/smaps"))


def parse_vm_flags(smaps: str) -> dict[int, frozenset[str]]:
    """vm_flags() of the text of smaps."""
    out = {}
    start = 0
    key = False
    for line in smaps.split("\n"):
        if line.startswith("VmFlags:"):
            out[start] = frozenset(line[8:].split() + ["pk"] * key)
            key = False
        elif line.startswith("ProtectionKey:"):
            key = int(line.split()[1]) != 0
        elif line[:1].isdigit() or line[:1] in "abcdef":
            head = line.split("-", 1)
            if len(head) == 2:
                try:
                    start = int(head[0], 16)
                except ValueError:
                    continue
    return out


def numa_policies(pid: int) -> set[str]:
    """Of the mappings of a process, and of its leader; walks the page tables as vm_flags() does."""
    try:
        text = read_text(f"/proc/{pid}/numa_maps")
    except FileNotFoundError:
        if not os.path.exists(f"/proc/{pid}"):
            raise
        return set()  # a kernel without NUMA
    return {words[1] for line in text.splitlines() if len(words := line.split(" ", 2)) > 1}


def tids(pid: int) -> list[int]:
    """The threads of a process, leader first."""
    out = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    if pid in out:
        out.remove(pid)
        out.insert(0, pid)
    return out


def children(pid: int) -> list[int]:
    """The children of a process, of all its threads."""
    out: list[int] = []
    for tid in os.listdir(f"/proc/{pid}/task"):
        try:
            out += [int(c) for c in read_text(f"/proc/{pid}/task/{tid}/children").split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return out


def descendants(pid: int) -> list[int]:
    """`pid` and everything below it, parents before children."""
    out = [pid]
    for p in out:
        try:
            out += children(p)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return out


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    path = f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status"
    # a name with a line break in it shows it escaped
    pairs = (line.split(":\t", 1) for line in read_text(path).split("\n") if ":\t" in line)
    return {key: value.strip() for key, value in pairs}


def stat(pid: int, tid: int | None = None) -> list[str]:
    """Fields of /proc/PID/stat, counted as in proc(5): field N is at index N; index 0 is unused."""
    path = f"/proc/{pid}/stat" if tid is None else f"/proc/{pid}/task/{tid}/stat"
    text = read_text(path)
    head, _, tail = text.rpartition(")")
    number, _, comm = head.partition("(")
    return ["", number.strip(), comm, *tail.split()]


def has_ended(pid: int, start: int, seconds: float = 0.0) -> bool:
    """Whether the process that began at `start` has ended, all its threads with it. One that is just ending is given so
    many seconds for it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fields = stat(pid)
            if fields[3] in "ZX" and all(stat(pid, tid)[3] in "ZX" for tid in tids(pid)):
                return True
        except (FileNotFoundError, ProcessLookupError):
            if not os.path.exists(f"/proc/{pid}"):
                return True
            continue  # one of its threads
        if int(fields[22]) != start:
            return True
        if not int(fields[9]) & _PF_EXITING or time.monotonic() > deadline:
            return False
        time.sleep(0.002)


def open_files_limits(pid: int) -> tuple[int, int]:
    """(soft, hard) limit of descriptors of a task. prlimit(2) would want CAP_SYS_RESOURCE for one of another user."""
    (line,) = [line for line in read_text(f"/proc/{pid}/limits").split("\n") if line.startswith("Max open files")]
    soft, hard = (_UNLIMITED if word == "unlimited" else int(word) for word in line.split()[3:5])
    return soft, hard


def ns_pid(state: dict[str, str], field: str = "NSpid") -> int:
    """The innermost pid of a task, from its status."""
    return int(state[field].split()[-1])


def start_time(pid: int) -> int:
    """Clock ticks since boot at which the process began: with the pid, its identity."""
    return int(stat(pid)[22])
