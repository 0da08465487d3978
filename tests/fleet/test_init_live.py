"""`migrator init` over a real sshd on each host, to a fleet that moves something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.testing.fleet import busy
from migrator.testing.hosts import Host, Lan
from migrator.testing.stage import AGENT_PORT, MIGRATOR, await_listener
from transport.keys import ensure_key, public_line

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


class Machines:
    """Hosts with a root of their own as far as ssh can tell, and an administrator's machine that may log in."""

    def __init__(self, lan: Lan) -> None:
        self.lan = lan
        self.client = lan.client
        self.client.env["HOME"] = str(self.client.folder)
        self.client.env["MIGRATOR_STORE"] = f"sqlite:{lan.folder}/fleet.db"
        self.client.env["MIGRATOR_IDENTITY"] = str(self.client.folder / "controller_key")
        key = ensure_key(self.client.folder / "admin_key")
        known = []
        for host in lan.members:
            line = public_line(ensure_key(host.folder / "sshd_key"))
            known.append(f"{host.address} {' '.join(line.split()[:2])}\n")
            (host.folder / "admins").write_text(public_line(key) + "\n")
            self._start_sshd(host)
        (self.client.folder / "known").write_text("".join(known))
        (self.client.folder / "ssh_config").write_text(
            f"IdentityFile {self.client.folder}/admin_key\nIdentitiesOnly yes\n"
            f"UserKnownHostsFile {self.client.folder}/known\nStrictHostKeyChecking yes\n"
        )
        programs = self.client.folder / "bin"
        programs.mkdir()
        (programs / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {self.client.folder}/ssh_config "$@"\n')
        (programs / "ssh").chmod(0o755)
        self.client.env["PATH"] = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def _start_sshd(self, host: Host) -> None:
        programs = host.folder / "bin"
        programs.mkdir()
        (programs / "migrator").write_text(f'#!/bin/sh\nexec {" ".join(MIGRATOR)} "$@"\n')
        (programs / "uname").write_text(f"#!/bin/sh\necho {host.label}\n")
        for program in programs.iterdir():
            program.chmod(0o755)
        (host.folder / "sshd_config").write_text(
            f"ListenAddress {host.address}:22\nHostKey {host.folder}/sshd_key\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {host.folder}/admins\nStrictModes no\nPermitRootLogin yes\n"
            f"SetEnv HOME={host.folder}/root MIGRATOR_ETC={host.folder}/etc "
            f"PATH={programs}:{os.environ['PATH']} PYTHONPATH={os.environ.get('PYTHONPATH', '')}\n"
        )
        (host.folder / "root").mkdir()
        Path("/run/sshd").mkdir(exist_ok=True)
        sshd = host.popen(
            ["/usr/sbin/sshd", "-D", "-e", "-f", str(host.folder / "sshd_config")], stderr=subprocess.PIPE, text=True
        )
        assert sshd.stderr is not None and "listening" in sshd.stderr.readline()

    def start_agent(self, host: Host) -> None:
        """As its service would be: with the keys that `init` has made there, and root's own."""
        host.env["HOME"] = str(host.folder / "root")
        etc = host.folder / "etc"
        argv = [
            *MIGRATOR, "agent", "--listen", f"{host.address}:{AGENT_PORT}", "--host-key", str(etc / "host_key"),
            "--authorized-keys", str(etc / "authorized_keys"), "--capacity", "2,1GiB",
        ]  # fmt: skip
        log = host.folder / "agent.log"
        with open(log, "wb") as file:
            agent = host.popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        await_listener(host, agent, lambda: log.read_text(errors="replace"))

    def command(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.client.run([*MIGRATOR, *argv], check=False, timeout=120)


@pytest.fixture
def machines() -> Iterator[Machines]:
    with Lan("ab", tag="init") as lan:
        yield Machines(lan)


def test_two_machines_become_a_fleet_that_moves_a_container(machines: Machines) -> None:
    a, b = machines.lan.members
    key = str(machines.client.folder / "controller_key")
    first = machines.command("init", f"root@{a.address}", b.address, "--key", key)
    assert first.returncode == 0, first.stderr
    assert "does not answer yet" in first.stderr, "no agent runs there so far"
    for host in (a, b):
        machines.start_agent(host)
    again = machines.command("init", a.address, b.address, "--key", key, "--label", "zone=x")
    assert again.returncode == 0 and "is of the fleet" in again.stdout, again.stderr
    hosts = json.loads(machines.command("hosts", "--json").stdout)
    assert [(host["name"], host["state"], host["labels"]) for host in hosts] == [
        ("a", "active", {"zone": "x"}),
        ("b", "active", {"zone": "x"}),
    ]
    a.run([*MIGRATOR, "run", "-d", "--name", "w", "--bridge", "", "--", *busy(20)])
    done = machines.command("drain", "a", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["moved"] == {"w": "b"}


def test_a_machine_that_lets_nobody_in_is_named_and_nothing_is_changed(machines: Machines) -> None:
    a, b = machines.lan.members
    (b.folder / "admins").write_text("")
    done = machines.command("init", a.address, b.address, "--key", str(machines.client.folder / "controller_key"))
    assert done.returncode == 7 and b.address in done.stderr and "without a password" in done.stderr
    assert not (a.folder / "etc/authorized_keys").exists()


def test_hosts_are_added_to_a_fleet_that_keeps_what_it_has(machines: Machines) -> None:
    a, b = machines.lan.members
    key = ("--key", str(machines.client.folder / "controller_key"))
    machines.command("init", a.address, *key)
    machines.start_agent(a)
    first = machines.command("init", a.address, *key, "--label", "zone=x")
    assert first.returncode == 0 and "is of the fleet" in first.stdout, first.stderr
    # With certificates from now on, of which the agent that runs knows nothing yet.
    machines.command("init", b.address, *key, "--ca", str(machines.client.folder / "ca"))
    machines.start_agent(b)
    joined = machines.command("join", f"{b.address}:{AGENT_PORT}")
    assert joined.returncode == 0, joined.stderr
    hosts = json.loads(machines.command("hosts", "--json").stdout)
    assert [(host["name"], host["state"], host["labels"]) for host in hosts] == [
        ("a", "active", {"zone": "x"}),
        ("b", "active", {}),
    ]
    a.run([*MIGRATOR, "run", "-d", "--name", "w", "--bridge", "", "--", *busy(20)])
    done = machines.command("drain", "a", "--json")
    assert done.returncode == 0, done.stderr
    again = machines.command("init", a.address, *key)
    assert json.loads(machines.command("hosts", "--json").stdout)[0]["labels"] == {"zone": "x"}, again.stderr


def test_a_host_of_the_fleet_that_is_gone_is_named(machines: Machines) -> None:
    a, b = machines.lan.members
    key = ("--key", str(machines.client.folder / "controller_key"))
    machines.command("init", a.address, *key)
    machines.start_agent(a)
    machines.command("join", f"{a.address}:{AGENT_PORT}")
    (a.folder / "admins").write_text("")
    done = machines.command("init", b.address, *key)
    assert done.returncode == 7 and "migrator leave a" in done.stderr, done.stderr
    assert not (b.folder / "etc/authorized_keys").exists()
    assert machines.command("leave", "a").returncode == 0
    assert machines.command("init", b.address, *key).returncode == 0
