"""The exact placement against the heuristic, and both against every placement there is."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policies_samples import cluster, clusters, fields, fleet, host, violations, workload

from policies import exact, placement
from policies.cost import Cost
from policies.exact import ExactError
from policies.model import Cluster, Host, HostState, Workload
from policies.plan import Cause, Move


def drained(now: Cluster) -> tuple[Cluster, list[str]]:
    """The cluster with its first host being drained, and what must leave it."""
    hosts = [Host(**{**fields(now.hosts[0]), "state": HostState.DRAINING}), *now.hosts[1:]]  # type: ignore[arg-type]
    ready = [
        Workload(**{**fields(one), "moving_to": None, "downtime_budget": None})  # type: ignore[arg-type]
        for one in now.workloads
    ]
    return cluster(hosts, ready), [one.name for one in ready if one.host == hosts[0].name]


def moves(now: Cluster, found: placement.Placement) -> tuple[Move, ...]:
    at = {one.name: one.host for one in now.workloads}
    return tuple(
        Move(
            workload=name,
            source=at[name],
            target=target,
            cause=Cause.DRAIN,
            reason="",
            gain=0.0,
            cost=Cost(0.0, 0.0, 0.0, 0.0),
        )
        for name, target in found.targets.items()
    )


def test_two_that_fit_only_one_way_are_placed() -> None:
    """The larger goes where it is tightest: evening out first would leave one over."""
    hosts = [host("a", state=HostState.DRAINING), host("b"), host("c")]
    there = [workload("on-b", "b", 1, 17), workload("on-c", "c", 1, 37)]
    now = cluster(hosts, [workload("large", "a", 1, 40), workload("small", "a", 1, 20), *there])
    for found in (placement.place(now, ["large", "small"]), exact.place(now, ["large", "small"]).placement):
        assert found.targets == {"large": "b", "small": "c"}
        assert not found.unplaced


def test_the_more_valuable_is_placed_where_one_must_stay() -> None:
    hosts = [host("a", state=HostState.DRAINING), host("b")]
    now = cluster(hosts, [workload("cheap", "a", 1, 30), workload("dear", "a", 1, 30, value=5.0)])
    proof = exact.place(now, ["cheap", "dear"])
    assert proof.placement.targets == {"dear": "b"}
    assert "has no room" in proof.placement.unplaced["cheap"]
    assert proof.proved


@given(st.integers(0, 10**6))
@example(712)  # a burden so small that a gap of 1e-5 is much of it
@example(8048)  # the solver's own bound is 3e-6 above it
@settings(max_examples=25, deadline=None)
def test_nothing_that_there_is_is_better_than_the_exact_answer(seed: int) -> None:
    """Small enough to try all: four workloads, three hosts."""
    now, names = drained(fleet(4, 16, seed))
    names = names[:4]
    proof = exact.place(now, names)
    assert proof.proved
    least = min(
        (
            burden(now, dict(zip(names, hosts, strict=True)))
            for hosts in itertools.product(range(1, 4), repeat=len(names))
        ),
        default=0.0,
    )
    assert proof.placement.burden == pytest.approx(least, rel=2e-4, abs=1e-9)
    assert proof.bound <= least * (1 + 1e-6) + 1e-9
    quick = placement.place(now, names)
    assert len(quick.targets) == len(names)
    assert quick.burden >= least * (1 - 1e-9)
    assert quick.burden <= least * 1.1 + 1e-9


def burden(now: Cluster, targets: dict[str, int]) -> float:
    """By the definition: squared utilisations after, less before, weighted by capacity in average hosts."""
    total = 0.0
    active = [one for one in now.hosts if one.state is HostState.ACTIVE]
    for part in ("cpu", "memory"):
        average = sum(getattr(one.capacity, part) for one in active) / len(active)
        for number, one in enumerate(now.hosts):
            size, used = getattr(one.capacity, part), getattr(one.load, part)
            more = sum(getattr(each.used, part) for each in now.workloads if targets.get(each.name) == number)
            if more and used + more > 0.9 * size:
                return float("inf")
            total += size / average * (((used + more) / size) ** 2 - (used / size) ** 2)
    return total


@given(clusters(5, 10))
@settings(max_examples=60, deadline=None)
def test_every_rule_is_kept_and_nothing_is_forgotten(before: Cluster) -> None:
    now, names = drained(before)
    quick = placement.place(now, names)
    proof = exact.place(now, names, seconds=20)
    for found in (quick, proof.placement):
        assert violations(now, moves(now, found), split=True) == []
        assert set(names) <= set(found.targets) | set(found.unplaced)
        assert not set(found.targets) & set(found.unplaced)
    value = {one.name: 1 + one.value for one in now.workloads}
    missed = [sum(value[name] for name in one.unplaced) for one in (proof.placement, quick)]
    assert missed[0] <= missed[1] + 1e-9


def test_without_the_solver_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(ExactError, match="not installed") as caught:
        exact.place(cluster([host("a")], []), [])
    assert "migrator[exact]" in str(caught.value.hint)


def test_nothing_to_place_is_an_answer() -> None:
    proof = exact.place(cluster([host("a"), host("b")], [workload("w", "a", pinned=True)]), ["w"])
    assert proof.placement.unplaced == {"w": "w is pinned to a"}
    assert proof.proved
