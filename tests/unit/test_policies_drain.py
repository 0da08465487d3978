"""Emptying a host, in a world where migrations take time and sometimes fail."""

from __future__ import annotations

import random
from typing import cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies_samples import changed, cluster, clusters, fields, host, violations, workload

from policies import drain
from policies.drain import AtDeadline, Cordon, DrainError, Record, Release, Save, Start, State, Step
from policies.model import Cluster, Host, HostState, Workload
from policies.plan import Cause, Move

TICK = 5.0


class World:
    """Does what steps say: a migration is seen to run for as long as it was predicted, then it is over."""

    def __init__(self, now: Cluster, *, failing: float = 0.0, seed: int = 0) -> None:
        self.now = now
        self.failing = failing
        self.chance = random.Random(seed)
        self.running: dict[str, tuple[Move, float]] = {}
        self.started: list[Move] = []
        self.saved: list[str] = []
        self.most = 0

    def set(self, name: str, state: HostState) -> None:
        hosts = [Host(**{**fields(one), "state": state}) if one.name == name else one for one in self.now.hosts]  # type: ignore[arg-type]
        self.now = cluster(hosts, list(self.now.workloads), self.now.time)

    def act(self, record: Record, step: Step) -> Record:
        for action in step.actions:
            match action:
                case Cordon(name):
                    self.set(name, HostState.DRAINING)
                case Release(name):
                    self.set(name, HostState.MAINTENANCE)
                case Save(name):
                    self.saved.append(name)
                    self.change(name, None)
                case Start(move, force):
                    wrong = violations(self.now, (move,), share=1.0, budgets=not force, split=True)
                    assert not wrong or move.bundle, wrong
                    self.started.append(move)
                    self.running[move.workload] = (move, self.now.time + move.cost.seconds)
                    self.change(move.workload, changed(self.workload(move.workload), moving_to=move.target))
        self.most = max(self.most, len(self.running))
        return record

    def workload(self, name: str) -> Workload:
        return next(one for one in self.now.workloads if one.name == name)

    def change(self, name: str, new: Workload | None) -> None:
        old = [one for one in self.now.workloads if one.name != name]
        self.now = cluster(list(self.now.hosts), [*old, *([new] if new else [])], self.now.time)

    def wait(self, record: Record) -> Record:
        time = self.now.time + TICK
        for name, (move, end) in list(self.running.items()):
            if end > time:
                continue
            del self.running[name]
            if self.chance.random() < self.failing:
                self.change(name, changed(self.workload(name), moving_to=None))
                record = drain.failed(record, name, "the link broke", time)
            else:
                self.change(name, changed(self.workload(name), host=move.target, moving_to=None, last_moved=time))
        self.now = cluster(list(self.now.hosts), list(self.now.workloads), time)
        return record

    def run(self, record: Record, settings: drain.Settings = drain.SETTINGS, most: int = 150) -> Step:
        for _ in range(most):
            step = drain.step(self.now, record, settings)
            # The record is stored, and another controller goes on with it.
            record = msgspec.json.decode(msgspec.json.encode(step.record), type=Record)
            record = self.act(record, step)
            if record.state is not State.RUNNING:
                return step
            record = self.wait(record)
        raise AssertionError(f"not over after {most} steps: {step}")


def three(count: int = 6, **more: object) -> Cluster:
    return cluster(
        [host("a"), host("b"), host("c")], [workload(f"w{n}", "a", 1, 2 + 6 * n / count, **more) for n in range(count)]
    )


def test_a_host_is_cordoned_emptied_and_released() -> None:
    world = World(three())
    first = drain.step(world.now, drain.begin(world.now, "a"))
    assert first.actions == (Cordon("a"),)
    last = world.run(drain.begin(world.now, "a"))
    assert last.record.state is State.EMPTY
    assert last.actions == (Release("a"),)
    assert not last.stays
    assert {one.host for one in world.now.workloads} == {"b", "c"}
    assert last.progress.done == last.progress.total == 6
    assert world.most == 2
    assert {move.cause for move in world.started} == {Cause.DRAIN}


def test_the_longest_goes_first() -> None:
    world = World(three())
    world.run(drain.begin(world.now, "a"))
    assert [move.workload for move in world.started] == [f"w{number}" for number in (5, 4, 3, 2, 1, 0)]


def test_the_estimate_comes_true() -> None:
    world = World(three(12))
    record = drain.begin(world.now, "a")
    record = world.wait(world.act(record, step := drain.step(world.now, record)))
    step = drain.step(world.now, step.record)
    estimate = step.progress.ends_at
    last = world.run(record)
    assert estimate is not None
    assert last.record.ended_at is not None
    assert estimate <= last.record.ended_at <= estimate + 12 * TICK


def test_emptiness_is_verified_by_a_later_look() -> None:
    empty = cluster([host("a", state=HostState.DRAINING), host("b")], [workload("w", "b")])
    record = msgspec.structs.replace(drain.begin(empty, "a"), wanted=("w",))
    stale = tuple(msgspec.structs.replace(one, observed_at=999.0) for one in empty.hosts)
    step = drain.step(msgspec.structs.replace(empty, hosts=stale), record)
    assert step.record.state is State.RUNNING
    assert drain.step(empty, step.record).record.state is State.EMPTY


def test_what_is_pinned_stays_and_is_told() -> None:
    now = cluster([host("a"), host("b")], [workload("free", "a"), workload("pin", "a", pinned=True)])
    last = World(now).run(drain.begin(now, "a"))
    assert last.record.state is State.STAYS
    assert last.stays == {"pin": "pin is pinned to a"}


def test_a_drain_that_cannot_fit_moves_what_fits_and_says_what_stays() -> None:
    now = cluster(
        [host("a"), host("b")],
        [workload("small", "a", 1, 8), workload("large", "a", 1, 50), workload("there", "b", 1, 20)],
    )
    last = World(now).run(drain.begin(now, "a"))
    assert last.record.state is State.STAYS
    assert list(last.stays) == ["large"]
    assert "host b has no room: memory" in last.stays["large"]


def test_a_downtime_budget_is_kept_until_force() -> None:
    now = three(2, downtime_budget=0.01)
    last = World(now).run(drain.begin(now, "a"))
    assert last.record.state is State.STAYS
    assert "its budget is 10.0 ms" in last.stays["w0"]
    world = World(now)
    last = world.run(drain.begin(now, "a", seconds=60, at_deadline=AtDeadline.FORCE))
    assert last.record.state is State.EMPTY
    assert min(move.cost.downtime for move in world.started) > 0.01


def test_at_the_deadline_what_is_left_is_saved_and_ended() -> None:
    now = three(3, pinned=True)
    world = World(now)
    last = world.run(drain.begin(now, "a", seconds=60, at_deadline=AtDeadline.SAVE))
    assert last.record.state is State.EMPTY
    assert sorted(world.saved) == ["w0", "w1", "w2"]
    assert sorted(last.record.ended) == ["w0", "w1", "w2"]


def test_at_the_deadline_nothing_more_is_begun() -> None:
    world = World(three(12))
    last = world.run(drain.begin(world.now, "a", seconds=30))
    assert last.record.state is State.STAYS
    assert set(last.stays.values()) == {"the deadline has passed"}
    assert len(last.stays) + last.progress.done == 12
    assert 0 < last.progress.done < 12


def test_a_bundle_leaves_together_and_groups_stay_apart() -> None:
    parts = [workload(f"t{number}", "a", affinity=("t",)) for number in range(3)]
    apart = [workload(f"x{number}", at, anti_affinity=("x",)) for number, at in enumerate("ab")]
    now = cluster([host(name) for name in "abc"], [*parts, *apart])
    world = World(now)
    assert world.run(drain.begin(now, "a")).record.state is State.EMPTY
    assert len({world.workload(f"t{number}").host for number in range(3)}) == 1
    assert world.workload("x0").host == "c"


def test_a_failed_migration_is_tried_again_then_told() -> None:
    world = World(three(1), failing=1.0)
    last = world.run(drain.begin(world.now, "a"))
    assert last.record.state is State.STAYS
    assert len(world.started) == drain.SETTINGS.attempts
    assert last.stays == {"w0": "failed 3 times, the last time: the link broke"}


def test_a_migration_that_was_asked_for_and_never_began_is_tried_again() -> None:
    now = cluster([host("a", state=HostState.DRAINING), host("b")], [workload("w", "a")])
    first = drain.step(now, drain.begin(now, "a"))
    assert [type(action) for action in first.actions] == [Start]
    again = drain.step(now, first.record)
    assert not again.actions
    later = cluster(list(now.hosts), list(now.workloads), now.time + 31)
    second = drain.step(later, again.record)
    assert "never seen" in second.stays["w"]
    latest = cluster(list(now.hosts), list(now.workloads), now.time + 45)
    assert [type(action) for action in drain.step(latest, second.record).actions] == [Start]


def test_a_doubted_host_is_waited_for() -> None:
    now = cluster([host("a", state=HostState.DRAINING), host("b")], [workload("w", "a")])
    old = cluster(list(now.hosts), list(now.workloads), now.time)
    old = msgspec.structs.replace(old, time=now.time + 100)
    fresh = tuple(msgspec.structs.replace(one, observed_at=old.time - 100 * (one.name == "a")) for one in old.hosts)
    step = drain.step(msgspec.structs.replace(old, hosts=fresh), drain.begin(now, "a"))
    assert not step.actions
    assert step.record.state is State.RUNNING
    assert "last observed 100 s ago" in step.stays["w"]


def test_against_the_clock_the_most_valuable_goes_first_and_only_what_can_be_out_in_time() -> None:
    workloads = [workload(f"w{n}", "a", 0.5, 2.0, value=float(n)) for n in range(10)]
    now = cluster([host("a"), host("b"), host("c")], [*workloads, workload("huge", "a", 1, 20, value=5.5)])
    world = World(now)
    record = drain.begin(now, "a", seconds=30, evacuate=True)
    last = world.run(record)
    names = [move.workload for move in world.started]
    assert names == sorted(names, key=lambda name: -world.workload(name).value)
    assert names[0] == "w9"
    assert "huge" not in names
    assert last.record.state is State.STAYS
    assert all(world.workload(name).host != "a" for name in names)
    assert {move.cause for move in world.started} == {Cause.EVACUATE}


def test_what_was_moved_is_brought_home_and_nothing_else() -> None:
    world = World(three())
    last = world.run(drain.begin(world.now, "a"))
    away = [one.name for one in world.now.workloads]
    world.change("w0", changed(world.workload("w0"), host="c" if world.workload("w0").host == "b" else "b"))
    assert drain.give_back(world.now, last.record).moves == ()
    world.set("a", HostState.ACTIVE)
    plan = drain.give_back(world.now, last.record, drain.Settings(pace=drain.SETTINGS.pace))
    assert {move.workload for move in plan.moves} <= set(away) - {"w0"}
    assert len(plan.moves) == 4  # as many as may run at once from or to one host
    assert {move.target for move in plan.moves} == {"a"}
    assert any("enough migrations are under way" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("name", "more", "sentence"),
    [
        ("nowhere", {}, "host nowhere is not known"),
        ("b", {}, "host b is lost"),
        ("a", {"evacuate": True}, "needs the seconds"),
        ("a", {"seconds": 0.0}, "must be more than 0"),
        ("a", {"seconds": float("nan")}, "must be more than 0"),
        ("a", {"parallel": 0}, "must be more than 0"),
    ],
)
def test_a_drain_that_makes_no_sense_is_refused(name: str, more: dict[str, object], sentence: str) -> None:
    now = cluster([host("a"), host("b", state=HostState.LOST)], [])
    with pytest.raises(DrainError, match=sentence):
        drain.begin(now, name, **more)  # type: ignore[arg-type]


def test_a_cancelled_drain_does_nothing_more() -> None:
    now = three()
    record = drain.cancel(drain.begin(now, "a"), now.time)
    step = drain.step(now, record)
    assert not step.actions
    assert step.record.state is State.CANCELLED


@given(
    clusters(),
    st.sampled_from([None, 40.0]),
    st.sampled_from(list(AtDeadline)),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_drains_terminate_and_leave_nothing_untold(
    now: Cluster, seconds: float | None, at: AtDeadline, parallel: int, evacuate: bool, failing: float, seed: int
) -> None:
    ready = [
        Workload(**{**fields(one), "moving_to": None})  # type: ignore[arg-type]
        for one in now.workloads
    ]
    hosts = [Host(**{**fields(now.hosts[0]), "state": HostState.ACTIVE}), *now.hosts[1:]]  # type: ignore[arg-type]
    world = World(cluster(hosts, ready), failing=failing, seed=seed)
    evacuate = evacuate and seconds is not None
    record = drain.begin(world.now, "h0", seconds=seconds, at_deadline=at, parallel=parallel, evacuate=evacuate)
    last = world.run(record)
    left = {one.name for one in world.now.workloads if one.host == "h0"}
    assert set(last.stays) == left
    assert (last.record.state is State.EMPTY) == (not left)
    bundles = max((len([m for m in world.started if m.bundle == move.bundle]) for move in world.started), default=1)
    assert world.most <= max(parallel, bundles)
    accounted = left | set(last.record.moved) | set(last.record.ended)
    assert accounted == set(last.record.wanted)


@given(clusters())
@settings(max_examples=50, deadline=None)
def test_steps_are_deterministic(now: Cluster) -> None:
    try:
        record = drain.begin(now, "h0")
    except DrainError:
        return
    assert drain.step(now, record) == drain.step(now, record)
    assert cast(Step, drain.step(now, record)).progress.total == len(record.wanted)


@given(clusters(), st.floats(5, 120), st.integers(1, 4), st.sampled_from([0.0, 0.3]), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_an_evacuation_begins_nothing_that_is_not_predicted_to_be_out_in_time(
    now: Cluster, seconds: float, parallel: int, failing: float, seed: int
) -> None:
    ready = [changed(one, moving_to=None) for one in now.workloads]
    hosts = [Host(**{**fields(now.hosts[0]), "state": HostState.ACTIVE}), *now.hosts[1:]]  # type: ignore[arg-type]
    world = World(cluster(hosts, ready), failing=failing, seed=seed)
    end = world.now.time + seconds
    record = drain.begin(world.now, "h0", seconds=seconds, parallel=parallel, evacuate=True)
    for _ in range(60):
        step = drain.step(world.now, record)
        for action in step.actions:
            if isinstance(action, Start):
                assert world.now.time + action.move.cost.seconds <= end
                assert not action.force
        record = world.act(step.record, step)
        if record.state is not State.RUNNING:
            break
        record = world.wait(record)
    assert record.state is not State.RUNNING
    assert record.ended_at is not None
    assert record.ended_at <= end + 2 * TICK
    if record.state is State.STAYS:
        assert set(step.stays) == {one.name for one in world.now.workloads if one.host == "h0"}
