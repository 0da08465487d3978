"""The same with real agents, SSH between them and a real container: where COMMIT has changed who decides.

Every other point has its turn in tests/migration/test_migrate_faults.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from migrator.testing.faults import POINTS, environment
from migrator.testing.hosts import Host
from migrator.testing.stage import MIGRATOR, MigrateFailed, Stage

pytestmark = [pytest.mark.root, pytest.mark.timeout(90)]

COUNT = """
import os, time
fd = os.open({path!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
count = 0
while True:
    count += 1
    os.write(fd, b"%d\\n" % count)
    time.sleep(0.01)
"""
NAME = "faulty"


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage(agents=False, tag="f") as made:
        yield made


class Counter:
    """A container that counts into a file which both hosts share: two copies, or a lost one, would show."""

    def __init__(self, stage: Stage) -> None:
        self.path = stage.folder / "count"
        # An interpreter of its own accord: the test's may live where a container does not look.
        stage.start_container(NAME, [os.path.realpath(sys.executable), "-c", COUNT.format(path=str(self.path))])
        self.await_progress()

    def numbers(self) -> list[int]:
        text = self.path.read_text() if self.path.exists() else ""
        return [int(line) for line in text.splitlines()]

    def await_progress(self, seconds: float = 10.0) -> None:
        before, end = len(self.numbers()), time.monotonic() + seconds
        while len(self.numbers()) < before + 5:
            assert time.monotonic() < end, "it does not run"
            time.sleep(0.02)

    def is_still(self) -> bool:
        before = len(self.numbers())
        time.sleep(0.1)
        return len(self.numbers()) == before

    def check(self) -> None:
        """Every number once, in order."""
        numbers = self.numbers()
        assert numbers == list(range(1, len(numbers) + 1))


def settle(host: Host, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return host.run([*MIGRATOR, "settle", *options], check=check, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def names(host: Host) -> str:
    return str(host.run([*MIGRATOR, "ps"]).stdout)


def migrate_with(stage: Stage, point: str) -> None:
    """Migrate; one agent dies at `point`."""
    fault = environment(point)
    source = point.startswith("source.")
    stage.start_agent(stage.b, env={**stage.b.env, **({} if source else fault)})
    if source:
        stage.a.env.update(fault)
    try:
        stage.migrate(NAME, stage.a, stage.b, "--timeout", "20s")
    except MigrateFailed:
        pass
    finally:
        for key in fault:
            stage.a.env.pop(key, None)


@pytest.mark.parametrize(
    "point",
    [
        "source.committed",
        "destination.ready",
        "destination.decided",
    ],
)
def test_an_agent_dies_and_after_a_restart_the_workload_has_missed_nothing(stage: Stage, point: str) -> None:
    counter = Counter(stage)
    if point.startswith("destination."):
        migrate_while_agent_is_restarted(stage, point)
    else:
        migrate_with(stage, point)
        stage.stop_agent(stage.b)
        stage.start_agent(stage.b)
    settle(stage.a)
    counter.await_progress()
    counter.check()
    assert "nothing is open" in settle(stage.a).stdout
    running = [host.label for host in (stage.a, stage.b) if NAME in names(host)]
    assert len(running) == 1


def migrate_while_agent_is_restarted(stage: Stage, point: str) -> None:
    """A source that has sent COMMIT waits for the decision; a new agent on the destination tells it."""
    stage.start_agent(stage.b, env={**stage.b.env, **environment(point)})
    command = [*MIGRATOR, "migrate", NAME, f"root@{stage.b.address}:7022", "--json"]
    with stage.a.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as migration:
        deadline = time.monotonic() + 40
        while stage._running[stage.b.label].poll() is None:
            if migration.poll() is not None or time.monotonic() > deadline:
                migration.kill()
                said = migration.communicate(), stage.agent_log(stage.b)
                raise AssertionError(f"the point was never passed: {said}")
            time.sleep(0.02)
        stage.stop_agent(stage.b)
        stage.start_agent(stage.b)
        _, errors = migration.communicate(timeout=40)
    decided = POINTS.index(point) >= POINTS.index("destination.decided")
    assert migration.returncode == 0 if decided else migration.returncode in (7, 8), errors


def test_a_copy_stays_frozen_while_its_destination_is_gone_and_an_operator_decides(stage: Stage) -> None:
    counter = Counter(stage)
    migrate_with(stage, "source.committed")
    stage.stop_agent(stage.b, kill=True)
    # The destination's copy may run by now; while nobody answers, the source's must not.
    refused = settle(stage.a, check=False)
    assert refused.returncode == 9
    assert "--here" in refused.stdout
    counter.check()
    stage.start_agent(stage.b)
    settle(stage.a)
    counter.await_progress()
    counter.check()
