"""A stage for whole migrations: two hosts with agents, keys that know one another, and the command.

    with Stage() as stage:
        stage.start_container("shop", ["redis-server", …], address="10.77.0.50")
        result = stage.migrate("shop", stage.a, stage.b)

Everything goes through the command line, as a person would do it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from migrator.testing.hosts import Host, TwoHosts
from transport.keys import ensure_key, host_pattern, public_line

AGENT_PORT = 7022
MIGRATOR = [sys.executable, "-m", "migrator"]


class MigrateFailed(AssertionError):
    """`migrator migrate` exited with `code`; its standard error is in `text`."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"migrator exited with {code}\n{text}")
        self.code = code
        self.text = text


class Stage:
    """Two hosts, each with an agent. `a`, `b`, `client` are the hosts of migrator.testing.hosts."""

    def __init__(self, *, agents: bool = True, tag: str = "st", delay: float = 0.0) -> None:
        self.hosts = TwoHosts(tag=tag, delay=delay)
        self.a, self.b, self.client = self.hosts.a, self.hosts.b, self.hosts.client
        self._agents = agents
        self._running: dict[str, subprocess.Popen[Any]] = {}

    @property
    def folder(self) -> Path:
        return self.hosts.folder

    def __enter__(self) -> Stage:
        self.hosts.__enter__()
        try:
            self._make_keys()
            if self._agents:
                for host in (self.a, self.b):
                    self.start_agent(host)
        except BaseException:
            self.hosts.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in (self.a, self.b):
            self.stop_agent(host)
        self.hosts.close()

    # ------------------------------------------------------------------ keys and agents

    def _make_keys(self) -> None:
        known = self.folder / "known_hosts"
        lines = []
        for host in (self.a, self.b):
            key = ensure_key(host.folder / "host_key")
            ensure_key(host.folder / "client_key")
            lines.append(f"{host_pattern(host.address, AGENT_PORT)} {public_line(key)}")
        known.write_text("\n".join(lines) + "\n")
        for host, other in ((self.a, self.b), (self.b, self.a)):
            peer = ensure_key(other.folder / "client_key")
            (host.folder / "authorized_keys").write_text(public_line(peer) + "\n")
            host.env["MIGRATOR_IDENTITY"] = str(host.folder / "client_key")
            host.env["MIGRATOR_KNOWN_HOSTS"] = str(known)

    def start_agent(self, host: Host, *, env: dict[str, str] | None = None, wait: bool = True) -> None:
        """Start the agent of a host; it settles what an earlier one left behind before it answers."""
        log = open(host.folder / "agent.log", "ab")  # noqa: SIM115
        argv = [
            *MIGRATOR, "agent", "--listen", f"{host.address}:{AGENT_PORT}",
            "--host-key", str(host.folder / "host_key"),
            "--authorized-keys", str(host.folder / "authorized_keys"),
            "--metrics", f"{host.address}:9740",
        ]  # fmt: skip
        self._running[host.label] = host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        log.close()
        if wait:
            self.await_agent(host)

    def await_agent(self, host: Host, *, seconds: float = 60.0) -> None:
        await_listener(host, self._running[host.label], lambda: self.agent_log(host), seconds=seconds)

    def agent_log(self, host: Host) -> str:
        return (host.folder / "agent.log").read_text(errors="replace")[-4000:]

    def agent_pid(self, host: Host) -> int:
        return self._running[host.label].pid

    def stop_agent(self, host: Host, *, kill: bool = False) -> None:
        agent = self._running.pop(host.label, None)
        if agent is None:
            return
        if agent.poll() is None:
            agent.kill() if kill else agent.terminate()
        try:
            agent.wait(10)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()

    def await_death(self, host: Host, *, seconds: float = 30.0) -> int:
        """Wait until the agent of a host has ended by itself; its exit code."""
        return self._running[host.label].wait(seconds)

    # ------------------------------------------------------------------ the work

    def start_container(self, name: str, argv: list[str], *, address: str = "", host: Host | None = None) -> int:
        """`migrator run` on a host (a, if not told); the pid of its process 1."""
        command = [*MIGRATOR, "run", "-d", "--name", name, "--bridge", "br0"]
        if address:
            command += ["--ip", f"{address}/24"]
        done = (host or self.a).run([*command, "--", *argv])
        return int(done.stdout.strip())

    def migrate(
        self, workload: str | int, source: Host, destination: Host, *options: str, show: bool = False
    ) -> dict[str, Any]:
        """`migrator migrate` from one host to another; its --json result. Raises MigrateFailed."""
        argv = [
            *MIGRATOR,
            "migrate",
            str(workload),
            f"root@{destination.address}:{AGENT_PORT}",
            "--json",
            *options,
        ]
        done = source.run(
            argv,
            check=False,
            stdout=subprocess.PIPE,
            stderr=None if show else subprocess.PIPE,
            timeout=180,
        )
        if done.returncode:
            raise MigrateFailed(done.returncode, f"{done.stderr or ''}{done.stdout}\n{self.agent_log(destination)}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def await_listener(host: Host, agent: subprocess.Popen[Any], log: Callable[[], str], *, seconds: float = 60.0) -> None:
    """Wait until the agent of a host answers."""
    deadline = time.monotonic() + seconds
    while True:
        with host.inside():
            try:
                socket.create_connection((host.address, AGENT_PORT), timeout=1).close()
                return
            except OSError:
                pass
        if agent.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"agent of {host.label}: {log()}")
        time.sleep(0.05)


def require_root() -> None:
    """Say what is missing, for tools that are started by people."""
    if os.geteuid() != 0:
        raise SystemExit("root is needed: network namespaces, ptrace and cgroups")
