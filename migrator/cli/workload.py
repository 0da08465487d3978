"""What a user names: a pid or a container."""

from __future__ import annotations

import os
from dataclasses import dataclass

from migrator import container
from migrator.container.state import of_pid
from migrator.engine.base import SourceOptions
from migrator.engine.contained import source_options
from migrator.errors import UsageError
from migrator.linux import procfs
from migrator.linux.cgroup import Cgroup


@dataclass(frozen=True)
class Workload:
    """A process tree by its root's pid, and the container that it is, if it is one."""

    pid: int
    container: container.Container | None

    @property
    def name(self) -> str:
        return self.container.name if self.container is not None else str(self.pid)

    def source_options(self) -> SourceOptions:
        return source_options(self.container)


def find_workload(target: str) -> Workload:
    """The workload that `target` names: a container's name first, then a pid. Raises UsageError."""
    found = container.find(target)
    if found is not None:
        if not found.alive:
            raise UsageError(f"container {target!r} has ended", hint="`migrator ps` lists those that run")
        return _movable(Workload(found.init_pid, found))
    if not target.isdigit():
        raise UsageError(
            f"there is no container {target!r} on this host", hint="`migrator ps` lists them; a pid works too"
        )
    pid = int(target)
    if pid <= 0 or not os.path.exists(f"/proc/{pid}"):
        raise UsageError(f"there is no process {pid} on this host")
    inside = of_pid(pid)
    if inside is not None and inside.init_pid == pid:
        return _movable(Workload(pid, inside))
    if inside is not None:
        raise UsageError(
            f"pid {pid} lives in container {inside.name!r}", hint=f"move the whole container: {inside.name}"
        )
    if not _has_memory(pid):
        raise UsageError(
            f"pid {pid} ({_name(pid)}) has no memory of its own: a thread of the kernel, or a process that has ended"
        )
    return _movable(Workload(pid, None))


def _movable(workload: Workload) -> Workload:
    """A frozen task cannot be stopped and asked, and why it is frozen is not ours to overrule."""
    try:
        with Cgroup.of(workload.pid) as group:
            frozen = group.frozen
    except (UsageError, OSError, LookupError):
        return workload
    if frozen:
        raise UsageError(
            f"{workload.name} is frozen, in {group.path}",
            hint=f"`migrator settle` if a migration was not decided, else `migrator thaw {workload.name}`",
        )
    return workload


def _has_memory(pid: int) -> bool:
    """Neither a thread of the kernel nor a zombie, which both have no size."""
    try:
        return "VmSize" in procfs.status(pid)
    except OSError:
        return False


def _name(pid: int) -> str:
    try:
        return procfs.status(pid).get("Name", "?")
    except OSError:
        return "?"
