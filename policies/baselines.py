"""Others' published rules for balancing, to be compared with ours on the same day.

Each is our reading of the rule that its project documents, with the documented defaults: what makes it act, what it
moves and where to. What they share with ours, so that only the rule differs: the same model of costs, no move to a host
that the workload does not fit on or whose rules forbid it, none of what is pinned. Where a project tries every guest on
every host, and a fleet is too large for that, the fullest `SOURCES` and emptiest `TARGETS` hosts are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from random import Random

from .consistency import inspect
from .cost import predict
from .drain_record import moves_of
from .ledger import Ledger, Limits, Unit
from .model import Cluster
from .plan import Cause, Move

SOURCES = 16
TARGETS = 16
# They fill a host up to all of it.
WHOLE = Limits(cpu=1.0, memory=1.0, network=1.0)

Load = tuple[float, float]


class View:
    """Shares of cpu and memory in use on each open host, while moves are planned."""

    def __init__(self, cluster: Cluster) -> None:
        self.ledger = Ledger(cluster, inspect(cluster), WHOLE)
        self.open = [host for host, reason in enumerate(self.ledger.closed) if not reason]
        self.cluster = cluster
        self.moves: list[Move] = []

    def load(self, host: int) -> Load:
        used, size = self.ledger.load[host], self.ledger.capacity[host]
        return used[0] / size[0], used[1] / size[1]

    def loads(self) -> dict[int, Load]:
        return {host: self.load(host) for host in self.open}

    def after(self, unit: Unit, source: int, target: int) -> tuple[Load, Load]:
        """The two hosts' loads if the unit moves."""
        here, there = self.load(source), self.load(target)
        of_source, of_target = self.ledger.capacity[source], self.ledger.capacity[target]
        return (
            (here[0] - unit.cpu / of_source[0], here[1] - unit.memory / of_source[1]),
            (there[0] + unit.cpu / of_target[0], there[1] + unit.memory / of_target[1]),
        )

    def units(self, host: int) -> list[Unit]:
        return [unit for unit in self.ledger.units_on[host] if not unit.kept]

    def choices(self, by: Callable[[Load], float]) -> Iterator[tuple[Unit, int, int]]:
        """Each unit of the fullest hosts with each of the emptiest hosts that it fits on."""
        order = sorted(self.open, key=lambda host: by(self.load(host)))
        targets = order[:TARGETS]
        for source in reversed(order[-SOURCES:]):
            for unit in self.units(source):
                for target in targets:
                    if target != source and self.ledger.fits(unit, target):
                        yield unit, source, target

    def move(self, unit: Unit, target: int, reason: str) -> None:
        hosts = self.ledger.hosts
        costs = [predict(one, hosts[self.ledger.index[one.host]], hosts[target], 0.5) for one in unit.workloads]
        slots = [len(self.moves)] * len(costs)
        self.moves += moves_of(unit, hosts[target].name, Cause.BALANCE, reason, 0.0, costs, slots)
        self.ledger.move(unit, target)
        unit.kept = f"{unit.name} moves already"


def deviation(values: Sequence[float]) -> float:
    mean = sum(values) / max(len(values), 1)
    return sqrt(sum((value - mean) ** 2 for value in values) / max(len(values), 1))


class _Sums:
    """The standard deviation of a number per host, and what it becomes when two of them change."""

    def __init__(self, values: Sequence[float]) -> None:
        self.count = max(len(values), 1)
        self.sum = sum(values)
        self.squares = sum(value * value for value in values)

    def changed(self, old: tuple[float, float], new: tuple[float, float]) -> tuple[float, float]:
        """Deviation and mean."""
        mean = (self.sum + sum(new) - sum(old)) / self.count
        squares = self.squares + sum(one * one for one in new) - sum(one * one for one in old)
        return sqrt(max(squares / self.count - mean * mean, 0.0)), mean


def _half(load: Load) -> float:
    return (load[0] + load[1]) / 2


class Proxmox:
    """Proxmox VE's dynamic scheduler: the imbalance is the nodes' deviation over their mean. Above 0.3 for three
    rounds, the one move that lowers it most, if it lowers it by a tenth; one migration at a time."""

    name = "proxmox"

    def __init__(self, threshold: float = 0.3, hold: int = 3, margin: float = 0.1) -> None:
        self._threshold, self._hold, self._margin = threshold, hold, margin
        self._rounds = 0

    def plan(self, cluster: Cluster) -> Sequence[Move]:
        if any(workload.moving_to for workload in cluster.workloads):
            return ()
        view = View(cluster)
        values = [_half(load) for load in view.loads().values()]
        mean = sum(values) / max(len(values), 1)
        now = deviation(values) / mean if mean else 0.0
        self._rounds = self._rounds + 1 if now > self._threshold else 0
        if self._rounds < self._hold:
            return ()
        sums = _Sums(values)
        best: tuple[float, Unit, int] | None = None
        for unit, source, target in view.choices(_half):
            here, there = view.after(unit, source, target)
            after, mean = sums.changed(
                (_half(view.load(source)), _half(view.load(target))), (_half(here), _half(there))
            )
            if best is None or after / mean < best[0]:
                best = after / mean, unit, target
        if best is not None and best[0] <= now * (1 - self._margin):
            view.move(best[1], best[2], f"imbalance {now:.2f} becomes {best[0]:.2f}")
            self._rounds = 0
        return view.moves


class Incus:
    """Incus's rebalancer: a server's score is the mean of cpu and memory in percent. If the highest is more than 20
    above the lowest, instances go from the one to the other until they meet half way; one per round, and none that
    moved within six hours."""

    name = "incus"

    def __init__(self, threshold: float = 20.0, batch: int = 1, cooldown: float = 6 * 3600.0) -> None:
        self._threshold, self._batch, self._cooldown = threshold, batch, cooldown

    def plan(self, cluster: Cluster) -> Sequence[Move]:
        view = View(cluster)
        order = sorted(view.open, key=lambda host: _half(view.load(host)))
        if len(order) < 2:
            return ()
        target, source = order[0], order[-1]
        low, high = 100 * _half(view.load(target)), 100 * _half(view.load(source))
        if high - low < self._threshold:
            return ()
        middle = (high + low) / 2
        for unit in view.units(source):
            moved = [one.last_moved for one in unit.workloads if one.last_moved is not None]
            if (moved and cluster.time - max(moved) < self._cooldown) or not view.ledger.fits(unit, target):
                continue
            here, there = view.after(unit, source, target)
            if 100 * _half(there) <= middle and 100 * _half(here) >= low:
                view.move(unit, target, f"scores {high:.0f} and {low:.0f}")
                if len(view.moves) >= self._batch:
                    break
        return view.moves


class Watcher:
    """OpenStack Watcher's workload stabilization: when the deviation of cpu or of memory over the hosts is above 0.2,
    moves that lower the weighted sum of both, the best first, until neither is."""

    name = "watcher"

    def __init__(self, threshold: float = 0.2, host_choice: int = 3, seed: int = 1) -> None:
        self._threshold, self._host_choice = threshold, host_choice
        self._chance = Random(f"watcher {seed}")

    def plan(self, cluster: Cluster) -> Sequence[Move]:
        view = View(cluster)
        while len(view.moves) < len(view.open):
            loads = list(view.loads().values())
            sums = [_Sums([load[part] for load in loads]) for part in range(2)]
            now = [deviation([load[part] for load in loads]) for part in range(2)]
            if max(now, default=0.0) <= self._threshold:
                break
            best: tuple[float, Unit, int] | None = None
            for unit, source, target in self._choices(view):
                before = view.load(source), view.load(target)
                after = view.after(unit, source, target)
                weighted = sum(
                    sums[part].changed((before[0][part], before[1][part]), (after[0][part], after[1][part]))[0]
                    for part in range(2)
                )
                if best is None or weighted < best[0]:
                    best = weighted, unit, target
            if best is None or best[0] >= sum(now):
                break
            view.move(best[1], best[2], f"deviations of cpu {now[0]:.2f}, of memory {now[1]:.2f}")
        return view.moves

    def _choices(self, view: View) -> Iterator[tuple[Unit, int, int]]:
        """`host_choice: retry`: some targets by chance for each guest."""
        order = sorted(view.open, key=lambda host: _half(view.load(host)))
        for source in order[-SOURCES:]:
            for unit in view.units(source):
                for target in self._chance.sample(order, min(self._host_choice, len(order))):
                    if target != source and view.ledger.fits(unit, target):
                        yield unit, source, target


class Descheduler:
    """The Kubernetes descheduler's LowNodeUtilization: while there are nodes below the low thresholds in everything,
    pods are evicted from nodes above the high ones in anything, until these are not; the scheduler puts each where
    most is free. With `around`, the thresholds are so far below and above the mean (useDeviationThresholds)."""

    def __init__(self, low: float = 0.2, high: float = 0.5, around: float | None = None) -> None:
        self.name = "descheduler" if around is None else "descheduler-deviation"
        self._low, self._high, self._around = low, high, around

    def plan(self, cluster: Cluster) -> Sequence[Move]:
        view = View(cluster)
        loads = view.loads()
        count = max(len(loads), 1)
        low = high = (0.0, 0.0)
        if self._around is None:
            low, high = (self._low, self._low), (self._high, self._high)
        else:
            mean = sum(load[0] for load in loads.values()) / count, sum(load[1] for load in loads.values()) / count
            low = mean[0] - self._around, mean[1] - self._around
            high = mean[0] + self._around, mean[1] + self._around
        under = [host for host, load in loads.items() if load[0] < low[0] and load[1] < low[1]]
        over = [host for host, load in loads.items() if load[0] > high[0] or load[1] > high[1]]
        for source in sorted(over, key=lambda host: -sum(loads[host])):
            for unit in sorted(view.units(source), key=lambda unit: (unit.cpu, unit.name)):
                load = view.load(source)
                if load[0] <= high[0] and load[1] <= high[1]:
                    break
                targets = [
                    host
                    for host in under
                    if view.load(host)[0] <= high[0] and view.load(host)[1] <= high[1] and view.ledger.fits(unit, host)
                ]
                if not targets:
                    break
                view.move(unit, min(targets, key=lambda host: _half(view.load(host))), "node is overutilized")
        return view.moves


class Drs:
    """After VMware's DRS as it was published: while the deviation of the hosts' load is above a target, the move that
    lowers it most, from the fullest hosts; level 3 of five leaves out what lowers it by less than a hundredth."""

    name = "drs"

    def __init__(self, target: float = 0.1, least: float = 0.01, most: int = 8) -> None:
        self._target, self._least, self._most = target, least, most

    def plan(self, cluster: Cluster) -> Sequence[Move]:
        view = View(cluster)
        while len(view.moves) < self._most:
            values = [max(load) for load in view.loads().values()]
            now = deviation(values)
            if now <= self._target:
                break
            sums = _Sums(values)
            best: tuple[float, Unit, int] | None = None
            for unit, source, target in view.choices(max):
                here, there = view.after(unit, source, target)
                after, _ = sums.changed((max(view.load(source)), max(view.load(target))), (max(here), max(there)))
                if best is None or after < best[0]:
                    best = after, unit, target
            if best is None or best[0] > now * (1 - self._least):
                break
            view.move(best[1], best[2], f"deviation {now:.3f} becomes {best[0]:.3f}")
        return view.moves


NAMES = ("proxmox", "incus", "watcher", "descheduler", "descheduler-deviation", "drs")


def rules() -> tuple[Proxmox | Incus | Watcher | Descheduler | Drs, ...]:
    """One of each, new, in the order of `NAMES`."""
    return Proxmox(), Incus(), Watcher(), Descheduler(), Descheduler(around=0.1), Drs()
