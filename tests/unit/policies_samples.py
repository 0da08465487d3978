"""Clusters for the tests of policies, and a check of moves that shares no code with what makes them."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import strategies as st

from policies.model import Cluster, Host, HostState, Resources, Workload
from policies.plan import Move

GIB = 2.0**30
SIZE = Resources(16.0, 64 * GIB, 1.25e9)


def host(name: str, **more: object) -> Host:
    return Host(**{"name": name, "capacity": SIZE, **more})  # type: ignore[arg-type]


def workload(name: str, at: str, cpu: float = 1.0, gib: float = 2.0, **more: object) -> Workload:
    return Workload(**{"name": name, "host": at, "used": Resources(cpu, gib * GIB), **more})  # type: ignore[arg-type]


def cluster(hosts: list[Host], workloads: list[Workload], time: float = 1000.0) -> Cluster:
    """A cluster whose hosts have just been observed and whose loads are the sums of their workloads'."""
    sums = {one.name: one.other for one in hosts}
    for one in workloads:
        if one.host in sums:
            sums[one.host] += one.used
    return Cluster(
        time=time,
        hosts=tuple(
            Host(**{**fields(one), "load": sums[one.name], "observed_at": time})  # type: ignore[arg-type]
            for one in hosts
        ),
        workloads=tuple(workloads),
    )


def fields(struct: Host | Workload) -> dict[str, object]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def changed(one: Workload, **more: object) -> Workload:
    return Workload(**{**fields(one), **more})  # type: ignore[arg-type]


def applied(before: Cluster, moves: tuple[Move, ...], *, seconds: float = 60.0) -> Cluster:
    """The cluster after the moves, observed again."""
    targets = {move.workload: move.target for move in moves}
    time = before.time + seconds
    return cluster(
        list(before.hosts),
        [
            changed(one, host=targets[one.name], last_moved=time) if one.name in targets else one
            for one in before.workloads
        ],
        time,
    )


def fleet(hosts: int, workloads: int, seed: int, *, skew: float = 1.5) -> Cluster:
    """An uneven fleet of plain workloads, all fitting."""
    chance = random.Random(seed)
    used = [[0.0, 0.0] for _ in range(hosts)]
    made = []
    for number in range(workloads):
        cpu, memory = min(chance.expovariate(1 / 0.8), 8.0), min(chance.lognormvariate(0, 0.8) * 1.5 * GIB, 16 * GIB)
        at = min(int(chance.random() ** skew * hosts), hosts - 1)
        if used[at][0] + cpu > 15 or used[at][1] + memory > 60 * GIB:
            at = min(range(hosts), key=lambda one: used[one][0])
        if used[at][0] + cpu > 15 or used[at][1] + memory > 60 * GIB:
            continue
        used[at][0] += cpu
        used[at][1] += memory
        made.append(workload(f"w{number}", f"h{at}", cpu, memory / GIB, dirty_rate=chance.random() * 2e7))
    return cluster([host(f"h{number}") for number in range(hosts)], made)


STATES = [HostState.ACTIVE] * 4 + [HostState.CORDONED, HostState.DRAINING, HostState.LOST]


@st.composite
def clusters(draw: st.DrawFn, most_hosts: int = 6, most_workloads: int = 14) -> Cluster:
    """Small clusters with every kind of rule, in which no rule is promised to hold."""
    hosts = [
        host(
            f"h{number}",
            state=draw(st.sampled_from(STATES)),
            labels={"zone": draw(st.sampled_from("ab"))},
            cpu_features=draw(st.sampled_from([frozenset({"avx"}), frozenset({"avx", "avx512f"})])),
            kernel=draw(st.sampled_from(["6.12", "6.18"])),
        )
        for number in range(draw(st.integers(1, most_hosts)))
    ]
    room = {one.name: [0.95 * SIZE.cpu, 0.95 * SIZE.memory / GIB] for one in hosts}
    workloads = []
    for number in range(draw(st.integers(0, most_workloads))):
        at = draw(st.sampled_from(hosts)).name
        # More than a host has would be a lie.
        cpu, gib = min(draw(st.floats(0, 4)), room[at][0]), min(draw(st.floats(0.01, 24)), room[at][1])
        room[at][0] -= cpu
        room[at][1] -= gib
        workloads.append(
            workload(
                f"w{number}",
                at,
                cpu,
                gib,
                dirty_rate=draw(st.sampled_from([0.0, 1e6, 1e9])),
                affinity=draw(st.sampled_from([(), (), (), ("p",), ("q",)])),
                anti_affinity=draw(st.sampled_from([(), (), ("x",), ("y", "x")])),
                host_labels=draw(st.sampled_from([{}, {}, {"zone": "a"}])),
                pinned=draw(st.sampled_from([False, False, False, True])),
                downtime_budget=draw(st.sampled_from([None, None, 0.05, 0.5])),
                last_moved=draw(st.sampled_from([None, None, 990.0, -9000.0])),
                moving_to=draw(st.sampled_from([None] * 9 + [hosts[0].name])),
                value=draw(st.floats(0, 9)),
            )
        )
    return cluster(hosts, workloads)


def violations(
    before: Cluster, moves: tuple[Move, ...], share: float = 0.9, *, budgets: bool = True, split: bool = False
) -> list[str]:
    """What is wrong with these moves, taken one by one while nothing leaves its source: an independent reading."""
    found = []
    hosts = {one.name: one for one in before.hosts}
    workloads = {one.name: one for one in before.workloads}
    place = {one.name: {one.host, one.moving_to or one.host} for one in before.workloads}
    held = {one.name: one.load for one in before.hosts}
    for one in before.workloads:
        if one.moving_to not in (None, one.host):
            held[str(one.moving_to)] += one.used
    for name, count in Counter(move.workload for move in moves).items():
        if count > 1:
            found.append(f"{name} moves {count} times")
    for move in moves:
        one, source, target = workloads[move.workload], hosts[move.source], hosts[move.target]
        if one.host != move.source or move.source == move.target:
            found.append(f"{one.name} is on {one.host}, moves from {move.source} to {move.target}")
        if one.pinned or one.moving_to is not None:
            found.append(f"{one.name} may not move")
        if target.state is not HostState.ACTIVE:
            found.append(f"{target.name} is {target.state}")
        needed = source.cpu_features if one.cpu_features is None else one.cpu_features
        if not needed <= target.cpu_features:
            found.append(f"{target.name} lacks {needed - target.cpu_features}")
        if any(target.labels.get(key) != value for key, value in one.host_labels.items()):
            found.append(f"{target.name} lacks {one.host_labels}")
        if budgets and one.downtime_budget is not None and move.cost.downtime > one.downtime_budget:
            found.append(f"{one.name} stops for {move.cost.downtime}")
        held[target.name] += one.used
        for part in ("cpu", "memory"):
            if getattr(held[target.name], part) > share * getattr(target.capacity, part) * (1 + 1e-9):
                found.append(f"{target.name} is too full of {part}")
        for other in before.workloads:
            shared = set(one.anti_affinity) & set(other.anti_affinity)
            if other.name != one.name and shared and target.name in place[other.name]:
                found.append(f"{one.name} meets {other.name} of {shared}")
        place[one.name].add(target.name)
    after = {one.name: one.host for one in before.workloads} | {move.workload: move.target for move in moves}
    moved = {move.workload for move in moves}
    for one in before.workloads:
        for other in before.workloads:
            together = set(one.affinity) & set(other.affinity)
            if split and one.host != other.host:
                continue  # a drain takes what is on its host of a bundle that is split already
            if together and one.name in moved and after[one.name] != after[other.name]:
                found.append(f"{one.name} leaves {other.name} of {together}")
    return found
