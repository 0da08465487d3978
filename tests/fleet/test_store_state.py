"""The typed records: what is refused, what goes together, what a damaged store says."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from migrator.errors import UsageError
from migrator.fleet import records as r
from migrator.fleet.state import FleetState
from migrator.fleet.store import Conflict, Lock, NotHeld, Store, StoreCorrupt
from policies import balance, drain_record, plan, windows
from policies.cost import Cost
from policies.model import Cluster

Opener = Callable[[], Awaitable[Store]]

HOST = r.Host(name="a", address="10.0.0.1", cpus=8, memory_bytes=1 << 34, labels={"zone": "x"}, registered_at=1e9)


def move_of(workload: str, lock: Lock, **changed: Any) -> r.Move:
    facts = {
        "source": "a",
        "destination": "b",
        "migration": f"{workload}-12345678",
        "token": lock.token,
        "started_at": 1e9,
    }
    return r.Move(workload=workload, **(facts | changed))


async def leader(store: Store, name: str = "leader") -> Lock:
    lock = await store.acquire(name, b"test", ttl=30.0)
    assert lock is not None
    return lock


async def test_every_record_comes_back_as_it_was_put(store: Store) -> None:
    state = await FleetState.open(store)
    lock = await leader(store)
    planned = plan.Move(
        workload="w",
        source="a",
        target="b",
        cause=plan.Cause.BALANCE,
        reason="hot",
        gain=0.25,
        cost=Cost(5.0, 1.0, 0.1, 0.5),
    )
    made = plan.make(Cluster(time=1.0), [planned], imbalance=0.5, predicted=0.25, notes=["so it is"])
    begun = drain_record.Record(
        host="a", began_at=1.0, deadline=2.0, at_deadline=drain_record.AtDeadline.SAVE, moved={"w": "b"},
        started={"v": drain_record.Started("b", 1.0, 2.0)}, failed={"u": drain_record.Attempt(1, 1.5, "no room")},
    )  # fmt: skip
    drain = r.Drain(record=begun, stays={"u": "no room"}, updated_at=2.0)
    finished = r.FinishedMove(move=move_of("w", lock), outcome=r.Outcome.MIGRATED, ended_at=3.0, downtime=0.02)
    for table, record in (
        (state.hosts, HOST),
        (state.alive, r.Alive(host="a", boot_id="x", at=1.5, load=r.Load(cpu=0.5, memory=3, io_pressure=0.25))),
        (state.cordons, r.Cordon(host="a", mode=r.HostMode.DRAINING, since=1.0, drain=drain)),
        (state.plans, r.Plan(id=made.id, state=r.PlanState.DONE, plan=made, failed={"w": "refused"}, achieved=0.3)),
        (state.moves, move_of("w", lock)),
        (state.history, finished),
        (state.schedules, r.SnapshotSchedule(workload="w", every=60.0, keep=3, restart_when_lost=True)),
        (state.rules, r.Rule(workload="w", affinity=("web",), downtime_budget=0.1, pinned=True)),
    ):
        await table.put("x", record)  # type: ignore[arg-type]
        found = await table.get("x")
        assert found is not None and found.record == record
        assert list(await table.all()) == ["x"]
    weekend = windows.Window(days=frozenset({5, 6}), end=3600.0)
    settings = r.Settings(mode=r.Mode.AUTOMATIC, balance=balance.Settings(hold=2, windows=(weekend,)))
    assert await state.settings() == r.Settings()
    await state.set_settings(settings)
    assert await state.settings() == settings


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "../a"},
        {"name": ""},
        {"name": "a" * 64},
        {"name": "a\n"},
        {"cpus": 0},
        {"memory_bytes": -1},
        {"port": 0},
        {"port": 65536},
        {"registered_at": math.nan},
        {"registered_at": math.inf},
        {"registered_at": -1.0},
        {"labels": {"zone": "x" * 300}},
        {"labels": {"": "x"}},
        {"kernel": None},
    ],
)
async def test_a_record_out_of_bounds_is_never_written(store: Store, bad: dict[str, Any]) -> None:
    state = await FleetState.open(store)
    with pytest.raises(UsageError, match="bad Host"):
        await state.hosts.put("a", msgspec.structs.replace(HOST, **bad))
    assert await state.hosts.all() == {}


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'{"name": "a"}',
        msgspec.json.encode(HOST)[:-1] + b',"shoe_size":44}',
        msgspec.json.encode(HOST)[:-1],
        msgspec.json.encode(HOST).replace(b'"cpus":8', b'"cpus":-8'),
        msgspec.json.encode(HOST).replace(b'"cpus":8', b'"cpus":"8"'),
    ],
)
async def test_a_record_that_is_none_is_an_error_that_names_it(store: Store, value: bytes) -> None:
    state = await FleetState.open(store)
    await state.register(msgspec.structs.replace(HOST, name="b"))
    await store.put("hosts/a", value)
    for reading in (state.hosts.get("a"), state.hosts.all()):
        with pytest.raises(StoreCorrupt, match="hosts/a"):
            await reading


async def test_a_workload_is_moved_by_one_at_a_time(opener: Opener) -> None:
    one, other = await FleetState.open(await opener()), await FleetState.open(await opener())
    lock = await leader(one.store)
    done = await asyncio.gather(
        *(state.begin(move_of("w", lock), guard=lock) for state in (one, other, one, other)), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in done) == ["Conflict", "Conflict", "Conflict", "int"]


async def test_a_controller_that_was_deposed_begins_nothing(store: Store) -> None:
    state = await FleetState.open(store)
    old = await leader(store)
    await store.release(old)
    new = await leader(store)
    with pytest.raises(NotHeld):
        await state.begin(move_of("w", old), guard=old)
    with pytest.raises(UsageError, match="token"):
        await state.begin(move_of("w", old), guard=new)
    assert await state.moves.all() == {}
    await state.begin(move_of("w", new), guard=new)


async def test_a_move_ends_once_and_goes_into_the_history(store: Store) -> None:
    state = await FleetState.open(store)
    lock = await leader(store)
    move = move_of("w", lock)
    revision = await state.begin(move, guard=lock)
    finished = r.FinishedMove(move=move, outcome=r.Outcome.MIGRATED, ended_at=1000.5, downtime=0.01, bytes=1 << 20)
    await state.end(finished, expected=revision, guard=lock)
    with pytest.raises(Conflict):
        await state.end(finished, expected=revision, guard=lock)
    assert await state.moves.all() == {}
    ((name, stored),) = (await state.history.all()).items()
    assert stored.record == finished
    assert name.startswith("000000001000500.")
    await state.begin(move, guard=lock)


async def test_the_history_is_kept_to_its_length_the_oldest_going_first(store: Store) -> None:
    state = await FleetState.open(store)
    lock = await leader(store)
    for number in range(120):
        move = move_of("w", lock, migration=f"m-{number:08d}")
        revision = await state.begin(move, guard=lock)
        await state.end(
            r.FinishedMove(move=move, outcome=r.Outcome.ABORTED, ended_at=1000.0 + number), expected=revision
        )
    assert await state.trim_history(keep=20) == 100
    kept = [stored.record.ended_at for stored in (await state.history.all()).values()]
    assert kept == [1100.0 + number for number in range(20)]
    assert await state.trim_history(keep=20) == 0


async def test_a_host_in_the_middle_of_a_move_is_not_forgotten(store: Store) -> None:
    state = await FleetState.open(store)
    lock = await leader(store)
    await state.register(HOST)
    await state.cordons.put("a", r.Cordon(host="a", mode=r.HostMode.CORDONED, since=1.0))
    revision = await state.begin(move_of("w", lock), guard=lock)
    with pytest.raises(UsageError, match="w"):
        await state.unregister("a")
    await state.moves.delete("w", expected=revision)
    await state.unregister("a")
    assert await state.hosts.all() == {} and await state.cordons.all() == {}


async def test_a_host_is_alive_as_long_as_it_says_so(store: Store) -> None:
    state = await FleetState.open(store)
    lease = await store.grant(2.0)
    await state.beat(r.Alive(host="a", boot_id="x", at=1.0), lease)
    assert "a" in await state.alive.all()
    async with asyncio.timeout(15):
        while "a" in await state.alive.all():
            await asyncio.sleep(0.1)
    with pytest.raises(NotHeld):
        await state.beat(r.Alive(host="a", boot_id="x", at=1.0), lease)


async def test_a_fleet_keeps_its_id_and_many_that_begin_at_once_agree(opener: Opener) -> None:
    states = await asyncio.gather(*[FleetState.open(await opener()) for _ in range(4)])
    assert len({state.fleet.id for state in states}) == 1
    assert (await FleetState.open(await opener())).fleet == states[0].fleet


async def test_the_lock_of_another_name_guards_nothing_else(store: Store) -> None:
    state = await FleetState.open(store)
    lock = await leader(store, "other")
    with pytest.raises(NotHeld):
        await state.begin(move_of("w", lock), guard=replace(lock, name="leader"))
