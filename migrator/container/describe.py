"""What a container is now, whatever it was started with; and what about it cannot be built again."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from migrator.container import mounts, network, state, sysctls
from migrator.container.spec import ContainerSpec
from migrator.container.state import Container, host_name, list_containers, now
from migrator.errors import UsageError
from migrator.linux import pidfd, procfs
from migrator.linux.cgroup import Cgroup
from migrator.linux.namespaces import run_in

T = TypeVar("T")


def _tells_ending(read: Callable[[Container], T]) -> Callable[[Container | int], T]:
    """Let `read` take a pid as well, and raise UsageError for a container that ends while it reads.

    A process that exits loses its namespaces before it counts as ended: what is read of it then fails in many
    ways (EINVAL from mountinfo, ENOENT from ns/, ESRCH), which all mean the same."""

    @functools.wraps(read)
    def told(container: Container | int) -> T:
        found = _container(container)
        try:
            return read(found)
        except OSError:
            if not _ends(found, within=1.0):
                raise
            raise UsageError(f"container {found.name} has ended") from None

    return told


def _ends(container: Container, within: float) -> bool:
    """Whether process 1 ends within so many seconds."""
    try:
        fd = os.pidfd_open(container.init_pid)
    except ProcessLookupError:
        return True
    try:
        return not container.alive or pidfd.ends(fd, within)
    finally:
        os.close(fd)


@_tells_ending
def describe(container: Container) -> ContainerSpec:
    """The specification with the addresses, routes, host name, sysctls and tmpfs mounts of this moment.

    Takes a container, or the pid of any process in one. Nothing is stopped or changed. Takes some
    milliseconds, so not for the time of the freeze. Raises UsageError for a pid that is in no container,
    and for a container that ends meanwhile.
    """
    net = network.read(container.init_pid)
    # /dev/shm and the like that prepare() mounts by itself need not be told, unless their options differ.
    own = tuple(fs for fs in mounts.own_tmpfs(container) if fs != mounts.SHM and fs.path != "/dev")
    spec = replace(
        container.spec,
        hostname=run_in(container.init_pid, {"uts"}, socket.gethostname),
        loopback=net.loopback,
        tmpfs=own,
        sysctls=sysctls.changed(container.init_pid),
    )
    if not spec.bridge:
        return spec
    return replace(
        spec,
        mac=net.mac,
        mtu=net.mtu,
        addresses=net.addresses,
        routes=net.routes,
        neighbours=net.neighbours,
    )


@_tells_ending
def obstacles(container: Container) -> list[str]:
    """Why the surroundings of a container cannot be built again elsewhere: one sentence each, empty if
    they can. To be asked before anything is stopped. Raises UsageError as `describe()` does."""
    pid = container.init_pid
    net = network.read(pid)
    found = [f"pid {pid}: network device {name!r} in the container is not carried" for name in net.other_links]
    more = (*net.extras, *mounts.narrowed(container))
    found += [f"pid {pid}: {what} in the container is not carried" for what in more]
    for m in mounts.own(container):
        if m.kind != "tmpfs":
            found.append(f"pid {pid}: the mount of {m.kind} at {m.path!r} is not carried")
    return found


@_tells_ending
def tmpfs_paths(container: Container) -> list[str]:
    """Where the tmpfs mounts are that are its own. Raises UsageError as `describe()` does."""
    return [fs.path for fs in mounts.own_tmpfs(container)]


@dataclass(frozen=True, slots=True)
class Row:
    """One container as listings show it. `memory` in bytes resident, `age` in seconds.

    state: "running", "frozen", "arriving" (being restored here) or "exited"
    dirty_bytes_per_second: that it writes to its memory; None where that was not measured
    """

    name: str
    host: str
    state: str
    init_pid: int
    pids: int
    memory: int
    age: float
    addresses: tuple[str, ...]
    command: tuple[str, ...]
    dirty_bytes_per_second: float | None = None


def rows() -> list[Row]:
    """All containers of this host, by name."""
    return [_row(container) for container in list_containers()]


def _row(container: Container) -> Row:
    pids: list[int] = []
    condition = "exited"
    try:
        with Cgroup.at(container.cgroup) as group:
            pids = group.pids()
            if container.alive:
                condition = "frozen" if group.frozen else "running"
    except FileNotFoundError:
        pass
    if container.arriving and container.alive:
        condition = "arriving"
    return Row(
        name=container.name,
        host=host_name(),
        state=condition,
        init_pid=container.init_pid if container.alive else 0,
        pids=len(pids),
        memory=sum(_resident(pid) for pid in pids),
        age=max(0.0, now() - container.created),
        addresses=container.spec.addresses,
        command=container.spec.argv,
    )


def _resident(pid: int) -> int:
    try:
        words = procfs.status(pid).get("VmRSS", "0 kB").split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(words[0]) * 1024


def _container(given: Container | int) -> Container:
    if isinstance(given, Container):
        return given
    found = state.of_pid(given)
    if found is None:
        raise UsageError(f"pid {given} is in no container of this host")
    return found
