"""Building a sandbox around a process.

    sandbox = prepare(spec, init_pid)

`init_pid` is the first process of new pid, mount, ipc, uts and net namespaces; it need not do anything,
and need not be able to. Everything is set up from outside by children that enter these namespaces. A
container that is started and one that is restored get identical surroundings because both are made here.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from migrator.container import mounts, network, state, sysctls
from migrator.container.bridge_port import BR_STATE_FORWARDING
from migrator.container.network import NetworkError
from migrator.container.rtnetlink import netlink_error, open_route
from migrator.container.spec import ContainerSpec
from migrator.container.state import Container
from migrator.errors import MigratorError, UsageError
from migrator.linux import procfs
from migrator.linux.cgroup import Cgroup
from migrator.linux.namespaces import identity, run_in

T = TypeVar("T")
NEEDED = ("pid", "mnt", "ipc", "uts", "net")


class SandboxError(MigratorError):
    """The sandbox could not be set up; what had been set up is gone, and so is `init_pid`."""

    exit_code = 5


class Sandbox:
    """A container's surroundings, standing. Its network port is closed until `open_port()`.

    As a context manager it takes everything down when the block fails.
    """

    def __init__(self, container: Container, cgroup: Cgroup) -> None:
        self.container = container
        self.cgroup = cgroup

    @property
    def spec(self) -> ContainerSpec:
        return self.container.spec

    @property
    def init_pid(self) -> int:
        return self.container.init_pid

    def open_port(self) -> None:
        """Let frames pass, and tell neighbours whose addresses these are now. `NetworkArrival.unlock()` and
        `announce()` do it faster, where it counts.

        The network of a container whose process 1 has ended meanwhile is gone, and nothing is left to be opened."""
        if not self.container.ifindex:
            return
        try:
            with open_route() as ip:
                network.set_port(ip, self.container.ifindex, BR_STATE_FORWARDING)
        except (OSError, NetworkError, netlink_error()):
            if not self._ends():
                raise
        else:
            network.announce(self.spec, self.init_pid)

    def _ends(self) -> bool:
        """A namespace goes shortly before its last process is seen to have ended."""
        deadline = time.monotonic() + 1
        while self.container.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def settled(self) -> Container:
        """The container runs here: note it in the state directory."""
        self.container = self.container.settled()
        return self.container

    def remove(self) -> None:
        """Kill what is inside and take everything down. Safe to call twice."""
        take_down(self.container)
        self.cgroup.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.remove()


def prepare(spec: ContainerSpec, init_pid: int, *, bridge: str | None = None) -> Sandbox:
    """Set up mounts, host name, network and cgroup around `init_pid`; nothing in it runs for that.

    `bridge` is the one of this host, if it is called otherwise than on the source. `init_pid` is in the
    cgroup afterwards, so its children will be. Raises UsageError if a container of that name lives here,
    SandboxError or NetworkError if something cannot be set up; `init_pid` has been killed then and nothing is
    left behind.
    """
    if bridge is not None:
        spec = replace(spec, bridge=bridge)
    spec = replace(spec, log=spec.effective_log)
    _clear_the_name(spec.name)
    for kind in NEEDED:
        if identity(init_pid, kind) == identity(os.getpid(), kind):
            raise UsageError(f"pid {init_pid} shares its {kind} namespace with us: it is no container's init")
    started = procfs.start_time(init_pid)
    cgroup = Cgroup.create(state.cgroup_name(spec.name))
    container = Container(
        spec=spec,
        init_pid=init_pid,
        start_time=started,
        cgroup=str(cgroup.path),
        ifindex=0,
        created=state.now(),
        arriving=True,
    )
    try:
        container.save()  # before the first act: whoever finds it knows what to take down
        cgroup.attach(init_pid)
        _step("host name", spec.name, lambda: run_in(init_pid, {"uts"}, lambda: _set_hostname(spec)))
        _step("sysctls", spec.name, lambda: sysctls.put(init_pid, spec.sysctls))
        index = _step("network", spec.name, lambda: network.set_up(spec, init_pid))
        _step("sysctls of its link", spec.name, lambda: sysctls.put(init_pid, spec.sysctls, link=True))
        container = replace(container, ifindex=index)
        container.save()
        inherited = _step("mounts", spec.name, lambda: run_in(init_pid, {"pid", "mnt"}, lambda: mounts.set_up(spec)))
        container = replace(container, inherited=inherited)
        container.save()
    except BaseException:
        cgroup.close()
        take_down(container)
        raise
    return Sandbox(container, cgroup)


def take_down(container: Container) -> None:
    """Kill what is inside a container and remove all that was set up for it. Safe to call twice."""
    try:
        cgroup = Cgroup.at(container.cgroup)
    except FileNotFoundError:
        pass
    else:
        cgroup.kill()
        _reap(container.init_pid)
        cgroup.remove()
    network.remove(container.spec.veth)
    container.forget()


def _reap(pid: int) -> None:
    """Collect process 1 if it is a child of ours; the death of its namespace is complete then."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass


def _clear_the_name(name: str) -> None:
    there = state.find(name)
    if there is None:
        return
    if there.alive:
        raise UsageError(
            f"a container {name!r} already lives on this host (pid {there.init_pid})",
            hint=f"choose another name, or end it: migrator stop {name}",
        )
    take_down(there)


def _set_hostname(spec: ContainerSpec) -> None:
    socket.sethostname(spec.effective_hostname)


def _step(what: str, name: str, act: Callable[[], T]) -> T:
    try:
        return act()
    except OSError as error:
        raise SandboxError(f"container {name}: {what}: {error}") from error


class SandboxMaker:
    """What stands around a container that an engine restores here; see `migrator.engine.base.SandboxFactory`.

    `bridge` is the one of this host, if it is called otherwise than on the source."""

    def __init__(self, bridge: str = "") -> None:
        self.sandbox: Sandbox | None = None
        self._bridge = bridge

    def __call__(self, spec: str, init_pid: int) -> Sandbox:
        self.sandbox = prepare(ContainerSpec.from_json(spec), init_pid, bridge=self._bridge or None)
        return self.sandbox
