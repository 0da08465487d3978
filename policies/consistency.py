"""What in a cluster's state makes no sense, and what cannot be believed.

Two kinds. What makes the whole meaningless (a name twice, a workload on an unknown host, a load of NaN) is an error:
`validate` raises `ClusterError` with every cause, and nothing is planned. What concerns one host or one workload (a
stale observation, a clock that differs, a load that its workloads do not explain, rules that contradict each other)
sets that one aside: `inspect` names it with the reason, and policies use it neither as source nor as target until it
is consistent again. A safe wait, never a wrong move.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import msgspec

from migrator.errors import MigratorError

from .model import MAX_ENTRIES, MAX_HOSTS, MAX_NAME, MAX_WORKLOADS, Cluster, Host, HostState, Resources, Workload

# Above this, the message is no longer one that a person reads.
SHOWN = 20


class ClusterError(MigratorError):
    """The cluster's state makes no sense; nothing was planned and nothing moved."""

    exit_code = 2

    def __init__(self, reasons: list[str]) -> None:
        shown = reasons[:SHOWN]
        if len(reasons) > SHOWN:
            shown.append(f"and {len(reasons) - SHOWN} more")
        super().__init__("; ".join(shown), hint="correct what the agents report, or remove it from the fleet")
        self.reasons = reasons


class Trust(msgspec.Struct, frozen=True, kw_only=True):
    """How far an observation may be off before its host is set aside."""

    # Seconds since the observation.
    max_age: float = 60.0
    # Seconds that a host's clock may be ahead of ours.
    max_skew: float = 5.0
    # Share of the capacity by which load and the sum of its parts may differ.
    tolerance: float = 0.1


TRUST = Trust()


class Findings(msgspec.Struct, frozen=True):
    """What is set aside, by name, each with one sentence that says why."""

    hosts: dict[str, str]
    workloads: dict[str, str]


def validate(cluster: Cluster) -> None:
    """Raise `ClusterError` with every reason why the cluster as a whole cannot be planned for."""
    reasons: list[str] = []
    if not isfinite(cluster.time):
        reasons.append(f"the time is {cluster.time}")
    if len(cluster.hosts) > MAX_HOSTS or len(cluster.workloads) > MAX_WORKLOADS:
        reasons.append(
            f"{len(cluster.hosts)} hosts and {len(cluster.workloads)} workloads are more than "
            f"{MAX_HOSTS} and {MAX_WORKLOADS}"
        )
        raise ClusterError(reasons)
    names: set[str] = set()
    for host in cluster.hosts:
        if host.name in names:
            reasons.append(f"host {host.name} is there twice")
        names.add(host.name)
        reasons += _host_numbers(host)
    seen: set[str] = set()
    for workload in cluster.workloads:
        if workload.name in seen:
            reasons.append(f"workload {workload.name} is there twice")
        seen.add(workload.name)
        if workload.host not in names:
            reasons.append(f"workload {workload.name} is on host {workload.host}, which is not known")
        if workload.moving_to is not None and workload.moving_to not in names:
            reasons.append(f"workload {workload.name} is moving to host {workload.moving_to}, which is not known")
        # One comparison for the usual case: a NaN makes it false.
        used = workload.used
        if not (
            0 <= used.cpu < 1e18
            and 0 <= used.memory < 1e18
            and 0 <= used.network < 1e18
            and 0 <= workload.dirty_rate < 1e18
            and 0 <= workload.value < 1e18
            and 0 < len(workload.name) <= MAX_NAME
            and (workload.last_moved is None or isfinite(workload.last_moved))
            and all(
                number is None or 0 <= number < 1e18
                for number in (workload.predicted_bytes, workload.predicted_downtime, workload.downtime_budget)
            )
            and 0 < workload.factors.bytes < 1e6
            and 0 < workload.factors.downtime < 1e6
        ):
            reasons += _workload_numbers(workload)
        if max(len(workload.affinity), len(workload.anti_affinity), len(workload.labels)) > MAX_ENTRIES:
            reasons.append(f"workload {workload.name} has more than {MAX_ENTRIES} labels or groups")
    if reasons:
        raise ClusterError(reasons)


def _host_numbers(host: Host) -> Iterable[str]:
    if not 0 < len(host.name) <= MAX_NAME:
        yield f"a host's name has {len(host.name)} characters"
    if max(len(host.labels), len(host.cpu_features)) > MAX_ENTRIES:
        yield f"host {host.name} has more than {MAX_ENTRIES} labels or CPU features"
    for what, amount in (("capacity", host.capacity), ("load", host.load), ("other load", host.other)):
        yield from _amount(f"host {host.name}: {what}", amount)
    for name, number in zip(("cpu", "memory"), (host.capacity.cpu, host.capacity.memory), strict=True):
        if number == 0:
            yield f"host {host.name}: capacity of {name} is 0"
    for name in ("cpu", "memory", "io"):
        if not 0 <= getattr(host.pressure, name) <= 1:
            yield f"host {host.name}: {name} pressure is {getattr(host.pressure, name)}, not between 0 and 1"
    if not isfinite(host.observed_at):
        yield f"host {host.name}: observed at {host.observed_at}"


def _workload_numbers(workload: Workload) -> Iterable[str]:
    name = f"workload {workload.name}"
    if not 0 < len(workload.name) <= MAX_NAME:
        yield f"a workload's name has {len(workload.name)} characters"
    yield from _amount(f"{name}: use", workload.used)
    for field in ("dirty_rate", "value", "predicted_bytes", "predicted_downtime", "downtime_budget"):
        number = getattr(workload, field)
        if number is not None and not 0 <= number < 1e18:
            yield f"{name}: {field.replace('_', ' ')} is {number}"
    for field in ("bytes", "downtime"):
        number = getattr(workload.factors, field)
        if not 0 < number < 1e6:
            yield f"{name}: the factor of predicted {field} is {number}"
    if workload.last_moved is not None and not isfinite(workload.last_moved):
        yield f"{name}: last moved at {workload.last_moved}"


def _amount(what: str, amount: Resources) -> Iterable[str]:
    for name in ("cpu", "memory", "network"):
        number = getattr(amount, name)
        if not 0 <= number < 1e18:
            yield f"{what} of {name} is {number}"


def inspect(cluster: Cluster, trust: Trust = TRUST) -> Findings:
    """What must be set aside. `cluster` is valid."""
    sums = [[0.0, 0.0, 0.0] for _ in cluster.hosts]
    index = {host.name: number for number, host in enumerate(cluster.hosts)}
    for workload in cluster.workloads:
        total = sums[index[workload.host]]
        total[0] += workload.used.cpu
        total[1] += workload.used.memory
        total[2] += workload.used.network
    hosts = {}
    for host, total in zip(cluster.hosts, sums, strict=True):
        if host.state is HostState.LOST:
            continue  # it says nothing, so it does not lie; its state keeps it out of everything
        reason = _disbelief(cluster, host, Resources(*total), trust)
        if reason:
            hosts[host.name] = reason
    return Findings(hosts, contradictions(cluster))


def _disbelief(cluster: Cluster, host: Host, workloads: Resources, trust: Trust) -> str:
    age = cluster.time - host.observed_at
    if age < -trust.max_skew:
        return f"the clock of host {host.name} is {-age:.0f} s ahead of ours"
    if age > trust.max_age:
        return f"host {host.name} was last observed {age:.0f} s ago: its agent is silent or its clock is behind"
    for name in ("cpu", "memory", "network"):
        capacity: float = getattr(host.capacity, name)
        load: float = getattr(host.load, name)
        parts: float = getattr(workloads, name) + getattr(host.other, name)
        if name == "network" and not capacity:
            continue  # nobody knows how fast the link is
        if abs(load - parts) > trust.tolerance * capacity:
            return (
                f"host {host.name} says that {load:.6g} of {name} are in use, its workloads and other tasks "
                f"make {parts:.6g}, of {capacity:.6g}"
            )
        if load > capacity * (1 + trust.tolerance):
            return f"host {host.name} says that {load:.6g} of {name} are in use, of {capacity:.6g}"
    return ""


def contradictions(cluster: Cluster) -> dict[str, str]:
    """Workloads whose rules no placement can keep, each with the reason."""
    found: dict[str, str] = {}
    for bundle in bundles(cluster):
        reason = _contradiction(bundle)
        if reason:
            found.update((workload.name, reason) for workload in bundle)
    return found


def _contradiction(bundle: tuple[Workload, ...]) -> str:
    if len(bundle) == 1:
        return ""
    apart: dict[str, str] = {}
    labels: dict[str, tuple[str, str]] = {}
    pins: dict[str, str] = {}
    for workload in bundle:
        for group in workload.anti_affinity:
            if group in apart:
                return (
                    f"{apart[group]} and {workload.name} must share a host by their affinity, "
                    f"and must not by anti-affinity {group}"
                )
            apart[group] = workload.name
        for key, value in workload.host_labels.items():
            other, name = labels.setdefault(key, (value, workload.name))
            if other != value:
                return (
                    f"{name} and {workload.name} must share a host, which cannot have {key}={other} and {key}={value}"
                )
        if workload.pinned:
            pins[workload.host] = workload.name
    if len(pins) > 1:
        (one_host, one), (other_host, two) = sorted(pins.items())[:2]
        return f"{one} and {two} must share a host, but are pinned to {one_host} and {other_host}"
    return ""


def bundles(cluster: Cluster) -> list[tuple[Workload, ...]]:
    """The workloads, those that share an affinity group (with each other, or through others) together; in order."""
    parent: dict[str, str] = {}

    def root(group: str) -> str:
        while parent.setdefault(group, group) != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    for workload in cluster.workloads:
        for group in workload.affinity[1:]:
            parent[root(group)] = root(workload.affinity[0])
    together: dict[str, list[Workload]] = {}
    found: list[tuple[Workload, ...] | list[Workload]] = []
    for workload in cluster.workloads:
        if not workload.affinity:
            found.append((workload,))
            continue
        key = root(workload.affinity[0])
        if key not in together:
            together[key] = []
            found.append(together[key])
        together[key].append(workload)
    return [tuple(bundle) for bundle in found]
