"""A fleet on one machine: hosts in network namespaces, each with an agent, and a controller's keys.

    with FleetStage("abc") as fleet:
        fleet.run("a", "shop", ["sleep", "1000"])
        fleet.command("hosts", "--json")

The hosts are those of `migrator.testing.hosts`; commands of the controller run on the client. Each host gives 2 cores
and 1 GiB to its workloads, so that the load of the machine that they all share does not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from migrator.container import list_containers
from migrator.testing.hosts import Host, Lan
from migrator.testing.stage import AGENT_PORT, MIGRATOR, await_listener
from transport.keys import ensure_key, host_pattern, public_line

CAPACITY = "2,1GiB"


class CommandFailed(AssertionError):
    """A command of the controller exited with `code`."""

    def __init__(self, argv: Sequence[str], code: int, output: str) -> None:
        super().__init__(f"migrator {' '.join(argv)} exited with {code}\n{output}")
        self.code = code
        self.output = output


class FleetStage:
    """Hosts by label in `hosts`; `store` is the URL of the fleet's state."""

    def __init__(self, labels: Sequence[str] = "abc", *, tag: str = "fl", store: str = "", capacity: str = CAPACITY):
        self.lan = Lan(labels, tag=tag)
        self.hosts: dict[str, Host] = {host.label: host for host in self.lan.members}
        self.client = self.lan.client
        self.store = store or f"sqlite:{self.lan.folder}/fleet.db"
        self._capacity = capacity
        self._agents: dict[str, subprocess.Popen[Any]] = {}
        self._controllers: list[subprocess.Popen[Any]] = []
        self._number = 0

    def __enter__(self) -> Self:
        self.lan.__enter__()
        try:
            self._make_keys()
            for label in self.hosts:
                self.start_agent(label)
        except BaseException:
            self.lan.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for label in list(self._agents):
            self.stop_agent(label)
        self.lan.close()

    def _make_keys(self) -> None:
        known = self.lan.folder / "known_hosts"
        everybody = [*self.hosts.values(), self.client]
        for host in everybody:
            ensure_key(host.folder / "host_key")
            host.env["MIGRATOR_IDENTITY"] = str(host.folder / "client_key")
            host.env["MIGRATOR_KNOWN_HOSTS"] = str(known)
            ensure_key(host.folder / "client_key")
        lines = [
            f"{host_pattern(host.address, AGENT_PORT)} {public_line(ensure_key(host.folder / 'host_key'))}"
            for host in self.hosts.values()
        ]
        known.write_text("\n".join(lines) + "\n")
        for host in self.hosts.values():
            allowed = [
                f'migrator-rights="receive" {public_line(ensure_key(other.folder / "client_key"))}'
                for other in self.hosts.values()
                if other is not host
            ]
            allowed.append(
                f'migrator-rights="observe,send" {public_line(ensure_key(self.client.folder / "client_key"))}'
            )
            (host.folder / "authorized_keys").write_text("\n".join(allowed) + "\n")
        self.client.env["MIGRATOR_STORE"] = self.store

    # ------------------------------------------------------------------ agents

    def start_agent(self, label: str, *, env: Mapping[str, str] | None = None, capacity: str = "") -> None:
        """`env` and `capacity` of this one, if they are not those of the others."""
        host = self.hosts[label]
        argv = [
            *MIGRATOR, "agent", "--listen", f"{host.address}:{AGENT_PORT}",
            "--host-key", str(host.folder / "host_key"),
            "--authorized-keys", str(host.folder / "authorized_keys"),
            "--capacity", capacity or self._capacity,
            "--storage", str(self.lan.folder / "saved"),
        ]  # fmt: skip
        with open(host.folder / "agent.log", "ab") as log:
            self._agents[label] = host.popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        await_listener(host, self._agents[label], lambda: self.agent_log(label))

    def stop_agent(self, label: str, *, kill: bool = False) -> None:
        agent = self._agents.pop(label)
        if agent.poll() is None:
            agent.kill() if kill else agent.terminate()
        try:
            agent.wait(10)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()

    def agent_log(self, label: str) -> str:
        return (self.hosts[label].folder / "agent.log").read_text(errors="replace")[-4000:]

    # ------------------------------------------------------------------ the controller's commands

    def command(self, *argv: str, timeout: float = 400.0) -> str:
        """A `migrator` command on the controller; its standard output. Raises CommandFailed."""
        done = self.client.run([*MIGRATOR, *argv], check=False, timeout=timeout)
        if done.returncode:
            logs = "\n".join(f"--- {label}\n{self.agent_log(label)}" for label in self.hosts)
            raise CommandFailed(argv, done.returncode, f"{done.stdout}\n{done.stderr}\n{logs}")
        return str(done.stdout)

    def json(self, *argv: str) -> Any:
        return json.loads(self.command(*argv, "--json"))

    def controller(self, *argv: str, name: str = "controller") -> subprocess.Popen[Any]:
        """Start `migrator controller`; it is killed when the fleet goes away."""
        with open(self.lan.folder / f"{name}.log", "wb") as log:
            made = self.client.popen(
                [*MIGRATOR, "controller", "--name", name, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._controllers.append(made)
        return made

    def join(self) -> None:
        """Take all hosts into the fleet."""
        self.command("join", *(f"{host.address}:{AGENT_PORT}" for host in self.hosts.values()))

    def new_fleet(self, name: str = "") -> None:
        """Another store, in which all hosts are."""
        self._number += 1
        self.use_store(f"sqlite:{self.lan.folder}/{name or f'fleet-{self._number}'}.db")

    def use_store(self, url: str) -> None:
        """The fleet is the one in this store from now on, with all hosts in it, and agents that run."""
        for label in self.hosts.keys() - self._agents.keys():
            self.start_agent(label)
        self.store = self.client.env["MIGRATOR_STORE"] = url
        self.join()

    def clear(self) -> None:
        """End the controllers, and the containers on all hosts."""
        for child in self._controllers:
            child.kill()
            child.wait()
        self._controllers.clear()
        for host in self.hosts.values():
            host.end_containers()

    def run(self, label: str, name: str, argv: Sequence[str], *, address: str = "") -> int:
        """A container on a host; the pid of its process 1."""
        command = [*MIGRATOR, "run", "-d", "--name", name, "--bridge", "br0" if address else ""]
        if address:
            command += ["--ip", f"{address}/24"]
        return int(self.hosts[label].run([*command, "--", *argv]).stdout.strip())

    def count(self, label: str) -> int:
        """How many containers a host has, ended or not; in no time."""
        return len(list((self.hosts[label].state_dir / "containers").glob("*.json")))

    def where(self) -> dict[str, list[str]]:
        """The names of the containers that live on each host, as the kernel says without the fleet."""
        found = {}
        for label, host in self.hosts.items():
            with host.inside():
                found[label] = sorted(one.name for one in list_containers() if one.alive and not one.arriving)
        return found


BUSY = [
    sys.executable,
    "-c",
    "import sys, time\n"
    "held = bytearray(int(sys.argv[1]) << 20)\n"
    "held[::4096] = b'x' * len(held[::4096])\n"
    "share, number = float(sys.argv[2]), 0\n"
    "while True:\n"
    "    end = time.monotonic() + 0.02 * share\n"
    "    while time.monotonic() < end:\n"
    "        number += 1\n"
    "    time.sleep(0.02 * (1 - share))\n",
]


def busy(mebibytes: int, share: float = 0.0) -> list[str]:
    """A program that holds so much memory and uses that share of a processor, for ever."""
    return [*BUSY, str(mebibytes), str(share)]
