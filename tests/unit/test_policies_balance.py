"""Balancing: what is worth a move, and what is never moved."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies_samples import GIB, applied, changed, cluster, clusters, fleet, host, violations, workload

from policies.balance import Hold, Settings, balance, credit_left
from policies.cost import Prices
from policies.model import Cluster, HostState, Pressure, Resources
from policies.plan import Cause, Pace, Plan
from policies.windows import Window

EAGER = Settings(hold=1, cooldown=100.0, pace=Pace(total=8, per_host=2, waves=4))


def uneven() -> Cluster:
    """One host at 12 of 16 cores, one idle."""
    return cluster([host("a"), host("b")], [workload(f"w{number}", "a", 2.0, 1.0) for number in range(6)])


def test_load_goes_from_the_full_host_to_the_empty_one_and_says_why() -> None:
    plan, _ = balance(uneven(), settings=EAGER)
    assert [(move.source, move.target) for move in plan.moves] == [("a", "b")] * 3
    assert plan.predicted < 0.01 < plan.imbalance
    move = plan.moves[0]
    assert move.cause is Cause.BALANCE
    assert "a (cpu 75%, memory 9%)" in move.reason
    assert move.gain > EAGER.prices.of(move.cost) > 0
    assert move.cost.bytes == GIB


def test_a_reason_tells_load_and_pressure_apart() -> None:
    at = uneven()
    pressed = msgspec.structs.replace(at.hosts[0], pressure=Pressure(cpu=0.5, memory=0.004))
    plan, _ = balance(msgspec.structs.replace(at, hosts=(pressed, at.hosts[1])), settings=EAGER)
    assert "a (cpu 75%, memory 9%, cpu pressure 50%) is above" in plan.moves[0].reason


def test_an_even_cluster_is_left_alone() -> None:
    even = cluster([host("a"), host("b")], [workload("w0", "a"), workload("w1", "b")])
    plan, hold = balance(even, settings=EAGER)
    assert not plan.moves
    assert hold.uneven == 0


def test_imbalance_must_hold() -> None:
    hold = Hold()
    lengths = []
    for number in range(3):
        plan, hold = balance(msgspec.structs.replace(uneven(), time=1000.0 + number), hold, Settings(hold=3))
        lengths.append(len(plan.moves))
    assert lengths[:2] == [0, 0]
    assert lengths[2] > 0


def later(seen: Cluster, seconds: float) -> Cluster:
    """The same, observed later."""
    hosts = tuple(msgspec.structs.replace(one, observed_at=seen.time + seconds) for one in seen.hosts)
    return msgspec.structs.replace(seen, time=seen.time + seconds, hosts=hosts)


def test_what_is_seen_again_half_an_hour_later_has_held() -> None:
    settings = Settings(hold=3)
    plan, hold = balance(later(uneven(), 0), settings=settings)
    assert not plan.moves
    soon, _ = balance(later(uneven(), 1000), hold, settings)
    assert not soon.moves
    late, _ = balance(later(uneven(), 2000), hold, settings)
    assert late.moves
    even = cluster([host("a"), host("b")], [workload("w0", "a"), workload("w1", "b")])
    _, hold = balance(even, settings=settings)
    first, _ = balance(later(uneven(), 2000), hold, settings)
    assert not first.moves, "it was even when it was looked at before"


def test_a_calm_observation_starts_the_count_anew() -> None:
    even = cluster([host("a"), host("b")], [workload("w0", "a"), workload("w1", "b")])
    _, hold = balance(uneven(), settings=Settings(hold=2))
    _, hold = balance(even, hold, Settings(hold=2))
    plan, hold = balance(uneven(), hold, Settings(hold=2))
    assert not plan.moves
    assert "1 of 2" in plan.notes[-1]


def test_a_move_that_costs_more_than_it_gains_is_not_made() -> None:
    dear = msgspec.structs.replace(EAGER, prices=Prices(gib=10.0))
    assert not balance(uneven(), settings=dear)[0].moves


def test_of_two_that_gain_the_same_the_cheaper_goes_first() -> None:
    pair = [workload(f"w{number}", "a", 4.0, 2.0, predicted_bytes=(9 - number) * GIB) for number in range(3)]
    plan, _ = balance(cluster([host("a"), host("b")], pair), settings=EAGER)
    assert plan.moves[0].workload == "w2"


def test_thrift_makes_fewer_moves() -> None:
    counts = [
        len(balance(uneven(), settings=msgspec.structs.replace(EAGER, thrift=thrift))[0].moves)
        for thrift in (1.0, 8.0, 100.0)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 3
    assert counts[2] == 0


def test_what_has_just_moved_stays_for_the_cooldown() -> None:
    hot = uneven()
    moved = cluster(list(hot.hosts), [changed(one, last_moved=950.0) for one in hot.workloads])
    assert not balance(moved, settings=EAGER)[0].moves
    later = cluster(list(hot.hosts), [changed(one, last_moved=890.0) for one in hot.workloads])
    assert balance(later, settings=EAGER)[0].moves


def test_a_downtime_budget_is_kept() -> None:
    hot = uneven()
    short = cluster(list(hot.hosts), [changed(one, downtime_budget=0.01) for one in hot.workloads])
    assert not balance(short, settings=EAGER)[0].moves


def test_moves_are_made_only_in_a_window_and_end_within_it() -> None:
    closed = msgspec.structs.replace(EAGER, windows=(Window(start=7200, end=10800),))
    plan, _ = balance(uneven(), settings=closed)
    assert not plan.moves
    assert plan.notes == ("no window is open",)
    closing = msgspec.structs.replace(EAGER, windows=(Window(start=0, end=1000.5),))
    assert not balance(uneven(), settings=closing)[0].moves
    opened = msgspec.structs.replace(EAGER, windows=(Window(start=82800, end=3600),))
    assert balance(uneven(), settings=opened)[0].moves


@pytest.mark.parametrize(
    ("start", "end", "days", "time", "left"),
    [
        (0, 86400, range(7), 5.0, 86395.0),
        (10, 20, [3], 15.0, 5.0),  # 1970-01-01 was a Thursday
        (10, 20, [4], 15.0, 0.0),
        (10, 20, [3], 20.0, 0.0),
        (80000, 100, [3], 80001.0, 6499.0),
        (80000, 100, [3], 86400.0 + 50, 50.0),
        (80000, 100, [4], 86400.0 + 50, 0.0),
        (80000, 100, [3], 50.0, 0.0),
    ],
)
def test_a_window_knows_its_days(start: float, end: float, days: list[int], time: float, left: float) -> None:
    assert Window(start=start, end=end, days=frozenset(days)).left(time) == left


def test_bytes_are_earned_by_the_hour() -> None:
    frugal = msgspec.structs.replace(EAGER, bytes_per_hour=GIB)
    spent = Hold(at=1000.0, credit=0.0)
    plan, hold = balance(uneven(), spent, settings=frugal)
    assert not plan.moves
    hour = cluster(list(uneven().hosts), list(uneven().workloads), time=1000.0 + 3600)
    plan, hold = balance(hour, hold, frugal)
    assert len(plan.moves) == 1
    assert hold.credit == 0


def test_what_may_be_saved_up_may_be_sent_at_first() -> None:
    assert len(balance(uneven(), settings=msgspec.structs.replace(EAGER, bytes_per_hour=GIB))[0].moves) > 1
    little = msgspec.structs.replace(EAGER, bytes_per_hour=GIB, bytes_at_once=1.5 * GIB)
    plan, hold = balance(uneven(), settings=little)
    assert len(plan.moves) == 1
    assert hold.credit == little.bytes_at_once - plan.bytes


@pytest.mark.parametrize(
    ("sent", "left"),
    [
        ([], 24.0),
        ([(0.0, 10.0)], 15.0),
        ([(0.0, 30.0)], -5.0),
        ([(0.0, 10.0), (0.5, 20.0)], -5.0),
        ([(-50.0, 24.0), (0.0, 1.0)], 24.0),
    ],
)
def test_the_budget_is_what_is_left_of_what_was_sent(sent: list[tuple[float, float]], left: float) -> None:
    """In GiB and hours, an hour after the last look at a day's worth."""
    frugal = msgspec.structs.replace(EAGER, bytes_per_hour=GIB)
    found = credit_left(((3600 * when, GIB * size) for when, size in sent), 3600.0, frugal)
    assert found / GIB == pytest.approx(left)
    assert credit_left([(0.0, GIB)], 5.0, EAGER) == float("inf")


def test_where_bytes_are_rationed_the_best_use_of_them_comes_first() -> None:
    """The large one gains more, the small ones more for each byte."""
    hosts = [host("a"), host("b")]
    workloads = [workload("large", "a", 5.0, 20.0), workload("small", "a", 3.0, 1.0)]
    workloads += [workload(f"stays{number}", "a", 1.0, 1.0, pinned=True) for number in range(5)]
    now = cluster(hosts, workloads)
    one = msgspec.structs.replace(EAGER, pace=Pace(total=1))
    assert [move.workload for move in balance(now, settings=one)[0].moves] == ["large"]
    frugal = msgspec.structs.replace(one, bytes_per_hour=GIB)
    assert [move.workload for move in balance(now, settings=frugal)[0].moves] == ["small"]


def test_pressure_counts_as_load() -> None:
    workloads = [workload(f"{at}{number}", at, 1.0, 1.0) for at in "ab" for number in range(6)]
    waiting = cluster([host("a", pressure=Pressure(cpu=0.9)), host("b")], workloads)
    plan, _ = balance(waiting, settings=EAGER)
    assert plan.moves
    assert {move.source for move in plan.moves} == {"a"}


def test_a_host_that_is_not_active_gives_and_gets_nothing() -> None:
    for state in (HostState.CORDONED, HostState.DRAINING, HostState.MAINTENANCE, HostState.LOST):
        hosts = [host("a"), host("b", state=state), host("c", state=state)]
        plan, _ = balance(cluster(hosts, [workload(f"w{n}", "ac"[n % 2], 2.0) for n in range(6)]), settings=EAGER)
        assert not plan.moves


def test_a_broken_rule_is_mended_though_nothing_is_gained() -> None:
    pair = [workload(f"w{number}", "a", 0.1, 1.0 + number, anti_affinity=("x",)) for number in range(2)]
    plan, _ = balance(cluster([host("a"), host("b")], pair), settings=EAGER)
    assert [(move.workload, move.cause) for move in plan.moves] == [("w0", Cause.RULE)]
    assert "should not share host a" in plan.moves[0].reason


def test_a_split_bundle_comes_together_where_most_of_it_is() -> None:
    parts = [workload("big", "a", 1, 8, affinity=("x",)), workload("small", "b", 1, 1, affinity=("x",))]
    plan, _ = balance(cluster([host("a"), host("b")], parts), settings=EAGER)
    assert [(move.workload, move.target) for move in plan.moves] == [("small", "a")]


def test_a_workload_goes_to_a_host_with_the_label_it_asks_for() -> None:
    hosts = [host("a"), host("b", labels={"gpu": "yes"})]
    plan, _ = balance(cluster(hosts, [workload("w", "a", host_labels={"gpu": "yes"})]), settings=EAGER)
    assert [(move.workload, move.target, move.cause) for move in plan.moves] == [("w", "b", Cause.RULE)]


def test_a_rule_that_cannot_be_kept_now_is_told() -> None:
    parts = [workload("one", "a", 1, 50, affinity=("x",)), workload("two", "b", 1, 50, affinity=("x",))]
    plan, _ = balance(cluster([host("a"), host("b")], parts), settings=EAGER)
    assert not plan.moves
    assert any("nowhere for one to go" in note for note in plan.notes)


def test_a_bundle_moves_whole() -> None:
    bundle = [workload(f"w{number}", "a", 3.0, 1.0, affinity=("x",)) for number in range(2)]
    plan, _ = balance(cluster([host("a"), host("b")], [*bundle, workload("rest", "a", 6.0, 30.0)]), settings=EAGER)
    assert {move.workload for move in plan.moves} == {"w0", "w1"}
    assert {move.bundle for move in plan.moves} == {"w0"}


@given(clusters(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_no_move_violates_a_constraint_and_no_plan_exceeds_its_limits(
    before: Cluster, total: int, per_host: int, waves: int
) -> None:
    free = Prices(move=0, gib=0, downtime_second=0, risk=0)
    pace = Pace(total=total, per_host=per_host, waves=waves)
    plan, _ = balance(before, settings=Settings(hold=1, imbalance=0, pace=pace, prices=free))
    assert violations(before, plan.moves) == []
    within(plan, before, pace)


def within(plan: Plan, before: Cluster, pace: Pace) -> None:
    moving = [(one.host, one.moving_to) for one in before.workloads if one.moving_to]
    for wave in range(pace.waves):
        pairs = [(move.source, move.target) for move in plan.moves if move.wave == wave]
        running = moving if wave == 0 else []
        assert not pairs or len(pairs) + len(running) <= pace.total
        for one in {name for pair in pairs for name in pair}:
            assert sum(one in pair for pair in [*pairs, *running]) <= pace.per_host
    assert all(0 <= move.wave < pace.waves for move in plan.moves)


@given(clusters())
@settings(max_examples=100, deadline=None)
def test_plans_are_deterministic(before: Cluster) -> None:
    assert balance(before, settings=EAGER) == balance(before, settings=EAGER)


@given(clusters())
@settings(max_examples=100, deadline=None)
def test_each_balancing_move_gains_more_than_it_costs(before: Cluster) -> None:
    plan, _ = balance(before, settings=EAGER)
    sums: dict[str, list[float]] = {}
    for move in plan.moves:
        if move.cause is Cause.BALANCE:
            entry = sums.setdefault(move.bundle or move.workload, [0.0, 0.0])
            entry[0] += move.gain
            entry[1] += EAGER.prices.of(move.cost)
    assert all(gain > price * (1 + EAGER.margin) for gain, price in sums.values())


@given(st.integers(2, 12), st.integers(0, 80), st.integers(0, 10**6), st.sampled_from([0.0, 3600.0]))
@settings(max_examples=60, deadline=None)
def test_constant_load_converges_and_stays(hosts: int, workloads: int, seed: int, cooldown: float) -> None:
    now = fleet(hosts, workloads, seed)
    hold = Hold()
    mine = msgspec.structs.replace(EAGER, cooldown=cooldown)
    seen = [now.workloads]
    quiet = 0
    for _ in range(100):
        plan, hold = balance(now, hold, mine)
        assert plan.predicted <= plan.imbalance + 1e-12
        now = applied(now, plan.moves, seconds=max(cooldown, 60.0))
        quiet = quiet + 1 if not plan.moves else 0
        if plan.moves:
            # Nothing goes back: no placement is ever seen again.
            placement = tuple(one.host for one in now.workloads)
            assert placement not in [tuple(one.host for one in before) for before in seen]
            seen.append(now.workloads)
        if quiet == 3:
            return
    pytest.fail("still moving after 100 observations of a constant load")


def test_a_host_that_lies_is_neither_source_nor_target() -> None:
    hot = uneven()
    for name in "ab":
        hosts = tuple(
            msgspec.structs.replace(one, load=one.load + Resources(8.0, 0, 0)) if one.name == name else one
            for one in hot.hosts
        )
        plan, _ = balance(msgspec.structs.replace(hot, hosts=hosts), settings=EAGER)
        assert not plan.moves
        assert f"host {name} says that" in plan.notes[0]
