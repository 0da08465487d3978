"""The budget of bytes: what was sent counts, whoever led then."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from migrator.fleet import records as r
from migrator.fleet.agents import Observation
from migrator.fleet.cluster import Known, build
from migrator.fleet.controller import Controller
from migrator.fleet.membership import Fleet
from migrator.fleet.observer import Observer
from migrator.fleet.plans import sent_by_balance
from migrator.fleet.state import FleetState
from migrator.fleet.store import open_store
from migrator.host import Login
from migrator.protocol.fleet import HostReport, WorkloadReport
from policies.balance import Settings
from policies.plan import Plan

MIB = 1 << 20


class Proposals:
    """Keeps the plans that are proposed."""

    def __init__(self) -> None:
        self.made: list[Plan] = []

    async def propose(self, made: Plan, **_: object) -> None:
        self.made.append(made)


def observation(name: str, *workloads: str) -> Observation:
    report = HostReport(
        name=name,
        boot_id="x",
        at=time.time(),
        kernel="6.18",
        engine="user",
        cpus=4.0,
        memory=1024 * MIB,
        cpu_used=0.9 * len(workloads),
        memory_used=50 * MIB * len(workloads),
    )
    running = tuple(WorkloadReport(name=one, state="running", cpu=0.9, memory=50 * MIB) for one in workloads)
    return Observation(report, running, time.time(), time.monotonic())


def ended(cause: str, bytes_sent: int, at: float) -> r.FinishedMove:
    move = r.Move(
        workload="w", source="a", destination="b", migration=f"m{at:.0f}", token=1, started_at=1.0, cause=cause
    )
    return r.FinishedMove(move=move, outcome=r.Outcome.MIGRATED, ended_at=at, bytes=bytes_sent)


@pytest.mark.parametrize(
    ("cause", "sent", "moves"), [("balance", 0, 2), ("balance", 200, 1), ("balance", 400, 0), ("drain", 400, 2)]
)
async def test_what_was_sent_by_whoever_led_counts(tmp_path: Path, cause: str, sent: int, moves: int) -> None:
    """Of 280 MiB that may be sent at once each move takes 50 and a little; drains are not rationed."""
    store = await open_store(f"sqlite:{tmp_path}/fleet.db")
    state = await FleetState.open(store)
    observer = Observer(state, Login())
    hosts = {
        name: r.Host(name=name, address=f"10.0.0.{ord(name)}", cpus=4, memory_bytes=1, registered_at=1.0)
        for name in "ab"
    }
    observer.observations = {"a": observation("a", "w", "x", "y", "z"), "b": observation("b")}
    seen = build(time.time(), Known(hosts), observer.observations)
    rules = Settings(hold=1, bytes_per_hour=float(MIB), bytes_at_once=280.0 * MIB)
    await state.set_settings(r.Settings(mode=r.Mode.AUTOMATIC, balance=rules))
    if sent:
        await state.history.put("1", ended(cause, sent * MIB, time.time()))
    controller, plans = Controller(Fleet(state, observer, Login()), name="controller-1"), Proposals()
    await controller._balance(seen, plans)  # type: ignore[arg-type]
    assert sum(len(plan.moves) for plan in plans.made) == moves
    await store.close()


def test_what_was_sent_is_told_in_the_order_in_which_it_was() -> None:
    history = [ended("rule", 3, 30.0), ended("drain", 9, 20.0), ended("balance", 1, 10.0)]
    assert sent_by_balance(history) == [(10.0, 1.0), (30.0, 3.0)]
