"""Looking at a fleet: who is asked, whose word counts."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migrator.errors import TransportError
from migrator.fleet import prometheus
from migrator.fleet import records as r
from migrator.fleet.agents import Agent, Observation
from migrator.fleet.observer import Observer
from migrator.fleet.signals import SignalsError
from migrator.fleet.state import FleetState
from migrator.fleet.store import open_store
from migrator.host import Login
from migrator.protocol.fleet import HostReport, WorkloadReport


@pytest.fixture
async def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FleetState]:
    """Hosts a and b, whose agents say that they are; b's has another name in it."""

    async def observe(self: Agent, **_: Any) -> Observation:
        name = {"silent": "", "liar": "somebody"}.get(self.host.name, self.host.name)
        if not name:
            raise TransportError("silent does not answer")
        report = HostReport(
            name=name, boot_id="x", at=time.time(), kernel="", engine="", cpus=4.0, memory=1000, cpu_used=1.0
        )
        return Observation(report, (WorkloadReport(name=f"of-{name}", state="running"),), time.time(), time.monotonic())

    monkeypatch.setattr(Agent, "observe", observe)
    store = await open_store(f"sqlite:{tmp_path}/fleet.db")
    made = await FleetState.open(store)
    for number, name in enumerate(("a", "liar", "silent"), 1):
        address = f"10.0.0.{number}"
        await made.register(r.Host(name=name, address=address, cpus=4, memory_bytes=1000, registered_at=1.0))
    yield made
    await store.close()


async def test_one_that_is_silent_or_is_another_is_told_and_not_taken_for_what_it_is_not(state: FleetState) -> None:
    observer = Observer(state, Login())
    seen = await observer.look()
    assert {host.name: host.state.value for host in seen.cluster.hosts} == {
        "a": "active", "liar": "lost", "silent": "lost",
    }  # fmt: skip
    assert [one.name for one in seen.cluster.workloads] == ["of-a"]
    assert "calls itself somebody, not liar" in observer.errors["liar"]
    assert "does not answer" in observer.errors["silent"]


async def test_a_host_that_left_is_forgotten_and_one_that_moved_is_asked_where_it_is(state: FleetState) -> None:
    observer = Observer(state, Login())
    await observer.look()
    await state.unregister("silent")
    await state.register(r.Host(name="a", address="10.0.0.9", cpus=4, memory_bytes=1000, registered_at=2.0))
    await observer.look()
    assert set(observer.agents) == {"a", "liar"} and set(observer.errors) == {"liar"}
    assert observer.agents["a"].peer == "10.0.0.9:7022"


async def test_the_load_is_what_prometheus_says_or_what_the_agent_says_with_a_note(
    state: FleetState, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [
        prometheus.Seen({"a": r.Load(cpu=3.0, memory=700, io_pressure=0.5)}, {"liar": "nothing", "silent": "nothing"}),
        prometheus.Seen({}, {"a": "its newest sample is 300 s old"}),
        SignalsError("http://p does not answer"),
    ]
    asked: list[dict[str, str]] = []

    async def read(self: prometheus.PrometheusSignals) -> prometheus.Seen:
        asked.append(self._hosts)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, prometheus.Seen)
        return answer

    monkeypatch.setattr(prometheus.PrometheusSignals, "read", read)
    observer = Observer(state, Login(), prometheus="http://p")
    host = (await observer.look()).cluster.hosts[0]
    assert (host.load.cpu, host.load.memory, host.pressure.io) == (3.0, 700.0, 0.5)
    assert asked[0]["10.0.0.1"] == "a" and asked[0]["a"] == "a"
    seen = await observer.look()
    assert seen.cluster.hosts[0].load.cpu == 1.0
    assert seen.notes == ("the load of a is what its agent says: its newest sample is 300 s old",)
    seen = await observer.look()
    assert seen.cluster.hosts[0].load.cpu == 1.0 and "http://p does not answer" in seen.notes[0]


async def test_what_a_move_sent_is_what_the_next_one_is_predicted_to_send(state: FleetState) -> None:
    move = r.Move(
        workload="of-a", source="b", destination="a", migration="m1", token=1, started_at=1.0,
        predicted_bytes=1000, predicted_downtime=0.1,
    )  # fmt: skip
    done = r.FinishedMove(move=move, outcome=r.Outcome.MIGRATED, ended_at=2.0, bytes=20, downtime=0.2)
    await state.history.put("1", done)
    observer = Observer(state, Login())
    (workload,) = (await observer.look()).cluster.workloads
    assert workload.factors.bytes == pytest.approx(0.02) and workload.factors.downtime == pytest.approx(2.0)
    again = msgspec.structs.replace(done, bytes=1000)
    await state.history.put("2", again)
    assert (await observer.look()).cluster.workloads[0].factors.bytes == pytest.approx(0.02)
    observer.read_history_again()
    assert (await observer.look()).cluster.workloads[0].factors.bytes == pytest.approx(1.0)
