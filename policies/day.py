"""A day in the life of a fleet: who wants how much, when. Recorded, or invented from a seed.

A day says what workloads want; what they get, and where, is `simulate`'s. Both kinds are replayed as often as asked
and are the same each time, so that several rules can be tried on one day.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp, pi, sin
from random import Random
from typing import Protocol

import msgspec

from .consistency import ClusterError, validate
from .model import Cluster, Host, Resources, Workload

GIB = 2.0**30
HOUR = 3600.0


class Sample(msgspec.Struct, frozen=True):
    """What each workload wants at one time, in the order of the day's workloads: cores, bytes of memory."""

    cpu: Sequence[float]
    memory: Sequence[float]


class Day(Protocol):
    """Hosts and workloads as they are at `began_at`, and one sample each `interval` seconds."""

    @property
    def began_at(self) -> float: ...
    @property
    def interval(self) -> float: ...
    @property
    def hosts(self) -> tuple[Host, ...]: ...
    @property
    def workloads(self) -> tuple[Workload, ...]: ...
    def samples(self) -> Iterator[Sample]: ...


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """A recorded day, as it is in a file of JSON."""

    began_at: float
    interval: float
    hosts: tuple[Host, ...]
    workloads: tuple[Workload, ...]
    recorded: tuple[Sample, ...]

    def samples(self) -> Iterator[Sample]:
        return iter(self.recorded)


def decode(data: bytes) -> Recording:
    """A recording from JSON. Raises `ClusterError` if it is none, or makes no sense."""
    try:
        day = msgspec.json.decode(data, type=Recording)
    except msgspec.DecodeError as error:
        raise ClusterError([f"this is no recording of a day: {error}"]) from None
    validate(Cluster(time=day.began_at, hosts=day.hosts, workloads=day.workloads))
    wrong = []
    if not 0 < day.interval < 1e9:
        wrong.append(f"the interval is {day.interval} s")
    if not day.recorded:
        wrong.append("the recording has no samples")
    for number, sample in enumerate(day.recorded):
        if not len(sample.cpu) == len(sample.memory) == len(day.workloads):
            wrong.append(f"sample {number} is not of {len(day.workloads)} workloads")
        if not all(0 <= amount < 1e18 for row in (sample.cpu, sample.memory) for amount in row):
            wrong.append(f"sample {number} has an amount that is none")
    if wrong:
        raise ClusterError(wrong)
    return day


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What an invented day is like.

    `cpu` and `memory`: the shares of the fleet that are wanted on average. `noise`: the typical change of a workload
    from one sample to the next, as a share of it. `bursts`: of each workload, per day. The day begins at midnight.
    """

    hosts: int = 100
    workloads: int = 1000
    hours: float = 24.0
    interval: float = 300.0
    seed: int = 1
    cpu: float = 0.45
    memory: float = 0.5
    noise: float = 0.1
    bursts: float = 1.0


class Invented:
    """A day from a seed: offices by day, batches by night, and what never sleeps; bursts and noise.

    A third of the hosts is twice as large. Workloads of one kind were deployed together, so they are on neighbouring
    hosts, and what is even on average is not at any time of the day. Raises `ClusterError` if nothing can be like that.
    """

    def __init__(self, shape: Shape) -> None:
        if not (shape.hosts >= 1 and shape.workloads >= 0 and 0 < shape.interval <= shape.hours * HOUR < 1e9):
            raise ClusterError(["a day needs a host, an interval, and to be longer than that"])
        if not (0 < shape.cpu < 1 and 0 < shape.memory <= 0.8):
            raise ClusterError(["a day needs a share of cpu between 0 and 1 and of memory between 0 and 0.8"])
        self.shape = shape
        self.began_at = 0.0
        self.interval = shape.interval
        chance = Random(f"fleet {shape.seed}")
        self.hosts = tuple(_host(number, chance) for number in range(shape.hosts))
        self._kind: list[tuple[float, float, float]] = []
        self.workloads = self._deployed(chance)

    def _deployed(self, chance: Random) -> tuple[Workload, ...]:
        shape, hosts = self.shape, self.hosts
        count = shape.workloads
        cpu = [chance.lognormvariate(0.0, 0.9) for _ in range(count)]
        memory = [chance.lognormvariate(0.0, 0.8) for _ in range(count)]
        total = [sum(host.capacity.cpu for host in hosts), sum(host.capacity.memory for host in hosts)]
        of_cpu = shape.cpu * total[0] / (sum(cpu) or 1.0)
        of_memory = shape.memory * total[1] / (sum(memory) or 1.0)
        room = [0.9 * host.capacity.memory - host.load.memory for host in hosts]
        largest = 0.25 * min(host.capacity.memory for host in hosts)
        made = []
        for number in range(count):
            size = min(memory[number] * of_memory, largest)
            at = int(number / count * len(hosts))
            if chance.random() < 0.3 or room[at] < size:
                tried = (chance.randrange(len(hosts)) for _ in range(50))
                at = next((one for one in tried if room[one] >= size), -1)
                if at < 0:
                    at = max(range(len(hosts)), key=lambda one: room[one])
            room[at] -= size
            used = min(cpu[number] * of_cpu, 0.5 * hosts[at].capacity.cpu)
            # Kinds follow one another with the place: about 25 workloads are of one kind.
            kind = Random(f"kind {shape.seed} {number // 25}").random()
            peak = 14.0 if kind < 0.55 else 2.0 if kind < 0.8 else chance.random() * 24
            self._kind.append((used, size, peak + chance.gauss(0, 1)))
            rule = chance.random()
            made.append(
                Workload(
                    name=f"w{number}",
                    host=hosts[at].name,
                    used=Resources(used, size),
                    dirty_rate=chance.lognormvariate(15.5, 1.2),
                    downtime_budget=2.0 if rule > 0.9 else None,
                    anti_affinity=(f"apart{number // 2}",) if rule < 0.05 else (),
                    pinned=0.05 <= rule < 0.07,
                )
            )
        return tuple(made)

    def samples(self) -> Iterator[Sample]:
        shape = self.shape
        chance = Random(f"day {shape.seed}")
        gauss, random = chance.gauss, chance.random
        level = [0.0] * shape.workloads
        burst = [0] * shape.workloads
        likely = shape.bursts * shape.interval / (24 * HOUR)
        amplitude = [0.15 + 0.75 * chance.random() for _ in self._kind]
        memory = [size for _, size, _ in self._kind]
        for step in range(int(shape.hours * HOUR / shape.interval)):
            hour = step * shape.interval / HOUR
            cpu = []
            for number, (used, _, peak) in enumerate(self._kind):
                level[number] = noise = 0.9 * level[number] + gauss(0, shape.noise)
                if burst[number]:
                    burst[number] -= 1
                elif random() < likely:
                    burst[number] = 1 + int(random() * 2 * HOUR / shape.interval)
                wave = 1 + amplitude[number] * sin((hour - peak) * pi / 12 + pi / 2)
                cpu.append(used * wave * exp(noise) * (2.5 if burst[number] else 1.0))
            yield Sample(cpu, memory)


def _host(number: int, chance: Random) -> Host:
    size = 2.0 if chance.random() < 1 / 3 else 1.0
    capacity = Resources(16 * size, 64 * GIB * size, 1.25e9)
    other = Resources(0.02 * capacity.cpu, 0.03 * capacity.memory, 0.0)
    return Host(name=f"h{number}", capacity=capacity, load=other, other=other)
