"""Who is where and how full each host is, kept up to date move by move.

A `Ledger` is a policy's scratch paper: made from a cluster, changed by `move`, thrown away. It keeps two books. `load`
is what will be once all moves are over; scores read it. `reserved` is the most that a host may hold at any moment of
the plan, since memory and groups are given back only when a migration has ended; fits read it. So a plan's moves can
be run in any order, and a limit is never passed in between.

Hosts and units are numbers here: a fleet has a hundred thousand workloads and planning has seconds.
"""

from __future__ import annotations

import msgspec

from .consistency import Findings, bundles
from .model import Cluster, Host, HostState, Workload


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How full a target may become: shares of its capacity."""

    cpu: float = 0.9
    memory: float = 0.9
    network: float = 0.9


LIMITS = Limits()


class Unit:
    """Workloads that move together: one, or a bundle joined by affinity. `host` is -1 where a bundle is split."""

    __slots__ = ("cpu", "groups", "host", "kept", "memory", "need", "network", "workloads")

    def __init__(self, workloads: tuple[Workload, ...], host: int, need: int, kept: str) -> None:
        self.workloads = workloads
        self.host = host
        self.need = need
        # Why it must stay where it is; empty where it may move.
        self.kept = kept
        if len(workloads) == 1:
            workload = workloads[0]
            used = workload.used
            self.cpu, self.memory, self.network = used.cpu, used.memory, used.network
            self.groups = workload.anti_affinity
        else:
            self.cpu = sum(workload.used.cpu for workload in workloads)
            self.memory = sum(workload.used.memory for workload in workloads)
            self.network = sum(workload.used.network for workload in workloads)
            self.groups = tuple(group for workload in workloads for group in workload.anti_affinity)

    @property
    def name(self) -> str:
        return self.workloads[0].name


class Ledger:
    """The books over a valid cluster. `findings` says whom to leave alone."""

    def __init__(self, cluster: Cluster, findings: Findings, limits: Limits = LIMITS) -> None:
        self.cluster = cluster
        self.findings = findings
        self.hosts: tuple[Host, ...] = cluster.hosts
        self.index = {host.name: number for number, host in enumerate(self.hosts)}
        self.capacity = [(host.capacity.cpu, host.capacity.memory, host.capacity.network) for host in self.hosts]
        self.load = [[host.load.cpu, host.load.memory, host.load.network] for host in self.hosts]
        self.reserved = [list(load) for load in self.load]
        self.most = [
            (limits.cpu * cpu, limits.memory * memory, limits.network * network if network else float("inf"))
            for cpu, memory, network in self.capacity
        ]
        # Why a host gets nothing; empty where it may.
        self.closed = [self._closed(host) for host in self.hosts]
        self.groups: list[dict[str, int]] = [{} for _ in self.hosts]
        self.units_on: list[list[Unit]] = [[] for _ in self.hosts]
        self._needs: dict[tuple[object, ...], int] = {}
        self._need_of: list[tuple[frozenset[str], tuple[tuple[str, str], ...], frozenset[str]]] = []
        self._compatible: list[dict[int, bool]] = []
        self._plain: dict[int, int] = {}
        self.kinds = self._kinds()
        self.units = [self._unit(bundle) for bundle in bundles(cluster)]
        for unit in self.units:
            self._enter(unit)

    def _closed(self, host: Host) -> str:
        if host.state is not HostState.ACTIVE:
            return f"host {host.name} is {host.state.value}"
        return self.findings.hosts.get(host.name, "")

    def _kinds(self) -> list[int]:
        """Hosts that no requirement tells apart have one kind."""
        seen: dict[tuple[object, ...], int] = {}
        return [
            seen.setdefault((host.cpu_features, tuple(sorted(host.labels.items())), host.engines), len(seen))
            for host in self.hosts
        ]

    def _unit(self, bundle: tuple[Workload, ...]) -> Unit:
        first = bundle[0]
        host = self.index[first.host]
        if len(bundle) == 1:
            kept = self._kept(first)
            return Unit(bundle, host, self._need(bundle, host), kept)
        kept = next((reason for workload in bundle if (reason := self._kept(workload))), "")
        if any(workload.host != first.host for workload in bundle):
            host = -1
        return Unit(bundle, host, self._need(bundle, host), kept)

    def _kept(self, workload: Workload) -> str:
        if workload.pinned:
            return f"{workload.name} is pinned to {workload.host}"
        if workload.moving_to is not None:
            return f"{workload.name} is already moving to {workload.moving_to}"
        return self.findings.workloads.get(workload.name, "") or self.findings.hosts.get(workload.host, "")

    def _need(self, bundle: tuple[Workload, ...], host: int) -> int:
        first = bundle[0]
        if len(bundle) == 1 and not first.host_labels and first.cpu_features is None:
            kind = self.kinds[host]
            if kind not in self._plain:
                at = self.hosts[host]
                self._plain[kind] = self._intern(at.cpu_features, (), at.engines)
            return self._plain[kind]
        features: set[str] = set()
        labels: dict[str, str] = {}
        engines: frozenset[str] = frozenset()
        for workload in bundle:
            at = self.hosts[self.index[workload.host]]
            features |= at.cpu_features if workload.cpu_features is None else workload.cpu_features
            labels.update(workload.host_labels)
            engines |= at.engines
        return self._intern(frozenset(features), tuple(sorted(labels.items())), engines)

    def _intern(self, features: frozenset[str], labels: tuple[tuple[str, str], ...], engines: frozenset[str]) -> int:
        key = (features, labels, engines)
        if key not in self._needs:
            self._needs[key] = len(self._need_of)
            self._need_of.append(key)
            self._compatible.append({})
        return self._needs[key]

    def _enter(self, unit: Unit) -> None:
        for workload in unit.workloads:
            host = self.index[workload.host]
            for group in workload.anti_affinity:
                self.groups[host][group] = self.groups[host].get(group, 0) + 1
            if workload.moving_to is not None and workload.moving_to != workload.host:
                target = self.index[workload.moving_to]
                used = workload.used
                for book in (self.load[target], self.reserved[target]):
                    book[0] += used.cpu
                    book[1] += used.memory
                    book[2] += used.network
                for group in workload.anti_affinity:
                    self.groups[target][group] = self.groups[target].get(group, 0) + 1
                source = self.load[host]
                source[0] = max(source[0] - used.cpu, 0.0)
                source[1] = max(source[1] - used.memory, 0.0)
                source[2] = max(source[2] - used.network, 0.0)
        if unit.host >= 0:
            self.units_on[unit.host].append(unit)

    def compatible(self, need: int, host: int) -> bool:
        """Whether a host has the CPU features and labels of a need, and an engine in common with where it runs."""
        cache = self._compatible[need]
        kind = self.kinds[host]
        answer = cache.get(kind)
        if answer is None:
            features, labels, engines = self._need_of[need]
            at = self.hosts[host]
            answer = (
                features <= at.cpu_features
                and all(at.labels.get(key) == value for key, value in labels)
                and (not engines or not at.engines or bool(engines & at.engines))
            )
            cache[kind] = answer
        return answer

    def partial(self, unit: Unit, target: int) -> Unit:
        """The part of a split bundle that is not on `target`, with the needs of the whole."""
        parts = tuple(workload for workload in unit.workloads if self.index[workload.host] != target)
        return Unit(parts, -1, unit.need, unit.kept)

    def fits(self, unit: Unit, host: int) -> bool:
        """Whether a unit may go to a host now: the host is open and compatible, has room, and no group forbids it."""
        if self.closed[host] or not self.compatible(unit.need, host):
            return False
        reserved, most = self.reserved[host], self.most[host]
        if (
            reserved[1] + unit.memory > most[1]
            or reserved[0] + unit.cpu > most[0]
            or reserved[2] + unit.network > most[2]
        ):
            return False
        if unit.groups:
            groups = self.groups[host]
            return not any(groups.get(group) for group in unit.groups)
        return True

    def why_not(self, unit: Unit, host: int) -> str:
        """The reason why `fits` says no, for people; empty where it says yes."""
        at = self.hosts[host]
        if self.closed[host]:
            return self.closed[host]
        features, labels, engines = self._need_of[unit.need]
        if missing := sorted(features - at.cpu_features):
            return f"the CPU of {at.name} lacks {', '.join(missing[:5])}"
        for key, value in labels:
            if at.labels.get(key) != value:
                return f"host {at.name} is not labelled {key}={value}"
        if not self.compatible(unit.need, host):
            return f"host {at.name} has none of the engines {', '.join(sorted(engines))}"
        wanted = (unit.cpu, unit.memory, unit.network)
        for name, part, used, most in zip(
            ("cpu", "memory", "network"), wanted, self.reserved[host], self.most[host], strict=True
        ):
            if used + part > most:
                return f"host {at.name} has no room: {name} {used:.6g} + {part:.6g} > {most:.6g}"
        for group in unit.groups:
            if self.groups[host].get(group):
                return f"another of the anti-affinity group {group} is on host {at.name}"
        return ""

    def move(self, unit: Unit, target: int) -> None:
        """Enter a planned move of a unit that `fits`. A split bundle's parts leave each their own host."""
        for workload in unit.workloads:
            source = self.index[workload.host] if unit.host < 0 else unit.host
            if source == target:
                continue
            used = workload.used
            leaves = self.load[source]
            leaves[0] -= used.cpu
            leaves[1] -= used.memory
            leaves[2] -= used.network
            for book in (self.load[target], self.reserved[target]):
                book[0] += used.cpu
                book[1] += used.memory
                book[2] += used.network
            groups = self.groups[target]
            for group in workload.anti_affinity:
                groups[group] = groups.get(group, 0) + 1
        if unit.host >= 0:
            self.units_on[unit.host].remove(unit)
        unit.host = target
        self.units_on[target].append(unit)

    def take_back(self, unit: Unit, origin: int) -> None:
        """Undo the `move` of a whole unit that was on `origin`; the room it had taken at its target is free again."""
        target = unit.host
        for workload in unit.workloads:
            used = workload.used
            for book in (self.load[target], self.reserved[target]):
                book[0] -= used.cpu
                book[1] -= used.memory
                book[2] -= used.network
            back = self.load[origin]
            back[0] += used.cpu
            back[1] += used.memory
            back[2] += used.network
            for group in workload.anti_affinity:
                self.groups[target][group] -= 1
        self.units_on[target].remove(unit)
        unit.host = origin
        self.units_on[origin].append(unit)
