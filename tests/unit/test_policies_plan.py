"""Plans as values: waves, what makes one out of date, and what is said of it."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from policies_samples import GIB, applied, changed, cluster, clusters, fields, host, workload

from policies import schedule
from policies.balance import Settings, balance
from policies.cost import Cost, precopy, predict
from policies.explain import move_text, plan_lines
from policies.model import Cluster, Host, HostState
from policies.plan import Cause, Move, Pace, Plan, Waves, make, outdated, with_started

EAGER = Settings(hold=1, pace=Pace(total=4, per_host=2, waves=2))


def uneven() -> Cluster:
    return cluster([host("a"), host("b"), host("c")], [workload(f"w{n}", "a", 2.0, 1.0) for n in range(6)])


def planned() -> tuple[Cluster, Plan]:
    now = uneven()
    plan, _ = balance(now, settings=EAGER)
    assert len(plan.moves) == 4
    return now, plan


def test_a_plan_is_the_same_in_json() -> None:
    _, plan = planned()
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_a_plan_for_the_same_cluster_has_the_same_id_and_for_another_not() -> None:
    now, plan = planned()
    assert balance(now, settings=EAGER)[0].id == plan.id
    assert balance(msgspec.structs.replace(now, time=now.time + 1), settings=EAGER)[0].id != plan.id


def test_a_plan_stays_valid_while_it_is_being_applied() -> None:
    now, plan = planned()
    assert outdated(plan, now) == ()
    for count in range(1, len(plan.moves) + 1):
        later = applied(now, plan.moves[:count])
        assert outdated(plan, later) == ()
        assert plan.remaining(later) == plan.moves[count:]
    started = with_started(now, {move.workload: move.target for move in plan.moves})
    assert outdated(plan, started) == ()


def test_a_plan_is_outdated_when_the_cluster_is_not_what_it_was() -> None:
    now, plan = planned()
    move = plan.moves[0]
    hosts, workloads = list(now.hosts), list(now.workloads)

    def reasons(hosts: list[Host], changes: dict[str, object], seconds: float = 1.0) -> tuple[str, ...]:
        new = [changed(one, **changes) if one.name == move.workload else one for one in workloads]
        return outdated(plan, cluster(hosts, new, now.time + seconds))

    def states(state: HostState) -> list[Host]:
        return [
            Host(**{**fields(one), "state": state}) if one.name == move.target else one  # type: ignore[arg-type]
            for one in hosts
        ]

    other = "b" if move.target == "c" else "c"
    assert f"workload {move.workload} is on {other}, not on a" in reasons(hosts, {"host": other})
    assert any("is pinned" in reason for reason in reasons(hosts, {"pinned": True}))
    assert any("is cordoned" in reason for reason in reasons(states(HostState.CORDONED), {}))
    assert any("is lost" in reason for reason in reasons(states(HostState.LOST), {}))
    assert any("is already moving" in reason for reason in reasons(hosts, {"moving_to": other}))
    assert any("s old" in reason for reason in reasons(hosts, {}, 601.0))
    assert any("in the future" in reason for reason in reasons(hosts, {}, -60.0))
    gone = cluster(hosts, [one for one in workloads if one.name != move.workload], now.time)
    assert f"workload {move.workload} is gone" in outdated(plan, gone)
    fewer = cluster([one for one in hosts if one.name != move.target], workloads, now.time)
    assert f"host {move.target} is not known" in outdated(plan, fewer)


def test_a_target_that_filled_up_makes_a_plan_outdated() -> None:
    now, plan = planned()
    more = [workload(f"new-{name}", name, 0.1, 57.0) for name in "bc"]
    reasons = outdated(plan, cluster(list(now.hosts), [*now.workloads, *more], now.time))
    assert reasons
    assert all("has no room: memory" in reason for reason in reasons)


@given(clusters(), clusters())
@settings(max_examples=60, deadline=None)
def test_any_plan_on_any_cluster_is_judged(one: Cluster, other: Cluster) -> None:
    plan, _ = balance(one, settings=EAGER)
    assert outdated(plan, one) == ()
    assert all(isinstance(reason, str) and reason for reason in outdated(plan, other))


@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(
        st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("efgh")), min_size=1, max_size=3), max_size=20
    ),
)
def test_waves_never_hold_more_than_the_pace(
    total: int, per_host: int, count: int, bundles: list[list[tuple[str, str]]]
) -> None:
    waves = Waves(Pace(total=total, per_host=per_host, waves=count), cluster([host("a")], []))
    entered: list[tuple[int, str, str]] = []
    for pairs in bundles:
        slots = waves.take_all(pairs)
        if slots is not None:
            entered += [(slot, *pair) for slot, pair in zip(slots, pairs, strict=True)]
    for wave in range(count):
        of_wave = [(source, target) for slot, source, target in entered if slot == wave]
        assert len(of_wave) <= total
        for name in "abcdefgh":
            assert sum(name in pair for pair in of_wave) <= per_host
    if len(entered) == total * count:
        assert waves.full()


def test_what_moves_already_takes_slots_of_the_first_wave() -> None:
    now = cluster([host("a"), host("b")], [workload("w", "a", moving_to="b")])
    waves = Waves(Pace(total=4, per_host=1, waves=1), now)
    assert not waves.open("a")
    assert waves.take("a", "b") is None


def test_a_move_is_told_with_its_reason_gain_cost_and_risk() -> None:
    move = Move(
        workload="redis\x1b[31m",
        source="a",
        target="b",
        cause=Cause.BALANCE,
        reason="a (cpu 75%, memory 9%) is above the mean, b (cpu 0%, memory 0%) is not",
        gain=0.25,
        cost=Cost(3 * GIB, 26.0, 0.035, 0.12),
        bundle="cache",
    )
    assert move_text(move) == (
        "redis\\x1b[31m: a -> b, with all of cache's bundle, because a (cpu 75%, memory 9%) is above the mean, "
        "b (cpu 0%, memory 0%) is not; gain 0.25; 3.0 GiB in 26.00 s, 35.0 ms of downtime predicted, risk 12%"
    )


def test_a_plan_is_told_wave_by_wave_with_its_notes() -> None:
    now, plan = planned()
    lines = list(plan_lines(msgspec.structs.replace(plan, notes=("host d is lost",))))
    assert lines[0].startswith(f"plan {plan.id}: 4 moves, 4.0 GiB")
    assert "imbalance" in lines[0]
    assert lines[1] == "wave 1:"
    assert sum(line.startswith("  w") for line in lines) == 4
    assert lines[-1] == "note: host d is lost"
    assert "nothing to move" in next(plan_lines(make(now, ())))


@given(st.floats(0, 1e12), st.floats(0, 1e11), st.floats(1e6, 1e11))
def test_precopy_sends_all_of_memory_and_never_more_frozen_than_there_is(
    memory: float, dirty_rate: float, rate: float
) -> None:
    sent, rest = precopy(memory, dirty_rate, rate)
    assert sent >= memory * (1 - 1e-9)
    assert 0 <= rest <= memory
    assert sent <= 10 * memory + 1e-6


def test_the_agents_own_prediction_counts() -> None:
    one = workload("w", "a", predicted_bytes=500.0, predicted_downtime=0.25)
    cost = predict(one, host("a"), host("b"))
    assert (cost.bytes, cost.downtime) == (500.0, 0.25)


def test_what_raises_the_risk() -> None:
    calm = predict(workload("w", "a"), host("a"), host("b")).risk
    busy = predict(workload("w", "a", dirty_rate=1e9), host("a"), host("b")).risk
    other = predict(workload("w", "a"), host("a", kernel="6.1"), host("b", kernel="6.18")).risk
    tight = predict(workload("w", "a", downtime_budget=0.03), host("a"), host("b")).risk
    assert calm == 0
    assert min(busy, other, tight) > 0
    assert max(busy, other, tight) < 1


jobs = st.lists(
    st.builds(
        schedule.Job,
        st.uuids().map(str),
        st.floats(0.1, 50),
        st.floats(0, 9),
    ),
    max_size=9,
)


@given(jobs, st.lists(st.floats(0, 20), min_size=1, max_size=3), st.floats(0, 60))
def test_what_is_chosen_is_over_in_time_and_the_most_valuable_that_fits_is_not_left_behind(
    wanted: list[schedule.Job], slots: list[float], seconds: float
) -> None:
    chosen = schedule.in_time(wanted, slots, seconds)
    by_name = {job.name: job for job in wanted}
    assert len(chosen) == len(set(chosen))
    free = sorted(slots)
    for name in chosen:
        free[0] += by_name[name].seconds
        assert free[0] <= seconds + 1e-9
        free.sort()
    able = [job for job in wanted if min(slots) + job.seconds <= seconds]
    if able:
        assert sum(by_name[name].value for name in chosen) >= max(job.value for job in able)
    for name in chosen:
        assert by_name[name] in able
