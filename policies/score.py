"""How unevenly a cluster is loaded, and what a move would do about it.

The measure: of each resource, the variance over the hosts of their utilisation, each host weighted by its capacity;
imbalance is the square root of their weighted mean. So 0 is even, and 0.1 means that utilisations are typically 10
points off the mean. A move changes the sum of squares in only two terms and leaves the mean where it is, so its gain
costs a few multiplications, and a sequence of moves with positive gain always ends.

Pressure counts as utilisation: a host whose tasks wait is fuller than its load says.
"""

from __future__ import annotations

from math import sqrt

import msgspec

from .ledger import Ledger, Unit


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """How much each resource counts, and how much of full pressure counts as utilisation."""

    cpu: float = 1.0
    memory: float = 1.0
    network: float = 0.25
    pressure: float = 0.25


WEIGHTS = Weights()


class Score:
    """Utilisation of the open hosts (`members`) of a ledger; call `update` for each host whose load has changed.

    `scale` and `inverse`, for each resource: what a unit of it weighs, and 1 over each host's capacity.
    """

    def __init__(self, ledger: Ledger, weights: Weights = WEIGHTS) -> None:
        self.ledger = ledger
        self.members = [host for host, reason in enumerate(ledger.closed) if not reason]
        self.inverse = [
            (1 / cpu, 1 / memory, 1 / network if network else 0.0) for cpu, memory, network in ledger.capacity
        ]
        # Of the largest hosts.
        self._least = tuple(min((of_host[part] for of_host in self.inverse), default=0.0) for part in range(3))
        share = weights.pressure
        self._offset = [(share * host.pressure.cpu, share * host.pressure.memory, 0.0) for host in ledger.hosts]
        count = max(len(self.members), 1)
        totals = [sum(ledger.capacity[host][part] for host in self.members) for part in range(3)]
        self._average = [total / count or 1.0 for total in totals]
        self.weights = (weights.cpu, weights.memory, weights.network if totals[2] else 0.0)
        self.scale = tuple(weight / size for weight, size in zip(self.weights, self._average, strict=True))
        self.utilisation: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)] * len(ledger.hosts)
        for host in range(len(ledger.hosts)):
            self.update(host)
        self.mean = self._mean()

    def update(self, host: int) -> None:
        load, inverse, offset = self.ledger.load[host], self.inverse[host], self._offset[host]
        self.utilisation[host] = (
            load[0] * inverse[0] + offset[0],
            load[1] * inverse[1] + offset[1],
            load[2] * inverse[2] + offset[2],
        )

    def _mean(self) -> tuple[float, float, float]:
        count = max(len(self.members), 1)
        capacity, utilisation = self.ledger.capacity, self.utilisation
        cpu, memory, network = (
            sum(utilisation[host][part] * capacity[host][part] for host in self.members) / count / self._average[part]
            for part in range(3)
        )
        return cpu, memory, network

    def contribution(self, host: int) -> float:
        """A host's part of the sum of squared deviations."""
        capacity, utilisation = self.ledger.capacity[host], self.utilisation[host]
        scale, mean = self.scale, self.mean
        return (
            scale[0] * capacity[0] * (utilisation[0] - mean[0]) ** 2
            + scale[1] * capacity[1] * (utilisation[1] - mean[1]) ** 2
            + scale[2] * capacity[2] * (utilisation[2] - mean[2]) ** 2
        )

    def excess(self, host: int) -> float:
        """How far a host is above the mean in the resource where it is most."""
        utilisation, mean = self.utilisation[host], self.mean
        return max(
            utilisation[part] - mean[part] for part in range(3) if self.weights[part] and self.inverse[host][part]
        )

    def imbalance(self) -> float:
        """0 is even; see above."""
        count = max(len(self.members), 1)
        return sqrt(sum(self.contribution(host) for host in self.members) / count / (sum(self.weights) or 1.0))

    def gain(self, unit: Unit, source: int, target: int) -> float:
        """By how much the sum of squared deviations falls if a unit goes from `source` to `target`."""
        here, there = self.utilisation[source], self.utilisation[target]
        of_source, of_target = self.inverse[source], self.inverse[target]
        scale = self.scale
        cpu, memory, network = unit.cpu, unit.memory, unit.network
        gain = scale[0] * cpu * (2 * (here[0] - there[0]) - cpu * (of_source[0] + of_target[0]))
        gain += scale[1] * memory * (2 * (here[1] - there[1]) - memory * (of_source[1] + of_target[1]))
        if network:
            gain += scale[2] * network * (2 * (here[2] - there[2]) - network * (of_source[2] + of_target[2]))
        return gain

    def hope(self, unit: Unit, source: int, there: tuple[float, float, float]) -> float:
        """The most that `gain` can be for any target where no less is in use than `there`."""
        here, of_source, of_target, scale = self.utilisation[source], self.inverse[source], self._least, self.scale
        cpu, memory, network = unit.cpu, unit.memory, unit.network
        gain = scale[0] * cpu * (2 * (here[0] - there[0]) - cpu * (of_source[0] + of_target[0]))
        gain += scale[1] * memory * (2 * (here[1] - there[1]) - memory * (of_source[1] + of_target[1]))
        if network:
            gain += scale[2] * network * (2 * (here[2] - there[2]) - network * (of_source[2] + of_target[2]))
        return gain

    def burden(self, unit: Unit, target: int) -> float:
        """What a unit adds to the sum of squares on `target`, wherever it comes from."""
        there, inverse, scale = self.utilisation[target], self.inverse[target], self.scale
        return (
            scale[0] * unit.cpu * (2 * there[0] + unit.cpu * inverse[0])
            + scale[1] * unit.memory * (2 * there[1] + unit.memory * inverse[1])
            + scale[2] * unit.network * (2 * there[2] + unit.network * inverse[2])
        )

    def exchange(self, one: Unit, two: Unit) -> float:
        """By how much the sum falls if two units change places."""
        here, there = self.utilisation[one.host], self.utilisation[two.host]
        of_one, of_two = self.inverse[one.host], self.inverse[two.host]
        parts = (one.cpu - two.cpu, one.memory - two.memory, one.network - two.network)
        return sum(
            self.scale[part] * less * (2 * (here[part] - there[part]) - less * (of_one[part] + of_two[part]))
            for part, less in enumerate(parts)
        )

    def weigh(self, unit: Unit) -> tuple[float, float]:
        """A unit's cpu and memory as weighted shares of an average host."""
        return self.scale[0] * unit.cpu, self.scale[1] * unit.memory

    def text(self, host: int) -> str:
        """Utilisation for people."""
        at, load, inverse = self.ledger.hosts[host], self.ledger.load[host], self.inverse[host]
        text = f"{at.name} (cpu {load[0] * inverse[0]:.0%}, memory {load[1] * inverse[1]:.0%}"
        pressure = {"cpu": at.pressure.cpu, "memory": at.pressure.memory}
        under = [f", {name} pressure {share:.0%}" for name, share in pressure.items() if share >= 0.01]
        return text + "".join(under) + ")"
