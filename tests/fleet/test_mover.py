"""Moves and what becomes of them, with agents that answer as they are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from migrator.errors import TransportError
from migrator.fleet import mover as module
from migrator.fleet import records as r
from migrator.fleet.agents import Agent, Observation
from migrator.fleet.mover import Mover
from migrator.fleet.observer import Observer
from migrator.fleet.state import FleetState
from migrator.fleet.store import Lock, NotHeld, open_store
from migrator.host import Login
from migrator.protocol.fleet import Depart, Departed, Departing, HostReport, WorkloadReport
from policies import plan
from policies.cost import Cost

MOVE = plan.Move(
    workload="w", source="a", target="b", cause=plan.Cause.DRAIN, reason="r", gain=0.0, cost=Cost(1e6, 1.0, 0.02, 0.1)
)


class FakeAgent:
    """`script`: what it answers to each order or question, an answer or an error. `runs`: its containers."""

    def __init__(self, name: str) -> None:
        self.host = r.Host(name=name, address=f"10.0.0.{ord(name)}", cpus=1, memory_bytes=1, registered_at=1.0)
        self.script: list[list[Any]] = []
        self.runs: dict[str, str] = {}
        self.reachable = True
        self.orders: list[Depart] = []
        self.asked: list[str] = []

    async def depart(self, order: Depart) -> AsyncIterator[Departing | Departed]:
        self.orders.append(order)
        async for one in self._play(order.migration):
            yield one

    async def watch(self, migration: str) -> AsyncIterator[Departing | Departed]:
        self.asked.append(migration)
        async for one in self._play(migration):
            yield one

    async def _play(self, migration: str) -> AsyncIterator[Departing | Departed]:
        for one in self.script.pop(0) if self.script else [("unknown", "")]:
            if isinstance(one, Exception):
                raise one
            if one == "going":
                yield Departing(migration, "precopy", 5, 0.01)
            elif one == "for ever":
                await asyncio.Event().wait()
            else:
                yield Departed(migration, one[0], reason=one[1], downtime=0.01, bytes=7)

    async def observe(self, **_: Any) -> Observation:
        if not self.reachable:
            raise TransportError(f"{self.host.name} does not answer")
        report = HostReport(name=self.host.name, boot_id="x", at=1.0, kernel="", engine="", cpus=1.0, memory=1)
        running = tuple(WorkloadReport(name=name, state=state) for name, state in self.runs.items())
        return Observation(report, running, time.time(), time.monotonic())


class Scene:
    def __init__(self, state: FleetState, lock: Lock) -> None:
        self.state, self.lock = state, lock
        self.a, self.b = FakeAgent("a"), FakeAgent("b")
        self.observer = Observer(state, Login())
        self.observer.agents = cast(dict[str, Agent], {"a": self.a, "b": self.b})
        self.ended: list[r.FinishedMove] = []
        self.mover = Mover(state, self.observer, lock, self.ended.append)

    async def end(self) -> r.FinishedMove:
        async with asyncio.timeout(20):
            while not self.ended:
                await asyncio.sleep(0.01)
        assert await self.state.moves.all() == {}
        ((_, stored),) = (await self.state.history.all()).items()
        assert stored.record == self.ended[0]
        return self.ended[0]


@pytest.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr(module, "_AGAIN", 0.01)
    store = await open_store(f"sqlite:{tmp_path}/fleet.db")
    state = await FleetState.open(store)
    lock = await store.acquire("leader", b"x", ttl=60.0)
    assert lock is not None
    made = Scene(state, lock)
    yield made
    await made.mover.close()
    await store.close()


async def test_a_move_is_claimed_ordered_and_goes_into_the_history(scene: Scene) -> None:
    scene.a.script = [["going", ("migrated", "")]]
    assert await scene.mover.begin(MOVE, plan="p1", drain_of="a")
    claim = (await scene.state.moves.get("w")) or None
    done = await scene.end()
    (order,) = scene.a.orders
    assert (order.workload, order.peer, order.token) == ("w", "10.0.0.98:7022", scene.lock.token)
    assert order.fleet == scene.state.fleet.id and order.max_downtime is None
    assert claim is None or claim.record.migration == order.migration
    assert done.outcome is r.Outcome.MIGRATED and done.downtime == 0.01 and done.bytes == 7
    assert (done.move.plan, done.move.drain_of, done.move.cause) == ("p1", "a", "drain")
    assert scene.mover.progress == {}


async def test_a_workload_is_moved_once_at_a_time(scene: Scene) -> None:
    scene.a.script = [["going", "for ever"]]
    assert await scene.mover.begin(MOVE)
    assert not await scene.mover.begin(MOVE)
    await asyncio.sleep(0.05)
    assert len(scene.a.orders) == 1 and scene.mover.progress["w"].phase == "precopy"


async def test_a_downtime_budget_is_the_limit_unless_forced(scene: Scene) -> None:
    rules = {"w": r.Rule(workload="w", downtime_budget=0.25)}
    scene.observer.known = module_known(rules)
    scene.a.script = [[("aborted", "too long")], [("migrated", "")]]
    await scene.mover.begin(MOVE)
    await scene.end()
    await scene.mover.begin(MOVE, force=True)
    await asyncio.sleep(0.05)
    assert [order.max_downtime for order in scene.a.orders] == [0.25, None]


def module_known(rules: dict[str, r.Rule]) -> Any:
    from migrator.fleet.cluster import Known

    return Known({}, rules=rules)


async def test_who_does_not_lead_begins_nothing(scene: Scene) -> None:
    await scene.state.store.release(scene.lock)
    with pytest.raises(NotHeld):
        await scene.mover.begin(MOVE)
    assert scene.a.orders == [] and await scene.state.moves.all() == {}


@pytest.mark.parametrize("outcome", ["refused", "aborted"])
async def test_what_did_not_come_about_says_why(scene: Scene, outcome: str) -> None:
    scene.a.script = [[(outcome, "no room")]]
    await scene.mover.begin(MOVE)
    done = await scene.end()
    assert done.outcome.value == outcome and done.why == "no room"


@pytest.mark.parametrize(
    ("at_a", "at_b", "outcome"),
    [("running", None, "aborted"), (None, "running", "migrated"), (None, None, "aborted")],
)
async def test_where_it_runs_tells_what_a_forgetful_agent_does_not(
    scene: Scene, at_a: str | None, at_b: str | None, outcome: str
) -> None:
    scene.a.script = [["going", TransportError("the link broke")]]
    scene.a.runs = {"w": at_a} if at_a else {}
    scene.b.runs = {"w": at_b} if at_b else {}
    await scene.mover.begin(MOVE)
    assert (await scene.end()).outcome.value == outcome
    assert len(scene.a.orders) == 1, "what may have been heard is not said again"


@pytest.mark.parametrize(
    ("at_a", "at_b"), [("frozen", None), ("frozen", "arriving"), ("running", "arriving"), ("running", "running")]
)
async def test_while_it_is_not_known_where_it_runs_it_stays_claimed(scene: Scene, at_a: str, at_b: str | None) -> None:
    scene.a.script = [[("undecided", "")]]
    scene.a.runs = {"w": at_a}
    scene.b.runs = {"w": at_b} if at_b else {}
    await scene.mover.begin(MOVE)
    await asyncio.sleep(0.2)
    assert "w" in await scene.state.moves.all() and scene.ended == []
    scene.a.runs, scene.b.runs = {}, {"w": "running"}
    assert (await scene.end()).outcome is r.Outcome.MIGRATED


@pytest.mark.parametrize("silent", ["a", "b"])
async def test_a_host_that_does_not_answer_is_waited_for(scene: Scene, silent: str) -> None:
    scene.a.script = [[TransportError("gone")]]
    scene.a.runs = {"w": "running"}
    agent = scene.a if silent == "a" else scene.b
    agent.reachable = False
    await scene.mover.begin(MOVE)
    await asyncio.sleep(0.2)
    assert "w" in await scene.state.moves.all()
    agent.reachable = True
    assert (await scene.end()).outcome is r.Outcome.ABORTED


async def test_a_link_that_breaks_is_made_again_and_the_end_is_heard(scene: Scene) -> None:
    scene.a.script = [["going", TransportError("broke")], ["going", ("migrated", "")], ["going", ("migrated", "")]]
    await scene.mover.begin(MOVE)
    assert (await scene.end()).outcome is r.Outcome.MIGRATED
    assert len(scene.a.orders) == 1 and scene.a.asked


async def test_the_next_leader_follows_what_was_begun_and_orders_nothing(scene: Scene) -> None:
    scene.a.script = [["for ever"], ["going", ("migrated", "")]]
    await scene.mover.begin(MOVE)
    await asyncio.sleep(0.05)
    await scene.mover.close()
    await scene.state.store.release(scene.lock)
    lock = await scene.state.store.acquire("leader", b"y", ttl=60.0)
    assert lock is not None and lock.token > scene.lock.token
    following = Mover(scene.state, scene.observer, lock, scene.ended.append)
    for stored in (await scene.state.moves.all()).values():
        following.adopt(stored)
        following.adopt(stored)
    done = await scene.end()
    assert done.outcome is r.Outcome.MIGRATED and done.move.token == scene.lock.token
    assert len(scene.a.orders) == 1 and len(scene.a.asked) == 1
    await following.close()


async def test_a_deposed_leader_does_not_write_the_end(scene: Scene) -> None:
    scene.a.script = [["going", "for ever"]]
    await scene.mover.begin(MOVE)
    await asyncio.sleep(0.05)
    await scene.mover.close()
    scene.a.script = [[("migrated", "")]]
    (stored,) = (await scene.state.moves.all()).values()
    await scene.state.store.release(scene.lock)
    scene.mover.adopt(stored)
    await asyncio.sleep(0.2)
    assert "w" in await scene.state.moves.all() and scene.ended == []
