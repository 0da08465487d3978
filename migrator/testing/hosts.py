"""Two hosts on one machine, for tests and demonstrations.

    with TwoHosts() as hosts:
        hosts.a.run(["migrator", "run", "--name", "web", "--bridge", "br0", "--ip", "10.77.0.50/24", …])
        hosts.client.run(["ping", "-c1", "10.77.0.50"])

A host is a network namespace with a bridge `br0`, whose uplink leads to a switch that is a bridge in a
namespace of its own; the client hangs on the same switch. Hosts share pids and file systems with the
machine, but have state directories of their own (`MIGRATOR_STATE_DIR`). Needs root.

        client .100 ── switch ──┬── uplink ─ br0 (host a, 10.77.0.1)
                                └── uplink ─ br0 (host b, 10.77.0.2)
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pyroute2 import IPRoute, netns

from migrator.linux.namespaces import entered

NETWORK = "10.77.0"
PREFIX = 24

_serial = itertools.count()

_END_CONTAINERS = """
from migrator.container import list_containers, stop
for container in list_containers():
    stop(container.name, timeout=1)
"""


class Host:
    """One network namespace with what belongs to it. `address` is its IPv4 address on the LAN."""

    def __init__(self, label: str, namespace: str, address: str, folder: Path, log_dir: Path) -> None:
        self.label = label
        self.namespace = namespace
        self.address = address
        self.folder = folder
        self.state_dir = folder / "run"
        self.state_dir.mkdir(parents=True)
        self.env = {
            "MIGRATOR_STATE_DIR": str(self.state_dir),
            "MIGRATOR_JOURNAL_DIR": str(folder / "journal"),
            "MIGRATOR_LOG_DIR": str(log_dir),  # shared: a path must mean the same file on both hosts
            "MIGRATOR_FENCE_DIR": str(folder / "fences"),
            "MIGRATOR_HOST": label,
        }
        self._children: list[subprocess.Popen[Any]] = []

    @property
    def netns_path(self) -> str:
        return f"/run/netns/{self.namespace}"

    def _argv(self, argv: Sequence[str]) -> list[str]:
        # nsenter executes the command without forking: the pid is the command's own.
        return ["nsenter", f"--net={self.netns_path}", *argv]

    def _environment(self, extra: Mapping[str, str] | None) -> dict[str, str]:
        here = str(Path(sys.executable).parent)
        path = f"{here}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        return {**os.environ, "PATH": path, **self.env, **(extra or {})}

    def run(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, check: bool = True, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end. Output is captured as text unless told otherwise.
        Raises subprocess.CalledProcessError with the output in its notes."""
        options = {"text": True, "timeout": 60, **more}
        if not {"stdout", "stderr", "capture_output"} & options.keys():
            options["capture_output"] = True
        result = subprocess.run(self._argv(argv), env=self._environment(env), **options)
        if check and result.returncode:
            error = subprocess.CalledProcessError(result.returncode, list(argv), result.stdout, result.stderr)
            error.add_note(f"stdout: {result.stdout}\nstderr: {result.stderr}")
            raise error
        return result

    def popen(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **more: Any) -> subprocess.Popen[Any]:
        """Start a command on this host. It is killed when the hosts go away."""
        child = subprocess.Popen(self._argv(argv), env=self._environment(env), **more)
        self._children.append(child)
        return child

    def python(self, code: str, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run Python code on this host, with this project importable."""
        return self.run([sys.executable, "-c", code, *arguments], **more)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is on this host inside the block: its network, its state directories."""
        before = {key: os.environ.get(key) for key in self.env}
        os.environ.update(self.env)
        try:
            with entered(self.netns_path):
                yield
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value

    def close(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream is not None:
                    stream.close()
        self.end_containers()

    def end_containers(self) -> None:
        if any((self.state_dir / "containers").glob("*.json")):
            self.python(_END_CONTAINERS, check=False)


class Lan:
    """Context manager: hosts with these labels, and one called "client". Everything is removed on leaving.

    `delay` is what a frame takes on the client's cable, in seconds: half a round trip."""

    def __init__(self, labels: Sequence[str], *, tag: str = "mv", delay: float = 0.0) -> None:
        self._delay = delay
        self._cable: subprocess.Popen[str] | None = None
        self.tag = f"{tag}-{os.getpid()}-{next(_serial)}"
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.tag}-"))
        self.lan = f"{self.tag}-lan"
        log_dir = self.folder / "log"
        log_dir.mkdir()

        def host(label: str, last: int) -> Host:
            return Host(label, f"{self.tag}-{label}", f"{NETWORK}.{last}", self.folder / label, log_dir)

        self.members = tuple(host(label, number) for number, label in enumerate(labels, 1))
        self.client = host("client", 100)

    @property
    def hosts(self) -> tuple[Host, ...]:
        return *self.members, self.client

    def __enter__(self) -> Self:
        try:
            netns.create(self.lan)
            _build_switch(self.lan)
            for number, host in enumerate(self.hosts):
                netns.create(host.namespace)
                _plug_in(self.lan, host, number)
            if self._delay:
                self._cable = _slow_down(self.lan, self.hosts.index(self.client), self._delay)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for host in self.hosts:
            host.close()
        if self._cable is not None:
            self._cable.kill()
            self._cable.communicate()
        for namespace in (*(host.namespace for host in self.hosts), self.lan):
            if os.path.exists(f"/run/netns/{namespace}"):
                netns.remove(namespace)
        shutil.rmtree(self.folder, ignore_errors=True)


class TwoHosts(Lan):
    """Hosts `a` and `b`, and `client`."""

    def __init__(self, *, tag: str = "mv", delay: float = 0.0) -> None:
        super().__init__("ab", tag=tag, delay=delay)
        self.a, self.b = self.members


def _bridge(ip: IPRoute, name: str) -> int:
    ip.link("add", ifname=name, kind="bridge", br_forward_delay=0, br_stp_state=0)
    index = int(ip.link_lookup(ifname=name)[0])
    ip.link("set", index=index, state="up")
    return index


def _build_switch(namespace: str) -> None:
    with entered(f"/run/netns/{namespace}"), IPRoute() as ip:
        _bridge(ip, "switch")


def _plug_in(lan: str, host: Host, number: int) -> None:
    """A cable from the host to the switch. Hosts get a bridge with the uplink in it, the client does not."""
    with entered(host.netns_path), IPRoute() as ip:
        ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")
        peer = {"ifname": f"port{number}", "net_ns_fd": lan}
        ip.link("add", ifname="uplink", kind="veth", peer=peer)
        uplink = carrier = int(ip.link_lookup(ifname="uplink")[0])
        if host.label != "client":
            carrier = _bridge(ip, "br0")
            ip.link("set", index=uplink, master=carrier)
        ip.link("set", index=uplink, state="up")
        ip.addr("add", index=carrier, address=host.address, prefixlen=PREFIX)
    with entered(f"/run/netns/{lan}"), IPRoute() as ip:
        port = int(ip.link_lookup(ifname=f"port{number}")[0])
        ip.link("set", index=port, master=ip.link_lookup(ifname="switch")[0])
        ip.link("set", index=port, state="up")


def _slow_down(lan: str, number: int, seconds: float) -> subprocess.Popen[str]:
    """Put a slow cable between a host's port and the switch: the port is taken off, and another is put on."""
    with entered(f"/run/netns/{lan}"), IPRoute() as ip:
        port = int(ip.link_lookup(ifname=f"port{number}")[0])
        ip.link("set", index=port, master=0)
        ip.link("add", ifname="near", kind="veth", peer={"ifname": "slow"})
        for name in ("near", "slow"):
            ip.link("set", index=int(ip.link_lookup(ifname=name)[0]), state="up")
        ip.link("set", index=int(ip.link_lookup(ifname="slow")[0]), master=ip.link_lookup(ifname="switch")[0])
    argv = [sys.executable, "-m", "migrator.testing.slowcable", "near", f"port{number}", str(seconds)]
    cable = subprocess.Popen(["nsenter", f"--net=/run/netns/{lan}", *argv], stdout=subprocess.PIPE, text=True)
    assert cable.stdout is not None and cable.stdout.readline() == "ready\n"
    return cable
