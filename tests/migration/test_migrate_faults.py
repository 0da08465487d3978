"""Real agents die by SIGKILL, links break, people press Ctrl-C: one copy goes on, and nothing is left behind.

The workload is a counter whose copies append to the same file wherever they run. Two copies that ran at the
same time, for however short, or one that went back to an earlier state, would show there for ever: as numbers
that come twice.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from pyroute2 import IPRoute

from migrator.container import list_containers, stop
from migrator.linux import cgroup, procfs
from migrator.session.faults import EXIT_CODE, POINTS
from migrator.session.journal import Journal
from migrator.session.states import Recorded
from migrator.testing.hosts import Host
from migrator.testing.redisclient import fill
from migrator.testing.servers import redis_command
from migrator.testing.stage import AGENT_PORT, MIGRATOR, Stage
from migrator.testing.workloads import Workload, build

pytestmark = pytest.mark.root

SOURCE_POINTS = [point for point in POINTS if point.startswith("source.")]
DESTINATION_POINTS = [point for point in POINTS if point.startswith("destination.")]
# From here on the destination's journal says RUNNING.
DECIDED = {"destination.decided", "destination.resumed", "destination.told"}
AWAY = {"source.committed", "source.running", "source.away", "source.released", "source.done"}

ADDRESS, PORT = "10.77.0.50", 6379

_serial = itertools.count()


@dataclass
class Counting:
    """A container that counts, and what can be said of it from outside."""

    stage: Stage
    name: str = field(default_factory=lambda: f"f{next(_serial)}")
    bridge: str = ""

    def __post_init__(self) -> None:
        self.out = self.stage.folder / f"{self.name}.out"
        argv = [
            "run",
            "-d",
            "--name",
            self.name,
            "--bridge",
            self.bridge,
            "--",
            str(build("counter")),
            str(self.out),
            "2",
        ]
        self.pid = int(self.stage.a.run([*MIGRATOR, *argv]).stdout)
        self.await_progress()

    def numbers(self) -> list[int]:
        text = self.out.read_text() if self.out.exists() else ""
        assert "FAIL" not in text, text[-1000:]
        return [int(n) for n in re.findall(r"^tick (\d+) .*\n", text, re.MULTILINE)]

    def check_one_history(self) -> None:
        numbers = self.numbers()
        assert numbers == list(range(1, len(numbers) + 1)), "two copies have run"

    def await_progress(self, seconds: float = 10.0) -> None:
        before, deadline = len(self.numbers()), time.monotonic() + seconds
        while len(self.numbers()) < before + 5:
            assert time.monotonic() < deadline, f"{self.name} stands still at {before}: {self.where()}"
            time.sleep(0.02)

    def where(self) -> dict[str, list[tuple[int, str]]]:
        """By host: the pids of its tasks there, with their states."""
        found = {}
        for host in (self.stage.a, self.stage.b):
            group = self._group(host)
            pids = group.pids() if group is not None else []
            found[host.label] = [(pid, procfs.stat(pid)[3]) for pid in pids]
        return found

    def _group(self, host: Host) -> cgroup.Cgroup | None:
        from migrator.container.state import cgroup_name

        with host.inside(), contextlib.suppress(FileNotFoundError):
            return cgroup.Cgroup.open(cgroup_name(self.name))
        return None

    def check_runs_only_on(self, label: str) -> None:
        """Exactly one copy, there, progressing; nothing of it, and nothing of the migration, anywhere else."""
        self.await_progress()
        self.check_one_history()
        where = self.where()
        other = "b" if label == "a" else "a"
        assert len(where[label]) == 1, where
        assert not where[other], where
        for host in (self.stage.a, self.stage.b):
            rows = json.loads(host.run([*MIGRATOR, "ps", "--json"]).stdout)
            mine = [row["state"] for row in rows if row["name"] == self.name]
            assert mine == (["running"] if host.label == label else []), rows
            group = self._group(host)
            assert (group is not None) == (host.label == label), group
            assert_journals_closed(host)
            if self.bridge:
                assert veths(host) == (1 if host.label == label else 0)

    def end(self) -> None:
        for host in (self.stage.a, self.stage.b):
            host.run([*MIGRATOR, "stop", self.name], check=False)


def stop_all(host: Host) -> None:
    """End the containers of a host."""
    with host.inside():
        for container in list_containers():
            stop(container.name, timeout=1)


def veths(host: Host) -> int:
    """Ports of containers on the bridge of a host."""
    with host.inside(), IPRoute() as ip:
        bridge = ip.link_lookup(ifname="br0")[0]
        ports = [link.get_attr("IFLA_IFNAME") for link in ip.get_links() if link.get_attr("IFLA_MASTER") == bridge]
    return len([name for name in ports if name != "uplink"])


def assert_journals_closed(host: Host) -> None:
    for path in (host.folder / "journal").glob("*.journal"):
        with Journal.open(path) as journal:
            assert journal.state in (Recorded.CLOSED, Recorded.RESUMED), (host.label, path.name, journal.records)


def migrating(stage: Stage, name: str, *options: str, fault: str = "") -> subprocess.Popen[Any]:
    """`migrator migrate` from a to b, in the background."""
    argv = [*MIGRATOR, "migrate", name, f"root@{stage.b.address}:{AGENT_PORT}", *options]
    env = {"MIGRATOR_FAULT": fault} if fault else {}
    return stage.a.popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[Any], seconds: float = 60.0) -> tuple[int, str]:
    text, _ = process.communicate(timeout=seconds)
    return process.returncode, text


def settle(host: Host) -> str:
    done = host.run([*MIGRATOR, "settle"], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def counting(stage: Stage) -> Iterator[Counting]:
    made = Counting(stage)
    yield made
    made.end()


@pytest.mark.parametrize("point", SOURCE_POINTS)
def test_the_command_dies_and_after_settling_exactly_one_copy_runs(
    stage: Stage, counting: Counting, point: str
) -> None:
    code, text = ended(migrating(stage, counting.name, fault=f"{point}:exit"))
    assert code == EXIT_CODE, text
    settle(stage.a)
    counting.check_runs_only_on("b" if point in AWAY else "a")


@pytest.mark.parametrize("point", DESTINATION_POINTS)
def test_the_remote_agent_dies_and_started_again_exactly_one_copy_runs(
    stage: Stage, counting: Counting, point: str
) -> None:
    stage.stop_agent(stage.b)
    stage.start_agent(stage.b, env={"MIGRATOR_FAULT": f"{point}:exit"})
    command = migrating(stage, counting.name)
    stage.await_death(stage.b)
    stage.start_agent(stage.b)
    code, text = ended(command)
    if point in DECIDED:
        assert code == 0, text
        counting.check_runs_only_on("b")
    else:
        assert code in (7, 8), text
        assert "running on the source" in text
        counting.check_runs_only_on("a")


@pytest.fixture
def shop(stage: Stage) -> Iterator[str]:
    """A Redis with a little in it."""
    stage.start_container("shop", redis_command(stage.folder, PORT), address=ADDRESS)
    with stage.client.inside():
        fill(ADDRESS, PORT, 4)
    yield "shop"
    for host in (stage.a, stage.b):
        stop_all(host)
        assert veths(host) == 0
        assert_journals_closed(host)


@pytest.mark.parametrize(
    "point",
    ["source.frozen", "source.committing", "source.saved", "source.committed", "destination.held",
     "destination.commit", "destination.decided", "destination.resumed"],
)  # fmt: skip
def test_a_client_keeps_its_connection_whoever_dies(stage: Stage, shop: str, point: str) -> None:
    client = Workload(
        "migrator.testing.redisclient", stage.folder, ADDRESS, PORT, "--rate", 500, netns=stage.client.namespace
    )
    with client:
        if point.startswith("source."):
            code, text = ended(migrating(stage, shop, fault=f"{point}:exit"))
            assert code == EXIT_CODE, text
            settle(stage.a)
        else:
            stage.stop_agent(stage.b)
            stage.start_agent(stage.b, env={"MIGRATOR_FAULT": f"{point}:exit"})
            command = migrating(stage, shop)
            stage.await_death(stage.b)
            stage.start_agent(stage.b)
            code, text = ended(command)
        client.check_alive_and_progressing()
        client.finish()
    report = json.loads(client.stdout.read_text().splitlines()[-1])
    assert (report["lost_replies"], report["wrong_replies"], report["reconnects"]) == (0, 0, 0), report
