"""When the controller turns a lost host off, and when it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator.fleet import records as r
from migrator.fleet.agents import Observation
from migrator.fleet.cluster import Known
from migrator.fleet.observer import Observer
from migrator.fleet.recoveries import Fencing, Recoveries
from migrator.fleet.state import FleetState
from migrator.fleet.store import open_store
from migrator.host import Login
from migrator.protocol.fleet import HostReport, WorkloadReport


class Scene:
    """Hosts with what they have said; `asked`: the lines of the program's arguments."""

    def __init__(self, state: FleetState, folder: Path, recoveries: Recoveries, observer: Observer) -> None:
        self.state, self.folder, self.recoveries, self.observer = state, folder, recoveries, observer

    def says(self, name: str, *workloads: str, ago: float = 0.0) -> None:
        report = HostReport(name=name, boot_id="x", at=1.0, kernel="", engine="", cpus=1.0, memory=1)
        running = tuple(WorkloadReport(name=one, state="running") for one in workloads)
        self.observer.observations[name] = Observation(report, running, time.time() - ago, time.monotonic() - ago)

    async def step(self) -> list[str]:
        await self.recoveries.step(self.observer.build().cluster)
        for task in list(self.recoveries._under_way.values()):
            await task
        asked = self.folder / "asked"
        return asked.read_text().split("\n")[:-1] if asked.exists() else []


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    store = await open_store(f"sqlite:{tmp_path}/fleet.db")
    state = await FleetState.open(store)
    lock = await store.acquire("leader", b"x", ttl=60.0)
    assert lock is not None
    observer = Observer(state, Login())
    hosts = {}
    for number, name in enumerate("abc", 1):
        hosts[name] = r.Host(name=name, address=f"10.0.0.{number}", cpus=1, memory_bytes=1, registered_at=1.0)
    observer.known = Known(hosts)
    await state.schedules.put("w", r.SnapshotSchedule(workload="w", every=60.0, restart_when_lost=True, host="a"))
    program = tmp_path / "off"
    program.write_text(f"#!/bin/sh\necho $1 $2 >> {tmp_path}/asked\nexit 1\n")
    program.chmod(0o755)
    recoveries = Recoveries(state, observer, lock, Fencing(program, after=0.0, within=5.0))
    made = Scene(state, tmp_path, recoveries, observer)
    for name in "bc":
        made.says(name)
    yield made
    await recoveries.close()
    await store.close()


async def test_one_that_was_never_heard_is_turned_off_and_not_again_at_once(scene: Scene) -> None:
    assert await scene.step() == ["a 10.0.0.1"]
    assert await scene.step() == ["a 10.0.0.1"], "a program that failed is not run again and again"
    assert await scene.state.cordons.all() == {}, "and nothing is done about a host that may run"


async def test_one_that_answered_a_moment_ago_is_left_alone(scene: Scene) -> None:
    scene.says("a", "w", ago=5.0)
    assert await scene.step() == []


async def test_half_of_a_fleet_that_is_silent_may_be_us(scene: Scene) -> None:
    scene.says("b", ago=100.0)
    assert await scene.step() == []


async def test_one_of_which_nothing_is_wanted_is_left_alone(scene: Scene) -> None:
    await scene.state.schedules.put("w", r.SnapshotSchedule(workload="w", every=60.0, host="a"))
    assert await scene.step() == []


async def test_what_runs_elsewhere_is_no_reason_to_turn_a_host_off(scene: Scene) -> None:
    scene.says("b", "w")
    assert await scene.step() == []


async def test_silence_is_counted_from_when_this_controller_began_to_lead(scene: Scene) -> None:
    scene.recoveries._fencing = Fencing(scene.folder / "off", after=3600.0)
    scene.says("a", "w", ago=7200.0)
    assert await scene.step() == []


async def test_a_program_that_hangs_is_ended_and_believed_nothing(scene: Scene) -> None:
    (scene.folder / "off").write_text("#!/bin/sh\nexec sleep 60\n")
    scene.recoveries._fencing = Fencing(scene.folder / "off", after=0.0, within=0.2)
    async with asyncio.timeout(20):
        await scene.step()
    assert await scene.state.cordons.all() == {}
