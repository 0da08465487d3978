"""From what is known and seen to the cluster that policies plan for: nothing is guessed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from migrator.fleet import records as r
from migrator.fleet.agents import Observation
from migrator.fleet.cluster import Known, Seen, build
from migrator.protocol.fleet import HostReport, WorkloadReport
from policies.consistency import inspect
from policies.model import HostState, Resources

NOW = 1e9


def host(name: str) -> r.Host:
    return r.Host(name=name, address="10.0.0.1", cpus=4, memory_bytes=1000, registered_at=1.0, labels={"zone": "x"})


def seen(name: str, *workloads: tuple[str, str], at: float = NOW, heard: float = NOW, **load: Any) -> Observation:
    report = HostReport(name=name, boot_id="x", at=at, kernel="6", engine="user", cpus=4.0, memory=1000, **load)
    running = tuple(WorkloadReport(name=one, state=state, cpu=1.0, memory=100) for one, state in workloads)
    return Observation(report, running, heard, time.monotonic())


def known(*moves: r.Move, **more: Any) -> Known:
    return Known({name: host(name) for name in "abc"}, moves={move.workload: move for move in moves}, **more)


def move(workload: str, source: str, destination: str) -> r.Move:
    return r.Move(
        workload=workload, source=source, destination=destination, migration="m-12345678", token=1, started_at=NOW
    )


def where(found: Seen) -> dict[str, tuple[str, str | None]]:
    return {one.name: (one.host, one.moving_to) for one in found.cluster.workloads}


def test_a_host_is_what_it_says_with_what_the_store_says_of_it() -> None:
    cordons = {"b": r.Cordon(host="b", mode=r.HostMode.DRAINING, since=1.0)}
    rules = {"w": r.Rule(workload="w", pinned=True, affinity=("g",), downtime_budget=0.5, value=3.0)}
    observations = {
        "a": seen("a", ("w", "running"), cpu_used=3.0, memory_used=500, io_pressure=0.5),
        "b": seen("b"),
        "c": seen("c"),
    }
    found = build(NOW, known(cordons=cordons, rules=rules, last_moved={"w": 5.0}), observations)
    a, b, _ = found.cluster.hosts
    assert (a.state, b.state) == (HostState.ACTIVE, HostState.DRAINING)
    assert a.load == Resources(3.0, 500.0) and a.other == Resources(2.0, 400.0)
    assert a.pressure.io == 0.5 and a.labels == {"zone": "x"} and a.engines == {"user"}
    (w,) = found.cluster.workloads
    assert w.pinned and w.affinity == ("g",) and w.downtime_budget == 0.5 and w.value == 3.0 and w.last_moved == 5.0
    assert found.notes == ()


@pytest.mark.parametrize(("age", "state"), [(0.0, HostState.ACTIVE), (29.0, HostState.ACTIVE), (31.0, HostState.LOST)])
def test_a_host_is_lost_when_it_has_been_silent_for_too_long(age: float, state: HostState) -> None:
    found = build(NOW, known(), {"a": seen("a", ("w", "running"), heard=NOW - age)})
    assert found.cluster.hosts[0].state is state
    assert [one.state for one in found.cluster.hosts[1:]] == [HostState.LOST] * 2, "of these nothing was ever heard"
    assert where(found) == {"w": ("a", None)}, "its workloads may still run there"


def test_containers_of_one_name_on_two_hosts_are_left_alone_on_both() -> None:
    found = build(NOW, known(), {"a": seen("a", ("w", "running")), "b": seen("b", ("w", "running"))})
    assert where(found) == {"w@a": ("a", None), "w@b": ("b", None)}
    assert all(one.pinned for one in found.cluster.workloads)
    assert "container w is on a, b" in found.notes[0]


@pytest.mark.parametrize(
    ("at_a", "at_b", "is_"),
    [
        ("running", None, ("a", "b")),
        ("frozen", "arriving", ("a", "b")),
        ("running", "running", ("a", "b")),  # its end lies between the two observations
        ("frozen", "running", ("a", "b")),
        (None, "running", ("b", None)),
        (None, "arriving", ("b", None)),
    ],
)
def test_a_workload_on_its_way_is_one(at_a: str | None, at_b: str | None, is_: tuple[str, str | None]) -> None:
    observations = {
        "a": seen("a", *([("w", at_a)] if at_a else [])),
        "b": seen("b", *([("w", at_b)] if at_b else [])),
    }
    found = build(NOW, known(move("w", "a", "b")), observations)
    assert where(found) == {"w": is_}
    assert found.notes == ()


def test_a_move_by_hand_is_seen_by_what_arrives() -> None:
    found = build(NOW, known(), {"a": seen("a", ("w", "running")), "b": seen("b", ("w", "arriving"))})
    assert where(found) == {"w": ("a", "b")}


def test_what_is_frozen_and_on_no_way_is_left_alone_and_told() -> None:
    found = build(NOW, known(), {"a": seen("a", ("w", "frozen"))})
    assert found.cluster.workloads[0].pinned
    assert "frozen" in found.notes[0] and "migrator settle" in found.notes[0]


def test_a_host_whose_containers_use_more_than_it_says_is_not_believed() -> None:
    found = build(NOW, known(), {"a": seen("a", ("w", "running"), ("v", "running"), cpu_used=0.1, memory_used=10)})
    assert "a" in inspect(found.cluster).hosts


def test_a_host_whose_clock_is_wrong_is_not_believed() -> None:
    found = build(NOW, known(), {"a": seen("a", at=NOW + 60), "b": seen("b", at=NOW - 300), "c": seen("c")})
    assert set(inspect(found.cluster).hosts) == {"a", "b"}
