"""A host of the fleet that lies: what it says ends as an error about it, and the others are planned for."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import TransportError
from migrator.fleet import records as r
from migrator.fleet.agents import Agent, Observation
from migrator.fleet.cluster import Known, build
from migrator.host import Login
from migrator.protocol import fleet as f
from migrator.protocol import messages as m
from migrator.protocol.wire import MessageError
from policies import drain
from policies.balance import Hold, balance

HOST = {"name": "c", "boot_id": "x", "at": 1.0, "kernel": "k", "engine": "user", "cpus": 4.0, "memory": 1 << 32}


def record(name: str) -> r.Host:
    return r.Host(name=name, address="10.0.0.1", cpus=4, memory_bytes=1 << 32, registered_at=1.0)


class Liar:
    """A link whose other side has its answers ready."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    async def send(self, data: bytes) -> None: ...

    async def receive(self, *_: Any) -> bytes:
        return m.encode(self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])

    async def close(self) -> None: ...


def observed(*names: str, more: bool = False) -> f.Observed:
    return f.Observed(f.HostReport(**HOST), [f.WorkloadReport(name=name, state="running") for name in names], more)


@pytest.mark.parametrize(
    "answers",
    [
        [observed("a", more=True), observed(more=True)],
        [observed(more=True)],
        [observed("a", "a")],
        [observed("b", "a")],
        [observed("a", more=True), observed("a")],
        [observed("a", more=True)],
        [observed("../x")],
        [observed("a@b")],
        [observed("")],
        [f.Departed("m-00000001", "migrated")],
        [m.Failure("m-00000001", "no")],
    ],
)
async def test_a_list_that_makes_no_sense_is_an_error_about_that_host(
    answers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(record("c"), Login())

    async def connect(self: Agent) -> Any:
        return Liar(*answers)

    monkeypatch.setattr(Agent, "_connect", connect)
    with pytest.raises((MessageError, TransportError)):
        await agent.observe()


async def test_names_are_in_the_order_in_which_they_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(self: Agent) -> Any:
        return Liar(observed("a", "a-b", more=True), observed("a.b", "b"))

    monkeypatch.setattr(Agent, "_connect", connect)
    seen = await Agent(record("c"), Login()).observe()
    assert [one.name for one in seen.workloads] == ["a", "a-b", "a.b", "b"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("cpus", 0.0), ("cpus", 1e7), ("cpus", float("nan")), ("memory", 0), ("memory", 1 << 59), ("at", float("inf")),
     ("memory_used", 1 << 59), ("network_used", 1e18), ("cpu_pressure", 1.5), ("cpu_used", -1.0)],
)  # fmt: skip
def test_a_host_that_cannot_be_is_refused_where_it_is_read(field: str, value: float) -> None:
    data = msgspec.msgpack.encode({"type": "observed", "host": {**HOST, field: value}})
    with pytest.raises(MessageError):
        m.decode(data)


cores = st.sampled_from([0.0, 1e-300, 0.5, 4.0, 1e6])
sizes = st.sampled_from([0, 1, 1 << 30, (1 << 53) + 1, 1 << 58])
rates = st.sampled_from([0.0, 1e-300, 5.0, 1e17])
workloads = st.builds(
    f.WorkloadReport,
    name=st.sampled_from(["w1", "w2", "x1", "x2", "x3"]),
    state=st.sampled_from(["running", "frozen", "arriving", "", "\x1b[2J"]),
    cpu=cores,
    memory=sizes,
    network=rates,
    dirty_rate=st.none() | rates,
)
hosts = st.builds(
    f.HostReport,
    name=st.sampled_from(["c", "a", "", "x" * 256]),
    boot_id=st.just(""),
    at=st.sampled_from([0.0, 1e12, 1e9]),
    kernel=st.just(""),
    engine=st.sampled_from(["", "user"]),
    cpus=st.sampled_from([0.002, 4.0, 1e6]),
    memory=st.sampled_from([1, 1 << 32, 1 << 58]),
    cpu_used=cores,
    memory_used=sizes,
    network_used=rates,
    cpu_pressure=st.none() | st.sampled_from([0.0, 1.0]),
)


@given(host=hosts, lies=st.lists(workloads, max_size=5, unique_by=lambda one: one.name))
def test_whatever_one_host_says_the_others_are_planned_for(host: f.HostReport, lies: list[f.WorkloadReport]) -> None:
    said = m.decode(m.encode(f.Observed(host, sorted(lies, key=lambda one: one.name))))
    assert isinstance(said, f.Observed)
    now = time.time()
    honest = f.HostReport(**{**HOST, "at": now, "cpu_used": 1.0, "memory_used": 1 << 28})
    observations = {
        name: Observation(honest, (f.WorkloadReport(name=f"w{i}", state="running", cpu=1.0, memory=1 << 28),), now, 0.0)
        for i, name in enumerate("ab", 1)
    }
    observations["c"] = Observation(said.host, tuple(said.workloads), now, 0.0)
    seen = build(now, Known({name: record(name) for name in "abc"}), observations)
    balance(seen.cluster, Hold())
    drain.begin(seen.cluster, "a")
