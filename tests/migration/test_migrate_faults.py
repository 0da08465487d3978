"""Real agents die by SIGKILL, links break, people press Ctrl-C: one copy goes on, and nothing is left behind.

The workload is a counter whose copies append to the same file wherever they run. Two copies that ran at the
same time, for however short, or one that went back to an earlier state, would show there for ever: as numbers
that come twice.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from pyroute2 import IPRoute

from migrator.container import list_containers, stop
from migrator.errors import Fate, WorkloadEnded
from migrator.linux import cgroup, procfs
from migrator.protocol.states import Recorded
from migrator.recovery.journal import Journal
from migrator.runtime.fault_points import EXIT_CODE, POINTS
from migrator.testing.hosts import Host
from migrator.testing.redisclient import fill
from migrator.testing.servers import redis_command
from migrator.testing.stage import AGENT_PORT, MIGRATOR, Stage
from migrator.testing.workloads import Workload, build

pytestmark = pytest.mark.root

# At these places death has an outcome of its own; all others with MIGRATOR_EVERY_FAULT=1 (2 minutes). That every
# place is safe as far as the protocol goes is shown by test_protocol_exploration.py.
CHOSEN = {
    "source.committing", "source.ready", "source.committed", "source.away",
    "destination.begun", "destination.commit", "destination.told",
}  # fmt: skip
EVERY = bool(os.environ.get("MIGRATOR_EVERY_FAULT"))
SOURCE_POINTS = [point for point in POINTS if point.startswith("source.") and (EVERY or point in CHOSEN)]
DESTINATION_POINTS = [point for point in POINTS if point.startswith("destination.") and (EVERY or point in CHOSEN)]
CLIENT_POINTS = ["source.frozen", "source.saved", "destination.held", "destination.decided"]
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

    def progresses(self) -> bool:
        before = len(self.numbers())
        time.sleep(0.2)
        return len(self.numbers()) > before

    def where(self) -> dict[str, list[tuple[int, str]]]:
        """By host: the pids of its tasks there, with their states."""
        found = {}
        for host in (self.stage.a, self.stage.b):
            found[host.label] = []
            with contextlib.suppress(OSError):  # a copy that is discarded just now
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
        other = "b" if label == "a" else "a"
        deadline = time.monotonic() + 10
        while self.where()[other] and time.monotonic() < deadline:  # stopped; it is being taken down
            time.sleep(0.05)
        self.check_one_history()
        where = self.where()
        assert len(where[label]) == 1, where
        assert not where[other], where
        for host in (self.stage.a, self.stage.b):
            await_closed(host)
            with host.inside():
                mine = [(c.alive, c.arriving) for c in list_containers() if c.name == self.name]
            assert mine == ([(True, False)] if host.label == label else []), (host.label, mine)
            group = self._group(host)
            assert (group is not None) == (host.label == label), group
            if self.bridge:
                assert veths(host) == (1 if host.label == label else 0)

    def end(self) -> None:
        for host in (self.stage.a, self.stage.b):
            stop_all(host)


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
            log = (host.folder / "agent.log").read_text()[-3000:]
            assert journal.state in (Recorded.CLOSED, Recorded.RESUMED), (host.label, journal.records, log)


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
        await_closed(host)


@pytest.mark.parametrize("point", CLIENT_POINTS)
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


# ---------------------------------------------------------------------- links that break, people who change their minds


@contextlib.contextmanager
def unplugged(host: Host) -> Iterator[None]:
    """The uplink of a host is down inside the block."""
    set_uplink(host, "down")
    try:
        yield
    finally:
        set_uplink(host, "up")


def set_uplink(host: Host, state: str) -> None:
    with host.inside(), IPRoute() as ip:
        ip.link("set", index=ip.link_lookup(ifname="uplink")[0], state=state)


def await_round(process: subprocess.Popen[Any], number: int = 1) -> str:
    """Read what a migration says until the line of a round."""
    assert process.stdout is not None
    text = ""
    while f"round {number} " not in text:
        line = process.stdout.readline()
        assert line, f"it ended: {text}"
        text += line
    return text


KILLED_AT = """
import os, runpy, sys, time
from migrator.linux import procfs
from migrator.runtime import fault_points
point, pid, *sys.argv = sys.argv[1:]
start = procfs.start_time(int(pid))
def kill():
    os.kill(int(pid), 9)
    while not procfs.has_ended(int(pid), start):  # it takes its end when a processor is free for it
        time.sleep(0.001)
fault_points.armed.point, fault_points.armed.action = point, kill
runpy.run_module("migrator", run_name="__main__")
"""


@pytest.mark.parametrize("point", ["source.proposed", "source.round", "source.frozen", "source.saved"])
def test_a_workload_that_ends_meanwhile_is_said_to_have_ended(stage: Stage, counting: Counting, point: str) -> None:
    argv = ["migrator", "migrate", counting.name, f"root@{stage.b.address}:{AGENT_PORT}"]
    command = [sys.executable, "-c", KILLED_AT, point, str(counting.pid), *argv]
    code, text = ended(stage.a.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    assert code == WorkloadEnded.exit_code, text
    assert f"pid {counting.pid} ended by itself" in text and f"the workload is {Fate.ENDED.value}" in text, text
    assert "running on the source" not in text
    for host in (stage.a, stage.b):
        await_closed(host)  # the source does not wait for the destination to have discarded what it had made
    assert counting.where() == {"a": [], "b": []}


NEVER = ("--max-downtime", "1us", "--timeout", "60s")  # pre-copy goes on and on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_during_pre_copy_leaves_everything_as_it_was(stage: Stage, counting: Counting, number: int) -> None:
    command = migrating(stage, counting.name, *NEVER)
    await_round(command)
    command.send_signal(number)
    code, text = ended(command)
    assert code == 130, text
    assert "runs on the source" in text
    assert counting.where()["a"][0][0] == counting.pid
    counting.check_runs_only_on("a")


def test_ctrl_c_while_frozen_thaws(stage: Stage, counting: Counting) -> None:
    stage.stop_agent(stage.b)
    stage.start_agent(stage.b, env={"MIGRATOR_FAULT": "destination.built:hang"})
    command = migrating(stage, counting.name)
    await_still(counting)
    command.send_signal(signal.SIGINT)
    code, text = ended(command)
    assert code == 130, text
    assert "runs on the source" in text
    counting.await_progress()
    stage.stop_agent(stage.b, kill=True)
    stage.start_agent(stage.b)
    counting.check_runs_only_on("a")


def await_still(counting: Counting, seconds: float = 20.0) -> None:
    """Wait until the workload does not run."""
    deadline = time.monotonic() + seconds
    while True:
        before = len(counting.numbers())
        time.sleep(0.2)
        if len(counting.numbers()) == before:
            return
        assert time.monotonic() < deadline, "it never stood still"


def test_a_remote_agent_that_stands_still_after_commit_keeps_the_copy_frozen_until_it_answers(
    stage: Stage, counting: Counting
) -> None:
    stage.stop_agent(stage.b)
    stage.start_agent(stage.b, env={"MIGRATOR_FAULT": "destination.commit:hang"})
    command = migrating(stage, counting.name)
    await_still(counting)
    time.sleep(1)
    assert command.poll() is None
    assert not counting.progresses()
    stage.stop_agent(stage.b, kill=True)
    stage.start_agent(stage.b)
    code, text = ended(command)
    assert code == 8, text
    assert "the agent that built the copy ended before it was to run" in text
    counting.check_runs_only_on("a")


def test_a_link_that_breaks_aborts_before_commit_and_leaves_the_copy_frozen_after_it(
    stage: Stage, shop: str, counting: Counting
) -> None:
    client = Workload(
        "migrator.testing.redisclient", stage.folder, ADDRESS, PORT, "--rate", 500, netns=stage.client.namespace
    )
    with client:
        before = migrating(stage, shop, *NEVER)
        await_round(before)
        code, text = ended(migrating(stage, counting.name, fault="source.committed:exit"))
        assert code == EXIT_CODE, text
        counting.await_progress()  # over there; the copy here stays frozen until that is known
        with unplugged(stage.b):
            done = stage.a.run([*MIGRATOR, "settle"], check=False)
            assert done.returncode == 9, done.stdout
            assert "stays frozen" in done.stdout
            assert "--here" in done.stdout
            assert "--away" in done.stdout
            code, text = ended(before)
        assert code in (7, 8), text
        assert "running on the source" in text
        assert [len(tasks) for tasks in counting.where().values()] == [1, 1]
        settle(stage.a)
        counting.await_progress()
        deadline = time.monotonic() + 10
        while counting.where()["a"] and time.monotonic() < deadline:  # killed; it is being taken down
            time.sleep(0.05)
        counting.check_one_history()
        assert [len(tasks) for tasks in counting.where().values()] == [0, 1]
        client.check_alive_and_progressing()
        client.finish()
    report = json.loads(client.stdout.read_text().splitlines()[-1])
    assert (report["lost_replies"], report["wrong_replies"], report["reconnects"]) == (0, 0, 0), report
    await_closed(stage.b)


def await_closed(host: Host, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return assert_journals_closed(host)
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_killed_at_any_time_exactly_one_copy_runs(stage: Stage, counting: Counting, side: str) -> None:
    rng = random.Random(side)
    for _ in range(3):
        command = migrating(stage, counting.name)
        await_round(command)
        time.sleep(rng.uniform(0.0, 0.08))
        if side == "source":
            command.kill()
        else:
            stage.stop_agent(stage.b, kill=True)
            stage.start_agent(stage.b)
        ended(command)
        settle(stage.a)
        await_closed(stage.b)
        counting.await_progress()
        counting.check_one_history()
        where = counting.where()
        assert sorted(len(tasks) for tasks in where.values()) == [0, 1], where
        if where["b"]:
            stage.migrate(counting.name, stage.b, stage.a)
