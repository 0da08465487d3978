"""The cluster that policies plan for, from what is known of a fleet: pure, values in and values out.

What cannot be told is not guessed: a host that was never heard of is lost, a container that is seen on two hosts at
once is left alone on both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from migrator.fleet import records as r
from migrator.fleet.agents import Observation
from migrator.protocol.fleet import HostReport, WorkloadReport
from policies.experience import Experience
from policies.model import Cluster, Host, HostState, Pressure, Resources, Workload

LOST_AFTER = 30.0  # seconds of silence

_STATES = {
    r.HostMode.CORDONED: HostState.CORDONED,
    r.HostMode.DRAINING: HostState.DRAINING,
    r.HostMode.MAINTENANCE: HostState.MAINTENANCE,
}


@dataclass(frozen=True)
class Known:
    """What the store says, read at about one moment."""

    hosts: Mapping[str, r.Host]
    cordons: Mapping[str, r.Cordon] = field(default_factory=dict)
    moves: Mapping[str, r.Move] = field(default_factory=dict)
    rules: Mapping[str, r.Rule] = field(default_factory=dict)
    last_moved: Mapping[str, float] = field(default_factory=dict)
    experience: Experience = field(default_factory=Experience)


@dataclass(frozen=True)
class Seen:
    """A cluster, and what about it a person should know, one sentence each."""

    cluster: Cluster
    notes: tuple[str, ...]


def build(now: float, known: Known, observations: Mapping[str, Observation], *, lost_after: float = LOST_AFTER) -> Seen:
    """`now`: seconds since 1970. An observation older than `lost_after` makes its host lost."""
    notes: list[str] = []
    hosts = []
    for name, host in known.hosts.items():
        seen = observations.get(name)
        lost = seen is None or now - seen.heard_at > lost_after
        hosts.append(_host(host, seen, known.cordons.get(name), lost))
    workloads = tuple(_workloads(known, observations, notes))
    return Seen(Cluster(time=now, hosts=tuple(hosts), workloads=workloads), tuple(notes))


def _host(host: r.Host, seen: Observation | None, cordon: r.Cordon | None, lost: bool) -> Host:
    state = _STATES[cordon.mode] if cordon is not None else HostState.ACTIVE
    if seen is None:
        return Host(
            name=host.name,
            capacity=Resources(float(host.cpus), float(host.memory_bytes)),
            labels=host.labels,
            state=HostState.LOST,
        )
    report = seen.host
    load = Resources(report.cpu_used, float(report.memory_used), report.network_used)
    return Host(
        name=host.name,
        capacity=Resources(report.cpus, float(report.memory)),
        load=load,
        other=_other(load, seen.workloads),
        pressure=_pressure(report),
        labels=host.labels,
        cpu_features=report.cpu_features,
        kernel=report.kernel,
        engines=frozenset({report.engine}) if report.engine else frozenset(),
        state=HostState.LOST if lost else state,
        observed_at=report.at,
    )


def _other(load: Resources, workloads: Iterable[WorkloadReport]) -> Resources:
    """What is in use by what is no container of ours. Never less than nothing: a host whose containers use more than
    it says to be in use is for the policies to doubt."""
    cpu, memory, network = load.cpu, load.memory, load.network
    for one in workloads:
        cpu, memory, network = cpu - one.cpu, memory - one.memory, network - one.network
    return Resources(max(cpu, 0.0), max(memory, 0.0), max(network, 0.0))


def _pressure(report: HostReport) -> Pressure:
    return Pressure(report.cpu_pressure or 0.0, report.memory_pressure or 0.0, report.io_pressure or 0.0)


def _workloads(known: Known, observations: Mapping[str, Observation], notes: list[str]) -> Iterable[Workload]:
    found: dict[str, list[tuple[str, WorkloadReport]]] = {}
    arriving: dict[str, str] = {}
    arrived: dict[str, WorkloadReport] = {}
    for host in known.hosts:
        seen = observations.get(host)
        for report in seen.workloads if seen is not None else ():
            if report.state == "arriving":
                arriving[report.name], arrived[report.name] = host, report
            else:
                found.setdefault(report.name, []).append((host, report))
    for name in arriving.keys() - found.keys():
        found[name] = [(arriving[name], arrived[name])]  # it is gone there already, and here in a moment
    for name, places in found.items():
        move = known.moves.get(name)
        if len(places) > 1 and move is not None:
            # The end of its migration lies between the two observations.
            places = [one for one in places if one[0] != move.destination][:1]
        if len(places) > 1:
            hosts = ", ".join(host for host, _ in places)
            notes.append(f"container {name} is on {hosts}: it is not moved while two have one name")
            for host, report in places:
                yield _workload(f"{name}@{host}", host, report, known, None, held=True)
            continue
        ((host, report),) = places
        target = move.destination if move is not None and move.source == host else arriving.get(name)
        if target == host or target not in known.hosts:
            target = None
        frozen = report.state == "frozen" and target is None
        if frozen:
            notes.append(f"container {name} on {host} is frozen: see `migrator settle` there")
        yield _workload(name, host, report, known, target, held=frozen)


def _workload(
    name: str, host: str, report: WorkloadReport, known: Known, target: str | None, *, held: bool
) -> Workload:
    rule = known.rules.get(report.name) or r.Rule(workload="x")
    return Workload(
        name=name,
        host=host,
        used=Resources(report.cpu, float(report.memory), report.network),
        dirty_rate=report.dirty_rate or 0.0,
        downtime_budget=rule.downtime_budget,
        labels=rule.labels,
        host_labels=rule.host_labels,
        affinity=rule.affinity,
        anti_affinity=rule.anti_affinity,
        pinned=rule.pinned or held,
        last_moved=known.last_moved.get(report.name),
        factors=known.experience.factors(report.name),
        moving_to=target,
        value=rule.value,
    )
