"""Installed hosts: two machines with systemd as process 1, migrator from its package, agents and controller as units.

They share nothing but the kernel and the network. What docs/usage.md does is done here as it says.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrator.linux import confinement
from migrator.protocol import fleet
from migrator.protocol import messages as m
from migrator.testing.hosts import TwoHosts
from migrator.testing.machine import Machine
from migrator.testing.redisclient import VerifyingClient
from transport.keys import ensure_key, public_line
from transport.ssh import connect

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

AGENT = "migrator-agent"
CONTROLLER = "migrator-controller"
DROP_IN = f"/etc/systemd/system/{AGENT}.service.d/test.conf"
SHOP = "10.77.0.63"
SERVER = ["redis-server", "--port", "6379", "--protected-mode", "no", "--save", ""]
# So that the load of the machine that they share does not count.
CAPACITY = "ExecStart=\nExecStart=/usr/bin/migrator agent --listen 0.0.0.0:7022 --capacity 2,4GiB\n"
COUNTER = (
    "import time\nwith open('/srv/count', 'a', 1) as file:\n while True: print('.', file=file); time.sleep(0.01)\n"
)


class Fleet:
    """Machines `a` and `b`, whose roots may log in to each other."""

    def __init__(self, hosts: TwoHosts, a: Machine, b: Machine) -> None:
        self.hosts, self.a, self.b = hosts, a, b
        keys = {}
        for machine in (a, b):
            machine.run(["migrator", "keygen"])
            keys[machine.label] = machine.run(["migrator", "keygen", "/root/.ssh/id_ed25519"]).stdout
        for machine, other in ((a, b), (b, a)):
            self.keys(machine).write_text(keys[other.label])
            self.configure(machine, CAPACITY)
        for machine, other in ((a, b), (b, a)):
            known = machine.run(["ssh-keyscan", "-p", "7022", other.address]).stdout
            machine.run(["mkdir", "-p", "/root/.config/migrator"])
            machine.path("/root/.config/migrator/known_hosts").write_text(known)

    def keys(self, machine: Machine) -> Path:
        return machine.path("/etc/migrator/authorized_keys")

    def configure(self, machine: Machine, *lines: str, check: bool = True) -> bool:
        """The agent with these lines in a drop-in; whether it starts."""
        machine.path(DROP_IN).parent.mkdir(exist_ok=True)
        machine.path(DROP_IN).write_text("\n".join(["[Service]", *lines]) + "\n")
        machine.run(["systemctl", "daemon-reload"])
        return machine.run(["systemctl", "restart", AGENT], check=check).returncode == 0

    def migrate(self, name: str, source: Machine, destination: Machine, *options: str) -> dict[str, object]:
        done = source.run(["migrator", "migrate", name, f"root@{destination.address}:7022", "--json", *options])
        result: dict[str, object] = json.loads(done.stdout)
        return result

    def main_pid(self, machine: Machine, unit: str = AGENT) -> int:
        return int(machine.run(["systemctl", "show", "-P", "MainPID", unit]).stdout)


@pytest.fixture(scope="module")
def machines(package: Path) -> Iterator[Fleet]:
    with TwoHosts(tag="sd") as hosts, Machine(hosts.a, package) as a, Machine(hosts.b, package) as b:
        yield Fleet(hosts, a, b)


def until(condition: Callable[[], bool], about: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, about
        time.sleep(0.05)


def lines(machine: Machine, path: str) -> int:
    return machine.path(path).read_bytes().count(b"\n")


def test_the_agent_is_confined_by_nothing_that_a_copy_would_inherit(machines: Fleet) -> None:
    machine = machines.a
    pid = machines.main_pid(machine)
    status = dict(
        line.split(":\t", 1) for line in machine.path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    first = machine.path("/proc/1/status").read_text()
    assert not confinement.inherited(status)
    assert f"CapBnd:\t{status['CapBnd']}\n" in first
    assert not set(confinement.names(int(status["CapEff"], 16))) & {f"cap_{name}" for name in confinement.UNUSED}
    for space in ("mnt", "pid", "net", "ipc", "uts", "user", "cgroup"):
        assert (
            machine.run(["readlink", f"/proc/{pid}/ns/{space}"]).stdout
            == machine.run(["readlink", f"/proc/1/ns/{space}"]).stdout
        ), space


def test_a_container_moves_under_load_and_back_while_agents_are_killed_and_restarted(machines: Fleet) -> None:
    a, b = machines.a, machines.b
    a.run(["migrator", "run", "-d", "--name", "shop", "--bridge", "br0", "--ip", f"{SHOP}/24", "--", *SERVER])
    with machines.hosts.client.inside():
        client = VerifyingClient(SHOP, 6379, rate=500).start()
    a.path("/srv/tree/deep").mkdir(parents=True)
    a.path("/srv/tree/deep/file").write_text("carried along")
    a.run(["chown", "-R", "1234:1234", "/srv/tree"])
    try:
        for source, destination in ((a, b), (b, a)):
            moved = machines.migrate("shop", source, destination, "--copy-path", "/srv/tree")
            assert moved["outcome"] == "migrated"
            assert destination.path("/srv/tree/deep/file").read_text() == "carried along"
            assert destination.path("/srv/tree/deep/file").stat().st_uid == 1234
            group = destination.path(f"/proc/{moved['pid']}/cgroup").read_text()
            assert AGENT not in group
            destination.run(["systemctl", "kill", "--signal=KILL", AGENT])
            until(
                lambda d=destination: "listening" in d.run(["systemctl", "status", AGENT], check=False).stdout, "back"
            )
            destination.run(["systemctl", "stop", AGENT])
            assert "running" in destination.run(["migrator", "ps"]).stdout
            destination.run(["systemctl", "start", AGENT])
    finally:
        report = client.stop()
    assert report.flawless, report
    assert b.run(["migrator", "ps", "--json"]).stdout.strip() in ("[]", "")
    a.run(["migrator", "stop", "shop"])
    for machine in (a, b):
        assert "Traceback" not in machine.journal(AGENT)


def test_a_plain_process_is_moved_saved_and_restarted(machines: Fleet) -> None:
    a, b = machines.a, machines.b
    a.path("/srv/counter.py").write_text(COUNTER)
    a.run(["setsid", "--fork", "sh", "-c", "exec python3 /srv/counter.py < /dev/null > /srv/log 2>&1"])
    until(lambda: a.path("/srv/count").exists(), "it counts")
    pid = a.run(["pgrep", "-f", "^python3 /srv/counter"]).stdout.strip()
    assert machines.migrate(pid, a, b, "--copy-files")["outcome"] == "migrated"
    before = lines(b, "/srv/count")
    until(lambda: lines(b, "/srv/count") > before, "it counts there")
    b.run(["systemctl", "restart", AGENT])
    b.run(["migrator", "checkpoint", pid, "--kill", "-o", "/srv/image"])
    assert b.run(["pgrep", "-f", "^python3 /srv/counter"], check=False).stdout == ""
    assert b.run(["migrator", "restart", "--detach", "--verify", "-i", "/srv/image"]).stdout.strip() == pid
    before = lines(b, "/srv/count")
    until(lambda: lines(b, "/srv/count") > before, "it counts again")
    taken = b.run(["migrator", "restart", "-i", "/srv/image"], check=False)
    assert taken.returncode == 5 and f"pid {pid} is taken" in taken.stderr
    b.run(["kill", pid])


def ask(machines: Fleet, request: m.AnyMessage) -> m.AnyMessage:
    """What the agent of b answers the client."""
    folder = machines.hosts.client.folder

    async def talk() -> m.AnyMessage:
        link = await connect(
            f"root@{machines.b.address}:7022",
            identity=folder / "key",
            known_hosts=machines.a.path("/root/.config/migrator/known_hosts"),
            config=False,
        )
        async with link:
            await link.send(m.encode(request))
            while True:
                answer = m.decode(await link.receive(60))
                if not isinstance(answer, m.Hello | fleet.Departing):
                    return answer

    with machines.hosts.client.inside():
        return asyncio.run(talk())


def test_an_agent_with_one_right_does_just_that(machines: Fleet) -> None:
    a, b = machines.a, machines.b
    keys = machines.keys(b)
    before = keys.read_text()
    client = public_line(ensure_key(machines.hosts.client.folder / "key"))
    a.run(["migrator", "run", "-d", "--name", "here", "--bridge", "", "--", "sleep", "1000"])
    b.run(["migrator", "run", "-d", "--name", "there", "--bridge", "", "--", "sleep", "1000"])
    try:
        for right in ("observe", "send", "receive"):
            keys.write_text("".join(f'migrator-rights="{right}" {key}\n' for key in (before.strip(), client)))
            brought = a.run(["migrator", "migrate", "here", f"root@{b.address}:7022"], check=False)
            order = fleet.Depart(f"unit-{right}", "there", f"root@{a.address}:7022", "f", 1)
            sent, seen = ask(machines, order), ask(machines, fleet.Observe())
            did = {
                "receive": brought.returncode == 0,
                "send": isinstance(sent, fleet.Departed) and sent.outcome == "migrated",
                "observe": isinstance(seen, fleet.Observed),
            }
            assert did == {name: name == right for name in did}, (brought.stderr, sent, seen)
    finally:
        keys.write_text(before)
        for machine in (a, b):
            for name in ("here", "there"):
                machine.run(["migrator", "stop", name], check=False)


def test_an_agent_whose_mounts_are_not_the_hosts_does_not_start_and_says_why(machines: Fleet) -> None:
    try:
        assert not machines.configure(machines.a, "PrivateTmp=yes", check=False)
        said = machines.a.journal(AGENT)
        assert re.search(r"error: this agent has a mount namespace of its own: .*/tmp.* differ", said), said
        assert "take PrivateTmp=" in said
    finally:
        machines.configure(machines.a, CAPACITY)


def test_an_agent_whose_copies_could_do_less_refuses_them(machines: Fleet) -> None:
    a, b = machines.a, machines.b
    confining = ["NoNewPrivileges=yes", "SystemCallFilter=~reboot", "CapabilityBoundingSet=~CAP_SYS_MODULE"]
    try:
        assert machines.configure(b, CAPACITY, *confining)
        a.run(["migrator", "run", "-d", "--name", "full", "--bridge", "", "--", "sleep", "1000"])
        refused = a.run(["migrator", "check", "full", f"root@{b.address}:7022"], check=False)
        assert refused.returncode == 3
        said = " ".join(refused.stderr.split())
        for reason in ("is under no_new_privs", "and a filter of system calls", "not give its copies cap_sys_module"):
            assert reason in said, said
    finally:
        a.run(["migrator", "stop", "full"])
        machines.configure(b, CAPACITY)


def test_a_controller_under_its_unit_empties_a_host(machines: Fleet) -> None:
    a, b = machines.a, machines.b
    home = f"/var/lib/{CONTROLLER}"
    as_it = ["setpriv", "--reuid=migrator", "--regid=migrator", "--clear-groups"]
    env = {"HOME": home, "MIGRATOR_STORE": f"sqlite:{home}/fleet.db"}
    a.run(["install", "-d", "-o", "migrator", "-g", "migrator", "-m", "700", home, f"{home}/.ssh"])
    key = a.run([*as_it, "migrator", "keygen", f"{home}/.ssh/id_ed25519"], env=env).stdout
    for machine in (a, b):
        with machines.keys(machine).open("a") as keys:
            keys.write(f'migrator-rights="observe,send" {key}')
    known = a.run(["ssh-keyscan", "-p", "7022", a.address, b.address]).stdout
    a.path(f"{home}/.ssh/known_hosts").write_text(known)
    a.run(["systemctl", "start", CONTROLLER])
    for machine in (a, b):
        a.run([*as_it, "migrator", "join", f"root@{machine.address}:7022"], env=env)
    a.run(["migrator", "run", "-d", "--name", "last", "--bridge", "", "--", "sleep", "1000"])
    drained = a.run([*as_it, "migrator", "drain", "a"], env=env)
    assert "a is empty" in drained.stdout + drained.stderr
    assert "last" in b.run(["migrator", "ps"]).stdout
    assert "Traceback" not in a.journal(CONTROLLER)
    b.run(["migrator", "stop", "last"])
    a.run(["systemctl", "stop", CONTROLLER])
    assert a.run(["systemctl", "is-failed", CONTROLLER], check=False).stdout.strip() == "inactive"
