"""Controllers, members of etcd and agents die at random points; each workload goes on counting, and only once.

What each workload prints is a number more than the one before, into a log that its hosts share. Two copies would print
a number twice, if only for a moment; one that went back would, too; one that was lost would print no more.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from migrator.testing.etcd import EtcdCluster
from migrator.testing.fleet import CommandFailed, FleetStage

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

NAMES = [f"w{number}" for number in range(5)]
COUNTER = [
    sys.executable,
    "-c",
    "import sys, time\n"
    "held, number = bytearray(b'x') * (int(sys.argv[1]) << 20), 0\n"
    "while True:\n"
    "    print(number, flush=True)\n"
    "    number += 1\n"
    "    time.sleep(0.01)\n",
]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[tuple[FleetStage, EtcdCluster]]:
    with (
        FleetStage("abc", tag="kil") as stage,
        stage.client.inside(),
        EtcdCluster(tmp_path, members=3) as cluster,
    ):
        stage.use_store(cluster.url)
        yield stage, cluster


@pytest.mark.parametrize("seed", [8])
def test_whatever_dies_each_workload_runs_once(fleet: tuple[FleetStage, EtcdCluster], seed: int) -> None:
    stage, cluster = fleet
    chance = Random(seed)
    for number, name in enumerate(NAMES):
        stage.run("a", name, [*COUNTER, str(10 + 10 * number)])
    stage.command("balance", "--mode", "automatic", "--every", "1s", "--hold", "1", "--cooldown", "0s")
    controllers = [stage.controller("--ttl", "2", name=name) for name in ("x", "y")]
    for turn in range(6):
        if turn % 2 == 0:
            drained = max(stage.where().items(), key=lambda one: len(one[1]))[0]
            insist(stage, "drain", drained, "--parallel", "2", "--detach")
        time.sleep(chance.uniform(0.0, 1.5))
        match turn % 3:
            case 0:
                cluster.kill(chance.randrange(3))
            case 1:
                cluster.repair()
            case 2:
                victim = chance.choice("abc")
                stage.stop_agent(victim, kill=True)
                time.sleep(chance.uniform(0.0, 1.0))
                stage.start_agent(victim)
        controllers.pop(chance.randrange(2)).kill()  # the one that leads, or the one that waits to
        controllers.append(stage.controller("--ttl", "2", name=f"c{turn}"))
        if turn % 2 == 1:
            insist(stage, "uncordon", drained)
    cluster.repair()
    done = stage.json("drain", "a")
    assert done["state"] == "empty" and done["stays"] == {}
    # Balancing goes on between b and c, and the hosts are not looked at in one instant.
    deadline = time.monotonic() + 60
    where = stage.where()
    while sorted(itertools.chain.from_iterable(where.values())) != NAMES:
        assert time.monotonic() < deadline, where
        where = stage.where()
    assert where["a"] == []
    counted = {name: counts(stage, name) for name in NAMES}
    for name, numbers in counted.items():
        assert numbers == list(range(len(numbers))), f"{name}: {first_error(numbers)}"
    deadline = time.monotonic() + 60
    while not all(len(counts(stage, name)) > len(counted[name]) for name in NAMES):
        assert time.monotonic() < deadline, "one does not go on"
        time.sleep(0.1)


def insist(stage: FleetStage, *argv: str) -> None:
    """As a person would: what cannot be done while things die is asked for again."""
    deadline = time.monotonic() + 120
    while True:
        try:
            stage.command(*argv)
            return
        except CommandFailed as error:
            if time.monotonic() > deadline or error.code not in (2, 11):  # a host is silent, or the store is
                raise
            time.sleep(0.5)


def counts(stage: FleetStage, name: str) -> list[int]:
    """What a workload has printed so far."""
    text = (stage.lan.folder / "log" / f"{name}.log").read_text()
    return [int(line) for line in text.split("\n")[:-1]]


def first_error(numbers: list[int]) -> str:
    at = next(at for at, number in enumerate(numbers) if number != at)
    return f"after {numbers[max(at - 3, 0) : at]} came {numbers[at : at + 3]}"
