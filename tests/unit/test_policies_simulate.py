"""Days replayed under rules: what the world does to plans, and that ours does better than the others'."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies_samples import GIB, cluster, host, violations, workload

from policies import baselines, compare, windows
from policies.balance import Settings
from policies.consistency import ClusterError, inspect, validate
from policies.cost import Cost
from policies.day import Invented, Recording, Sample, Shape, decode
from policies.model import Cluster, HostState, Resources
from policies.picture import svg
from policies.plan import Cause, Move, Pace
from policies.rules import Nothing, Ours
from policies.simulate import World, simulate

SMALL = Shape(hosts=12, workloads=90, hours=8, interval=600, seed=3)
KIND = World(error=0.0, failing=0.0)


def quiet(moves: int = 2, hosts: str = "ab", seconds: int = 4) -> Recording:
    """All on host a, which wants 12 cores, four samples long."""
    at = cluster([host(name) for name in hosts], [workload(f"w{n}", "a", 12 / moves, 2.0) for n in range(moves)])
    sample = Sample([12 / moves] * moves, [2.0 * GIB] * moves)
    return Recording(began_at=0.0, interval=60.0, hosts=at.hosts, workloads=at.workloads, recorded=(sample,) * seconds)


class Once:
    """Asks for the given moves at the first sample, and keeps what it is shown."""

    name = "once"

    def __init__(self, *moves: tuple[str, str], seconds: float = 30.0, wave: int = 0) -> None:
        self.seen: list[Cluster] = []
        self._moves = [
            Move(
                workload=name,
                source="a",
                target=target,
                cause=Cause.BALANCE,
                reason="",
                gain=0.0,
                cost=Cost(1000.0, seconds, 0.5, 0.0),
                wave=wave,
            )
            for name, target in moves
        ]

    def plan(self, cluster: Cluster) -> Sequence[Move]:
        self.seen.append(cluster)
        return self._moves if len(self.seen) == 1 else ()


def test_a_migration_takes_its_time_and_then_the_load_is_elsewhere() -> None:
    rule = Once(("w0", "b"), seconds=90.0)
    run = simulate(quiet(), rule, KIND)
    assert [one.workloads[0].host for one in rule.seen] == ["a", "a", "b", "b"]
    assert [one.workloads[0].moving_to for one in rule.seen] == [None, "b", None, None]
    assert (run.moves, run.failed, run.bytes, run.downtime, run.longest) == (1, 0, 1000.0, 0.5, 0.5)
    assert run.imbalance[0] == run.imbalance[1] > run.imbalance[2] == 0
    assert rule.seen[2].workloads[0].last_moved == 90.0


def test_a_migration_that_fails_leaves_the_workload_where_it_was() -> None:
    rule = Once(("w0", "b"))
    run = simulate(quiet(), rule, msgspec.structs.replace(KIND, failing=1.0))
    assert (run.moves, run.failed, run.bytes, run.downtime) == (0, 1, 500.0, 0.0)
    assert {one.workloads[0].host for one in rule.seen} == {"a"}


def test_migrations_wait_for_slots_and_are_dropped_where_none_comes() -> None:
    moves = [(f"w{number}", "b") for number in range(6)]
    run = simulate(quiet(6), Once(*moves, seconds=50.0), msgspec.structs.replace(KIND, pace=Pace(per_host=1)))
    assert (run.moves, run.most, run.most_of_host) == (2, 1, 1)
    run = simulate(quiet(6, "abc"), Once(*moves, seconds=50.0), msgspec.structs.replace(KIND, pace=Pace(total=3)))
    assert (run.most, run.most_of_host) == (2, 2)


def test_a_target_that_is_full_by_then_refuses() -> None:
    day = quiet()
    full = Sample([6.0, 6.0], [40 * GIB, 24 * GIB])
    hosts = tuple(msgspec.structs.replace(one, other=Resources(0, 30 * GIB * (one.name == "b"))) for one in day.hosts)
    run = simulate(msgspec.structs.replace(day, hosts=hosts, recorded=(full,) * 3), Once(("w0", "b")), KIND)
    assert (run.moves, run.refused) == (0, 1)


def test_nobody_is_seen_to_use_more_than_there_is() -> None:
    day = quiet()
    greedy = Sample([16.0, 16.0], [2 * GIB, 2 * GIB])
    rule = Once()
    run = simulate(msgspec.structs.replace(day, recorded=(greedy,) * 2), rule, KIND)
    seen = rule.seen[0]
    assert seen.hosts[0].load.cpu == 16.0
    assert seen.hosts[0].pressure.cpu == 0.5
    assert not inspect(seen).hosts
    assert run.starved == 2 * 60.0 * 16.0


def test_a_host_that_vanishes_is_lost_then_back_and_its_migrations_fail() -> None:
    day = quiet(seconds=200)
    world = World(error=0.0, failing=0.0, vanishing=86400 / 60, repair=60.0)
    rule = Once(("w0", "b"), seconds=1000.0)
    run = simulate(day, rule, world)
    assert {one.state for seen in rule.seen for one in seen.hosts} == {HostState.LOST}
    assert run.moves == 0
    rare = msgspec.structs.replace(world, vanishing=100.0)
    rule = Once(("w0", "b"), seconds=11000.0)
    run = simulate(day, rule, rare)
    assert {one.state for seen in rule.seen for one in seen.hosts} == {HostState.LOST, HostState.ACTIVE}
    assert (run.moves, run.failed + run.refused) == (0, 1)


def test_wrong_predictions_are_right_on_average() -> None:
    run = simulate(Invented(SMALL), Ours(), World(error=0.4, failing=0.0))
    assert run.moves > 8
    assert 0.6 < run.bytes / run.predicted_bytes < 1.6
    exact = simulate(Invented(SMALL), Ours(), KIND)
    assert exact.bytes == pytest.approx(exact.predicted_bytes)
    assert exact.downtime == pytest.approx(exact.predicted_downtime)


@pytest.mark.parametrize("rule", [Nothing, Ours, *(type(one) for one in baselines.rules())])
def test_the_same_seed_is_the_same_day(rule: type[Nothing | Ours]) -> None:
    world = World(seed=5, vanishing=0.2, failing=0.2)
    shape = msgspec.structs.replace(SMALL, hours=3)
    assert simulate(Invented(shape), rule(), world) == simulate(Invented(shape), rule(), world)
    other = msgspec.structs.replace(shape, seed=4)
    assert simulate(Invented(other), rule(), world).imbalance != simulate(Invented(shape), rule(), world).imbalance


@given(st.integers(1, 8), st.integers(0, 60), st.integers(0, 10**6), st.floats(0.05, 0.95), st.floats(0.05, 0.8))
@settings(max_examples=40, deadline=None)
def test_an_invented_day_makes_sense(hosts: int, workloads: int, seed: int, cpu: float, memory: float) -> None:
    day = Invented(Shape(hosts=hosts, workloads=workloads, hours=1, seed=seed, cpu=cpu, memory=memory))
    validate(Cluster(time=0.0, hosts=day.hosts, workloads=day.workloads))
    samples = list(day.samples())
    assert len(samples) == 12
    assert samples == list(day.samples())
    assert all(amount > 0 for sample in samples for amount in sample.cpu)
    recorded = Recording(
        began_at=0.0, interval=300.0, hosts=day.hosts, workloads=day.workloads, recorded=tuple(samples)
    )
    assert decode(msgspec.json.encode(recorded)).workloads == day.workloads


@given(st.integers(0, 10**6), st.floats(0, 0.5), st.floats(0, 2.0))
@settings(max_examples=15, deadline=None)
def test_limits_hold_whatever_happens(seed: int, failing: float, vanishing: float) -> None:
    world = World(seed=seed, failing=failing, vanishing=vanishing, error=0.5)
    day = Invented(msgspec.structs.replace(SMALL, seed=seed, hours=4))
    run = simulate(day, Ours(), world)
    assert run.most <= world.pace.total
    assert run.most_of_host <= world.pace.per_host


@given(st.binary(max_size=200))
def test_hostile_bytes_are_no_recording(data: bytes) -> None:
    with pytest.raises(ClusterError):
        decode(data)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"interval": 0.0}, "the interval is 0"),
        ({"recorded": ()}, "no samples"),
        ({"recorded": (Sample([1.0], [1.0]),)}, "sample 0 is not of 2 workloads"),
        ({"recorded": (Sample([1.0, -1.0], [1.0, 1.0]),)}, "an amount that is none"),
        ({"hosts": ()}, "which is not known"),
    ],
)
def test_a_recording_that_makes_no_sense_is_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ClusterError, match=sentence):
        decode(msgspec.json.encode(msgspec.structs.replace(quiet(), **change)))


@pytest.mark.parametrize("change", [{"hosts": 0}, {"interval": 0.0}, {"hours": float("nan")}, {"cpu": 1.5}])
def test_a_day_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ClusterError):
        Invented(msgspec.structs.replace(SMALL, **change))


@pytest.fixture(scope="module")
def found() -> compare.Comparison:
    shape = Shape(hosts=24, workloads=240, hours=24, interval=900, seed=4)
    return compare.invented(shape, thrifts=(1.0, 0.5), budget_thrifts=(1.0, 8.0))


def test_ours_leaves_less_imbalance_than_each_of_the_others_and_sends_no_more(found: compare.Comparison) -> None:
    movers = [other for other in found.others if other.moves]
    assert len(movers) >= 4
    for other in movers:
        ours = found.match(other)
        assert ours is not None, other.rule
        assert ours.mean < other.mean, other.rule
        assert ours.bytes <= other.bytes, other.rule
    assert found.better()


def test_a_comparison_is_told_in_words_and_in_a_picture(found: compare.Comparison) -> None:
    text = compare.table(found)
    assert all(name in text for name in ("nothing", "migrator, thrift 1", *baselines.NAMES))
    assert f"predicted {found.ours[0].predicted_bytes / 2**30:.1f} GiB" in text
    root = ET.fromstring(svg(found))
    lines = [one for one in root.iter() if one.tag.endswith("polyline")]
    assert len(lines) == 2 + len(found.others) + 1
    assert svg(found) == svg(found)


def test_a_comparison_goes_to_json_and_back(found: compare.Comparison) -> None:
    assert msgspec.json.decode(msgspec.json.encode(found), type=compare.Comparison) == found


def test_a_rule_that_is_not_known_is_refused() -> None:
    with pytest.raises(ClusterError, match="rule magic is not known"):
        compare.invented(SMALL, others=("magic",))


@pytest.mark.parametrize("rule", baselines.rules(), ids=lambda rule: rule.name)
def test_the_others_acts_on_a_host_that_is_full_and_one_that_is_empty(rule: baselines.Proxmox) -> None:
    """Each is given its hold and a case that its documentation would have it act on."""
    hot = cluster([host("a"), host("b"), host("c")], [workload(f"w{number}", "a", 1.4, 5.0) for number in range(10)])
    moves: Sequence[Move] = ()
    for _ in range(3):
        moves = rule.plan(hot)
    assert moves
    assert {move.source for move in moves} == {"a"}
    assert {move.target for move in moves} <= {"b", "c"}
    even = cluster([host("a"), host("b")], [workload("w0", "a", 4, 8), workload("w1", "b", 4, 8)])
    assert all(not rule.plan(even) for _ in range(4))


class Watched(Ours):
    """Ours, with each plan checked as it is made."""

    def __init__(self, mine: Settings) -> None:
        super().__init__(mine)
        self.mine = mine
        self.count = 0

    def plan(self, cluster: Cluster) -> Sequence[Move]:
        moves = super().plan(cluster)
        at = {one.name: one for one in cluster.workloads}
        left = windows.left(self.mine.windows, cluster.time)
        for move in moves:
            moved = at[move.workload].last_moved
            assert move.cause is Cause.RULE or moved is None or cluster.time - moved >= self.mine.cooldown
            assert move.cost.seconds <= left
            assert move.cost.risk <= self.mine.max_risk
        assert violations(cluster, tuple(moves)) == []
        self.count += len(moves)
        return moves


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1800.0, 7200.0]), st.booleans())
@settings(max_examples=12, deadline=None)
def test_through_a_whole_day_every_plan_keeps_rules_windows_and_cooldown(
    seed: int, cooldown: float, windowed: bool
) -> None:
    night = (windows.Window(start=2 * 3600.0, end=4 * 3600.0),) if windowed else ()
    mine = Settings(cooldown=cooldown, windows=night, thrift=0.5, hold=1)
    rule = Watched(mine)
    run = simulate(Invented(msgspec.structs.replace(SMALL, seed=seed)), rule, World(seed=seed, vanishing=0.5))
    assert rule.count >= run.moves
    if windowed:
        assert len(set(run.imbalance[:12])) > 1


def test_a_move_that_pays_is_rarely_undone() -> None:
    """Loads change, so some workloads come back in a day; most moves are for good."""
    run = simulate(Invented(msgspec.structs.replace(SMALL, hours=24)), Ours(Settings(cooldown=0.0)))
    assert run.moves > 20
    assert run.returns < run.moves / 4
