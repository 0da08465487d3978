"""What of the tasks of a running tree is carried, and yet will not be quite the same, or does not come along."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from migrator.engine.user.dump.process import Process
from migrator.linux import procfs, sys
from migrator.linux.cgroup import PARENT

_UNSET = (1 << 32) - 1
_SHOWN = 8


def notes(processes: Sequence[Process]) -> Iterator[tuple[str, str]]:
    """(what it is about, what will be different); the tasks run on all the while."""
    logins: dict[int, list[int]] = {}
    filters: dict[str, list[int]] = {}
    ours = procfs.read_text("/proc/self/coredump_filter").strip()
    groups: dict[str, list[int]] = {}
    stopped: list[int] = []
    slices: list[int] = []
    clamps: list[int] = []
    cores: list[int] = []
    for process in processes:
        try:
            logins.setdefault(_login_uid(process.pid), []).append(process.pid)
            filters.setdefault(procfs.read_text(f"/proc/{process.pid}/coredump_filter").strip(), []).append(process.pid)
            if procfs.stat(process.pid)[3] == "T":
                stopped.append(process.pid)
            tids = procfs.tids(process.pid)
            if any(_has_slice(tid) for tid in tids):
                slices.append(process.pid)
            if any(_has_clamps(tid) for tid in tids):
                clamps.append(process.pid)
            if any(sys.core_cookie(tid) for tid in tids):
                cores.append(process.pid)
            for where in _cgroups(process.pid):
                groups.setdefault(where, []).append(process.pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended
    for uid, pids in logins.items():
        if uid != _UNSET:
            yield _about(pids), f"the login uid {uid} (audit) will be that of the agent"
    for value, pids in filters.items():
        if value not in (ours, ""):
            yield _about(pids), f"the filter {value} of core dumps (coredump_filter) will be that of the agent"
    if stopped:
        yield _about(stopped), "that it is stopped will be told to its parent once more (WUNTRACED)"
    if slices:
        yield _about(slices), "a time slice of its own (sched_setattr) will be that of the host"
    if clamps:
        yield _about(clamps), "bounds of its utilization (sched_setattr) do not come along"
    if cores:
        yield _about(cores), "that it shares no core with others (PR_SCHED_CORE) does not come along"
    for where, pids in groups.items():
        yield _about(pids), f"the cgroup {where} and its limits do not come along"


def _about(pids: Sequence[int]) -> str:
    return f"pid {', '.join(map(str, pids[:_SHOWN]))}{', …' if pids[_SHOWN:] else ''}"


def _has_slice(tid: int) -> bool:
    """The kernel's own is that of this thread, or was when the task ran last: a part of it, with fewer processors."""
    try:
        theirs, ours = sys.time_slice(tid), sys.time_slice(0)
    except OSError:
        return False  # it ended
    return bool(theirs and ours and ours % theirs and theirs % ours) or theirs > 8 * ours


def _has_clamps(tid: int) -> bool:
    """The kernel gives real-time tasks others than the rest, which the host chooses."""
    try:
        if os.sched_getscheduler(tid) in (os.SCHED_FIFO, os.SCHED_RR):
            return False
    except OSError:
        return False
    return sys.utilization_clamps(tid) not in ((0, 0), (0, 1024))


def _login_uid(pid: int) -> int:
    try:
        return int(procfs.read_text(f"/proc/{pid}/loginuid"))
    except FileNotFoundError:
        if not procfs.tids(pid):
            raise
        return _UNSET  # a kernel without audit


def _cgroups(pid: int) -> Iterator[str]:
    """The cgroups that somebody gave a process, by the controllers of version 1, or "unified"; not those of ours."""
    for line in procfs.read_text(f"/proc/{pid}/cgroup").strip().split("\n"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        ours = path.split("/")[1:2] == [PARENT]
        if path not in ("/", "") and not ours:
            yield f"{path} ({controllers or 'unified'})"
